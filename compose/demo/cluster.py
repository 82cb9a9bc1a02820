"""The backup system itself as processes of this host: broker, workers, beat and Flower, for the demo and the tests."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from compose.demo.config_tree import write_private
from compose.demo.embedded import RedisServer, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 60
STOP_SECONDS = 30
CONFIG_VARIABLE = "AI_MICRO_BACKUP_CONFIG"


class ClusterError(Exception):
    """A process of the cluster did not start, or did not end; the text has the end of its log."""


class Cluster:
    """Broker, workers, beat and Flower below ``folder``, all with the settings at ``config``.

    ``environment`` holds the secrets. Every process leads a session of its own, so that `kill` takes its children too.
    """

    def __init__(
        self, folder: Path, config: Path, *, broker: RedisServer, environment: Mapping[str, str]
    ) -> None:
        self.folder, self.config, self.broker = folder, config, broker
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        # The server's own folder first: a wheel may have put another version beside Python.
        paths = [str(broker.bin_dir), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = {
            **inherited,
            **environment,
            CONFIG_VARIABLE: str(config),
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": str(REPOSITORY),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._flower_port = free_port()
        self.flower_login = folder / "flower-login"
        """Holds ``user:password``, readable by its owner only."""

    @property
    def flower_url(self) -> str:
        """Where Flower is."""
        return f"http://127.0.0.1:{self._flower_port}/tasks"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_all(self, *hosts: str) -> None:
        """Start the broker, a control worker, a worker for each of ``hosts``, beat and Flower, in parallel."""
        self.broker.start()
        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(self.start_worker, "control", "control"),
                pool.submit(self.start_beat),
                pool.submit(self.start_flower),
            ]
            jobs += [pool.submit(self.start_worker, host, f"host.{host}") for host in hosts]
            for job in jobs:
                job.result()

    def start_flower(self) -> None:
        """Start Flower, which asks for the login in `flower_login`."""
        login = f"admin:{secrets.token_urlsafe(12)}"
        write_private(self.flower_login, login)
        self.environment["FLOWER_BASIC_AUTH"] = login
        options = [
            f"--conf={REPOSITORY / 'compose' / 'flowerconfig.py'}",
            "--address=127.0.0.1",
            f"--port={self._flower_port}",
        ]
        self.start("flower", ["celery", "-A", "workers", "flower", *options], ready="Visit me at")

    def start_worker(self, name: str, queue: str, *, concurrency: int = 4) -> None:
        """Start a worker that consumes ``queue`` and return when it says that it is ready."""
        options = [
            "--queues",
            queue,
            "--hostname",
            f"{name}@%h",
            "--concurrency",
            str(concurrency),
            "--loglevel",
            "INFO",
        ]
        self.start(name, ["celery", "-A", "workers", "worker", *options], ready="ready.")

    def start_beat(self) -> None:
        """Start beat."""
        schedule = str(self.folder / "beat-schedule")
        self.start(
            "beat",
            ["celery", "-A", "beat_schedule", "beat", "--schedule", schedule, "--loglevel", "INFO"],
            ready="beat: Starting",
        )

    def start(self, name: str, argv: Sequence[str], *, ready: str) -> None:
        """Start a process and return when its log holds ``ready``. Raises ``ClusterError`` when it does not."""
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        offset = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / argv[0]), *argv[1:]],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes[name] = process
        deadline = time.monotonic() + START_SECONDS
        while ready not in log.read_bytes()[offset:].decode(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"{name} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def log(self, name: str) -> Path:
        """Return the log file of a process."""
        return self.folder / "logs" / f"{name}.log"

    def show(self, *argv: str) -> int:
        """Run a program of the virtual environment on this terminal and return its exit status."""
        program = str(Path(sys.executable).parent / argv[0])
        return subprocess.run(
            [program, *argv[1:]], cwd=self.folder, env=self.environment, check=False
        ).returncode

    def run(self, *argv: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a program of the virtual environment, such as ``ai-micro-backup``, and return its status and output."""
        program = str(Path(sys.executable).parent / argv[0])
        return subprocess.run(
            [program, *argv[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def runs(self, name: str) -> bool:
        """Whether a process was started and has not ended."""
        return name in self._processes and self._processes[name].poll() is None

    def kill(self, name: str) -> None:
        """SIGKILL a process with all of its session, as a crash of its host would."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Stop everything that was started, in order, and the broker last."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(STOP_SECONDS)
        self._processes.clear()
        self.broker.stop()
