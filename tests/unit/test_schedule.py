"""When beat sends what, and that a scheduled backup happens once for its time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from celery import Celery
from celery.schedules import crontab
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import backup, schedule
from tasks.components.postgres import Component
from tests.configured import configured, write_settings
from workers import catalog
from workers.catalog import Kind, Run
from workers.sections import LocalStoreSettings, OffsiteSettings, ScheduleSettings, parse_cron
from workers.settings import Settings

ROOT = Path(__file__).parents[2]
APP = Celery(set_as_current=False, timezone="UTC")
DAYS = 6 * 365
MOMENTS = st.timedeltas(timedelta(), timedelta(days=DAYS)).map(datetime(2024, 1, 1, tzinfo=UTC).__add__)


def field(low: int, high: int) -> st.SearchStrategy[str]:
    numbers = st.integers(low, high)
    lists = st.lists(numbers, min_size=1, max_size=3).map(lambda found: ",".join(map(str, found)))
    ranges = st.tuples(numbers, numbers).map(lambda ends: f"{min(ends)}-{max(ends)}")
    return st.just("*") | lists | ranges | st.integers(1, max(2, (high - low) // 2)).map("*/{}".format)


LINES = st.tuples(
    field(0, 59), field(0, 23), st.just("*") | field(1, 28), st.just("*"), st.just("*") | field(0, 6)
)


def following(line: str, moment: datetime) -> datetime:
    """Return when celery's own beat would send a job of this line next after ``moment``."""
    cron: Any = crontab.from_string(line)
    cron.app, cron.nowfun = APP, lambda: moment
    last, delta, _ = cron.remaining_delta(moment)
    found: datetime = last + delta
    return found


@given(fields=LINES, moment=MOMENTS)
@settings(deadline=None, max_examples=40)
def test_the_latest_due_minute_is_one_that_beat_would_send_at_and_none_is_after_it(
    fields: tuple[str, ...], moment: datetime
) -> None:
    line = " ".join(fields)
    try:
        due = schedule.latest_due(parse_cron(line), moment)
    except ValueError:
        assert following(line, moment - timedelta(days=365)) > moment
        return

    assert due <= moment
    assert (due.second, due.microsecond, due.tzinfo) == (0, 0, UTC)
    assert following(line, due - timedelta(seconds=1)) == due
    assert following(line, due) > moment


@pytest.mark.parametrize(
    ("line", "moment", "due"),
    [
        ("0 2 * * *", "2026-11-22T02:00:00", "2026-11-22T02:00:00"),
        ("0 2 * * *", "2026-11-22T01:59:59", "2026-11-21T02:00:00"),
        ("0 2 * * *", "2026-11-22T09:30:00+09:00", "2026-11-21T02:00:00"),
        ("0 */6 * * *", "2026-11-22T17:59:00", "2026-11-22T12:00:00"),
        ("30 4 * * 0", "2026-11-28T12:00:00", "2026-11-22T04:30:00"),
        ("0 0 1 11 *", "2026-11-22T00:00:00", "2026-11-01T00:00:00"),
        ("*/5 * * * *", "2026-03-01T00:00:03", "2026-03-01T00:00:00"),
    ],
)
def test_known_times(line: str, moment: str, due: str) -> None:
    def read(text: str) -> datetime:
        found = datetime.fromisoformat(text)
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    assert schedule.latest_due(parse_cron(line), read(moment)) == read(due)


MORE = """
[schedule]
full_system = "30 3 * * *"
config_watch_seconds = 77
watchdog_seconds = 11

[schedule.components]
keys = "0 */6 * * *"
"""


@pytest.fixture
def configuration(tmp_path: Path) -> Iterator[Settings]:
    table = f'[catalog]\nurl = "sqlite:///{tmp_path / "catalog.sqlite"}"'
    with configured(write_settings(tmp_path, more=MORE + table)) as found:
        yield found


BUILD = """
import json
from datetime import timedelta
import beat_schedule
from workers.app import app
app.loader.import_default_modules()
for name, entry in app.conf.beat_schedule.items():
    schedule = entry["schedule"]
    seconds = schedule if isinstance(schedule, (int, float)) else None
    print(json.dumps([name, {**entry, "schedule": seconds or repr(schedule)}, entry["task"] in app.tasks]))
"""


def test_beat_sends_each_job_at_its_time_to_the_queue_that_it_belongs_to(configuration: Settings) -> None:
    """In a process of its own: beat's schedule is built once, when it is imported."""
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    entries = {name: entry for name, entry, _ in lines}

    assert [name for name, _, exists in lines if not exists] == [], "every task that beat sends exists"
    jobs = {"full_system", "keys", "verify", "rehearse", "prune_stores"}
    assert set(entries) == jobs | {"look at settings", "watchdog"}
    for job, line in (("full_system", "30 3 * * *"), ("keys", "0 */6 * * *"), ("prune_stores", "30 4 * * *")):
        assert entries[job]["task"] == "tasks.schedule.start_scheduled"
        assert entries[job]["args"] == [job]
        assert entries[job]["schedule"] == repr(parse_cron(line))
        assert entries[job]["options"]["queue"] == "control"
        assert "expires" not in entries[job]["options"], "a backup that could not begin at once is made later"
    assert entries["look at settings"]["schedule"] == 77
    assert entries["look at settings"]["args"] == ["settings"]
    assert entries["look at settings"]["options"]["queue"] == "host.app1"
    assert entries["watchdog"]["schedule"] == 11
    assert entries["watchdog"]["options"]["expires"] == 11


