"""Deletes archives: those that retention does not keep, or one by hand.

First the catalogue says that the archive is no backup any more; then its record goes, the ledger's lines, the archive
itself, its proofs, and in the end the row. Whatever ends in between, nothing looks like a backup that is none: an
archive without its record is still whole, and the row that is left makes the next run go on.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from celery import Task

from tasks import archive
from tasks.components import postgres_wal
from tasks.components.postgres_incremental import unneeded_manifests
from tasks.proofs import drop_proofs, list_orphans
from tasks.runs import WORKFLOWS, OnePhase, Work, begin
from tasks.step import perform
from tasks.surveys import (
    Survey,
    half_deleted,
    known_archives,
    read_now,
    retention_of,
    store_settings,
    survey,
    tables,
)
from workers import catalog
from workers.app import app
from workers.catalog import Kind, Run
from workers.errors import NotConfirmed, Permanent
from workers.hosts import CONTROL
from workers.locks import Lease
from workers.settings import get_settings
from workers.storage import Store, open_store, remove_unfinished

PRUNE = "prune_stores"
"""Name of the scheduled job."""


@app.task(name="tasks.prune.prune")
def prune(*, job: str = "manual", scheduled_at: str | None = None) -> str | None:
    """Start deleting what retention does not keep, in each store, and return the run's id.

    Returns ``None`` when the job had a run for ``scheduled_at`` already.
    """
    when = datetime.fromisoformat(scheduled_at) if scheduled_at else None
    run = catalog.open_run(Kind.PRUNE, job=job, components=[], scheduled_at=when)
    if run is None:
        return None
    begin(run)
    return run.id


@app.task(name="tasks.prune.delete")
def delete(name: str, *, confirm: str | None = None, store: str = "store") -> str:
    """Start deleting the archive ``name`` from the store ``store`` or ``offsite`` and return the run's id.

    ``confirm`` must be the archive's name, as given. Raises ``NotConfirmed`` with what retention says of it,
    ``ObjectNotFound``, and ``Permanent`` while a run reads it, or for one that another archive needs.
    """
    if name == archive.LATEST:
        raise Permanent(
            "name the archive that is to be deleted: which one is the latest may change meanwhile"
        )
    key = _find(store, name)
    if key in read_now(store, [key]):
        raise Permanent(f"{key} is read by a run now; try again when that has ended")
    if needing := [backup.key for backup in known_archives(store)[0] if key in backup.needs]:
        raise Permanent(f"{key} is needed by {', '.join(needing)}; delete first what needs it")
    if confirm != name:
        reason = {decision.key: decision.reason for decision in survey(store).plan.decisions}.get(key)
        raise NotConfirmed(
            f"this would delete {key} from the {store} for ever (retention: {reason or 'unknown to the catalogue'}); "
            f"confirm={name!r}"
        )
    run = catalog.open_run(Kind.PRUNE, job="manual", components=[], archive=key, store=store)
    if run is None:
        raise Permanent("the deletion was not started")
    begin(run)
    return run.id


def _find(table: str, name: str) -> str:
    """Return the key of the archive that ``name`` means, even of one that is half deleted."""
    begun = [row.key for row in half_deleted(table) if archive.means(name, row.key)]
    return begun[0] if begun else archive.resolve(open_store(store_settings(table)), name)


@app.task(bind=True, name="tasks.prune.prune_store")
def prune_store(self: Task[Any, Any], table: str) -> dict[str, Any]:
    """Delete from one store what retention does not keep, then the WAL that no kept base backup needs."""
    return perform(self, f"prune-{table}", lambda lease: prune_archives(table, lease))


@app.task(bind=True, name="tasks.prune.delete_archive")
def delete_archive(self: Task[Any, Any], key: str, table: str) -> dict[str, Any]:
    """Delete one archive."""

    def work(lease: Lease) -> dict[str, Any]:
        if read_now(table, [key]):
            raise Permanent(f"{key} is read by a run now; try again when that has ended")
        lease.check()
        remove(open_store(store_settings(table)), table, key)
        return {"dropped": [key]}

    return perform(self, f"prune-{table}", work)


def prune_archives(table: str, lease: Lease) -> dict[str, Any]:
    """Delete what the survey drops, and what writers left that ended badly.

    What a run began to read meanwhile stays, and what fails keeps no other from going.
    """
    store, found = open_store(store_settings(table)), survey(table)
    dropped, failed = [], []
    for decision in found.plan.dropped:
        if read_now(table, [decision.key]):
            continue
        lease.check()
        try:
            remove(store, table, decision.key)
            dropped.append(decision.key)
        except Permanent as error:  # a lock that keeps it longer, for example
            failed.append(f"{decision.key}: {error}")
    notes = [*([found.plan.note] if found.plan.note else []), *found.notes]
    segments = 0
    if not notes and not failed and found.plan.kept:
        segments = prune_wal(store, table, found, lease)
        lease.check()
        for proof in list_orphans(store):
            store.delete(proof)
    ended = remove_unfinished(store_settings(table))
    notes += [f"what was unfinished for {key} was removed: nobody went on with it" for key in ended]
    record = {"dropped": dropped, "kept": len(found.plan.kept), "wal_files": segments, "notes": notes}
    if failed:
        raise Permanent(f"not deleted: {'; '.join(failed)}")
    return record


def prune_wal(store: Store, table: str, found: Survey, lease: Lease) -> int:
    """Delete the WAL that is too old and that no kept base backup needs; return the number of files."""
    settings = get_settings()
    before = catalog.now() - timedelta(days=retention_of(settings, table).wal_days)
    kept = [base for key in found.plan.kept for base in found.bases.get(key, ())]
    manifests = {base.manifest_sha256 for base in kept}
    count = 0
    for component in settings.components:
        for system in postgres_wal.list_systems(store, component):
            wal = postgres_wal.list_wal(store, component, system)
            gone = postgres_wal.prunable(wal, kept, before=before)
            lease.check()
            # First what speaks of it, so that no record ever names WAL that is not there.
            _drop_collections(store, wal, set(gone))
            for key in gone:
                store.delete(key)
            count += len(gone)
            for key in list(unneeded_manifests(store, component, system, manifests)):
                store.delete(key)
    return count


def _drop_collections(store: Store, wal: postgres_wal.Wal, gone: set[str]) -> None:
    """Delete the records of collections whose last segment is not there any more."""
    left = {name for name, file in wal.files.items() if file.key not in gone}
    prefix = f"{postgres_wal.folder(wal.component, wal.system_identifier)}collections/"
    for item in list(store.list(prefix)):
        if postgres_wal.read_collection(store, item.key).last not in left:
            store.delete(item.key)


def remove(store: Store, table: str, key: str) -> None:
    """Delete an archive, in the order that stands above. May be called again after any of it."""
    if table == "store":
        catalog.begin_deletion(key)
    else:  # no row is needed to go on: the store's own records say what it holds
        catalog.drop_copy(key)
    store.delete(archive.sidecar_key(key))
    catalog.drop_verifications(key, table)
    store.delete(key)
    drop_proofs(store, key)
    if table == "store":
        catalog.drop_artifact(key)


def _work(run: Run) -> list[Work]:
    if run.archive:
        args = (run.archive, run.store)
        return [Work(run.store, "tasks.prune.delete_archive", args, CONTROL, f"prune-{run.store}")]
    return [Work(table, "tasks.prune.prune_store", (table,), CONTROL, f"prune-{table}") for table in tables()]


WORKFLOWS[Kind.PRUNE] = OnePhase(_work)
