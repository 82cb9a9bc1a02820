"""One fault at every storage call of every kind of run: loud, harmless, and the next run converges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.conftest import Served
from workers.settings import CONFIG_VARIABLE

ROOT = Path(__file__).parents[2]
STAGES = {"backup", "copy", "restore", "restore_from_offsite", "verify"}
STAGES |= {"rebuild", "take_in", "delete", "prune"}

SETTINGS = """
hosts = ["main"]
[system]
name = "shop"
[components.note]
kind = "note"
host = "main"
path = "{folder}/live/note.txt"
[store]
path = "{folder}/store"
[offsite]
what = ["full", "wal"]
[offsite.store]
path = "{folder}/offsite"
[catalog]
url = "sqlite:///{folder}/catalog.sqlite"
[broker]
port = {port}
password = {{ env = "BROKER_PASSWORD" }}
[retention]
full_system = {{ last = 1 }}
wal_days = 1e-9
[offsite.retention]
full_system = {{ last = 1 }}
[limits]
attempts = 1 # each fault is seen, not tried again at once
"""


def test_one_fault_at_any_storage_call_is_loud_or_harmless_and_the_next_run_converges(
    tmp_path: Path, redis_server: Served
) -> None:
    (tmp_path / "live").mkdir()
    path = tmp_path / "backup.toml"
    path.write_text(SETTINGS.format(folder=tmp_path, port=redis_server.port))
    environment = {**os.environ, CONFIG_VARIABLE: str(path), "BROKER_PASSWORD": redis_server.password}
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage_faults"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if line["wrong"]] == []
    assert all(line["outcome"] == "complete" for line in lines if line["kind"] == "none")
    turns = Counter(line["stage"] for line in lines)
    assert turns.keys() == STAGES
    assert min(turns.values()) > 5, "the faults were not where the calls are"
    loud = [line for line in lines if line["outcome"].startswith(("failed: ", "raised "))]
    assert len(loud) > len(lines) / 2