def test_a_job_that_is_switched_off_has_no_entry(configuration: Settings) -> None:
    def lines(settings: Settings = configuration, **values: Any) -> dict[str, str]:
        return schedule.cron_lines(
            settings.model_copy(update={"schedule": ScheduleSettings(**{"prune": None} | values)})
        )

    proofs = {"verify": "0 5 * * *", "rehearse": "0 6 * * 0"}
    assert lines(full_system=None) == proofs
    assert lines(full_system=None, verify=None, rehearse=None) == {}
    assert lines(full_system=None, components={"keys": "0 * * * *"}) == proofs | {"keys": "0 * * * *"}
    assert lines() == proofs | {"full_system": "0 2 * * *"}
    assert lines(full_system=None, prune="9 9 * * *") == proofs | {"prune_stores": "9 9 * * *"}
    database = Component(name="db", kind="postgres", host="db1", wal_archive=PurePosixPath("/wal"))
    with_wal = configuration.model_copy(update={"components": {"db": database}})
    with_base = proofs | {"collect_wal": "0 */6 * * *", "base": "0 3 * * 0"}
    assert lines(with_wal) == with_base | {"full_system": "0 2 * * *"}
    assert lines(with_wal, full_system=None, wal=None, base=None) == proofs
    elsewhere = OffsiteSettings(store=LocalStoreSettings(path=Path("/elsewhere")))
    with_offsite = configuration.model_copy(update={"offsite": elsewhere})
    assert lines(with_offsite) == proofs | {"full_system": "0 2 * * *", "offsite": "0 4 * * *"}
    assert lines(with_offsite, full_system=None, offsite=None) == proofs


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = datetime(2026, 11, 22, 3, 30, 0, 500, tzinfo=UTC)
        patch.setattr(schedule, "now", lambda: self.now)


@pytest.fixture
def begun(configuration: Settings, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs whose first phase would have been sent."""
    found: list[Run] = []
    monkeypatch.setattr(backup, "begin", found.append)
    return found


def start(job: str) -> str | None:
    run_id: str | None = schedule.start_scheduled(job)
    return run_id


def test_a_job_that_is_sent_twice_is_begun_once(begun: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first = start("full_system")
    clock.now += timedelta(hours=5)

    assert first
    assert start("full_system") is None
    assert [run.id for run in begun] == [first]
    assert begun[0].scheduled_at == datetime(2026, 11, 22, 3, 30, tzinfo=UTC)
    assert (begun[0].kind, begun[0].job, begun[0].components) == (
        Kind.BACKUP,
        "full_system",
        ["keys", "settings"],
    )

    clock.now = datetime(2026, 11, 23, 3, 30, tzinfo=UTC)
    assert start("full_system")
    assert [run.scheduled_at.day for run in begun if run.scheduled_at] == [22, 23]


def test_two_beats_that_send_at_the_same_moment_begin_one(
    begun: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(start, ["full_system"] * 4))

    assert sum(run_id is not None for run_id in started) == len(begun) == 1


def test_a_component_has_a_schedule_of_its_own(begun: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    assert start("keys")
    assert start("full_system")

    assert [(run.job, run.components) for run in begun] == [
        ("keys", ["keys"]),
        ("full_system", ["keys", "settings"]),
    ]
    assert begun[0].scheduled_at == datetime(2026, 11, 22, 0, 0, tzinfo=UTC)


def test_over_two_weeks_every_time_has_one_run_however_late_or_often_it_is_sent(
    begun: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    first_day = clock.now
    for day in range(14):
        for minutes in (
            0,
            0,
            7,
            200,
        ):  # twice by two beats, once by one that was restarted, once more much later
            clock.now = first_day + timedelta(days=day, minutes=minutes)
            start("full_system")

    days = [run.scheduled_at.date() for run in begun if run.scheduled_at]
    assert days == [(first_day + timedelta(days=day)).date() for day in range(14)]
    assert len({run.id for run in catalog.list_runs()}) == 14


def test_a_watched_component_is_backed_up_when_it_changed(
    begun: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def artifact(digest: str, hour: int, *others: str) -> None:
        parts = [{"component": "settings", "holds": {"content_sha256": digest}}]
        parts += [{"component": other, "holds": {}} for other in others]
        details: dict[str, Any] = {"parts": parts}
        catalog.add_artifact(
            catalog.Artifact(
                key=f"components/{hour}", run_id=str(hour), job="j", size=1, sha256="f", details=details,
                created=datetime(2026, 11, 22, hour, tzinfo=UTC),
            )
        )  # fmt: skip

    def looked(digest: str, hour: int = 23) -> str | None:
        when = datetime(2026, 11, 22, hour, tzinfo=UTC).isoformat()
        run_id: str | None = schedule.start_if_changed("settings", digest, when)
        return run_id

    first = looked("a")
    assert first, "there is no backup of it"
    assert looked("b") is None, "the one of a moment ago still runs"
    catalog.finish_run(first)
    artifact("a", 1)
    assert looked("a") is None
    artifact("b", 2)
    assert looked("b") is None
    assert looked("a", hour=1) is None, "an older look waited for a worker"
    again = looked("a")
    assert again, "it is what it was before, but the newest backup is another"
    catalog.finish_run(again)
    artifact("c", 3, "keys")
    full = catalog.open_run(Kind.BACKUP, job="full_system", components=["keys", "settings"])
    assert full
    alone = looked("c")
    assert alone, "the archive of the whole system is not kept as long, and another one is being made"
    for run_id in (alone, full.id):
        catalog.finish_run(run_id)
    restore = catalog.open_run(Kind.RESTORE, job="manual", components=["keys"])
    assert restore
    assert looked("d") is None, "a backup would be refused"
    assert [run.components for run in begun] == [["settings"]] * 3
