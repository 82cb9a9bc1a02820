"""Encrypted archives that real workers prove, level by level, and what they say of one that was damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pyrage import x25519

from compose.demo.settings import SYSTEM_NAME
from tasks import archive as archives
from tasks.commands.preflight import SECONDS_TO_ANSWER
from tests.conftest import Served
from tests.systems import BOUND, System, wait_until
from workers.storage.local import LocalStore

SECRET = "planted-and-never-seen-in-the-store"
SETTINGS = """
[components.uploads]
kind = "files"
host = "app1"
path = "{uploads}"

[components.databases]
kind = "postgres"
host = "app1"
address = "127.0.0.1"
port = {port}
bin_dir = "{bin_dir}"
password = {{ file = "{password}" }}
databases = ["proofs"]

[offsite.store]
path = "{folder}/offsite"

[encryption]
recipients = ["{recipient}"]
identities = [{{ file = "{identity}" }}]
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], folder: Path, postgres_server: Served) -> Iterator[System]:
    identity = x25519.Identity.generate()
    (folder / "key").write_text(f"{identity}\n")
    (folder / "key").chmod(0o600)
    (folder / "uploads").mkdir()
    (folder / "uploads" / "document").write_text(SECRET * 100)
    (folder / "password").write_text(postgres_server.password)
    settings = SETTINGS.format(
        folder=folder,
        uploads=folder / "uploads",
        recipient=identity.to_public(),
        identity=folder / "key",
        port=postgres_server.port,
        bin_dir=postgres_server.bin_dir,
        password=folder / "password",
    )
    execute(postgres_server, "CREATE DATABASE proofs", database="postgres")
    execute(
        postgres_server, "CREATE TABLE logins AS SELECT n, gen_random_uuid() FROM generate_series(1, 50) n"
    )
    yield cluster_factory(settings, workers=("control", "app1"), beat=False)
    execute(postgres_server, "DROP DATABASE proofs WITH (FORCE)", database="postgres")


def execute(server: Served, sql: str, database: str = "proofs") -> list[tuple[Any, ...]]:
    login: dict[str, Any] = {"host": server.host, "port": server.port, "user": server.user}
    login["password"] = server.password
    with psycopg.connect(**login, dbname=database, autocommit=True) as connection:
        done = connection.execute(sql.encode())
        return done.fetchall() if done.description else []


