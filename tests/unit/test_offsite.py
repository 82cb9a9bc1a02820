"""What is copied offsite, that only whole copies count, and that copying keeps to its bandwidth.

One fault at every storage call of a copy is in `tests/integration/test_storage_faults.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from tasks import archive, offsite, preflight
from tasks.archive import Archive, Metadata, RunRecord
from tasks.prune import prune_archives
from tests.configured import configured, write_settings
from workers import catalog
from workers.catalog import Artifact
from workers.component import Part
from workers.errors import IntegrityError, Permanent, SettingsError
from workers.locks import Lease
from workers.sections import LocalStoreSettings, OffsiteSettings, RetentionPolicy, S3StoreSettings
from workers.settings import Settings
from workers.storage import StoredObject
from workers.storage.local import LocalStore
from workers.streams import Digest

NOW = datetime(2026, 11, 22, 2, tzinfo=UTC)
BASE = {
    "system_identifier": "7", "timeline": 1, "start_lsn": "0/2000028", "stop_lsn": "0/2000120",
    "finished": "2026-11-22T02:00:00+00:00",
}  # fmt: skip


class Item:
    def through(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from chunks


class Double:
    """A lease that is held, and progress that nobody sees."""

    def check(self) -> None:
        """Return: it is held."""

    def add(self, label: str, expected: int | None) -> Item:
        return Item()


class World:
    """A main store with archives, an offsite store, and the catalogue of both."""

    def __init__(self, settings: Settings, offsite_: OffsiteSettings) -> None:
        self.source = LocalStore(cast("LocalStoreSettings", settings.store).path)
        self.target = LocalStore(cast("LocalStoreSettings", offsite_.store).path)
        self.offsite = offsite_

    def add(
        self,
        key: str,
        content: bytes = b"archive " * 1000,
        kind: str = "files",
        created: datetime = NOW,
        needs: Sequence[str] = (),
    ) -> Artifact:
        digest = Digest()
        self.source.put(key, digest.through([content]))
        run = RunRecord(id="20261122_020000", job="manual", started=NOW, finished=NOW)
        part = Part(
            name="part", component="settings", host="app1", kind=kind, codec="zstd", size=1, sha256="f", plain_size=1,
            plain_sha256="f", started=created, finished=created, holds=BASE | ({"needs": list(needs)} if needs else {}),
        )  # fmt: skip
        metadata = Metadata(
            backup_time=created, system_version="1", components={}, system_name="shop", run=run, parts=(part,)
        )
        record = Archive(key=key, size=digest.size, sha256=digest.sha256, metadata=metadata)
        self.source.put(archive.sidecar_key(key), [record.model_dump_json().encode()])
        artifact = archive.artifact_of(record)
        catalog.add_artifact(artifact)
        return artifact

    def copier(self, **changes: Any) -> offsite.Copier:
        double = cast("Any", Double())
        return offsite.Copier(
            self.source, self.target, self.offsite.model_copy(update=changes), double, double
        )

    def lacking(self) -> list[str]:
        return offsite.lacking(self.offsite)

    def copied(self) -> list[str]:
        return [item.key for item in self.target.list("")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    more = f"""
