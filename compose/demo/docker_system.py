"""The demo system in containers: seven services, named and laid out as in the runbook, on a network of their own.

with DockerSystem(folder, prefix="t1-", ports=Ports.free()) as system:
    system.seed(30)
    system.wait_healthy()
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from compose.demo.config_tree import (
    DATABASES,
    DEFAULT_SIZE,
    ROLES,
    SERVICES,
    Ports,
    Secrets,
    read_passwords,
    write_tree,
)
from compose.demo.docker_cli import DockerError, listed, run
from compose.demo.docker_images import Images, ensure_engine
from compose.demo.fingerprint import Fingerprint, fingerprint_config
from compose.demo.probe import probe

#: The container of each folder, without the prefix.
CONTAINERS = dict(
    zip(
        SERVICES,
        ("postgres", "redis", "auth-service", "user-api", "admin-api", "front-user", "front-admin"),
        strict=True,
    )
)
VOLUMES = ("postgres_data", "postgres_wal", "redis_data", "keys", "uploads")
#: The uid of the services, which the uploads and keys belong to.
APP_UID = 10001
_READY_SECONDS = 90.0


class DockerSystem:
    """One demo system, whose configuration lies in `root`.

    `prefix` stands before every container, volume, network and project name, so that several run side by side with `ports` of
    their own. `suite` chooses the release of PostgreSQL and Redis (see `Images`). Passwords are those found in `root`, or new.
    """

    def __init__(
        self,
        root: Path,
        *,
        prefix: str = "",
        ports: Ports | None = None,
        suite: str = "trixie",
        appendonly: bool = False,
        passwords: Secrets | None = None,
    ) -> None:
        self.root = root.resolve()
        self.prefix = prefix
        self.ports = ports or Ports()
        self.images = Images(suite)
        self.network = f"{prefix}ai-micro-network"
        self.containers = {name: prefix + name for name in CONTAINERS.values()}
        self.volumes = {name: prefix + name for name in VOLUMES}
        self._appendonly = appendonly
        self.passwords = passwords or read_passwords(self.root) or Secrets()

    can_recover = True
    """PostgreSQL's user may enter the folders above its data."""

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def admin_dsn(self) -> str:
        """The superuser's address from this host."""
        return f"postgresql://postgres:{self.passwords.postgres_password}@127.0.0.1:{self.ports.postgres}/postgres"

    @property
    def redis_url(self) -> str:
        """The address of Redis from this host, with its password."""
        return f"redis://:{self.passwords.redis_password}@127.0.0.1:{self.ports.redis}/0"

    def write_config(self) -> None:
        """Write the configuration tree to `root`: the compose files and each folder's `.env`."""
        images = {
            "postgres_image": self.images.postgres,
            "redis_image": self.images.redis,
            "app_image": self.images.app,
        }
        values = images | {"prefix": self.prefix, "redis_appendonly": "yes" if self._appendonly else "no"}
        write_tree(self.root, values=values, passwords=self.passwords, ports=self.ports)

    def up(self) -> None:
        """Make and start everything, from the engine to the seven containers; return when PostgreSQL and Redis answer.

        Raise DockerError, after removing what was made. The services are unhealthy until `seed`.
        """
        ensure_engine(self.images.suite)
        self.images.build()
        self.write_config()
        try:
            self.ensure_network()
            for name in SERVICES:
                self.compose(name, "up", "-d")
            self._wait_ready()
        except BaseException:
            self.down()
            raise

    def ensure_network(self) -> None:
        """Make the network that all seven projects share, unless it is there. Raise DockerError."""
        if not listed("network", f"name=^{self.network}$"):
            run(["docker", "network", "create", self.network])

    def compose(self, service: str, *arguments: str, timeout: float = 180) -> str:
        """Run `docker compose` in the folder of `service`, as an operator would. Raise DockerError."""
        return run(["docker", "compose", *arguments], timeout=timeout, cwd=self.root / service)

    def seed(self, size: float = DEFAULT_SIZE, *, seed: str = "demo") -> dict[str, float]:
        """Fill the system with about `size` MB (see `seed.seed`) and give how much of each thing there is."""
        mounts = [
            "--volume",
            f"{self.volumes['uploads']}:/uploads",
            "--volume",
            f"{self.volumes['keys']}:/keys",
        ]
        command = ["python3", "-m", "compose.demo.seed", "--uploads", "/uploads", "--keys", "/keys"]
        command += ["--size", str(size), "--seed", seed, "--owner", str(APP_UID)]
        counts: dict[str, float] = json.loads(self._one_off(mounts, command, timeout=120 + 2 * size))
        return counts

    def fingerprint(self) -> Fingerprint:
        """Give what the databases, Redis, uploads, keys and the configuration hold."""
        mounts, command = [], ["python3", "-m", "compose.demo.fingerprint"]
        for name in ("uploads", "keys"):
            mounts += ["--volume", f"{self.volumes[name]}:/{name}:ro"]
            command += ["--tree", f"{name}=/{name}"]
        found: Fingerprint = json.loads(self._one_off(mounts, command, timeout=900))
        found["files"]["config"] = fingerprint_config(self.root)
        return found

    def destroy_data(self) -> None:
        """Lose everything: the databases and roles, every Redis key, all uploads and keys, each folder's `.env`."""
        statements = [f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in DATABASES]
        statements += [f"DROP ROLE IF EXISTS {name}" for name in ROLES]
        psql = [
            "docker",
            "exec",
            self.containers["postgres"],
            "psql",
            "-qU",
            "postgres",
            "-v",
            "ON_ERROR_STOP=1",
        ]
        run(psql + [part for statement in statements for part in ("-c", statement)])
        redis_cli = [
            "docker",
            "exec",
            "--env",
            "REDISCLI_AUTH",
            self.containers["redis"],
            "redis-cli",
            "FLUSHALL",
        ]
        run(redis_cli, environment={"REDISCLI_AUTH": self.passwords.redis_password})
        for container, folder in (("admin-api", "/app/uploads"), ("auth-service", "/app/keys")):
            remove = ["find", folder, "-mindepth", "1", "-delete"]
            run(["docker", "exec", "--user", "0", self.containers[container], *remove])
        for name in SERVICES:
            (self.root / name / ".env").unlink(missing_ok=True)

    def health(self) -> dict[str, tuple[int, str]]:
        """Give each service's status and what it says of itself; status 0 when it cannot be reached."""
        return {name: probe(f"http://127.0.0.1:{port}/health") for name, port in self._http_ports().items()}

    def wait_healthy(self, *, timeout: float = 60.0) -> None:
        """Return when every service answers 200. Raise TimeoutError, with what the others say, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while ill := {name: answer for name, answer in self.health().items() if answer[0] != 200}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not healthy after {timeout:.0f} s: {ill}")
            time.sleep(0.2)

    def leftovers(self) -> list[str]:
        """Give what there is of this system in the engine: containers, volumes, network."""
        containers, volumes = set(self.containers.values()), set(self.volumes.values())
        names = {"container": containers, "volume": volumes, "network": {self.network}}
        found = [
            f"{kind} {name}" for kind, wanted in names.items() for name in listed(kind) if name in wanted
        ]
        for service in SERVICES:
            label = f"label=com.docker.compose.project={self.prefix}{service}"
            found += [f"{kind} {name}" for kind in names for name in listed(kind, label)]
        return sorted(set(found))

    def down(self, *, volumes: bool = True) -> None:
        """Remove every container, the network and (unless `volumes` is False) the data. `root` stays. Raise DockerError.

        Works by name and compose label, so it needs no `.env` and does no harm when repeated.
        """
        remove = {"container": ["--force", "--volumes"], "volume": ["--force"], "network": []}
        for kind, options in remove.items():
            names = [name for what, name in (item.split(" ", 1) for item in self.leftovers()) if what == kind]
            if names and (volumes or kind != "volume"):
                run(["docker", kind, "rm", *options, *names])

    def _http_ports(self) -> dict[str, int]:
        ports = self.ports
        numbers = (ports.auth, ports.user, ports.admin, ports.front_user, ports.front_admin)
        return dict(zip(tuple(CONTAINERS.values())[2:], numbers, strict=True))

    def _wait_ready(self) -> None:
        commands = (
            ["docker", "exec", self.containers["postgres"], "pg_isready", "-q", "-h", "127.0.0.1"],
            ["docker", "exec", "--env", "REDISCLI_AUTH", self.containers["redis"], "redis-cli", "-e", "PING"],
        )
        deadline = time.monotonic() + _READY_SECONDS
        for command in commands:
            while True:
                try:
                    run(command, timeout=20, environment={"REDISCLI_AUTH": self.passwords.redis_password})
                    break
                except DockerError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)

    def _one_off(self, mounts: list[str], command: list[str], *, timeout: float) -> str:
        """Run `command` as root in a container of the services' image that is gone afterwards."""
        environment = {
            "DEMO_ADMIN_DSN": f"postgresql://postgres:{self.passwords.postgres_password}@postgres:5432/postgres",
            "DEMO_REDIS_URL": f"redis://:{self.passwords.redis_password}@redis:6379/0",
            "DEMO_APP_PASSWORD": self.passwords.app_password,
            "DEMO_READONLY_PASSWORD": self.passwords.readonly_password,
        }
        # Only the names: docker takes the values from its own environment.
        names = [part for name in environment for part in ("--env", name)]
        head = ["docker", "run", "--rm", "--init", "--user", "0", "--network", self.network, *names, *mounts]
        return run([*head, self.images.app, *command], timeout=timeout, environment=environment)
