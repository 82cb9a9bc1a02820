"""Collecting PostgreSQL's WAL: the task, its schedule's job, and what follows from a gap."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from celery import Task

from tasks import collecting
from tasks.backup import backup_full_system
from tasks.components.postgres import Component
from tasks.recoverable import Recoverable, clusters
from tasks.runs import WORKFLOWS, Work, begin
from tasks.step import perform
from workers import catalog
from workers.app import app
from workers.catalog import Kind, Run, State, Step
from workers.errors import BackupError, LeaseUnavailable, Permanent
from workers.hosts import queue_of
from workers.locks import Lease
from workers.progress import Progress
from workers.settings import Settings, get_settings
from workers.storage import open_store

log = logging.getLogger(__name__)
COLLECT_WAL = "collect_wal"
"""Name of the scheduled job."""
BASE_OPTIONS = {"base": "full"}


def wal_components(settings: Settings) -> dict[str, Component]:
    """Return the components whose WAL is collected."""
    return {
        name: component
        for name, component in settings.components.items()
        if isinstance(component, Component) and component.wal_archive
    }


@app.task(name="tasks.wal.collect_wal")
def collect_wal(
    components: Sequence[str] | None = None, *, job: str = "manual", scheduled_at: str | None = None
) -> str | None:
    """Start a collection of the WAL of all PostgreSQL components that have a ``wal_archive``, or of those named.

    Returns the id of its run. A job runs once for ``scheduled_at`` (ISO 8601); a second call returns ``None``. Raises
    ``Permanent`` when a restore is running, or for a component without WAL.
    """
    known = wal_components(get_settings())
    chosen = list(known) if components is None else list(components)
    if unknown := [name for name in chosen if name not in known]:
        raise Permanent(f"{', '.join(unknown)}: no postgres component of this name has a wal_archive")
    if not chosen:
        raise Permanent("no postgres component has a wal_archive, so there is no WAL to collect")
    when = datetime.fromisoformat(scheduled_at) if scheduled_at else None
    run = catalog.open_run(Kind.COLLECT, job=job, components=chosen, scheduled_at=when)
    if run is None:
        return None
    if run.cause:
        raise Permanent(f"collection {run.id} was not started: {run.cause}")
    begin(run)
    return run.id


@app.task(bind=True, name="tasks.wal.collect_component")
def collect_component(self: Task[Any, Any], run_id: str, name: str) -> dict[str, Any]:
    """Collect the WAL of one component on its host and return the record of it."""
    component = wal_components(get_settings())[name]
    progress = Progress(self, name)

    def work(lease: Lease) -> dict[str, Any]:
        with progress.reporting():
            return collecting.collect(run_id, component, lease, progress.add("WAL", None))

    return perform(self, component.wal_name, work)


class CollectWorkflow:
    """The components at the same time; then what their WAL is worth."""

    first = "collect"

    def work(self, run: Run, phase: str) -> list[Work]:
        known = wal_components(get_settings())
        return [
            Work(
                name,
                "tasks.wal.collect_component",
                (run.id, name),
                queue_of(known[name].host),
                known[name].wal_name,
            )
            for name in run.components
        ]

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        """Note what was collected, and let a new base backup follow where the newest WAL is of no use without one."""
        causes = [f"{step.name}: {step.error}" for step in steps if step.error]
        outcome: dict[str, Any] = {}
        for step in steps:
            if step.result and not step.error:
                outcome[step.name] = dict(step.result)
                try:
                    found = find_cluster(step.name, step.result["system_identifier"])
                    outcome[step.name]["gaps"] = [str(gap) for gap in found.gaps]
                    if found.needs_base:
                        outcome[step.name]["base_backup"] = started = _start_base_backup(run, found)
                        causes += [f"{step.name}: {gap}; {started}" for gap in found.gaps if gap.end is None]
                except BackupError as error:
                    causes.append(f"{step.name}: {error}")
        catalog.note(run.id, cause="; ".join(causes) or None, outcome=outcome)
        return None


def require_no_collection(components: Sequence[str]) -> None:
    """Raise ``LeaseUnavailable`` while a collection of WAL is running, which a restore of ``components`` must not meet.

    None begins while the restore's run is open.
    """
    for other in catalog.list_runs(state=State.RUNNING):
        if other.kind is Kind.COLLECT and set(other.components) & set(components):
            raise LeaseUnavailable(f"the collection of WAL {other.id} is running")


def find_cluster(component: str, system_identifier: str) -> Recoverable:
    """Return what a cluster can be brought back to, as the store and the catalogue say now."""
    found = clusters(open_store(get_settings().store), component, catalog.list_sound_artifacts())
    return next(one for one in found if one.system_identifier == system_identifier)


def _start_base_backup(run: Run, found: Recoverable) -> str:
    """Start a base backup, once for a collection, unless one is running; return what was done, for people."""
    name = found.component
    for other in catalog.list_runs(state=State.RUNNING):
        if other.kind is Kind.BACKUP and name in other.components and other.options.get("base"):
            return f"the base backup {other.id} is running"
    try:
        started = backup_full_system(
            [name], options=BASE_OPTIONS, job=f"{name}-base", scheduled_at=run.started.isoformat()
        )
    except BackupError as error:
        log.warning("no base backup of %s could be started: %s", name, error)
        return f"a new base backup could not be started: {error}"
    return f"the base backup {started} was started" if started else "a base backup was started"


WORKFLOWS[Kind.COLLECT] = CollectWorkflow()
