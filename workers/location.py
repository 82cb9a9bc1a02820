"""Where a component or a service lives."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from workers.secret import Strict


class Location(Strict):
    """Where something lives: in a container, or as programs of its host with commands that stop and start it."""

    container: str | None = None
    """Name of the container. ``None``: this host's own programs and folders."""
    compose_file: Path | None = None
    """The compose file that creates the container when there is none."""
    compose_service: str | None = None
    """The service of the compose file; by default all of its services."""
    start: tuple[str, ...] | None = None
    stop: tuple[str, ...] | None = None
    status: tuple[str, ...] | None = None
    """Commands of this host, as lists of words; ``status`` exits 0 when it runs."""
    stop_timeout: float = 60.0
    """Seconds that a stop or start may take."""

    @model_validator(mode="after")
    def _container_or_commands(self) -> Location:
        if self.container is not None and (self.start or self.stop or self.status):
            raise ValueError("start, stop and status commands are for what does not live in a container")
        if self.container is None and self.compose_file is not None:
            raise ValueError("a compose_file needs the name of the container")
        return self
