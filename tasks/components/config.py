"""The listed configuration files of a folder, with what it takes to tell that one changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from tasks.components.files import WARNINGS, AbsolutePath
from tasks.components.trees import (
    OURS,
    Tree,
    by_hand,
    content_sha256,
    describe,
    only,
    present,
    would_overwrite,
)
from workers.component import NO_OPTIONS, BaseComponent, Part, Restore, Source
from workers.errors import Permanent
from workers.tar import TreeDigest


def relative(path: str) -> str:
    """Return ``path`` when it is relative and stays below. Raises ``ValueError``."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.name or ".." in pure.parts or not path.isprintable():
        raise ValueError(f"expected a printable relative path without '..': {path!r}")
    return str(pure)


RelativePath = Annotated[str, AfterValidator(relative)]


class Component(BaseComponent):
    """The entries ``paths`` below ``root``; its part is a tar archive with these relative names."""

    metadata_key: ClassVar[str] = "config"
    days_kept: ClassVar[float | None] = None
    watched: ClassVar[bool] = True

    kind: Literal["config"]
    root: AbsolutePath
    paths: tuple[RelativePath, ...] = Field(min_length=1)
    """Plain names, without wildcards. One that does not exist is recorded as missing; a restore removes it."""
    exclude: tuple[str, ...] = ()
    """Shell patterns, as for ``tar --exclude``."""

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Open the listed files that exist. Raises ``Permanent`` when none does."""
        existing = self._existing()
        if not existing:
            raise Permanent(f"{self.root} holds none of the {len(self.paths)} listed files")
        missing = sorted(set(self.paths) - set(existing))
        holds: dict[str, Any] = {"root": self.root, "paths": list(self.paths), "missing": missing}
        return [Source(self.root, f"{self.name}.tar", "config", self._read(existing, holds), None, holds)]

    def content_digest(self) -> str:
        """Return what `sources` would record as ``content_sha256`` now: it changes with names, modes and contents."""
        digest = TreeDigest(listing=True)
        if existing := self._existing():
            for _ in digest.through(self._tar(existing, [])):
                pass
        return content_sha256(digest)

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        part = only(parts)
        root = PurePosixPath(self.root)
        lines = [
            would_overwrite(self.runtime, [root / path for path in part.holds["paths"]], part, self.root)
        ]
        now = present(self.runtime, root, part.holds["missing"]) if lines else []
        return lines + [f"{root / path}: removed, as it was not there at the backup" for path in now]

    def by_hand(self, parts: Sequence[Part]) -> str:
        part = only(parts)
        return by_hand(part, PurePosixPath(self.root), part.holds["contents"], container=self.container)

    def stage(self, restore: Restore) -> None:
        self._tree(restore).stage(restore)

    def swap(self, restore: Restore) -> None:
        self._tree(restore).swap(restore)

    def revert(self, restore: Restore) -> None:
        self._tree(restore).revert(restore)

    def settle(self, restore: Restore) -> None:
        self._tree(restore).settle(restore)

    def _existing(self) -> list[str]:
        return present(self.runtime, PurePosixPath(self.root), set(self.paths))

    def _tar(self, existing: Sequence[str], warnings: list[str]) -> Iterator[bytes]:
        exclude = [*self.exclude, OURS]
        return self.runtime.read_tree(
            PurePosixPath(self.root), members=existing, exclude=exclude, warnings=warnings
        )

    def _read(self, existing: Sequence[str], holds: dict[str, Any]) -> Iterator[bytes]:
        digest, warnings = TreeDigest(listing=True), list[str]()
        yield from digest.through(self._tar(existing, warnings))
        if not digest.entries:
            raise Permanent(f"{self.root}: the backup is empty; the excludes match all of it")
        links = [name for name, content in digest.contents.items() if content.startswith("-> ")]
        warnings += [
            f"{name}: a link; what it points to is backed up where it is"
            for name in links
            if name in existing
        ]
        holds |= describe(digest, warnings[:WARNINGS])
        holds |= {
            "contents": digest.contents,
            "modes": digest.modes,
            "content_sha256": content_sha256(digest),
        }

    def _tree(self, restore: Restore) -> Tree:
        entries = tuple(only(restore.parts).holds["paths"])
        return Tree(self.runtime, self.name, PurePosixPath(self.root), entries=entries)
