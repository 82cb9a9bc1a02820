"""PostgreSQL servers of any major version for tests: 15 (Debian's), 16 and 18 (the wheel's) as processes, 17 in a container.

    def test_something(serve_postgres: ServePostgres, tmp_path: Path) -> None:
        server = serve_postgres(17)                             # shared by this process's tests: make your own databases
        with server.connect("postgres") as connection: ...      # psycopg, autocommit, as the superuser
        component = Component.model_validate(server.settings())

    with postgres_server(15, tmp_path, settings={"wal_level": "replica", "archive_mode": "on",
                         "archive_command": "test ! -f {archive}/%f && cp %p {archive}/%f"}) as server:
        ...                                                     # one of the test's own, with settings

Whatever it runs in: `connect` and `conninfo` (also for replication: ``server.connect(replication="database")``), `settings`
for the component, `program` for PostgreSQL's own tools of the server's version, `data_dir` and `archive` as folders of this
host, which root may look at (`archive` has the same path inside of a container), `stop`, `start`, `restart`, `log`.
Servers do not sync to disk. A container's cluster is a mount at ``/var/lib/postgresql/data``, as in the runbook.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from compose.demo.docker_cli import DockerError
from compose.demo.docker_cli import run as docker
from compose.demo.docker_images import Images, engine_answers, ensure_engine
from compose.demo.embedded import PostgresServer, free_port
from compose.demo.embedded_user import give_to_unprivileged

ROOT = Path(__file__).parents[1]
SUITES = {15: "bookworm", 17: "trixie"}
"""Debian's releases by the major version of their PostgreSQL."""
QUICK = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
INSIDE = "/var/lib/postgresql/data"
"""The data folder as a container sees it."""
READY_SECONDS = 90.0

ServePostgres = Callable[[int], "Postgres"]


@dataclass(frozen=True)
class Postgres:
    """A server that runs in a process of this host."""

    major: int
    folder: Path
    port: int
    server_settings: Mapping[str, str] = field(default_factory=dict)
    user: str = "postgres"
    password: str = "pass 'word' é%"
    host: str = "127.0.0.1"
    container: str | None = None

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def archive(self) -> Path:
        """An empty folder that the server may write to, for ``archive_command``."""
        return self.folder / "archive"

    @property
    def bin_dir(self) -> Path | None:
        """The folder of the server's own programs, ``None`` in a container, where they are on PATH."""
        return self._daemon.bin_dir

    @property
    def secret(self) -> Path:
        """A file with the password."""
        path = self.folder / "password"
        if not path.exists():
            path.write_text(self.password + "\n")
        return path

    @property
    def login(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port, "user": self.user, "password": self.password}

    def conninfo(self, database: str = "postgres", **options: Any) -> str:
        return psycopg.conninfo.make_conninfo(**self.login, dbname=database, **options)

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection:
        values: dict[str, Any] = {**self.login, "dbname": database, "autocommit": True}
        return psycopg.connect(**(values | options))

    def execute(self, script: str, database: str = "postgres") -> None:
        with self.connect(database, options="-c default_transaction_read_only=off") as connection:
            connection.execute(script.encode())

    def rows(self, query: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        with self.connect(database) as connection:
            return connection.execute(query.encode()).fetchall()

    def settings(self, name: str = "pg", host: str = "db1") -> dict[str, Any]:
        """The table of settings of the component for this server."""
        place: dict[str, Any] = (
            {"container": self.container}
            if self.container
            else {"address": self.host, "port": self.port, "bin_dir": str(self.bin_dir)}
        )
        return {
            "name": name,
            "kind": "postgres",
            "host": host,
            "password": {"file": str(self.secret)},
            **place,
        }

    def control(self) -> dict[str, Any]:
        """More settings of the component, for a recovery: how it is stopped and started, and where its data is."""
        if self.container:
            return {}
        program = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
            "from compose.demo.embedded import PostgresServer; "
            f"server = PostgresServer(Path({str(self.data_dir)!r}), {self.port}); "
        )
        calls = {
            "start": "server.start()",
            "stop": "server.stop()",
            "status": "sys.exit(not server.is_running())",
        }
        commands: dict[str, Any] = {
            name: [sys.executable, "-c", program + call] for name, call in calls.items()
        }
        return {**commands, "data_dir": str(self.data_dir)}

    def program(self, name: str, *arguments: str, stdin: bytes = b"") -> bytes:
        """Run one of PostgreSQL's programs where the server is, logged in; return what it prints. Raises when it fails."""
        login = {"PGPASSWORD": self.password, "PGUSER": self.user, "PGHOST": self.host}
        login["PGPORT"] = "5432" if self.container else str(self.port)
        if self.container is None:
            command = [str(self.bin_dir / name if self.bin_dir else name), *arguments]
        else:
            names = [part for key in login for part in ("--env", key)]
            command = ["docker", "exec", "--interactive", *names, self.container, name, *arguments]
        environment = {**os.environ, **login}
        done = subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, f"{name}: {done.stderr.decode(errors='replace')[-2000:]}"
        return done.stdout

    def start(self) -> None:
        self._daemon.start(timeout=READY_SECONDS)

    def stop(self) -> None:
        self._daemon.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        """Stop it for good."""
        self.stop()

    def log(self) -> str:
        """Everything the server logged."""
        return self._daemon.log.read_text(errors="replace")

    @property
    def _daemon(self) -> PostgresServer:
        return PostgresServer(
            self.data_dir, self.port, self.password, major=self.major, settings=self.server_settings
        )


