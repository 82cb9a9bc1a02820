"""The tables of the catalogue; times are UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, DateTime, Enum, TypeDecorator, UniqueConstraint, false
from sqlmodel import Field, SQLModel

RUN_ID_FORMAT = "%Y%m%d_%H%M%S"


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
    """Deletes archives."""
    REBUILD = "rebuild"
    IMPORT = "import"
    """Takes archives of other makers into the catalogue."""


def _text(members: type[StrEnum]) -> Any:
    """Return the column type of an enumeration: text, so that a later version can add members."""
    return Enum(members, native_enum=False, length=16)


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
    options: dict[str, Any] = Field(
        default_factory=dict, sa_column=Column(JSON, nullable=False, server_default="{}")
    )
    """What was asked of it beside the components; see `workers.component.Options`."""
    store: str = Field(default="store", sa_column_kwargs={"server_default": "store"})
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
    deleting: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    """Its deletion was begun: it is no backup any more, and the next prune ends what an earlier one could not."""


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
