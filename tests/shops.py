"""A small shop to be backed up: a database on the host ``db1``, files on ``app1``, and faults to give it."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from compose.demo.embedded_daemon import wait_until
from tasks import archive
from tests.conftest import Served
from tests.systems import System
from workers.storage.local import LocalStore

DATABASE = "shop's orders"
DUMP = "postgres.shop%27s%20orders.dump.zst"
BALLAST_MEGABYTES = 48


@dataclass(frozen=True)
class Shop:
    """A system with a database on ``db1`` and files on ``app1``."""

    system: System
    database: dict[str, Any]
    uploads: Path

    @contextmanager
    def held_dump(self) -> Iterator[None]:
        """Let every pg_dump wait, before its first byte, while the block runs."""
        with psycopg.connect(**self.database) as connection:
            connection.execute("DROP SEQUENCE gate")
            yield
            connection.rollback()

    def freeze_dump(self) -> tuple[str, int]:
        """Start a full backup, stop its pg_dump in mid-stream, and return the run and the process."""
        with self.held_dump():
            run_id = self.system.backup()
            child = self.system.wait_for_child("postgres", "pg_dump")
        folder = f"parts/{run_id}"
        deadline = time.monotonic() + 30
        while max(self.system.unfinished(folder).values(), default=0) < 1_000_000:
            assert time.monotonic() < deadline, "the dump was over before it could be stopped"
            time.sleep(0.002)
        os.kill(child, signal.SIGSTOP)
        assert not self.committed(run_id, DUMP)
        return run_id, child

    def committed(self, run_id: str, name: str) -> bool:
        return (self.system.store / "parts" / run_id / name).exists()

    def assert_nothing_left(self) -> None:
        """No child, no half object, no parts of a run that has its archive."""
        assert wait_until(
            lambda: not self.system.children("postgres") + self.system.children("uploads"), timeout=5
        )
        assert self.system.unfinished() == {}
        parts = self.system.store / "parts"
        assert not parts.exists(), sorted(parts.rglob("*"))

    def assert_verifies(self, run: dict[str, Any]) -> None:
        """The archive of a run is whole, and holds the parts of all of its components."""
        metadata = archive.verify(LocalStore(self.system.store), run["archive"])
        assert {part.component for part in metadata.parts} == set(run["components"])
        assert archive.read_sidecar(LocalStore(self.system.store), run["archive"]).metadata == metadata

    def assert_next_succeeds(self) -> None:
        self.assert_verifies(self.system.complete())
        self.assert_nothing_left()


@contextmanager
def shop_of(
    make: Callable[..., System], postgres: Served, uploads: Path, *, limits: Mapping[str, float]
) -> Iterator[Shop]:
    """Fill a database of the server and the folder ``uploads``, and start a backup system for them."""
    server: dict[str, Any] = {
        "host": postgres.host,
        "port": postgres.port,
        "user": postgres.user,
        "password": postgres.password,
    }
    with psycopg.connect(**server, dbname="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{DATABASE}"')
    with psycopg.connect(**server, dbname=DATABASE) as connection:
        connection.execute("CREATE TABLE ballast (line text); CREATE SEQUENCE gate")
        with connection.cursor().copy("COPY ballast FROM STDIN") as copy:
            for _ in range(BALLAST_MEGABYTES):
                copy.write("".join(f"{secrets.token_hex(1 << 14)}\n" for _ in range(32)))
    uploads.mkdir()
    (uploads / "letter.txt").write_text("kept")
    components = f"""
[components.postgres]
kind = "postgres"
host = "db1"
address = "127.0.0.1"
port = {postgres.port}
password = {{ env = "POSTGRES_PASSWORD" }}
databases = ["{DATABASE}"]
bin_dir = "{postgres.bin_dir}"

[components.uploads]
kind = "files"
host = "app1"
path = "{uploads}"
"""
    environment = {"POSTGRES_PASSWORD": postgres.password}
    system = make(components, limits=limits, environment=environment)
    yield Shop(system, {**server, "dbname": DATABASE}, uploads)
    with psycopg.connect(**server, dbname="postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{DATABASE}" WITH (FORCE)')


def attempts(run: dict[str, Any]) -> dict[str, int]:
    return {step["name"]: step["attempt"] for step in run["steps"]}
