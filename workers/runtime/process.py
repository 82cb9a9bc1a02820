"""This host's own programs and folders."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import IO, cast

from workers.errors import CommandFailed, Permanent, RuntimeUnavailable
from workers.location import Location
from workers.runtime import MARKER, Process, marker, run, stream
from workers.runtime.tree import ENVIRONMENT, forgiving, pack, unpack

CHUNK = 1 << 18
STDERR_TAIL = 4096
POLL_SECONDS = 0.2


class HostProcess:
    """A child in a session of its own, which the kernel kills when the worker that started it dies."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.program = argv[0]
        self._reading = False
        # A file, unlike a pipe, never blocks a talkative program that nobody reads.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in `output`
        try:
            self._child = subprocess.Popen(
                [*_die_with_parent(), *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, **env},
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._stderr.close()
            raise RuntimeUnavailable(f"{self.program} cannot be started: {error.strerror}") from error
        self._stdin, self._stdout = (
            cast("IO[bytes]", self._child.stdin),
            cast("IO[bytes]", self._child.stdout),
        )

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        try:
            while view:
                view = view[self._stdin.write(view) :]
        except ValueError as error:  # closed by `kill`
            raise BrokenPipeError(str(error)) from error

    def close_input(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def output(self) -> Iterator[bytes]:
        self._reading = True
        try:
            while chunk := self._stdout.read(CHUNK):
                yield chunk
            status = self._child.wait()
            if status:
                raise CommandFailed(self.program, status, self._stderr_tail())
        finally:
            self.kill()
            self._close()

    def kill(self) -> None:
        # The group outlives its leader while a grandchild runs, so it is killed whether or not the child has ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self.close_input()
        if not self._reading:
            self._close()

    def _close(self) -> None:
        self._stdout.close()
        self._stderr.close()

    def _stderr_tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL))
        return self._stderr.read().decode(errors="replace")


class ProcessRuntime:
    """Runs programs of this host, found on ``PATH``, and reads and writes its folders with GNU tar."""

    def __init__(self, *, component: str) -> None:
        self._component = component

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        return HostProcess(argv, {**(env or {}), MARKER: marker(self._component)})

    def read_tree(
        self,
        path: PurePosixPath,
        *,
        members: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        warnings: list[str] | None = None,
    ) -> Iterator[bytes]:
        folder, names = (path.parent, [path.name]) if members is None else (path, members)
        return forgiving(stream(self, pack(folder, names, exclude), env=ENVIRONMENT), warnings)

    def write_tree(self, folder: PurePosixPath, chunks: Iterable[bytes]) -> None:
        run(self, unpack(folder, owners=os.geteuid() == 0), chunks=chunks, env=ENVIRONMENT)

    def remove_leftovers(self, component: str) -> bool:
        """Remove nothing: a worker leaves only programs on its host, and none of them can hold up a sweep."""
        return True


class ProcessService:
    """A service of this host, stopped and started by configured commands."""

    def __init__(self, location: Location) -> None:
        self._location = location

    def is_running(self) -> bool:
        try:
            self._command("status", self._location.status)
        except CommandFailed:
            return False
        return True

    def stop(self) -> None:
        self._command("stop", self._location.stop)
        self._wait(running=False)

    def start(self) -> None:
        self._command("start", self._location.start)
        self._wait(running=True)

    def _wait(self, *, running: bool) -> None:
        deadline = time.monotonic() + self._location.stop_timeout
        while self.is_running() is not running:
            if time.monotonic() > deadline:
                state = "run" if running else "stop"
                raise RuntimeUnavailable(f"it did not {state} within {self._location.stop_timeout:g} s")
            time.sleep(POLL_SECONDS)

    def _command(self, name: str, argv: Sequence[str] | None) -> None:
        if argv is None:
            raise Permanent(f"no {name} command is configured")
        # Not a HostProcess: what a start command starts must outlive the worker.
        with tempfile.TemporaryFile() as output:
            try:
                status = subprocess.run(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=self._location.stop_timeout,
                    start_new_session=True,
                    check=False,
                ).returncode
            except OSError as error:
                raise RuntimeUnavailable(f"{argv[0]} cannot be started: {error.strerror}") from error
            except subprocess.TimeoutExpired as error:
                seconds = self._location.stop_timeout
                raise RuntimeUnavailable(
                    f"the {name} command {argv[0]} did not end within {seconds:g} s"
                ) from error
            if status:
                output.seek(0)
                raise CommandFailed(argv[0], status, output.read().decode(errors="replace")[-STDERR_TAIL:])


@functools.cache
def _die_with_parent() -> tuple[str, ...]:
    """Return the words before a program's own that make the kernel kill it when its parent dies."""
    if shutil.which("setpriv") is None:
        raise RuntimeUnavailable("setpriv is missing; install util-linux 2.33 or later")
    return ("setpriv", "--pdeathsig", "KILL", "--")
