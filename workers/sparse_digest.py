"""A digest of a file's content for which a hole, however long, costs nothing."""

from __future__ import annotations

import hashlib

BLOCK = 1 << 16
ZEROS = bytes(BLOCK)


class ContentDigest:
    """Digests a content that is given in order, as ``data`` and as counts of ``zeros``.

    Blocks of 64 KiB that hold nothing but zeros go in as a number of blocks, whether they were given as data or as
    zeros: where a file system, or tar, sees the holes does not matter. A content without such a block has its plain
    SHA-256. ``version`` 1, of archives made before, digests every zero.
    """

    def __init__(self, version: int) -> None:
        self._runs_count = version > 1
        self._data, self._runs = hashlib.sha256(), hashlib.sha256()
        self._block = self._filled = self._pending = 0
        self._run_start = self._run_blocks = 0
        self._has_runs = False

    def data(self, piece: memoryview) -> None:
        """Add bytes."""
        if not self._runs_count:
            self._data.update(piece)
            return
        while piece:
            part, piece = piece[: BLOCK - self._filled], piece[BLOCK - self._filled :]
            # All of this block so far is zeros, and this is, too: it is seen at the block's end what it is.
            if self._filled == self._pending and part[0] == 0 and bytes(part) == ZEROS[: len(part)]:
                self._pending += len(part)
            else:
                self._flush()
                self._data.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._end_block()

    def zeros(self, count: int) -> None:
        """Add ``count`` zeros."""
        if not self._runs_count:
            while count:
                self._data.update(ZEROS[:count])
                count -= min(count, BLOCK)
            return
        head = min(count, -self._filled % BLOCK)
        self.data(memoryview(ZEROS)[:head])
        self._skip((count - head) // BLOCK)
        self.data(memoryview(ZEROS)[: (count - head) % BLOCK])

    def hexdigest(self) -> str:
        """Return the digest of all that was added; nothing may be added after."""
        self._flush()
        if not self._has_runs:
            return self._data.hexdigest()
        self._end_run()
        return hashlib.sha256(self._data.digest() + self._runs.digest()).hexdigest()

    def _flush(self) -> None:
        if self._pending:
            self._data.update(ZEROS[: self._pending])
            self._pending = 0

    def _end_block(self) -> None:
        if self._pending == BLOCK:
            self._pending = self._filled = 0
            self._skip(1)
        else:
            self._flush()
            self._filled = 0
            self._block += 1

    def _skip(self, blocks: int) -> None:
        if not blocks:
            return
        if not self._has_runs or self._run_start + self._run_blocks != self._block:
            self._end_run()
            self._run_start = self._block
            self._has_runs = True
        self._run_blocks += blocks
        self._block += blocks

    def _end_run(self) -> None:
        if self._run_blocks:
            self._runs.update(b"%d+%d " % (self._run_start, self._run_blocks))
            self._run_blocks = 0
