"""A restore queued from the Python shell, with the two lines that the documents promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.systems import System, wait_until

COMPONENTS = """
[components.uploads]
kind = "files"
host = "app1"
path = "{path}"
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shell") / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], uploads: Path) -> System:
    return cluster_factory(COMPONENTS.format(path=uploads), workers=("control", "app1"), beat=False)


def shell(system: System, *lines: str) -> str:
    """Type ``lines`` into the shell of `make shell` and return all that it says."""
    celery = Path(sys.executable).parent / "celery"
    done = subprocess.run(
        [celery, "-A", "workers", "shell", "--python"],
        cwd=system.folder,
        env=system.cluster.environment,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_promised_lines_restore(system: System, uploads: Path) -> None:
    (uploads / "document").write_text("as it was")
    archive = Path(system.complete()["archive"]).name.removesuffix(".tar.gz")
    assert archive.startswith("full_backup_")
    (uploads / "document").write_text("damaged")
    said = shell(
        system,
        "from tasks.restore import restore_full_system; "
        f'restore_full_system.delay("{archive}", confirm="ai-micro-service")',
    )
    assert "<AsyncResult: " in said
    restores = "SELECT id FROM run WHERE kind = 'RESTORE'"
    assert wait_until(lambda: bool(system.query(restores)), timeout=30), system.log("control")
    assert system.ended(system.query(restores)[-1][0])["state"] == "complete"
    assert (uploads / "document").read_text() == "as it was"


def test_without_confirm_the_shell_is_told_what_would_happen(system: System, uploads: Path) -> None:
    (uploads / "document").write_text("as it was")
    archive = Path(system.complete()["archive"]).name
    (uploads / "document").write_text("newer")
    said = shell(
        system,
        "from tasks.restore import restore_full_system",
        f'restore_full_system.delay("{archive}").get(timeout=30)',
    )
    assert "NotConfirmed: this would overwrite uploads of ai-micro-service" in said
    assert "confirm='ai-micro-service'" in said
    assert (uploads / "document").read_text() == "newer"
