"""A place to run programs for the runtime contract: this host, a Debian container, a stopped one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import docker
import pytest
from docker.models.containers import Container

from workers.runtime import Runtime
from workers.runtime.docker import DockerRuntime
from workers.runtime.process import ProcessRuntime

IMAGE = os.environ.get("TEST_IMAGE", "debian:trixie-slim")


@dataclass
class Place:
    """A runtime, a folder that it reaches, and a look at what runs there."""

    runtime: Runtime
    component: str
    folder: PurePosixPath
    container: Container | None

    def running(self, text: str) -> list[str]:
        """Return the command lines there that contain ``text``, seen from outside of the runtime."""
        if self.container is not None:
            self.container.reload()
            if self.container.status != "running":
                return []
            lines = self.container.top()["Processes"]
            return [line[-1] for line in lines or [] if text in line[-1]]
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line and file.parent.name != str(os.getpid()):
                found.append(line)
        return found


@pytest.fixture(scope="session")
def busybox_image(
    docker_client: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An image with busybox and nothing else, from this host's."""
    program = shutil.which("busybox")
    if program is None:
        pytest.skip("no busybox on this host (Debian: apt-get install busybox)")
    root = tmp_path_factory.mktemp("busybox")
    (root / "bin").mkdir()
    (root / "tmp").mkdir()
    shutil.copy(program, root / "bin/busybox")
    for applet in subprocess.check_output([program, "--list"], text=True).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"(/\S+) \(0x", linked):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])
    archive = subprocess.check_output(["tar", "-C", str(root), "-c", "."])
    name = f"contract-busybox-{secrets.token_hex(4)}"
    docker_client.api.import_image_from_data(archive, repository=name)
    yield name
    docker_client.images.remove(name, force=True)


@pytest.fixture(
    params=[
        "process",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("busybox", marks=pytest.mark.docker),
        pytest.param("stopped", marks=pytest.mark.docker),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    component = f"contract-{secrets.token_hex(4)}"
    if request.param == "process":
        yield Place(ProcessRuntime(component=component), component, PurePosixPath(tmp_path), None)
        return
    client: docker.DockerClient = request.getfixturevalue("docker_client")
    image = request.getfixturevalue("busybox_image") if request.param == "busybox" else IMAGE
    container = client.containers.run(
        image,
        ["sleep", "100000"],
        detach=True,
        name=component,
        network_mode="none",
        volumes={f"{component}-data": {"bind": "/data", "mode": "rw"}},
        stop_signal="KILL",
    )
    if request.param == "stopped":
        container.stop(timeout=1)
    yield Place(DockerRuntime(component, component=component), component, PurePosixPath("/data"), container)
    helpers = client.containers.list(all=True, filters={"label": f"ai-micro-backup.component={component}"})
    for left in [*helpers, container]:
        left.remove(force=True)
    client.volumes.get(f"{component}-data").remove()
    assert not helpers, "a helper container was left behind"
