"""What files and configuration promise wherever they are: on this host, in a container, in one without GNU tar."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from tasks.components import config, files
from tests.contracts.conftest import IMAGE
from tests.systems import processes_with
from tests.trees import ACL, TREES, backed_up, leftovers, look, make, restoring
from workers import streams
from workers.component import BaseComponent, Part, Restore
from workers.errors import BackupError, IntegrityError
from workers.runtime import MARKER, marker
from workers.storage.local import LocalStore

HERE = os.geteuid()
EVERY: tuple[Any, ...] = (
    "folder",
    {
        b"-rf new\nline \xff": ("file", b"kept" * 100, 0o640, 1_700_000_000_500_000_000, HERE),
        b"again": ("hard", 0),
        b"marked": (
            "marked",
            ("file", b"x", 0o600, 0, HERE),
            {"kind": b"new\nline = \0", "empty": b""},
            True,
        ),
        b"disk": ("sparse", 3_000_000, 0o600, 1, HERE),
        b"socket": ("special", stat.S_IFSOCK),
        b"fifo \xfe": ("special", stat.S_IFIFO),
        b"empty": ("folder", {}, 0o1777, 2, HERE),
        b"out": ("link", b"/nowhere/at/all"),
    },
    0o750,
    3_000_000_000,
    HERE,
)
"""A tree with one of each."""


@dataclass(frozen=True)
class Place:
    """Where trees are: the ``root`` that the component sees, and where that is on this host."""

    root: Path
    here: Path
    container: str | None = None
    has_tar: bool = True

    def component(self, kind: str) -> BaseComponent:
        values = {"name": f"contract-{os.getpid()}", "kind": kind, "host": "h", "container": self.container}
        if kind == "files":
            return files.Component.model_validate({**values, "path": str(self.root)})
        paths = ["listed", "gone.env"]
        return config.Component.model_validate({**values, "root": str(self.root), "paths": paths})

    def empty(self) -> None:
        subprocess.run(["setfacl", "-b", self.here], check=True)
        subprocess.run(["find", self.here, "-mindepth", "1", "-delete"], check=True)


@pytest.fixture(
    scope="module",
    params=[
        "process",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("busybox", marks=pytest.mark.docker),
    ],
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "process":
        root = tmp_path_factory.mktemp("contract") / "data"
        root.mkdir()
        yield Place(root, root)
        return
    client: docker.DockerClient = request.getfixturevalue("docker_client")
    image = request.getfixturevalue("busybox_image") if request.param == "busybox" else IMAGE
    name = f"contract-trees-{secrets.token_hex(4)}"
    volume = client.volumes.create(name)
    found = client.containers.run(
        image,
        ["sleep", "100000"],
        detach=True,
        name=name,
        network_mode="none",
        volumes={name: {"bind": "/data"}},
    )
    yield Place(Path("/data"), Path(volume.attrs["Mountpoint"]), name, request.param == "docker")
    found.remove(force=True)
    volume.remove()


def without_set_id(node: tuple[Any, ...]) -> tuple[Any, ...]:
    """Docker's own unpacking takes these bits from files with several names, and a restore fails by its comparison."""
    match node:
        case ("folder", children, *more):
            return ("folder", {name: without_set_id(child) for name, child in children.items()}, *more)
        case ("marked", file, *more):
            return ("marked", without_set_id(file), *more)
        case (kind, content, mode, mtime, owner):
            return (kind, content, mode & 0o777, mtime, owner)
    return node


def special_in(node: tuple[Any, ...]) -> int:
    return sum(map(special_in, node[1].values())) if node[0] == "folder" else node[0] == "special"


