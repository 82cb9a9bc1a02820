"""What is inside a tree that its tar stream does not tell: what cannot be backed up, and mounts."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from workers.runtime import Runtime, run
from workers.runtime.tree import Names, excluded, rename
from workers.tar_format import Member

NAMED = 100
"""How many names of what was left out a record holds; of more, the number."""
LOOK = r"""
cd "$1" && shift || exit
cat /proc/self/mountinfo 2>/dev/null
printf '\0'
find "$@" -name '.ai-micro-backup-*' -prune -o \( -type s -o -type p -o -type b -o -type c \) -exec sh -c '
  for path; do
    if [ -S "$path" ]; then kind=socket; elif [ -p "$path" ]; then kind=FIFO; else kind="device node"; fi
    printf "%s\0%s\0" "$kind" "$path"
  done' sh {} + 2>/dev/null || true
"""
"""Prints what is mounted where, and after a zero byte the kind and the name of each entry that is no data."""
DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE)
ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Inside:
    """What `look_inside` found: the ``kinds`` of what is no data, by name, and the names of ``mounts``."""

    kinds: dict[bytes, str]
    mounts: list[bytes]

    def without_special(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield a tar stream of the tree without FIFOs and device nodes, which tar keeps; sockets it knows not.

        A tree that has none, as most, passes as it is. One that appears after the look is kept as a FIFO, or refused
        as a device node.
        """
        if all(kind == "socket" for kind in self.kinds.values()):
            yield from chunks
            return
        left_out = set[bytes]()

        def kept(member: Member) -> Names | None:
            linked = member.type == tarfile.LNKTYPE and member.link in left_out
            if linked or member.type in (tarfile.FIFOTYPE, *DEVICES):
                left_out.add(member.name)
                return None
            return member.name, member.link

        yield from rename(chunks, kept)

    @property
    def skipped(self) -> list[str]:
        """Lines that name what is not backed up."""
        lines = [f"{_shown(name)}: a {kind}" for name, kind in sorted(self.kinds.items())]
        return lines if len(lines) <= NAMED else [*lines[:NAMED], f"and {len(lines) - NAMED} more"]

    @property
    def warnings(self) -> list[str]:
        """Lines that name the mounts inside."""
        return [
            f"{_shown(name)}: mounted there, and in the backup; a restore in place refuses it, so exclude it or use `into`"
            for name in self.mounts
        ]


def look_inside(
    runtime: Runtime, folder: PurePosixPath, names: Sequence[str], exclude: Sequence[str]
) -> Inside:
    """Look at the entries ``names`` of ``folder``, as `Runtime.read_tree` would name what is in them."""
    if not names:
        return Inside({}, [])
    argv = ["sh", "-c", LOOK, "sh", str(folder), *(f"./{name}" for name in names)]
    mounted, _, rest = run(runtime, argv).partition(b"\0")
    fields = rest.split(b"\0")[:-1]
    found = {
        name.removeprefix(b"./"): kind.decode() for kind, name in zip(fields[::2], fields[1::2], strict=True)
    }
    below = [str(folder / name).encode(errors="surrogateescape") + b"/" for name in names]
    points = {
        ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4])
        for line in mounted.splitlines()
    }
    inside = sorted(point for point in points if point.startswith(tuple(below)))
    root = len(str(folder).encode(errors="surrogateescape").rstrip(b"/")) + 1
    return Inside(
        {name: kind for name, kind in found.items() if not _excluded(name, exclude)},
        [point[root:] for point in inside if not _excluded(point[root:], exclude)],
    )


def _excluded(name: bytes, exclude: Sequence[str]) -> bool:
    return excluded(name.decode(errors="surrogateescape"), exclude)


def _shown(name: bytes) -> str:
    text = name.decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
