"""Retention, deletion and the rebuild of the catalogue through workers and the command line."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from tests.systems import System

COMPONENTS = """
[components.keys]
kind = "files"
host = "app1"
path = "{path}"

[retention]
full_system = {{ last = 1 }}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keeping") / "keys"
    folder.mkdir()
    (folder / "key").write_text("key")
    return folder


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], keys: Path) -> System:
    return cluster_factory(COMPONENTS.format(path=keys), workers=("control", "app1"), beat=False)


def archives(system: System) -> list[str]:
    return [row["archive"] for row in system.cli("list", "--json")]


def exit_status(system: System, *words: str) -> int:
    return system.cluster.run("ai-micro-backup", *words, timeout=60).returncode


def test_what_retention_does_not_keep_is_shown_then_deleted(system: System) -> None:
    made = [system.complete()["archive"] for _ in range(3)]

    foreseen = system.cli("prune", "--dry-run", "--json")
    assert {row["archive"]: row["keep"] for row in foreseen} == dict(
        zip(made, (False, False, True), strict=True)
    )
    assert foreseen[0]["reason"] == "the newest of keys"
    assert foreseen[1]["reason"] == "no rule keeps it: retention.full_system keeps 1 last"
    assert len(archives(system)) == 3, "a dry run deletes nothing"

    done = system.cli("prune", "--json")
    assert (done["kind"], done["state"]) == ("prune", "complete")
    assert done["outcome"]["store"]["dropped"] == [made[1], made[0]]
    assert archives(system) == [made[2]]
    assert sorted(system.objects("full_system")) == sorted(
        [made[2], made[2].replace(".tar.gz", ".metadata.json")]
    )


def test_a_lost_catalogue_is_made_anew_and_an_archive_deleted_by_hand(system: System) -> None:
    kept = system.complete()["archive"]
    listed = system.cli("list", "--json")
    system.cli("rebuild", "--json")
    assert system.cli("list", "--json") == listed
    record = Path(system.store) / kept.replace(".tar.gz", ".metadata.json")
    record.unlink()
    noted = system.cli("rebuild", "--json")["outcome"]["store"]
    assert (noted["added"], noted["changed"], noted["gone"]) == ([], [], [])
    assert f"{kept}: has no readable record" in noted["notes"][0]

    name = PurePosixPath(kept).name
    assert exit_status(system, "delete", name) == 3
    assert exit_status(system, "delete", name, "--confirm", "another") == 3
    assert exit_status(system, "delete", "latest", "--confirm", "latest") != 0
    assert kept in archives(system)
    system.cli("delete", name, "--confirm", name)
    assert kept not in archives(system)
    assert not (Path(system.store) / kept).exists()
    assert exit_status(system, "delete", name, "--confirm", name) == 4


def test_an_archive_of_the_runbook_is_imported_shown_and_restored(
    system: System, keys: Path, tmp_path: Path
) -> None:
    (tmp_path / "20250930/auth-keys").mkdir(parents=True)
    (tmp_path / "20250930/auth-keys/key").write_text("of 2025")
    (tmp_path / "20250930/auth-keys/large").write_bytes(random.randbytes(2000))  # an archive has 1,000 bytes
    name = "files/files_backup_20250930_020000.tar.gz"
    (system.store / "files").mkdir()
    tar = ["tar", "-czf", str(system.store / name), "20250930"]
    subprocess.run(tar, cwd=tmp_path, check=True)

    done = system.cli("import", "files/")["outcome"]["store"]

    assert done == {"ok": True, "imported": [name], "known": [], "refused": {}, "notes": []}
    assert name in archives(system)
    assert system.cli("show", name)["parts"][0]["component"] == "keys"
    assert system.cli("restore", name, "--component", "keys", "--confirm", "keys")["state"] == "complete"
    assert (keys / "key").read_text() == "of 2025"
