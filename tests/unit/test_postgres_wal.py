"""WAL by its names: positions, segments, timelines, gaps, and what retention may remove."""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.components.postgres_segments import (
    HEADER,
    LONG_HEADER,
    Header,
    Segment,
    Switch,
    format_lsn,
    parse_history,
    parse_lsn,
)
from tasks.components.postgres_wal import (
    BaseBackup,
    Collection,
    Range,
    Wal,
    WalFile,
    collection_key,
    covered,
    list_collections,
    list_systems,
    list_wal,
    missing,
    prunable,
    reach,
    read_wal,
    wal_key,
)
from workers import streams
from workers.errors import IntegrityError
from workers.storage.local import LocalStore

SIZE = 16 << 20
CLUSTER = "7300000000000000001"
SIZES = st.sampled_from([1 << 20 << power for power in range(11)])
"""What ``initdb --wal-segsize`` takes: 1 MB to 1 GB."""


def segments(*timelines: tuple[int, range]) -> set[str]:
    return {Segment(tli, number).name(SIZE) for tli, numbers in timelines for number in numbers}


def wal_of(names: set[str], histories: Mapping[int, tuple[Switch, ...]] | None = None) -> Wal:
    held = {*names, *(f"{timeline:08X}.history" for timeline in histories or {})}
    files = {name: WalFile(name, "0" * 64, f"wal/db/{CLUSTER}/{name}", 1, 0.0) for name in sorted(held)}
    return Wal("db", CLUSTER, SIZE, files, histories or {})


@given(st.integers(0, 2**64 - 1))
def test_position_is_read_as_it_is_written(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/G", "0/123456789", "-1/0", "0x1/0", " 0/0"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a WAL position"):
        parse_lsn(text)


@given(
    st.integers(1, 2**32 - 1), st.integers(0, 2**34 - 2), SIZES
)  # with the largest segments, 2**34 is past the last
def test_segment_is_read_as_it_is_named(timeline: int, number: int, size: int) -> None:
    segment = Segment(timeline, number)
    name = segment.name(size)
    assert len(name) == 24
    assert Segment.parse(name, size) == segment
    assert Segment(timeline, number + 1).name(size) > name, "the order of names is the order of the log"


def test_names_are_postgresqls() -> None:
    # pg_walfile_name('16/B374D848'), and the last segment before a new middle part.
    assert Segment(1, parse_lsn("16/B374D848") // SIZE).name(SIZE) == "0000000100000016000000B3"
    assert Segment(3, 255).name(SIZE) == "0000000300000000000000FF"
    assert Segment(3, 256).name(SIZE) == "000000030000000100000000"


@pytest.mark.parametrize(
    "name", ["000000010000000000000100", "00000000000000000000000A", "0000000100000000000000", "x" * 24]
)
def test_what_is_no_segment_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="segment"):
        Segment.parse(name, SIZE)


def test_history_names_the_older_timelines() -> None:
    text = "1\t0/3000110\tbefore 2026-11-22 02:00:00+00\n# a comment\n\n2\t0/5000000\tno recovery target specified\n"
    assert parse_history(text) == (Switch(1, 0x3000110), Switch(2, 0x5000000))
    for damaged in ("1", "one\t0/1\tx", "1\t0-1\tx", "2\t0/1\tx\n1\t0/2\tx"):
        with pytest.raises(ValueError, match=r"timeline|position"):
            parse_history(damaged)


def test_header_says_whose_segment_it_is() -> None:
    page = HEADER.pack(0xD118, LONG_HEADER, 2, 5 * SIZE, 0, int(CLUSTER), SIZE, 8192)
    assert Header.parse(page + bytes(100)) == Header(0xD118, 2, 5 * SIZE, CLUSTER, SIZE)
    for damaged in (page[:39], struct.pack("=HH", 0xD118, 0) + page[4:], bytes(40)):
        with pytest.raises(ValueError, match=r"short|header"):
            Header.parse(damaged)