@pytest.mark.parametrize("kind", ["files", "config"])
@settings(
    max_examples=2,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[*HealthCheck],
)
@example(EVERY)
@given(TREES)
def test_what_comes_back_is_what_was_there(place: Place, kind: str, tree: tuple[Any, ...]) -> None:
    place.empty()
    make(os.fsencode(place.here / "listed"), tree if place.has_tar else without_set_id(tree))
    if place.has_tar:
        os.setxattr(place.here, "system.posix_acl_access", ACL)
    before = look(place.here, attributes=place.has_tar)
    part, plain = backed_up(place.component(kind))
    assert len(part.holds["skipped"]) == special_in(tree)
    place.component(kind).check(part, iter([plain]))
    place.empty()
    make(os.fsencode(place.here), ("folder", {b"listed": ("special", stat.S_IFIFO)}, 0o700, 0, HERE))
    (place.here / "gone.env").touch()
    restore = restoring(part, plain)
    for step in ("stage", "swap", "settle"):
        getattr(place.component(kind), step)(restore)
    special = ["find", str(place.here), "-type", "s", "-o", "-type", "p"]
    assert subprocess.run(special, check=True, capture_output=True).stdout == b""
    after = look(place.here, attributes=place.has_tar)
    if kind == "config":  # the folder that the listed ones are in is none of it
        del before[b"."], after[b"."]
    assert after == before
    assert leftovers(place.here) == []


@pytest.mark.parametrize("kind", ["files", "config"])
def test_nothing_half_is_stored_and_nothing_damaged_restored(place: Place, kind: str, tmp_path: Path) -> None:
    place.empty()
    make(os.fsencode(place.here / "listed"), EVERY)
    large = place.here / "listed" / "large"
    large.write_bytes(b"x" * 40_000_000)
    it, store = place.component(kind), LocalStore(tmp_path / "store")
    [source] = it.sources()

    def interrupted() -> Iterator[bytes]:
        size = 0
        while size < 6_000_000:  # it is in the large one then
            chunk = next(source.chunks)
            size += len(chunk)
            yield chunk
        if place.has_tar:
            for pid in processes_with(f"{MARKER}={marker(it.name)}"):
                os.kill(pid, signal.SIGKILL)
        else:
            os.truncate(large, 1_000_000)  # Docker's own archive ends with such a file
        yield from source.chunks

    with pytest.raises(BackupError):
        streams.write(store, "half", interrupted(), level=1)
    assert not list(store.list(""))
    assert "tree_sha256" not in source.holds

    [source] = it.sources()
    written = streams.write(store, "whole", source.chunks, level=1)
    part = backed_up(it)[0].model_copy(update={"holds": source.holds})
    (place.here / "listed" / "later").touch()
    live = look(place.here)
    stored = bytearray((tmp_path / "store/whole").read_bytes())
    stored[len(stored) // 2] ^= 1

    def read(_: Part) -> Iterator[bytes]:
        return streams.read([bytes(stored)], codec="zstd", written=written, name="whole")

    wanted = Restore("run", [part], read)
    for refused in (it.stage, it.rehearse, lambda restore: it.check(part, restore.read(part))):
        with pytest.raises(IntegrityError):
            refused(wanted)
    it.revert(wanted)
    assert look(place.here) == live
    assert leftovers(place.here) == []


@pytest.mark.parametrize(
    "place", ["process", pytest.param("docker", marks=pytest.mark.docker)], indirect=True, scope="module"
)
@pytest.mark.parametrize(
    ("change", "told"),
    [("shrink", "large: File shrank by"), ("grow", "large: file changed as we read it")],
)
def test_what_changes_while_it_is_read_is_named_and_not_fatal(place: Place, change: str, told: str) -> None:
    place.empty()
    large = place.here / "large"
    large.write_bytes(b"x" * 30_000_000)
    for number in range(5):
        (place.here / f"vanishing {number}").touch()
    [source] = place.component("files").sources()
    next(source.chunks)
    if change == "shrink":
        os.truncate(large, 5)
    else:
        with large.open("ab") as file:
            file.write(b"more")
    for number in range(5):
        (place.here / f"vanishing {number}").unlink()
    for _ in source.chunks:
        pass
    warnings = "\n".join(source.holds["warnings"])
    assert told in warnings
    for number in range(5):
        assert f"vanishing {number}: File removed before we read it" in warnings
