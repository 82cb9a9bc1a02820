"""The files of a tar stream, one after another."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator

from workers.errors import IntegrityError

CHUNK = 1 << 20


def tar_members(
    plain: Iterator[bytes],
    key: str,
    *,
    folders_too: bool = False,
    skip: Callable[[str], bool] = lambda _name: False,
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the file name and the bytes of each member of a plain tar; see `read_members`.

    With ``folders_too``, the entries of folders that other programs write are passed over, and those whose names
    ``skip`` holds of.
    """
    folders, names = set[str](), set[str]()
    try:
        with tarfile.open(fileobj=_File(plain), mode="r|", bufsize=CHUNK) as tar:
            for member in tar:
                if (folders_too and member.isdir()) or skip(member.name):
                    continue
                folder, _, name = member.name.rpartition("/")
                folders.add(folder)
                if not member.isfile() or len(folders) > 1:
                    raise IntegrityError(f"{key} holds {member.name}, which is no file of its one folder")
                if name in names:
                    raise IntegrityError(f"{key} holds {name} twice")
                names.add(name)
                yield name, _chunks(tar, member, key)
    except tarfile.TarError as error:
        raise IntegrityError(f"{key} is damaged: {error}") from error
    for _ in plain:  # what follows the end of the tar, so that gzip's own checksum is seen
        pass


class _File(io.RawIOBase):
    """An iterator of chunks as the file that tarfile reads from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk


def _chunks(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> Iterator[bytes]:
    try:
        with tar.extractfile(member) or io.BytesIO() as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except tarfile.TarError as error:
        raise IntegrityError(f"{key} is damaged: {error}") from error
