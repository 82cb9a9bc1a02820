"""The demo system's images: built when they are missing or when what they are made of has changed."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from compose.demo.docker_cli import DockerError, run

COMPOSE = Path(__file__).resolve().parents[1]
_SOURCE_LABEL = "ai-micro-demo.source"
_BUILD_SECONDS = 900


@dataclass(frozen=True)
class Images:
    """The names of the three images, made of the Debian release `suite`."""

    suite: str = "trixie"

    @property
    def postgres(self) -> str:
        """PostgreSQL: 17 on trixie, 15 on bookworm."""
        return f"ai-micro-demo/postgres:{self.suite}"

    @property
    def redis(self) -> str:
        """Redis: 8.0 on trixie, 7.0 on bookworm."""
        return f"ai-micro-demo/redis:{self.suite}"

    @property
    def app(self) -> str:
        """The services; of trixie always, since they are the same everywhere."""
        return "ai-micro-demo/app:trixie"

    def build(self, *images: str) -> None:
        """Build those of `images` (all without any) that are missing or out of date, at the same time. Raise DockerError.

        Fast when nothing is to do.
        """
        every = (
            (self.postgres, self.suite, COMPOSE / "images/postgres", COMPOSE / "images/postgres"),
            (self.redis, self.suite, COMPOSE / "images/redis", COMPOSE / "images/redis"),
            (self.app, "trixie", COMPOSE / "images/app", COMPOSE),
        )
        builds = [build for build in every if not images or build[0] in images]
        with ThreadPoolExecutor(len(builds)) as pool:
            for outcome in [pool.submit(_build, *build) for build in builds]:
                outcome.result()


def ensure_engine(*suites: str) -> None:
    """See that a Docker engine answers and the base images of `suites` are there (see `engine.sh`). Raise DockerError."""
    script = str(COMPOSE / "engine.sh")
    run([script, "start"], timeout=900)
    run([script, "base-images", *sorted(set(suites) | {"trixie"})], timeout=900)


def engine_answers() -> bool:
    """Say whether a Docker engine answers now."""
    try:
        run(["docker", "info"], timeout=30)
    except (DockerError, OSError):
        return False
    return True


def stop_engine() -> None:
    """Stop the engine that `ensure_engine` started; one that something else started goes on. Raise DockerError."""
    run([str(COMPOSE / "engine.sh"), "stop"], timeout=120)


def _build(image: str, suite: str, folder: Path, context: Path) -> None:
    source = _source(suite, folder)
    if _label(image) == source:
        return
    run(
        [
            "docker",
            "build",
            "--quiet",
            "--network",
            "host",
            "--build-arg",
            f"BASE=debian:{suite}-slim",
            "--label",
            f"{_SOURCE_LABEL}={source}",
            "--tag",
            image,
            "--file",
            str(folder / "Dockerfile"),
            str(context),
        ],
        timeout=_BUILD_SECONDS,
        environment={"DOCKER_BUILDKIT": "1"},
    )


def _label(image: str) -> str:
    command = [
        "docker",
        "image",
        "inspect",
        "--format",
        f'{{{{index .Config.Labels "{_SOURCE_LABEL}"}}}}',
        image,
    ]
    try:
        return run(command).strip()
    except DockerError:
        return ""


def _source(suite: str, folder: Path) -> str:
    """Give a digest of the files the image is made of: its own folder's, and for the services the demo's modules."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    if folder.name == "app":
        modules = (COMPOSE / "demo").glob("*.py")
        paths += [path for path in modules if not path.name.startswith(("embedded", "docker"))]
        paths += (COMPOSE / "demo" / "schema").glob("*.sql")
    digest = hashlib.sha256(suite.encode())
    for path in sorted(paths):
        digest.update(path.relative_to(COMPOSE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
