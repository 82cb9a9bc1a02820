"""What can be recovered, from what lies in the store, and that a new base backup is started once when it must be."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import backup
from tasks.components.postgres_segments import HEADER, LONG_HEADER, Segment, Switch, format_lsn
from tasks.components.postgres_wal import BaseBackup, Collection, Wal, WalFile, collection_key, wal_key
from tasks.recoverable import Recoverable, examine
from tasks.wal import CollectWorkflow, require_no_collection
from tests.configured import configured, write_settings
from workers import catalog, streams
from workers.catalog import Kind, Run, Step
from workers.errors import LeaseUnavailable
from workers.settings import Settings
from workers.storage.local import LocalStore

SIZE = 16 << 20
CLUSTER = "7300000000000000001"
START = datetime(2026, 11, 22, tzinfo=UTC)
HISTORY: dict[int, tuple[Switch, ...]] = {2: (Switch(1, 5 * SIZE + 400),)}


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def wal(*timelines: tuple[int, set[int]], histories: dict[int, tuple[Switch, ...]] | None = None) -> Wal:
    names = [Segment(timeline, number).name(SIZE) for timeline, numbers in timelines for number in numbers]
    names += [f"{timeline:08X}.history" for timeline in histories or {}]
    return Wal("db", CLUSTER, SIZE, {n: WalFile(n, "", n, 1, 0) for n in sorted(names)}, histories or {})


def collected(hour: float, segment: int, timeline: int = 1) -> Collection:
    """A collection at ``hour`` whose last segment is ``segment``."""
    last = Segment(timeline, segment).name(SIZE)
    lsn = format_lsn(segment * SIZE + 200)
    return Collection(
        taken=at(hour),
        lsn=lsn,
        timeline=timeline,
        last=last,
        marked=at(hour),
        segment_size=SIZE,
        snapshot="1:1:",
    )


def base(hour: float, segment: int, timeline: int = 1, *, with_wal: bool = False) -> BaseBackup:
    """A base backup that ended at ``hour``, all within ``segment``."""
    start = segment * SIZE + 40
    return BaseBackup(f"base-{hour:g}", CLUSTER, timeline, start, start + 100, at(hour), with_wal)


def ranges(found: Recoverable) -> list[tuple[datetime, datetime]]:
    return [(span.start, span.end) for span in found.spans]


def test_range_goes_from_the_first_base_backup_to_the_last_collection() -> None:
    found = examine(wal((1, set(range(9)))), [collected(6, 4), collected(12, 8)], [base(1, 1), base(7, 5)])
    assert ranges(found) == [(at(1), at(12))]
    assert (found.newest, found.needs_base, found.gaps) == (at(12), False, ())
    span = found.spans[0]
    assert [one and one.archive for one in map(span.base_before, (at(0.5), at(3), at(9)))] == [
        None,
        "base-1",
        "base-7",
    ]


def test_gap_ends_the_range_at_the_collection_before_it_and_a_base_backup_begins_the_next() -> None:
    log = wal((1, set(range(13)) - {5, 6}))
    collections = [collected(6, 4), collected(12, 8), collected(18, 12)]
    found = examine(log, collections, [base(1, 1)])
    assert ranges(found) == [(at(1), at(6))]
    assert found.needs_base
    (gap,) = found.gaps
    assert str(gap) == (
        "not recoverable from 2026-11-22 06:00:00 to now: it takes a new base backup (2 files "
        "000000010000000000000005 … 000000010000000000000006 are missing)"
    )
    found = examine(log, collections, [base(1, 1), base(13, 9)])
    assert ranges(found) == [(at(1), at(6)), (at(13), at(18))]
    assert not found.needs_base
    assert [(gap.start, gap.end) for gap in found.gaps] == [(at(6), at(13))]


def test_gaps_without_a_base_backup_between_them_are_one_time() -> None:
    log = wal((1, {1, 2, 4, 6, 7}))
    found = examine(log, [collected(6, 2), collected(12, 5), collected(18, 7)], [base(1, 1), base(13, 6)])
    assert [(gap.start, gap.end, len(gap.missing)) for gap in found.gaps] == [(at(6), at(13), 2)]


def test_newest_segment_that_is_missing_is_a_gap_too() -> None:
    found = examine(wal((1, set(range(8)))), [collected(6, 7), collected(12, 8)], [base(1, 1)])
    assert (found.newest, found.needs_base) == (at(6), True)
    assert [gap.missing for gap in found.gaps] == [("000000010000000000000008",)]


def test_base_backup_without_its_own_wal_is_worth_nothing_until_that_is_collected() -> None:
    assert examine(wal((1, {0, 1})), [collected(6, 1)], [base(7, 5)]).newest is None
    assert ranges(examine(wal((1, {0, 1})), [], [base(7, 5, with_wal=True)])) == [(at(7), at(7))]


def test_new_timeline_goes_on_from_the_old_ones_base_backup_and_the_old_one_stays_recoverable() -> None:
    log = wal((1, set(range(8))), (2, {5, 6, 7}), histories=HISTORY)
    collections = [collected(6, 4), collected(12, 7), collected(18, 7, timeline=2)]
    found = examine(log, collections, [base(1, 1)])
    assert [(span.timeline, span.start, span.end) for span in found.spans] == [
        (1, at(1), at(12)),
        (2, at(1), at(18)),
    ]
    assert not found.needs_base
    late = examine(log, collections, [base(8, 6)])
    assert [span.timeline for span in late.spans] == [1], "the new timeline left before it"
    assert late.needs_base


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20), min_size=1, max_size=4))
def test_every_point_is_in_a_range_exactly_when_a_base_backup_reaches_it(
    held: set[int], bases: set[int]
) -> None:
    log = wal((1, held))
    found = examine(log, [collected(20, 20)], [base(number, number) for number in bases])
    for number in range(21):
        reached = any(set(range(start, number + 1)) <= held for start in bases if start <= number)
        point = number * SIZE + 150
        assert any(span.start_lsn <= point < span.end_lsn for span in found.spans) == reached
    assert found.needs_base == (not any(set(range(start, 21)) <= held for start in bases))
    assert bool([gap for gap in found.gaps if gap.end is None]) == found.needs_base


# -- what follows ---------------------------------------------------------------------------------------------------

COMPONENT = '[components.db]\nkind = "postgres"\nhost = "db1"\nwal_archive = "/wal"\n'


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setattr(backup, "begin", lambda _run: None)
    more = f'{COMPONENT}\n[catalog]\nurl = "sqlite:///{tmp_path}/catalog.sqlite"\n'
    with configured(write_settings(tmp_path, more=more)) as settings:
        yield settings


def store_segments(store: LocalStore, record: Collection, run_id: str, numbers: set[int]) -> None:
    for number in numbers:
        plain = HEADER.pack(0xD118, LONG_HEADER, 1, number * SIZE, 0, int(CLUSTER), SIZE, 8192)
        name = Segment(1, number).name(SIZE)
        streams.write(store, wal_key("db", CLUSTER, name, f"{number:064x}"), [plain], level=1)
    store.put(collection_key("db", CLUSTER, run_id), iter([record.model_dump_json().encode()]))


def ended_step(run: Run) -> list[Step]:
    moment = catalog.now()
    result = {"ok": True, "system_identifier": CLUSTER, "files": 1, "size": 1, "troubles": []}
    return [
        Step(
            run_id=run.id,
            phase="collect",
            name="db",
            task="t",
            queue="host.db1",
            lease="db.wal",
            task_id="1",
            args=[],
            sent=moment,
            last_seen=moment,
            finished=moment,
            result=result,
        )
    ]


def test_wal_without_a_base_backup_starts_one_and_no_second_while_it_runs(
    configuration: Settings, tmp_path: Path
) -> None:
    store_segments(LocalStore(tmp_path / "store"), collected(6, 4), "20261122_060000", {3, 4})
    workflow = CollectWorkflow()
    runs = [catalog.open_run(Kind.COLLECT, job="manual", components=["db"]) for _ in range(2)]
    for run in (runs[0], runs[0], runs[1]):
        assert run
        assert workflow.following(run, "collect", ended_step(run)) is None
        catalog.finish_run(run.id)
    started = [run for run in catalog.list_runs() if run.kind is Kind.BACKUP]
    assert [(run.components, run.options) for run in started] == [(["db"], {"base": "full"})]
    for run in runs:
        assert run
        said = catalog.get_run(run.id).outcome["db"]["base_backup"]
        assert started[0].id in said
    assert [catalog.get_run(run.id).cause for run in runs if run] == [None, None]


def test_restore_waits_for_a_running_collection_of_its_components(configuration: Settings) -> None:
    run = catalog.open_run(Kind.COLLECT, job="manual", components=["db"])
    assert run
    require_no_collection(["keys"])
    with pytest.raises(LeaseUnavailable, match=f"the collection of WAL {run.id} is running"):
        require_no_collection(["db", "keys"])
    catalog.finish_run(run.id)
    require_no_collection(["db", "keys"])
