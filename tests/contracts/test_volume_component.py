"""A named volume as a component: backed up and restored without a container that has it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import NotFound

from tasks.components.files import Component
from tests.contracts.conftest import IMAGE
from tests.contracts.test_tree_contract import EVERY
from tests.trees import backed_up, leftovers, look, make, restoring
from workers.errors import Permanent
from workers.runtime import sweep

pytestmark = pytest.mark.docker


@pytest.fixture
def volume(docker_client: docker.DockerClient) -> Iterator[str]:
    """The name of a volume that is not there yet."""
    name = f"volume-{secrets.token_hex(4)}"
    yield name
    filters: dict[str, Any] = {"volume": name}
    helpers = docker_client.containers.list(all=True, filters=filters)
    for left in helpers:
        left.remove(force=True)
    docker_client.volumes.get(name).remove()
    assert not helpers, "a helper container was left behind"


def component(volume: str, **more: Any) -> Component:
    values = {"name": f"data-{os.getpid()}", "kind": "files", "host": "h", "volume": volume, **more}
    return Component.model_validate(values)


def test_a_volume_without_a_container_comes_back(docker_client: docker.DockerClient, volume: str) -> None:
    it = component(volume, image=IMAGE)
    sweep(it.runtime, it.name)
    with pytest.raises(Permanent, match=f"there is no volume {volume}"):
        it.sources()
    assert volume in it.preflight()[0].what
    here = Path(docker_client.volumes.create(volume).attrs["Mountpoint"])
    make(os.fsencode(here), EVERY)
    before = look(here, attributes=True)
    part, plain = backed_up(it)
    assert part.holds["base"] == volume
    assert f"--volume {volume}:/volumes/{volume} <image" in it.by_hand([part])

    (here / "later").touch()
    live = look(here)
    del live[b"."]
    beside = restoring(part, plain, into="/a look")
    it.stage(beside)
    it.swap(beside)
    assert look(here / "a look" / volume, attributes=True) == before
    it.revert(beside)
    assert {name: found for name, found in look(here).items() if name != b"."} == live

    docker_client.volumes.get(volume).remove()
    restore = restoring(part, plain)
    it.revert(restore)
    it.stage(restore)
    it.revert(restore)
    with pytest.raises(NotFound):
        docker_client.volumes.get(volume)
    for step in (it.stage, it.swap, it.settle):
        step(restore)
    assert look(here, attributes=True) == before
    assert leftovers(here) == []


def test_the_image_of_the_helper_is_that_of_a_container_that_has_it(
    docker_client: docker.DockerClient, volume: str
) -> None:
    here = Path(docker_client.volumes.create(volume).attrs["Mountpoint"])
    (here / "file").write_text("kept")
    with pytest.raises(Permanent, match='image = "debian:trixie-slim"'):
        component(volume).sources()
    with pytest.raises(Permanent, match="the image no-such-image:1"):
        component(volume, image="no-such-image:1").sources()
    stopped = docker_client.containers.create(IMAGE, ["true"], volumes={volume: {"bind": "/srv"}})
    try:
        part, _ = backed_up(component(volume))
    finally:
        stopped.remove()
    assert part.holds["files"] == 1


@pytest.mark.parametrize("more", [{"path": "/x"}, {"container": "web"}, {"volume": "../x"}])
def test_a_volume_is_named_alone(more: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="volume"):
        component(**{"volume": "data", **more})
    with pytest.raises(ValueError, match="image is for"):
        Component.model_validate({"name": "u", "kind": "files", "host": "h", "path": "/x", "image": "y"})
