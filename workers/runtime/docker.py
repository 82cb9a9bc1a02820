"""Containers as a runtime.

Programs run in a running container as root. In a stopped one they run in a helper container of the same image that
has its volumes and nothing else of it: the rest of its file system is the image's, and read-only, so that nothing
is written to where it would be lost. `read_tree` and `write_tree` reach every path of a stopped container.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from workers.errors import Permanent, RuntimeUnavailable
from workers.runtime import MARKER, Process, marker, run, stream
from workers.runtime.docker_process import HELPER_LABEL, DockerProcess, kill_own
from workers.runtime.engine import ROOT, engine, inspect, read_archive, remove, translated
from workers.runtime.tree import ENVIRONMENT, edit, forgiving, pack, unpack

HELPER_COMMAND = ["tail", "-f", "/dev/null"]


class DockerRuntime:
    """Runs programs in a container, running or stopped, and reads and writes its file trees."""

    def __init__(self, container_name: str, *, component: str) -> None:
        self._name, self._component = container_name, component

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        container = inspect(self._name)
        state = container["State"]
        if state["Status"] in ("created", "exited"):
            container = self._start_helper(container)
        elif state["Status"] != "running":
            raise RuntimeUnavailable(f"container {self._name} is {state['Status']}")
        return DockerProcess(self._name, container, argv, {**(env or {}), MARKER: marker(self._component)})

    def read_tree(
        self,
        path: PurePosixPath,
        *,
        members: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        warnings: list[str] | None = None,
    ) -> Iterator[bytes]:
        if self._has_tar(path):
            # Docker's own archive would lock the container while it is read, and drops fractions of a second.
            folder, names = (path.parent, [path.name]) if members is None else (path, members)
            yield from forgiving(stream(self, pack(folder, names, exclude), env=ENVIRONMENT), warnings)
        elif members is None:
            yield from edit([("", read_archive(self._name, str(path)))], exclude)
        else:
            named = [PurePosixPath(member) for member in members]
            prefixes = ["" if len(name.parts) == 1 else f"{name.parent}/" for name in named]
            archives = (read_archive(self._name, str(path / name)) for name in named)
            yield from edit(zip(prefixes, archives, strict=True), exclude)

    def write_tree(self, folder: PurePosixPath, chunks: Iterable[bytes]) -> None:
        if self._has_tar(folder):
            run(self, unpack(folder, owners=True), chunks=chunks, env=ENVIRONMENT)
            return
        failures: list[BaseException] = []

        def watched() -> Iterator[bytes]:
            try:
                yield from chunks
            except BaseException as error:
                failures.append(error)
                raise

        try:
            with translated(self._name):
                engine(patient=True).put_archive(self._name, str(folder), watched())
        except BaseException as error:
            if failures and error is not failures[0]:
                raise failures[0] from error
            raise

    def remove_leftovers(self, component: str) -> bool:
        kill_own(marker(component))
        with translated(self._name):
            filters = {"label": f"{HELPER_LABEL}={marker(component)}"}
            helpers = [found["Id"] for found in engine().containers(all=True, filters=filters)]
        for helper in helpers:
            remove(helper)
        return True

    def _has_tar(self, path: PurePosixPath) -> bool:
        """Say whether programs reach ``path`` and GNU tar is among them."""
        container = inspect(self._name)
        mounts = [PurePosixPath(mount["Destination"]) for mount in container["Mounts"]]
        if container["State"]["Status"] != "running" and not any(
            path.is_relative_to(mount) for mount in mounts
        ):
            return False
        return image_has_tar(container["Image"], lambda: run(self, ["tar", "--version"], reads_all=False))

    def _start_helper(self, container: Mapping[str, Any]) -> dict[str, Any]:
        mounted = {mount["Destination"] for mount in container["Mounts"]}
        tmpfs = {} if "/tmp" in mounted else {"/tmp": ""}  # noqa: S108
        sources = [container["Id"]]
        return start_helper(
            self._name, container["Image"], self._component, volumes_from=sources, tmpfs=tmpfs
        )


def start_helper(name: str, image: str, component: str, **mounts: Any) -> dict[str, Any]:
    """Start a container of ``image`` that waits, without network, whose file system beside ``mounts`` is read-only.

    ``name`` is what errors call it. Returns its description; whoever runs a program in it removes it.
    """
    api = engine()
    with translated(name):
        host = api.create_host_config(network_mode="none", read_only=True, **mounts)
        helper: str = api.create_container(
            image,
            HELPER_COMMAND[1:],
            entrypoint=HELPER_COMMAND[:1],
            user=ROOT,
            labels={HELPER_LABEL: marker(component)},
            host_config=host,
            healthcheck={"test": ["NONE"]},
        )["Id"]
    try:
        with translated(name):
            api.start(helper)
        return inspect(helper)
    except BaseException:
        remove(helper)
        raise


_tar_of_image: dict[str, bool] = {}


def image_has_tar(image: str, version: Callable[[], bytes]) -> bool:
    """Say whether GNU tar is in an image; ``version`` asks a container of it. Asked once a process."""
    if image not in _tar_of_image:
        try:
            _tar_of_image[image] = b"GNU tar" in version()
        except Permanent:
            _tar_of_image[image] = False
    return _tar_of_image[image]