[offsite.store]
path = "{tmp_path}/offsite"
[catalog]
url = "sqlite:///{tmp_path}/catalog.sqlite"
"""
    with configured(write_settings(tmp_path, more=more)) as settings:
        assert settings.offsite
        yield World(settings, settings.offsite)


FULL = "full_system/full_backup_20261122_020000.tar.gz"
RECORD = "full_system/full_backup_20261122_020000.metadata.json"


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        (["full"], ["full_system/a.tar.gz"]),
        (["base"], ["components/base.tar.gz"]),
        (["components"], ["components/base.tar.gz", "components/files.tar.gz"]),
        (["full", "base"], ["components/base.tar.gz", "full_system/a.tar.gz"]),
        (["wal"], []),
    ],
)
def test_archives_are_chosen_by_what_the_settings_say(world: World, what: list[str], keys: list[str]) -> None:
    world.add("full_system/a.tar.gz", kind="postgres-base")
    world.add("components/files.tar.gz")
    world.add("components/base.tar.gz", kind="postgres-base")

    chosen = OffsiteSettings.model_validate({"store": world.offsite.store, "what": what})

    assert sorted(offsite.lacking(chosen)) == keys


def test_what_the_offsite_retention_would_delete_at_once_is_not_copied(world: World) -> None:
    """A retention shorter than the main store's copied again each night what it had pruned in the morning."""
    days = {day: f"components/settings_backup_202611{day}_020000.tar.gz" for day in (20, 21, 22)}
    for day, key in days.items():
        world.add(key, created=NOW.replace(day=day))
    world.offsite.retention.components["settings"] = RetentionPolicy(last=2)
    chosen = world.offsite.model_copy(update={"what": ("components",)})
    assert offsite.lacking(chosen) == [days[22], days[21]]

    for artifact in catalog.list_artifacts():
        catalog.add_copy(world.copier().archive(artifact))
    catalog.drop_artifact(days[22])  # known by its record alone
    assert prune_archives("offsite", cast("Lease", Double()))["dropped"] == [days[20]]
    assert offsite.lacking(chosen) == []


def test_an_increment_takes_its_parents_along_and_follows_them(world: World) -> None:
    keys = [f"components/settings_backup_202611{day}_020000.tar.gz" for day in (19, 20, 21, 22)]
    needs = [[], keys[:1], keys[:2], []]
    for day, (key, needed) in enumerate(zip(keys, needs, strict=True), 19):
        world.add(key, kind="postgres-base", created=NOW.replace(day=day), needs=needed)
    chosen = world.offsite.model_copy(update={"what": ("base",)})
    assert offsite.lacking(chosen) == [keys[3], *keys[:3]]


def test_a_copy_is_the_same_has_its_record_and_is_made_once(world: World) -> None:
    artifact = world.add(FULL)
    assert world.lacking() == [FULL]

    catalog.add_copy(world.copier().archive(artifact))

    assert b"".join(world.target.get(FULL)) == b"archive " * 1000
    assert archive.read_sidecar(world.target, FULL) == archive.read_sidecar(world.source, FULL)
    assert world.lacking() == []
    made = world.target.stat(FULL)
    world.copier().archive(artifact)
    assert world.target.stat(FULL) == made


@pytest.mark.parametrize("content", [b"half", b"ARCHIVE " * 1000])
def test_what_is_otherwise_offsite_is_replaced(world: World, content: bytes) -> None:
    artifact = world.add(FULL)
    world.target.put(FULL, [content])
    world.target.put(RECORD, [b"{}"])
    assert world.lacking() == [FULL]

    world.copier().archive(artifact)

    assert b"".join(world.target.get(FULL)) == b"archive " * 1000
    assert archive.read_sidecar(world.target, FULL).sha256 == artifact.sha256


def test_a_damaged_copy_is_not_removed_for_a_damaged_archive(world: World) -> None:
    artifact = world.add(FULL)
    catalog.add_copy(world.copier().archive(artifact))
    for store in (world.source, world.target):
        store.delete(FULL)
        store.put(FULL, [b"ARCHIVE " * 1000])

    with pytest.raises(IntegrityError, match="neither was touched"):
        world.copier().archive(artifact)
    assert b"".join(world.target.get(FULL)) == b"ARCHIVE " * 1000
    assert world.copied() == [RECORD, FULL]


def test_what_an_ended_attempt_copied_whole_is_not_copied_again(world: World) -> None:
    artifact = world.add(FULL)
    world.target.put(FULL, [b"archive " * 1000])
    made = world.target.stat(FULL)
    assert world.lacking() == [FULL], "without its record it is no copy yet"

    world.copier().archive(artifact)

    assert world.target.stat(FULL) == made
    assert world.copied() == [RECORD, FULL]


def test_an_archive_that_is_not_what_was_recorded_is_not_copied(world: World) -> None:
    artifact = world.add(FULL)
    world.source.delete(FULL)
    world.source.put(FULL, [b"ARCHIVE " * 1000])

    with pytest.raises(IntegrityError, match="main store is not what was recorded"):
        world.copier().archive(artifact)
    assert world.copied() == []


