"""Copies of archives and WAL in a second store: what is not there or differs, verified, recorded.

A run plans, then copies one archive a phase, the newest first, then WAL. What was copied stays copied: a run that
failed is gone on with by the next.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from celery import Task

from tasks import archive
from tasks.proofs import drop_proofs
from tasks.runs import WORKFLOWS, Work, begin
from tasks.step import perform
from tasks.surveys import backup_of, keeps
from workers import catalog
from workers.app import app
from workers.catalog import Artifact, Copy, Kind, Run, State, Step
from workers.errors import IntegrityError, ObjectNotFound, Permanent
from workers.hosts import CONTROL
from workers.locks import Lease
from workers.progress import Progress
from workers.sections import OffsiteSettings
from workers.settings import get_settings
from workers.storage import Store, StoredObject, open_store
from workers.streams import Digest

OFFSITE = "offsite"
"""Name of the scheduled job, and of the lease under which copies are made."""
ARCHIVES = ("full_system/", "components/")
WAL = "wal/"
COLLECTIONS, MANIFESTS = "/collections/", "/manifests/"
COMPARED = ("exists", "checksum")
"""The levels of verification that compare a copy with its record, as copying does, and no more."""


@app.task(name="tasks.offsite.copy_offsite")
def copy_offsite(*, job: str = "manual", scheduled_at: str | None = None) -> str | None:
    """Start copying what the offsite store lacks and return the run's id; the running one's when there is one.

    Returns ``None`` when the job had a run for ``scheduled_at`` already. Raises ``Permanent`` without an offsite store.
    """
    get_settings().store_of(OFFSITE)
    for running in catalog.list_runs(state=State.RUNNING):
        if running.kind is Kind.COPY:
            return running.id
    when = datetime.fromisoformat(scheduled_at) if scheduled_at else None
    run = catalog.open_run(Kind.COPY, job=job, components=[], store=OFFSITE, scheduled_at=when)
    if run is None:
        return None
    begin(run)
    return run.id


@app.task(bind=True, name="tasks.offsite.plan_copies")
def plan_copies(self: Task[Any, Any]) -> dict[str, Any]:
    """Find out which archives the offsite store lacks, or has otherwise."""
    return perform(self, OFFSITE, lambda _lease: {"copies": lacking(_offsite())})


@app.task(bind=True, name="tasks.offsite.copy_archive")
def copy_archive(self: Task[Any, Any], key: str) -> dict[str, Any]:
    """Copy one archive and its record, and note the copy in the catalogue."""

    def work(lease: Lease) -> dict[str, Any]:
        found = [artifact for artifact in catalog.list_artifacts() if artifact.key == key]
        if not found:
            return {"copied": False}  # retention removed it meanwhile
        with _copier(self, lease) as copying:
            copy = copying.archive(found[0])
            if key in _found_damaged():  # that was said of what has been replaced
                drop_proofs(copying.target, key)
                catalog.drop_verifications(key, OFFSITE)
            catalog.add_copy(copy)
        return {"copied": True}

    return perform(self, OFFSITE, work)


@app.task(bind=True, name="tasks.offsite.copy_wal")
def copy_wal(self: Task[Any, Any]) -> dict[str, Any]:
    """Copy the WAL that the offsite store lacks."""

    def work(lease: Lease) -> dict[str, Any]:
        with _copier(self, lease) as copying:
            return {"objects": copying.wal()}

    return perform(self, OFFSITE, work)


def wanted(artifact: Artifact, offsite: OffsiteSettings) -> bool:
    """Whether the settings ask for a copy of an archive."""
    if artifact.key.startswith(ARCHIVES[0]):
        return "full" in offsite.what
    kinds = {part["kind"] for part in artifact.details["parts"]}
    return "components" in offsite.what or ("base" in offsite.what and "postgres-base" in kinds)


def lacking(offsite: OffsiteSettings) -> list[str]:
    """Return the keys of the wanted archives that the offsite store lacks, or has otherwise or damaged.

    The newest come first, but none before an archive that it needs.
    Those that its own retention would delete at once are not wanted. Makes the catalogue's copies those that are there:
    what is gone is forgotten, what is there and unknown noted.
    """
    target = open_store(offsite.store)
    there = {item.key: item.size for prefix in ARCHIVES for item in target.list(prefix)}
    known = {copy.key: copy for copy in catalog.list_copies()}
    for key, copy in known.items():
        if there.get(key) != copy.size or archive.sidecar_key(key) not in there:
            catalog.drop_copy(key)
    artifacts = catalog.list_artifacts()
    missing, damaged = [], _found_damaged()
    for artifact in artifacts:
        if wanted(artifact, offsite):
            copied, key = known.get(artifact.key), artifact.key
            if there.get(key) != artifact.size or archive.sidecar_key(key) not in there or key in damaged:
                missing.append(artifact.key)
            elif copied is None or copied.sha256 != artifact.sha256:
                if _is_recorded(target, artifact):
                    catalog.add_copy(_copy_of(artifact))
                else:
                    missing.append(artifact.key)
    kept = keeps(OFFSITE, _candidates(artifacts, target, there, offsite))
    wanting = [key for key in missing if key in kept]
    needs = {artifact.key: backup_of(artifact, None).needs for artifact in artifacts}
    with_parents = (one for key in wanting for one in (*sorted(needs[key]), key))
    return [one for one in dict.fromkeys(with_parents) if one in wanting]


def _candidates(
    artifacts: Iterable[Artifact], target: Store, there: Collection[str], offsite: OffsiteSettings
) -> Iterator[Artifact]:
    """Yield the archives that the offsite store would hold if all wanted ones were copied."""
    here = set()
    for artifact in artifacts:
        here.add(artifact.key)
        if artifact.key in there or wanted(artifact, offsite):
            yield artifact
    for key in sorted(there):
        if archive.is_archive(key) and key not in here:
            with suppress(ObjectNotFound, IntegrityError):  # then it is no copy
                yield archive.artifact_of(archive.read_sidecar(target, key))


def _found_damaged() -> set[str]:
    """Return the keys of the copies whose bytes were found not to be what was recorded, when they were last looked at."""
    newest = {line.key: line for line in catalog.list_verifications() if line.store == OFFSITE}
    return {key for key, line in newest.items() if not line.ok and line.level in COMPARED}


@dataclass(frozen=True)
class Copier:
    """Copies from the main store to the offsite one, under a lease; every copy is compared before it counts."""

    source: Store
    target: Store
    offsite: OffsiteSettings
    lease: Lease
    progress: Progress

    def archive(self, artifact: Artifact) -> Copy:
        """Copy an archive, then its record, unless they are there; what differs there is replaced.

        Raises ``IntegrityError`` when the main store or the copy is not what the catalogue recorded.
        """
        record = archive.sidecar_key(artifact.key)
        stored = _find(self.target, artifact.key)
        if stored and (stored.size != artifact.size or _sha256(self.target, artifact.key) != artifact.sha256):
            if _sha256(self.source, artifact.key) != artifact.sha256:  # even damaged, it may be all there is
                raise IntegrityError(
                    f"{artifact.key} is not what was recorded, neither in the main store nor offsite; neither was touched"
                )
            self.target.delete(record)
            self.target.delete(artifact.key)
            stored = None
        if stored is None:
            self._copy(artifact.key, artifact.size, artifact.sha256)
        text = b"".join(self.source.get(record))
        if archive.parse_sidecar(text, record).sha256 != artifact.sha256:
            raise IntegrityError(f"{record} in the main store is of another archive; it was not copied")
        if _find(self.target, record) and b"".join(self.target.get(record)) != text:
            self.target.delete(record)
        if _find(self.target, record) is None:
            self.target.put(record, [text])
        return _copy_of(artifact)

    def wal(self) -> int:
        """Copy the WAL that is not there, then the records that say how far it reaches; return how many objects."""
        # The records are listed first: what they speak of was in the store before them.
        records = [item for item in self.source.list(WAL) if COLLECTIONS in item.key]
        others = [item for item in self.source.list(WAL) if COLLECTIONS not in item.key]
        # What increments are made of is of use to the main store alone; without it, the next base backup is a full one.
        segments = [item for item in others if MANIFESTS not in item.key]
        there = {item.key: item.size for item in self.target.list(WAL)}
        lacking = [item for item in (*segments, *records) if there.get(item.key) != item.size]
        for item in lacking:
            if item.key in there:
                self.target.delete(item.key)
            self._copy(item.key, item.size, None)
        return len(lacking)

    def _copy(self, key: str, size: int, sha256: str | None) -> None:
        digest, item = Digest(), self.progress.add(PurePosixPath(key).name, size)

        def chunks() -> Iterator[bytes]:
            yield from item.through(digest.through(self.source.get(key)))
            if digest.size != size or digest.sha256 != (sha256 or digest.sha256):
                raise IntegrityError(f"{key} in the main store is not what was recorded; it was not copied")
            self.lease.check()

        self.target.put(key, chunks(), sha256=sha256, sending=Pace(self.offsite.bytes_per_second))
        if self.offsite.read_back and _sha256(self.target, key) != digest.sha256:
            self.target.delete(key)
            raise IntegrityError(f"the offsite copy of {key} is not what was sent; it was removed")


class Pace:
    """Waits, before bytes are sent, so that no more than so many go in a second; lost time is not made up for."""

    def __init__(self, bytes_per_second: int | None) -> None:
        self._bytes_per_second, self._free = bytes_per_second, time.monotonic()

    def __call__(self, size: int) -> None:
        if self._bytes_per_second:
            self._free = max(self._free, time.monotonic()) + size / self._bytes_per_second
            time.sleep(max(0.0, self._free - time.monotonic()))


@contextmanager
def _copier(task: Task[Any, Any], lease: Lease) -> Iterator[Copier]:
    offsite, progress = _offsite(), Progress(task, OFFSITE)
    source, target = open_store(get_settings().store), open_store(offsite.store)
    with progress.reporting():
        yield Copier(source, target, offsite, lease, progress)


def _offsite() -> OffsiteSettings:
    offsite = get_settings().offsite
    if offsite is None:
        raise Permanent("the settings have no [offsite] store")
    return offsite


def _is_recorded(target: Store, artifact: Artifact) -> bool:
    try:
        return archive.read_sidecar(target, artifact.key).sha256 == artifact.sha256
    except IntegrityError:
        return False


def _find(store: Store, key: str) -> StoredObject | None:
    try:
        return store.stat(key)
    except ObjectNotFound:
        return None


def _sha256(store: Store, key: str) -> str:
    digest = Digest()
    for _ in digest.through(store.get(key)):
        pass
    return digest.sha256


def _copy_of(artifact: Artifact) -> Copy:
    return Copy(key=artifact.key, copied=catalog.now(), size=artifact.size, sha256=artifact.sha256)


class OffsiteWorkflow:
    """Plan, then one archive a phase, then WAL. An archive that failed does not keep the next ones from their copy."""

    first = "plan"

    def work(self, run: Run, phase: str) -> list[Work]:
        if phase == "plan":
            return [Work(OFFSITE, "tasks.offsite.plan_copies", (), CONTROL, OFFSITE)]
        if phase == "wal":
            return [Work("wal", "tasks.offsite.copy_wal", (), CONTROL, OFFSITE)]
        key = run.outcome["copies"][int(phase.partition(".")[2])]
        return [Work(PurePosixPath(key).name, "tasks.offsite.copy_archive", (key,), CONTROL, OFFSITE)]

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        if failed := [f"{step.name}: {step.error}" for step in steps if step.error]:
            catalog.note(run.id, cause="; ".join(failed))
            if phase == "plan":
                return None
        if phase == "plan":
            catalog.note(run.id, outcome={"copies": (steps[0].result or {})["copies"]})
        copies = catalog.get_run(run.id).outcome["copies"]
        phases = [
            "plan",
            *(f"copy.{index}" for index in range(len(copies))),
            *(["wal"] if "wal" in _offsite().what else []),
        ]
        position = phases.index(phase) + 1
        return phases[position] if position < len(phases) else None


WORKFLOWS[Kind.COPY] = OffsiteWorkflow()
