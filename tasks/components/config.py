"""The listed configuration files of a folder, with what it takes to tell that one changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field

from tasks.components.files import WARNINGS
from tasks.components.foreign import describe_foreign
from tasks.components.tree_inside import Inside, look_inside
from tasks.components.tree_options import AbsolutePath, RelativePath, TreeRestoreOptions
from tasks.components.trees import (
    OURS,
    Tree,
    by_hand,
    check_part,
    content_sha256,
    describe,
    not_in_backup,
    only,
    present,
    rehearse,
    would_overwrite,
)
from workers.component import NO_OPTIONS, BaseComponent, Options, Part, Restore, Source
from workers.errors import Permanent
from workers.tar import TreeDigest
from workers.tar_selection import Selection


class Component(BaseComponent):
    """The entries ``paths`` below ``root``; its part is a tar archive with these relative names."""

    metadata_key: ClassVar[str] = "config"
    days_kept: ClassVar[float | None] = None
    restore_options: ClassVar[type[Options]] = TreeRestoreOptions
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
            for _ in digest.through(self._tar(existing, self._inside(existing), [])):
                pass
        return content_sha256(digest)

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        part = only(parts)
        asked = TreeRestoreOptions.model_validate(dict(options))
        root = PurePosixPath(self.root)
        if asked.into is not None:
            return [f"nothing: {asked.path or 'all of it'} is put into {asked.into}"]
        if asked.path is not None:
            when = f"{part.started:%Y-%m-%d %H:%M:%S} UTC"
            return [f"{root / asked.path}: replaced by what the backup of {when} holds of it"]
        # Of a tar that we did not make, only reading it tells what it holds.
        names = part.holds.get("paths") or self.paths
        lines = [would_overwrite(self.runtime, [root / path for path in names], part, self.root)]
        now = present(self.runtime, root, part.holds.get("missing", []))
        lines += [f"{root / path}: removed, as it was not there at the backup" for path in now]
        return lines + not_in_backup(part)

    def by_hand(self, parts: Sequence[Part]) -> str:
        part = only(parts)
        return by_hand(
            part, PurePosixPath(self.root), part.holds.get("contents", self.paths), container=self.container
        )

    def stage(self, restore: Restore) -> None:
        self._tree(restore, selected=True).stage(restore)

    def check(self, part: Part, chunks: Iterator[bytes]) -> None:
        check_part(part, chunks)

    def rehearse(self, restore: Restore) -> dict[str, Any]:
        return rehearse(restore, self.name)

    def swap(self, restore: Restore) -> None:
        self._tree(restore).swap(restore)

    def revert(self, restore: Restore) -> None:
        self._tree(restore).revert(restore)

    def settle(self, restore: Restore) -> None:
        self._tree(restore).settle(restore)

    def _existing(self) -> list[str]:
        return present(self.runtime, PurePosixPath(self.root), set(self.paths))

    def _inside(self, existing: Sequence[str]) -> Inside:
        return look_inside(self.runtime, PurePosixPath(self.root), existing, self.exclude)

    def _tar(self, existing: Sequence[str], inside: Inside, warnings: list[str]) -> Iterator[bytes]:
        exclude = [*self.exclude, OURS]
        tree = self.runtime.read_tree(
            PurePosixPath(self.root), members=existing, exclude=exclude, warnings=warnings
        )
        return inside.without_special(tree)

    def _read(self, existing: Sequence[str], holds: dict[str, Any]) -> Iterator[bytes]:
        digest, inside = TreeDigest(listing=True), self._inside(existing)
        warnings = inside.warnings
        yield from digest.through(self._tar(existing, inside, warnings))
        if not digest.entries:
            raise Permanent(f"{self.root}: the backup is empty; the excludes match all of it")
        links = [name for name, content in digest.contents.items() if content.startswith("-> ")]
        warnings += [
            f"{name}: a link; what it points to is backed up where it is"
            for name in links
            if name in existing
        ]
        holds |= describe(digest, warnings[:WARNINGS], inside.skipped)
        holds |= {
            "contents": digest.contents,
            "modes": digest.modes,
            "content_sha256": content_sha256(digest),
        }

    def _tree(self, restore: Restore, *, selected: bool = False) -> Tree:
        part = only(restore.parts)
        asked = TreeRestoreOptions.model_validate(dict(restore.options))
        fresh = asked.into is not None
        root = PurePosixPath(asked.into or self.root)
        if asked.path is not None:
            selection = Selection(asked.path) if selected else None
            return Tree(
                self.runtime, self.name, root, entries=(asked.path,), selection=selection, fresh=fresh
            )
        names = part.holds.get("paths") or describe_foreign(restore.read(part))["paths"]
        if not names:
            raise Permanent(f"{part.name} is no set of configuration files")
        return Tree(self.runtime, self.name, root, entries=tuple(names), fresh=fresh)
