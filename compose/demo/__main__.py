"""`make demo`: a real system is backed up, destroyed and restored by the real thing, and compared to the last byte."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Protocol

import psycopg
from rich.console import Console

from compose.demo import settings
from compose.demo.cluster import REPOSITORY, Cluster, ClusterError
from compose.demo.config_tree import DEFAULT_SIZE, Ports, Secrets
from compose.demo.docker_cli import DockerError
from compose.demo.docker_images import engine_answers, stop_engine
from compose.demo.docker_system import DockerSystem
from compose.demo.embedded import RedisServer, ServerError, free_port
from compose.demo.embedded_system import EmbeddedSystem
from compose.demo.fingerprint import Fingerprint, diff

DIFFERENCES_SHOWN = 20
HEALTH_SECONDS = 60
console = Console(highlight=False, soft_wrap=True)


class System(Protocol):
    """What the demo does with either system."""

    passwords: Secrets

    @property
    def admin_dsn(self) -> str: ...
    @property
    def can_recover(self) -> bool: ...
    def up(self) -> None: ...
    def seed(self, size: float = ...) -> object: ...
    def fingerprint(self) -> Fingerprint: ...
    def destroy_data(self) -> None: ...
    def wait_healthy(self, *, timeout: float = ...) -> None: ...
    def down(self) -> None: ...


def main() -> int:
    """Run the demo; the exit status is 0 for PASS and 1 for FAIL."""
    runtime = os.environ.get("RUNTIME") or "process"
    if runtime not in ("process", "docker"):
        console.print(f"RUNTIME must be docker or process (the default), not {runtime!r}")
        return 2
    # DEMO_FOLDER and DEMO_PREFIX let several demos run side by side, as the tests do.
    folder = Path(os.environ.get("DEMO_FOLDER") or REPOSITORY / "var" / "demo") / runtime
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = float(os.environ.get("SIZE") or DEFAULT_SIZE)
    keep = os.environ.get("KEEP") == "1"
    system: System
    if runtime == "docker":
        prefix = os.environ.get("DEMO_PREFIX", "demo-")
        system = containers = DockerSystem(folder / "system", prefix=prefix, ports=Ports.free())
        describe = partial(settings.docker_components, containers)
    else:
        system = processes = EmbeddedSystem(folder / "system")
        describe = partial(settings.embedded_components, processes)
    broker_password = secrets.token_urlsafe(24)
    broker = RedisServer(folder / "broker", free_port(), broker_password, appendonly=True)
    environment = {
        settings.BROKER_PASSWORD: broker_password,
        settings.REDIS_PASSWORD: system.passwords.redis_password,
        settings.POSTGRES_PASSWORD: system.passwords.postgres_password,
    }
    config = folder / "backup.toml"
    cluster = Cluster(folder, config, broker=broker, environment=environment)
    if runtime == "process" and not shutil.which("redis-cli", path=cluster.environment["PATH"]):
        console.print(
            "no redis-cli here: install redis-tools, or use Python 3.11 or 3.12, whose wheel brings it"
        )
        return 1
    stops_engine = runtime == "docker" and not engine_answers()
    is_up = False
    try:
        step(f"starting the demo system ({runtime}), about {size:g} MB")
        system.up()
        is_up = True
        config.write_text(settings.settings(describe(), folder=folder, broker_port=broker.port))
        held = system.seed(size)
        system.wait_healthy(timeout=HEALTH_SECONDS)
        console.print(f"healthy; it holds {json.dumps(held)}")
        differences = rehearse(system, cluster)
    except (ServerError, DockerError, ClusterError, TimeoutError, DemoError) as error:
        differences = [str(error)]
    finally:
        if keep:
            console.print(f"KEEP=1: everything still runs; settings and logs are in {shown(folder)}")
        else:
            cluster.stop()
            if is_up:
                system.down()
            if stops_engine:
                stop_engine()
    for line in differences[:DIFFERENCES_SHOWN]:
        console.print(f"differs: {line}")
    console.print("demo: FAIL" if differences else "demo: PASS")
    return 1 if differences else 0


class DemoError(Exception):
    """A step of the demo failed; the text says which."""


def rehearse(system: System, cluster: Cluster) -> list[str]:
    """Back up, destroy, restore and compare; return what differs, nothing when all is well."""
    step("starting the backup system: broker, control worker, host workers db1 and app1, beat, Flower")
    cluster.start_all("db1", "app1")
    console.print(f"Flower: {cluster.flower_url} (user admin, password in {shown(cluster.flower_login)})")

    step("fingerprint of every table, key and file")
    before = system.fingerprint()

    step("full-system backup")
    backup = cli(cluster, "backup")
    archive = json.loads(cluster.run("ai-micro-backup", "list", "--json").stdout)[0]
    console.print(
        f"archive: {shown(cluster.folder) / 'store' / archive['archive']} ({archive['size'] / 1e6:.1f} MB, {backup:.1f} s)"
    )

    step(
        "archiving of WAL: what is missing for it, and a base backup, from which any later moment can be reached"
    )
    cli(cluster, "preflight", "postgres")
    cli(cluster, "backup", "postgres", "--base", "full")

    step("destroying the data: databases, roles, keys, files, .env")
    system.destroy_data()
    if not diff(before, system.fingerprint()):
        raise DemoError("the data was not destroyed, so restoring it would prove nothing")

    step("restore")
    name = Path(archive["archive"]).name
    cli(cluster, "plan", name)
    seconds = cli(cluster, "restore", name, "--confirm", settings.SYSTEM_NAME)

    step("comparing every table, key and file, and asking every service")
    system.wait_healthy(timeout=HEALTH_SECONDS)
    differences = diff(before, system.fingerprint())
    console.print(f"restored in {seconds:.1f} s; {len(differences)} difference(s); every service healthy")
    return differences or recover(system, cluster, before)


def recover(system: System, cluster: Cluster, before: Fingerprint) -> list[str]:
    """Lose rows by mistake, bring PostgreSQL back to the moment before it, and return what differs."""
    if not system.can_recover:
        console.print(
            "no recovery to a moment: PostgreSQL's user may not enter this folder; DEMO_FOLDER names another"
        )
        return []
    step("a mistake: somebody deletes rows. PostgreSQL comes back to the moment before it")
    moment = delete_rows(system.admin_dsn)
    cli(cluster, "collect")
    seconds = cli(cluster, "recover", "postgres", "--to-time", moment, "--confirm", "postgres")
    system.wait_healthy(timeout=HEALTH_SECONDS)
    differences = diff(before, system.fingerprint())
    console.print(f"recovered to {moment} in {seconds:.1f} s; {len(differences)} difference(s)")
    return differences


def delete_rows(admin_dsn: str) -> str:
    """Delete rows that matter, and return the server's time just before."""
    with psycopg.connect(admin_dsn, dbname="authdb", autocommit=True) as connection:
        found = connection.execute("SELECT clock_timestamp()").fetchone()
        if not found or not connection.execute("DELETE FROM refresh_tokens").rowcount:
            raise DemoError("nothing was deleted, so bringing it back would prove nothing")
    return str(found[0].isoformat())


def cli(cluster: Cluster, *words: str) -> float:
    """Run the command line with its progress on this terminal and return the seconds it took."""
    started = time.monotonic()
    if status := cluster.show("ai-micro-backup", *words):
        raise DemoError(
            f"ai-micro-backup {words[0]} ended with status {status}; logs are in {shown(cluster.folder)}/logs"
        )
    return time.monotonic() - started


def shown(path: Path) -> Path:
    """Return ``path`` as people read it: relative to the repository when it is in it."""
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def step(text: str) -> None:
    """Say what comes next."""
    console.print(f"[bold]→ {text}[/bold]")


if __name__ == "__main__":
    sys.exit(main())
