"""Retention: what policies keep, and what stays whatever they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.components.postgres_wal import BaseBackup
from tasks.retention import Backup, Plan, decide
from workers.catalog import LEVELS
from workers.sections import RetentionPolicy

START = datetime(2026, 1, 1, 2, tzinfo=UTC)
DAY = timedelta(days=1)
ONE_RULE = st.one_of(
    st.builds(RetentionPolicy, days=st.floats(0.5, 60)),
    *(st.builds(RetentionPolicy, **{rule: st.integers(1, 5)}) for rule in ("last", "daily", "weekly", "monthly")),
    st.builds(RetentionPolicy, days=st.floats(0.5, 20), daily=st.integers(0, 5), yearly=st.integers(0, 2)),
    st.just(RetentionPolicy()),
)  # fmt: skip


def backup(day: float, *, series: str = "full_system", key: str = "", proven: str | None = None) -> Backup:
    holds = (
        frozenset({("db", "dump"), ("keys", "files-tar")}) if series == "full_system" else {(series, "rdb")}
    )
    return Backup(
        key=key or f"{series}/{day:08.3f}",
        created=START + day * DAY,
        series=series,
        holds=frozenset(holds),
        proven=proven,
    )


def plan(backups: list[Backup], policy: RetentionPolicy, day: float, **more: object) -> Plan:
    return decide(backups, lambda found: {found.series: policy}, START + day * DAY, **more)  # type: ignore[arg-type]


def days_kept(result: Plan) -> list[float]:
    return sorted(float(key.rpartition("/")[2]) for key in result.kept)


def test_by_age_as_the_runbook_does_it() -> None:
    result = plan([backup(day) for day in range(100)], RetentionPolicy(days=30), 99.1)

    assert days_kept(result) == list(range(70, 100))
    assert [decision.key for decision in result.dropped][-1] == "full_system/0000.000"
    assert result.dropped[0].reason == "no rule keeps it: full_system keeps 30 days"


def test_a_fake_clock_runs_for_weeks() -> None:
    there: list[Backup] = []
    policies = {"full_system": RetentionPolicy(days=30), "redis": RetentionPolicy(days=7)}
    for day in range(120):
        there += [backup(day), *(backup(day + hour / 24, series="redis") for hour in (0, 6, 12, 18))]
        result = decide(
            there, lambda found: {found.series: policies[found.series]}, START + (day + 0.8) * DAY
        )
        there = [found for found in there if found.key in result.kept]
    assert [found.key for found in there if found.series == "full_system"] == [
        f"full_system/{day:08.3f}" for day in range(90, 120)
    ]
    assert len([found for found in there if found.series == "redis"]) == 28


def test_grandfather_father_son() -> None:
    """Kept by hand: of 2026, whose January began on a Thursday."""
    rules = RetentionPolicy(daily=3, weekly=2, monthly=2, yearly=1)
    # Day 58 is 28 February, a Saturday: 3 days, then the Sunday of the week before, then 31 January.
    assert days_kept(plan([backup(day) for day in range(59)], rules, 58.5)) == [30, 52, 56, 57, 58]


def test_count() -> None:
    assert days_kept(plan([backup(day) for day in range(9)], RetentionPolicy(last=2), 400)) == [7, 8]


def test_a_damaged_archive_takes_no_place_of_a_good_one() -> None:
    there = [backup(day) for day in range(9)]
    there[8] = replace(there[8], damaged=True)

    assert days_kept(plan(there, RetentionPolicy(last=2), 9)) == [6, 7, 8]
    assert days_kept(plan(there, RetentionPolicy(weekly=1), 9)) == [7, 8]


def test_without_a_rule_all_stay() -> None:
    assert len(plan([backup(day) for day in range(9)], RetentionPolicy(), 999).kept) == 9


def test_an_empty_catalogue_deletes_nothing_and_says_so() -> None:
    result = plan([], RetentionPolicy(days=1), 9)
    assert (result.dropped, result.note) == (
        [],
        "the catalogue has no archive in this store: nothing to delete",
    )


def test_a_clock_behind_the_newest_archive_deletes_nothing_and_says_so() -> None:
    result = plan([backup(day) for day in range(99)], RetentionPolicy(last=1), 97.9)
    assert len(result.kept) == 99
    assert result.note
    assert "before the newest archive full_system/0098.000 was made" in result.note
    assert plan([backup(day) for day in range(99)], RetentionPolicy(last=1), 98 - 0.001).note is None


def test_when_all_is_suddenly_ancient_nothing_goes_until_backups_went_on_for_half_the_time() -> None:
    old = [backup(day) for day in range(40)]
    policy = RetentionPolicy(days=30)
    jumped = plan(old, policy, 400)
    assert len(jumped.kept) == 40
    assert "not made any more" in jumped.decisions[-1].reason
    assert len(plan([*old, backup(400), backup(401)], policy, 401.5).kept) == 42
    assert len(plan([*old, *map(backup, range(400, 414))], policy, 413.5).kept) == 54
    assert days_kept(plan([*old, *map(backup, range(400, 417))], policy, 416.5)) == list(range(400, 417))


def test_the_newest_proven_stays_on_each_level_and_a_failed_proof_is_none() -> None:
    there = [backup(day) for day in range(9)]
    there[1] = replace(there[1], proven="restore")
    there[2] = replace(there[2], proven="restore", damaged=True)
    there[3] = replace(there[3], proven="structure")
    there[4] = replace(there[4], proven="checksum")
    there[5] = replace(there[5], proven="exists")

    assert days_kept(plan(there, RetentionPolicy(last=1), 9)) == [1, 3, 4, 8]


def base(day: float, system: str = "1") -> Backup:
    made = backup(day, series="pg")
    found = BaseBackup(made.key, system, 1, int(day), int(day) + 1, made.created)
    return replace(made, bases={"pg": found})


def test_the_base_backup_that_kept_wal_begins_with_stays_and_those_after_it() -> None:
    there = [base(day) for day in range(0, 30, 3)]
    result = plan(there, RetentionPolicy(last=1), 28, wal_days={"pg": 7})
    assert days_kept(result) == [21, 24, 27]
    # 21 is the newest that is finished before the time that WAL is kept for begins, on day 21.
    assert days_kept(plan(there, RetentionPolicy(last=1), 27.9, wal_days={"pg": 7})) == [18, 21, 24, 27]


def test_what_an_incremental_backup_needs_stays() -> None:
    full, first, second = backup(0), replace(backup(1), needs=frozenset({backup(0).key})), backup(2)
    second = replace(second, needs=frozenset({first.key}))
    result = plan([full, first, second], RetentionPolicy(last=1), 3)
    assert len(result.kept) == 3
    assert result.decisions[-1].reason == f"{first.key} needs it"


def test_what_a_run_reads_stays() -> None:
    there = [backup(day) for day in range(9)]
    assert days_kept(plan(there, RetentionPolicy(last=1), 9, read={there[2].key})) == [2, 8]


histories = st.lists(
    st.builds(
        lambda day, series, proven, damaged: replace(
            backup(day, series=series, proven=proven), damaged=damaged
        ),
        st.floats(0, 200),
        st.sampled_from(["full_system", "redis", "keys"]),
        st.sampled_from([None, *LEVELS]),
        st.booleans(),
    ),
    max_size=40,
    unique_by=lambda made: made.key,
)


@settings(max_examples=300, deadline=None)
@given(histories, st.fixed_dictionaries(dict.fromkeys(("full_system", "redis", "keys"), ONE_RULE)),
       st.floats(-50, 900), st.data())  # fmt: skip
def test_whatever_happened_the_last_good_ones_stay(
    there: list[Backup], rules: Mapping[str, RetentionPolicy], day: float, data: st.DataObject
) -> None:
    read = data.draw(st.sets(st.sampled_from([found.key for found in there]))) if there else set()
    now = START + day * DAY
    result = decide(there, lambda found: {found.series: rules[found.series]}, now, read=read)

    assert sorted(decision.key for decision in result.decisions) == sorted(found.key for found in there)
    assert all(decision.reason for decision in result.decisions)
    assert read <= result.kept
    if there and max(found.created for found in there) > now + timedelta(minutes=5):
        assert not result.dropped
    kept = [found for found in there if found.key in result.kept]
    for held in {held for found in there for held in found.holds}:
        having = [found for found in there if held in found.holds]
        for wanted in (
            having,
            [found for found in having if not found.damaged],
            [found for found in having if not found.damaged and found.proven not in (None, "exists")],
            [found for found in having if not found.damaged and found.proven == "restore"],
        ):
            if wanted:
                newest = max(wanted, key=lambda found: (found.created, found.key))
                assert newest in kept
    again = decide(kept, lambda found: {found.series: rules[found.series]}, now, read=read)
    assert not again.dropped, "a second prune at the same time finds nothing more"
