"""Restores file trees: beside what stands, compared, then swapped by renames that may be killed and run again."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from workers.component import Part, Restore, part_name, plain_command
from workers.errors import ComparisonError, IntegrityError, Permanent
from workers.runtime import Runtime, run
from workers.tar import TreeDigest

SCRIPT = Path(__file__).with_suffix(".sh").read_text()
OURS = ".ai-micro-backup-*"
"""Shell pattern of our own folders; never backed up, never moved."""

COUNT = r"""
[ -e "$1" ] || [ -L "$1" ] || exit 0
find "$1" ! -type d -print0 | tr -cd '\0' | wc -c
du -sb "$1" 2>/dev/null || du -sk "$1" | awk '{ print $1 * 1024 }'
"""


@dataclass(frozen=True)
class Tree:
    """Entries below the folder ``root``, and how a restore brings them there.

    The four steps keep the promises of `workers.component.BaseComponent`. All that is staged and kept lies in one
    folder inside ``root``, which no backup holds, and which `settle` and `revert` remove.
    """

    runtime: Runtime
    component: str
    root: PurePosixPath
    entries: tuple[str, ...] = ()
    """Names relative to ``root``. None: everything in it, and the folder's own mode, owner and time."""
    base: str = ""
    """The folder of the archive that holds the entries; of a whole ``root``, the name it had."""

    def prepare(self, restore: Restore) -> bool:
        """Make the staging folder, and ``root`` where there is none; return whether the data is staged already."""
        return self._step("prepare", restore) == b"staged"

    def staging(self, restore: Restore) -> PurePosixPath:
        """Return the folder that holds all of one restore."""
        return self.root / f"{OURS[:-1]}{part_name(restore.run_id)}-{self.component}"

    def stage(self, restore: Restore, *, modes: Sequence[Sequence[str]] = ()) -> None:
        """Unpack the one part beside what is there, read it back and compare it; then run the commands ``modes``.

        Each command is a list of words to which the path of what was staged is added. Raises ``IntegrityError``
        when the part is damaged or unsafe, ``ComparisonError`` when what was written is not what was backed up.
        """
        part = only(restore.parts)
        if self.prepare(restore):
            return
        new = self.staging(restore) / "new"
        unpacked = TreeDigest(outward_links=part.holds.get("outward_links", 0))
        self.runtime.write_tree(new, unpacked.through(restore.read(part)))
        if unpacked.sha256 != part.holds["tree_sha256"]:
            raise IntegrityError(f"{part.name} does not hold the tree that was recorded")
        self._compare(new, unpacked, part.name)
        for command in modes:
            for name in [self.base] if self.base else self.entries:
                run(self.runtime, ["sh", "-c", '[ ! -e "$0" ] || "$@" "$0"', str(new / name), *command])
        self._step("staged", restore)

    def swap(self, restore: Restore) -> None:
        """Move what stands to the staging folder, and what was staged into its place."""
        self._step("swap", restore)

    def revert(self, restore: Restore) -> None:
        """Move what stood back, and remove what was staged; fine when there is neither."""
        self._step("revert", restore)

    def settle(self, restore: Restore) -> None:
        """Remove what stood, once what is in place is safe on disk; refuse when it is not in place."""
        self._step("settle", restore)

    def _compare(self, new: PurePosixPath, unpacked: TreeDigest, name: str) -> None:
        read_back = TreeDigest()
        if self.base:
            chunks = self.runtime.read_tree(new / self.base)
        else:
            chunks = self.runtime.read_tree(new, members=present(self.runtime, new, self.entries))
        for _ in read_back.through(chunks):
            pass
        if read_back.sha256 == unpacked.sha256:
            return
        owners = read_back.unowned_sha256 == unpacked.unowned_sha256
        if owners and run(self.runtime, ["id", "-u"]).strip() != b"0":
            return  # only root can give files away
        raise ComparisonError(
            f"{name}: {_amount(read_back)} were restored of {_amount(unpacked)}"
            + (", with other owners" if owners else "; names, modes, owners, times or contents differ")
        )

    def _step(self, step: str, restore: Restore) -> bytes:
        place = [str(self.root), str(self.staging(restore)), self.base]
        argv = ["sh", "-c", SCRIPT, "trees", step, *place, *self.entries]
        return run(self.runtime, argv, env={"LC_ALL": "C"})


def only(parts: Sequence[Part]) -> Part:
    """Return the one part that a tree is. Raises ``Permanent``."""
    if len(parts) != 1:
        raise Permanent(f"a tree is restored from one part, but there are {len(parts)}")
    return parts[0]


def present(runtime: Runtime, folder: PurePosixPath, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` (without newlines) that exist in ``folder`` (itself perhaps missing), links included."""
    script = 'cd "$1" 2>/dev/null || exit 0; shift; for name; do if [ -e "$name" ] || [ -L "$name" ]; then echo "$name"; fi; done'
    found = run(runtime, ["sh", "-c", script, "sh", str(folder), *(f"./{name}" for name in sorted(names))])
    return [line.removeprefix("./") for line in found.decode().splitlines()]


def describe(digest: TreeDigest, warnings: Sequence[str]) -> dict[str, Any]:
    """Return what a part's record says of its tree."""
    return {
        "files": digest.files,
        "bytes": digest.bytes,
        "entries": digest.entries,
        "outward_links": digest.outward_links,
        "tree_sha256": digest.sha256,
        "warnings": list(warnings),
    }


def content_sha256(digest: TreeDigest) -> str:
    """Return a digest of names, modes and contents alone, of a ``digest`` with a listing."""
    listing = {name: (content, digest.modes[name]) for name, content in digest.contents.items()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def would_overwrite(runtime: Runtime, paths: Sequence[PurePosixPath], part: Part, where: str) -> str:
    """Return a line that says what is at ``paths`` now and what ``part`` would put there."""
    count = size = 0
    for path in paths:
        words = run(runtime, ["sh", "-c", COUNT, "sh", str(path)]).split()
        if len(words) > 1:
            count, size = count + int(words[0]), size + int(words[1])
    now = f"{count} entries, {size:,} bytes" if count or size else "nothing there"
    holds = part.holds
    return f"{where}: {now} → {holds['files']} files, {holds['bytes']:,} bytes of {part.started:%Y-%m-%d %H:%M:%S} UTC"


def by_hand(part: Part, folder: PurePosixPath, names: Iterable[str], *, container: str | None) -> str:
    """Return Markdown that says how to unpack ``part``, which holds ``names``, into ``folder`` with public tools."""
    plain = plain_command(part)
    tar = f"tar --extract --numeric-owner --same-owner --preserve-permissions --directory {shlex.quote(str(folder))}"
    unpack = f"docker cp - {shlex.quote(f'{container}:{folder}')}" if container else tar
    return (
        f"`{part.name}` is a tar archive of {', '.join(f'`{name}`' for name in names)} below `{folder}`. "
        "Stop what writes there, move away what stands there under these names, then, as root:\n\n"
        f"```sh\n{plain} | {unpack}\n```\n"
    )


def _amount(digest: TreeDigest) -> str:
    return f"{digest.entries} entries with {digest.bytes:,} bytes"
