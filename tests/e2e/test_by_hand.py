"""RESTORE.md followed to the letter, with public tools and new servers, gives the data back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compose.demo.embedded import postgres_bin_dir
from tests.rehearsal import Rehearsal, rehearsal
from tests.systems import System

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(
    cluster_factory: Callable[..., System], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rehearsal]:
    with rehearsal(cluster_factory, tmp_path_factory.mktemp("by-hand")) as found:
        yield found


def blocks(text: str) -> dict[str, str]:
    """The commands of RESTORE.md by their heading."""
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = {
        section.partition("\n")[0]: "".join(
            re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        )
        for section in sections
    }
    assert all(found.values()), found
    return found


def lose_everything(scene: Rehearsal) -> None:
    """Only the archive is left; then new, empty servers at the same addresses, as a person would set them up."""
    demo = scene.demo
    for host in ("control", "db1", "app1", "beat"):
        scene.cluster.kill(host)
    demo.down()
    for folder in (demo.postgres.data_dir, demo.redis.data_dir, demo.uploads, demo.keys, demo.config_root):
        shutil.rmtree(folder)
    demo.config_root.mkdir()
    demo.postgres.start()
    demo.redis.start()


def follow(script: str, scene: Rehearsal, folder: Path) -> str:
    """Run commands as they stand, in ``folder``; a placeholder that is left is an error of the shell."""
    done = subprocess.run(
        ["sh", "-euc", script],
        cwd=folder,
        env={
            "PATH": f"{postgres_bin_dir()}:{os.environ['PATH']}",
            "PGPASSWORD": scene.demo.passwords.postgres_password,
            "REDISCLI_AUTH": scene.demo.passwords.redis_password,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_restore_by_hand(scene: Rehearsal, tmp_path: Path) -> None:
    archive = tmp_path / scene.archive
    shutil.copyfile(scene.system.store / "full_system" / scene.archive, archive)
    with tarfile.open(archive) as tar:
        [guide] = [member for member in tar if member.name.endswith("/RESTORE.md")]
        text = tar.extractfile(guide).read().decode()  # type: ignore[union-attr]  # a file, as its name says
    commands = blocks(text)
    lose_everything(scene)
    assert len(scene.differences()) > 50

    opening = commands.pop("Open and check").replace("<archive>", str(archive).removesuffix(".tar.gz"))
    said = follow(opening, scene, tmp_path)
    assert said.count(": OK\n") == 8
    folder = tmp_path / archive.name.removeprefix("full_backup_").removesuffix(".tar.gz")
    assert list(commands) == [
        "postgres (on db1)",
        "redis (on db1)",
        "uploads (on app1)",
        "auth-keys (on app1)",
        "config (on app1)",
    ]
    for heading, script in commands.items():
        if heading.startswith("redis"):
            scene.demo.redis.stop()
        follow(script, scene, folder)
        if heading.startswith("redis"):
            scene.demo.redis.start()

    assert scene.differences() == []
    for service in reversed(scene.demo.services.values()):
        service.start()
    scene.demo.wait_healthy()
