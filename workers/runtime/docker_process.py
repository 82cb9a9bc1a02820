"""A program in a container."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from workers.errors import BackupError, CommandFailed, RuntimeUnavailable
from workers.runtime import MARKER, SWEEP
from workers.runtime.engine import (
    ROOT,
    STDERR_TAIL,
    engine,
    execute,
    exit_code,
    inspect,
    is_missing,
    remove,
    translated,
)
from workers.runtime.framing import CHUNK, GUARD, STDOUT, TOKEN, Ending, demultiplex

KILL_SECONDS = 30
NOT_STARTED = (126, 127)
"""Statuses of a guard that could not be started; one that ran is killed, by itself at the latest."""
HELPER_LABEL = "ai-micro-backup.component"
"""Label of the helper containers; its value is that of `MARKER`: another configuration's on this engine are not ours to remove."""


class DockerProcess:
    """A program in a container, with the guard's shell as its parent (see `framing`)."""

    def __init__(
        self, name: str, target: Mapping[str, Any], argv: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.program, self.marker = argv[0], env[MARKER]
        self._name, self._target, self._token = name, target, secrets.token_hex(16)
        self._helper = HELPER_LABEL in (target["Config"]["Labels"] or {})
        self._ended = self._killed = self._reading = False
        self._kills = threading.Lock()
        self._response: Any = None
        self._exec = ""
        with _own_lock:
            _own.add(self)
        command = ["sh", "-c", GUARD, "sh", *argv]
        try:
            with translated(name):
                environment = {**env, TOKEN: self._token}
                made = engine().exec_create(
                    target["Id"], command, stdin=True, user=ROOT, environment=environment
                )
                self._exec = made["Id"]
                opened: Any = engine().exec_start(self._exec, socket=True)
            # The socket's own reader: the first output may have come with the answer's header, into its buffer.
            self._reader = opened._response.raw._fp.fp  # noqa: SLF001
            self._socket: socket.socket = self._reader.raw._sock  # noqa: SLF001
            self._socket.settimeout(None)
            self._response = opened._response  # noqa: SLF001
        except BaseException:
            self.kill()
            raise

    def write(self, chunk: bytes) -> None:
        try:
            self._socket.sendall(chunk)
        except OSError as error:
            raise BrokenPipeError(f"{self.program} no longer reads: {error}") from error

    def close_input(self) -> None:
        with contextlib.suppress(OSError):  # it ended already; `output` says how
            self._socket.shutdown(socket.SHUT_WR)

    def output(self) -> Iterator[bytes]:
        stderr = bytearray()
        ending = Ending(self._token)

        def stdout() -> Iterator[bytes]:
            for number, payload in demultiplex(self._read):
                if number == STDOUT:
                    yield payload
                else:
                    stderr.extend(payload)
                    del stderr[:-STDERR_TAIL]

        self._reading = True
        try:
            yield from ending.through(stdout())
            self._ended |= ending.status is not None
            if ending.status != 0:
                raise self._failure(ending.status, stderr.decode(errors="replace"))
        finally:
            try:
                self.kill()
            finally:
                # A program that ends without reading all of its input leaves the engine, and `write`, stuck for 25 s.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                self._response.close()

    def kill(self) -> None:
        with self._kills:  # a second caller returns when the first has done it
            if not self._ended:
                self._killed = True
                self._kill()
            elif self._helper:
                remove(self._target["Id"])
            self._ended = True
            if self._response is not None and not self._reading:
                self._response.close()

    def _kill(self) -> None:
        drainer = threading.Thread(target=self._drain, name=f"last output of {self.program}", daemon=True)
        if self._response is not None:
            drainer.start()
        try:
            if self._helper:
                remove(self._target["Id"])
            else:
                self._end_inside()
        finally:
            # Not before: the program would take the end of its input for an orderly one.
            if self._response is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                drainer.join()

    def _drain(self) -> None:
        """Read what nobody wants: while it waits, the engine sees no other program of this container end."""
        with contextlib.suppress(OSError):
            while self._socket.recv(CHUNK):
                pass

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._reader.read1(size)
        except ConnectionResetError:  # the engine closed while it still had input for the program
            return b""
        except (OSError, ValueError) as error:
            if self._killed:
                return b""
            raise RuntimeUnavailable(
                f"container {self._name}: {self.program}'s output broke: {error}"
            ) from error
        return b"" if self._killed else data

    def _failure(self, status: int | None, stderr: str) -> BackupError:
        if status is None and self._killed:
            return CommandFailed(self.program, 137, "it was killed")
        if status is None and (code := exit_code(self._name, self._exec)) in NOT_STARTED:
            return CommandFailed(
                "sh", code, f"the image of container {self._name} needs a shell, sh: {stderr}"
            )
        if status is None:
            reason = "the container or the engine stopped, or somebody killed it"
            told = f": {stderr.strip()}" if stderr.strip() else ""
            return RuntimeUnavailable(f"container {self._name}: {self.program} was cut off ({reason}){told}")
        if self._helper:
            stderr += f"\n(container {self._name} is stopped: programs reach only its volumes, {_mounts(self._target)})"
        return CommandFailed(self.program, status, stderr)

    def _end_inside(self) -> None:
        deadline = time.monotonic() + KILL_SECONDS
        sweep = ["sh", "-c", SWEEP, "sh", f"{TOKEN}={self._token}"]
        while self._exec and self._still_there():
            code = exit_code(self._name, self._exec)
            if code in NOT_STARTED:
                return
            try:
                execute(self._target["Id"], self._name, sweep)
            except BackupError:
                if self._still_there():
                    raise
            if code is not None:
                return
            if time.monotonic() > deadline:
                raise RuntimeUnavailable(f"container {self._name}: {self.program} could not be killed")

    def _still_there(self) -> bool:
        """Say whether the container has run on since: otherwise the program ended with it."""
        try:
            state = inspect(self._target["Id"])["State"]
        except RuntimeUnavailable as error:
            if is_missing(error):
                return False
            raise
        return bool(state["Running"] and state["StartedAt"] == self._target["State"]["StartedAt"])


_own: weakref.WeakSet[DockerProcess] = weakref.WeakSet()
_own_lock = threading.Lock()


def kill_own(marker: str) -> None:
    """Kill the programs that this process itself has started with this value of `MARKER`, and let go of their output.

    Killed in any other way, a program whose reader has stalled holds up the engine, which then reports the end of no
    program of that container until the reader goes on (engine 20.10): not that of a sweep, either.
    """
    with _own_lock:
        found = [process for process in _own if process.marker == marker]
    if found:
        with ThreadPoolExecutor(len(found), thread_name_prefix="kill") as pool:
            list(pool.map(DockerProcess.kill, found))


def _mounts(container: Mapping[str, Any]) -> str:
    return ", ".join(sorted(mount["Destination"] for mount in container["Mounts"])) or "of which it has none"
