"""What retention is told of an archive: its ledger, its series, and who reads it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.prune import backup_of, policies_of, read_now
from tests.configured import configured, write_settings
from workers import catalog
from workers.catalog import Artifact, Kind, Verification
from workers.settings import Settings

START = datetime(2026, 11, 22, 2, tzinfo=UTC)


def artifact(key: str, *parts: tuple[str, str], job: str = "manual", holds: Any = None) -> Artifact:
    described = [{"component": name, "kind": kind, "holds": holds or {}} for name, kind in parts]
    return Artifact(
        key=key, run_id="r", job=job, created=START, size=1, sha256="f", details={"parts": described}
    )


def entry(level: str, *, ok: bool = True, hours: int = 0) -> Verification:
    taken = START + timedelta(hours=hours)
    return Verification(key="k", store="store", level=level, ok=ok, taken=taken, run_id="r", details={})


def test_the_ledger_is_read_as_it_went_on() -> None:
    made = artifact("components/keys_backup_1.tar.gz", ("keys", "files-tar"))

    def found(*ledger: Verification) -> tuple[str | None, bool]:
        backup = backup_of(made, catalog.proofs(ledger).get(("store", "k")))
        return backup.proven, backup.damaged

    assert found() == (None, False)
    assert found(entry("restore"), entry("exists")) == ("restore", False)
    assert found(entry("restore"), entry("checksum", ok=False)) == (None, True)
    assert found(entry("restore"), entry("checksum", ok=False), entry("structure")) == ("structure", False)


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    more = f"""
[retention.components]
settings = {{ last = 3 }}
[catalog]
url = "sqlite:///{tmp_path}/catalog.sqlite"
"""
    with configured(write_settings(tmp_path, more=more)) as found:
        yield found


@pytest.mark.parametrize(
    ("made", "series", "policies"),
    [
        (
            artifact("full_system/a.tar.gz", ("keys", "t")),
            "full_system",
            {"retention.full_system": "30 days"},
        ),
        (
            artifact("full_system/a.tar.gz", ("keys", "t"), job="import"),
            "imported",
            {"retention.imported": ""},
        ),
        (
            artifact("components/a.tar.gz", ("settings", "t"), ("keys", "t")),
            "keys+settings",
            {"retention.components.keys": "30 days", "retention.components.settings": "3 last"},
        ),
        (artifact("components/a.tar.gz", ("gone", "t")), "gone", {"retention.components.gone": ""}),
    ],
)
def test_each_archive_is_under_the_policies_of_its_series(
    settings: Settings, made: Artifact, series: str, policies: dict[str, str]
) -> None:
    backup = backup_of(made, None)
    assert backup.series == series
    found = policies_of(backup, settings, settings.retention)
    assert {name: str(policy) for name, policy in found.items()} == policies


def test_a_base_backup_is_a_series_of_its_own_and_says_where_its_wal_begins() -> None:
    holds = {
        "system_identifier": "7", "timeline": 1, "start_lsn": "0/2000028", "stop_lsn": "0/2000120",
        "finished": "2026-11-22T02:00:00+00:00", "needs": ["components/full.tar.gz"],
    }  # fmt: skip
    backup = backup_of(artifact("components/pg.tar.gz", ("pg", "postgres-base"), holds=holds), None)
    assert backup.series == "pg base"
    assert backup.bases["pg"].start_lsn == 0x2000028
    assert backup.needs == {"components/full.tar.gz"}


def test_what_a_running_run_reads_is_known(settings: Settings) -> None:
    keys = ["a", "b", "c"]
    assert read_now("store", keys) == set()
    restore = catalog.open_run(Kind.RESTORE, job="manual", components=["keys"], archive="b")
    assert restore
    assert read_now("store", keys) == {"b"}
    assert read_now("offsite", keys) == set()
    copy = catalog.open_run(Kind.COPY, job="manual", components=[], store="offsite")
    assert copy
    assert read_now("store", keys) == set(keys), "what it copies is not known yet"
    catalog.note(copy.id, outcome={"copies": ["c", "gone"]})
    assert read_now("store", keys) == {"b", "c"}
    catalog.finish_run(restore.id)
    catalog.finish_run(copy.id)
    assert read_now("store", keys) == set()
