"""One pipeline for the bytes of an artifact, and its inverse.

    source → digest (plain) → compress → (encrypt) → digest (stored) → store
    store  → digest (stored) → (decrypt) → decompress → digest (plain) → target

A chunk is a ``bytes`` of any length. Nothing here holds more than a few chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import zstandard
from isal import isal_zlib
from isal.igzip_lib import IsalError

from workers.encryption import decrypt, encrypt
from workers.errors import IntegrityError
from workers.storage import Store

GZIP = 31  # zlib's window bits for a gzip container
DECOMPRESSED_CHUNK = 1 << 20


class Digest:
    """Counts and digests the bytes that pass ``through`` it."""

    def __init__(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._sha256.update(chunk)
            self.size += len(chunk)
            yield chunk

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


@dataclass(frozen=True)
class Written:
    """What one pass of the pipeline stored: sizes in bytes and SHA-256 of both sides."""

    size: int
    sha256: str
    plain_size: int
    plain_sha256: str


def write(
    store: Store,
    key: str,
    chunks: Iterable[bytes],
    *,
    level: int,
    recipients: Sequence[str] = (),
    codec: str = "zstd",
) -> Written:
    """Compress ``chunks`` with zstd, or with ``gzip``, into the store under ``key``; commit only if they end well.

    With ``recipients``, public keys of age, they are encrypted as well.
    """
    plain, stored = Digest(), Digest()
    source = plain.through(chunks)
    compressed = compress_gzip(source) if codec == "gzip" else compress(source, level=level)
    store.put(key, stored.through(encrypt(compressed, recipients) if recipients else compressed))
    return Written(stored.size, stored.sha256, plain.size, plain.sha256)


def read(
    chunks: Iterable[bytes],
    *,
    codec: str,
    written: Written,
    name: str,
    encrypted: bool = False,
    private_keys: Sequence[Any] = (),
) -> Iterator[bytes]:
    """Yield the plain bytes of a stored artifact; the inverse of `write`.

    Raises ``IntegrityError`` after the last byte at the latest when either side differs from the record, so a
    consumer must not act on what it got before the iterator ended; ``Permanent`` when it is ``encrypted`` and none of
    ``private_keys`` opens it.
    """
    plain, stored = Digest(), Digest()
    readable: Iterable[bytes] = stored.through(chunks)
    if encrypted:
        readable = decrypt(readable, private_keys, name=name)
    yield from plain.through(decompress(readable, codec=codec, name=name))
    for side, digest, size, sha256 in (
        ("stored", stored, written.size, written.sha256),
        ("plain", plain, written.plain_size, written.plain_sha256),
    ):
        if (digest.size, digest.sha256) != (size, sha256):
            raise IntegrityError(
                f"{name} is damaged: its {side} side has {digest.size} bytes with SHA-256 {digest.sha256}, "
                f"recorded were {size} bytes with {sha256}"
            )


def compress(chunks: Iterable[bytes], *, level: int) -> Iterator[bytes]:
    """Yield one zstd frame with a checksum, compressed beside the reading thread."""
    compressor = zstandard.ZstdCompressor(level=level, threads=1, write_checksum=True).compressobj()
    for chunk in chunks:
        if compressed := compressor.compress(chunk):
            yield compressed
    yield compressor.flush()


def decompress(chunks: Iterable[bytes], *, codec: str, name: str) -> Generator[bytes]:
    """Yield the plain bytes of a ``zstd`` frame, a ``gzip`` file or, with ``none``, the chunks themselves.

    Raises ``IntegrityError`` for bytes that do not decode and for an unknown codec. A zstd frame cut short just
    ends early, which the digests of `read` find.
    """
    match codec:
        case "none":
            yield from chunks
        case "zstd":
            yield from _decompress_zstd(chunks, name)
        case "gzip":
            yield from _decompress_gzip(chunks, name)
        case _:
            raise IntegrityError(
                f"{name} was written with the codec {codec!r}, which this version does not know"
            )


def _decompress_zstd(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    source = _Reader(chunks)
    try:
        # Unlike decompressobj(), the reader bounds its output: 16 kB of a zstd frame can hold 500 MB of zeros.
        with zstandard.ZstdDecompressor().stream_reader(cast("IO[bytes]", source), closefd=False) as reader:
            while plain := reader.read(DECOMPRESSED_CHUNK):
                yield plain
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{name} is damaged: {error}") from error
    if source.read():
        raise IntegrityError(f"{name} is damaged: bytes follow its end")


class _Reader:
    """The chunks as a binary file: ``read`` returns the next one whatever size is asked for, at the end ``b""``."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)

    def read(self, _size: int = -1) -> bytes:
        return next((chunk for chunk in self._chunks if chunk), b"")


def compress_gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a gzip file at the level that costs least, for bytes that are compressed already or shall open everywhere."""
    compressor = isal_zlib.compressobj(1, wbits=GZIP)
    for chunk in chunks:
        if compressed := compressor.compress(chunk):
            yield compressed
    yield compressor.flush()


def _decompress_gzip(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    decompressor = isal_zlib.decompressobj(wbits=GZIP)
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                if decompressor.eof:  # gzip files may hold several members
                    decompressor = isal_zlib.decompressobj(wbits=GZIP)
                if plain := decompressor.decompress(rest, DECOMPRESSED_CHUNK):
                    yield plain
                rest = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    except IsalError as error:  # type: ignore[misc]  # an exception class, whatever its stubs say
        raise IntegrityError(f"{name} is damaged: {error}") from error
    if not decompressor.eof:
        raise IntegrityError(f"{name} is damaged: it is cut short")
