"""PostgreSQL's write-ahead log (WAL) as the store holds it: its files, the records of its collections, its gaps.

::

    wal/<component>/<system identifier>/<file name>-<sha256 of the plain bytes>.zst[.age]
    wal/<component>/<system identifier>/collections/<run id>.json
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from tasks.components.postgres_segments import (
    HISTORY,
    LABEL,
    SEGMENT,
    Header,
    Segment,
    Switch,
    history_name,
    parse_history,
    parse_lsn,
)
from workers import streams
from workers.encryption import SUFFIX as ENCRYPTED
from workers.encryption import decrypt
from workers.errors import IntegrityError
from workers.secret import Strict
from workers.settings import get_settings
from workers.storage import Store, StoredObject

KEY_NAME = re.compile(
    r"(?P<name>[0-9A-F]{8,24}[0-9A-Fa-z.]*)-(?P<sha256>[0-9a-f]{64})(?P<suffixes>\.zst(\.age)?)"
)
DEFAULT_SEGMENT_SIZE = 16 << 20


# -- the store ------------------------------------------------------------------------------------------------------


def folder(component: str, system_identifier: str) -> str:
    """Return the prefix of the keys of one cluster's WAL."""
    return f"wal/{component}/{system_identifier}/"


def wal_key(
    component: str, system_identifier: str, name: str, sha256: str, *, encrypted: bool = False
) -> str:
    """Return the key of a WAL file whose plain bytes have this digest."""
    return f"{folder(component, system_identifier)}{name}-{sha256}.zst{ENCRYPTED if encrypted else ''}"


@dataclass(frozen=True)
class WalFile:
    """A stored segment, history file or backup label."""

    name: str
    sha256: str
    """Of the plain bytes."""
    key: str
    size: int
    """As stored."""
    modified: float

    @classmethod
    def of(cls, item: StoredObject) -> Self | None:
        """Return the WAL file that a stored object is, ``None`` when it is something else."""
        match = KEY_NAME.fullmatch(item.key.rpartition("/")[2])
        if not match or not any(kind.fullmatch(match["name"]) for kind in (SEGMENT, HISTORY, LABEL)):
            return None
        return cls(match["name"], match["sha256"], item.key, item.size, item.modified)


class Collection(Strict):
    """One collection of a cluster's WAL: every commit before ``taken`` is in its WAL up to ``lsn``."""

    taken: datetime
    """The server's clock, read before the segment was closed."""
    lsn: str
    """The end of what the last segment holds."""
    timeline: int
    last: str
    """Name of the segment that holds the bytes before ``lsn``."""
    marked: datetime
    """A transaction committed at this time or later is in the WAL up to ``lsn``, so that a recovery to any time before it
    finds where to stop. From here to ``taken`` nothing was committed: all the WAL is the state of that time."""
    segment_size: int
    """Bytes; it never changes for a cluster."""
    snapshot: str
    """What was committed up to ``lsn``, as ``pg_current_snapshot()``: while it stays, nothing new is."""

    @property
    def end(self) -> int:
        return parse_lsn(self.lsn)


class Begin(NamedTuple):
    """Where a timeline begins."""

    timeline: int
    lsn: int


@dataclass(frozen=True)
class Wal:
    """What the store holds of the WAL of one cluster."""

    component: str
    system_identifier: str
    segment_size: int
    """Bytes."""
    files: Mapping[str, WalFile]
    """By their names, which the order of names is the order of."""
    histories: Mapping[int, tuple[Switch, ...]] = field(default_factory=dict)
    """The stored history files, by the timeline that each is of."""

    @property
    def segments(self) -> Iterator[Segment]:
        return (Segment.parse(name, self.segment_size) for name in self.files if SEGMENT.fullmatch(name))

    @property
    def timelines(self) -> list[int]:
        """The timelines that a file is of, in ascending order."""
        return sorted({segment.timeline for segment in self.segments} | set(self.histories))

    def lineage(self, timeline: int) -> list[Begin]:
        """Return the timelines that lead to ``timeline``, itself included, the oldest first."""
        switches = self.histories.get(timeline, ())
        timelines = [*(switch.timeline for switch in switches), timeline]
        begins = [0, *(switch.lsn for switch in switches)]
        return [Begin(*pair) for pair in zip(timelines, begins, strict=True)]

    def left_at(self, older: int, timeline: int) -> float:
        """Return the position up to which ``older`` is part of the way to ``timeline``: 0 when it is not, infinite for itself."""
        ways = {switch.timeline: float(switch.lsn) for switch in self.histories.get(timeline, ())}
        return {**ways, timeline: math.inf}.get(older, 0.0)

    def segment_at(self, number: int, timeline: int) -> Segment:
        """Return the segment that a recovery along ``timeline`` reads for a number.

        Where a timeline begins within a segment, its own file holds the older one's bytes up to there, and is read.
        """
        begun = [
            begin.timeline for begin in self.lineage(timeline) if begin.lsn // self.segment_size <= number
        ]
        return Segment(begun[-1], number)