@given(st.sets(st.integers(0, 30)), st.integers(0, 30), st.integers(0, 30))
def test_removed_segments_and_no_others_are_missing(gone: set[int], first: int, count: int) -> None:
    wal = wal_of(segments((1, range(70))) - {Segment(1, number).name(SIZE) for number in gone})
    start, end = first * SIZE + 40, (first + count) * SIZE
    expected = [number for number in range(first, first + count) if number in gone]
    assert missing(wal, 1, start, end) == [Segment(1, number).name(SIZE) for number in expected]
    held = {n for found in covered(wal, 1) for n in range(found.start // SIZE, found.end // SIZE)}
    assert held == set(range(70)) - gone
    contiguous = next(number for number in range(first, 71) if number in gone or number == 70)
    assert reach(wal, 1, start) == (contiguous * SIZE if contiguous > first else start)


@given(st.lists(st.integers(1, 20 * SIZE), min_size=1, max_size=4), st.integers(1, 5))
def test_every_segment_of_a_line_of_timelines_is_needed(lengths: list[int], more: int) -> None:
    """Each timeline is left somewhere, within a segment or at its end; the newest one's file is read there."""
    switches, at = [], 0
    for timeline, length in enumerate(lengths, 1):
        at += length
        switches.append(Switch(timeline, at))
    newest = len(lengths) + 1
    histories = {timeline: tuple(switches[: timeline - 1]) for timeline in range(2, newest + 1)}
    end = at + more * SIZE
    needed = []
    for number in range(-(-end // SIZE)):
        begun = 1 + sum(switch.lsn < (number + 1) * SIZE for switch in switches)
        needed.append(Segment(begun, number).name(SIZE))
    whole = wal_of(set(needed), histories)
    assert missing(whole, newest, 0, end) == []
    assert covered(whole, newest) == [Range(0, len(needed) * SIZE)]
    for name in needed:
        assert missing(wal_of(set(needed) - {name}, histories), newest, 0, end) == [name]


def test_older_timelines_own_end_does_not_stand_in_for_the_new_timelines_file() -> None:
    histories = {2: (Switch(1, 3 * SIZE + 500),)}
    wal = wal_of(segments((1, range(6)), (2, range(4, 6))), histories)
    assert missing(wal, 2, 0, 6 * SIZE) == ["000000020000000000000003"]
    assert covered(wal, 1) == [Range(0, 6 * SIZE)]
    assert covered(wal, 2) == [Range(0, 3 * SIZE), Range(4 * SIZE, 6 * SIZE)]


def test_missing_history_file_is_named() -> None:
    wal = wal_of(segments((2, range(3, 6))))
    assert missing(wal, 2, 3 * SIZE, 6 * SIZE) == ["00000002.history"]


def put(store: LocalStore, name: str, plain: bytes) -> str:
    key = wal_key("db", CLUSTER, name, hashlib.sha256(plain).hexdigest())
    streams.write(store, key, iter([plain]), level=1)
    return key


def page(number: int) -> bytes:
    return HEADER.pack(0xD118, LONG_HEADER, 1, number * SIZE, 0, int(CLUSTER), SIZE, 8192) + bytes(100)


def test_store_lists_what_was_put_and_checks_what_is_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    names = sorted(segments((1, range(3))))
    keys = [put(store, name, page(number)) for number, name in enumerate(names)]
    history = put(store, "00000002.history", b"1\t0/2000110\tbefore\n")
    label = put(store, f"{names[0]}.00000028.backup", b"START WAL LOCATION: 0/28\n")
    taken = datetime(2026, 11, 22, 2, tzinfo=UTC)
    record = Collection(
        taken=taken,
        lsn="0/2000110",
        timeline=1,
        last=names[2],
        marked=taken,
        segment_size=SIZE,
        snapshot="7:7:",
    )
    store.put(collection_key("db", CLUSTER, "20261122_020000"), iter([record.model_dump_json().encode()]))
    put(store, "not-wal", b"")

    wal = list_wal(store, "db", CLUSTER)
    assert list_systems(store, "db") == [CLUSTER]
    assert {file.key for file in wal.files.values()} == {*keys, history, label}
    assert wal.segment_size == SIZE
    assert wal.histories == {2: (Switch(1, 0x2000110),)}
    assert wal.timelines == [1, 2]
    assert list_collections(store, "db", CLUSTER) == [record]
    assert b"".join(read_wal(store, keys[1])) == page(1)

    other = put(store, names[1], page(1) + b"x")
    with pytest.raises(IntegrityError, match=rf"{names[1]} has two contents"):
        list_wal(store, "db", CLUSTER)
    store.delete(other)
    swapped = wal_key("db", CLUSTER, "000000010000000000000009", "0" * 64)
    streams.write(store, swapped, iter([page(9)]), level=1)
    with pytest.raises(IntegrityError, match="is damaged"):
        list(read_wal(store, swapped))


def test_cluster_without_wal_is_empty(tmp_path: Path) -> None:
    wal = list_wal(LocalStore(tmp_path), "db", CLUSTER)
    assert (wal.files, wal.timelines, covered(wal, 1)) == ({}, [], [])
    assert list_systems(LocalStore(tmp_path), "db") == []


@given(
    st.sets(st.integers(0, 30)),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30)), max_size=4),
    st.integers(0, 2),
)
def test_nothing_that_a_kept_base_backup_needs_is_prunable(
    gone: set[int], bases: list[tuple[int, int]], foreign: int
) -> None:
    histories = {2: (Switch(1, 9 * SIZE + 5),), 3: (Switch(1, 9 * SIZE + 5), Switch(2, 20 * SIZE))}
    names = segments((1, range(12)), (2, range(9, 22)), (3, range(20, 31)))
    wal = wal_of(names - {Segment(2, number).name(SIZE) for number in gone}, histories)
    day = datetime(2026, 11, 22, tzinfo=UTC)
    kept = [
        BaseBackup("a", CLUSTER, timeline, number * SIZE + 40, number * SIZE + 400, day)
        for timeline, number in bases
    ]
    others = [BaseBackup("b", "1", 1, 0, 1, day)] * foreign
    keys = set(prunable(wal, [*kept, *others], before=day))
    for base in kept:
        for timeline in range(base.timeline, 4):
            assert not keys & {
                wal.files[name].key
                for number in range(base.start_lsn // SIZE, 31)
                if (name := wal.segment_at(number, timeline).name(SIZE)) in wal.files
                and wal.segment_at(number, timeline).timeline >= base.timeline
            }
    assert not any(key.endswith(".history") for key in keys)
    if not kept:
        assert len(keys) == sum(not name.endswith(".history") for name in wal.files)


def test_only_what_is_old_and_before_every_kept_base_backup_is_prunable() -> None:
    old = wal_of(segments((1, range(6))))
    name = "000000010000000000000001"
    young = replace(old.files[name], modified=datetime(2026, 11, 22, tzinfo=UTC).timestamp())
    wal = replace(old, files={**old.files, name: young})
    day = datetime(2026, 11, 21, tzinfo=UTC)
    base = BaseBackup("a", CLUSTER, 1, 3 * SIZE + 40, 3 * SIZE + 300, day)
    assert [key[-1] for key in prunable(wal, [base], before=day)] == ["0", "2"]
