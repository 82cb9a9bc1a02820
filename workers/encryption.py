"""Encryption at rest with age (https://age-encryption.org): hosts hold public keys, private ones only where restores run."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import IO, Any, cast

import pyrage
from pyrage import ssh, x25519

from workers.errors import IntegrityError, Permanent

AGE = "age"
SUFFIX = ".age"
CHUNKS_AHEAD = 4
"""Chunks, of 64 kB as age writes them, that may wait between its thread and the reader."""
STOP_SECONDS = 0.2
"""How often a thread that waits for its reader looks whether there still is one."""


def recipient(text: str) -> str:
    """Return a public key, ``age1…`` or ``ssh-…``, as it stands. Raises ``ValueError`` for what is none."""
    _recipient(text)
    return text


def _recipient(text: str) -> Any:
    try:
        return (ssh if text.startswith("ssh-") else x25519).Recipient.from_str(text)
    except (pyrage.RecipientError, ValueError) as error:
        hint = "; a private key must not stand here" if text.startswith("AGE-SECRET-KEY-") else ""
        raise ValueError(f"not a public key of age (age1… or ssh-…){hint}") from error


def identities(text: str) -> list[Any]:
    """Return the private keys in a file of ``age-keygen``, or the one of an SSH key file. Raises ``ValueError``."""
    if text.lstrip().startswith("-----BEGIN"):
        return [ssh.Identity.from_buffer(text.encode())]
    lines = [line.strip() for line in text.splitlines()]
    try:
        return [x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    except pyrage.IdentityError:
        # Without the cause, which may quote what stands there.
        raise ValueError("it holds a line that is no private key of age (AGE-SECRET-KEY-…)") from None


def encrypt(chunks: Iterable[bytes], recipients: Sequence[str]) -> Iterator[bytes]:
    """Yield an age file that the private key of any one of ``recipients`` opens."""
    keys = [_recipient(text) for text in recipients]
    yield from _converted(chunks, functools.partial(pyrage.encrypt_io, recipients=keys))


def decrypt(chunks: Iterable[bytes], private_keys: Sequence[Any], *, name: str) -> Generator[bytes]:
    """Yield what an age file holds; the inverse of `encrypt`.

    Raises ``Permanent`` when none of ``private_keys`` opens it, ``IntegrityError`` when it is damaged or cut short.
    """
    if not private_keys:
        raise Permanent(
            f"{name} is encrypted, and there is no private key here; name one in encryption.identities"
        )
    try:
        yield from _converted(chunks, functools.partial(pyrage.decrypt_io, identities=private_keys))
    except pyrage.DecryptError as error:
        if "No matching keys" in str(error):
            raise Permanent(
                f"{name} is encrypted for other keys than those of encryption.identities"
            ) from error
        raise IntegrityError(f"{name} is damaged: its encryption has no sound beginning") from error
    except _Damaged as error:
        raise IntegrityError(f"{name} is damaged: its encryption does not verify") from error


class _Damaged(Exception):
    """What pyrage raises for bytes that do not verify, told apart from other errors of the system."""


class _Stopped(Exception):
    """Nobody reads any more."""


def _converted(chunks: Iterable[bytes], convert: Callable[[IO[bytes], IO[bytes]], None]) -> Iterator[bytes]:
    """Yield what ``convert`` writes while it reads ``chunks`` in a thread of its own.

    An error of ``chunks`` is raised here as it is. When this is closed early, the thread has ended.
    """
    pipe: queue.Queue[bytes | None] = queue.Queue(CHUNKS_AHEAD)
    source, target = _Source(chunks), _Target(pipe)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            convert(cast("IO[bytes]", source), cast("IO[bytes]", target))
        except OSError as error:
            failures.append(source.error or _Damaged(str(error)))
        except BaseException as error:  # noqa: BLE001  raised in the thread that reads
            failures.append(source.error or error)
        target.end()

    thread = threading.Thread(target=work, name="age", daemon=True)
    thread.start()
    try:
        while (chunk := pipe.get()) is not None:
            yield chunk
    finally:
        target.stop.set()
        thread.join()
        if close := getattr(chunks, "close", None):
            close()
    if failures:
        raise failures[0]


class _Source:
    """Chunks as the file that age reads; remembers what they raised, since age passes on its text alone."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")
        self.error: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            while not self._rest:
                self._rest = memoryview(next(self._chunks))
        except StopIteration:
            return b""
        except BaseException as error:
            self.error = error
            raise
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)


class _Target:
    """The file that age writes: a bounded queue."""

    def __init__(self, pipe: queue.Queue[bytes | None]) -> None:
        self._pipe = pipe
        self.stop = threading.Event()

    def write(self, data: bytes) -> int:
        self._put(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def end(self) -> None:
        try:
            self._put(None)
        except _Stopped:
            return

    def _put(self, item: bytes | None) -> None:
        while not self.stop.is_set():
            try:
                self._pipe.put(item, timeout=STOP_SECONDS)
            except queue.Full:
                continue
            return
        raise _Stopped
