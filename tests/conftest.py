"""What every test may use: a real PostgreSQL and a real Redis of its own worker, and Docker where an engine answers."""

import os
import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException
from xdist.scheduler import LoadScopeScheduling

from compose.demo.embedded import PostgresServer, RedisServer, free_port
from tests.postgres_servers import ServePostgres, shared_servers

SPREAD = tuple(
    f"tests/{name}.py"
    for name in (
        "contracts/test_runtime",
        "integration/test_postgres",
        "integration/test_redis",
        "integration/test_files",
    )
)
"""Long files whose tests share nothing: each test goes to whichever process is free."""

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


@dataclass(frozen=True)
class Served:
    """A running server and how to reach it: *host*, *port*, and the password of its *user*."""

    server: PostgresServer | RedisServer
    user: str
    password: str
    host: str = "127.0.0.1"

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def bin_dir(self) -> Path:
        return self.server.bin_dir


class Scheduler(LoadScopeScheduling):  # type: ignore[misc]  # its base has no type hints
    """Gives each file to one process, which sets its servers up once, but spreads the files in `SPREAD`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in SPREAD else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduler:
    """Choose how tests are spread over the processes of ``-n``."""
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long tests begin first, so that none is left for the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A PostgreSQL for all tests of this worker; a test makes databases and roles of its own names and drops them."""
    password = secrets.token_hex(16)
    # Durability against a power cut would only slow the tests down.
    settings = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    folder = tmp_path_factory.mktemp("postgres")
    with PostgresServer(folder / "data", free_port(), password, settings=settings) as server:
        yield Served(server, "postgres", password)


@pytest.fixture(scope="session")
def serve_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServePostgres]:
    """Gives a PostgreSQL of a major version (see `tests.postgres_servers`), one for all tests of this worker.

    A test makes databases and roles of its own names and drops them.
    """
    with shared_servers(tmp_path_factory.mktemp) as serve:
        yield serve


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A Redis for all tests of this worker; a test flushes the database it used."""
    password = secrets.token_hex(16)
    with RedisServer(tmp_path_factory.mktemp("redis") / "data", free_port(), password) as server:
        yield Served(server, "default", password)


@pytest.fixture(scope="session")
def docker_client() -> Iterator[docker.DockerClient]:
    """A client of the Docker engine that answers here; the test is skipped, with the reason, where none does."""
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        pytest.skip(
            f"no Docker engine answers ({error}); as root on Debian, `compose/engine.sh start` starts one"
        )
    yield client
    client.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a test that is skipped or expected to fail counts as failed: nothing may be left out there."""
    report = yield
    if IN_CI and report.skipped:
        _fail(report, getattr(report, "wasxfail", ""))
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """In CI, the same for a module that skips itself while it is read."""
    report = yield
    if IN_CI and report.skipped:
        _fail(report, "")
    return report


def _fail(report: pytest.TestReport | pytest.CollectReport, expected_failure: str) -> None:
    reason = expected_failure or (
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    )
    report.outcome = "failed"
    report.longrepr = f"skipped, and in CI no test may be: {reason}"
    if isinstance(report, pytest.TestReport) and hasattr(report, "wasxfail"):
        del report.wasxfail
