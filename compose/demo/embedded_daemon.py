"""What the embedded PostgreSQL and Redis have in common: a daemon on 127.0.0.1 with its files beside its data folder."""

import errno
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self


class ServerError(RuntimeError):
    """A server did not start or stop as told; the message holds the reason and the end of its log."""


class Daemon(ABC):
    """A server that outlives the program that started it, until `stop`.

    Two objects on the same folder are the same server: one may start it and another, later, stop it. Its log, settings and
    process id lie beside the data folder, never in it, so that a restore can replace the folder as a whole.
    """

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.log = self._beside(".log")

    @abstractmethod
    def start(self, *, timeout: float = 60) -> None:
        """Start the server and return when it answers; create its data folder when there is none.

        Does nothing when it runs. Raises `ServerError` when it does not answer after *timeout* seconds.
        """

    @abstractmethod
    def stop(self, *, timeout: float = 60) -> None:
        """End the server in order, its data on disk, and return when its process is gone.

        Does nothing when it does not run. One that is still there after *timeout* seconds is killed, and `ServerError` raised.
        """

    @abstractmethod
    def is_running(self) -> bool:
        """Whether the server of this data folder has a live process."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _require_free_port(self) -> None:
        """Raise `ServerError` when the port is taken, but not for what a server killed a moment ago still holds."""
        if not wait_until(partial(_port_is_free, self.port), timeout=3):
            raise ServerError(f"cannot listen on 127.0.0.1:{self.port}: Address already in use")

    def _beside(self, suffix: str) -> Path:
        return self.data_dir.with_name(self.data_dir.name + suffix)

    def _failure(self, what: str) -> ServerError:
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-15:]
        except OSError as error:
            lines = [f"(no log: {error})"]
        return ServerError("\n".join([f"{what}; the end of {self.log}:", *lines]))


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def process_runs(pid: int, marker: str) -> bool:
    """Whether process *pid* is alive and its command line holds *marker*, which tells it from a later one of the same number."""
    return os.fsencode(marker) in (_command_line(pid) or b"")


def process_is_unreaped(pid: int) -> bool:
    """Whether process *pid* is ending or has ended, but its parent has not taken note of that yet."""
    return _command_line(pid) == b""


def _command_line(pid: int) -> bytes | None:
    """The command line of a process, empty once it has begun to end; None when there is no such process."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return None


def wait_until(condition: Callable[[], bool], *, timeout: float) -> bool:
    """Return True as soon as *condition* holds, False when it did not within *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
