"""The archives that a restore reads beside its own: those of the base backups that an incremental one is based on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tasks import archive
from tasks.archive import Metadata
from workers.component import Part
from workers.errors import IntegrityError, ObjectNotFound
from workers.progress import Progress
from workers.storage import Store


def archives_of(store: Store, key: str) -> list[str]:
    """Return the keys of all archives that it takes to restore the one under ``key``: it is the last one, after its parents.

    Raises ``IntegrityError`` when one of them is not there, or holds another base backup than the one that was built upon.
    """
    parts = archive.read_metadata(store, key).parts
    needed = list(dict.fromkeys(need for part in parts for need in part.holds.get("needs", ())))
    for need in needed:
        try:
            store.stat(need)
        except ObjectNotFound as error:
            raise IntegrityError(
                f"{key} cannot be restored without {need}, which is gone from the store"
            ) from error
    for part in parts:
        if needs := part.holds.get("needs"):
            parents = archives_of(store, needs[-1])
            found = [
                held.holds["manifest_sha256"] for held in _like(part, archive.read_metadata(store, needs[-1]))
            ]
            if parents != needs or found != [part.holds["parent_manifest_sha256"]]:
                raise IntegrityError(
                    f"{key} cannot be restored: {needs[-1]} holds another base backup than the one that it is based on"
                )
    return [*needed, key]


def _like(part: Part, metadata: Metadata) -> list[Part]:
    return [held for held in metadata.parts if (held.component, held.kind) == (part.component, part.kind)]


def parts_of(store: Store, key: str, component: str) -> list[tuple[str, Part]]:
    """Return the parts that it takes to restore a component of an archive, in order, each with the archive that it is in."""
    return [
        (held, part)
        for held in archives_of(store, key)
        for part in archive.read_metadata(store, held).parts
        if part.component == component
    ]


def reader(
    store: Store, parts: Sequence[tuple[str, Part]], progress: Progress
) -> Callable[[Part], Iterator[bytes]]:
    """Return what reads one of the parts from the archive that it is in."""
    held = {part.sha256: key for key, part in parts}

    def read(part: Part) -> Iterator[bytes]:
        chunks = archive.read_part(store, held[part.sha256], part)
        return progress.add(part.name, part.plain_size).through(chunks)

    return read
