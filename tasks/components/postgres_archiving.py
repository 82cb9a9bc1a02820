"""The server's side of collecting WAL: the folder that ``archive_command`` fills, and the server that fills it.

The folder holds what is not in the store yet. Whatever is read from it is checked to be what its name says before it is
committed, and is removed from it after that.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from tasks.components.postgres_segments import (
    HISTORY,
    LABEL,
    SEGMENT,
    Header,
    Segment,
    parse_history,
    parse_lsn,
)
from tasks.components.postgres_wal import Collection
from tasks.components.psql import Session, literal
from workers.errors import IntegrityError, Permanent
from workers.runtime import Runtime, run, stream

HEADER_BYTES = 40
MAGICS = {13: 0xD106, 14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
"""`XLOG_PAGE_MAGIC` in PostgreSQL's xlog_internal.h, by major version."""

LIST = r"""
cd -- "$1" && ls -A >/dev/null || exit
find . -maxdepth 1 -type f -exec stat -c '%s %n' {} + 2>/dev/null
true
"""
"""Sizes and names of the files in ``$1``; one that is renamed meanwhile is passed over."""
DIGEST = 'cd -- "$1" && shift && exec sha256sum -- "$@"'
REMOVE = 'cd -- "$1" && shift && exec rm -f -- "$@"'

CLUSTER = """
SELECT (SELECT system_identifier FROM pg_control_system())::text AS system_identifier,
       current_setting('server_version_num')::int / 10000 AS major,
       pg_size_bytes(current_setting('wal_segment_size')) AS segment_size,
       pg_is_in_recovery() AS in_recovery
"""
ARCHIVER = """
SELECT archived_count, last_archived_wal, last_archived_time, failed_count, last_failed_wal, last_failed_time, stats_reset,
       failed_count > 0 AND last_failed_time > coalesce(last_archived_time, '-infinity') AS failing
FROM pg_stat_archiver
"""


def archive_command(folder: str) -> str:
    """Return the ``archive_command`` for a folder: it never overwrites, and what it reports as archived is durable.

    PostgreSQL asks for both, and for success with a file that is there with the same content, which happens after a crash
    ("Continuous Archiving" in its manual).
    """
    there = shlex.quote(folder.replace("%", "%%"))
    return (
        f"if test -e {there}/%f; then cmp -s %p {there}/%f; "
        f"else cp %p {there}/%f.tmp && sync {there}/%f.tmp && mv {there}/%f.tmp {there}/%f && sync {there}; fi"
    )


SLOT = """
SELECT slot_name AS name, active, wal_status, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint AS lag
FROM pg_replication_slots WHERE slot_name = {name}
"""


@dataclass(frozen=True)
class Cluster:
    """What a server says of itself, and every segment of it must say, too."""

    system_identifier: str
    major: int
    segment_size: int

    @classmethod
    def of(cls, session: Session) -> Self:
        """Ask a server. Raises ``Permanent`` when it is a standby, which cannot close segments."""
        row = session.rows(CLUSTER)[0]
        if row.pop("in_recovery"):
            raise Permanent("the server is a standby; WAL is collected from its primary")
        return cls(**row)

    def require(self, name: str, header: Header) -> None:
        """Raise ``IntegrityError`` unless a segment of this name and header is of this cluster."""
        segment = Segment.parse(name, self.segment_size)
        magic = MAGICS.get(self.major, header.magic)
        faults = {
            f"is of the system {header.system_identifier}, this server is {self.system_identifier}": (
                header.system_identifier != self.system_identifier
            ),
            f"was not written by PostgreSQL {self.major}": header.magic != magic,
            f"holds segments of {header.segment_size} bytes": header.segment_size != self.segment_size,
            "holds another part of the log": header.lsn != segment.number * self.segment_size,
            f"is of timeline {header.timeline}": not 0 < header.timeline <= segment.timeline,
        }
        if found := [fault for fault, is_so in faults.items() if is_so]:
            raise IntegrityError(f"{name} is not the WAL segment of that name: it {', '.join(found)}")


