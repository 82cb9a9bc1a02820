"""WAL that lies in the store as the runbook's scripts leave it, taken into the store's WAL of its cluster.

Loose files in a folder (``wal_archive/``), or a tar of them (``pg_wal.tar.gz`` of pg_basebackup, ``wal_*.tar.gz``). Each
segment says of which cluster it is; a history file or label does not, so it is of the cluster that the segments beside it
are of. What is taken in is read twice: to check it, then to store it under the digest that it had.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tasks.components.postgres_archiving import HEADER_BYTES, MAGICS, Cluster
from tasks.components.postgres_segments import HISTORY, LABEL, SEGMENT, Header, parse_history
from tasks.components.postgres_wal import covered, list_systems, list_wal, missing, wal_key
from tasks.foreign_forms import MOMENT
from tasks.tar_members import tar_members
from workers import streams
from workers.errors import IntegrityError, ObjectExists, Permanent
from workers.locks import Lease
from workers.settings import get_settings
from workers.storage import Store
from workers.streams import Digest

TAR = re.compile(rf"(pg_)?wal(_archive|_backup|_files)?(_{MOMENT})?\.tar(\.gz)?")
STATUS = "archive_status"
"""The folder in which a server notes what it has archived."""
SMALL = 1 << 20
"""Bytes that no history file or label has."""
KINDS = (SEGMENT, HISTORY, LABEL)

Members = Callable[[], Iterator[tuple[str, Iterator[bytes]]]]
"""Yields WAL files with their plain bytes; may be called again."""


def is_wal(key: str) -> bool:
    """Say whether a key has the name of a WAL file, or of a tar of them."""
    name = PurePosixPath(key).name
    return bool(TAR.fullmatch(name)) or _is_wal_file(name.removesuffix(".gz"))


def _is_wal_file(name: str) -> bool:
    return any(kind.fullmatch(name) for kind in KINDS)


@dataclass(frozen=True)
class Seen:
    """A WAL file that was read to its end and is what its name says."""

    sha256: str
    cluster: Cluster | None
    """``None`` for a history file or a label."""


@dataclass
class WalImport:
    """One import of WAL into a component's."""

    store: Store
    component: str
    lease: Lease
    imported: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    stored: dict[str, dict[str, str]] = field(default_factory=dict)
    """The digests of what the store holds of each cluster whose WAL was seen, by file name."""

    def take_in(self, keys: Sequence[str]) -> None:
        """Take in what lies under keys that `is_wal` holds of: a tar as a whole or not at all, each loose file by itself."""
        folders: dict[str, list[str]] = {}
        for key in keys:
            if TAR.fullmatch(PurePosixPath(key).name):
                self._tar(key)
            else:
                folders.setdefault(str(PurePosixPath(key).parent), []).append(key)
        for loose in folders.values():
            self._folder(loose)

    def gaps(self) -> list[str]:
        """Return a line for each cluster whose WAL is not without a gap."""
        lines = []
        for system in sorted(self.stored):
            wal = list_wal(self.store, self.component, system)
            for timeline in wal.timelines:
                held = covered(wal, timeline)
                if held and (names := missing(wal, timeline, held[0].start, held[-1].end)):
                    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                    lines.append(f"WAL of {self.component} (cluster {system}) has a gap: {names[0]}{more}")
        return lines

    def _tar(self, key: str) -> None:
        def members() -> Iterator[tuple[str, Iterator[bytes]]]:
            with closing(self._plain(key)) as plain:
                for name, chunks in tar_members(plain, key, folders_too=True, skip=_is_status):
                    if not _is_wal_file(name):
                        raise IntegrityError(f"{key} holds {name}, which is no WAL file")
                    yield name, chunks

        try:
            seen = {name: look(name, chunks) for name, chunks in members()}
            if not seen:
                raise IntegrityError(f"{key} holds no WAL")
            new = self._new(seen, seen)
        except (IntegrityError, Permanent) as error:
            self.refused[key] = f"{key}: {error}"
            return
        self._store(members(), seen, new)
        (self.imported if new else self.known).append(key)

    def _folder(self, keys: Sequence[str]) -> None:
        seen: dict[str, Seen] = {}
        by_name: dict[str, str] = {}
        for key in keys:
            name = PurePosixPath(key).name.removesuffix(".gz")
            try:
                if name in seen:
                    raise IntegrityError(
                        f"{name} lies here twice, as {PurePosixPath(by_name[name]).name} too"
                    )
                seen[name] = look(name, self._plain(key))
                by_name[name] = key
            except IntegrityError as error:
                self.refused[key] = str(error)
        for name, found in seen.items():
            key = by_name[name]
            try:
                new = self._new({name: found}, seen)
            except (IntegrityError, Permanent) as error:
                self.refused[key] = str(error)
                continue
            self._store([(name, self._plain(key))] if new else [], seen, new)
            (self.imported if new else self.known).append(key)

    def _plain(self, key: str) -> Generator[bytes]:
        codec = "gzip" if key.endswith(".gz") else "none"
        return streams.decompress(self.store.get(key), codec=codec, name=key)

    def _new(self, files: dict[str, Seen], beside: dict[str, Seen]) -> dict[str, str]:
        """Return those of ``files`` that the store's WAL lacks, each with the key it gets.

        Raises ``Permanent`` where it holds another content under one of the names, or nothing says of which cluster one is.
        """
        new: dict[str, str] = {}
        for name, found in files.items():
            system = found.cluster.system_identifier if found.cluster else self._only_system(name, beside)
            if system not in self.stored:
                there = list_wal(self.store, self.component, system).files
                self.stored[system] = {file.name: file.sha256 for file in there.values()}
            stored = self.stored[system].get(name)
            if stored is None:
                # As a collection does: histories stay readable where no private key is.
                encrypted = bool(SEGMENT.fullmatch(name) and get_settings().encryption.recipients)
                new[name] = wal_key(self.component, system, name, found.sha256, encrypted=encrypted)
            elif stored != found.sha256:
                raise Permanent(
                    f"{name} of cluster {system} is stored with another content (SHA-256 {stored}); nothing was overwritten"
                )
        return new

    def _only_system(self, name: str, beside: dict[str, Seen]) -> str:
        systems = {found.cluster.system_identifier for found in beside.values() if found.cluster}
        systems = systems or set(list_systems(self.store, self.component))
        if len(systems) != 1:
            raise Permanent(f"nothing says of which cluster {name} is: {len(systems)} could be meant")
        return systems.pop()

    def _store(
        self, members: Iterable[tuple[str, Iterator[bytes]]], seen: dict[str, Seen], new: dict[str, str]
    ) -> None:
        settings = get_settings()
        for name, chunks in members:
            if key := new.get(name):
                recipients = settings.encryption.recipients if SEGMENT.fullmatch(name) else ()
                with contextlib.suppress(ObjectExists):  # its key says that it is the same
                    streams.write(
                        self.store,
                        key,
                        self._same(name, seen[name].sha256, chunks),
                        level=settings.compression_level,
                        recipients=recipients,
                    )
                self.stored[key.split("/")[2]][name] = seen[name].sha256

    def _same(self, name: str, sha256: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        digest = Digest()
        yield from digest.through(chunks)
        if digest.sha256 != sha256:
            raise IntegrityError(f"{name} changed while it was imported")
        self.lease.check()  # raised before the end of the stream, so that the store does not commit it


def look(name: str, chunks: Iterable[bytes]) -> Seen:
    """Read a WAL file to its end. Raises ``IntegrityError`` when it is not what its name says."""
    digest, start, segment = Digest(), b"", bool(SEGMENT.fullmatch(name))
    for chunk in digest.through(chunks):
        if len(start) < (HEADER_BYTES if segment else SMALL):
            start += chunk
    try:
        if segment:
            cluster = _cluster(Header.parse(start))
            cluster.require(name, Header.parse(start))
            if digest.size != cluster.segment_size:
                raise IntegrityError(
                    f"{name} has {digest.size} bytes, a segment of its cluster has {cluster.segment_size}"
                )
            return Seen(digest.sha256, cluster)
        if HISTORY.fullmatch(name):
            parse_history(start.decode())
        elif not start.startswith(b"START WAL LOCATION: "):
            raise IntegrityError(f"{name} is no label of a base backup")
    except ValueError as error:
        raise IntegrityError(f"{name} is not what its name says: {error}") from error
    return Seen(digest.sha256, None)


def _cluster(header: Header) -> Cluster:
    major = next((major for major, magic in MAGICS.items() if magic == header.magic), None)
    if major is None:
        raise ValueError(f"its page magic {header.magic:04X} is of no version of PostgreSQL that is known")
    return Cluster(header.system_identifier, major, header.segment_size)


def _is_status(name: str) -> bool:
    return STATUS in PurePosixPath(name).parts
