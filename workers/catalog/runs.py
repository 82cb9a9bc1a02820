"""How runs are opened, go on from phase to phase, and end; many workers may do so at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.exc import IntegrityError as UniqueViolation
from sqlmodel import col, select, update

from workers.catalog.database import session
from workers.catalog.models import RUN_ID_FORMAT, Kind, Run, State, Step, now
from workers.errors import CatalogError

BESIDE_NO_RESTORE = (Kind.BACKUP, Kind.RESTORE, Kind.COLLECT)


def open_run(
    kind: Kind,
    *,
    job: str,
    components: Sequence[str],
    archive: str | None = None,
    options: Mapping[str, Any] | None = None,
    store: str = "store",
    scheduled_at: datetime | None = None,
) -> Run | None:
    """Open a run, and return it; ``None`` when the job had a run for ``scheduled_at`` already.

    What reads or writes components does not start beside a restore: while one is running, the run comes back failed,
    with the cause.
    """
    start = now().replace(microsecond=0)
    while True:
        run = Run(
            id=start.strftime(RUN_ID_FORMAT),
            kind=kind,
            job=job,
            scheduled_at=scheduled_at,
            components=list(components),
            archive=archive,
            options=dict(options or {}),
            store=store,
            started=now(),
        )
        try:
            with session() as catalog:
                restore = select(Run.id).where(Run.state == State.RUNNING, Run.kind == Kind.RESTORE)
                if kind in BESIDE_NO_RESTORE and (other := catalog.exec(restore).first()):
                    run.state, run.finished = State.FAILED, run.started
                    run.cause = f"the restore {other} was running"
                catalog.add(run)
            return run
        except UniqueViolation:
            if scheduled_at and find_scheduled(job, scheduled_at):
                return None
            start += timedelta(seconds=1)


def find_scheduled(job: str, scheduled_at: datetime) -> Run | None:
    """Return the run of a job for a scheduled time, if it has had one."""
    with session() as catalog:
        return catalog.exec(select(Run).where(Run.job == job, Run.scheduled_at == scheduled_at)).first()


def get_run(run_id: str) -> Run:
    """Return the run. Raises ``CatalogError`` when there is none."""
    with session() as catalog:
        run = catalog.get(Run, run_id)
    if run is None:
        raise CatalogError(f"there is no run {run_id} in the catalogue")
    return run


def list_runs(
    *, state: State | None = None, kind: Kind | None = None, limit: int | None = None
) -> Sequence[Run]:
    """Return runs, the newest first."""
    query = select(Run).order_by(col(Run.id).desc()).limit(limit)
    if state:
        query = query.where(Run.state == state)
    if kind:
        query = query.where(Run.kind == kind)
    with session() as catalog:
        return catalog.exec(query).all()


def enter_phase(run_id: str, *, leaving: str, entering: str, steps: Sequence[Step]) -> bool:
    """Move a running run from one phase to the next, with its steps; ``False`` when somebody else did already."""
    with session() as catalog:
        moved = catalog.exec(
            update(Run)
            .where(col(Run.id) == run_id, col(Run.state) == State.RUNNING, col(Run.phase) == leaving)
            .values(phase=entering)
        )
        if moved.rowcount == 0:
            return False
        catalog.add_all(steps)
    return True


def steps_of(run_id: str, phase: str | None = None) -> Sequence[Step]:
    """Return the steps of a run, or of one phase of it, in the order they were sent."""
    query = select(Step).where(Step.run_id == run_id).order_by(col(Step.sent), col(Step.name))
    with session() as catalog:
        return catalog.exec(query.where(Step.phase == phase) if phase is not None else query).all()


def save_step(step: Step) -> None:
    """Write a step as it is now."""
    with session() as catalog:
        catalog.merge(step)


def note(run_id: str, *, cause: str | None = None, outcome: dict[str, Any] | None = None) -> None:
    """Add to what a run found out; its first cause stays."""
    with session() as catalog:
        run = catalog.get_one(Run, run_id, with_for_update=True)
        run.cause = run.cause or cause
        run.outcome = {**run.outcome, **(outcome or {})}


def finish_run(run_id: str, *, cause: str | None = None, archive: str | None = None) -> bool:
    """End a running run: complete, or failed when there is a cause. ``False`` when it had ended already."""
    with session() as catalog:
        run = catalog.get_one(Run, run_id, with_for_update=True)
        if run.state is not State.RUNNING:
            return False
        run.cause = run.cause or cause
        run.state = State.FAILED if run.cause else State.COMPLETE
        run.archive = archive or run.archive
        run.finished = now()
    return True
