"""Verifications: how deeply an archive is known to be good, and the ledger of it.

    exists → checksum → structure → restore        up to the level that is asked for

``exists`` looks at the object and its size, ``checksum`` reads every byte, ``structure`` opens the archive and reads each
part by its format, ``restore`` brings each component back in a scratch place and compares it with the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from celery import Task

from tasks import archive, proofs
from tasks.chain import archives_of, parts_of, reader
from tasks.runs import WORKFLOWS, Work, begin
from tasks.step import perform
from tasks.watchdog import end_run
from workers import catalog
from workers.app import app
from workers.catalog import LEVELS, Kind, Run, State, Step
from workers.component import Restore, check_options
from workers.errors import BackupError, ComparisonError, IntegrityError, ObjectNotFound, Permanent
from workers.hosts import CONTROL, queue_of
from workers.locks import Lease
from workers.progress import Progress
from workers.runtime import sweep
from workers.settings import get_settings
from workers.storage import Store, open_store
from workers.streams import Digest

VERIFY, REHEARSE = "verify", "rehearse"
"""Names of the scheduled jobs, which verify the newest full archive: by its structure, and by restoring it."""
ON_HOSTS = ("structure", "restore")
"""The levels that work where the components are, under their leases; they do not go on beside a restore."""
BAD = (IntegrityError, ComparisonError, ObjectNotFound)
"""Errors that say something of the archive; all others say only that it could not be verified."""


@app.task(name="tasks.verify.verify_archive")
def verify_archive(
    name: str | None = None,
    *,
    level: str = "structure",
    store: str = "store",
    job: str = "manual",
    scheduled_at: str | None = None,
) -> str | None:
    """Start the verification of an archive, by default the newest full one, and return the id of its run.

    ``store`` is the table of the settings for where it lies. A job runs once for ``scheduled_at`` (ISO 8601); a second
    call returns ``None``. Raises ``ObjectNotFound`` when there is no such archive, ``Permanent`` for an unknown level or
    for what the settings do not know.
    """
    if level not in LEVELS:
        raise Permanent(f"there is no level {level!r}; there are {', '.join(LEVELS)}")
    settings = get_settings()
    opened = open_store(settings.store_of(store))
    key = _find(opened, store, name) if name else _newest_full()
    components = _components(opened, key)
    if level in ON_HOSTS and (
        unknown := [component for component in components if component not in settings.components]
    ):
        raise Permanent(f"the settings know no component {', '.join(unknown)}, which {key} holds")
    when = datetime.fromisoformat(scheduled_at) if scheduled_at else None
    run = catalog.open_run(
        Kind.VERIFY,
        job=job,
        components=components,
        archive=key,
        options={"level": level},
        store=store,
        scheduled_at=when,
    )
    if run is None:
        return None
    begin(run)
    return run.id


def _newest_full() -> str:
    for artifact in catalog.list_artifacts():
        if archive.is_full(artifact.key):
            return artifact.key
    raise ObjectNotFound("there is no full archive to verify yet")


def _find(store: Store, table: str, name: str) -> str:
    """Return the key of the archive that ``name`` means, even of one that the catalogue knows and the store has lost."""
    try:
        return archive.resolve(store, name)
    except ObjectNotFound:
        for artifact in catalog.list_artifacts() if table == "store" else ():
            if archive.means(name, artifact.key):
                return artifact.key
        raise


def _components(store: Store, key: str) -> list[str]:
    """Return what an archive holds by its record; nothing without a sound one, which the first level reports."""
    try:
        parts = archive.read_sidecar(store, key).metadata.parts
    except BAD:
        return []
    return list(dict.fromkeys(part.component for part in parts))


@app.task(bind=True, name="tasks.verify.verify_bytes")
def verify_bytes(self: Task[Any, Any], run_id: str, key: str, table: str, level: str) -> dict[str, Any]:
    """Compare the object's size, and from ``checksum`` on each of its bytes, with the record; open it for ``structure``."""

    def work(_lease: Lease) -> dict[str, Any]:
        store, progress = open_store(get_settings().store_of(table)), Progress(self, "archive")
        with progress.reporting():
            if level == "structure":
                parts = archive.verify(store, key, progress=progress).parts
                return {"parts": len(parts)}
            return compare_object(store, key, progress=progress if level == "checksum" else None)

    return perform(self, f"run-{run_id}", lambda lease: _judged(work, lease))


@app.task(bind=True, name="tasks.verify.verify_component")
def verify_component(
    self: Task[Any, Any], run_id: str, key: str, table: str, level: str, name: str
) -> dict[str, Any]:
    """On the component's host, read its parts by their format, or with ``restore`` bring them back in a scratch place."""
    component = get_settings().components[name]

    def work(lease: Lease) -> dict[str, Any]:
        sweep(component.runtime, name)
        store, progress = open_store(get_settings().store_of(table)), Progress(self, name)
        with progress.reporting():
            if level == "restore":
                chain = parts_of(store, key, name)
                read = reader(store, chain, progress)
                found = component.rehearse(Restore(run_id, [part for _, part in chain], read, store=store))
            else:
                parts = [part for part in archive.read_metadata(store, key).parts if part.component == name]
                for part, chunks in archive.read_parts(store, key, parts):
                    plain = progress.add(part.name, part.plain_size).through(chunks)
                    component.check(part, plain)
                    for _ in plain:  # whatever the check left, so that the digests are compared
                        pass
                found = {"parts": len(parts)}
        lease.check()
        return found

    return perform(self, name, lambda lease: _judged(work, lease))


