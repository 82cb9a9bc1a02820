"""The catalogue: runs, their steps, and the artifacts they made. Only control workers write it; times are UTC."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Engine,
    Enum,
    TypeDecorator,
    UniqueConstraint,
    event,
    make_url,
)
from sqlalchemy.exc import IntegrityError as UniqueViolation
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Field, Session, SQLModel, col, create_engine, select, update

from workers.errors import CatalogError
from workers.sections import CatalogSettings
from workers.settings import get_settings

RUN_ID_FORMAT = "%Y%m%d_%H%M%S"
TABLES_LOCK = 0x61696D62
"""Number of the PostgreSQL advisory lock under which the tables are created."""


class State(StrEnum):
    """How a run stands."""

    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


class Kind(StrEnum):
    """What a run does."""

    BACKUP = "backup"
    RESTORE = "restore"
    PLAN = "plan"
    COLLECT = "collect"
    """Collects WAL."""
    VERIFY = "verify"
    COPY = "copy"
    """Copies to the offsite store."""
    PRUNE = "prune"


def _text(members: type[StrEnum]) -> Any:
    """Return the column type of an enumeration: text, so that a later version can add members."""
    return Enum(members, native_enum=False, length=16)


BESIDE_NO_RESTORE = (Kind.BACKUP, Kind.RESTORE, Kind.COLLECT)


class UTCDateTime(TypeDecorator[datetime]):
    """Aware datetimes, in UTC; SQLite has no time zones of its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Any) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, _dialect: Any) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


def now() -> datetime:
    """Return the time, aware, in UTC."""
    return datetime.now(UTC)


class Run(SQLModel, table=True):
    """One backup or restore. A scheduled run happens once: (job, scheduled_at) is unique."""

    __table_args__ = (UniqueConstraint("job", "scheduled_at"),)

    id: str = Field(primary_key=True)
    """Its start as ``YYYYMMDD_HHMMSS``; a second later when that is taken."""
    kind: Kind = Field(sa_type=_text(Kind))
    job: str
    scheduled_at: datetime | None = Field(default=None, sa_type=UTCDateTime)
    components: list[str] = Field(sa_column=Column(JSON, nullable=False))
    archive: str | None = None
    """Store key of the archive that a backup made, or that a restore reads."""
    options: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    """What was asked of it beside the components; see `workers.component.Options`."""
    store: str = "store"
    """The table of the settings that describes the store it reads: ``store`` or ``offsite``."""
    state: State = Field(default=State.RUNNING, sa_type=_text(State))
    phase: str = ""
    started: datetime = Field(sa_type=UTCDateTime)
    finished: datetime | None = Field(default=None, sa_type=UTCDateTime)
    cause: str | None = None
    """Why it failed, or what went wrong so far in a restore that is being reverted."""
    outcome: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    """What it found out: the parts' records, the lines of a plan."""


class Step(SQLModel, table=True):
    """One task of a phase of a run, on one queue. It has ended when ``finished`` is set."""

    run_id: str = Field(primary_key=True, foreign_key="run.id")
    phase: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    task: str
    args: list[Any] = Field(sa_column=Column(JSON, nullable=False))
    queue: str
    lease: str
    """The lease that whoever works on it holds."""
    task_id: str = Field(index=True)
    attempt: int = 1
    sent: datetime = Field(sa_type=UTCDateTime)
    last_seen: datetime = Field(sa_type=UTCDateTime)
    """When somebody was last known to work on it, or it was last known to wait in its queue."""
    finished: datetime | None = Field(default=None, sa_type=UTCDateTime)
    error: str | None = None
    result: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))


class Artifact(SQLModel, table=True):
    """An archive in the store, with what its metadata.json says."""

    key: str = Field(primary_key=True)
    run_id: str = Field(index=True)
    job: str
    created: datetime = Field(sa_type=UTCDateTime)
    size: int = Field(sa_type=BigInteger)
    sha256: str
    details: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))


class Verification(SQLModel, table=True):
    """The ledger: what was proven of an archive, when, how deeply."""

    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(index=True)
    """Store key of the archive."""
    store: str
    """The table of the settings that describes the store it was read from: ``store`` or ``offsite``."""
    level: str
    ok: bool
    taken: datetime = Field(sa_type=UTCDateTime)
    run_id: str
    details: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """What was compared, or what was wrong."""


class Copy(SQLModel, table=True):
    """A verified copy of an archive in the offsite store."""

    key: str = Field(primary_key=True)
    copied: datetime = Field(sa_type=UTCDateTime)
    size: int = Field(sa_type=BigInteger)
    sha256: str


@functools.lru_cache(maxsize=4)
def _engine(settings: CatalogSettings, _pid: int) -> Engine:
    # A connection must not cross a fork: the process id is part of the key.
    url = make_url(settings.url)
    if settings.password:
        url = url.set(password=settings.password.resolve())
    engine = create_engine(url, pool_pre_ping=True)
    if url.get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # else the driver begins transactions of its own
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA busy_timeout=30000")
            connection.execute("PRAGMA foreign_keys=ON")

        @event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            # A transaction that reads first and writes later would fail at once, without waiting, after a writer.
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        if url.get_backend_name() == "postgresql":
            # Of two workers that start at once, the second must see the tables of the first.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({TABLES_LOCK})")
        SQLModel.metadata.create_all(connection)
    return engine


@contextmanager
def session() -> Iterator[Session]:
    """A transaction on the catalogue: committed at the end, rolled back when the block raises.

    Raises ``CatalogError`` when the database refuses or does not answer.
    """
    try:
        engine = _engine(get_settings().catalog, os.getpid())
        with Session(engine, expire_on_commit=False) as opened, opened.begin():
            yield opened
    except UniqueViolation:
        raise
    except SQLAlchemyError as error:
        raise CatalogError(f"the catalogue failed: {type(error).__name__}: {error.args[0]}") from error


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


def list_runs(*, state: State | None = None, limit: int | None = None) -> Sequence[Run]:
    """Return runs, the newest first."""
    query = select(Run).order_by(col(Run.id).desc()).limit(limit)
    with session() as catalog:
        return catalog.exec(query.where(Run.state == state) if state else query).all()


def list_artifacts() -> Sequence[Artifact]:
    """Return the archives, the newest first."""
    with session() as catalog:
        return catalog.exec(select(Artifact).order_by(col(Artifact.created).desc())).all()


def add_artifact(artifact: Artifact) -> None:
    """Record an archive; recording it again changes nothing."""
    with session() as catalog:
        catalog.merge(artifact)


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
