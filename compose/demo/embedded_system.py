"""The demo system as processes of this host: real PostgreSQL and Redis from wheels, folders, and the five services."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import psycopg
import redis

from compose.demo.config_tree import DATABASES, DEFAULT_SIZE, Ports, Secrets, write_private, write_tree
from compose.demo.embedded import PostgresServer, RedisServer
from compose.demo.embedded_user import give_to_unprivileged, may_enter
from compose.demo.fingerprint import Fingerprint, fingerprint, fingerprint_config
from compose.demo.probe import probe
from compose.demo.seed import Target, drop_all, seed
from compose.demo.service_process import ServiceProcess
from tasks.components.postgres_archiving import archive_command

SERVICES = ("front-admin", "front-user", "admin-api", "user-api", "auth-service")
"""In the order of stopping."""


class EmbeddedSystem:
    """One demo system below ``root``, with ``ports`` of its own. What `DockerSystem` does, without containers."""

    def __init__(self, root: Path, *, ports: Ports | None = None) -> None:
        self.root = root.resolve()
        self.ports = ports or Ports.free()
        self.passwords = Secrets()
        self.config_root = self.root / "config"
        self.uploads, self.keys, self.state = (
            self.root / "uploads",
            self.root / "keys",
            self.root / "services",
        )
        self.wal_archive = self.root / "postgres" / "wal"
        self.postgres = PostgresServer(
            self.root / "postgres" / "data",
            self.ports.postgres,
            self.passwords.postgres_password,
            settings={"archive_mode": "on", "archive_command": archive_command(str(self.wal_archive))},
        )
        self.redis = RedisServer(
            self.root / "redis" / "data", self.ports.redis, self.passwords.redis_password
        )
        self.services = {name: ServiceProcess(name, self.state) for name in SERVICES}

    @property
    def admin_dsn(self) -> str:
        """The superuser's address."""
        return f"postgresql://postgres:{self.passwords.postgres_password}@127.0.0.1:{self.ports.postgres}/postgres"

    @property
    def can_recover(self) -> bool:
        """Whether PostgreSQL's user may enter the folders above its data, which a server that recovers has to."""
        return may_enter(self.postgres.data_dir)

    @property
    def redis_url(self) -> str:
        """The address of Redis, with its password."""
        return f"redis://:{self.passwords.redis_password}@127.0.0.1:{self.ports.redis}/0"

    def up(self) -> None:
        """Start everything; the services are unhealthy until `seed`."""
        for folder in (self.uploads, self.keys, self.state, self.config_root, self.wal_archive):
            folder.mkdir(parents=True, exist_ok=True)
        give_to_unprivileged(self.wal_archive)
        values = dict.fromkeys(("postgres_image", "redis_image", "app_image"), "none") | {
            "prefix": "",
            "redis_appendonly": "no",
        }
        write_tree(self.config_root, values=values, passwords=self.passwords, ports=self.ports)
        self.postgres.start()
        self.redis.start()
        for name, environment in self._environments().items():
            write_private(
                self.state / f"{name}.env", "".join(f"{key}={value}\n" for key, value in environment.items())
            )
        for service in reversed(self.services.values()):
            service.start()

    def seed(self, size: float = DEFAULT_SIZE) -> dict[str, int]:
        """Fill the system with about ``size`` MB and return how much of each thing there is."""
        return seed(self._target(), size=size)

    def fingerprint(self) -> Fingerprint:
        """Return what the databases, Redis, uploads, keys and the configuration hold."""
        trees = {"uploads": self.uploads, "keys": self.keys}
        found = fingerprint(admin_dsn=self.admin_dsn, redis_url=self.redis_url, trees=trees)
        found["files"]["config"] = fingerprint_config(self.config_root)
        return found

    def destroy_data(self) -> None:
        """Lose everything: the databases and roles, every Redis key, all uploads and keys, each folder's ``.env``."""
        with psycopg.connect(self.admin_dsn, autocommit=True) as connection:
            drop_all(connection)
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()
        for folder in (self.uploads, self.keys):
            for entry in list(folder.iterdir()):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for file in self.config_root.glob("*/.env"):
            file.unlink()

    def health(self) -> dict[str, tuple[int, str]]:
        """Return each service's status and what it says of itself; status 0 when it cannot be reached."""
        return {name: probe(f"http://127.0.0.1:{port}/health") for name, port in self.http_ports.items()}

    def wait_healthy(self, *, timeout: float = 60.0) -> None:
        """Return when every service answers 200. Raises ``TimeoutError``, with what the others say."""
        deadline = time.monotonic() + timeout
        while ill := {name: answer for name, answer in self.health().items() if answer[0] != 200}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not healthy after {timeout:.0f} s: {ill}")
            time.sleep(0.2)

    def down(self) -> None:
        """Stop everything; the data stays in ``root``."""
        for service in self.services.values():
            service.stop()
        self.redis.stop()
        self.postgres.stop()

    @property
    def http_ports(self) -> dict[str, int]:
        """The port of each service, in the order of stopping."""
        ports = self.ports
        return dict(
            zip(
                SERVICES,
                (ports.front_admin, ports.front_user, ports.admin, ports.user, ports.auth),
                strict=True,
            )
        )

    def _target(self) -> Target:
        passwords = self.passwords
        return Target(
            admin_dsn=self.admin_dsn,
            redis_url=self.redis_url,
            uploads=self.uploads,
            keys=self.keys,
            app_password=passwords.app_password,
            readonly_password=passwords.readonly_password,
            owner=10001 if os.geteuid() == 0 else None,
        )

    def _environments(self) -> dict[str, dict[str, str]]:
        ports, databases = (
            self.http_ports,
            dict(zip(("auth-service", "user-api", "admin-api"), DATABASES, strict=True)),
        )
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        special = {
            "auth-service": {"ROLE": "auth", "KEYS_DIR": str(self.keys)},
            "user-api": {"ROLE": "user"},
            "admin-api": {"ROLE": "admin", "UPLOADS_DIR": str(self.uploads)},
            "front-user": {
                "ROLE": "front-user",
                "TITLE": "ai-micro-front-user",
                "API_URLS": f"{urls['auth-service']} {urls['user-api']}",
            },
            "front-admin": {
                "ROLE": "front-admin",
                "TITLE": "ai-micro-front-admin",
                "API_URLS": f"{urls['auth-service']} {urls['admin-api']}",
            },
        }
        server = f"postgresql://app:{self.passwords.app_password}@127.0.0.1:{self.ports.postgres}"
        for name, database in databases.items():
            special[name] |= {"DATABASE_URL": f"{server}/{database}", "REDIS_URL": self.redis_url}
        return {name: {**special[name], "PORT": str(ports[name])} for name in SERVICES}
