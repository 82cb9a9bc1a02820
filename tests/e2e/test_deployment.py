"""The deployment of compose/, started as `make up` does: what it says, what runs, what it refuses, what it leaves."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
import redis

from compose.demo.embedded import free_port

REPOSITORY = Path(__file__).parents[2]
SERVICES = {"broker", "control", "host", "beat", "flower"}
SETTINGS = """
hosts = ["main"]

[system]
name = "deployed"

[components.notes]
kind = "files"
host = "main"
container = "{container}"
path = "/srv/notes"

[components.config]
kind = "config"
host = "main"
root = "{system}"
paths = [".env"]

[store]
path = "/backups"

[broker]
host = "broker"
port = {broker_port}
password = {{ file = "/run/secrets/broker_password" }}

[catalog]
url = "sqlite:////var/lib/ai-micro-backup/catalog.sqlite"

[schedule]
watchdog_seconds = 5
"""

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@dataclass(frozen=True)
class Deployment:
    """A deployment beside any other one: project, tag, folders, ports and secrets are its own."""

    folder: Path
    project: str
    broker_port: int
    flower_port: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "BACKUP_PROJECT": self.project,
            "BACKUP_TAG": self.project,
            "BACKUP_STATE": str(self.folder),
            "BACKUP_CONFIG": str(self.folder / "backup.toml"),
            "BACKUP_STORE": str(self.folder / "store"),
            "BACKUP_SYSTEM": str(self.folder / "system"),
            "BACKUP_BROKER_PORT": str(self.broker_port),
            "BACKUP_FLOWER_PORT": str(self.flower_port),
        }

    def deploy(self, *words: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/deploy and expect an exit status."""
        done = subprocess.run(
            [REPOSITORY / "scripts" / "deploy", *words],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def cli(self, *words: str) -> Any:
        """Run ``ai-micro-backup`` in the control worker's container and return what it printed."""
        return json.loads(self.deploy("compose", "exec", "-T", "control", "ai-micro-backup", *words).stdout)

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text().strip()

    def containers(self, client: docker.DockerClient) -> dict[str, Any]:
        """Return the containers there are of it, by service."""
        label = f"com.docker.compose.project={self.project}"
        found = client.containers.list(all=True, filters={"label": label})
        return {container.labels["com.docker.compose.service"]: container for container in found}

    def flower(self, path: str, login: str | None = None) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.flower_port}{path}")
        if login:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code


