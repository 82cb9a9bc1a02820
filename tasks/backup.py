"""Backups: one component's streams into the store, and the run that makes a full-system archive of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime
from typing import Any

from celery import Task
from pydantic import TypeAdapter

from tasks.offsite import copy_offsite, wanted
from tasks.runs import WORKFLOWS, Work, begin
from tasks.step import perform
from workers import catalog, streams
from workers.app import app
from workers.catalog import Artifact, Kind, Run, Step, now
from workers.component import BaseComponent, Part, Source, check_options
from workers.encryption import AGE
from workers.encryption import SUFFIX as ENCRYPTED
from workers.errors import BackupError, ObjectNotFound, Permanent
from workers.hosts import CONTROL, queue_of
from workers.locks import Lease
from workers.progress import Progress
from workers.runtime import sweep
from workers.settings import get_settings
from workers.storage import Store, open_store

FULL_SYSTEM = "full_system"
"""Name of the job that backs up every component."""
SUFFIXES = {"zstd": ".zst", "gzip": ".gz"}
"""What the names of parts end with, by their codec."""
PARTS = TypeAdapter(list[Part])


@app.task(name="tasks.backup.backup_full_system")
def backup_full_system(
    components: Sequence[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    job: str = "manual",
    scheduled_at: str | None = None,
) -> str | None:
    """Start a backup of all components, or of those named, and return the id of its run.

    ``options`` are for one component, and its own (`BaseComponent.backup_options`). ``scheduled_at`` (ISO 8601) is
    beat's: a job runs once for it, and a second call returns ``None``. Raises ``Permanent`` for a component that does
    not exist or when a restore is running, ``SettingsError`` for options that it does not have.
    """
    known = get_settings().components
    chosen = list(known) if components is None else list(components)
    if unknown := [name for name in chosen if name not in known]:
        raise Permanent(f"there is no component {', '.join(unknown)}; there are {', '.join(known)}")
    if options:
        component = known[only(chosen)]
        check_options(component.backup_options, options, chosen[0])
        options = component.completed(options, catalog.list_sound_artifacts())
    when = datetime.fromisoformat(scheduled_at) if scheduled_at else None
    run = catalog.open_run(Kind.BACKUP, job=job, components=chosen, options=options, scheduled_at=when)
    if run is None:
        return None
    if run.cause:
        raise Permanent(f"backup {run.id} was not started: {run.cause}")
    begin(run)
    return run.id


@app.task(bind=True, name="tasks.backup.backup_component")
def backup_component(
    self: Task[Any, Any], run_id: str, name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Back up one component on its host and return the records of its parts."""
    component = get_settings().components[name]
    progress = Progress(self, name)

    def work(lease: Lease) -> dict[str, Any]:
        parts = store_component(run_id, component, options, lease, progress)
        return {"parts": [part.model_dump(mode="json") for part in parts]}

    return perform(self, name, work)


def only(components: Sequence[str]) -> str:
    """Return the one component that options are for. Raises ``Permanent``."""
    if len(components) != 1:
        raise Permanent(f"options are for one component, not for {', '.join(components)}; name one")
    return components[0]


def store_component(
    run_id: str, component: BaseComponent, options: Mapping[str, Any], lease: Lease, progress: Progress
) -> list[Part]:
    """Store the streams of a component, several at the same time, and return their records.

    A component that an earlier attempt finished is not done again; what an unfinished attempt left is removed first.
    Raises what the streams raised, after all of them ended; the lease must be held to commit.
    """
    settings = get_settings()
    store = open_store(settings.store)
    record = f"{parts_prefix(run_id)}{component.name}.json"
    try:
        return PARTS.validate_json(b"".join(store.get(record)))
    except ObjectNotFound:
        pass  # no attempt has finished yet
    sweep(component.runtime, component.name)
    for leftover in list(store.list(f"{parts_prefix(run_id)}{component.name}.")):
        store.delete(leftover.key)
    sources = component.sources(options)
    with ThreadPoolExecutor(max_workers=settings.limits.streams, thread_name_prefix=component.name) as pool:
        jobs = [
            pool.submit(_store_source, store, run_id, component, source, progress, lease)
            for source in sources
        ]
        try:
            with progress.reporting():
                wait(jobs)
        except BaseException:
            # The time limit, or somebody's order to end: what the threads read from must end, so that they do.
            sweep(component.runtime, component.name)
            raise
    failures = [error for job in jobs if (error := job.exception())]
    if len(failures) > 1 and all(isinstance(error, BackupError) for error in failures):
        raise Permanent("; ".join(map(str, failures)))
    parts = [job.result() for job in jobs]
    store.put(record, _while_held(iter([PARTS.dump_json(parts)]), lease))
    return parts


