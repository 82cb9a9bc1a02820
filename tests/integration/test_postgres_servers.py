"""The servers that other tests use: each major version archives, replicates, keeps its data, and leaves nothing behind."""

from pathlib import Path

import psycopg
import pytest

from compose.demo.docker_cli import listed
from compose.demo.embedded_daemon import wait_until
from tasks.components.postgres import Component
from tests.postgres_servers import postgres_server

ARCHIVING = {
    "wal_level": "replica",
    "archive_mode": "on",
    "archive_command": "test ! -f {archive}/%f && cp %p {archive}/%f",
}


@pytest.mark.parametrize("major", [15, 17, 18])
def test_a_server_of_each_major_version(major: int, tmp_path: Path) -> None:
    with postgres_server(major, tmp_path, settings=ARCHIVING) as server:
        server.execute("CREATE TABLE t AS SELECT 1 AS a; SELECT pg_switch_wal()")
        assert wait_until(lambda: any(server.archive.iterdir()), timeout=60)
        with server.connect(replication="database") as connection:
            row = connection.execute("IDENTIFY_SYSTEM").fetchone()
        assert row is not None
        control = server.program(
            "pg_controldata", "/var/lib/postgresql/data" if server.container else str(server.data_dir)
        )
        assert row[0] in control.decode()
        assert f") {major}." in server.program("pg_dump", "--version").decode()
        sources = Component.model_validate(server.settings()).sources()
        assert [source.holds["server_version"].split(".")[0] for source in sources] == [str(major)]
        server.restart()
        assert server.rows("SELECT a FROM t") == [(1,)]
        assert (server.data_dir / "PG_VERSION").read_text().strip() == str(major)
        assert "database system is ready" in server.log()
        conninfo = server.conninfo()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(conninfo, connect_timeout=5)
    if server.container is not None:
        assert server.container not in listed("container")
