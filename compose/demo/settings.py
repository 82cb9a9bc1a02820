"""The backup system's settings for the demo system: backup.toml in a page, for either runtime."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from compose.demo.config_tree import SERVICES as FOLDERS
from compose.demo.embedded import postgres_bin_dir

if TYPE_CHECKING:
    from compose.demo.docker_system import DockerSystem
    from compose.demo.embedded_system import EmbeddedSystem

SYSTEM_NAME = "ai-micro-service"
BROKER_PASSWORD = "BROKER_PASSWORD"  # noqa: S105  the name of an environment variable
REDIS_PASSWORD = "REDIS_PASSWORD"  # noqa: S105  the name of an environment variable
POSTGRES_PASSWORD = "POSTGRES_PASSWORD"  # noqa: S105  the name of an environment variable
CONFIG_FILES = [f"{folder}/{name}" for folder in FOLDERS for name in (".env", "docker-compose.yml")]


def settings(components: str, *, folder: Path, broker_port: int, extra: str = "") -> str:
    """Return backup.toml: ``components`` and services of the system, with store and catalogue below ``folder``.

    The host ``db1`` has PostgreSQL and Redis, ``app1`` the files, the configuration and the services.
    """
    return f"""\
hosts = ["db1", "app1"]

[system]
name = {dumps(SYSTEM_NAME)}
version = "1.0.0"

[store]
path = {dumps(str(folder / "store"))}

[broker]
port = {broker_port}
password = {{ env = {dumps(BROKER_PASSWORD)} }}

[catalog]
url = {dumps(f"sqlite:///{folder / 'catalog.sqlite'}")}

{extra}
{components}"""


def embedded_components(system: EmbeddedSystem) -> str:
    """Return the components and services of an embedded system: folders, and servers with start and stop commands."""
    redis = _commands(
        "compose.demo.embedded",
        "redis",
        "--data-dir",
        str(system.redis.data_dir),
        "--port",
        str(system.redis.port),
    )
    postgres = _commands(
        "compose.demo.embedded",
        "postgres",
        "--data-dir",
        str(system.postgres.data_dir),
        "--port",
        str(system.postgres.port),
    )
    services = "".join(
        _service(name, port, _commands("compose.demo.service", name, "--state-dir", str(system.state)))
        for name, port in system.http_ports.items()
    )
    return f"""\
[components.postgres]
kind = "postgres"
host = "db1"
address = "127.0.0.1"
port = {system.postgres.port}
password = {{ env = {dumps(POSTGRES_PASSWORD)} }}
databases = ["authdb", "apidb", "admindb"]
bin_dir = {dumps(str(postgres_bin_dir()))}
data_dir = {dumps(str(system.postgres.data_dir))}
wal_archive = {dumps(str(system.wal_archive))}
{_lines(postgres)}
[components.redis]
kind = "redis"
host = "db1"
port = {system.redis.port}
password = {{ env = {dumps(REDIS_PASSWORD)} }}
server = {dumps(str(system.redis.program))}
data_dir = {dumps(str(system.redis.data_dir))}
{_lines(redis)}
[components.uploads]
kind = "files"
host = "app1"
path = {dumps(str(system.uploads))}

[components.auth-keys]
kind = "files"
host = "app1"
path = {dumps(str(system.keys))}

[components.config]
kind = "config"
host = "app1"
root = {dumps(str(system.config_root))}
paths = {dumps(CONFIG_FILES)}
{services}"""


def docker_components(system: DockerSystem) -> str:
    """Return the components and services of a system in containers."""
    files = dict(
        zip(
            ("postgres", "redis", "auth-service", "user-api", "admin-api", "front-user", "front-admin"),
            FOLDERS,
            strict=True,
        )
    )

    def location(name: str) -> dict[str, object]:
        return {
            "container": system.containers[name],
            "compose_file": str(system.root / files[name] / "docker-compose.yml"),
        }

    ports = system.ports
    services = "".join(
        _service(name, port, location(name))
        for name, port in {
            "front-admin": ports.front_admin,
            "front-user": ports.front_user,
            "admin-api": ports.admin,
            "user-api": ports.user,
            "auth-service": ports.auth,
        }.items()
    )
    return f"""\
[components.postgres]
kind = "postgres"
host = "db1"
databases = ["authdb", "apidb", "admindb"]
wal_archive = "/var/lib/postgresql/wal"
{_lines(location("postgres"))}
[components.redis]
kind = "redis"
host = "db1"
password = {{ env = {dumps(REDIS_PASSWORD)} }}
{_lines(location("redis"))}
[components.uploads]
kind = "files"
host = "app1"
path = "/app/uploads"
{_lines(location("admin-api"))}
[components.auth-keys]
kind = "files"
host = "app1"
path = "/app/keys"
{_lines(location("auth-service"))}
[components.config]
kind = "config"
host = "app1"
root = {dumps(str(system.root))}
paths = {dumps(CONFIG_FILES)}
{services}"""


def _commands(module: str, *words: str) -> dict[str, object]:
    return {action: [sys.executable, "-m", module, action, *words] for action in ("start", "stop", "status")}


def _service(name: str, port: int, location: Mapping[str, object]) -> str:
    return f"""
[[services]]
name = {dumps(name)}
host = "app1"
health = "http://127.0.0.1:{port}/health"
{_lines(location)}"""


def _lines(table: Mapping[str, object]) -> str:
    return "".join(f"{key} = {dumps(value)}\n" for key, value in table.items())
