"""The demo system's configuration: seven folders as in the runbook, written with generated secrets."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from string import Template

SYSTEM = Path(__file__).parent / "system"
TEMPLATE = ".env.template"

#: The folders in the order they start; stopping goes the other way.
SERVICES = (
    "ai-micro-postgres",
    "ai-micro-redis",
    "ai-micro-api-auth",
    "ai-micro-api-user",
    "ai-micro-api-admin",
    "ai-micro-front-user",
    "ai-micro-front-admin",
)

#: What lies in PostgreSQL, and about how many megabytes the whole system holds when nothing else is said.
DATABASES = ("authdb", "apidb", "admindb")
ROLES = ("app", "readonly", "reporting")
DEFAULT_SIZE = 30.0


def _secret() -> str:
    return secrets.token_urlsafe(24)


@dataclass(frozen=True)
class Secrets:
    """Every password of the demo system. Generated unless given; never shown by `repr`."""

    postgres_password: str = field(default_factory=_secret, repr=False)
    app_password: str = field(default_factory=_secret, repr=False)
    readonly_password: str = field(default_factory=_secret, repr=False)
    redis_password: str = field(default_factory=_secret, repr=False)


@dataclass(frozen=True)
class Ports:
    """Where each service listens on 127.0.0.1. The defaults of the three APIs are the runbook's."""

    postgres: int = 55432
    redis: int = 56379
    auth: int = 8001
    user: int = 8002
    admin: int = 8003
    front_user: int = 3001
    front_admin: int = 3002

    @classmethod
    def free(cls) -> Ports:
        """Ports that nobody listens on at this moment, so that several systems run side by side."""
        names = [item.name for item in fields(cls)]
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in names]
        try:
            return cls(**{n: listener.getsockname()[1] for n, listener in zip(names, listeners, strict=True)})
        finally:
            for listener in listeners:
                listener.close()


def write_tree(root: Path, *, values: dict[str, str], passwords: Secrets, ports: Ports) -> None:
    """Copy the seven folders to `root` and write each one's `.env`, readable by its owner only.

    `values` holds what the templates name beside passwords and ports: prefix and images.
    What lies in `root` already is overwritten file by file; nothing else there is touched.
    Raise KeyError when a template names a value that is not given.
    """
    known = values | asdict(passwords) | {f"{name}_port": str(port) for name, port in asdict(ports).items()}
    for name in SERVICES:
        source, target = SYSTEM / name, root / name
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TEMPLATE))
        text = Template((source / TEMPLATE).read_text(encoding="utf-8")).substitute(known)
        write_private(target / ".env", text)


def read_env(path: Path) -> dict[str, str]:
    """Give the NAME=value lines of an `.env` file, taken literally: no quotes, no substitution."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): value for name, _, value in pairs}


def read_passwords(root: Path) -> Secrets | None:
    """Give the passwords that `write_tree` wrote into the tree at `root`, or None when they are not all there."""
    try:
        postgres = read_env(root / "ai-micro-postgres" / ".env")
        redis = read_env(root / "ai-micro-redis" / ".env")
        return Secrets(
            postgres_password=postgres["POSTGRES_PASSWORD"],
            app_password=postgres["APP_PASSWORD"],
            readonly_password=postgres["READONLY_PASSWORD"],
            redis_password=redis["REDIS_PASSWORD"],
        )
    except (FileNotFoundError, KeyError):
        return None


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, which nobody but its owner can read at any moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
