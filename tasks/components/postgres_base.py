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

from tasks.components.postgres_incremental import Parent, keep_manifest, manifest_of, require_incremental
from tasks.components.postgres_options import BackupOptions
from tasks.components.postgres_segments import HISTORY, SEGMENT, Segment, parse_lsn
from tasks.components.psql import Server
from workers.component import Part, Source, part_name, plain_command
from workers.errors import IntegrityError, Permanent
from workers.settings import get_settings
from workers.storage import open_store
from workers.tar import TreeDigest

BASE = "postgres-base"
"""Kind of the parts that are base backups."""
MANIFEST, LABEL, WAL_FOLDER = "backup_manifest", "backup_label", "pg_wal/"
HISTORIES = re.compile(rf"{WAL_FOLDER}{HISTORY.pattern}")
"""The histories of timelines come with the WAL of a server that was recovered once, and no manifest lists them."""
ARCHIVE_STATUS = f"{WAL_FOLDER}archive_status/"
"""Files in it say of WAL segments that they were archived; pg_combinebackup makes some."""
SHOWN = 5

FACTS = """
SELECT system_identifier::text AS system_identifier, current_setting('data_directory') AS data_dir,
       (SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_segment_size') AS segment_size,
       (SELECT coalesce(sum(pg_catalog.pg_database_size(oid)), 0)::bigint FROM pg_catalog.pg_database) AS size,
       ARRAY(SELECT datname FROM pg_catalog.pg_database WHERE NOT datistemplate ORDER BY 1) AS databases,
       ARRAY(SELECT spcname FROM pg_catalog.pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')) AS tablespaces,
       coalesce(current_setting('summarize_wal', true), 'off') AS summarize_wal,
       (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()) AS timeline_id
FROM pg_catalog.pg_control_system()
"""
HELD = ("system_identifier", "data_dir", "segment_size", "size", "databases")
"""The facts that the record of a base backup tells."""
OPTIONS = (
    "--pgdata=-",
    "--format=tar",
    "--wal-method=fetch",
    "--checkpoint=fast",
    "--manifest-checksums=SHA256",
    "--label=ai-micro-backup",
)
END = """
SELECT clock_timestamp() AS finished, pg_snapshot_xmax(pg_current_snapshot())::text AS next_xid,
       ARRAY(SELECT datname FROM pg_catalog.pg_database WHERE NOT datistemplate ORDER BY 1) AS databases
"""


def base_source(server: Server, component: str, database: str, asked: BackupOptions) -> Source:
    """Return the source of a base backup: a full one, or one that holds what changed since its parent.

    An incremental one that cannot be made of this parent becomes a full one, and ``holds`` says why. Raises ``Permanent`` for a
    cluster with tablespaces of its own, and for a server that makes no incremental ones.
    """
    with server.session(database) as session:
        facts = session.rows(FACTS)[0]
    if names := facts["tablespaces"]:
        raise Permanent(
            f"{component}: a base backup holds the data folder alone, and this cluster has the tablespaces "
            f"{', '.join(names)}; move what is in them (ALTER TABLE … SET TABLESPACE pg_default) and drop them"
        )
    manifest, instead = b"", ""
    if asked.base == "incremental":
        require_incremental(component, server.major, facts)
        manifest, instead = manifest_of(asked.parent, component, facts, open_store(get_settings().store))
    base = BaseStream(server, component, database, facts, asked.parent if manifest else None)
    if instead:
        base.made_full(instead)
    expected = None if manifest else facts["size"]
    name = part_name(f"{component}.base.tar")
    return Source("base", name, BASE, base.read(manifest), expected=expected, holds=base.holds)


class BaseStream:
    """One base backup that is being made, and what its record will say of it."""

    def __init__(
        self, server: Server, component: str, database: str, facts: Mapping[str, Any], parent: Parent | None
    ) -> None:
        self._server, self._component, self._database, self._facts = server, component, database, facts
        self._parent = parent
        self.holds: dict[str, Any] = {"server_version": server.version, "with_wal": True}
        self.holds |= {key: facts[key] for key in HELD}

    def read(self, manifest: bytes) -> Iterator[bytes]:
        """Yield its tar stream; with the parent's manifest that of an incremental one."""
        slot = f"ai_micro_backup_{secrets.token_hex(8)}"
        contents = Contents()
        with self._server.session(self._database) as session:
            # Temporary: whatever ends the session drops it. pg_basebackup itself takes a slot only to stream WAL.
            session.execute(f"SELECT pg_create_physical_replication_slot('{slot}', true, true)")
            yield from contents.through(self._chunks(manifest))
            ended = session.rows(END)[0]
        found = contents.manifest
        contents.require(found, int(self._facts["segment_size"]))
        if self._facts["summarize_wal"] == "on":
            store = open_store(get_settings().store)
            keep_manifest(store, self._component, self._facts["system_identifier"], contents.manifest_text)
        # Those that came or went meanwhile may be in it or not.
        ended["databases"] = [name for name in self.holds["databases"] if name in ended["databases"]]
        self.holds |= {
            **ended,
            "base": "incremental" if self._parent else "full",
            "started": found.started(contents.label),
            "timeline": found.timeline,
            "start_lsn": found.start_lsn,
            "stop_lsn": found.stop_lsn,
            "files": contents.files,
            "bytes": contents.size,
            "manifest_sha256": found.sha256,
        }
        if self._parent:
            self.holds["needs"] = list(self._parent.needs)
            self.holds["parent_manifest_sha256"] = self._parent.manifest_sha256

    def made_full(self, because: str) -> None:
        """Note that it is a full one, although an incremental one was asked for."""
        self._parent = None
        self.holds["warnings"] = [
            f"a full base backup was made, because an incremental one was not possible: {because}"
        ]

    def _chunks(self, manifest: bytes) -> Iterator[bytes]:
        argv = self._server.argv("pg_basebackup", self._database, *OPTIONS)
        if not manifest:
            yield from self._server.stream(argv)
            return
        chunks = self._server.stream([*argv, "--incremental=/dev/stdin"], sent=manifest)
        try:
            first = next(chunks, b"")
        except Permanent as error:  # the summaries of WAL since the parent are gone, for example
            self.made_full(str(error))
            yield from self._server.stream(argv)
            return
        yield first
        yield from chunks