@dataclass(frozen=True)
class WalArchive:
    """The folder, seen where the server is."""

    runtime: Runtime
    folder: str

    def sizes(self) -> dict[str, int]:
        """Return the WAL files in the folder, in the order of the log, with their sizes in bytes.

        Others are no concern of ours: segments that are not finished (``.partial``), files being written.
        """
        found = {}
        for line in (
            run(self.runtime, ["sh", "-c", LIST, "sh", self.folder]).decode(errors="replace").splitlines()
        ):
            size, _, path = line.partition(" ")
            name = path.removeprefix("./")
            if size.isdecimal() and any(kind.fullmatch(name) for kind in (SEGMENT, HISTORY, LABEL)):
                found[name] = int(size)
        return dict(sorted(found.items()))

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Return the SHA-256 of files."""
        output = run(self.runtime, ["sh", "-c", DIGEST, "sh", self.folder, *names]).decode()
        return {line[66:]: line[:64] for line in output.splitlines()}

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; one that is gone is no error."""
        run(self.runtime, ["sh", "-c", REMOVE, "sh", self.folder, *names])

    def read(self, name: str, sha256: str, cluster: Cluster) -> Iterator[bytes]:
        """Yield the bytes of a file. Raises ``IntegrityError`` at their end when they are not what its name says.

        ``sha256`` is what they were a moment ago.
        """
        digest, start, size = hashlib.sha256(), b"", 0
        small = not SEGMENT.fullmatch(name)
        for chunk in stream(self.runtime, ["cat", "--", f"{self.folder}/{name}"]):
            digest.update(chunk)
            size += len(chunk)
            if small or len(start) < HEADER_BYTES:
                start += chunk
            yield chunk
        if digest.hexdigest() != sha256:
            raise IntegrityError(f"{self.folder}/{name} changed while it was read")
        try:
            if SEGMENT.fullmatch(name):
                cluster.require(name, Header.parse(start))
                if size != cluster.segment_size:
                    raise IntegrityError(f"{name} has {size} bytes, a segment has {cluster.segment_size}")
            elif HISTORY.fullmatch(name):
                parse_history(start.decode())
            elif not start.startswith(b"START WAL LOCATION: "):
                raise IntegrityError(f"{name} is no label of a base backup")
        except ValueError as error:
            raise IntegrityError(f"{self.folder}/{name} is not what its name says: {error}") from error


def close_segment(session: Session, cluster: Cluster, previous: Collection | None) -> Collection:
    """Let the server close its segment, so that it is archived, and return what the WAL holds then.

    A server that has written nothing since closes none. When something was committed, a transaction of our own marks the
    time in the WAL: a recovery finds where to stop only at a later commit.
    """
    taken = session.value("clock_timestamp()")
    timeline = int(session.value("left(pg_walfile_name(pg_current_wal_lsn()), 8)"), 16)
    # A transaction that ended since shows in the snapshot, even one that was open then.
    snapshot = session.value("pg_current_snapshot()::text")
    marked = previous.marked if previous else taken
    if previous is None or (previous.timeline, previous.snapshot) != (timeline, snapshot):
        session.execute(
            "SET synchronous_commit = local"
        )  # a standby that is away must not hold up a collection
        session.value("pg_current_xact_id()")
        snapshot, marked = session.value("pg_current_snapshot()::text"), taken
    lsn = str(session.value("pg_switch_wal()"))
    last = Segment(timeline, (parse_lsn(lsn) - 1) // cluster.segment_size).name(cluster.segment_size)
    if previous and previous.last == last:
        lsn = previous.lsn  # nothing was written; the server says where its next segment begins
    return Collection(
        taken=taken,
        lsn=lsn,
        timeline=timeline,
        last=last,
        marked=marked,
        segment_size=cluster.segment_size,
        snapshot=snapshot,
    )


def slot_troubles(session: Session, name: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return a replication slot with its ``lag`` in bytes, and what is wrong with it. ``None`` when it is not there."""
    row = next(iter(session.rows(SLOT.format(name=literal(name)))), None)
    if row is None:
        return None, [f"there is no replication slot {name}; its pg_receivewal creates it with --create-slot"]
    troubles = []
    if not row["active"]:
        troubles.append(
            f"nobody receives WAL from the replication slot {name}; is its pg_receivewal running?"
        )
    if row["wal_status"] in ("unreserved", "lost"):
        troubles.append(
            f"the server has given up WAL that the replication slot {name} wanted: it is {row['wal_status']}"
        )
    return row, troubles


@dataclass(frozen=True)
class Archiver:
    """How ``archive_command`` fares, as ``pg_stat_archiver`` says."""

    row: dict[str, Any]

    @classmethod
    def of(cls, session: Session) -> Self:
        return cls(session.rows(ARCHIVER)[0])

    def trouble(self, since: datetime | None) -> str | None:
        """Return what went wrong after ``since``, ``None`` when nothing did."""
        row = self.row
        last = row["last_failed_time"]
        if not row["failed_count"] or (
            not row["failing"] and since and datetime.fromisoformat(last) <= since
        ):
            return None
        state = "and has not succeeded since" if row["failing"] else "and has succeeded since"
        return (
            f"archive_command failed, last for {row['last_failed_wal']} at {last}, {state} "
            f"({row['failed_count']} failures since {row['stats_reset']}); the server's log says why"
        )
