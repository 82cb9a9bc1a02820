"""Looks into a tar stream that passes by: what it holds, a digest of its content, and whether it is safe to unpack.

Reads USTAR, GNU and PAX archives, as GNU tar, Docker and Python write them, sparse files (PAX 1.0) included.
"""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator

from workers.errors import IntegrityError
from workers.sparse_digest import ContentDigest
from workers.tar_format import (
    BLOCK,
    HEADER_LIMIT,
    REGULAR,
    Extras,
    Member,
    Pieces,
    describe,
    exactly,
    read_header,
    read_pax,
    read_sparse_map,
)

END = bytes(BLOCK)
VERSION = 2
"""How digests are made now; archives that say nothing were made with version 1."""
PLAIN = REGULAR | {tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE}
LONG = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}
EXTENDED = {*LONG, tarfile.XHDTYPE, tarfile.XGLTYPE}


class TreeDigest:
    """Counts and digests the tree in the tar stream that passes ``through`` it, and refuses what is unsafe.

    ``sha256`` is that of a set: it does not depend on the order of the entries, nor on the tar format, nor on how
    sparse files are stored. It covers names, types, modes, numeric owners, times in whole seconds, link targets,
    contents, extended attributes and ACLs; `sha256_of` leaves out what cannot be restored everywhere. Of a hard-linked
    file the first name holds the content, so two readings compare when both are in the same order. ``version`` 1, of
    archives made before, knows no extended attributes and digests every zero of a hole.

    Memory stays flat: the names of symbolic links are kept, and with ``listing`` those of all files.
    """

    def __init__(
        self,
        *,
        outward_links: int | None = None,
        listing: bool = False,
        keep: Collection[str] = (),
        version: int = VERSION,
        see: Callable[[Member], None] | None = None,
    ) -> None:
        """Refuse more than ``outward_links`` symbolic links that point out of the tree; ``None`` only counts them.

        ``keep`` names (small) files whose contents are kept; ``see`` is called with each member that was found safe.
        """
        self.version = version
        self.attributes = 0
        """How many entries have extended attributes or an ACL."""
        self.entries = self.files = self.bytes = self.largest = self.outward_links = 0
        self.contents: dict[str, str] = {}
        """With ``listing``: each file's digest (`ContentDigest`) and ``-> target`` of each link, by name."""
        self.modes: dict[str, str] = {}
        """With ``listing``: the mode of each file, as four octal digits."""
        self.kept: dict[str, bytes] = {}
        """The contents of the files to ``keep``, by name."""
        self._listing, self._allowed, self._keep, self._see = listing, outward_links, keep, see
        self._old_sum = self._sum = self._owners_sum = self._attributes_sum = 0
        self._links: set[bytes] = set()
        self._ended = False

    @property
    def sha256(self) -> str:
        return f"{self._old_sum:064x}" if self.version == 1 else self.sha256_of()

    def sha256_of(self, *, owners: bool = True, attributes: bool = True) -> str:
        """Return the digest, as of version 2, with or without numeric owners, extended attributes and ACLs."""
        sums = [self._sum, self._owners_sum if owners else 0, self._attributes_sum if attributes else 0]
        return hashlib.sha256(b"".join(total.to_bytes(32, "big") for total in sums)).hexdigest()

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield ``chunks`` unchanged, each after all that is in it was checked.

        Raises ``IntegrityError`` for what is no tar archive, or one that is cut short, and, naming the member, for
        absolute names, ``..``, device nodes, hard links out of the tree, members below a symbolic link, and too many
        symbolic links out of the tree. So nothing that reads the chunks is ever asked to write outside its folder.
        """
        parser = self._parse()
        wanted = next(parser)
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                piece, rest = rest[:wanted], rest[wanted:]
                wanted = parser.send(piece)
            yield chunk
        if not self._ended:
            raise IntegrityError("the tar archive is cut short")

    def _parse(self) -> Pieces:
        extras: Extras = {}
        common: Extras = {}
        while (block := (yield from exactly(BLOCK))) != END:
            header = read_header(block)
            if header.type in EXTENDED:
                if header.size > HEADER_LIMIT:
                    raise IntegrityError(f"the tar archive has an extended header of {header.size} bytes")
                body = (yield from exactly(-(-header.size // BLOCK) * BLOCK))[: header.size]
                if header.type in LONG:
                    extras[LONG[header.type]] = body.split(b"\0", 1)[0]
                else:
                    (common if header.type == tarfile.XGLTYPE else extras).update(read_pax(body))
                continue
            yield from self._member(header, {**common, **extras})
            extras = {}
        if (yield from exactly(BLOCK)) != END:
            raise IntegrityError("the tar archive is damaged: something follows its end")
        self._ended = True
        while True:
            padding = yield 1 << 20
            if bytes(padding).count(0) != len(padding):
                raise IntegrityError("the tar archive is damaged: something follows its end")

    def _member(self, header: tarfile.TarInfo, extras: Extras) -> Pieces:
        try:
            member = describe(header, extras)
            real = int(extras.get(b"GNU.sparse.realsize", member.stored))
        except ValueError as error:
            raise IntegrityError(f"the tar archive is damaged: a header holds no number: {error}") from error
        sparse = any(key.startswith(b"GNU.sparse.") for key in extras)
        if sparse and extras.get(b"GNU.sparse.major") != b"1":
            raise IntegrityError(f"{member.shown}: sparse files are read in PAX format 1.0 only")
        self._check(member)
        if self._see is not None:
            self._see(member)
        content = ContentDigest(self.version)
        kept: list[bytes] | None = [] if member.shown in self._keep else None
        left, regions = member.stored, [(0, member.stored)]
        if sparse:
            regions, read = yield from read_sparse_map(member)
            left -= read
        position = 0
        for offset, length in regions:
            if offset < position or length > left or offset + length > real:
                raise IntegrityError(f"{member.shown}: the map of this sparse file is damaged")
            content.zeros(offset - position)
            left -= length
            position = offset + length
            left_here = length
            while left_here:
                piece = yield left_here
                content.data(piece)
                if kept is not None:
                    kept.append(bytes(piece))
                left_here -= len(piece)
        content.zeros(real - position)
        yield from exactly(left + -member.stored % BLOCK)
        if kept is not None:
            self.kept[member.shown] = b"".join(kept)
        self._add(member, real, content.hexdigest())

    def _check(self, member: Member) -> None:
        parts = member.name.split(b"/")
        if member.name.startswith(b"/") or b".." in parts:
            raise IntegrityError(f"{member.shown!r}: a name that leads out of the tree is refused")
        if member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            raise IntegrityError(f"{member.shown}: a device node is refused; exclude it from the backup")
        if member.type not in PLAIN:
            raise IntegrityError(f"{member.shown}: an entry of the unknown type {member.type!r} is refused")
        self._check_links(member, parts)

    def _check_links(self, member: Member, parts: list[bytes]) -> None:
        target = member.link
        if member.type == tarfile.LNKTYPE:
            if target.startswith(b"/") or b".." in target.split(b"/"):
                raise IntegrityError(f"{member.shown}: a hard link out of the tree is refused")
            if self._below_link(target.split(b"/")):
                raise IntegrityError(f"{member.shown}: a hard link through a symbolic link is refused")
        if self._links and self._below_link(parts):
            raise IntegrityError(f"{member.shown}: a name that leads through a symbolic link is refused")
        if member.type == tarfile.SYMTYPE:
            self._links.add(member.name)
            resolved = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
            if resolved.startswith((b"/", b"../")) or resolved == b"..":
                self.outward_links += 1
                if self._allowed is not None and self.outward_links > self._allowed:
                    raise IntegrityError(f"{member.shown}: a symbolic link out of the tree is refused")
        elif member.type == tarfile.LNKTYPE and target in self._links:
            self._links.add(member.name)

    def _below_link(self, parts: list[bytes]) -> bool:
        return any(b"/".join(parts[:depth]) in self._links for depth in range(1, len(parts)))

    def _add(self, member: Member, size: int, content: str) -> None:
        regular = member.type in REGULAR
        self.entries += 1
        if regular:
            self.files += 1
            self.bytes += size
            self.largest = max(self.largest, size)
        if self._listing and member.type != tarfile.DIRTYPE:
            target = f"-> {member.link.decode(errors='backslashreplace')}"
            self.contents[member.shown] = content if regular else target
            self.modes[member.shown] = f"{member.mode:04o}"
        kind = tarfile.REGTYPE if regular else member.type
        if kind == tarfile.LNKTYPE:  # all else it shares with the name that it links to
            described, owner = [member.name, kind, member.link], b""
            attributes: tuple[tuple[bytes, bytes], ...] = ()
        else:
            mode = 0 if kind == tarfile.SYMTYPE else member.mode & 0o7777
            numbers = b"%o %d %d" % (mode, member.mtime, size)
            described = [member.name, kind, numbers, member.link, content.encode()]
            owner, attributes = b"%d %d" % (member.uid, member.gid), member.attributes
        if self.version == 1:
            self._old_sum = _plus(self._old_sum, [*described, owner])
        self._sum = _plus(self._sum, described)
        self._owners_sum = _plus(self._owners_sum, [member.name, owner])
        if attributes:
            self.attributes += 1
            pairs = [part for key, value in attributes for part in (key, b"%d" % len(value), value)]
            self._attributes_sum = _plus(self._attributes_sum, [member.name, *pairs])


def _plus(total: int, entry: list[bytes]) -> int:
    return (total + int.from_bytes(hashlib.sha256(b"\0".join(entry)).digest(), "big")) % (1 << 256)
