"""A store in a local (or mounted) folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from workers.errors import ObjectExists, ObjectNotFound, Permanent, StoreUnavailable, can_go_on
from workers.storage import Sending, StoredObject, at_once, check_key

CHUNK = 1 << 20
TEMPORARY_PREFIX = ".incoming-"
CREATE_ATTEMPTS = 1000
KEPT_SECONDS = 48 * 3600
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_FILE = (NotADirectoryError, IsADirectoryError)


class LocalStore:
    """Objects are files below ``root``, readable by their owner only.

    A put writes ``.incoming-*`` beside the final name, fsyncs it, links it to the final name and fsyncs the
    folder, so that a final name always holds a whole object. What a killed writer leaves is never listed, and
    is removed by the next put below the same first folder once its writer is gone (its lock is free). What is named by
    a digest, ``.incoming-<sha256>``, waits for `KEPT_SECONDS` for a put of the same content, which goes on with it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(
        self, key: str, chunks: Iterable[bytes], *, sha256: str | None = None, sending: Sending = at_once
    ) -> StoredObject:
        path = self._path(key)
        with _translated(key):
            if path.exists():
                raise ObjectExists(f"{key} is already in the store at {self.root}")
            first, _, below = key.partition("/")
            self._sweep(self.root / first if below else self.root)
            descriptor, temporary = _create(path.parent, sha256)
        with os.fdopen(descriptor, "r+b", buffering=0):
            position = 0
            try:
                for chunk in chunks:
                    with _translated(key):
                        _write_unless_there(descriptor, chunk, position, sending)
                    position += len(chunk)
                with _translated(key):
                    os.ftruncate(descriptor, position)
                    os.fsync(descriptor)
                    # link(), unlike rename(), fails when another writer was first.
                    os.link(temporary, path)
                    _sync_folder(path.parent)
            except BaseException as error:
                full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
                has_its_name = os.fstat(descriptor).st_nlink > 1
                if not _is_of_digest(temporary) or not can_go_on(error) or full or has_its_name:
                    temporary.unlink(missing_ok=True)
                raise
            # While it is locked: nobody may take what has a final name, too, for something unfinished.
            temporary.unlink(missing_ok=True)
        return self.stat(key)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        with _translated(key), self._path(key).open("rb", buffering=0) as file:
            file.seek(offset)
            left = length if length is not None else os.fstat(file.fileno()).st_size - offset
            while left > 0:
                chunk = file.read(min(CHUNK, left))
                if not chunk:
                    return
                left -= len(chunk)
                yield chunk

    def stat(self, key: str) -> StoredObject:
        with _translated(key):
            status = self._path(key).stat()
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(key)
        return StoredObject(key=key, size=status.st_size, modified=status.st_mtime)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        folder = prefix.rpartition("/")[0]
        try:
            start = self._path(folder) if "/" in prefix else self.root
        except Permanent:
            return  # no key is like this
        with _translated(prefix):
            names = sorted(
                path.relative_to(self.root).as_posix()
                for path in _files(start)
                if not path.name.startswith(TEMPORARY_PREFIX)
            )
        for name in names:
            if name.startswith(prefix):
                with contextlib.suppress(ObjectNotFound):  # deleted since it was listed
                    yield self.stat(name)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _translated(key):
            with contextlib.suppress(FileNotFoundError, *NO_FILE):
                path.unlink()
            self._remove_if_empty(path.parent)

    def remove_unfinished(self) -> Sequence[str]:
        with _translated("what is unfinished"):
            return self._sweep(self.root)

    def _sweep(self, start: Path) -> Sequence[str]:
        """Remove what killed writers left, files whose lock is free, and return what they were beside or for."""
        removed = []
        for path in list(_files(start)):
            if path.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not _is_of_digest(path) or path.stat().st_mtime < time.time() - KEPT_SECONDS:
                        path.unlink()
                        removed.append(path.relative_to(self.root).as_posix())
                        self._remove_if_empty(path.parent)
        return removed

    def _remove_if_empty(self, folder: Path) -> None:
        while folder != self.root:
            with contextlib.suppress(OSError):  # not empty, or gone already
                folder.rmdir()
            folder = folder.parent

    def _path(self, key: str) -> Path:
        parts = check_key(key).split("/")
        if any(part.startswith(TEMPORARY_PREFIX) for part in parts):
            raise Permanent(f"not a key of a stored object: {key!r}")
        return self.root.joinpath(*parts)


def _write_unless_there(descriptor: int, chunk: bytes, position: int, sending: Sending) -> None:
    """Write a chunk at its place, and drop what follows, unless an earlier put left the same there."""
    if os.pread(descriptor, len(chunk), position) != chunk:
        sending(len(chunk))
        os.ftruncate(descriptor, position)
        os.lseek(descriptor, position, os.SEEK_SET)
        _write_all(descriptor, chunk)


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _create(folder: Path, sha256: str | None) -> tuple[int, Path]:
    """Create a temporary file in ``folder``, locked, and the folder, which others remove whenever it is empty.

    What an earlier put of the content with this digest left is taken instead, unless somebody is writing it.
    """
    for _ in range(CREATE_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            _make_folder(folder)
            if sha256 and (taken := _take(folder / f"{TEMPORARY_PREFIX}{sha256}")):
                return taken
            descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
            # Waits for no longer than another writer's sweep looks at it, or removes it since it was not locked yet.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, Path(name)
            os.close(descriptor)
    raise OSError(errno.EAGAIN, "its folder is removed again and again")


def _take(path: Path) -> tuple[int, Path] | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been swept away or committed just now, or committed by one who was killed before removing this name.
        status = os.fstat(descriptor)
        if status.st_nlink == 1 and os.path.samestat(status, path.stat()):
            return descriptor, path
    os.close(descriptor)
    return None


def _is_of_digest(temporary: Path) -> bool:
    return re.fullmatch(f"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{64}}", temporary.name) is not None


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        with contextlib.suppress(
            FileExistsError
        ):  # exist_ok would look again, and others may have removed it
            folder.mkdir(mode=0o700)
        _sync_folder(folder.parent)


def _files(start: Path) -> Iterator[Path]:
    """Yield the files below a folder; folders that vanish meanwhile are passed over, unreadable ones are not."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, *NO_FILE)):
            raise error

    for folder, _, names in os.walk(start, onerror=unless_gone):
        yield from (Path(folder, name) for name in names)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, *NO_FILE) as error:
        raise ObjectNotFound(f"the store has no object {key}") from error
    except FileExistsError as error:
        raise ObjectExists(f"{key} is already in the store") from error
    except PermissionError as error:
        raise Permanent(f"the store refuses {key}: {error.strerror}") from error
    except OSError as error:
        raise StoreUnavailable(f"the store failed at {key}: {error.strerror or error}") from error
