"""The embedded servers: real ones, started, used, stopped, with nothing of them left."""

import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from compose.demo.embedded import (
    Daemon,
    PostgresServer,
    RedisServer,
    ServerError,
    free_port,
    postgres_bin_dir,
    redis_program,
)
from compose.demo.embedded_daemon import wait_until

AWKWARD = "a 'quoted' \"pass\\word\" é"


def connect(server: PostgresServer, password: str) -> psycopg.Connection:
    return psycopg.connect(
        host="127.0.0.1",
        port=server.port,
        user="postgres",
        password=password,
        dbname="postgres",
        autocommit=True,
    )


def processes_with(path: Path) -> list[str]:
    """The command lines of live processes that name *path* or have it as their working folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = process.joinpath("cmdline").read_bytes()
            here = os.fsencode((process / "cwd").readlink())
        except OSError:
            continue
        if os.fsencode(path) in command + here:
            found.append(os.fsdecode(command.replace(b"\0", b" ")))
    return found


def is_down(server: Daemon) -> bool:
    return not server.is_running()


@pytest.mark.parametrize("major", [16, 18])
def test_postgres_serves_and_leaves_nothing(tmp_path: Path, major: int) -> None:
    folder = tmp_path / "it's a folder"
    server = PostgresServer(
        folder / "data", free_port(), AWKWARD, major=major, settings={"application_name": "o'clock"}
    )
    with server:
        sockets = server.socket_dir
        assert sockets is not None
        assert list(sockets.iterdir())
        with connect(server, AWKWARD) as connection:
            found = connection.execute(
                "SELECT current_setting('server_version_num')::int / 10000, current_setting('listen_addresses'),"
                " current_setting('application_name'), pg_encoding_to_char(encoding), datcollate"
                " FROM pg_database WHERE datname = 'template0'"
            ).fetchone()
            assert found == (major, "127.0.0.1", "o'clock", "UTF8", "C.UTF-8")
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            connect(server, "wrong")
        version = subprocess.check_output([server.bin_dir / "pg_dump", "--version"], text=True)
        assert f" {major}." in version

    assert not server.is_running()
    assert not sockets.exists()
    assert processes_with(folder) == []
    again = PostgresServer(
        folder / "data", server.port
    )  # neither password nor version: the cluster knows them
    with again, connect(again, AWKWARD) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_redis_serves_and_leaves_nothing(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "it's a folder" / "data", free_port(), AWKWARD)
    with server, redis.Redis("127.0.0.1", server.port, password=AWKWARD) as client:
        assert client.set("kept", "42")
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        with (
            redis.Redis("127.0.0.1", server.port, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.get("kept")
        process_id = client.info("server")["process_id"]
        assert b"pass" not in Path(f"/proc/{process_id}/cmdline").read_bytes()

    assert not server.is_running()
    assert processes_with(server.data_dir) == []
    settings = server.data_dir.with_name("data.conf")
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    again = RedisServer(server.data_dir, server.port)  # no password: the settings of the first start hold it
    with again, redis.Redis("127.0.0.1", server.port, password=AWKWARD) as client:
        assert client.get("kept") == b"42"


def test_redis_keeps_an_append_only_file_when_told(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "data", free_port(), "secret", appendonly=True) as server,
        redis.Redis("127.0.0.1", server.port, password="secret") as client,
    ):
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_a_killed_server_is_seen_and_starts_again(tmp_path: Path) -> None:
    servers: list[Daemon] = [
        PostgresServer(tmp_path / "postgres", free_port(), "secret", settings={"fsync": "off"}),
        RedisServer(tmp_path / "redis", free_port(), "secret"),
    ]
    pid_files = [tmp_path / "postgres" / "postmaster.pid", tmp_path / "redis.pid"]
    for server, pid_file in zip(servers, pid_files, strict=True):
        with server:
            os.kill(int(pid_file.read_text().splitlines()[0]), 9)
            assert wait_until(partial(is_down, server), timeout=10)
            server.start()
            assert server.is_running()
        assert not server.is_running()


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_a_taken_port_is_an_error_that_says_why(
    tmp_path: Path, kind: type[PostgresServer | RedisServer]
) -> None:
    with (
        RedisServer(tmp_path / "first", free_port(), "secret") as first,
        pytest.raises(ServerError, match="Address already in use"),
    ):
        kind(tmp_path / "second", first.port, "secret").start()
    assert processes_with(tmp_path) == []


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_a_first_start_needs_a_password(tmp_path: Path, kind: type[PostgresServer | RedisServer]) -> None:
    with pytest.raises(ServerError, match="password"):
        kind(tmp_path / "data", free_port()).start()


@pytest.mark.parametrize("kind", ["postgres", "redis"])
def test_the_command_line_starts_and_stops(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    environment = os.environ | {f"{kind.upper()}_PASSWORD": "secret"}

    def run(action: str) -> int:
        command = [sys.executable, "-m", "compose.demo.embedded", action, kind, "--data-dir", str(data)]
        return subprocess.run(
            [*command, "--port", str(port)], env=environment, timeout=120, check=False
        ).returncode

    port = free_port()
    assert run("status") == 3
    assert run("stop") == 0
    try:
        assert [run("start"), run("start"), run("status")] == [0, 0, 0]
        del environment[f"{kind.upper()}_PASSWORD"]
    finally:
        assert run("stop") == 0
    assert run("status") == 3
    assert [run("start"), run("status"), run("stop")] == [0, 0, 0]
    assert processes_with(tmp_path) == []


def test_programs_are_found() -> None:
    names = [
        "postgres",
        "psql",
        "pg_dump",
        "pg_dumpall",
        "pg_restore",
        "pg_basebackup",
        "pg_verifybackup",
        "pg_receivewal",
    ]
    for major in (15, 16, 18):
        assert [name for name in names if not (postgres_bin_dir(major) / name).is_file()] == []
    assert redis_program().name in ("redis-server", "valkey-server")
    with pytest.raises(ServerError, match="no PostgreSQL 9"):
        postgres_bin_dir(9)
