"""The demo as people start it: it passes on either runtime, leaves nothing behind, and fails when data differs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import docker
import psycopg
import pytest

from compose.demo import __main__ as demo
from compose.demo.cluster import REPOSITORY
from compose.demo.docker_system import DockerSystem
from compose.demo.embedded_system import EmbeddedSystem
from tests.systems import name_of, processes_with, wait_until

SIZE = "3"
SECONDS = 300


def environment(folder: Path, runtime: str, prefix: str = "") -> dict[str, str]:
    return {"RUNTIME": runtime, "SIZE": SIZE, "KEEP": "", "DEMO_FOLDER": str(folder), "DEMO_PREFIX": prefix}


def run_demo(folder: Path, runtime: str, prefix: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compose.demo"],
        cwd=REPOSITORY,
        env=os.environ | environment(folder, runtime, prefix),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def left_running(folder: Path) -> dict[int, str]:
    """The processes that were started by the demo in ``folder``, or name it on their command line."""
    found = processes_with(f"DEMO_FOLDER={folder}")
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return {pid: name_of(pid) for pid in found if name_of(pid)}


def check_passed(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["demo: PASS"], done.stdout + done.stderr
    assert done.returncode == 0
    assert "Flower: http://127.0.0.1:" in done.stdout
    assert "0 difference(s); every service healthy" in done.stdout
    said = " ".join(done.stdout.split())
    assert re.search(r"recovered to \S+ in \S+ s; 0 difference\(s\)", said), done.stdout
    archives = list(folder.rglob("full_backup_*.tar.gz"))
    assert len(archives) == 1
    assert archives[0].name in done.stdout.replace("\n", "")
    assert wait_until(lambda: not left_running(folder), timeout=10), left_running(folder)


def test_the_demo_passes_and_leaves_nothing_running() -> None:
    # The recovering server runs as the data folder's owner, who may not enter this process's own folders.
    with tempfile.TemporaryDirectory(prefix="ai-micro-backup-demo-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        check_passed(run_demo(folder, "process"), folder)


@pytest.mark.docker
def test_the_demo_in_containers_passes_and_leaves_nothing(
    tmp_path: Path, docker_client: docker.DockerClient
) -> None:
    prefix = f"t{os.getpid()}-demo-"
    try:
        check_passed(run_demo(tmp_path, "docker", prefix), tmp_path)
        assert DockerSystem(tmp_path, prefix=prefix).leftovers() == []
    finally:
        DockerSystem(tmp_path, prefix=prefix).down()


class Tampering(EmbeddedSystem):
    """A system in which, after the restore, one row and one file are not what they were."""

    waited = 0

    def wait_healthy(self, *, timeout: float = 60.0) -> None:
        super().wait_healthy(timeout=timeout)
        self.waited += 1
        if self.waited == 2:
            with psycopg.connect(self.admin_dsn, dbname="authdb", autocommit=True) as connection:
                connection.execute("UPDATE users SET display_name = 'tampered' WHERE id = 1")
            (self.uploads / "added").write_text("tampered")


def test_the_demo_fails_when_what_was_restored_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(tmp_path, "process").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo, "EmbeddedSystem", Tampering)
    assert demo.main() == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "demo: FAIL"
    differs = [line for line in lines if line.startswith("differs: ")]
    assert [line.split(": was")[0].split(": new")[0] for line in differs] == [
        "differs: postgres: authdb: rows of public.users",
        "differs: files uploads: added",
    ]
    assert wait_until(lambda: not left_running(tmp_path), timeout=10), left_running(tmp_path)


def test_the_demo_says_which_runtimes_there_are() -> None:
    done = run_demo(Path("/nowhere"), "podman")
    assert done.returncode == 2
    assert "RUNTIME must be docker or process" in done.stdout
