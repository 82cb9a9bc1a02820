"""Encrypted archives that real workers prove, level by level, and what they say of one that was damaged."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from pyrage import x25519

from tests.systems import System, wait_until

SECRET = "planted-and-never-seen-in-the-store"
SETTINGS = """
[components.uploads]
kind = "files"
host = "app1"
path = "{uploads}"

[encryption]
recipients = ["{recipient}"]
identities = [{{ file = "{identity}" }}]
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], folder: Path) -> System:
    identity = x25519.Identity.generate()
    (folder / "key").write_text(f"{identity}\n")
    (folder / "key").chmod(0o600)
    (folder / "uploads").mkdir()
    (folder / "uploads" / "document").write_text(SECRET * 100)
    settings = SETTINGS.format(
        uploads=folder / "uploads", recipient=identity.to_public(), identity=folder / "key"
    )
    return cluster_factory(settings, workers=("control", "app1"), beat=False)


def test_an_encrypted_archive_is_proven_by_restoring_it_and_damage_is_loud(system: System) -> None:
    archive = Path(system.complete()["archive"])
    assert archive.name.endswith(".tar.gz.age")
    stored = [system.store / name for name in system.objects()]
    assert len(stored) == 2
    assert not [path for path in stored if SECRET.encode() in path.read_bytes()]

    run = system.cli("verify", "--level", "restore")
    assert run["state"] == "complete", run
    ledger = "SELECT level, ok FROM verification ORDER BY id"
    levels = [(level, 1) for level in ("exists", "checksum", "structure", "restore")]
    assert system.query(ledger) == levels
    # No worker of db1 runs, and `status` says so by its own status.
    assert system.cli("status", status=5)["proven"]["restored"]["archive"] == str(archive)
    assert system.cli("show", archive.name)["proof"]["level"] == "restore"

    content = bytearray((system.store / archive).read_bytes())
    content[len(content) // 2] ^= 1
    (system.store / archive).chmod(0o600)
    (system.store / archive).write_bytes(content)
    run = system.cli("verify", archive.name, "--level", "structure", status=1)
    assert (run["state"], run["cause"].split(":")[0]) == ("failed", "checksum"), run
    assert system.query(ledger)[len(levels) :] == [("exists", 1), ("checksum", 0)]
    proven = system.cli("status", status=5)["proven"]
    assert [one["archive"] for one in proven["damaged"]] == [str(archive)]
    assert proven["restored"] is None


def test_a_restore_waits_for_no_rehearsal(system: System, folder: Path) -> None:
    """One that never ends; it holds the lease of what is to be restored."""
    (folder / "uploads" / "noise").write_bytes(os.urandom(48 << 20))
    name = Path(system.complete()["archive"]).name
    rehearsal = system.call("tasks.verify.verify_archive", name, level="restore")
    deadline = time.monotonic() + 60
    while not (
        system.query("SELECT phase FROM run WHERE id = ?", rehearsal) == [("restore",)] and _stopped(system)
    ):
        assert time.monotonic() < deadline, "the rehearsal was over before it could be stopped"
    (folder / "uploads" / "document").write_text("lost")

    run = system.cli("restore", name, "--component", "uploads", "--confirm", "uploads")

    assert run["state"] == "complete", run
    assert (folder / "uploads" / "document").read_text() == SECRET * 100
    ended = system.cli("show", rehearsal)
    assert ended["state"] == "failed"
    assert ended["cause"] == f"restore was not ended: it gave way to the restore {run['id']}"
    levels = system.query("SELECT level FROM verification WHERE run_id = ?", rehearsal)
    assert levels == [("exists",), ("checksum",), ("structure",)]
    assert wait_until(lambda: not system.children("uploads"), timeout=30)


def _stopped(system: System) -> bool:
    """Stop a program that works for the component, if there is one."""
    for pid in system.children("uploads"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            return True
    return False
