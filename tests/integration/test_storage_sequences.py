"""Random sequences of backups, copies, verifications, prunes, deletions, losses and rebuilds in two stores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Served
from tests.integration.test_storage_faults import SETTINGS
from workers.settings import CONFIG_VARIABLE

ROOT = Path(__file__).parents[2]


def test_whatever_happens_to_archives_the_stores_the_catalogue_and_the_ledger_agree(
    tmp_path: Path, redis_server: Served
) -> None:
    path = tmp_path / "backup.toml"
    path.write_text(SETTINGS.format(folder=tmp_path, port=redis_server.port))
    environment = {**os.environ, CONFIG_VARIABLE: str(path), "BROKER_PASSWORD": redis_server.password}
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage_sequences"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=None if os.environ.get("AI_MICRO_BACKUP_TEST_PROFILE") == "long" else 900,
    )

    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-6000:]
