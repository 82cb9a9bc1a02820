"""A service that is a container: stop it, start it, create it from its compose file."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from typing import Any

from workers.errors import CommandFailed, Permanent, RuntimeUnavailable
from workers.location import Location
from workers.runtime.engine import STDERR_TAIL, engine, inspect, is_missing, translated

POLL_SECONDS = 0.2
COMPOSE_SECONDS = 900
"""Creating a container may mean pulling its image."""
LOG_LINES = 20
SETTLE_SECONDS = 1.0
"""Without a health check, what still runs after this time counts as started."""


class DockerService:
    """A container, stopped and started through the engine, and created by ``docker compose`` when it is missing."""

    def __init__(self, location: Location) -> None:
        if location.container is None:
            raise Permanent("a service in Docker needs the name of its container")
        self._location, self._name = location, location.container

    def exists(self) -> bool:
        """Say whether there is such a container, running or not."""
        return self._find() is not None

    def is_running(self) -> bool:
        container = self._find()
        return container is not None and bool(container["State"]["Running"])

    def stop(self) -> None:
        if self.exists():
            with translated(self._name):
                engine().stop(self._name, timeout=max(1, round(self._location.stop_timeout)))

    def start(self) -> None:
        if self.exists():
            with translated(self._name):
                engine().start(self._name)
        else:
            self._create()
        self._wait()

    def _find(self) -> dict[str, Any] | None:
        try:
            return inspect(self._name)
        except RuntimeUnavailable as error:
            if is_missing(error):
                return None
            raise

    def _create(self) -> None:
        file = self._location.compose_file
        if file is None:
            raise Permanent(
                f"there is no container {self._name}, and no compose_file is configured to create it from"
            )
        if not file.is_file():
            raise Permanent(f"there is no container {self._name}, and its compose file {file} does not exist")
        if shutil.which("docker") is None:
            raise Permanent(
                f"there is no container {self._name}, and no docker command here to create it from {file}"
            )
        compose = ["docker", "compose"]
        if _run([*compose, "version"])[0]:
            raise Permanent(
                f"there is no container {self._name}; to create it, install docker's compose plugin, v2"
            )
        service = [self._location.compose_service] if self._location.compose_service else []
        status, output = _run([*compose, "--file", str(file), "up", "--detach", *service])
        if status:
            raise CommandFailed("docker compose up", status, output)
        if not self.exists():
            raise Permanent(f"compose file {file} was started, and created no container {self._name}")

    def _wait(self) -> None:
        """Return when it runs and, if it has a health check, is healthy."""
        started = time.monotonic()
        deadline = started + self._location.stop_timeout
        while True:
            state = inspect(self._name)["State"]
            health = (state.get("Health") or {}).get("Status", "none")
            settled = health == "healthy" or (
                health == "none" and time.monotonic() > started + SETTLE_SECONDS
            )
            if state["Status"] == "running" and settled:
                return
            late = time.monotonic() > deadline
            if late or state["Status"] in ("exited", "dead"):
                how = f"{state['Status']}, exit code {state['ExitCode']}, health {health}"
                within = f" within {self._location.stop_timeout:g} s" if late else ""
                raise RuntimeUnavailable(
                    f"container {self._name} did not start{within} ({how}): {self._log()}"
                )
            time.sleep(POLL_SECONDS)

    def _log(self) -> str:
        with translated(self._name):
            lines: bytes = engine().logs(self._name, tail=LOG_LINES)
        return lines.decode(errors="replace").strip()[-STDERR_TAIL:] or "it logged nothing"


def _run(command: list[str]) -> tuple[int, str]:
    """Run a program of this host; return its status and the end of what it said."""
    with tempfile.TemporaryFile() as output:
        try:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=COMPOSE_SECONDS,
                start_new_session=True,
                check=False,
            ).returncode
        except OSError as error:
            raise RuntimeUnavailable(f"{command[0]} cannot be started: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeUnavailable(f"{' '.join(command)} did not end within {COMPOSE_SECONDS} s") from error
        output.seek(0)
        return status, output.read().decode(errors="replace")[-STDERR_TAIL:]