@pytest.mark.parametrize("read_back", [True, False])
def test_a_copy_is_read_again_unless_it_is_not_wanted(
    world: World, monkeypatch: pytest.MonkeyPatch, read_back: bool
) -> None:
    artifact, real = world.add(FULL), world.target.get

    def flipped(key: str, **how: Any) -> Iterator[bytes]:
        for chunk in real(key, **how):
            yield bytes([chunk[0] ^ 1]) + chunk[1:]

    monkeypatch.setattr(world.target, "get", flipped)
    if read_back:
        with pytest.raises(IntegrityError, match="it was removed"):
            world.copier().archive(artifact)
        assert world.copied() == []
    else:
        world.copier(read_back=False).archive(artifact)
        assert world.copied() == [RECORD, FULL]


def test_the_catalogue_forgets_copies_that_are_gone_and_learns_those_that_are_there(world: World) -> None:
    artifact = world.add(FULL)
    copy = world.copier().archive(artifact)
    assert (world.lacking(), [row.key for row in catalog.list_copies()]) == ([], [copy.key])

    world.target.delete(FULL)

    assert (world.lacking(), catalog.list_copies()) == ([FULL], [])


def test_wal_is_copied_before_the_records_that_speak_of_it_and_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [
        "wal/db/7/collections/20261122_020000.json",
        "wal/db/7/000000010000000000000002-bb.zst",
        "wal/db/7/000000010000000000000001-aa.zst",
    ]
    for key in keys:
        world.source.put(key, [key.encode()])
    world.target.put(keys[1], [b"cut"])
    copied: list[str] = []
    real = world.target.put

    def put(key: str, chunks: Iterable[bytes], **how: Any) -> StoredObject:
        copied.append(key)
        return real(key, chunks, **how)

    monkeypatch.setattr(world.target, "put", put)

    assert world.copier().wal() == 3
    assert copied == sorted(keys)
    assert {key: b"".join(world.target.get(key)) for key in keys} == {key: key.encode() for key in keys}
    assert world.copier().wal() == 0


def test_the_bandwidth_is_kept_to_and_lost_time_is_not_made_up_for() -> None:
    pace, began = offsite.Pace(20_000), time.monotonic()
    pace(1000)
    time.sleep(0.2)
    for _ in range(3):
        pace(1000)
    assert time.monotonic() - began >= 0.05 + 0.2 + 3 * 0.05
    began = time.monotonic()
    offsite.Pace(None)(1 << 40)
    assert time.monotonic() - began < 1


def test_offsite_copies_are_stored_for_infrequent_access_unless_said_otherwise() -> None:
    table: dict[str, Any] = {"kind": "s3", "bucket": "b"}
    for given, expected in ({}, "STANDARD_IA"), ({"storage_class": "GLACIER_IR"}, "GLACIER_IR"):
        store = OffsiteSettings.model_validate({"store": {**table, **given}}).store
        assert isinstance(store, S3StoreSettings)
        assert store.storage_class == expected


def test_without_an_offsite_store_nothing_is_copied_or_read_there(tmp_path: Path) -> None:
    with (
        configured(write_settings(tmp_path)) as settings,
        pytest.raises(Permanent, match="no store 'offsite'"),
    ):
        settings.store_of("offsite")


def test_objects_of_the_main_store_cannot_be_locked(tmp_path: Path) -> None:
    path = write_settings(tmp_path)
    lock = 'kind = "s3"\nbucket = "b"\nlock = { mode = "compliance", days = 3 }\n'
    path.write_text(path.read_text().replace(f'path = "{tmp_path}/store"', lock))

    with pytest.raises(SettingsError, match=r"store: .*parts must be deleted"), configured(path):
        pass


def test_preflight_tries_both_stores_where_it_is_asked(world: World) -> None:
    assert (preflight.check_store("store"), preflight.check_store("offsite")) == ([], [])
    assert (list(world.source.list("")), world.copied()) == ([], [])

    world.target.root.rmdir()
    world.target.root.write_text("a file where a folder should be")
    found = preflight.check_store("offsite")
    assert [finding["advice"] for finding in found] == [False] * len(found)
    assert found[0]["what"].startswith("put: ")
