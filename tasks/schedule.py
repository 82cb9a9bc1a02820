"""What beat starts: backups at their times, and a look at the configuration files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

from celery.schedules import crontab

from tasks.backup import FULL_SYSTEM, backup_full_system
from tasks.config_changes import recorded
from tasks.offsite import OFFSITE, copy_offsite
from tasks.prune import PRUNE, prune
from tasks.recoverable import base_backups
from tasks.verify import REHEARSE, VERIFY, verify_archive
from tasks.wal import COLLECT_WAL, collect_wal, wal_components
from workers import catalog
from workers.app import app
from workers.catalog import Artifact, Kind, Run, State, now
from workers.sections import parse_cron
from workers.settings import Settings, get_settings

BASE, INCREMENTAL = "base", "incremental"
"""Names of the scheduled jobs that make full base backups, and incremental ones."""
A_YEAR_OF_MINUTES = 366 * 24 * 60
CLOCK_SKEW = timedelta(seconds=30)
"""How far the clock of this host may be behind beat's; less than the minute that schedules are made of."""


@app.task(name="tasks.schedule.start_scheduled")
def start_scheduled(job: str) -> str | None:
    """Start the run of a scheduled job and return its run's id, ``None`` when it has been started already.

    Which time it is for follows from the schedule, not from the moment of sending: a beat that was down sends one
    backup for the last time it missed, and two beats start one backup.
    """
    settings = get_settings()
    due = latest_due(parse_cron(cron_lines(settings)[job]), now() + CLOCK_SKEW)
    run_id: str | None = _starter(job, settings)(job=job, scheduled_at=due.isoformat())
    return run_id


def _starter(job: str, settings: Settings) -> Callable[..., str | None]:
    """Return what starts the run of a job, given the ``job`` and when it was ``scheduled_at``."""
    starters: dict[str, Callable[..., str | None]] = {
        FULL_SYSTEM: backup_full_system,
        COLLECT_WAL: collect_wal,
        BASE: partial(_start_base_backups, list(wal_components(settings)), "full"),
        INCREMENTAL: partial(_start_base_backups, _incremental(settings), "incremental"),
        OFFSITE: copy_offsite,
        PRUNE: prune,
        VERIFY: partial(verify_archive, level="structure"),
        REHEARSE: _start_rehearsals,
    }
    return starters.get(job) or partial(backup_full_system, [job])


def _incremental(settings: Settings) -> list[str]:
    return [name for name, component in wal_components(settings).items() if component.incremental]


def _start_base_backups(components: Sequence[str], base: str, *, job: str, scheduled_at: str) -> str | None:
    """Start a base backup of each component, and return the id of one of their runs."""
    started = [
        backup_full_system([name], options={"base": base}, job=f"{name}-{job}", scheduled_at=scheduled_at)
        for name in components
    ]
    return next((run_id for run_id in started if run_id), None)


def _start_rehearsals(*, job: str, scheduled_at: str) -> str | None:
    """Start restoring the newest full archive, and the newest base backup of each component, in scratch places.

    Returns the id of one of their runs.
    """
    newest = {name: base_backups(name, catalog.list_artifacts()) for name in wal_components(get_settings())}
    started = [verify_archive(level="restore", job=job, scheduled_at=scheduled_at)]
    started += [
        verify_archive(found[-1].archive, level="restore", job=f"{name}-{job}", scheduled_at=scheduled_at)
        for name, found in newest.items()
        if found
    ]
    return next((run_id for run_id in started if run_id), None)


@app.task(name="tasks.schedule.look_at")
def look_at(component: str) -> None:
    """Look, on its host, whether a watched component changed, and pass its digest on to the control workers."""
    looked = now().isoformat()
    start_if_changed.delay(component, get_settings().components[component].content_digest(), looked)


@app.task(name="tasks.schedule.start_if_changed")
def start_if_changed(component: str, content_sha256: str, looked: str) -> str | None:
    """Start a backup of a watched component, and return its run's id, unless its newest backup has this digest.

    Only backups of it alone count, since retention drops those of the whole system sooner. A backup of other
    components, too, may take hours, and is not waited for; a restore is. A look at a time (ISO 8601) before the newest
    backup tells nothing: it waited for a worker.
    """
    newest = newest_alone(component)
    if newest and recorded(newest, component).get("content_sha256") == content_sha256:
        return None
    if newest and newest.created > datetime.fromisoformat(looked):
        return None
    if any(_holds_up(run, component) for run in catalog.list_runs(state=State.RUNNING)):
        return None
    run_id: str | None = backup_full_system([component], job=f"{component}-changed")
    return run_id


def _holds_up(run: Run, component: str) -> bool:
    return run.kind is Kind.RESTORE or (run.kind is Kind.BACKUP and list(run.components) == [component])


def newest_alone(component: str) -> Artifact | None:
    """Return the newest backup of a component alone, ``None`` when there is none."""
    for artifact in catalog.list_artifacts():
        if {part["component"] for part in artifact.details["parts"]} == {component}:
            return artifact
    return None


def cron_lines(settings: Settings) -> dict[str, str]:
    """Return the cron line of each scheduled job; those of single components have their names."""
    schedule = settings.schedule
    lines = {FULL_SYSTEM: schedule.full_system, **schedule.components, PRUNE: schedule.prune}
    lines |= {VERIFY: schedule.verify, REHEARSE: schedule.rehearse}
    if wal_components(settings):
        lines |= {COLLECT_WAL: schedule.wal, BASE: schedule.base}
    if _incremental(settings):
        lines[INCREMENTAL] = schedule.incremental
    if settings.offsite:
        lines[OFFSITE] = schedule.offsite
    return {job: line for job, line in lines.items() if line}


def latest_due(schedule: crontab, moment: datetime) -> datetime:
    """Return the last minute, up to ``moment``, that the schedule names. Raises ``ValueError`` if none in a year."""
    minute = moment.astimezone(UTC).replace(second=0, microsecond=0)
    for _ in range(A_YEAR_OF_MINUTES):
        fields = {
            "minute": minute.minute,
            "hour": minute.hour,
            "day_of_week": minute.isoweekday() % 7,
            "day_of_month": minute.day,
            "month_of_year": minute.month,
        }
        if all(value in getattr(schedule, name) for name, value in fields.items()):
            return minute
        minute -= timedelta(minutes=1)
    raise ValueError("the schedule names no minute of the last year")
