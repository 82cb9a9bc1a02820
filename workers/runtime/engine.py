"""The Docker engine: this process's clients, short calls, and its errors as ours. The only import of the SDK."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import docker
from docker.errors import APIError, DockerException, NotFound

from workers.errors import CommandFailed, Permanent, RuntimeUnavailable

SHORT_CALL_SECONDS = 60
STDERR_TAIL = 4096
ROOT = "0"
"""Programs run as root: they read and write whatever the component has."""


@functools.cache
def _client(pid: int, timeout: int | None) -> docker.APIClient:  # noqa: ARG001  a fork must not share a connection
    return docker.from_env(timeout=timeout).api  # type: ignore[arg-type]


def engine(*, patient: bool = False) -> docker.APIClient:
    """Return this process's client of the engine; a ``patient`` one waits for as long as a stream pauses."""
    return _client(os.getpid(), None if patient else SHORT_CALL_SECONDS)


@contextlib.contextmanager
def translated(container: str) -> Iterator[None]:
    """Raise the Docker SDK's errors as ours, naming the ``container``."""
    try:
        yield
    except APIError as error:
        reason = str(error.explanation or error)
        if isinstance(error, NotFound) and "No such container" in reason:
            advice = "start its service, or correct the container's name in the settings"
            raise RuntimeUnavailable(f"there is no container {container}; {advice}") from error
        if error.status_code in (409, 503) or "No such exec" in reason:
            raise RuntimeUnavailable(f"container {container} cannot be used now: {reason}") from error
        raise Permanent(f"container {container}: {reason}") from error
    except (DockerException, OSError) as error:
        raise RuntimeUnavailable(f"the Docker engine does not answer for {container}: {error}") from error


def inspect(container: str) -> dict[str, Any]:
    """Return what the engine knows of a container. Raises ``RuntimeUnavailable`` when there is none."""
    with translated(container):
        described: dict[str, Any] = engine().inspect_container(container)
        return described


def is_missing(error: RuntimeUnavailable) -> bool:
    """Say whether ``error`` means that there is no such container, rather than that nobody knows."""
    return isinstance(error.__cause__, NotFound)


def exit_code(container: str, program: str) -> int | None:
    """Return a program's status, -1 when the engine forgot it, ``None`` when it runs or is just being started."""
    with translated(container):
        try:
            code: int | None = engine().exec_inspect(program)["ExitCode"]
        except APIError as error:
            if error.status_code in (404, 409):
                return -1
            raise
        return code


def execute(container: str, name: str, command: Sequence[str]) -> None:
    """Run a program in a container to its end. Raises ``CommandFailed``."""
    with translated(name):
        made = engine().exec_create(container, list(command), user=ROOT)
        output = engine().exec_start(made["Id"])
        status = engine().exec_inspect(made["Id"])["ExitCode"]
    if status:
        raise CommandFailed(command[0], status, output.decode(errors="replace")[-STDERR_TAIL:])


def remove(helper: str) -> None:
    """Remove a helper container, never a volume, and return when it is gone; one that is gone is no error."""
    deadline = time.monotonic() + SHORT_CALL_SECONDS
    with translated(helper), contextlib.suppress(NotFound):
        while True:
            try:
                engine().remove_container(helper, force=True)
            except APIError as error:
                if error.status_code != 409 or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)  # somebody else is removing it


def read_archive(container: str, path: str) -> Iterator[bytes]:
    """Yield Docker's tar archive of a path, whether the container runs or not."""
    with translated(container):
        try:
            chunks, _ = engine(patient=True).get_archive(container, path)
        except NotFound as error:
            if "No such container" in str(error.explanation):
                raise
            raise CommandFailed("docker archive", 1, f"{path}: {error.explanation}") from error
        with contextlib.closing(chunks):
            yield from chunks


def inspect_volume(volume: str) -> dict[str, Any] | None:
    """Return what the engine knows of a named volume, ``None`` when there is none."""
    with translated(f"of the volume {volume}"):
        try:
            described: dict[str, Any] = engine().inspect_volume(volume)
        except NotFound:
            return None
        return described


def images_for(volume: str) -> Iterator[str]:
    """Yield the image of the container that this process runs in, if it does, and those of containers with a volume."""
    with translated(f"of the volume {volume}"):
        with contextlib.suppress(NotFound):
            yield engine().inspect_container(socket.gethostname())["Image"]
        users = engine().containers(all=True, filters={"volume": volume})
    yield from (user["ImageID"] for user in users)
