"""Base backups: a PostgreSQL cluster's files as one tar stream of pg_basebackup, with the WAL that they need.

The stream is compared with PostgreSQL's own manifest of it, every byte, while it passes. A replication slot that lives as
long as its session keeps the WAL until it is in the stream, so a base backup can be recovered to its own end without any
other file, and from there on with the WAL of the store.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from tasks.components.postgres_segments import SEGMENT, Segment, parse_lsn
from tasks.components.psql import Server
from workers.component import Part, Source, part_name, plain_command
from workers.errors import IntegrityError, Permanent
from workers.tar import TreeDigest

BASE = "postgres-base"
"""Kind of the parts that are base backups."""
MANIFEST, LABEL, WAL_FOLDER = "backup_manifest", "backup_label", "pg_wal/"
SHOWN = 5

FACTS = """
SELECT system_identifier::text AS system_identifier, current_setting('data_directory') AS data_dir,
       (SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_segment_size') AS segment_size,
       (SELECT coalesce(sum(pg_catalog.pg_database_size(oid)), 0)::bigint FROM pg_catalog.pg_database) AS size,
       ARRAY(SELECT datname FROM pg_catalog.pg_database WHERE NOT datistemplate ORDER BY 1) AS databases,
       ARRAY(SELECT spcname FROM pg_catalog.pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')) AS tablespaces
FROM pg_catalog.pg_control_system()
"""
END = "SELECT clock_timestamp() AS finished, pg_snapshot_xmax(pg_current_snapshot())::text AS next_xid"


def base_source(server: Server, component: str, database: str) -> Source:
    """Return the source of a full base backup. Raises ``Permanent`` for a cluster with tablespaces of its own."""
    with server.session(database) as session:
        facts = session.rows(FACTS)[0]
    if names := facts.pop("tablespaces"):
        raise Permanent(
            f"{component}: a base backup holds the data folder alone, and this cluster has the tablespaces "
            f"{', '.join(names)}; move what is in them (ALTER TABLE … SET TABLESPACE pg_default) and drop them"
        )
    holds = {"server_version": server.version, "base": "full", "with_wal": True, **facts}
    chunks = _read(server, database, holds)
    return Source(
        "base", part_name(f"{component}.base.tar"), BASE, chunks, expected=facts["size"], holds=holds
    )


def _read(server: Server, database: str, holds: dict[str, Any]) -> Iterator[bytes]:
    slot = f"ai_micro_backup_{secrets.token_hex(8)}"
    options = [
        "--pgdata=-",
        "--format=tar",
        "--wal-method=fetch",
        "--checkpoint=fast",
        "--manifest-checksums=SHA256",
    ]
    argv = server.argv("pg_basebackup", database, *options, "--label=ai-micro-backup")
    with server.session(database) as session:
        # Temporary: whatever ends the session drops it. pg_basebackup itself takes a slot only to stream WAL.
        session.execute(f"SELECT pg_create_physical_replication_slot('{slot}', true, true)")
        contents = Contents()
        yield from contents.through(server.stream(argv))
        ended = session.rows(END)[0]
    manifest = contents.manifest
    contents.require(manifest, int(holds["segment_size"]))
    holds |= {
        **ended,
        "started": manifest.started(contents.label),
        "timeline": manifest.timeline,
        "start_lsn": manifest.start_lsn,
        "stop_lsn": manifest.stop_lsn,
        "files": contents.files,
        "bytes": contents.size,
        "manifest_sha256": manifest.sha256,
    }


def check_base(chunks: Iterable[bytes], holds: Mapping[str, Any]) -> None:
    """Read a base backup to its end and compare every file with its manifest. Raises ``IntegrityError``."""
    for _ in checked(chunks, holds):
        pass


def checked(chunks: Iterable[bytes], holds: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the chunks of a base backup and raise ``IntegrityError`` at their end when they are not one."""
    contents = Contents()
    yield from contents.through(chunks)
    if contents.manifest.sha256 != holds["manifest_sha256"]:
        raise IntegrityError("the base backup's manifest is not the one that was recorded")
    contents.require(contents.manifest, int(holds["segment_size"]))


def base_by_hand(part: Part) -> str:
    """Return Markdown for RESTORE.md: how to start a server on a base backup with public tools alone."""
    holds = part.holds
    return (
        f"`{part.name}` is a base backup of the whole cluster (PostgreSQL {holds['server_version']}), with its WAL. As the "
        "server's user, while the server is stopped, unpack it into an empty data folder and start the server on it:\n\n"
        f"```sh\nmkdir -m 700 data\n{plain_command(part)} | tar -xf - -C data\n"
        "pg_verifybackup data\n```\n\n"
        f"That brings back the moment {holds['finished']}. For a later one, before the start, `touch data/recovery.signal` and "
        "set `restore_command` and a `recovery_target_time` in `data/postgresql.conf`; the store's WAL is below "
        f"`wal/{part.component}/{holds['system_identifier']}/`:\n\n"
        f"```\nrestore_command = 'zstd -dc <store>/wal/{part.component}/{holds['system_identifier']}/%f-*.zst > %p'\n"
        "recovery_target_action = 'promote'\n```\n"
    )


@dataclass(frozen=True)
class Manifest:
    """PostgreSQL's manifest of a base backup ("Backup Manifest Format" in its manual)."""

    files: Mapping[str, str]
    """The SHA-256 of each file but the WAL, by its name."""
    timeline: int
    start_lsn: str
    stop_lsn: str
    sha256: str

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read a manifest. Raises ``IntegrityError`` when it does not have the digest that it says of itself."""
        try:
            document = json.loads(text)
            files = {_path(file): _sha256(file) for file in document["Files"]}
            ranges = document["WAL-Ranges"]
            # The digest is that of all up to the line that holds it.
            body = text[: text.rindex(b'"Manifest-Checksum"')]
            recorded = str(document["Manifest-Checksum"])
            first, last = ranges[0], ranges[-1]
            start, stop = str(first["Start-LSN"]), str(last["End-LSN"])
            parse_lsn(start), parse_lsn(stop)
            timeline = int(last["Timeline"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise IntegrityError(f"the base backup's {MANIFEST} is damaged: {error!r}") from error
        if hashlib.sha256(body).hexdigest() != recorded:
            raise IntegrityError(f"the base backup's {MANIFEST} does not have the digest that it says")
        return cls(files, timeline, start, stop, hashlib.sha256(text).hexdigest())

    def started(self, label: bytes) -> str:
        """Return when the base backup began, from its label, in the server's words."""
        found = re.search(rb"^START TIME: (.+)$", label, re.MULTILINE)
        return found[1].decode() if found else ""

    def segments(self, segment_size: int) -> set[str]:
        """Return the names of the WAL segments without which the base backup is not consistent."""
        numbers = range(
            parse_lsn(self.start_lsn) // segment_size, (parse_lsn(self.stop_lsn) - 1) // segment_size + 1
        )
        return {Segment(self.timeline, number).name(segment_size) for number in numbers}


class Contents:
    """What the tar stream of a base backup holds, found out while it passes ``through``."""

    def __init__(self) -> None:
        # Version 1 lists the plain SHA-256 of every content, as PostgreSQL's manifest does.
        self._tree = TreeDigest(outward_links=0, listing=True, keep=(MANIFEST, LABEL), version=1)

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the chunks. Raises ``IntegrityError`` when they are no tar archive, or one that is unsafe to unpack."""
        return self._tree.through(chunks)

    @property
    def files(self) -> int:
        return self._tree.files

    @property
    def size(self) -> int:
        return self._tree.bytes

    @property
    def label(self) -> bytes:
        return self._tree.kept.get(LABEL, b"")

    @property
    def manifest(self) -> Manifest:
        """The manifest that came with it. Raises ``IntegrityError`` when there is none, or it is damaged."""
        if MANIFEST not in self._tree.kept:
            raise IntegrityError(f"the base backup holds no {MANIFEST}: it is cut short")
        return Manifest.parse(self._tree.kept[MANIFEST])

    def require(self, manifest: Manifest, segment_size: int) -> None:
        """Raise ``IntegrityError`` unless it holds the files of the manifest, all the WAL it needs, and nothing else."""
        found = dict(self._tree.contents)
        del found[MANIFEST]
        wal = {
            name
            for name in found
            if name.startswith(WAL_FOLDER) and SEGMENT.fullmatch(name[len(WAL_FOLDER) :])
        }
        if missing := manifest.segments(segment_size) - {name[len(WAL_FOLDER) :] for name in wal}:
            raise IntegrityError(f"the base backup lacks WAL that it needs: {', '.join(sorted(missing))}")
        for name in wal:
            del found[name]
        differing = sorted(
            name
            for name in found.keys() | manifest.files.keys()
            if found.get(name) != manifest.files.get(name)
        )
        if differing:
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            raise IntegrityError(
                f"the base backup is not what its manifest says: {', '.join(differing[:SHOWN])}{more}"
            )


def _path(file: Mapping[str, Any]) -> str:
    if "Path" in file:
        return str(file["Path"])
    return bytes.fromhex(file["Encoded-Path"]).decode(errors="backslashreplace")


def _sha256(file: Mapping[str, Any]) -> str:
    if file["Checksum-Algorithm"] != "SHA256":
        raise ValueError(f"{_path(file)} has no SHA-256")
    return str(file["Checksum"])
