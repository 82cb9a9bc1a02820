"""The tar format: headers and maps, read from a stream that is sent piece by piece."""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from workers.errors import IntegrityError

BLOCK = 512
HEADER_LIMIT = 1 << 24
"""Bytes that an extended header, a long name or the map of a sparse file may have; more is an attack."""
REGULAR = frozenset((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE))
Pieces = Generator[int, memoryview, None]
"""A parser: yields how many bytes it wants at most and is sent at least one of them."""
Read = Generator[int, memoryview, bytes]
Extras = dict[bytes, bytes]


@dataclass
class Member:
    """One entry of an archive, as its headers together describe it."""

    name: bytes
    """Where it goes when it is unpacked, without empty and ``.`` parts; unchecked."""
    type: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    """Whole seconds: Docker keeps no fractions."""
    stored: int
    """Bytes of its body in the archive; a sparse file has more itself."""
    link: bytes
    attributes: tuple[tuple[bytes, bytes], ...] = ()
    """Extended attributes and ACLs that say more than the mode does, as GNU tar names them, sorted."""

    @property
    def shown(self) -> str:
        """Its name for people, whatever bytes it has."""
        return self.name.decode(errors="backslashreplace")


def exactly(size: int) -> Read:
    """Return the next ``size`` bytes."""
    pieces: list[bytes] = []
    while size:
        piece = yield size
        size -= len(piece)
        pieces.append(bytes(piece))
    return b"".join(pieces)


def read_header(block: bytes) -> tarfile.TarInfo:
    """Return the fields of a header block. Raises ``IntegrityError`` when it is none."""
    try:
        # Latin-1 maps each byte to one character and back: names may be any bytes.
        header = tarfile.TarInfo.frombuf(block, "latin-1", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise IntegrityError(f"not a tar archive, or a damaged one: {error}") from error
    if header.size < 0:
        raise IntegrityError(f"the tar archive is damaged: an entry of {header.size} bytes")
    return header


def describe(header: tarfile.TarInfo, extras: Extras) -> Member:
    """Return what a header and the extended headers before it describe. Raises ``ValueError``."""
    name = extras.get(b"GNU.sparse.name", extras.get(b"path", header.name.encode("latin-1")))
    link = extras.get(b"linkpath", header.linkname.encode("latin-1"))
    kind = header.type
    stored = int(extras.get(b"size", header.size))
    if stored < 0:
        raise ValueError(stored)
    return Member(
        name=_tidy(name),
        type=kind,
        mode=header.mode,
        uid=int(extras.get(b"uid", header.uid)),
        gid=int(extras.get(b"gid", header.gid)),
        mtime=_floor(extras[b"mtime"]) if b"mtime" in extras else int(header.mtime),
        stored=stored if kind in REGULAR else 0,
        link=_tidy(link) if kind == tarfile.LNKTYPE else link if kind == tarfile.SYMTYPE else b"",
        attributes=tuple(
            sorted(
                (key, value)
                for key, value in extras.items()
                # An access ACL of three entries is the mode again.
                if key.startswith(b"SCHILY.xattr.")
                or (key == b"SCHILY.acl.access" and len(value.split()) > 3)
                or (key == b"SCHILY.acl.default" and value.strip())
            )
        ),
    )


def _tidy(name: bytes) -> bytes:
    """Return the one spelling of a name, so that ``a/./b`` cannot pass for another than ``a/b``."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return b"/" * name.startswith(b"/") + b"/".join(parts) or b"."


def _floor(seconds: bytes) -> int:
    """Return the whole seconds of a decimal; a float would round 1700000000.999999999 up."""
    whole, _, fraction = seconds.partition(b".")
    return int(whole) - (whole.startswith(b"-") and bool(fraction.strip(b"0")))


def read_pax(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of an extended header. Raises ``IntegrityError`` when it does not parse."""
    while body:
        digits, _, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record, body = body[:length], body[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) != length or not record.endswith(b"\n"):
            raise IntegrityError("the tar archive is damaged: an extended header does not parse")
        yield key, value


def read_sparse_map(member: Member) -> Generator[int, memoryview, tuple[list[tuple[int, int]], int]]:
    """Return the regions of a sparse file that are stored, as (offset, length), and the bytes read from its body.

    The map precedes the data: decimal numbers with a newline each, their count first, padded to a whole block.
    """
    numbers: list[bytes] = []
    rest, read, count = b"", 0, None
    while count is None or len(numbers) < count:
        read += BLOCK
        if read > min(member.stored, HEADER_LIMIT):
            raise IntegrityError(f"{member.shown}: the map of this sparse file is damaged")
        *complete, rest = (rest + (yield from exactly(BLOCK))).split(b"\n")
        numbers += complete
        if not all(number.isdigit() for number in complete):
            raise IntegrityError(f"{member.shown}: the map of this sparse file is damaged")
        if count is None and numbers:
            count = 2 * int(numbers.pop(0))
    values = [int(number) for number in numbers[:count]]
    return list(zip(values[::2], values[1::2], strict=True)), read
