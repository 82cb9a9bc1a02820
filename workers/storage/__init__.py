"""Where artifacts lie: one protocol, and the store the settings ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from workers.errors import Permanent

if TYPE_CHECKING:
    from workers.sections import StoreSettings
    from workers.storage.local import LocalStore
    from workers.storage.s3 import S3Store

Sending = Callable[[int], None]
"""Called with a number of bytes before they are sent, so it can wait, or count."""


def at_once(_size: int) -> None:
    """Let bytes be sent without waiting."""


@dataclass(frozen=True)
class StoredObject:
    """A committed object: its key, its size in bytes and when it was committed (seconds since the epoch)."""

    key: str
    size: int
    modified: float


class Store(Protocol):
    """Objects under keys like ``full_system/full_backup_20261122_020000.tar.gz``.

    Keys are relative, ``/``-separated, of safe names. Every method may raise ``StoreUnavailable``.
    """

    def put(
        self, key: str, chunks: Iterable[bytes], *, sha256: str | None = None, sending: Sending = at_once
    ) -> StoredObject:
        """Store what ``chunks`` yields, without holding or copying it whole, and commit it last.

        The object appears under ``key`` only after ``chunks`` ended well and its bytes are durable.
        When ``chunks`` raises, nothing is left and the error goes on to the caller.
        Raises ``ObjectExists`` when the key is taken.

        With the ``sha256`` of what ``chunks`` will yield, a put that was killed, or ended by an error that can pass, leaves
        what it has sent, and the next one goes on there: it compares each piece with the bytes that it is given and
        ``sending`` only hears of those that are missing or differ. See `remove_unfinished`.
        """

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield the object's bytes from ``offset``, at most ``length``. Raises ``ObjectNotFound``."""

    def stat(self, key: str) -> StoredObject:
        """Describe one committed object. Raises ``ObjectNotFound``."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the committed objects whose key starts with ``prefix``, ordered by key."""

    def delete(self, key: str) -> None:
        """Remove the object; a key that is not there is no error."""


def open_store(settings: StoreSettings) -> Store:
    """Return the store the settings describe."""
    return _opened(settings)


def remove_unfinished(settings: StoreSettings) -> Sequence[str]:
    """Remove what puts left that ended badly, if nobody will go on with it, and return the keys they were for.

    That is what no process writes any more, in S3 after ``unfinished_hours`` without a new part; what a later put could go on
    with stays as long in a folder, too. Raises ``StoreUnavailable``.
    """
    return _opened(settings).remove_unfinished()


def _opened(settings: StoreSettings) -> LocalStore | S3Store:
    from workers.sections import S3StoreSettings
    from workers.storage.local import LocalStore
    from workers.storage.s3 import S3Store

    return S3Store(settings) if isinstance(settings, S3StoreSettings) else LocalStore(settings.path)


def check_key(key: str) -> str:
    """Return the key. Raises ``Permanent`` for one that could lead elsewhere."""
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise Permanent(f"not a key of a stored object: {key!r}")
    return key
