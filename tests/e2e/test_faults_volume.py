"""Much data and little room: memory stays flat, a full store fails the run and nothing more. And two beats at once."""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from compose.demo.embedded_daemon import wait_until
from tests.e2e.conftest import Factory
from tests.systems import System, name_of, processes_with

MEGABYTE = 1_000_000
SMALL, LARGE = 100, 1000
"""MB of real bytes that are moved."""
ROOM = 4 * MEGABYTE
FULL_AT = {"parts": "uploads", "components": "archive"}
"""The step that writes to a folder of the store."""


@dataclass(frozen=True)
class Volume:
    """A system with one tree of files and one of configuration, and two beats that send the latter every minute."""

    system: System
    uploads: Path

    @property
    def image(self) -> Path:
        return self.uploads / "image"

    def write(self, megabytes: int) -> None:
        """Fill the image with bytes that do not compress and do not repeat."""
        with self.image.open("wb") as file:
            for _ in range(megabytes // 10):
                file.write(secrets.token_bytes(10 * MEGABYTE))

    def peaks(self) -> dict[int, float]:
        """Return the most memory that each worker process ever had, in MB."""
        found = {}
        for pid in processes_with(f"AI_MICRO_BACKUP_CONFIG={self.system.cluster.config}"):
            status = Path(f"/proc/{pid}/status").read_text()
            if name_of(pid) == "celery" and "VmHWM" in status:
                found[pid] = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MEGABYTE
        return found


@pytest.fixture(scope="module")
def volume(cluster_factory: Factory, tmp_path_factory: pytest.TempPathFactory) -> Volume:
    folder = tmp_path_factory.mktemp("volume")
    (folder / "uploads").mkdir()
    (folder / "etc").mkdir()
    (folder / "etc" / "app.toml").write_text("answer = 42")
    components = f"""
[components.uploads]
kind = "files"
host = "app1"
path = "{folder / "uploads"}"

[components.etc]
kind = "files"
host = "db1"
path = "{folder / "etc"}"
"""
    system = cluster_factory(
        components, limits={"component": 300}, schedule='components = { etc = "* * * * *" }'
    )
    second = ["celery", "-A", "beat_schedule", "beat", "--schedule", str(system.folder / "second-schedule")]
    system.cluster.start("second-beat", [*second, "--loglevel", "INFO"], ready="beat: Starting")
    return Volume(system, folder / "uploads")


def test_memory_stays_flat_whatever_the_size(volume: Volume) -> None:
    peaks = []
    for megabytes in (SMALL, LARGE):
        volume.write(megabytes)
        run = volume.system.ended(volume.system.backup("uploads"), within=300)
        assert run["state"] == "complete", run
        restore = volume.system.call(
            "tasks.restore.restore_component", run["archive"], "uploads", confirm="uploads"
        )
        done = volume.system.ended(restore, within=300)
        assert done["state"] == "complete", done
        assert volume.image.stat().st_size == megabytes * MEGABYTE
        (volume.system.store / run["archive"]).unlink()
        peaks.append(max(volume.peaks().values()))
    volume.image.unlink()

    small, large = peaks
    print(f"peak memory of a worker process: {small:.0f} MB for {SMALL} MB, {large:.0f} MB for {LARGE} MB")
    assert max(peaks) < 250, peaks
    assert large < small + 60, f"{small:.0f} MB for {SMALL} MB, {large:.0f} MB for {LARGE} MB"


@contextmanager
def little_room(system: System, below: str) -> Iterator[str]:
    """Let what the workers write to a folder of the store find no room: a small file system, or where this user
    may not mount one, a limit on the size of all files. Yields the folder that is the first to be full."""
    folder = system.store / below
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield below
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    pids = processes_with(f"AI_MICRO_BACKUP_CONFIG={system.cluster.config}")
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield "parts"
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("below", ["parts", "components"])
def test_a_full_store_fails_the_run_and_commits_nothing(volume: Volume, below: str) -> None:
    system = volume.system
    volume.write(20)
    with little_room(system, below) as full:
        run_id = system.backup("uploads")
        run = system.ended(run_id, within=60)
        left = {path.name: size for path, size in system.unfinished().items()}
        committed = [name for name in system.objects(below) if run_id in name]

    assert (run["state"], run["archive"]) == ("failed", None)
    assert run["cause"].startswith(f"{FULL_AT[full]}: the store failed at {full}/")
    assert run["cause"].endswith(("No space left on device", "File too large"))
    assert left == {}
    assert committed == []
    run = system.complete("uploads")
    assert wait_until(lambda: not [name for name in system.objects("parts") if "uploads" in name], timeout=10)
    volume.image.unlink()


def test_two_beats_start_a_scheduled_run_once(volume: Volume) -> None:
    def done(log: str, what: str) -> int:
        return sum(what in line for line in volume.system.log(log).splitlines())

    def both_served() -> bool:
        sent = [done(name, "Sending due task etc") for name in ("beat", "second-beat")]
        taken = done("control", "Task scheduled etc[")
        return min(sent) > 0 and taken == 2 * sum(sent)  # received, and succeeded or raised

    assert wait_until(both_served, timeout=70)
    runs = volume.system.query("SELECT id, scheduled_at FROM run WHERE job = 'etc' ORDER BY id")
    minutes = [scheduled_at for _, scheduled_at in runs]
    assert len(minutes) == len(set(minutes)) == done("beat", "Sending due task etc"), minutes
    states = {
        (run["state"], (run["cause"] or "")[:11])
        for run in (volume.system.ended(run_id) for run_id, _ in runs)
    }
    assert states <= {("complete", ""), ("failed", "the restore")}, states
