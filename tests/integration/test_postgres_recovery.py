"""Recoveries to a point in time, while pgbench writes: exactly the transactions committed before it come back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from compose.demo.embedded_postgres import postgres_bin_dir
from tasks import collecting
from tasks.components.postgres import Component
from tasks.components.postgres_archiving import archive_command
from tasks.components.postgres_segments import parse_lsn
from tests.configured import configured, write_settings
from tests.integration.test_postgres_base import back_up, read
from tests.postgres_servers import INSIDE, Postgres, postgres_server
from tests.systems import wait_until
from workers.component import Part, Restore
from workers.errors import BackupError, Permanent
from workers.locks import Lease
from workers.progress import Item
from workers.storage.local import LocalStore

SETTINGS = {
    "archive_mode": "on",
    "archive_command": archive_command("{archive}"),
    "autovacuum": "off",
    "track_commit_timestamp": "on",
    "wal_keep_size": "1GB",  # the server itself says in which order was committed
}
COMMIT = re.compile(r"tx: +(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), .*desc: COMMIT ")


class Held:
    def check(self) -> None:
        """It is."""


@dataclass(frozen=True)
class Transaction:
    """One of pgbench's, as the server that ran it says."""

    row: int
    """The id of its row of pgbench_history."""
    xid: int
    committed: datetime
    lsn: str
    """Where the WAL has its commit."""


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

    def restore(self, part: Part, **options: Any) -> Restore:
        self.runs += 1
        run = f"20261122_03{self.runs:04}"
        return Restore(run, [part], lambda wanted: read(self.store, wanted), options, cast("Any", self.store))

    @contextmanager
    def pgbench(self) -> Iterator[None]:
        """Let clients write without a pause while the block runs."""
        login = {"PGPASSWORD": self.server.password, "PGUSER": "postgres", "PGHOST": self.server.host}
        environment = {**os.environ, **login, "PGPORT": str(self.server.port)}
        pgbench = str(postgres_bin_dir() / "pgbench")
        subprocess.run([pgbench, "-i", "-q", "postgres"], env=environment, check=True, capture_output=True)
        self.server.execute("ALTER TABLE pgbench_history ADD id bigserial")
        command = [pgbench, "-n", "-c", "2", "-T", "600", "-R", "60", "postgres"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                yield
                assert process.poll() is None, "pgbench ended"
            finally:
                process.terminate()

    def wait_for_writes(self) -> None:
        enough = self.written() + 25
        assert wait_until(lambda: self.written() > enough, timeout=60)

    def written(self) -> int:
        return int(self.server.rows("SELECT count(*) FROM pgbench_history")[0][0])

    def transactions(self, start: str, end: str) -> list[Transaction]:
        """Return all of pgbench's in the order of the WAL, which is that of a recovery."""
        rows = self.server.rows(
            "SELECT xmin::text::int, id, pg_xact_commit_timestamp(xmin) FROM pgbench_history"
        )
        history = {xid: (row, committed) for xid, row, committed in rows}
        folder = f"{INSIDE if self.server.container else self.server.data_dir}/pg_wal"
        words = ("--rmgr=Transaction", f"--start={start}", f"--end={end}", f"--path={folder}")
        found = []
        for text, lsn in COMMIT.findall(self.server.program("pg_waldump", *words).decode()):
            xid = int(text)
            if xid in history:
                row, committed = history[xid]
                found.append(Transaction(row, xid, committed, lsn))
        assert len(found) == len(history) > 50
        return found

    def put_back(self, restore: Restore) -> dict[str, Any]:
        self.component.stage(restore)
        self.component.swap(restore)
        self.component.settle(restore)
        return cast("dict[str, Any]", restore.found["reached"])

    def started(self) -> Any:
        return self.server.rows("SELECT pg_postmaster_start_time()")


@dataclass
class Past:
    """What was written while pgbench ran, and a base backup from which all of it can be recovered."""

    cluster: Cluster
    base: Part
    transactions: list[Transaction]
    chosen: Transaction
    named: list[Transaction]
    """Those before the restore point ``half time``."""
    deltas: dict[int, tuple[int, int, int, int]]
    """Account, teller, branch and amount, by the id of the row."""

    def until(self, *, exclusive: bool = False) -> list[Transaction]:
        at = self.transactions.index(self.chosen)
        return self.transactions[: at if exclusive else at + 1]


@pytest.fixture(scope="module", params=[15, 17, 18])
def past(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    # The recovering server runs as the data folder's owner, who may not enter this process's own folders.
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    place = tmp_path_factory.mktemp("recovery")
    with (
        postgres_server(request.param, folder, settings=SETTINGS) as server,
        configured(write_settings(place)),
    ):
        yield write(Cluster(server, place))
    shutil.rmtree(folder)


def write(cluster: Cluster) -> Past:
    server = cluster.server
    start = str(server.rows("SELECT pg_current_wal_insert_lsn()")[0][0])
    with cluster.pgbench():
        cluster.collect()
        cluster.wait_for_writes()
        base = back_up(cluster.component, cluster.store)
        cluster.wait_for_writes()
        named = str(server.rows("SELECT pg_create_restore_point('half time')")[0][0])
        cluster.wait_for_writes()
        cluster.collect()
    connected = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgbench'"
    assert wait_until(lambda: not server.rows(connected), timeout=60)
    transactions = cluster.transactions(start, str(server.rows("SELECT pg_switch_wal()")[0][0]))
    rows = server.rows("SELECT id, aid, tid, bid, delta FROM pgbench_history")
    after = [one for one in transactions if one.committed > base.finished]
    return Past(
        cluster,
        base,
        transactions,
        choose(transactions, after[len(after) // 3 :]),
        [one for one in transactions if parse_lsn(one.lsn) < parse_lsn(named)],
        {row[0]: row[1:] for row in rows},
    )


def choose(transactions: Sequence[Transaction], among: Sequence[Transaction]) -> Transaction:
    """Return one at whose time the clock and the WAL agree on what was committed before it.

    They need not: a commit takes its time first and its place in the WAL then.
    """
    for one in among:
        at = transactions.index(one)
        if all(other.committed < one.committed for other in transactions[:at]) and all(
            other.committed > one.committed for other in transactions[at + 1 :]
        ):
            return one
    raise AssertionError("the clock and the WAL never agree")


def require(
    past: Past, expected: Sequence[Transaction], rows: Callable[[str], list[tuple[Any, ...]]]
) -> None:
    """What a server has must be exactly what these transactions wrote, in all four tables."""
    found = {row[0]: row[1:] for row in rows("SELECT id, aid, tid, bid, delta FROM pgbench_history")}
    assert found == {one.row: past.deltas[one.row] for one in expected}
    for column, (table, key, value) in enumerate(
        (("accounts", "aid", "abalance"), ("tellers", "tid", "tbalance"), ("branches", "bid", "bbalance"))
    ):
        balances: dict[int, int] = {}
        for delta in found.values():
            balances[delta[column]] = balances.get(delta[column], 0) + delta[3]
        there = dict(rows(f"SELECT {key}, {value} FROM pgbench_{table} WHERE {value} <> 0"))
        assert there == {name: balance for name, balance in balances.items() if balance}


# -- in this order: what touches nothing first -------------------------------------------------------------------


def test_damaged_base_backup_touches_nothing(past: Past) -> None:
    cluster = past.cluster
    started = cluster.started()
    stored = cluster.store.root / past.base.name
    whole = stored.read_bytes()
    for at in (2000, len(whole) - 2000):
        stored.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        damaged = cluster.restore(past.base, latest=True)
        with pytest.raises(BackupError):
            cluster.component.stage(damaged)
        with pytest.raises(Permanent, match="nothing is staged"):
            cluster.component.swap(damaged)
        cluster.component.revert(damaged)
    stored.write_bytes(whole)
    assert cluster.started() == started
    require(past, past.transactions, cluster.server.rows)
    assert not list(cluster.server.data_dir.glob(".ai-micro-backup*"))


def test_into_a_folder_leaves_the_live_server_alone(past: Past) -> None:
    cluster, server = past.cluster, past.cluster.server
    folder = (
        server.data_dir.parent / "scratch"
        if server.container is None
        else Path("/var/lib/postgresql/scratch")
    )
    started = cluster.started()
    reached = cluster.put_back(cluster.restore(past.base, to_xid=past.chosen.xid, folder=str(folder)))
    assert f"transaction {past.chosen.xid}" in reached["stopped"]
    assert cluster.started() == started
    require(past, past.transactions, server.rows)


@pytest.mark.parametrize("target", ["before time", "before lsn", "name"])
def test_exactly_what_was_committed_before_comes_back(past: Past, target: str) -> None:
    server, chosen = past.cluster.server, past.chosen
    exclusive = target.startswith("before ")
    expected = past.until(exclusive=exclusive)
    match target:
        case "before time":
            asked: dict[str, Any] = {"to_time": chosen.committed.isoformat()}
        case "before lsn":
            asked = {"to_lsn": chosen.lsn}
        case _:
            asked, expected = {"to_name": "half time"}, past.named
    reached = past.cluster.put_back(past.cluster.restore(past.base, exclusive=exclusive, **asked))
    require(past, expected, server.rows)
    committed = server.rows("SELECT id, pg_xact_commit_timestamp(xmin) FROM pgbench_history")
    assert dict(committed) == {one.row: one.committed for one in expected}
    assert datetime.fromisoformat(reached["last_commit"]) == expected[-1].committed
    assert not list(server.data_dir.glob(".ai-micro-backup*"))


def test_steps_may_run_twice_and_timelines_go_on(past: Past) -> None:
    cluster, server = past.cluster, past.cluster.server
    timeline = int(server.rows("SELECT timeline_id FROM pg_control_checkpoint()")[0][0])
    before = server.rows("SELECT id FROM pgbench_history ORDER BY id")
    restore = cluster.restore(past.base, to_time=past.chosen.committed.isoformat())
    cluster.component.stage(restore)
    cluster.component.stage(restore)
    cluster.component.swap(restore)
    cluster.component.swap(restore)
    require(past, past.until(), server.rows)
    cluster.component.revert(restore)
    assert server.rows("SELECT id FROM pgbench_history ORDER BY id") == before

    reached = cluster.put_back(cluster.restore(past.base, to_xid=past.chosen.xid, exclusive=True))
    require(past, past.until(exclusive=True), server.rows)
    assert reached["timeline"] == timeline + 2  # the next was that of the restore which was taken back
    assert server.rows("SHOW archive_command") != [("",)]
    assert server.rows("SHOW hot_standby") == [("on",)]
    server.execute("CREATE TABLE later AS SELECT 1 AS a")
    assert cluster.collect()["collection"]["timeline"] == timeline + 2
    cluster.put_back(cluster.restore(past.base, latest=True, timeline=timeline + 2))
    require(past, past.until(exclusive=True), server.rows)
    assert server.rows("SELECT a FROM later") == [(1,)]

    # WAL that no collection of the base backup's own timeline speaks of may go further, so it is tried.
    too_late = cluster.restore(past.base, to_time=datetime.now(UTC).isoformat())
    with pytest.raises(Permanent, match="recovery ended before configured recovery target was reached"):
        cluster.component.stage(too_late)
    cluster.component.revert(too_late)
