"""The catalogue made anew from the stores alone: each archive has its record beside it, and the same inside."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from celery import Task

from tasks import archive, proofs
from tasks.archive import Archive
from tasks.runs import WORKFLOWS, OnePhase, Work, begin
from tasks.step import perform
from workers import catalog
from workers.app import app
from workers.catalog import Copy, Kind, Run
from workers.errors import BackupError, IntegrityError, ObjectNotFound, Permanent
from workers.hosts import CONTROL
from workers.locks import Lease
from workers.settings import get_settings
from workers.storage import Store, StoredObject, open_store
from workers.streams import Digest

NOT_ARCHIVES = ("parts/", "wal/", proofs.FOLDER)
"""Prefixes of the keys of what is no archive."""


@dataclass(frozen=True)
class Found:
    """An archive in a store, or what seems to be one, and what there is to say about it."""

    key: str
    archive: Archive | None
    """``None`` when nothing is known of it."""
    note: str | None = None


@app.task(name="tasks.rebuild.rebuild")
def rebuild(*, drop_gone: bool = False) -> str:
    """Start making the catalogue's rows of archives, of copies and of what was proven of them anew, and return the run's id.

    Rows whose archive is gone are reported, and removed with ``drop_gone``.
    """
    run = catalog.open_run(Kind.REBUILD, job="manual", components=[], options={"drop_gone": drop_gone})
    if run is None:
        raise Permanent("the rebuild was not started")
    begin(run)
    return run.id


@app.task(bind=True, name="tasks.rebuild.rebuild_catalog")
def rebuild_catalog(self: Task[Any, Any], run_id: str, table: str) -> dict[str, Any]:
    """Compare the catalogue with one store and write what differs."""

    def work(_lease: Lease) -> dict[str, Any]:
        drop_gone = bool(catalog.get_run(run_id).options["drop_gone"])
        store = open_store(get_settings().store_of(table))
        outcome = (take_in if table == "store" else take_in_copies)(store, drop_gone=drop_gone)
        added, notes = take_in_proofs(store, table)
        return outcome | {"proofs": added, "notes": [*outcome["notes"], *notes]}

    return perform(self, f"rebuild-{table}", work)


def take_in(store: Store, *, drop_gone: bool) -> dict[str, Any]:
    """Make the catalogue's artifacts those of the main store; return what was added, changed, gone, and the notes."""
    known = {artifact.key: artifact.model_dump() for artifact in catalog.list_artifacts()}

    def add(found: Archive) -> bool:
        artifact = archive.artifact_of(found)
        differs = known.get(found.key) != artifact.model_dump()
        if differs:
            catalog.add_artifact(artifact)
        return differs

    return _compare(store, known.keys(), add, _forget if drop_gone else None)


def take_in_copies(store: Store, *, drop_gone: bool) -> dict[str, Any]:
    """Make the catalogue's copies those of the offsite store; alike. When each was copied, its object says."""
    known = {copy.key: (copy.size, copy.sha256) for copy in catalog.list_copies()}

    def add(found: Archive) -> bool:
        differs = known.get(found.key) != (found.size, found.sha256)
        if differs:
            copied = datetime.fromtimestamp(store.stat(found.key).modified, UTC)
            catalog.add_copy(Copy(key=found.key, copied=copied, size=found.size, sha256=found.sha256))
        return differs

    return _compare(store, known.keys(), add, _forget_copy if drop_gone else None)


def _forget(key: str) -> None:
    catalog.drop_artifact(key)
    catalog.drop_verifications(key, "store")


def _forget_copy(key: str) -> None:
    catalog.drop_copy(key)
    catalog.drop_verifications(key, "offsite")


def take_in_proofs(store: Store, table: str) -> tuple[int, list[str]]:
    """Write to the ledger what a store holds of it; return how many lines were added, and what is not sound."""
    known = {(line.run_id, line.level) for line in catalog.list_verifications()}
    orphans = proofs.list_orphans(store)
    added, notes = 0, [f"{key} is of an archive that is not there; prune removes it" for key in orphans]
    for key in proofs.list_proofs(store):
        if key in orphans:
            continue
        try:
            line = proofs.read_proof(store, key, table=table)
        except (IntegrityError, ObjectNotFound) as error:
            notes.append(str(error))
            continue
        if (line.run_id, line.level) not in known:
            catalog.add_verification(line)
            added += 1
    return added, notes


def _compare(
    store: Store, known: Collection[str], add: Callable[[Archive], bool], drop: Callable[[str], None] | None
) -> dict[str, Any]:
    outcome: dict[str, Any] = {"added": [], "changed": [], "gone": [], "notes": []}
    there = set()
    for found in scan(store):
        if found.note:
            outcome["notes"].append(f"{found.key}: {found.note}")
        if found.archive:
            there.add(found.key)
            if add(found.archive):
                outcome["changed" if found.key in known else "added"].append(found.key)
    for key in sorted(set(known) - there):
        outcome["gone"].append(key)
        if drop:
            drop(key)
    return outcome


def scan(store: Store) -> Iterator[Found]:
    """Yield each archive of a store by its record, or where that is lost, by what is inside."""
    objects = {item.key: item for item in store.list("") if not item.key.startswith(NOT_ARCHIVES)}
    of_records = {archive.sidecar_key(key): key for key in objects if archive.is_archive(key)}
    for key in sorted(objects.keys() | of_records.keys()):
        if key.endswith(archive.SIDECAR_SUFFIX):
            yield from _by_record(store, of_records.get(key), key, objects)


def _by_record(
    store: Store, key: str | None, record: str, objects: dict[str, StoredObject]
) -> Iterator[Found]:
    try:
        found = archive.parse_sidecar(b"".join(store.get(record)), record)
    except (ObjectNotFound, IntegrityError) as error:
        if key is not None and archive.is_ours(key):
            yield _read_inside(store, key, str(error))
        elif key is None:
            yield Found(record, None, f"belongs to no archive, and cannot be read: {error}")
        return
    item = objects.get(found.key)
    if item is None:
        yield Found(record, None, f"describes {found.key}, which is not in the store")
    elif item.size != found.size:
        note = f"damaged: it has {item.size} bytes, recorded were {found.size}"
        yield Found(found.key, found, note)
    else:
        yield Found(found.key, found)


def _read_inside(store: Store, key: str, reason: str) -> Found:
    digest = Digest()
    try:
        for _ in digest.through(store.get(key)):
            pass
        metadata = archive.verify(store, key)
    except BackupError as error:
        return Found(key, None, f"has no readable record, and is not a whole archive: {error}")
    found = Archive(key=key, size=digest.size, sha256=digest.sha256, metadata=metadata)
    return Found(key, found, f"has no readable record ({reason}); it was read, and is whole")


def _work(run: Run) -> list[Work]:
    tables = ["store", *(["offsite"] if get_settings().offsite else [])]
    return [
        Work(table, "tasks.rebuild.rebuild_catalog", (run.id, table), CONTROL, f"rebuild-{table}")
        for table in tables
    ]


WORKFLOWS[Kind.REBUILD] = OnePhase(_work)
