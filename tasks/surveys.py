"""What retention finds in one store: the archives, what is known of them, who reads them, and what would become of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tasks import archive
from tasks.components.postgres_wal import BaseBackup
from tasks.rebuild import scan
from tasks.retention import Backup, Decision, Plan, decide
from workers import catalog
from workers.catalog import Artifact, Kind, Proof, State
from workers.sections import RetentionPolicy, RetentionSettings
from workers.settings import Settings, get_settings
from workers.storage import open_store

READERS = (Kind.RESTORE, Kind.PLAN, Kind.VERIFY, Kind.COPY)
IMPORTED = "imported"
BEGUN = "its deletion was begun"
BASE = "postgres-base"
"""Kind of the part that is a base backup."""


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
    begun = [Decision(row.key, keep=False, reason=BEGUN) for row in half_deleted(table)]
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
        held = {row.key for row in (*rows, *half_deleted(table))}
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


def half_deleted(table: str) -> Sequence[Artifact]:
    """Return the archives of a store whose deletion was begun; the offsite store's own records say what it holds."""
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