@pytest.fixture(scope="module")
def deployment(
    docker_client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """A running deployment, and a container that it can back up."""
    if shutil.which("docker") is None:
        pytest.skip("no docker command here; as root on Debian, `compose/engine.sh start` installs it")
    folder = tmp_path_factory.mktemp("deployment")
    project = f"deploy-{secrets.token_hex(4)}"
    deployment = Deployment(folder, project, free_port(), free_port())
    (folder / "system").mkdir()
    (folder / "system" / ".env").write_text("LEVEL=info\n")
    text = SETTINGS.format(
        container=f"{project}-notes", system=folder / "system", broker_port=deployment.broker_port
    )
    (folder / "backup.toml").write_text(text)
    fill = "mkdir -p /srv/notes && echo hello >/srv/notes/one && exec sleep infinity"
    try:
        deployment.deploy("up")
        docker_client.containers.run(
            "debian:trixie-slim", ["sh", "-c", fill], name=f"{project}-notes", detach=True, init=True
        )
        yield deployment
    finally:
        deployment.deploy("down", "--volumes")
        for container in docker_client.containers.list(all=True, filters={"name": f"{project}-notes"}):
            container.remove(force=True)
        for kind in ("worker", "broker"):
            docker_client.images.remove(f"ai-micro-backup/{kind}:{project}")


def test_every_service_is_healthy(deployment: Deployment, docker_client: docker.DockerClient) -> None:
    containers = deployment.containers(docker_client)
    assert set(containers) == SERVICES
    health = {name: container.attrs["State"]["Health"]["Status"] for name, container in containers.items()}
    assert set(health.values()) == {"healthy"}, health
    assert "5 of 5" in deployment.deploy("status").stderr
    policies = {container.attrs["HostConfig"]["RestartPolicy"]["Name"] for container in containers.values()}
    assert policies == {"unless-stopped"}
    for container in containers.values():
        assert container.attrs["HostConfig"]["LogConfig"]["Config"]["max-size"] == "10m"


def test_workers_answer_and_a_backup_completes(deployment: Deployment) -> None:
    status = deployment.cli("status", "--json")
    assert (status["control"], status["hosts"]) == (True, {"main": True})
    run = deployment.cli("backup", "--json")
    assert run["state"] == "complete", run["cause"]
    archive = deployment.folder / "store" / run["archive"]
    listing = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    assert {"metadata.json", "notes.tar.zst", "config.tar.zst"} <= {
        line.rpartition("/")[2] for line in listing.splitlines()
    }
    assert deployment.cli("list", "--json")[0]["archive"] == run["archive"]


def test_flower_asks_for_the_login_that_was_made(deployment: Deployment) -> None:
    assert deployment.flower("/tasks") == 401
    assert deployment.flower("/tasks", login="admin:") == 401
    assert deployment.flower("/tasks", login=deployment.secret("flower_users")) == 200


def test_the_broker_refuses_whoever_has_no_password(deployment: Deployment) -> None:
    with (
        redis.Redis("127.0.0.1", deployment.broker_port) as nobody,
        pytest.raises(redis.AuthenticationError),
    ):
        nobody.ping()
    with redis.Redis(
        "127.0.0.1", deployment.broker_port, password=deployment.secret("broker_password")
    ) as known:
        assert known.ping()
        assert known.config_get("appendonly") == {"appendonly": "yes"}


def test_ports_are_published_on_the_loopback_address_only(
    deployment: Deployment, docker_client: docker.DockerClient
) -> None:
    bindings = {
        (service, binding["HostIp"], int(binding["HostPort"]))
        for service, container in deployment.containers(docker_client).items()
        for published in container.attrs["HostConfig"]["PortBindings"].values()
        for binding in published
    }
    assert bindings == {
        ("broker", "127.0.0.1", deployment.broker_port),
        ("flower", "127.0.0.1", deployment.flower_port),
    }


def test_secrets_are_files_of_their_owner_and_nowhere_else(
    deployment: Deployment, docker_client: docker.DockerClient
) -> None:
    names = ("broker_password", "flower_users")
    values = [deployment.secret(name).rpartition(":")[2] for name in names]
    assert all(len(value) >= 32 for value in values)
    for name in names:
        mode = (deployment.folder / "secrets" / name).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
    said = [(deployment.folder / log).read_text() for log in ("build.log", "up.log")]
    for container in deployment.containers(docker_client).values():
        said.append(container.logs().decode(errors="replace"))
        said.append(json.dumps(container.attrs))
        said.append(json.dumps(container.top()["Processes"]))
    for text in said:
        assert not any(value in text for value in values)


def test_only_the_host_worker_has_the_docker_socket_and_the_rights_of_root(
    deployment: Deployment, docker_client: docker.DockerClient
) -> None:
    for service, container in deployment.containers(docker_client).items():
        host = container.attrs["HostConfig"]
        mounted = {mount["Source"] for mount in container.attrs["Mounts"]}
        assert ("/var/run/docker.sock" in mounted) == (service == "host"), service
        if service in ("control", "beat", "flower"):
            assert host["ReadonlyRootfs"]
            added = [name.removeprefix("CAP_") for name in host["CapAdd"]]
            assert (host["CapDrop"], added) == (["ALL"], ["DAC_OVERRIDE"])


def test_wrong_settings_are_reported_at_once_and_nothing_is_started(
    deployment: Deployment, tmp_path: Path, docker_client: docker.DockerClient
) -> None:
    wrong = tmp_path / "backup.toml"
    text = (deployment.folder / "backup.toml").read_text()
    wrong.write_text(
        text.replace("watchdog_seconds", "watchdog_minutes")
        .replace('"main"]', '"other"]')
        .replace("[store]", '[components.cache]\nkind = "redis"\nhost = "other"\n[store]')
    )
    before = {name: container.id for name, container in deployment.containers(docker_client).items()}
    done = deployment.deploy("up", status=2, BACKUP_CONFIG=str(wrong))
    assert "schedule.watchdog_minutes" in done.stderr
    assert "components.notes.host" in done.stderr
    after = {name: container.id for name, container in deployment.containers(docker_client).items()}
    assert after == before


def test_it_can_be_started_again_and_keeps_its_secrets_and_catalogue(deployment: Deployment) -> None:
    before = deployment.secret("broker_password"), deployment.cli("list", "--json")
    deployment.deploy("down")
    done = deployment.deploy("up")
    assert (deployment.secret("broker_password"), deployment.cli("list", "--json")) == before
    where = f"http://127.0.0.1:{deployment.flower_port}"
    assert where in done.stderr
    assert str(deployment.folder / "secrets" / "flower_users") in done.stderr
    for name in ("broker_password", "flower_users"):
        assert deployment.secret(name).rpartition(":")[2] not in done.stderr + done.stdout


def test_down_leaves_no_container_and_no_network(
    deployment: Deployment, docker_client: docker.DockerClient
) -> None:
    deployment.deploy("down")
    assert deployment.containers(docker_client) == {}
    label = {"label": f"com.docker.compose.project={deployment.project}"}
    assert docker_client.networks.list(filters=label) == []
    assert len(docker_client.volumes.list(filters=label)) == 3
    deployment.deploy("status", status=1)
    deployment.deploy("down", "--volumes")
    assert docker_client.volumes.list(filters=label) == []


def test_without_an_engine_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [REPOSITORY / "scripts" / "deploy", "up"],
        env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock", "BACKUP_STATE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "no Docker engine answers" in done.stderr
    assert "compose/engine.sh start" in done.stderr or "install Docker Engine" in done.stderr
