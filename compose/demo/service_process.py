"""A demo service as a process of this host: started in the background, stopped for sure, found again by its pid file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compose.demo.config_tree import read_env, write_private

START_SECONDS = 60.0
STOP_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]


class ServiceProcessError(Exception):
    """The process did not start, or did not end."""


@dataclass(frozen=True)
class ServiceProcess:
    """The service `name`, whose environment is `state_dir/name.env`; its log and pid file lie beside it."""

    name: str
    state_dir: Path

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.state_dir / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.state_dir / f"{self.name}.pid"

    def start(self, *, timeout: float = START_SECONDS) -> None:
        """Start it, unless it runs, and return when it listens. Raise ServiceProcessError when it ends first or takes too long."""
        if self.pid() is not None:
            return
        settings = read_env(self.state_dir / f"{self.name}.env")
        port = int(settings["PORT"])
        if _listens(port):
            raise ServiceProcessError(f"something else listens on port {port}")
        pid = self._spawn(os.environ | settings | {"PYTHONPATH": str(_ROOT)})
        write_private(self._pid_file, f"{pid} {_birth(pid)}\n")
        deadline = time.monotonic() + timeout
        while not _listens(port):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                self._pid_file.unlink(missing_ok=True)
                raise ServiceProcessError(f"ended before it listened; see {self.log}")
            if time.monotonic() > deadline:
                self.stop()
                raise ServiceProcessError(f"did not listen within {timeout:.0f} s; see {self.log}")
            time.sleep(0.05)

    def _spawn(self, environment: dict[str, str]) -> int:
        # Not subprocess.Popen: its object complains when it goes while the process, as meant, lives on.
        with self.log.open("ab") as log:
            output = log.fileno()
            return os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "compose.demo.service", "run"],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,
            )

    def stop(self, *, timeout: float = STOP_SECONDS) -> None:
        """End it, by force after `timeout` seconds; nothing to do when it does not run. Raise ServiceProcessError if it lives on."""
        for number, seconds in ((signal.SIGTERM, timeout), (signal.SIGKILL, 5.0)):
            pid = self.pid()
            if pid is None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while self.pid() is not None and time.monotonic() < deadline:
                time.sleep(0.05)
        if self.pid() is not None:
            raise ServiceProcessError(f"process {self.pid()} does not end")
        self._pid_file.unlink(missing_ok=True)

    def pid(self) -> int | None:
        """Give the process, or None when it does not run. A process that only has got its old number is not it."""
        try:
            pid, birth = self._pid_file.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if _birth(int(pid)) == birth else None


def _birth(pid: int) -> str:
    """Give when process `pid` started, in the kernel's own clock; "" when there is none, or only its corpse."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
