"""File trees as tar streams: GNU tar's arguments, and an editor for the streams that Docker writes."""

from __future__ import annotations

import fnmatch
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from workers.errors import CommandFailed, RuntimeUnavailable
from workers.tar_format import BLOCK, Extras, Member, describe, read_header, read_pax

Names = tuple[bytes, bytes]
"""A member's name and its link target."""

FOLDED = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
SOME_FILES_DIFFER = 1
"""GNU tar's status when files changed, shrank or vanished while it read them; 2 for all else."""
ENVIRONMENT = {"LC_ALL": "C"}
ATTRIBUTES = ["--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.capability", "--acls"]
"""What GNU tar keeps beside modes. Labels of SELinux and the like belong to a host's policy, not to its data."""


def pack(folder: PurePosixPath, names: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the GNU tar command that writes the entries ``names`` of ``folder`` to its stdout."""
    # Access and change times and tar's process id differ at each reading; equal trees shall give equal streams.
    pax = "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"
    options = ["--create", "--format=posix", pax, "--sort=name", "--numeric-owner", "--sparse", *ATTRIBUTES]
    excludes = [f"--exclude={pattern}" for pattern in exclude]
    # "./" before the names: one may start with a dash, and tar would take it for an option. The empty list of files
    # makes tar write an empty archive when there are no names, too.
    members = ["--transform=s,^\\./,,S", "--files-from=/dev/null", "--", *(f"./{name}" for name in names)]
    return ["tar", *options, *excludes, "--directory", str(folder), *members]


def unpack(folder: PurePosixPath, *, owners: bool) -> list[str]:
    """Return the GNU tar command that unpacks its stdin below ``folder``."""
    owner = "--same-owner" if owners else "--no-same-owner"
    options = ["--extract", "--numeric-owner", "--preserve-permissions", owner, *ATTRIBUTES]
    return ["tar", *options, "--directory", str(folder)]


def forgiving(chunks: Iterable[bytes], warnings: list[str] | None) -> Iterator[bytes]:
    """Yield GNU tar's output; what changed while it was read goes to ``warnings`` instead of raising."""
    try:
        yield from chunks
    except CommandFailed as error:
        lines = [
            line for line in error.stderr.splitlines() if line.startswith("tar: ")
        ]  # the first may be cut
        if error.status != SOME_FILES_DIFFER or not lines:
            raise
        if warnings is not None:
            warnings.extend(lines)


def edit(archives: Iterable[tuple[str, Iterable[bytes]]], exclude: Sequence[str]) -> Iterator[bytes]:
    """Yield ``archives`` as one, each member's name after its archive's prefix, without what ``exclude`` matches.

    Raises ``RuntimeUnavailable`` when an archive ends before its end mark: Docker only logs an error, and ends the
    stream in good order, when a file shrinks while it is read.
    """
    for prefix, chunks in archives:
        before = prefix.encode(errors="surrogateescape")

        def renamed(member: Member, before: bytes = before) -> Names | None:
            if excluded(member.name.decode(errors="surrogateescape"), exclude):
                return None
            return (
                before + member.name,
                before + member.link if member.type == tarfile.LNKTYPE else member.link,
            )

        yield from _rename(_Source(chunks), renamed)
    yield bytes(2 * BLOCK)


def rename(chunks: Iterable[bytes], renamed: Callable[[Member], Names | None]) -> Iterator[bytes]:
    """Yield a tar stream whose members have the name and link target that ``renamed`` returns, without its ``None``."""
    yield from _rename(_Source(chunks), renamed)
    yield bytes(2 * BLOCK)


def excluded(name: str, exclude: Sequence[str]) -> bool:
    """Say whether a pattern matches ``name``, or a folder it is in, from any slash on, as ``tar --exclude`` does."""
    parts = name.split("/")
    spans = ((start, end) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    runs = ["/".join(parts[start:end]) for start, end in spans] if exclude else []
    return any(fnmatch.fnmatchcase(run, pattern) for pattern in exclude for run in runs)


def _rename(source: _Source, renamed: Callable[[Member], Names | None]) -> Iterator[bytes]:
    extras: Extras = {}
    while (block := source.take(BLOCK)) != bytes(BLOCK):
        header = read_header(block)
        if header.type in FOLDED or header.type == tarfile.XHDTYPE:
            body = source.take(-(-header.size // BLOCK) * BLOCK)[: header.size]
            if header.type == tarfile.XHDTYPE:
                extras.update(read_pax(body))
            else:
                extras[FOLDED[header.type]] = body.split(b"\0", 1)[0]
            continue
        if header.type == tarfile.XGLTYPE:  # a comment, as far as it concerns single members
            source.take(-(-header.size // BLOCK) * BLOCK)
            continue
        member = describe(header, extras)
        names = renamed(member)
        if names is not None:
            name, link = names
            if name != member.name:
                extras[b"GNU.sparse.name" if b"GNU.sparse.name" in extras else b"path"] = name
            if link != member.link:
                extras[b"linkpath"] = link
            yield _extended(extras) + block
        extras = {}
        for piece in source.pieces(-(-member.stored // BLOCK) * BLOCK):
            if names is not None:
                yield piece
    source.drain()


def _extended(extras: Extras) -> bytes:
    """Return an extended header with ``extras``; nothing when there are none."""
    body = b""
    for key, value in extras.items():
        record = b" " + key + b"=" + value + b"\n"
        length = len(record)
        while length != len(b"%d" % length) + len(record):
            length = len(b"%d" % length) + len(record)
        body += b"%d" % length + record
    if not body:
        return b""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)


class _Source:
    """Chunks of any size, read by the number of bytes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._left = memoryview(b"")

    def pieces(self, size: int) -> Iterator[bytes]:
        while size:
            if not self._left:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise RuntimeUnavailable(
                        "the archive is cut short; a file may have changed while it was read"
                    )
                self._left = memoryview(chunk)
            piece, self._left = self._left[:size], self._left[size:]
            size -= len(piece)
            yield bytes(piece)

    def take(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def drain(self) -> None:
        """Read what follows the end mark, so that the reader sees the end of the stream, too."""
        for _ in self._chunks:
            pass
