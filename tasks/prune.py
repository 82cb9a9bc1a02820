"""Deletes archives: those that retention does not keep, or one by hand.

First the catalogue says that the archive is no backup any more; then its record goes, the ledger's lines, the archive
itself, its proofs, and in the end the row. Whatever ends in between, nothing looks like a backup that is none: an
archive without its record is still whole, and the row that is left makes the next run go on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from celery import Task

from tasks import archive
from tasks.components import postgres_wal
from tasks.components.postgres_incremental import unneeded_manifests
from tasks.components.postgres_wal import BaseBackup
from tasks.proofs import drop_proofs, list_orphans
from tasks.rebuild import scan
from tasks.retention import Backup, Decision, Plan, decide
from tasks.runs import WORKFLOWS, OnePhase, Work, begin
from tasks.step import perform
from workers import catalog
from workers.app import app
from workers.catalog import Artifact, Kind, Proof, Run, State
from workers.errors import NotConfirmed, Permanent
from workers.hosts import CONTROL
from workers.locks import Lease
from workers.sections import RetentionPolicy, RetentionSettings
from workers.settings import Settings, get_settings
from workers.storage import Store, open_store, remove_unfinished

PRUNE = "prune_stores"
"""Name of the scheduled job."""
READERS = (Kind.RESTORE, Kind.PLAN, Kind.VERIFY, Kind.COPY)
IMPORTED = "imported"
BEGUN = "its deletion was begun"
BASE = "postgres-base"
"""Kind of the part that is a base backup."""


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
    begun = [row.key for row in _half_deleted(table) if archive.means(name, row.key)]
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


@dataclass(frozen=True)
class Survey:
    """What retention finds in one store."""

    plan: Plan
    bases: Mapping[str, Sequence[BaseBackup]]
    """The base backups, by the key of their archive."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What does not fit together: while there is any, no WAL is deleted."""


def survey(table: str) -> Survey:
    """Return what a prune of a store would do now, without doing it."""
    backups, notes = known_archives(table)
    plan = _plan(table, backups, read=read_now(table, [backup.key for backup in backups]))
    begun = [Decision(row.key, keep=False, reason=BEGUN) for row in _half_deleted(table)]
    bases = {backup.key: list(backup.bases.values()) for backup in backups}
    return Survey(replace(plan, decisions=[*plan.decisions, *begun]), bases, notes)


def keeps(table: str, rows: Iterable[Artifact]) -> frozenset[str]:
    """Return the keys of those archives that a store's retention would keep if it held just these."""
    standing = catalog.proofs(catalog.list_verifications())
    return _plan(table, [backup_of(row, standing.get((table, row.key))) for row in rows]).kept


def _plan(table: str, backups: Sequence[Backup], read: Collection[str] = ()) -> Plan:
    settings = get_settings()
    retention = retention_of(settings, table)
    return decide(
        backups,
        lambda backup: policies_of(backup, settings, retention),
        catalog.now(),
        read=read,
        wal_days=dict.fromkeys(settings.components, retention.wal_days),
    )


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


def known_archives(table: str) -> tuple[list[Backup], list[str]]:
    """Return the archives of a store with what is known of them, and what does not fit together.

    Of the main store the catalogue knows them; of the offsite store its own records, since the catalogue forgets an
    archive when it is gone from the main store.
    """
    store = open_store(store_settings(table))
    notes: list[str] = []
    if table == "store":
        there = {item.key for prefix in archive.FOLDERS for item in store.list(prefix)}
        rows = list(catalog.list_artifacts())
        held = {row.key for row in (*rows, *_half_deleted(table))}
        unknown = {key for key in there if archive.is_ours(key)} - held
        if unknown:
            notes.append(f"{len(unknown)} archives are not in the catalogue; see: ai-micro-backup rebuild")
        lost = [row.key for row in rows if row.key.startswith(archive.FOLDERS) and row.key not in there]
        notes += [f"{key} is gone from the store; see: ai-micro-backup rebuild" for key in lost]
        rows = [row for row in rows if row.key not in lost]
    else:
        found = list(scan(store))
        notes += [f"{item.key}: {item.note}" for item in found if item.note]
        rows = [archive.artifact_of(item.archive) for item in found if item.archive]
    standing = catalog.proofs(catalog.list_verifications())
    return [backup_of(row, standing.get((table, row.key))) for row in rows], notes


def _half_deleted(table: str) -> Sequence[Artifact]:
    return catalog.list_artifacts(deleting=True) if table == "store" else ()


def backup_of(artifact: Artifact, proof: Proof | None) -> Backup:
    """Return what retention knows of an archive; ``proof`` is how the ledger says it stands."""
    parts = artifact.details["parts"]
    # A base backup and a dump of one component do not replace each other.
    names = sorted({part["component"] + (" base" if part["kind"] == BASE else "") for part in parts})
    full = artifact.key.startswith(archive.FOLDERS[0])
    return Backup(
        key=artifact.key,
        created=artifact.created,
        series=IMPORTED if artifact.job == "import" else "full_system" if full else "+".join(names),
        holds=frozenset((part["component"], part["kind"]) for part in parts),
        proven=proof.level if proof else None,
        damaged=proof is not None and proof.damaged,
        bases={
            part["component"]: BaseBackup.of(artifact.key, part["holds"])
            for part in parts
            if part["kind"] == BASE
        },
        needs=frozenset(key for part in parts for key in part["holds"].get("needs", ())),
    )


def policies_of(
    backup: Backup, settings: Settings, retention: RetentionSettings
) -> dict[str, RetentionPolicy]:
    """Return the policies that an archive is under, by their names in the settings."""
    if backup.series == IMPORTED:
        return {"retention.imported": retention.imported}
    if backup.series == "full_system":
        return {"retention.full_system": retention.full_system}
    policies = {}
    for name in sorted({component for component, _ in backup.holds}):
        known = settings.components.get(name)
        default = RetentionPolicy(days=known.days_kept) if known else RetentionPolicy()
        policies[f"retention.components.{name}"] = retention.components.get(name, default)
    return policies


def read_now(table: str, keys: Iterable[str]) -> set[str]:
    """Return those of ``keys`` that a running run reads, or may read, from a store."""
    read: set[str] = set()
    for run in catalog.list_runs(state=State.RUNNING):
        # A copy reads the main store, and what it has just put into the other.
        if run.kind in READERS and (run.store == table or run.kind is Kind.COPY):
            named = {run.archive} if run.archive else set(run.outcome.get("copies", keys))
            read |= named & set(keys)
        if run.kind is Kind.BACKUP and table == "store":  # one that will need its parents
            read |= {*(run.options.get("parent") or {}).get("needs", ())} & set(keys)
    return read


def store_settings(table: str) -> Any:
    """Return the settings of the store ``store`` or ``offsite``. Raises ``Permanent`` when there is none."""
    return get_settings().store_of(table)


def retention_of(settings: Settings, table: str) -> RetentionSettings:
    """Return how long a store keeps what."""
    return settings.offsite.retention if table == "offsite" and settings.offsite else settings.retention


def tables() -> list[str]:
    """Return the stores there are, by their tables in the settings."""
    return ["store", *(["offsite"] if get_settings().offsite else [])]


def _work(run: Run) -> list[Work]:
    if run.archive:
        args = (run.archive, run.store)
        return [Work(run.store, "tasks.prune.delete_archive", args, CONTROL, f"prune-{run.store}")]
    return [Work(table, "tasks.prune.prune_store", (table,), CONTROL, f"prune-{table}") for table in tables()]


WORKFLOWS[Kind.PRUNE] = OnePhase(_work)
