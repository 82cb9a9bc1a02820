"""Which base backup and timeline a recovery begins with."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.components.postgres_options import RestoreOptions
from tasks.components.postgres_wal import BaseBackup, Collection
from tasks.recover import choose
from tasks.recoverable import Recoverable, Span
from workers.errors import Permanent

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def at(hours: float) -> datetime:
    return NOON + timedelta(hours=hours)


def base(name: str, timeline: int, lsn: int, hours: float) -> BaseBackup:
    return BaseBackup(name, "7", timeline, lsn - 16, lsn, at(hours), with_wal=True)


def collection(timeline: int, hours: float) -> Collection:
    return Collection(
        taken=at(hours),
        segment_size=16 << 20,
        lsn="0/1",
        timeline=timeline,
        last="",
        marked=at(hours),
        snapshot="1:1:",
    )


FIRST, SECOND, THIRD = base("first", 1, 0x100, 0), base("second", 1, 0x200, 4), base("third", 2, 0x300, 9)
OLD = Span(1, (FIRST, SECOND), 0x100, 0x280, at(0), at(6))
NEW = Span(2, (FIRST, THIRD), 0x100, 0x400, at(0), at(12))
FOUND = Recoverable("pg", "7", (OLD, NEW), (), (collection(1, 1), collection(1, 6), collection(2, 12)))
"""At 8 h the cluster was recovered to 3 h: timeline 2 leaves timeline 1 before the second base backup."""
XIDS = {"first": 1000, "second": 2000, "third": 3000}


@pytest.mark.parametrize(
    ("asked", "archive", "timeline"),
    [
        ({"to_time": at(0.5)}, "first", 1),
        ({"to_time": at(5)}, "second", 1),
        ({"to_time": at(9)}, "third", 2),
        ({"to_time": at(5), "timeline": 2}, "first", 2),
        ({"to_lsn": "0/2FF"}, "first", 2),
        ({"to_lsn": "0/27F", "timeline": 1}, "second", 1),
        ({"to_xid": 2999}, "first", 2),
        ({"to_xid": 3000}, "third", 2),
        ({"to_name": "before"}, "first", 2),
        ({"latest": True}, "third", 2),
        ({"latest": True, "timeline": 1}, "second", 1),
    ],
)
def test_the_newest_base_before_the_target_on_its_timeline(
    asked: dict[str, Any], archive: str, timeline: int
) -> None:
    choice = choose(FOUND, RestoreOptions(**asked), XIDS)
    assert (choice.base.archive, choice.timeline) == (archive, timeline)


@pytest.mark.parametrize(
    "asked",
    [
        {"to_time": at(-1)},
        {"to_time": at(13)},
        {"to_lsn": "0/FF"},
        {"to_lsn": "0/401"},
        {"to_xid": 999},
        {"latest": True, "timeline": 7},
    ],
)
def test_what_is_out_of_reach_is_refused_with_the_range(asked: dict[str, Any]) -> None:
    with pytest.raises(Permanent, match="possible is") as refused:
        choose(FOUND, RestoreOptions(**asked), XIDS)
    if "timeline" not in asked:
        assert "2026-11-22 12:00:00 to 2026-11-23 00:00:00 UTC (0/100 to 0/400, timeline 2)" in str(
            refused.value
        )


@pytest.mark.parametrize(
    "asked",
    [
        {"to_time": "2026-11-22T12:00:00"},
        {"to_lsn": "12"},
        {"to_xid": 5, "latest": True},
        {"folder": "scratch"},
    ],
)
def test_what_is_no_target_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RestoreOptions.model_validate(asked)