def check_base(chunks: Iterable[bytes], holds: Mapping[str, Any]) -> None:
    """Read a base backup to its end and compare every file with its manifest. Raises ``IntegrityError``."""
    for _ in checked(chunks, holds):
        pass


def checked(chunks: Iterable[bytes], holds: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the chunks of a base backup and raise ``IntegrityError`` at their end when they are not one."""
    contents = Contents()
    yield from contents.through(chunks)
    if recorded := holds.get("contents_sha256"):  # of one that was imported: its manifest may lie elsewhere
        if contents.sha256 != recorded:
            raise IntegrityError("the base backup's files are not those that were recorded")
        return
    if contents.manifest.sha256 != holds["manifest_sha256"]:
        raise IntegrityError("the base backup's manifest is not the one that was recorded")
    contents.require(contents.manifest, int(holds["segment_size"]))


def check_combined(chunks: Iterable[bytes], segment_size: int) -> None:
    """Read a base backup that increments were combined to, to its end, and compare every file with the manifest that it got."""
    contents = Contents()
    for _ in contents.through(chunks):
        pass
    contents.require(contents.manifest, segment_size)


def base_by_hand(part: Part) -> str:
    """Return Markdown for RESTORE.md: how to start a server on a base backup with public tools alone."""
    holds = part.holds
    if needs := holds.get("needs"):
        folders = " ".join(f"part{number}" for number in range(1, len(needs) + 2))
        return (
            f"`{part.name}` is an incremental base backup (PostgreSQL {holds['server_version']}): what changed since the one before it. "
            f"It takes {len(needs)} more archives, in this order, before this one:\n\n"
            + "".join(f"{number}. `{key}`\n" for number, key in enumerate(needs, 1))
            + "\nUnpack the base backup in each into an empty folder of its own, this one last, and put them together:\n\n"
            f"```sh\nmkdir {folders}\n{plain_command(part)} | tar -xf - -C part{len(needs) + 1}\n"
            f"pg_combinebackup --output=data {folders}\npg_verifybackup data\n```\n\n"
            "Then go on as the RESTORE.md of the first archive says of its data folder.\n"
        )
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
            # pg_combinebackup 17 lists the WAL as well, without digests.
            listed = [file for file in document["Files"] if not _path(file).startswith(WAL_FOLDER)]
            files = {_path(file): _sha256(file) for file in listed}
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
    def sha256(self) -> str:
        return contents_digest(self._tree.contents)

    @property
    def label(self) -> bytes:
        return self._tree.kept.get(LABEL, b"")

    @property
    def manifest_text(self) -> bytes:
        """The manifest that came with it. Raises ``IntegrityError`` when there is none."""
        if MANIFEST not in self._tree.kept:
            raise IntegrityError(f"the base backup holds no {MANIFEST}: it is cut short")
        return self._tree.kept[MANIFEST]

    @property
    def manifest(self) -> Manifest:
        """What it says. Raises ``IntegrityError`` when there is none, or it is damaged."""
        return Manifest.parse(self.manifest_text)

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
        beside = (name for name in found if name.startswith(ARCHIVE_STATUS) or HISTORIES.fullmatch(name))
        for name in [*wal, *beside]:
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


def contents_digest(contents: Mapping[str, str]) -> str:
    """Return the digest of a listing: of the names of files and their digests, whatever their order."""
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(contents.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _path(file: Mapping[str, Any]) -> str:
    if "Path" in file:
        return str(file["Path"])
    return bytes.fromhex(file["Encoded-Path"]).decode(errors="backslashreplace")


def _sha256(file: Mapping[str, Any]) -> str:
    if file["Checksum-Algorithm"] != "SHA256":
        raise ValueError(f"{_path(file)} has no SHA-256")
    return str(file["Checksum"])
