"""WAL collected by real workers: a removed segment is found and named, and a new base backup follows by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from json import dumps
from typing import Any

import pytest

from tasks.components.postgres_archiving import archive_command
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import System, wait_until

ARCHIVING = {"archive_mode": "on", "archive_command": archive_command("{archive}"), "autovacuum": "off"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres_server(18, tmp_path_factory.mktemp("pg"), settings=ARCHIVING) as started:
        yield started


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], server: Postgres) -> System:
    table = {**server.settings("db"), "wal_archive": str(server.archive)}
    password = dumps(table.pop("password")["file"])
    lines = "".join(f"{key} = {dumps(value)}\n" for key, value in table.items() if key != "name")
    components = f"[components.db]\n{lines}password = {{ file = {password} }}\n"
    return cluster_factory(components, workers=("control", "db1"), beat=False)


def collect(system: System, *, status: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = system.cli("collect", status=status)
    return document


def write(server: Postgres) -> str:
    """Commit something, close the segment and return its name."""
    server.execute("CREATE TABLE IF NOT EXISTS notes (t text); INSERT INTO notes VALUES (now()::text)")
    return str(server.rows("SELECT pg_walfile_name(pg_current_wal_insert_lsn()), pg_switch_wal()")[0][0])


def recoverable(system: System) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in system.cli("status", status=5)["recoverable"])
    return found


def base_backups(system: System, count: int) -> None:
    """Wait until so many base backups are complete and none is running."""

    def states() -> list[Any]:
        return system.query("SELECT state, options FROM run WHERE kind = 'BACKUP' ORDER BY id")

    assert wait_until(lambda: len(states()) >= count and ("RUNNING" not in dict(states())), timeout=90), (
        states()
    )
    assert states() == [("COMPLETE", '{"base": "full"}')] * count


def test_removed_segment_is_named_and_a_new_base_backup_follows(system: System, server: Postgres) -> None:
    assert [finding for finding in system.cli("preflight", "db")["db"] if not finding["advice"]] == []
    write(server)
    assert collect(system)["outcome"]["db"]["files"] >= 2
    base_backups(system, 1)  # the first WAL chain had none
    write(server)
    assert "base_backup" not in collect(system)["outcome"]["db"]
    before = recoverable(system)
    assert before["gaps"] == []
    assert before["late"] is False
    assert before["target_seconds"] == 6 * 3600

    lost = write(server)
    assert wait_until((server.archive / lost).exists, timeout=60)
    (server.archive / lost).unlink()
    write(server)
    found = collect(system, status=1)
    assert found["state"] == "failed"
    assert "db: not recoverable from " in found["cause"]
    assert f"{lost} is missing" in found["cause"]
    base_backups(system, 2)

    write(server)
    healed = collect(system)["outcome"]["db"]
    base_backups(system, 2)  # one is enough
    assert f"{lost} is missing" in healed["gaps"][0], "the gap stays one"
    after = recoverable(system)
    (gap,) = after["gaps"]
    assert (gap["missing"], gap["start"]) == ([lost], before["newest"])
    assert [one["start"] for one in after["ranges"]][-1] == gap["end"]
    assert after["newest"] == healed["collection"]["taken"].replace("Z", "+00:00")
    said = system.cluster.run("ai-micro-backup", "status", timeout=60).stdout
    assert f"{lost} is missing" in said
    assert "newest recoverable point" in said
