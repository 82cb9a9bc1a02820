"""Restores file trees: beside what stands, compared, then swapped by renames that may be killed and run again."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from workers.component import Part, Restore, part_name, plain_command
from workers.errors import ComparisonError, IntegrityError, Permanent
from workers.location import Location
from workers.runtime import Runtime, open_runtime, run
from workers.tar import TreeDigest
from workers.tar_format import Member
from workers.tar_selection import Selection

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
    selection: Selection | None = None
    """What of the archive is restored, where it is not all of it."""
    fresh: bool = False
    """Whether ``root`` must be missing or empty before."""

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
        chunks = restore.read(part)
        if self.selection is not None:
            check_part(part, chunks, see=self.selection.see)
            if not self.selection.found:
                raise Permanent(
                    f"{part.name} holds no {self.selection.path.decode(errors='backslashreplace')}"
                )
            chunks = self.selection.pick(restore.read(part))
        unpacked = _digest_for(part)
        self.runtime.write_tree(new, unpacked.through(chunks))
        if self.selection is None:
            _check_recorded(part, unpacked)
        if self.base and not self.entries:
            names = [self.base]
        else:
            below = new / self.base if self.base else new
            names = [
                f"{self.base}/{name}" if self.base else name
                for name in present(self.runtime, below, self.entries)
            ]
        picked = [self.selection.top.decode(errors="surrogateescape")] if self.selection else names
        restore.warnings.extend(compare(self.runtime, new, picked, unpacked, part.name))
        for command in modes:
            for name in names:
                run(self.runtime, ["sh", "-c", '[ ! -e "$0" ] || "$@" "$0"', str(new / name), *command])
        self._step("staged", restore)

    def staged(self, restore: Restore) -> None:
        """Note that all is staged, for callers that put it there themselves."""
        self._step("staged", restore)

    def swap(self, restore: Restore) -> None:
        """Move what stands to the staging folder, and what was staged into its place."""
        self._step("swap", restore)

    def bring_back(self, restore: Restore) -> None:
        """Move what stood back, and no more: `revert`, which has to follow, finds out by what stays that it was needed."""
        self._step("back", restore)

    def revert(self, restore: Restore) -> None:
        """Move what stood back, and remove what was staged; fine when there is neither."""
        self._step("revert", restore)

    def settle(self, restore: Restore) -> None:
        """Remove what stood, once what is in place is safe on disk; refuse when it is not in place."""
        self._step("settle", restore)

    def _step(self, step: str, restore: Restore) -> bytes:
        place = [str(self.root), str(self.staging(restore)), self.base]
        argv = ["sh", "-c", SCRIPT, "trees", step, *place, *self.entries]
        return run(self.runtime, argv, env={"LC_ALL": "C", "FRESH": "yes" if self.fresh else ""})


def check_part(part: Part, chunks: Iterable[bytes], *, see: Callable[[Member], None] | None = None) -> None:
    """Read the plain ``chunks`` of a part to their end.

    Raises ``IntegrityError`` when they are no safe tar archive, or not of the tree that the part's record says.
    """
    digest = _digest_for(part, see=see)
    for _ in digest.through(chunks):
        pass
    _check_recorded(part, digest)


def compare(
    runtime: Runtime, folder: PurePosixPath, names: Sequence[str], unpacked: TreeDigest, part: str
) -> list[str]:
    """Read back what was unpacked as ``names`` below ``folder``, and return what could not be kept there.

    Owners are lost where this is not done by root, extended attributes and ACLs where the file system, or the tar of
    a container, does not know them. Raises ``ComparisonError`` for all other differences.
    """
    read_back = TreeDigest(version=unpacked.version)
    for _ in read_back.through(runtime.read_tree(folder, members=names)):
        pass
    if read_back.sha256_of() == unpacked.sha256_of():
        return []
    owned = read_back.sha256_of(attributes=False) == unpacked.sha256_of(attributes=False)
    kept = read_back.sha256_of(owners=False) == unpacked.sha256_of(owners=False)
    same = read_back.sha256_of(owners=False, attributes=False) == unpacked.sha256_of(
        owners=False, attributes=False
    )
    only_root_gives_away = owned or run(runtime, ["id", "-u"]).strip() != b"0"
    if same and only_root_gives_away and (kept or read_back.attributes < unpacked.attributes):
        lost = unpacked.attributes - read_back.attributes
        return [] if kept else [f"{part}: extended attributes or ACLs of {lost} entries cannot be kept there"]
    raise ComparisonError(
        f"{part}: {_amount(read_back)} were restored of {_amount(unpacked)}"
        + (
            ", with other owners"
            if kept and not owned
            else "; names, modes, owners, times, attributes or contents differ"
        )
    )


def rehearse(restore: Restore, component: str) -> dict[str, Any]:
    """Unpack the one part into a scratch folder of this host, read it back, compare it, and remove it again.

    The folder is below ``TMPDIR``, so that nothing of what is live, nor its file system, is touched. Returns what was
    compared. Raises ``Permanent`` when there is no room, ``IntegrityError`` or ``ComparisonError``.
    """
    part = only(restore.parts)
    scratch = Path(tempfile.gettempdir())
    runtime = open_runtime(Location(), component=component)
    for left in scratch.glob(f"ai-micro-backup-rehearsal-{component}-*"):
        _remove(runtime, left)
    needed, free = part.plain_size + part.plain_size // 20, shutil.disk_usage(scratch).free
    if needed > free:
        raise Permanent(
            f"{scratch} has room for {free:,} bytes, but {part.name} needs {needed:,}; TMPDIR names another"
        )
    folder = Path(tempfile.mkdtemp(prefix=f"ai-micro-backup-rehearsal-{component}-"))
    try:
        tops = set[str]()
        unpacked = _digest_for(part, see=lambda member: tops.add(_top(member)))
        runtime.write_tree(PurePosixPath(folder), unpacked.through(restore.read(part)))
        _check_recorded(part, unpacked)
        warnings = compare(runtime, PurePosixPath(folder), sorted(tops), unpacked, part.name)
    finally:
        _remove(runtime, folder)
    return {
        "entries": unpacked.entries,
        "files": unpacked.files,
        "bytes": unpacked.bytes,
        "warnings": warnings,
    }


def _top(member: Member) -> str:
    return member.name.split(b"/")[0].decode(errors="surrogateescape")


def _remove(runtime: Runtime, folder: Path) -> None:
    # Folders whose owner may not write in them do not let go of their entries.
    script = 'rm -rf "$1" 2>/dev/null || { chmod -R u+rwx "$1"; rm -rf "$1"; }'
    run(runtime, ["sh", "-c", script, "sh", str(folder)])


def _digest_for(part: Part, *, see: Callable[[Member], None] | None = None) -> TreeDigest:
    version = part.holds.get("digest_version", 1) if "tree_sha256" in part.holds else 2
    return TreeDigest(outward_links=part.holds.get("outward_links"), version=version, see=see)


def _check_recorded(part: Part, digest: TreeDigest) -> None:
    recorded = part.holds.get("tree_sha256")
    if recorded is not None and digest.sha256 != recorded:
        raise IntegrityError(f"{part.name} does not hold the tree that was recorded")


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


def describe(digest: TreeDigest, warnings: Sequence[str], skipped: Sequence[str]) -> dict[str, Any]:
    """Return what a part's record says of its tree; ``skipped`` names what is in the tree and not in the part."""
    return {
        "files": digest.files,
        "bytes": digest.bytes,
        "entries": digest.entries,
        "outward_links": digest.outward_links,
        "attributes": digest.attributes,
        "tree_sha256": digest.sha256,
        "digest_version": digest.version,
        "warnings": list(warnings),
        "skipped": list(skipped),
    }


