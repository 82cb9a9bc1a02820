"""A whole backup system of a test's own: broker, workers and beat as real processes, with limits of seconds."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from compose.demo.cluster import Cluster
from compose.demo.embedded import RedisServer, free_port
from compose.demo.embedded_daemon import wait_until
from compose.demo.settings import BROKER_PASSWORD, settings
from tests.systems import System, name_of, processes_with

LIMITS: Mapping[str, float] = {
    "component": 60,
    "run": 300,
    "absent_host": 8,
    "lease": 4,
    "health": 20,
}
WATCHDOG_SECONDS = 2


class Factory(Protocol):
    def __call__(
        self,
        components: str,
        *,
        limits: Mapping[str, float] | None = None,
        schedule: str = "",
        environment: Mapping[str, str] | None = None,
        workers: tuple[str, ...] = ("control", "db1", "app1"),
        beat: bool = True,
    ) -> System: ...


@pytest.fixture(scope="module")
def cluster_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Factory]:
    """Makes systems that run until the end of the module; then nothing of them may be left.

    ``components`` is the TOML of components and services, on the hosts ``db1`` and ``app1``; ``limits`` and
    ``schedule`` (TOML lines) are beside those here; ``environment`` holds the secrets.
    """
    configurations: list[Path] = []
    with ExitStack() as stack:

        def make(
            components: str,
            *,
            limits: Mapping[str, float] | None = None,
            schedule: str = "",
            environment: Mapping[str, str] | None = None,
            workers: tuple[str, ...] = ("control", "db1", "app1"),
            beat: bool = True,
        ) -> System:
            folder = tmp_path_factory.mktemp("system")
            password = secrets.token_hex(16)
            broker = RedisServer(folder / "broker" / "data", free_port(), password, appendonly=True)
            lines = "".join(f"{name} = {value}\n" for name, value in {**LIMITS, **(limits or {})}.items())
            extra = f"[limits]\n{lines}\n[schedule]\nwatchdog_seconds = {WATCHDOG_SECONDS}\n{schedule}\n"
            config = folder / "backup.toml"
            config.write_text(settings(components, folder=folder, broker_port=broker.port, extra=extra))
            secrets_ = {BROKER_PASSWORD: password, **(environment or {})}
            cluster = Cluster(folder, config, broker=broker, environment=secrets_)
            configurations.append(config)
            system = System(stack.enter_context(cluster), folder)
            broker.start()
            _in_parallel(
                *(partial(system.start_worker, name) for name in workers),
                *([cluster.start_beat] if beat else []),
            )
            return system

        yield make
    for config in configurations:
        mark = f"AI_MICRO_BACKUP_CONFIG={config}"
        wait_until(partial(_none_left, mark), timeout=5)
        left = {pid: name_of(pid) for pid in processes_with(mark)}
        assert not left, f"processes were left: {left}"


def _none_left(mark: str) -> bool:
    return not processes_with(mark)


def _in_parallel(*calls: Callable[[], None]) -> None:
    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(call) for call in calls]:
            job.result()