def list_systems(store: Store, component: str) -> list[str]:
    """Return the system identifiers of the clusters whose WAL the store holds for a component."""
    return sorted({item.key.split("/")[2] for item in store.list(f"wal/{component}/")})


def list_wal(store: Store, component: str, system_identifier: str) -> Wal:
    """Return what the store holds of a cluster's WAL; the history files are read.

    Raises ``IntegrityError`` when a history file is damaged, or when a name has two contents, of which nobody can say
    which one is right.
    """
    files: dict[str, WalFile] = {}
    for item in store.list(folder(component, system_identifier)):
        if file := WalFile.of(item):
            other = files.get(file.name)
            if other and other.sha256 != file.sha256:
                raise IntegrityError(f"{file.name} has two contents in the store: {other.key} and {file.key}")
            files[file.name] = file
    histories = {}
    for name, file in files.items():
        if HISTORY.fullmatch(name):
            try:
                histories[int(name[:8], 16)] = parse_history(b"".join(read_wal(store, file.key)).decode())
            except ValueError as error:
                raise IntegrityError(f"{file.key} is no timeline history: {error}") from error
    return Wal(
        component,
        system_identifier,
        _segment_size(store, component, system_identifier, files),
        files,
        histories,
    )


def read_wal(store: Store, key: str) -> Iterator[bytes]:
    """Yield the plain bytes of a stored WAL file.

    Raises ``IntegrityError`` at their end when they do not have the digest that the key names, ``ObjectNotFound``,
    ``Permanent`` when it is encrypted and none of the private keys of the settings opens it.
    """
    match = KEY_NAME.fullmatch(key.rpartition("/")[2])
    if not match:
        raise IntegrityError(f"{key} is not the key of a WAL file")
    plain, stored = streams.Digest(), store.get(key)
    if key.endswith(ENCRYPTED):
        stored = decrypt(stored, get_settings().encryption.private_keys(), name=key)
    yield from plain.through(streams.decompress(stored, codec="zstd", name=key))
    if plain.sha256 != match["sha256"]:
        raise IntegrityError(f"{key} is damaged: its plain bytes have the SHA-256 {plain.sha256}")


def _segment_size(store: Store, component: str, system_identifier: str, files: Mapping[str, WalFile]) -> int:
    if newest := newest_collection(store, component, system_identifier):
        return newest.segment_size
    segments = (file.key for name, file in files.items() if SEGMENT.fullmatch(name))
    key = next((key for key in segments if not key.endswith(ENCRYPTED)), None)
    try:
        return Header.parse(next(read_wal(store, key), b"")).segment_size if key else DEFAULT_SEGMENT_SIZE
    except ValueError as error:
        raise IntegrityError(f"{key} is no WAL segment: {error}") from error


def collection_key(component: str, system_identifier: str, run_id: str) -> str:
    """Return the key of the record of a collection."""
    return f"{folder(component, system_identifier)}collections/{run_id}.json"


def list_collections(store: Store, component: str, system_identifier: str) -> list[Collection]:
    """Return the records of a cluster's collections, the oldest first. Raises ``IntegrityError`` for a damaged one."""
    keys = [item.key for item in store.list(f"{folder(component, system_identifier)}collections/")]
    return [read_collection(store, key) for key in keys]


def newest_collection(store: Store, component: str, system_identifier: str) -> Collection | None:
    """Return the record of a cluster's newest collection, ``None`` when there was none. Raises ``IntegrityError``."""
    keys = [item.key for item in store.list(f"{folder(component, system_identifier)}collections/")]
    return read_collection(store, keys[-1]) if keys else None


def read_collection(store: Store, key: str) -> Collection:
    """Return the record of a collection. Raises ``IntegrityError``, ``ObjectNotFound``."""
    try:
        return Collection.model_validate_json(b"".join(store.get(key)))
    except ValidationError as error:
        raise IntegrityError(f"{key} is not the record of a collection") from error


