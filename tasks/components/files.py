"""A file tree or a single file, in a container or on the host, backed up in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tasks.components.foreign import describe_foreign, tree_for
from tasks.components.tree_inside import look_inside
from tasks.components.tree_options import AbsolutePath, TreeRestoreOptions
from tasks.components.trees import (
    OURS,
    Tree,
    by_hand,
    check_part,
    describe,
    not_in_backup,
    only,
    rehearse,
    would_overwrite,
)
from workers.component import NO_OPTIONS, BaseComponent, Finding, Options, Part, Restore, Source
from workers.errors import Permanent
from workers.location import Location
from workers.runtime import VOLUMES, Runtime, open_volume, run
from workers.tar import TreeDigest
from workers.tar_selection import Selection

if TYPE_CHECKING:
    from workers.runtime.docker_volume import VolumeRuntime

WARNINGS = 20
"""How many warnings a record holds; of more, the number."""
LOOK = r"""
path=$(readlink -f "$1") && [ -e "$path" ] || exit 0
if [ -d "$path" ]; then echo folder; elif [ -f "$path" ]; then echo file; else echo other; fi
timeout 5 du -sb "$path" 2>/dev/null | awk '{ print $1 }'
echo "$path"
"""
"""Prints what is at a path, its bytes where `du` knows soon, and the path behind symbolic links (to the end)."""


Mode = Annotated[str, Field(pattern=r"^[0-7]{3,4}$")]


class Component(BaseComponent):
    """The tree at ``path``, or in a named volume; its part is a tar archive with the members ``<basename>/…``."""

    metadata_key: ClassVar[str] = "files"
    restore_options: ClassVar[type[Options]] = TreeRestoreOptions

    kind: Literal["files"]
    path: AbsolutePath
    """Of a ``volume``, where its helper containers have it: `VOLUMES`."""
    volume: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][\w.-]+$")] | None = None
    """A named volume instead of a path, whether or not a container has it."""
    image: str | None = None
    """The image of the helper containers that reach the volume; it needs GNU tar."""
    exclude: tuple[str, ...] = ()
    """Shell patterns, as for ``tar --exclude``."""
    file_mode: Mode | None = None
    folder_mode: Mode | None = None
    owner: Annotated[str, Field(pattern=r"^[\w.-]+(:[\w.-]+)?$")] | None = None
    """Modes and owner given to all that is restored; by default those recorded."""

    @model_validator(mode="before")
    @classmethod
    def _volume_or_path(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "volume" not in values:
            if isinstance(values, dict) and "image" in values:
                raise ValueError("an image is for what is in a volume")
            return values
        if others := sorted({"path", *Location.model_fields} & values.keys()):
            raise ValueError(f"a volume is reached by its name alone, without {', '.join(others)}")
        return {**values, "path": str(VOLUMES / str(values["volume"]))}

    @property
    def runtime(self) -> Runtime:
        return self._volume_runtime or super().runtime

    @property
    def _volume_runtime(self) -> VolumeRuntime | None:
        return open_volume(self.volume, image=self.image, component=self.name) if self.volume else None

    def preflight(self) -> list[Finding]:
        """Look whether the tree is there, and how a volume is reached."""
        try:
            self._look()
        except Permanent as error:
            return [Finding(what=str(error))]
        return []

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Open the tree. Raises ``Permanent`` when there is none; what changes while it is read is a warning."""
        kind, resolved, size = self._look()
        holds: dict[str, Any] = {"path": self.path, "type": kind, "base": resolved.name}
        chunks = self._read(resolved, holds)
        return [Source(self.path, f"{self.name}.tar", "tree", chunks, size, holds)]

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        asked = TreeRestoreOptions.model_validate(dict(options))
        part = only(parts)
        if asked.into is not None:
            return [f"nothing: {asked.path or self._base(part)} is put into {asked.into}"]
        if asked.path is not None:
            path = PurePosixPath(self.path) / self._below(part, asked.path)
            return [
                f"{path}: replaced by what the backup of {part.started:%Y-%m-%d %H:%M:%S} UTC holds of it"
            ]
        lines = [would_overwrite(self.runtime, [PurePosixPath(self.path)], part, self.path)]
        if self.exclude:
            lines.append(f"{self.path}: what the backup excludes is removed ({', '.join(self.exclude)})")
        return lines + not_in_backup(part)

    def by_hand(self, parts: Sequence[Part]) -> str:
        part = only(parts)
        folder, names = PurePosixPath(self.path).parent, [self._base(part)]
        return by_hand(part, folder, names, container=self.container, volume=self.volume)

    def stage(self, restore: Restore) -> None:
        if volume := self._volume_runtime:
            volume.make(restore.run_id)
        modes = [["chown", "-hR", self.owner]] if self.owner else []
        for mode, kind in ((self.file_mode, "f"), (self.folder_mode, "d")):
            if mode:
                # find's own arguments come after the path, which is added last.
                modes.append(["sh", "-c", f'find "$0" -type {kind} -exec chmod {mode} {{}} +'])
        self._tree(restore, self._selection(restore)).stage(restore, modes=modes)

    def check(self, part: Part, chunks: Iterator[bytes]) -> None:
        check_part(part, chunks)

    def rehearse(self, restore: Restore) -> dict[str, Any]:
        return rehearse(restore, self.name)

    def swap(self, restore: Restore) -> None:
        self._tree(restore).swap(restore)

    def revert(self, restore: Restore) -> None:
        volume = self._volume_runtime
        if volume is None or volume.exists():
            self._tree(restore).revert(restore)
        if volume:
            volume.unmake(restore.run_id)

    def settle(self, restore: Restore) -> None:
        self._tree(restore).settle(restore)

    def _look(self) -> tuple[str, PurePosixPath, int | None]:
        output = run(self.runtime, ["sh", "-c", LOOK, "sh", self.path]).decode()
        kind, _, rest = output.partition("\n")
        size, _, path = rest.partition("\n") if rest[:1].isdigit() else ("", "", rest)
        if not kind:
            raise Permanent(f"{self.path} does not exist")
        if kind == "other":
            raise Permanent(f"{self.path} is neither a folder nor a file")
        return kind, PurePosixPath(path.removesuffix("\n")), int(size) if size else None

    def _read(self, path: PurePosixPath, holds: dict[str, Any]) -> Iterator[bytes]:
        digest, changed = TreeDigest(), list[str]()
        inside = look_inside(self.runtime, path.parent, [path.name], self.exclude)
        tree = self.runtime.read_tree(path, exclude=[*self.exclude, OURS], warnings=changed)
        yield from digest.through(inside.without_special(tree))
        if not digest.entries:
            raise Permanent(f"{self.path}: the backup is empty; the excludes match all of it")
        warnings = inside.warnings + changed
        if len(warnings) > WARNINGS:
            warnings[WARNINGS:] = [f"and {len(warnings) - WARNINGS} more"]
        holds |= describe(digest, warnings, inside.skipped)

    def _tree(self, restore: Restore, selection: Selection | None = None) -> Tree:
        part = only(restore.parts)
        asked = TreeRestoreOptions.model_validate(dict(restore.options))
        base = self._base(part)
        below = self._below(part, asked.path) if asked.path is not None else ""
        if asked.into is not None:
            into = PurePosixPath(asked.into)
            if self.volume:
                into = PurePosixPath(self.path) / asked.into.lstrip("/")
            entries = (f"{base}/{below}" if below else base,)
            return Tree(self.runtime, self.name, into, entries=entries, selection=selection, fresh=True)
        path = self._resolved()
        if part.holds.get("type", "folder") == "folder":
            inside = (below,) if below else ()
            return Tree(self.runtime, self.name, path, entries=inside, base=base, selection=selection)
        if path.name != base:
            raise Permanent(f"{self.path}: the backup holds the file {base}, and restores to no other name")
        return Tree(self.runtime, self.name, path.parent, entries=(base,))

    def _base(self, part: Part) -> str:
        """Return the name of the tree in what is restored; a tar that we did not make is renamed to the path's."""
        return str(part.holds.get("base", PurePosixPath(self.path).name))

    def _below(self, part: Part, path: str) -> str:
        base = self._base(part)
        if part.holds.get("type", "folder") != "folder" or not path.startswith(f"{base}/"):
            raise Permanent(f"path: the backup holds {base}; name what is in it, {base}/…, or nothing")
        return path.removeprefix(f"{base}/")

    def _selection(self, restore: Restore) -> Selection | None:
        """Return what of the part is restored, ``None`` for all of it."""
        part = only(restore.parts)
        path = TreeRestoreOptions.model_validate(dict(restore.options)).path
        if "base" in part.holds:
            return Selection(path) if path is not None else None
        holds = part.holds if "trees" in part.holds else describe_foreign(restore.read(part))
        base, tree = self._base(part), tree_for(PurePosixPath(self.path).name, holds)
        below = f"/{self._below(part, path)}" if path is not None else ""
        return Selection(tree + below, base + below)

    def _resolved(self) -> PurePosixPath:
        """Return where the tree is, or is to be, behind symbolic links."""
        script = 'path=$(readlink -f "$1") || path=$1; printf %s "${path:-$1}"'
        return PurePosixPath(run(self.runtime, ["sh", "-c", script, "sh", self.path]).decode())
