"""Archives that the runbook's scripts made: recognised by name and content, and read where they lie.

A file of theirs is a part itself, or a tar of such files: ``full_backup_*.tar.gz``, ``postgres_backup_*.tar.gz``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from tasks import archive
from tasks.archive import Archive, Metadata, RunRecord
from tasks.components.foreign import describe_foreign, tree_for
from tasks.tar_members import tar_members
from workers import streams
from workers.component import BaseComponent, Part
from workers.errors import IntegrityError, ObjectNotFound, Permanent
from workers.settings import Settings, get_settings
from workers.storage import Store
from workers.streams import Digest

JOB = "import"
"""Job of the run in the record of such an archive."""
MOMENT = r"(?P<moment>\d{8}_\d{6})"
CONTAINER = re.compile(rf"(full|postgres)_backup_{MOMENT}\.tar\.gz")
BESIDE = ("metadata.json", "backup.log")
EDGE = 4096


@dataclass(frozen=True)
class Form:
    """One form of file that the runbook's scripts write."""

    name: re.Pattern[str]
    kind: str
    """The kind of component it is of."""
    part_kind: str
    codec: str
    begins: re.Pattern[bytes] | None = None
    """What is in its first 4,096 plain bytes; a tar is read as one instead."""
    ends: bytes = b""
    """What is in its last 4,096."""


FORMS = (
    Form(
        re.compile(rf"all_databases_{MOMENT}\.sql\.gz"),
        "postgres",
        "postgres-plain",
        "gzip",
        re.compile(rb"\A--\n-- PostgreSQL database cluster dump\n"),
        b"-- PostgreSQL database cluster dump complete\n",
    ),
    Form(
        re.compile(rf"(?P<database>.+)_{MOMENT}\.dump"),
        "postgres",
        "postgres-dump",
        "none",
        re.compile(rb"\APGDMP"),
    ),
    Form(
        re.compile(rf"redis_{MOMENT}\.rdb\.gz"), "redis", "redis-rdb", "gzip", re.compile(rb"\AREDIS[0-9]{4}")
    ),
    Form(re.compile(rf"files_backup_{MOMENT}\.tar\.gz"), "files", "files-tar", "gzip"),
    Form(re.compile(rf"config_{MOMENT}\.tar\.gz"), "config", "files-tar", "gzip"),
)


def looks_foreign(key: str) -> bool:
    """Say whether a key has a name that the runbook's scripts give; full archives of ours have one of them, too."""
    name = PurePosixPath(key).name
    return bool(CONTAINER.fullmatch(name)) or form_of(name) is not None


def form_of(name: str) -> Form | None:
    """Return the form that a file's name says."""
    return next((form for form in FORMS if form.name.fullmatch(name)), None)


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


def recognise(store: Store, key: str, components: Sequence[str]) -> Archive:
    """Read such an archive to its end and return the record of it; nothing of it is guessed.

    ``components`` are those that it may be of; by default, those of the settings of the right kind. Raises
    ``IntegrityError`` for what is damaged or not what its name says, ``Permanent`` where no component, or more than
    one, can be meant.
    """
    settings = get_settings()
    stored, parts = Digest(), list[Part]()
    said: dict[str, Any] = {}
    for name, chunks in members_of(key, stored.through(store.get(key))):
        if name == "metadata.json":
            said = _metadata(b"".join(chunks), key)
        elif name == "backup.log":
            for _ in chunks:
                pass
        else:
            parts += _parts(name, chunks, settings, components, key)
    if not parts:
        raise IntegrityError(f"{key} holds nothing that the runbook's scripts write")
    match = re.search(MOMENT, PurePosixPath(key).name)
    named = datetime.strptime(f"{match['moment']}+0000", "%Y%m%d_%H%M%S%z") if match else parts[0].started
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


def _parts(
    name: str, chunks: Iterable[bytes], settings: Settings, components: Sequence[str], key: str
) -> list[Part]:
    form = form_of(name)
    match = form.name.fullmatch(name) if form else None
    if form is None or match is None:
        raise IntegrityError(f"{key} holds {name}, which no script of the runbook writes")
    stored, plain = Digest(), Digest()
    chunks = plain.through(
        streams.decompress(stored.through(chunks), codec=form.codec, name=f"{name} in {key}")
    )
    if form.begins is None:
        holds = describe_foreign(chunks)
        for _ in chunks:
            pass
    else:
        _check_edges(chunks, form, f"{name} in {key}")
        holds = {"database": match["database"]} if "database" in match.groupdict() else {}
    moment = datetime.strptime(f"{match['moment']}+0000", "%Y%m%d_%H%M%S%z")
    return [
        Part(
            name=name,
            component=component.name,
            host=component.host,
            kind=form.part_kind,
            codec=form.codec,
            size=stored.size,
            sha256=stored.sha256,
            plain_size=plain.size,
            plain_sha256=plain.sha256,
            started=moment,
            finished=moment,
            holds=holds,
        )
        for component in _meant(form, holds, settings, components, name)
    ]


def _check_edges(chunks: Iterable[bytes], form: Form, name: str) -> None:
    head = tail = b""
    for chunk in chunks:
        head += chunk[: EDGE - len(head)]
        tail = (tail + chunk)[-EDGE:]
    if form.begins and not form.begins.search(head):
        raise IntegrityError(f"{name} does not begin as {form.part_kind} does")
    if form.ends not in tail:
        raise IntegrityError(f"{name} is cut short: it does not end with {form.ends.decode().strip()!r}")


def _meant(
    form: Form, holds: dict[str, Any], settings: Settings, components: Sequence[str], name: str
) -> list[BaseComponent]:
    """Return the components that a file is of: of a tar of file trees, each that has a tree in it; else the only one."""
    known = [component for component in settings.components.values() if component.kind == form.kind]
    chosen = [component for component in known if not components or component.name in components]
    if form.kind == "files":
        chosen = [component for component in chosen if _has_tree(component, holds)]
        if not chosen:
            trees = ", ".join(holds["trees"]) or "nothing"
            raise Permanent(f"{name} holds {trees}, which no component of the kind files has as its path")
    elif len(chosen) != 1:
        names = ", ".join(component.name for component in known) or "none"
        raise Permanent(f"{name} is of a component of the kind {form.kind} ({names}); say which: --component")
    return chosen


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
