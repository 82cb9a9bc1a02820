"""What retention is told of an archive: its ledger, its series, and who reads it."""

from __future__ import annotations

import hashlib
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pytest

from tasks import archive
from tasks.components import postgres_wal
from tasks.components.postgres_segments import HEADER, LONG_HEADER, Segment
from tasks.imports import take_in
from tasks.prune import delete, prune_archives
from tasks.retention import decide
from tasks.surveys import BEGUN, backup_of, policies_of, read_now, survey
from tests.configured import configured, write_settings
from workers import catalog, streams
from workers.catalog import Artifact, Copy, Kind, Verification, database
from workers.component import Part
from workers.errors import NotConfirmed, Permanent
from workers.locks import Lease
from workers.sections import RetentionPolicy
from workers.settings import Settings
from workers.storage import Store, open_store

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


def test_every_version_of_the_configuration_is_kept_for_ever(tmp_path: Path) -> None:
    with configured(write_settings(tmp_path)) as found:
        weeks = range(500)
        rows = [artifact(f"components/{week}.tar.gz", ("settings", "config")) for week in weeks]
        rows += [
            artifact(f"full_system/{week}.tar.gz", ("settings", "config"), ("keys", "tree")) for week in weeks
        ]
        for row in rows:
            row.created += timedelta(weeks=int(PurePosixPath(row.key).name.removesuffix(".tar.gz")))
        now = START + timedelta(weeks=500)
        plan = decide(
            [backup_of(row, None) for row in rows],
            lambda backup: policies_of(backup, found, found.retention),
            now,
        )
    kept = [key for key in plan.kept if key.startswith("components/")]
    assert len(kept) == 500
    assert 0 < len(plan.kept) - len(kept) < 10


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


# -- a store with base backups and WAL, and its copy -----------------------------------------------------------------------

SIZE, CLUSTER = 16 << 20, "7300000000000000001"
STORES = """
hosts = ["db1"]
[system]
name = "shop"
[components.db]
kind = "postgres"
host = "db1"
[store]
path = "{folder}/store"
[offsite.store]
path = "{folder}/offsite"
[offsite.retention.components]
db = {{ last = 3 }}
[catalog]
url = "sqlite:///{folder}/catalog.sqlite"
[retention.components]
db = {{ last = 1 }}
"""


class Held:
    """A lease that is held."""

    def check(self) -> None:
        return


def base_backup(store: Store, day: int) -> Artifact:
    """Put a base backup of a day into a store; its WAL begins with the segment of the day's number."""
    made = START + timedelta(days=day)
    key = f"components/db_backup_{made:%Y%m%d_%H%M%S}.tar.gz"
    holds = {
        "system_identifier": CLUSTER, "timeline": 1, "start_lsn": f"0/{day * SIZE:X}", "stop_lsn": f"0/{day * SIZE:X}",
        "finished": made.isoformat(),
    }  # fmt: skip
    part = Part(
        name="db.base.tar.zst", component="db", host="db1", kind="postgres-base", codec="zstd", size=1, sha256="f",
        plain_size=1, plain_sha256="f", started=made, finished=made, holds=holds,
    )  # fmt: skip
    run = archive.RunRecord(id=f"{made:%Y%m%d_%H%M%S}", job="manual", started=made, finished=made)
    metadata = archive.Metadata(
        backup_time=made, system_version="1", components={}, system_name="shop", run=run, parts=(part,)
    )
    found = archive.Archive(key=key, size=7, sha256="f", metadata=metadata)
    store.put(key, [b"archive"])
    archive.write_sidecar(store, found)
    return archive.artifact_of(found)


def wal_of_days(store: Store, folder: Path, days: int) -> None:
    """Put a segment and the record of its collection into a store for each day."""
    for day in range(1, days):
        made = START + timedelta(days=day)
        header = HEADER.pack(0xD118, LONG_HEADER, 1, day * SIZE, 0, int(CLUSTER), SIZE, 8192)
        name = Segment(1, day).name(SIZE)
        key = postgres_wal.wal_key("db", CLUSTER, name, hashlib.sha256(header).hexdigest())
        streams.write(store, key, iter([header]), level=1)
        os.utime(folder / key, (made.timestamp(), made.timestamp()))
        record = postgres_wal.Collection(
            taken=made,
            lsn=f"0/{(day + 1) * SIZE:X}",
            timeline=1,
            last=name,
            marked=made,
            snapshot="1:1:",
            segment_size=SIZE,
        )
        key = postgres_wal.collection_key("db", CLUSTER, f"{made:%Y%m%d_%H%M%S}")
        store.put(key, [record.model_dump_json().encode()])


def days_in(store: Store, prefix: str) -> list[int]:
    """Return the days of archives, or of WAL segments, or of collections, by their names."""
    if prefix.startswith("wal/"):
        names = [item.key.rpartition("/")[2] for item in store.list(prefix)]
        return [int(name[16:24], 16) for name in names if len(name) > 80]
    names = [item.key for item in store.list(prefix) if item.key.endswith(".tar.gz")]
    return sorted(
        (datetime.strptime(name[-22:-7] + "+0000", "%Y%m%d_%H%M%S%z") - START).days for name in names
    )


