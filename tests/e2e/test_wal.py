"""WAL collected by real workers: a removed segment is found, named, and said to be the time that cannot be recovered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from json import dumps
from typing import Any, cast

import pytest

from tasks.components.postgres_archiving import archive_command
from tests.configured import configured
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import System, wait_until
from workers import catalog
from workers.catalog import Artifact

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


def record_base(system: System, server: Postgres) -> datetime:
    """Record a base backup in the catalogue as if one had been made now, and return its end."""
    row = server.rows(
        "SELECT system_identifier::text, pg_current_wal_insert_lsn()::text, clock_timestamp() FROM pg_control_system()"
    )[0]
    holds = {"system_identifier": row[0], "timeline": 1, "start_lsn": row[1], "stop_lsn": row[1]}
    part = {"component": "db", "kind": "postgres-base", "holds": {**holds, "finished": row[2].isoformat()}}
    key = f"components/base_{row[2]:%H%M%S%f}"
    with configured(system.cluster.config):
        catalog.add_artifact(
            Artifact(
                key=key,
                run_id="20261122_020000",
                job="db-base",
                created=row[2],
                size=1,
                sha256="0" * 64,
                details={"parts": [part]},
            )
        )
    return cast("datetime", row[2])


def test_removed_segment_is_named_as_the_time_that_cannot_be_recovered(
    system: System, server: Postgres
) -> None:
    assert [finding for finding in system.cli("preflight")["db"] if not finding["advice"]] == []
    write(server)
    first = collect(system)["outcome"]["db"]
    assert first["files"] >= 2
    assert "base backup" in first["base_backup"], "the first WAL chain has none"

    record_base(system, server)
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
    assert "base backup" in found["outcome"]["db"]["base_backup"]
    during = recoverable(system)
    assert [(gap["missing"], gap["start"], gap["end"]) for gap in during["gaps"]] == [
        ([lost], before["newest"], None)
    ]

    finished = record_base(system, server)
    write(server)
    healed = collect(system)["outcome"]["db"]
    assert "base_backup" not in healed
    assert f"{lost} is missing" in healed["gaps"][0], "the gap stays one"
    after = recoverable(system)
    assert datetime.fromisoformat(after["gaps"][0]["end"]) == finished
    assert [datetime.fromisoformat(one["start"]) for one in after["ranges"]][-1] == finished
    said = system.cluster.run("ai-micro-backup", "status", timeout=60).stdout
    assert f"{lost} is missing" in said
    assert "newest recoverable point" in said
