"""A named volume as a runtime, whether or not a container has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

from workers.errors import Permanent
from workers.runtime import MARKER, VOLUMES, Process, marker
from workers.runtime.docker import DockerRuntime, image_has_tar, start_helper
from workers.runtime.docker_process import DockerProcess
from workers.runtime.engine import engine, images_for, inspect_volume, translated

MADE_BY = "ai-micro-backup.made-by"
"""Label of a volume that a restore made; its value is the run."""


class VolumeRuntime(DockerRuntime):
    """Runs programs in helper containers that have the volume, below `VOLUMES`, and nothing else that is written to.

    The image of a helper needs GNU tar: by default that of this worker's own container, or of one that has the volume.
    """

    def __init__(self, volume: str, *, image: str | None, component: str) -> None:
        super().__init__(f"of the volume {volume}", component=component)
        self._volume, self._image = volume, image

    def exists(self) -> bool:
        """Say whether there is such a volume."""
        return inspect_volume(self._volume) is not None

    def make(self, run_id: str) -> None:
        """Make the volume where there is none, for a restore that `unmake` may follow."""
        if not self.exists():
            with translated(self._name):
                engine().create_volume(self._volume, labels={MADE_BY: run_id})

    def unmake(self, run_id: str) -> None:
        """Remove the volume if `make` made it for this run."""
        described = inspect_volume(self._volume)
        if described and (described["Labels"] or {}).get(MADE_BY) == run_id:
            with translated(self._name):
                engine().remove_volume(self._volume)

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        if not self.exists():
            raise Permanent(
                f"there is no volume {self._volume} on this host; `docker volume ls` shows which there are"
            )
        for image in [self._image] if self._image else images_for(self._volume):
            if image_has_tar(image, partial(self._run_tar, image)):
                return self._process(image, argv, env or {})
        raise Permanent(
            f"the volume {self._volume} is reached through a helper container, for which "
            f"{f'the image {self._image}' if self._image else 'no image'} with sh and GNU tar was found on this host: "
            'name one that it has, for example image = "debian:trixie-slim"'
        )

    def remove_leftovers(self, component: str) -> bool:
        super().remove_leftovers(component)
        return False

    def _has_tar(self, path: PurePosixPath) -> bool:
        return True  # `spawn` takes no image without it

    def _process(self, image: str, argv: Sequence[str], env: Mapping[str, str]) -> DockerProcess:
        place = {self._volume: {"bind": str(VOLUMES / self._volume), "mode": "rw"}}
        tmpfs = {"/tmp": ""}  # noqa: S108
        helper = start_helper(self._name, image, self._component, binds=place, tmpfs=tmpfs)
        return DockerProcess(self._name, helper, argv, {**env, MARKER: marker(self._component)})

    def _run_tar(self, image: str) -> bytes:
        process = self._process(image, ["tar", "--version"], {})
        process.close_input()
        return b"".join(process.output())
