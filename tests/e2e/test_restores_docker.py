"""Restores of the system in containers: after the loss of its data, and on a machine where nothing is left of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from compose.demo.config_tree import Ports
from compose.demo.docker_system import DockerSystem
from compose.demo.fingerprint import Fingerprint, diff
from compose.demo.settings import REDIS_PASSWORD, docker_components
from tests.systems import System

pytestmark = [pytest.mark.docker, pytest.mark.slow]
SIZE = 3


@pytest.fixture(scope="module")
def demo(
    docker_client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DockerSystem]:
    folder = tmp_path_factory.mktemp("containers") / "system"
    with DockerSystem(folder, prefix=f"t{os.getpid()}-restore-", ports=Ports.free()) as system:
        system.seed(SIZE)
        system.wait_healthy()
        yield system


@pytest.fixture(scope="module")
def system(demo: DockerSystem, cluster_factory: Callable[..., System]) -> System:
    return cluster_factory(
        docker_components(demo),
        environment={REDIS_PASSWORD: demo.passwords.redis_password},
        schedule="config_watch_seconds = 3600",
        limits={"health": 60, "component": 240},
    )


@pytest.fixture(scope="module")
def before(demo: DockerSystem) -> Fingerprint:
    return demo.fingerprint()


@pytest.fixture(scope="module")
def archive(system: System, before: Fingerprint) -> str:
    return Path(system.complete()["archive"]).name


def restore(system: System, archive: str) -> list[str]:
    """Restore in full and return the phases that it had."""
    run_id = system.cli("restore", archive, "--confirm", "ai-micro-service", "--no-wait")["id"]
    run = system.ended(run_id, within=240)
    assert run["state"] == "complete", run
    return list(dict.fromkeys(step["phase"].partition(".")[0] for step in run["steps"]))


def test_lost_data_is_back(demo: DockerSystem, system: System, before: Fingerprint, archive: str) -> None:
    demo.destroy_data()
    assert len(diff(before, demo.fingerprint())) > 50
    phases = restore(system, archive)
    assert phases == ["inspect", "verify", "stage", "stop", "swap", "start", "health", "settle"]
    assert diff(before, demo.fingerprint()) == []
    demo.wait_healthy()


def test_on_a_new_machine_configuration_comes_first_and_makes_the_containers(
    demo: DockerSystem, system: System, before: Fingerprint, archive: str
) -> None:
    demo.down()
    shutil.rmtree(demo.root)
    demo.ensure_network()  # it is no project's own: the runbook makes it by hand, too
    phases = restore(system, archive)
    assert phases[:5] == ["inspect", "verify", "config", "recreate", "stage"]
    # The role that connects has the same password (the fingerprint logs in with it), but a salt of the new server's.
    differences = diff(before, demo.fingerprint())
    assert [line for line in differences if not line.startswith("postgres: role postgres: ")] == []
    demo.wait_healthy()
    assert set(demo.containers.values()) <= {
        item.removeprefix("container ") for item in demo.leftovers() if item.startswith("container ")
    }