def test_an_encrypted_archive_is_proven_by_restoring_it_and_damage_is_loud(
    system: System, folder: Path, postgres_server: Served
) -> None:
    archive = Path(system.complete()["archive"])
    assert archive.name.endswith(".tar.gz.age")
    stored = [system.store / name for name in system.objects()]
    assert len(stored) == 2
    assert not [path for path in stored if SECRET.encode() in path.read_bytes()]

    run = system.cli("verify", "--level", "restore")
    assert run["state"] == "complete", run
    ledger = "SELECT level, ok FROM verification ORDER BY id"
    levels = [(level, 1) for level in ("exists", "checksum", "structure", "restore")]
    assert system.query(ledger) == levels
    # No worker of db1 runs, and `status` says so by its own status.
    assert system.cli("status", status=5)["proven"]["restored"]["archive"] == str(archive)
    assert system.cli("show", archive.name)["proof"]["level"] == "restore"

    run = system.cli("offsite")
    assert run["state"] == "complete", run
    content = bytearray((system.store / archive).read_bytes())
    content[len(content) // 2] ^= 1
    (system.store / archive).chmod(0o600)
    (system.store / archive).write_bytes(content)
    run = system.cli("verify", archive.name, "--level", "structure", status=1)
    assert (run["state"], run["cause"].split(":")[0]) == ("failed", "checksum"), run
    assert system.query(ledger)[len(levels) :] == [("exists", 1), ("checksum", 0)]
    proven = system.cli("status", status=5)["proven"]
    assert [one["archive"] for one in proven["damaged"]] == [str(archive)]
    assert proven["restored"] is None

    # The copy offsite is sound, is proven for itself, and all comes back from it.
    run = system.cli("verify", archive.name, "--level", "restore", "--from", "offsite")
    assert run["state"] == "complete", run
    (folder / "uploads" / "document").write_text("lost")
    execute(postgres_server, "DELETE FROM logins WHERE n > 7")
    run = system.cli("restore", archive.name, "--from", "offsite", "--confirm", SYSTEM_NAME)
    assert run["state"] == "complete", run
    assert (folder / "uploads" / "document").read_text() == SECRET * 100
    assert execute(postgres_server, "SELECT count(*) FROM logins") == [(50,)]
    written = system.query("SELECT store, level, ok, run_id FROM verification ORDER BY id")
    assert written[-1] == ("offsite", "restore", 1, run["id"]), "a restore is a proof of where it read"
    stores = (system.store, folder / "offsite")
    held = {
        path.stem
        for store in stores
        for path in store.glob(f"proofs/full_system/{archives.bare(archive.name)}/*.json")
    }
    assert held == {f"{run_id}-{level}" for _, level, _, run_id in written}


def test_the_runbooks_dumps_that_are_none_are_found_by_a_verification(
    system: System, folder: Path, postgres_server: Served
) -> None:
    """Its own checks: there, at least 1,000 bytes, readable by pg_restore; and rows that are not those recorded."""
    program = str(postgres_server.bin_dir / "pg_dump")
    login = ["-h", postgres_server.host, "-p", str(postgres_server.port), "-U", postgres_server.user]
    environment = {**os.environ, "PGPASSWORD": postgres_server.password}
    dumped = subprocess.run(
        [program, *login, "-d", "proofs", "--format=custom", "--compress=9"],
        env=environment, capture_output=True, check=True,
    ).stdout  # fmt: skip
    (system.store / "postgres").mkdir(parents=True)
    whole, torn, small = (f"postgres/proofs_20250930_0{number}0000.dump" for number in (1, 2, 3))
    for name, content in {
        whole: dumped,
        torn: dumped[:200] + b"\xff" * 600 + dumped[800:],
        small: dumped[:999],
    }.items():
        (system.store / name).write_bytes(content)
    done = system.cli("import", "postgres/")["outcome"]["store"]
    assert done["imported"] == [whole, torn]
    assert done["refused"] == {small: f"{small} has 999 bytes, an archive has at least 1000"}

    run = system.cli("verify", torn, "--level", "restore", status=1)
    assert run["cause"].startswith("structure: databases: "), run
    assert "is no whole dump" in run["cause"]
    store = LocalStore(system.store)
    record = archives.read_sidecar(store, whole).model_dump(mode="json")
    record["metadata"]["parts"][0]["holds"]["tables"] = {"public.logins": 51}
    store.delete(archives.sidecar_key(whole))
    archives.write_sidecar(store, archives.Archive.model_validate(record))
    run = system.cli("verify", whole, "--level", "restore", status=1)
    assert run["cause"].startswith("restore: databases: "), run
    assert "public.logins: expected 51 rows, found 50 rows" in run["cause"]
    lines = system.query("SELECT level, ok FROM verification WHERE key = ? ORDER BY id", whole)
    assert lines == [("exists", 1), ("checksum", 1), ("structure", 1), ("restore", 0)]


def test_preflight_waits_for_no_host_without_a_worker(system: System) -> None:
    began = time.monotonic()
    done = system.cluster.run("ai-micro-backup", "preflight", "--json", timeout=BOUND)
    found = json.loads(done.stdout)
    assert {name for name, findings in found.items() if findings is None} == {"store@db1"}
    assert found["store@app1"] == []
    assert (done.returncode, done.stderr) == (5, "")
    assert time.monotonic() < began + SECONDS_TO_ANSWER


def test_a_restore_waits_for_no_rehearsal(system: System, folder: Path) -> None:
    """One that never ends; it holds the lease of what is to be restored."""
    (folder / "uploads" / "noise").write_bytes(os.urandom(48 << 20))
    name = Path(system.complete()["archive"]).name
    rehearsal = system.call("tasks.verify.verify_archive", name, level="restore")
    deadline = time.monotonic() + 60
    while not (
        system.query("SELECT phase FROM run WHERE id = ?", rehearsal) == [("restore",)] and _stopped(system)
    ):
        assert time.monotonic() < deadline, "the rehearsal was over before it could be stopped"
    (folder / "uploads" / "document").write_text("lost")

    run = system.cli("restore", name, "--component", "uploads", "--confirm", "uploads")

    assert run["state"] == "complete", run
    assert (folder / "uploads" / "document").read_text() == SECRET * 100
    ended = system.cli("show", rehearsal)
    assert ended["state"] == "failed"
    assert ended["cause"] == f"restore was not ended: it gave way to the restore {run['id']}"
    levels = system.query("SELECT level FROM verification WHERE run_id = ?", rehearsal)
    assert levels == [("exists",), ("checksum",), ("structure",)]
    assert wait_until(lambda: not system.children("uploads"), timeout=30)


def _stopped(system: System) -> bool:
    """Stop a program that works for the component, if there is one."""
    for pid in system.children("uploads"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            return True
    return False