class PostgresContainer(Postgres):
    """A server that runs in a container."""

    @property
    def bin_dir(self) -> Path | None:
        return None

    def start(self) -> None:
        """Make the container, or start the one that is there, and return when it answers."""
        name = str(self.container)
        try:
            docker(["docker", "container", "start", name])
        except DockerError:
            options = [
                part for key, value in self.server_settings.items() for part in ("-c", f"{key}={value}")
            ]
            docker(
                [
                    *(
                        "docker",
                        "run",
                        "--detach",
                        "--name",
                        name,
                        "--env",
                        "POSTGRES_PASSWORD",
                        "--shm-size",
                        "256m",
                    ),
                    *("--publish", f"{self.host}:{self.port}:5432", "--volume", f"{self.data_dir}:{INSIDE}"),
                    *("--volume", f"{self.archive}:{self.archive}", Images(SUITES[self.major]).postgres),
                    *("postgres", *options),
                ],
                environment={"POSTGRES_PASSWORD": self.password},
            )
        deadline = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(psycopg.OperationalError), self.connect(connect_timeout=5):
                return
            assert time.monotonic() < deadline, f"{name} does not answer: {self.log()[-2000:]}"
            time.sleep(0.1)

    def stop(self) -> None:
        docker(["docker", "container", "stop", "--time", "30", str(self.container)])

    def remove(self) -> None:
        docker(["docker", "container", "rm", "--force", "--volumes", str(self.container)])
        for path in (self.data_dir, self.archive):
            shutil.rmtree(path, ignore_errors=True)

    def log(self) -> str:
        command = ["docker", "logs", str(self.container)]
        done = subprocess.run(command, capture_output=True, check=False)
        return (done.stdout + done.stderr).decode(errors="replace")


@contextlib.contextmanager
def postgres_server(
    major: int, folder: Path, *, settings: Mapping[str, str] | None = None, container: bool | None = None
) -> Iterator[Postgres]:
    """Run a new server in ``folder`` for the block.

    ``settings`` are of postgresql.conf; ``{archive}`` in a value stands for `Postgres.archive`. ``container``: by
    default, what has no programs here (17) runs in one; 15 can as well. The test is skipped where it needs an engine
    and none answers.
    """
    if container is None:
        container = major == 17
    name = f"test-postgres-{major}-{secrets.token_hex(4)}" if container else None
    kind = PostgresContainer if container else Postgres
    values = {
        key: value.replace("{archive}", str(folder / "archive")) for key, value in (settings or {}).items()
    }
    server = kind(major, folder, free_port(), {**QUICK, **values}, container=name)
    server.archive.mkdir(parents=True)
    if container:
        if not engine_answers():
            pytest.skip("no Docker engine answers; as root on Debian, `compose/engine.sh start` starts one")
        images = Images(SUITES[major])
        ensure_engine(images.suite)
        images.build(images.postgres)
        server.data_dir.mkdir()
        server.archive.chmod(0o777)
    else:
        give_to_unprivileged(server.archive)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def shared_servers(make_folder: Callable[[str], Path]) -> Iterator[ServePostgres]:
    """Serve each major version that is asked for once, for the block."""
    with contextlib.ExitStack() as stack:
        started: dict[int, Postgres] = {}

        def serve(major: int) -> Postgres:
            if major not in started:
                folder = make_folder(f"postgres{major}")
                started[major] = stack.enter_context(postgres_server(major, folder))
            return started[major]

        yield serve
