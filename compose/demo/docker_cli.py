"""The docker command line: argument lists, bounded waits, one kind of error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class DockerError(Exception):
    """A docker command failed or took too long; the text holds the end of what it said."""


def run(
    command: list[str],
    *,
    timeout: float = 120,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run `command` and give what it printed. Secrets go in by `environment`. Raise DockerError."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            env=os.environ | (environment or {}),
            cwd=cwd,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DockerError(
            f"{' '.join(command[:3])}: {type(error).__name__} ({timeout:.0f} s allowed)"
        ) from error
    if done.returncode != 0:
        raise DockerError(
            f"{' '.join(command[:3])} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:].strip()}"
        )
    return done.stdout


def listed(kind: str, *filters: str) -> list[str]:
    """Give the names of the engine's containers, volumes or networks that pass `filters`."""
    every = ["--all"] if kind == "container" else []
    field = "{{.Names}}" if kind == "container" else "{{.Name}}"
    chosen = [part for item in filters for part in ("--filter", item)]
    return run(["docker", kind, "ls", *every, "--format", field, *chosen]).split()