def _judged(work: Callable[[Lease], dict[str, Any]], lease: Lease) -> dict[str, Any]:
    """Do ``work`` and return what it found, or as ``bad`` what is wrong with the archive."""
    try:
        return {"found": work(lease)}
    except BAD as error:
        return {"bad": str(error)}


def compare_object(store: Store, key: str, *, progress: Progress | None) -> dict[str, Any]:
    """Compare an archive with the record beside it: its size, and with ``progress`` the digest of all its bytes.

    The archives that it needs must be there. Needs no private key. Raises ``IntegrityError``, ``ObjectNotFound``.
    """
    record = archive.read_sidecar(store, key)
    archives_of(store, key)
    size = store.stat(key).size
    if size != record.size:
        raise IntegrityError(f"{key} has {size} bytes, recorded were {record.size}")
    archive.require_size(key, size)
    if progress is None:
        return {"bytes": size}
    digest = Digest()
    for _ in progress.add(key.rpartition("/")[2], size).through(digest.through(store.get(key))):
        pass
    if (digest.size, digest.sha256) != (record.size, record.sha256):
        raise IntegrityError(f"{key} has the SHA-256 {digest.sha256}, recorded was {record.sha256}")
    return {"bytes": size, "sha256": digest.sha256}


class VerifyWorkflow:
    """The levels one after another; on the deeper ones, the components at the same time."""

    first = LEVELS[0]

    def work(self, run: Run, phase: str) -> list[Work]:
        where = (run.id, run.archive, run.store, phase)
        steps = []
        if phase != "restore":
            steps = [Work("archive", "tasks.verify.verify_bytes", where, CONTROL, f"run-{run.id}")]
        if phase in ON_HOSTS:
            components = get_settings().components
            steps += [
                Work(
                    name,
                    "tasks.verify.verify_component",
                    (*where, name),
                    queue_of(components[name].host),
                    name,
                )
                for name in run.components
            ]
        return steps

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        """Write to the ledger what this level showed, and go on to the next one while all is good."""
        if failed := [f"{phase} {step.name}: {step.error}" for step in steps if step.error]:
            catalog.note(run.id, cause="it could not be verified: " + "; ".join(failed))
            return None
        results = {step.name: step.result or {} for step in steps}
        bad = [f"{name}: {result['bad']}" for name, result in results.items() if "bad" in result]
        details: dict[str, Any] = {name: result.get("found") for name, result in results.items()}
        causes = [f"{phase}: {'; '.join(bad)}"] if bad else []
        try:
            proofs.enter(run, level=phase, ok=not bad, details={"wrong": bad} if bad else details)
        except BackupError as error:
            causes.append(f"what {phase} showed could not be written beside the archive: {error}")
        if causes:
            catalog.note(run.id, cause="; ".join(causes))
            return None
        catalog.note(run.id, outcome={phase: details})
        asked = LEVELS.index(run.options["level"])
        following = LEVELS[LEVELS.index(phase) + 1] if LEVELS.index(phase) < asked else None
        if following in ON_HOSTS and (restores := catalog.list_runs(state=State.RUNNING, kind=Kind.RESTORE)):
            catalog.note(run.id, cause=f"{following} was not looked at: {gave_way(restores[0])}")
            return None
        return following


def gave_way(restore: Run) -> str:
    """Say why a verification ended that would have worked on hosts beside a restore."""
    return f"it gave way to the restore {restore.id}"


def make_way_for(restore: Run) -> None:
    """End the verifications that work on hosts: a restore is not kept waiting for their leases, nor meets their scratch places."""
    for run in catalog.list_runs(state=State.RUNNING, kind=Kind.VERIFY):
        if run.phase in ON_HOSTS:
            end_run(run, f"{run.phase} was not ended: {gave_way(restore)}")


def note_restored(run: Run) -> None:
    """Write a completed restore to the ledger; of some of the archive only, it is ``partial``, and no proof of the whole.

    Raises what the store raises.
    """
    settings = get_settings()
    store = open_store(settings.store_of(run.store))
    held = {part.component for part in archive.read_metadata(store, str(run.archive)).parts}
    whole = held <= set(run.components) and all(
        check_options(settings.components[name].restore_options, run.options, name).everything
        for name in run.components
    )
    details: dict[str, Any] = {"restored": run.components}
    if run.options:
        details["options"] = run.options
    if not whole:
        details[catalog.PARTIAL] = True
    proofs.enter(run, level="restore", ok=True, details=details)


WORKFLOWS[Kind.VERIFY] = VerifyWorkflow()