# -- gaps -----------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Positions from ``start`` up to, and without, ``end``."""

    start: int
    end: int


def missing(wal: Wal, timeline: int, start: int, end: int) -> list[str]:
    """Return the names of the files that are missing for a recovery along ``timeline`` from ``start`` to ``end``."""
    numbers = range(start // wal.segment_size, -(-end // wal.segment_size))
    names = [wal.segment_at(number, timeline).name(wal.segment_size) for number in numbers]
    if timeline > 1 and timeline not in wal.histories:
        names.insert(0, history_name(timeline))
    return [name for name in names if name not in wal.files]


def covered(wal: Wal, timeline: int) -> list[Range]:
    """Return the contiguous ranges of the log along ``timeline`` that the store holds, in ascending order."""
    numbers = sorted(
        segment.number for segment in wal.segments if wal.segment_at(segment.number, timeline) == segment
    )
    return [Range(run[0] * wal.segment_size, (run[-1] + 1) * wal.segment_size) for run in _runs(numbers)]


def reach(wal: Wal, timeline: int, start: int) -> int:
    """Return how far the store holds the log along ``timeline`` without a gap from ``start`` on: ``start`` if not at all."""
    return next((found.end for found in covered(wal, timeline) if found.start <= start < found.end), start)


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


# -- base backups and retention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseBackup:
    """What a part of the kind ``postgres-base`` says of itself in ``holds``: where its WAL begins and ends."""

    archive: str
    """Store key."""
    system_identifier: str
    timeline: int
    start_lsn: int
    stop_lsn: int
    """Recovery has to come this far for the data to be consistent."""
    finished: datetime
    """The server's clock when it was at ``stop_lsn``: the first moment that it can be recovered to."""
    with_wal: bool = False
    """Whether it holds its own WAL from start to stop, so that it can be recovered without any from the store."""
    manifest_sha256: str = ""
    needs: tuple[str, ...] = ()
    """Of an incremental one, the archives that are read before it, in this order."""

    @property
    def needs_from(self) -> int:
        """The position from which it needs the store's WAL."""
        return self.stop_lsn if self.with_wal else self.start_lsn

    @classmethod
    def of(cls, archive: str, holds: Mapping[str, Any]) -> Self:
        """Read ``holds``: ``system_identifier``, ``timeline``, ``start_lsn`` and ``stop_lsn`` (``16/B374D848``),
        ``finished`` (ISO 8601), ``with_wal``, ``manifest_sha256``, and ``needs``.
        """
        return cls(
            archive,
            str(holds["system_identifier"]),
            int(holds["timeline"]),
            parse_lsn(holds["start_lsn"]),
            parse_lsn(holds["stop_lsn"]),
            datetime.fromisoformat(str(holds["finished"])),
            bool(holds.get("with_wal", False)),
            str(holds.get("manifest_sha256", "")),
            tuple(holds.get("needs", ())),
        )


def goes_on(wal: Wal, timeline: int, base: BaseBackup, collections: Sequence[Collection]) -> bool:
    """Say whether there is WAL after a base backup that no collection speaks of: imported, or of one that did not end.

    Nobody knows up to which time it goes before a server reads it.
    """
    ends = [one.end for one in collections if one.end <= wal.left_at(one.timeline, timeline)]
    known = -(-max(base.stop_lsn, *ends, 0) // wal.segment_size) * wal.segment_size
    return reach(wal, timeline, base.needs_from) > known


def prunable(wal: Wal, kept: Sequence[BaseBackup], *, before: datetime) -> list[str]:
    """Return the keys of segments and backup labels that no base backup in ``kept`` needs and stored before ``before``.

    A base backup needs all that follows its start, on its own timeline and on later ones. History files are never
    among the keys: they are a few bytes, and say how timelines hang together. With no base backup kept, all that is
    old enough is prunable.
    """
    needs = [
        Segment(base.timeline, base.start_lsn // wal.segment_size)
        for base in kept
        if base.system_identifier == wal.system_identifier
    ]
    keys = []
    for name, file in wal.files.items():
        if HISTORY.fullmatch(name) or file.modified >= before.timestamp():
            continue
        found = Segment.parse(name[:24], wal.segment_size)
        if not any(found.timeline >= need.timeline and found.number >= need.number for need in needs):
            keys.append(file.key)
    return keys
