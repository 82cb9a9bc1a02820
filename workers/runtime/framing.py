"""What passes between a program in a container and its reader: Docker's frames, and a proof of where output ends.

Docker alone does not tell whether output is complete: about 2 s after a program ended the engine drops what a slow
reader has not taken yet, and reports the program's status all the same (engine 20.10: 1.3 MB written, 34 kB of
them lost, status 0). So programs run under `GUARD`, which ends their output with a mark that `Ending` looks for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

STDOUT = 1
HEADER = struct.Struct(">BxxxL")
CHUNK = 1 << 18
TOKEN = "AI_MICRO_BACKUP_PROCESS"  # noqa: S105
"""Environment variable that tells one program and its children from all others."""

GUARD = f"""\
(exec "$@"); status=$?
printf '\\0%s%03d\\0%0{CHUNK}d' "${TOKEN}" "$status" 0
kill -KILL -$$
exit "$status"
"""
"""Runs the program that its arguments name and ends its output with the token, its status and padding.

The padding is more than all pipes between the program and the engine hold (64 KiB each, 192 KiB together), so the
mark has reached the engine when the guard ends. Then the guard kills its process group, itself included: children
that the program left behind end with it. It needs a shell in the image and nothing else.
"""


def demultiplex(read: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the stream number and the bytes of each frame that ``read`` delivers, long frames in several pieces."""
    header, stream, left = b"", 0, 0
    while chunk := read(CHUNK):
        view = memoryview(chunk)
        while view:
            if left:
                piece, view = view[:left], view[left:]
                left -= len(piece)
                yield stream, bytes(piece)
            else:
                missing = HEADER.size - len(header)
                header, view = header + bytes(view[:missing]), view[missing:]
                if len(header) == HEADER.size:
                    stream, left = HEADER.unpack(header)
                    header = b""


class Ending:
    """Takes the guard's mark off the end of the output. ``status`` is ``None`` when there was none."""

    def __init__(self, token: str) -> None:
        self.status: int | None = None
        # The zero byte tells the mark from the environment variable, which a program may well print.
        self._mark = b"\0" + token.encode()

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield ``chunks`` as they come, up to the mark, and read on to the end."""
        held = b""
        source = iter(chunks)
        for chunk in source:
            data = held + chunk if held else chunk
            position = data.find(self._mark)
            if position >= 0:
                if position:
                    yield data[:position]
                self._read_status(data[position + len(self._mark) :], source)
                return
            held = self._start_of_mark(data)
            if ready := data[: len(data) - len(held)]:
                yield ready
        if held:
            yield held

    def _start_of_mark(self, data: bytes) -> bytes:
        sizes = range(min(len(data), len(self._mark) - 1), 0, -1)
        return next((self._mark[:size] for size in sizes if data.endswith(self._mark[:size])), b"")

    def _read_status(self, rest: bytes, source: Iterator[bytes]) -> None:
        for chunk in source:
            if len(rest) < 4:
                rest += chunk
        if len(rest) >= 4 and rest[:3].isdigit() and rest[3] == 0:
            self.status = int(rest[:3])
