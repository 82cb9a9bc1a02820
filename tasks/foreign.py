"""Archives that the runbook's scripts made: recognised by name and content, and read where they lie.

A file of theirs is a part itself, or a tar of such files: ``full_backup_*.tar.gz``, ``postgres_backup_*.tar.gz``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from tasks import archive
from tasks.archive import Archive, Metadata, RunRecord
from tasks.components import postgres_wal
from tasks.components.foreign import describe_foreign, tree_for
from tasks.components.foreign_base import describe_base
from tasks.components.postgres_base import BASE, MANIFEST
from tasks.foreign_forms import BESIDE, CONTAINER, Form, form_of, moment_of
from tasks.tar_members import tar_members
from workers import streams
from workers.component import BaseComponent, Part
from workers.errors import IntegrityError, ObjectNotFound, Permanent
from workers.settings import Settings, get_settings
from workers.storage import Store, StoredObject
from workers.streams import Digest

JOB = "import"
"""Job of the run in the record of such an archive."""


def members_of(key: str, chunks: Iterable[bytes]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the name and the stored bytes of each file in such an archive, whose bytes are ``chunks``, in order.

    Raises ``IntegrityError`` when it is damaged or cut short, or holds anything but files in one folder.
    """
    name = PurePosixPath(key).name
    if not CONTAINER.fullmatch(name):
        yield name, iter(chunks)
        return
    plain = streams.decompress(chunks, codec="gzip", name=key)
    with closing(plain):
        yield from tar_members(plain, key, folders_too=True)


