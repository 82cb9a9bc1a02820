"""Puts a base backup into a folder beside the live data, by way of its increments where it has any, and compares what is on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from tasks.components.postgres_base import check_base, check_combined, checked
from workers.component import Part
from workers.errors import CommandFailed, ComparisonError, IntegrityError
from workers.runtime import Runtime, run

COMBINE = """
bin=$1 data=$2
shift 2
rmdir "$data"
"$bin/pg_combinebackup" --no-sync --manifest-checksums=SHA256 --output="$data" "$@"
rm -rf "$@"
"""
"""Nothing is synced before the cluster is recovered; then all of it is."""


def room(chain: Sequence[Part]) -> int:
    """Return the bytes that `unpack` takes: of increments, all of them and what they are combined to."""
    combined = int(chain[-1].holds["size"]) if len(chain) > 1 else 0
    return sum(part.plain_size for part in chain) + combined


def unpack(
    runtime: Runtime,
    chain: Sequence[Part],
    read: Callable[[Part], Iterator[bytes]],
    staging: PurePosixPath,
    programs: str,
) -> None:
    """Put the last base backup of a chain into ``staging``/new/data; increments go to ``staging``/work on the way.

    Raises ``IntegrityError`` for what is damaged or does not fit, ``ComparisonError`` for what is not on disk as it was read.
    """
    data = staging / "new/data"
    if len(chain) == 1:
        _unpack_into(runtime, data, chain[0], read)
        return
    folders = [staging / f"work/part{number}" for number in range(len(chain))]
    for folder, part in zip(folders, chain, strict=True):
        sh(runtime, 'mkdir -m 700 "$1"', folder)
        _unpack_into(runtime, folder, part, read)
    try:
        sh(runtime, COMBINE, programs, data, *folders)
    except CommandFailed as error:
        raise IntegrityError(f"{chain[-1].component}: the increments do not fit: {error.stderr}") from error
    segment_size = int(chain[-1].holds["segment_size"])
    _compare(runtime, data, lambda chunks: check_combined(chunks, segment_size), "what was combined")


def _unpack_into(
    runtime: Runtime, folder: PurePosixPath, part: Part, read: Callable[[Part], Iterator[bytes]]
) -> None:
    runtime.write_tree(folder, checked(read(part), part.holds))
    _compare(runtime, folder, lambda chunks: check_base(chunks, part.holds), part.name)


def _compare(
    runtime: Runtime, folder: PurePosixPath, check: Callable[[Iterable[bytes]], None], name: str
) -> None:
    names = sh(runtime, 'ls -A "$1"', folder).splitlines()
    try:
        check(runtime.read_tree(folder, members=names))
    except IntegrityError as error:
        raise ComparisonError(f"{name} is not on disk as it was recorded: {error}") from error


def sh(runtime: Runtime, script: str, *words: object, chunks: Iterable[bytes] = ()) -> str:
    """Run a script of POSIX sh where the server lives, with these arguments and stdin, and return its stdout."""
    argv = ["sh", "-euc", script, "sh", *map(str, words)]
    return run(runtime, argv, chunks=chunks).decode(errors="surrogateescape")