def not_in_backup(part: Part) -> list[str]:
    """Return lines for the plan that name what a restore of ``part`` does not bring back."""
    return [f"not in the backup: {line}" for line in part.holds.get("skipped", [])]


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
    amount = (
        f"{holds['files']} files, {holds['bytes']:,} bytes" if "files" in holds else "what the backup holds"
    )
    return f"{where}: {now} → {amount} of {part.started:%Y-%m-%d %H:%M:%S} UTC"


def by_hand(
    part: Part,
    folder: PurePosixPath,
    names: Iterable[str],
    *,
    container: str | None,
    volume: str | None = None,
) -> str:
    """Return Markdown that says how to unpack ``part``, which holds ``names``, into ``folder`` with public tools."""
    plain = plain_command(part)
    tar = f"tar --extract --numeric-owner --same-owner --preserve-permissions --directory {shlex.quote(str(folder))}"
    unpack = f"docker cp - {shlex.quote(f'{container}:{folder}')}" if container else tar
    if volume:
        unpack = (
            f"docker run --rm --interactive --volume {volume}:{folder / volume} <image with GNU tar> {tar}"
        )
    return (
        f"`{part.name}` is a tar archive of {', '.join(f'`{name}`' for name in names)} below `{folder}`. "
        "Stop what writes there, move away what stands there under these names, then, as root:\n\n"
        f"```sh\n{plain} | {unpack}\n```\n"
    )


def _amount(digest: TreeDigest) -> str:
    return f"{digest.entries} entries with {digest.bytes:,} bytes"