def _store_source(
    store: Store, run_id: str, component: BaseComponent, source: Source, progress: Progress, lease: Lease
) -> Part:
    settings = get_settings()
    recipients = settings.encryption.recipients
    name = f"{source.name}{SUFFIXES[source.codec]}{ENCRYPTED if recipients else ''}"
    started = now()
    item = progress.add(source.label, source.expected)
    chunks = _while_held(item.through(source.chunks), lease)
    written = streams.write(
        store,
        parts_prefix(run_id) + name,
        chunks,
        level=settings.compression_level,
        recipients=recipients,
        codec=source.codec,
    )
    return Part(
        name=name,
        component=component.name,
        host=component.host,
        kind=source.kind,
        codec=source.codec,
        encryption=AGE if recipients else None,
        size=written.size,
        sha256=written.sha256,
        plain_size=written.plain_size,
        plain_sha256=written.plain_sha256,
        started=started,
        finished=now(),
        holds=source.holds,
    )


def _while_held(chunks: Iterator[bytes], lease: Lease) -> Iterator[bytes]:
    yield from chunks
    lease.check()  # raised before the end of the stream, so that the store does not commit it


def parts_prefix(run_id: str) -> str:
    """Return the prefix of the store keys of a run's parts."""
    return f"parts/{run_id}/"


class BackupWorkflow:
    """The components at the same time, then the archive."""

    first = "backup"

    def work(self, run: Run, phase: str) -> list[Work]:
        components = get_settings().components
        if phase == "backup":
            task = "tasks.backup.backup_component"
            return [
                Work(name, task, (run.id, name, run.options), queue_of(components[name].host), name)
                for name in run.components
            ]
        return [Work("archive", "tasks.archive.assemble", (run.id,), CONTROL, f"run-{run.id}")]

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        if failed := [f"{step.name}: {step.error}" for step in steps if step.error]:
            catalog.note(run.id, cause="; ".join(failed))
        elif phase == "backup":
            parts = [Part.model_validate(part) for step in steps for part in (step.result or {})["parts"]]
            if remarks := [f"{part.component}: {line}" for part in parts for line in part.remarks]:
                catalog.note(run.id, outcome={"warnings": remarks})
            return "archive"
        elif steps and steps[0].result:
            artifact = Artifact.model_validate(steps[0].result["artifact"])
            catalog.add_artifact(artifact)
            catalog.finish_run(run.id, archive=artifact.key)
            offsite = get_settings().offsite
            if offsite and wanted(artifact, offsite):
                copy_offsite.delay(job="after a backup")
        drop_superseded_parts(run)
        return None


def drop_superseded_parts(run: Run) -> None:
    """Remove the parts of ended runs that are no longer of use.

    A complete run has them in its archive. Those of a failed run are kept for inspection until a later run of at least
    the same components ends.
    """
    store = open_store(get_settings().store)
    ended = {
        other.id
        for other in catalog.list_runs()
        if other.finished and other.id < run.id and set(other.components) <= set(run.components)
    }
    for item in list(store.list("parts/")):
        owner = item.key.split("/")[1]
        complete = owner == run.id and not catalog.get_run(run.id).cause
        if complete or owner in ended:
            try:
                store.delete(item.key)
            except ObjectNotFound:
                continue


WORKFLOWS[Kind.BACKUP] = BackupWorkflow()