def test_wal_is_kept_from_the_base_backup_on_that_the_time_kept_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backup.toml").write_text(STORES.format(folder=tmp_path))
    with configured(tmp_path / "backup.toml") as found:
        main, offsite = open_store(found.store), open_store(found.store_of("offsite"))
        made = [base_backup(main, day) for day in (2, 8, 10, 17)]
        wal_of_days(main, tmp_path / "store", 21)
        for day in (2, 8, 10, 17):
            base_backup(offsite, day)
        for row in made:
            catalog.add_artifact(row)
            catalog.add_copy(Copy(key=row.key, copied=row.created, size=row.size, sha256=row.sha256))
        monkeypatch.setattr("workers.catalog.now", lambda: START + timedelta(days=20))

        done = prune_archives("store", cast("Lease", Held()))

        assert days_in(main, "components/") == [10, 17], "7 days of WAL begin on day 13, reached from day 10"
        assert days_in(main, "wal/") == list(range(10, 21))
        assert (len(done["dropped"]), done["wal_files"]) == (2, 9)
        kept = postgres_wal.list_collections(main, "db", CLUSTER)
        assert [record.taken for record in kept] == [START + timedelta(days=day) for day in range(10, 21)]
        assert [row.created for row in catalog.list_artifacts()] == [made[3].created, made[2].created]

        assert days_in(offsite, "components/") == [2, 8, 10, 17], "another store, another retention"
        assert len(prune_archives("offsite", cast("Lease", Held()))["dropped"]) == 1
        assert days_in(offsite, "components/") == [8, 10, 17]
        assert [copy.key for copy in catalog.list_copies()] == [row.key for row in made[1:]]

        base_backup(main, 1)  # which the catalogue does not know
        monkeypatch.setattr("workers.catalog.now", lambda: START + timedelta(days=200))
        noted = prune_archives("store", cast("Lease", Held()))
        assert noted["wal_files"] == 0
        assert noted["notes"] == ["1 archives are not in the catalogue; see: ai-micro-backup rebuild"]
        database.engine_of(found.catalog, os.getpid()).dispose()
        database.engine_of.cache_clear()


def test_a_copy_that_its_lock_keeps_does_not_keep_others(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(settings.store)
    rows = [base_backup(store, day) for day in (1, 2, 3)]
    for row in rows:
        row.details["parts"][0]["component"] = "settings"
        row.details["parts"][0]["kind"] = "files-tar"
        catalog.add_artifact(row)
    real = type(store).delete

    def locked(self: Any, key: str) -> None:
        if key == rows[1].key:
            raise Permanent("locked")
        real(self, key)

    monkeypatch.setattr(type(store), "delete", locked)
    settings.retention.components["settings"] = RetentionPolicy(last=1)
    with pytest.raises(Permanent, match=f"not deleted: {rows[1].key}: locked"):
        prune_archives("store", cast("Lease", Held()))
    assert [row.key for row in catalog.list_artifacts()] == [rows[2].key], (
        "the locked one is no backup any more"
    )
    assert [(one.key, one.reason) for one in survey("store").plan.dropped] == [(rows[1].key, BEGUN)]

    monkeypatch.setattr(type(store), "delete", real)
    assert prune_archives("store", cast("Lease", Held()))["dropped"] == [rows[1].key]
    assert [item.key for item in store.list("components/") if item.key.endswith(".gz")] == [rows[2].key]
    assert catalog.list_artifacts(deleting=True) == []


def test_what_is_half_deleted_can_be_named_to_end_that_and_is_not_imported_again(settings: Settings) -> None:
    store, key = open_store(settings.store), "files/files_backup_20250930_020000.tar.gz"
    store.put(key, [b"half deleted"])
    catalog.add_artifact(artifact(key, ("keys", "t"), job="import"))
    catalog.begin_deletion(key)

    taken_in = take_in(store, "files/", (), cast("Lease", Held()))
    assert taken_in == {
        "imported": [],
        "known": [],
        "refused": {key: "its deletion was begun; prune ends it"},
        "notes": [],
    }
    store.delete(key)
    with pytest.raises(NotConfirmed, match=f"retention: {BEGUN}"):
        delete.run("files_backup_20250930_020000")


def test_a_prune_says_what_unfinished_it_removed(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "full_system"
    folder.mkdir(parents=True)
    for digest, hours in (("a", 49), ("b", 1)):
        path = folder / f".incoming-{digest * 64}"
        path.write_text("half")
        os.utime(path, (0, time.time() - hours * 3600))

    notes = prune_archives("store", cast("Lease", Held()))["notes"]

    assert (
        f"what was unfinished for full_system/.incoming-{'a' * 64} was removed: nobody went on with it"
        in notes
    )
    assert [path.name[-1] for path in folder.iterdir()] == ["b"]
