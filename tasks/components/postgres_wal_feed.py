"""WAL from the store to where a recovering server asks for it, a few files at a time."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tasks.components.postgres_segments import SEGMENT, Segment
from tasks.components.postgres_wal import Wal, WalFile, read_wal
from workers.errors import IntegrityError
from workers.runtime import Runtime
from workers.storage import Store

WINDOW = 8
"""Segments that are put beside at a time, 16 MiB each unless the cluster was made with other ones."""


@dataclass
class WalFeed:
    """Puts the files that a recovery along ``timeline`` asks for into ``folder``, from where it takes them."""

    store: Store
    wal: Wal
    timeline: int
    runtime: Runtime
    folder: PurePosixPath
    owner: tuple[int, int]
    until: int | None = None
    """The position after which nothing is given any more."""
    given: set[str] = field(default_factory=set)
    """What lies in the folder now."""

    def give(self, name: str) -> bool:
        """Have the file ``name`` in the folder, and return whether there is one. Raises ``IntegrityError``."""
        if name in self.given:
            self.given.remove(name)
            return True
        names = self._window(name)
        if not names:
            return False
        self.runtime.write_tree(self.folder, self._tar([self.wal.files[each] for each in names]))
        self.given |= set(names[1:])
        return True

    def _window(self, name: str) -> list[str]:
        """Return ``name`` and what will be asked for after it; nothing when it is not there."""
        if not SEGMENT.fullmatch(name):
            return [name] if name in self.wal.files else []
        first = Segment.parse(name, self.wal.segment_size).number
        names = [name]
        following = (
            self.wal.segment_at(number, self.timeline) for number in range(first + 1, first + WINDOW)
        )
        names += [segment.name(self.wal.segment_size) for segment in following]
        found = []
        for each in names:
            if each not in self.wal.files or each in self.given or self._is_after(each):
                break
            found.append(each)
        return found

    def _is_after(self, name: str) -> bool:
        start = Segment.parse(name, self.wal.segment_size).number * self.wal.segment_size
        return self.until is not None and start >= self.until

    def _tar(self, files: Sequence[WalFile]) -> Iterator[bytes]:
        for file in files:
            size = self.wal.segment_size if SEGMENT.fullmatch(file.name) else None
            chunks = read_wal(self.store, file.key)
            if size is None:
                body = b"".join(chunks)
                size, chunks = len(body), iter([body])
            header = tarfile.TarInfo(file.name)
            header.size, header.mode = size, 0o600
            header.uid, header.gid = self.owner
            yield header.tobuf(tarfile.PAX_FORMAT)
            written = 0
            for chunk in chunks:
                written += len(chunk)
                yield chunk
            if written != size:
                raise IntegrityError(f"{file.key} has {written} bytes, a segment has {size}")
            yield bytes(-size % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)