def read_members(store: Store, key: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the files of a stored archive; see `members_of`."""
    return members_of(key, store.get(key))


def read_parts(store: Store, key: str, parts: Sequence[Part]) -> Iterator[tuple[Part, Iterator[bytes]]]:
    """Yield parts with their plain bytes; see `tasks.archive.read_parts`. One file may be a part of several components."""
    left = list(parts)
    while left:
        wanted = {part.name: part for part in left}
        for name, chunks in read_members(store, key):
            if part := wanted.pop(name, None):
                left.remove(part)
                yield part, archive.plain_chunks(part, chunks, key)
            if not wanted:
                break
        if wanted:
            raise IntegrityError(f"{key} lacks {', '.join(wanted)}")


def record_of(store: Store, key: str) -> Archive | None:
    """Return the record of an archive that was imported; ``None`` for one of ours, and for one without a record."""
    try:
        found = archive.read_sidecar(store, key)
    except (ObjectNotFound, IntegrityError):
        return None
    return found if found.metadata.run.job == JOB else None


def verify(store: Store, found: Archive) -> Metadata:
    """Read such an archive to its last byte and compare it with its record. Raises ``IntegrityError``."""
    parts = {part.name: part for part in found.metadata.parts}
    for name, chunks in read_members(store, found.key):
        if part := parts.pop(name, None):
            for _ in archive.plain_chunks(part, chunks, found.key):
                pass
        elif name not in BESIDE:
            raise IntegrityError(f"{found.key} holds {name}, which its record does not name")
    if parts:
        raise IntegrityError(f"{found.key} lacks {', '.join(parts)}")
    return found.metadata


def recognise(store: Store, item: StoredObject, components: Sequence[str]) -> Archive:
    """Read such an archive to its end and return the record of it; nothing of it is guessed.

    ``components`` are those that it may be of; by default, those of the settings of the right kind. Raises
    ``IntegrityError`` for what is damaged, smaller than any archive, or not what its name says, ``Permanent`` where no
    component, or more than one, can be meant.
    """
    settings, key = get_settings(), item.key
    archive.require_size(key, item.size)
    stored, parts = Digest(), list[Part]()
    said: dict[str, Any] = {}
    named = moment_of(PurePosixPath(key).name, datetime.fromtimestamp(item.modified, UTC))
    reader = Reader(store, key, named, settings, components)
    for name, chunks in members_of(key, stored.through(store.get(key))):
        if name == "metadata.json":
            said = _metadata(b"".join(chunks), key)
        elif name == "backup.log":
            for _ in chunks:
                pass
        else:
            parts += reader.parts(name, chunks)
    if not parts:
        raise IntegrityError(f"{key} holds nothing that the runbook's scripts write")
    moment = datetime.fromisoformat(said["backup_time"]).astimezone(UTC) if "backup_time" in said else named
    counts: dict[str, set[str]] = {}
    for part in parts:
        counts.setdefault(settings.components[part.component].metadata_key, set()).add(part.name)
    return Archive(
        key=key,
        size=stored.size,
        sha256=stored.sha256,
        metadata=Metadata(
            backup_time=moment,
            system_version=str(said.get("system_version", settings.system.version)),
            components={name: f"{len(names)} files" for name, names in counts.items()},
            system_name=settings.system.name,
            run=RunRecord(id=f"{named:%Y%m%d_%H%M%S}", job=JOB, started=moment, finished=moment),
            parts=tuple(parts),
        ),
    )


@dataclass(frozen=True)
class Reader:
    """Reads the files of one such archive, and what each of them is."""

    store: Store
    key: str
    moment: datetime
    """When it was made; a file may say otherwise of itself."""
    settings: Settings
    components: Sequence[str]
    """Those that may be meant; all when it is empty."""

    def parts(self, name: str, chunks: Iterable[bytes]) -> list[Part]:
        """Read the stored ``chunks`` of a file to their end and return its record, for each component that it is of."""
        form = form_of(name)
        match = form.name.fullmatch(name) if form else None
        if form is None or match is None:
            raise IntegrityError(f"{self.key} holds {name}, which no script of the runbook writes")
        stored, plain = Digest(), Digest()
        where = f"{name} in {self.key}"
        codec = "gzip" if name.endswith(".gz") else "none"
        chunks = plain.through(streams.decompress(stored.through(chunks), codec=codec, name=where))
        holds: dict[str, Any] = {}
        if form.part_kind == BASE:
            holds = self._base(form, chunks, where)
        elif form.begins is None:
            holds = describe_foreign(chunks)
        else:
            form.read_edges(chunks, where)
            if "database" in match.groupdict():
                holds = {"database": match["database"]}
        for _ in chunks:
            pass
        moment = moment_of(name, self.moment)
        return [
            Part(
                name=name,
                component=component.name,
                host=component.host,
                kind=form.part_kind,
                codec=codec,
                size=stored.size,
                sha256=stored.sha256,
                plain_size=plain.size,
                plain_sha256=plain.sha256,
                started=moment,
                finished=moment,
                holds=holds,
            )
            for component in self._meant(form, holds, name)
        ]

    def _base(self, form: Form, chunks: Iterable[bytes], where: str) -> dict[str, Any]:
        (component,) = self._meant(form, {}, where)

        def find_label(system: str, file: str) -> bytes:
            found = postgres_wal.list_wal(self.store, component.name, system).files.get(file)
            return b"".join(postgres_wal.read_wal(self.store, found.key)) if found else b""

        try:
            manifest = b"".join(self.store.get(str(PurePosixPath(self.key).with_name(MANIFEST))))
        except ObjectNotFound:
            manifest = None
        return describe_base(chunks, name=where, manifest=manifest, find_label=find_label)

    def _meant(self, form: Form, holds: dict[str, Any], name: str) -> list[BaseComponent]:
        """Return the components that a file is of: of a tar of file trees, each that has a tree in it; else the only one."""
        if form.kind != "files":
            return [only_component(self.settings, form.kind, self.components, name)]
        known = candidates(self.settings, form.kind, self.components)
        if chosen := [component for component in known if _has_tree(component, holds)]:
            return chosen
        trees = ", ".join(holds["trees"]) or "nothing"
        raise Permanent(f"{name} holds {trees}, which no component of the kind files has as its path")


def candidates(settings: Settings, kind: str, components: Sequence[str]) -> list[BaseComponent]:
    """Return the components of a kind, of those named when any is."""
    known = [component for component in settings.components.values() if component.kind == kind]
    return [component for component in known if not components or component.name in components]


def only_component(settings: Settings, kind: str, components: Sequence[str], name: str) -> BaseComponent:
    """Return the one component of a kind that ``name`` can be of. Raises ``Permanent`` for none, or several."""
    chosen = candidates(settings, kind, components)
    if len(chosen) != 1:
        names = ", ".join(component.name for component in candidates(settings, kind, ())) or "none"
        raise Permanent(f"{name} is of a component of the kind {kind} ({names}); say which: --component")
    return chosen[0]


def _has_tree(component: BaseComponent, holds: dict[str, Any]) -> bool:
    try:
        tree_for(PurePosixPath(getattr(component, "path", "")).name, holds)
    except Permanent:
        return False
    return True


def _metadata(text: bytes, key: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
        if "format_version" in said:
            raise IntegrityError(f"{key} is an archive of ai-micro-backup: use rebuild")
        datetime.fromisoformat(said.get("backup_time", "2000-01-01"))
    except (ValueError, AttributeError, TypeError) as error:
        raise IntegrityError(f"the metadata.json of {key} is not the runbook's") from error
    return dict(said)
