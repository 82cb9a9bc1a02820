"""Base backups that other hands made: a tar of a cluster's files, which nobody described when it was made.

What it is follows from PostgreSQL's own files in it (``backup_label``, ``global/pg_control``, ``PG_VERSION``), and where it
ends from its ``backup_manifest``, which lies in it or beside it, from the label that PostgreSQL archives at the end of a
base backup, or from the WAL in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tasks.components.postgres_base import LABEL, MANIFEST, WAL_FOLDER, contents_digest
from tasks.components.postgres_segments import SEGMENT, Segment, format_lsn, parse_lsn
from workers.errors import IntegrityError
from workers.tar import TreeDigest
from workers.tar_format import Member

VERSION, CONTROL, TABLESPACES = "PG_VERSION", "global/pg_control", "tablespace_map"
OLDEST_MAJOR = 13
NEXT_XID = 64
"""Where ``checkPointCopy.nextXid`` lies in ``ControlFileData`` (PostgreSQL's pg_control.h, 13 to 18)."""
NOT_LISTED = (MANIFEST, "postgresql.auto.conf", "recovery.signal", "standby.signal")
"""Files that a manifest does not list, or that pg_basebackup changes after it; pg_verifybackup ignores them, too."""
SEGMENT_SIZES: Sequence[int] = [1 << power for power in (24, *range(20, 24), *range(25, 31))]
"""Bytes that a segment may have, the usual one first."""
START = re.compile(rb"^START WAL LOCATION: (\S+) \(file ([0-9A-F]{24})\)$", re.MULTILINE)
STOP = re.compile(rb"^STOP WAL LOCATION: (\S+) \(file [0-9A-F]{24}\)$", re.MULTILINE)
TIMELINE = re.compile(rb"^START TIMELINE: (\d+)$", re.MULTILINE)
STARTED = re.compile(rb"^START TIME: (.+)$", re.MULTILINE)

FindLabel = Callable[[str, str], bytes]
"""Returns the archived label of a base backup, by system identifier and file name; nothing when there is none."""


@dataclass(frozen=True)
class Label:
    """What ``backup_label`` says of the start of a base backup."""

    lsn: int
    file: str
    timeline: int
    started: str

    @property
    def segment_size(self) -> int:
        """The segments' size in bytes, which follows from the position and the name of the file that holds it."""
        for size in SEGMENT_SIZES:
            if Segment(self.timeline, self.lsn // size).name(size) == self.file:
                return size
        raise IntegrityError(f"its {LABEL} names the file {self.file} for {format_lsn(self.lsn)}")

    @property
    def archived(self) -> str:
        """The name under which PostgreSQL archives the label when the base backup ends."""
        return f"{self.file}.{self.lsn % self.segment_size:08X}.backup"


def describe_base(
    chunks: Iterable[bytes], *, name: str, manifest: bytes | None, find_label: FindLabel
) -> dict[str, Any]:
    """Read the plain tar of a base backup to its end and return what a record of ours would say of it.

    ``manifest`` is the one that lies beside it. Raises ``IntegrityError`` for what is damaged, no base backup, or
    has tablespaces of its own; and when nothing says where it ends.
    """
    sizes: dict[str, int] = {}
    newest = 0

    def see(member: Member) -> None:
        nonlocal newest
        sizes[member.shown] = member.stored
        newest = max(newest, member.mtime)

    keep = (MANIFEST, LABEL, VERSION, CONTROL, TABLESPACES)
    tree = TreeDigest(outward_links=0, listing=True, keep=keep, version=1, see=see)
    for _ in tree.through(chunks):
        pass
    try:
        return _facts(tree, sizes, newest, manifest, find_label)
    except IntegrityError as error:
        raise IntegrityError(f"{name}: {error}") from error


def _facts(
    tree: TreeDigest, sizes: Mapping[str, int], newest: int, manifest: bytes | None, find_label: FindLabel
) -> dict[str, Any]:
    if missing := [name for name in (VERSION, CONTROL, LABEL) if name not in tree.kept]:
        raise IntegrityError(
            f"it holds no {', '.join(missing)} at its top, which every base backup does (the copy of a data folder is none)"
        )
    if tree.kept.get(TABLESPACES, b"").strip():
        raise IntegrityError("its cluster has tablespaces of its own, which a recovery cannot bring back")
    major = tree.kept[VERSION].decode(errors="replace").strip()
    if not major.isdecimal() or int(major) < OLDEST_MAJOR:
        raise IntegrityError(f"it is of PostgreSQL {major}; supported is {OLDEST_MAJOR} and later")
    label = _label(tree.kept[LABEL])
    control = tree.kept[CONTROL]
    if len(control) < NEXT_XID + 8:
        raise IntegrityError(f"its {CONTROL} is cut short")
    system = str(struct.unpack_from("=Q", control)[0])
    held = {
        file.removeprefix(WAL_FOLDER)
        for file, size in sizes.items()
        if file.startswith(WAL_FOLDER)
        and SEGMENT.fullmatch(file.removeprefix(WAL_FOLDER))
        and size == label.segment_size
    }
    inside = tree.kept.get(MANIFEST)
    if text := inside or manifest:
        timeline, stop = _compare(text, label, tree.contents, sizes)
    elif archived := STOP.search(find_label(system, label.archived)):
        timeline, stop = label.timeline, parse_lsn(archived[1].decode())
    else:
        timeline, stop = label.timeline, _end_of(held, label)
    needed = range(label.lsn // label.segment_size, (stop - 1) // label.segment_size + 1)
    return {
        "server_version": major,
        "base": "full",
        "system_identifier": system,
        "segment_size": label.segment_size,
        "timeline": timeline,
        "start_lsn": format_lsn(label.lsn),
        "stop_lsn": format_lsn(stop),
        "with_wal": {Segment(timeline, number).name(label.segment_size) for number in needed} <= held,
        "started": label.started,
        # Files were read until it ended. PostgreSQL itself refuses a moment before that.
        "finished": datetime.fromtimestamp(newest, UTC).isoformat(),
        "next_xid": str(struct.unpack_from("=Q", control, NEXT_XID)[0]),
        "files": tree.files,
        "bytes": tree.bytes,
        "contents_sha256": contents_digest(tree.contents),
    }


def _label(text: bytes) -> Label:
    start, timeline, started = START.search(text), TIMELINE.search(text), STARTED.search(text)
    if not (start and timeline):
        raise IntegrityError(f"its {LABEL} does not say where it starts")
    try:
        lsn = parse_lsn(start[1].decode())
    except ValueError as error:
        raise IntegrityError(f"its {LABEL} is damaged: {error}") from error
    return Label(lsn, start[2].decode(), int(timeline[1]), started[1].decode() if started else "")


def _end_of(held: set[str], label: Label) -> int:
    """Return where the WAL that a base backup holds ends, without a gap from its start."""
    number = first = label.lsn // label.segment_size
    while Segment(label.timeline, number).name(label.segment_size) in held:
        number += 1
    if number == first:
        raise IntegrityError(
            f"nothing says where it ends: there is no {MANIFEST} in it or beside it, none of its WAL in it, and no "
            f"{label.archived} among the WAL of its cluster"
        )
    return number * label.segment_size


def _compare(
    text: bytes, label: Label, contents: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Compare a base backup with its manifest: names, sizes, and digests where they are SHA-256; return timeline and end.

    The default, CRC-32C, is not computed: the gzip around it has a checksum of its own.
    """
    try:
        document = json.loads(text)
        body = text[: text.rindex(b'"Manifest-Checksum"')]
        recorded, last = str(document["Manifest-Checksum"]), document["WAL-Ranges"][-1]
        first = parse_lsn(document["WAL-Ranges"][0]["Start-LSN"])
        timeline, stop = int(last["Timeline"]), parse_lsn(last["End-LSN"])
        files = {
            file["Path"] if "Path" in file else bytes.fromhex(file["Encoded-Path"]).decode(): file
            for file in document["Files"]
        }
        listed = {
            name: (int(file["Size"]), file.get("Checksum-Algorithm"), file.get("Checksum"))
            for name, file in files.items()
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise IntegrityError(f"its {MANIFEST} is damaged: {error!r}") from error
    if hashlib.sha256(body).hexdigest() != recorded:
        raise IntegrityError(f"its {MANIFEST} does not have the digest that it says")
    if first != label.lsn:
        raise IntegrityError(f"its {MANIFEST} is of another base backup: it starts at {format_lsn(first)}")
    ours, theirs = (
        {name for name in names if name not in NOT_LISTED and not name.startswith(WAL_FOLDER)}
        for names in (contents, listed)
    )
    differing = ours ^ theirs
    for name in ours & theirs:
        size, algorithm, checksum = listed[name]
        if sizes[name] != size or (algorithm == "SHA256" and contents[name] != checksum):
            differing.add(name)
    if differing:
        raise IntegrityError(f"it is not what its {MANIFEST} says: {', '.join(sorted(differing)[:5])}")
    return timeline, stop
