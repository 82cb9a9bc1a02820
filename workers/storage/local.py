"""A store in a local (or mounted) folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from workers.errors import ObjectExists, ObjectNotFound, Permanent, StoreUnavailable
from workers.storage import StoredObject, check_key

CHUNK = 1 << 20
TEMPORARY_PREFIX = ".incoming-"
CREATE_ATTEMPTS = 1000
NO_FILE = (NotADirectoryError, IsADirectoryError)


class LocalStore:
    """Objects are files below ``root``, readable by their owner only.

    A put writes ``.incoming-*`` beside the final name, fsyncs it, links it to the final name and fsyncs the
    folder, so that a final name always holds a whole object. What a killed writer leaves is never listed, and
    is removed by the next put below the same first folder once its writer is gone (its lock is free).
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, key: str, chunks: Iterable[bytes]) -> StoredObject:
        path = self._path(key)
        with _translated(key):
            if path.exists():
                raise ObjectExists(f"{key} is already in the store at {self.root}")
            first, _, below = key.partition("/")
            self._sweep(self.root / first if below else self.root)
            descriptor, temporary = _create(path.parent)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for chunk in chunks:
                    with _translated(key):
                        _write_all(file.fileno(), chunk)
                with _translated(key):
                    os.fsync(file.fileno())
                    # link(), unlike rename(), fails when another writer was first.
                    os.link(temporary, path)
                    _sync_folder(path.parent)
        finally:
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

    def _sweep(self, start: Path) -> None:
        """Remove what killed writers left: files whose lock is free."""
        for path in list(_files(start)):
            if path.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    self._remove_if_empty(path.parent)

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


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _create(folder: Path) -> tuple[int, Path]:
    """Create a temporary file in ``folder``, locked, and the folder, which others remove whenever it is empty."""
    for _ in range(CREATE_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            _make_folder(folder)
            descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=folder)
            # Waits for no longer than another writer's sweep looks at it, or removes it since it was not locked yet.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, Path(name)
            os.close(descriptor)
    raise OSError(errno.EAGAIN, "its folder is removed again and again")


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
