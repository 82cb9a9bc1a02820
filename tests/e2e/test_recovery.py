"""A server recovered to a point in time by the command and real workers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path

import pytest

from tasks.components.postgres_archiving import archive_command
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import System

ARCHIVING = {"archive_mode": "on", "archive_command": archive_command("{archive}"), "autovacuum": "off"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    # The recovering server runs as the data folder's owner, who may not enter this process's own folders.
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    with postgres_server(18, folder, settings=ARCHIVING) as started:
        yield started
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], server: Postgres) -> System:
    table = {**server.settings("db"), **server.control(), "wal_archive": str(server.archive)}
    password = dumps(table.pop("password")["file"])
    lines = "".join(f"{key} = {dumps(value)}\n" for key, value in table.items() if key != "name")
    components = f"[components.db]\n{lines}password = {{ file = {password} }}\n"
    return cluster_factory(components, workers=("control", "db1"), beat=False)


def test_recover_brings_back_the_moment_and_says_so(system: System, server: Postgres) -> None:
    server.execute("CREATE TABLE notes AS SELECT 'kept' AS t")
    system.cli("backup", "db", "--base", "full")
    server.execute("INSERT INTO notes VALUES ('also kept')")
    moment = server.rows("SELECT clock_timestamp()")[0][0].isoformat()
    server.execute("INSERT INTO notes VALUES ('too late')")
    system.cli("collect")

    refused = system.cluster.run("ai-micro-backup", "recover", "db", "--to-time", moment, timeout=60)
    assert refused.returncode == 3, "it is not confirmed"
    for words, said in {
        ("--to-time", moment.replace("+00:00", "").partition("+")[0]): "has no zone",
        ("--to-time", "2020-01-01T00:00:00Z"): "possible is 20",
        ("--to-lsn", "FF/0"): "possible is 20",
    }.items():
        refused = system.cluster.run("ai-micro-backup", "recover", "db", *words, timeout=60)
        assert refused.returncode != 0
        assert said in " ".join(refused.stderr.split()), refused.stderr
    (line,) = system.cli("recover", "db", "--to-time", moment, "--plan")["outcome"]["overwrites"]
    assert f"in {server.data_dir}, would be replaced" in line
    assert len(server.rows("SELECT t FROM notes")) == 3

    run = system.cli("recover", "db", "--to-time", moment, "--confirm", "db")
    assert run["state"] == "complete"
    assert server.rows("SELECT t FROM notes ORDER BY 1") == [("also kept",), ("kept",)]
    reached = run["outcome"]["reached"]
    assert reached["timeline"] == 2
    assert reached["stopped"].startswith("recovery stopping before commit of transaction")

    server.execute("INSERT INTO notes VALUES ('on the new timeline')")
    scratch = server.data_dir.parent / "scratch"
    system.cli("collect")
    run = system.cli("recover", "db", "--latest", "--into", str(scratch))
    assert str(scratch) in run["outcome"]["start"]
    assert (scratch / "PG_VERSION").exists()
    assert "archive_mode = off" in (scratch / "postgresql.auto.conf").read_text()
    assert len(server.rows("SELECT t FROM notes")) == 3
