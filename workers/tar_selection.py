"""Some members of a tar stream: those at or below one path."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator

from workers.runtime.tree import Names, rename
from workers.tar_format import Member


class Selection:
    """The members at or below ``path``, and the folders it is in, renamed so that ``path`` becomes ``placed``.

    A stream is read twice: `see` each member first, then `pick`. Hard links may lead to a file outside of what is
    selected, which holds their content; then the first of them becomes the file.
    """

    def __init__(self, path: str, placed: str | None = None) -> None:
        self.path = path.encode(errors="surrogateescape")
        self._placed = self.path if placed is None else placed.encode(errors="surrogateescape")
        self._outside: dict[bytes, bytes] = {}
        self._parents = dict(_parents(self.path, self._placed))
        self.top = self._placed
        """The topmost of what is picked: the first folder that the stream says anything of."""
        self.found = False

    def see(self, member: Member) -> None:
        """Learn of a member of the whole stream."""
        parent = self._parents.get(member.name)
        if parent and member.type == tarfile.DIRTYPE and len(parent) < len(self.top):
            self.top = parent
        if self._holds(member.name):
            self.found = True
            if member.type == tarfile.LNKTYPE and not self._holds(member.link):
                self._outside.setdefault(member.link, member.name)

    def pick(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the tar stream of what is selected."""
        return rename(chunks, self._renamed)

    def _renamed(self, member: Member) -> Names | None:
        if member.name in self._outside:
            return self._moved(self._outside[member.name]), member.link
        if member.type == tarfile.DIRTYPE and (parent := self._parents.get(member.name)):
            return parent, member.link
        if not self._holds(member.name):
            return None
        if member.type != tarfile.LNKTYPE:
            return self._moved(member.name), member.link
        link = self._outside.get(member.link, member.link)
        return None if link == member.name else (self._moved(member.name), self._moved(link))

    def _holds(self, name: bytes) -> bool:
        return name == self.path or name.startswith(self.path + b"/")

    def _moved(self, name: bytes) -> bytes:
        return self._placed + name[len(self.path) :]


def _parents(path: bytes, placed: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the folders that ``path`` is in, the nearest first, each with the one that it becomes."""
    while b"/" in path and b"/" in placed:
        path, placed = path.rpartition(b"/")[0], placed.rpartition(b"/")[0]
        yield path, placed
