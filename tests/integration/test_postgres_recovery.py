"""Recoveries to a point in time, while pgbench writes: exactly the transactions committed before it come back."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from compose.demo.embedded_postgres import postgres_bin_dir
from tasks import collecting
from tasks.components.postgres import Component
from tasks.components.postgres_archiving import archive_command
from tests.configured import configured, write_settings
from tests.integration.test_postgres_base import back_up, read
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import wait_until
from workers.component import Part, Restore
from workers.errors import BackupError, Permanent
from workers.locks import Lease
from workers.progress import Item
from workers.storage.local import LocalStore

ARCHIVING = {"archive_mode": "on", "archive_command": archive_command("{archive}"), "autovacuum": "off"}
SCRIPT = "BEGIN; INSERT INTO written (client) VALUES (:client_id); UPDATE counter SET n = n + 1; END;\n"


class Held:
    def check(self) -> None:
        """It is."""


class Cluster:
    """A server that archives, its component, and a store."""

    def __init__(self, server: Postgres, folder: Path) -> None:
        self.server, self.store = server, LocalStore(folder / "store")
        self.component = Component.model_validate(
            {**server.settings(), **server.control(), "wal_archive": str(server.archive), "wal_timeout": 60}
        )
        self.runs = 0

    def collect(self) -> dict[str, Any]:
        self.runs += 1
        return collecting.collect(
            f"20261122_02{self.runs:04}", self.component, cast("Lease", Held()), Item("WAL")
        )

    def restore(self, part: Part, run: str, **options: Any) -> Restore:
        return Restore(run, [part], lambda wanted: read(self.store, wanted), options, cast("Any", self.store))

    @contextmanager
    def pgbench(self, folder: Path) -> Iterator[None]:
        """Let clients write without a pause while the block runs."""
        script = folder / "script.sql"
        script.write_text(SCRIPT)
        login = {"PGPASSWORD": self.server.password, "PGUSER": "postgres", "PGHOST": self.server.host}
        environment = {**os.environ, **login, "PGPORT": str(self.server.port)}
        command = [str(postgres_bin_dir() / "pgbench"), "-n", "-c", "2", "-T", "600", "-R", "60"]
        command += ["-f", str(script), "postgres"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                yield
                assert process.poll() is None, "pgbench ended"
            finally:
                process.terminate()

    def commit(self, text: str) -> tuple[int, datetime]:
        """Commit a note; return its transaction id and a time of the server just after it."""
        with self.server.connect(autocommit=False) as connection:
            row = connection.execute(
                "INSERT INTO notes VALUES (%s) RETURNING pg_current_xact_id()::text", [text]
            ).fetchone()
            connection.commit()
            after = connection.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        assert after is not None
        return int(row[0]), after[0]

    def notes(self) -> list[str]:
        return [row[0] for row in self.server.rows("SELECT t FROM notes ORDER BY 1")]

    def written(self) -> int:
        """How many transactions of pgbench there are; each is whole."""
        (rows, count) = self.server.rows("SELECT count(*), (SELECT n FROM counter) FROM written")[0]
        assert rows == count
        return int(rows)

    def put_back(self, restore: Restore) -> dict[str, Any]:
        self.component.stage(restore)
        self.component.swap(restore)
        self.component.settle(restore)
        return cast("dict[str, Any]", restore.found["reached"])


@pytest.fixture(params=[15, 17, 18])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    # The recovering server runs as the data folder's owner, who may not enter this process's own folders.
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    with (
        postgres_server(request.param, folder, settings=ARCHIVING) as server,
        configured(write_settings(tmp_path)),
    ):
        server.execute(
            "CREATE TABLE notes (t text); CREATE TABLE counter AS SELECT 0 AS n;"
            "CREATE TABLE written (id bigserial, client int, at timestamptz DEFAULT clock_timestamp())"
        )
        yield Cluster(server, tmp_path)
    shutil.rmtree(folder)


def test_recovery_finds_exactly_what_was_committed_before(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server
    with cluster.pgbench(tmp_path):
        cluster.collect()
        assert wait_until(lambda: cluster.written() > 5, timeout=60)
        part = back_up(cluster.component, cluster.store)
        _, moment = cluster.commit("a, before the time")
        count_low = cluster.written()
        xid, _ = cluster.commit("b, the transaction")
        cluster.commit("c, after it")
        lsn = str(server.rows("SELECT pg_current_wal_insert_lsn()")[0][0])
        assert wait_until(lambda: cluster.written() > count_low + 5, timeout=60)
        cluster.commit("d, after the position")
        cluster.collect()
    before = cluster.notes()

    # Damage touches nothing: the server never stops.
    started = server.rows("SELECT pg_postmaster_start_time()")
    flipped = cluster.store.root / part.name
    whole = flipped.read_bytes()
    flipped.write_bytes(whole[:-2000] + bytes([whole[-2000] ^ 1]) + whole[-1999:])
    damaged = cluster.restore(part, "20261122_030000", latest=True)
    with pytest.raises(BackupError):
        cluster.component.stage(damaged)
    cluster.component.revert(damaged)
    flipped.write_bytes(whole)
    assert server.rows("SELECT pg_postmaster_start_time()") == started
    assert not list(server.data_dir.glob(".ai-micro-backup*"))

    # Into a folder, the live server left alone.
    folder = (
        server.data_dir.parent / "scratch"
        if server.container is None
        else Path("/var/lib/postgresql/scratch")
    )
    aside = cluster.restore(part, "20261122_040000", to_xid=xid, folder=str(folder))
    reached = cluster.put_back(aside)
    assert f"transaction {xid}" in reached["stopped"]
    assert server.rows("SELECT pg_postmaster_start_time()") == started
    assert cluster.notes() == before

    # The same step may run twice, and what stood comes back.
    restore = cluster.restore(part, "20261122_050000", to_lsn=lsn)
    cluster.component.stage(restore)
    cluster.component.stage(restore)
    cluster.component.swap(restore)
    cluster.component.swap(restore)
    assert [note[0] for note in cluster.notes()] == ["a", "b", "c"]
    cluster.component.revert(restore)
    assert cluster.notes() == before

    reached = cluster.put_back(cluster.restore(part, "20261122_060000", to_time=moment.isoformat()))
    assert [note[0] for note in cluster.notes()] == ["a"]
    last = server.rows("SELECT max(at) FROM written")[0][0]
    assert last < moment
    assert cluster.written() <= count_low
    assert reached["timeline"] == 3  # 2 was that of the restore which was taken back
    assert server.rows("SHOW archive_command") != [("",)]
    assert server.rows("SHOW hot_standby") == [("on",)]
    assert not list(server.data_dir.glob(".ai-micro-backup*"))

    # The new timeline goes on, and can be recovered to.
    cluster.commit("e, on the new timeline")
    done = cluster.collect()
    assert done["collection"]["timeline"] == 3
    cluster.put_back(cluster.restore(part, "20261122_070000", latest=True, timeline=3))
    assert [note[0] for note in cluster.notes()] == ["a", "e"]

    with pytest.raises(Permanent, match="nothing that was collected reaches"):
        cluster.component.stage(
            cluster.restore(part, "20261122_080000", to_time=datetime.now(UTC).isoformat())
        )
