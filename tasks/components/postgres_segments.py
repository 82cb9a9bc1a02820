"""PostgreSQL's names for places in its write-ahead log (WAL): positions, segments, timelines, and a segment's own header.

The log is a sequence of bytes; a position in it (LSN) is a number, written ``0/3000028``. It is cut into segments of equal
size, and a segment's name is its timeline, and its number in two parts, of 8 hexadecimal digits each (`XLogFileName` in
PostgreSQL's xlog_internal.h). A timeline begins where an older one is left, at a recovery or a promotion; its history file
names the older ones and the position at which each was left.
"""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from typing import NamedTuple, Self

SEGMENT = re.compile(r"[0-9A-F]{24}")
HISTORY = re.compile(r"[0-9A-F]{8}\.history")
LABEL = re.compile(r"[0-9A-F]{24}\.[0-9A-F]{8}\.backup")
"""The file that marks where a base backup began, archived beside the segments."""
HEADER = struct.Struct("=HHIQI4xQII")
"""`XLogLongPageHeaderData`: magic, flags, timeline, position, remaining, system identifier, segment size, page size."""
LONG_HEADER = 0x0002


def parse_lsn(text: str) -> int:
    """Return the position that PostgreSQL writes as ``text``, ``16/B374D848``. Raises ``ValueError``."""
    upper, slash, lower = text.partition("/")
    if not slash or not all(re.fullmatch(r"[0-9A-Fa-f]{1,8}", half) for half in (upper, lower)):
        raise ValueError(f"not a WAL position (LSN): {text!r}; one looks like 16/B374D848")
    return int(upper, 16) << 32 | int(lower, 16)


def format_lsn(lsn: int) -> str:
    """Return a position as PostgreSQL writes it; the inverse of `parse_lsn`."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


class Segment(NamedTuple):
    """A segment of the log: from ``number * segment_size`` on, as ``timeline`` has it."""

    timeline: int
    number: int

    @classmethod
    def parse(cls, name: str, segment_size: int) -> Self:
        """Return the segment that a file name of 24 digits means. Raises ``ValueError``."""
        if not SEGMENT.fullmatch(name):
            raise ValueError(f"not the name of a WAL segment: {name!r}")
        timeline, upper, lower = (int(name[start : start + 8], 16) for start in (0, 8, 16))
        per_id = (1 << 32) // segment_size
        if lower >= per_id or not timeline:
            raise ValueError(f"no WAL segment of {segment_size} bytes has the name {name!r}")
        return cls(timeline, upper * per_id + lower)

    def name(self, segment_size: int) -> str:
        """Return its file name; the inverse of `parse`."""
        upper, lower = divmod(self.number, (1 << 32) // segment_size)
        return f"{self.timeline:08X}{upper:08X}{lower:08X}"


class Switch(NamedTuple):
    """Where a timeline was left."""

    timeline: int
    lsn: int


def parse_history(text: str) -> tuple[Switch, ...]:
    """Return the older timelines that a history file names, the oldest first. Raises ``ValueError``."""
    switches = []
    for line in text.splitlines():
        words = line.partition("#")[0].split(maxsplit=2)
        if words:
            if len(words) < 2 or not words[0].isdecimal():
                raise ValueError(f"not a line of a timeline history: {line!r}")
            switches.append(Switch(int(words[0]), parse_lsn(words[1])))
    if any(first.timeline >= second.timeline for first, second in pairwise(switches)):
        raise ValueError("a timeline history whose timelines do not ascend")
    return tuple(switches)


def history_name(timeline: int) -> str:
    """Return the name of the history file of a timeline."""
    return f"{timeline:08X}.history"


class Header(NamedTuple):
    """What the first page of a segment says of it."""

    magic: int
    """Changes with each major version of PostgreSQL."""
    timeline: int
    """Of the page's first record: an older one in the segment in which a timeline begins."""
    lsn: int
    system_identifier: str
    segment_size: int

    @classmethod
    def parse(cls, start: bytes) -> Self:
        """Read a segment's first bytes. Raises ``ValueError`` when they do not begin a segment of this machine's kind."""
        if len(start) < HEADER.size:
            raise ValueError("it is too short")
        magic, flags, timeline, lsn, _, identifier, segment_size, _ = HEADER.unpack_from(start)
        if not flags & LONG_HEADER:
            raise ValueError("its first page has no header of a segment")
        return cls(magic, timeline, lsn, str(identifier), segment_size)
