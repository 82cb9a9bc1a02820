"""The pipeline and its inverse: what comes out is what went in, or an error; memory stays flat."""

from __future__ import annotations

import gzip
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import streams
from workers.errors import IntegrityError, ObjectNotFound
from workers.storage.local import LocalStore
from workers.streams import Written

CHUNKS = st.lists(st.binary(max_size=3000) | st.integers(0, 200_000).map(bytes), max_size=8)
MEGABYTE = 1 << 20


class Memory:
    """The one object that the pipeline writes to and reads from, in chunks of a size of its own."""

    def __init__(self, chunk: int = 777) -> None:
        self.chunk, self.content = chunk, b""

    def put(self, _key: str, chunks: Iterable[bytes]) -> None:
        self.content = b"".join(chunks)

    def pieces(self, content: bytes | None = None) -> Iterator[bytes]:
        content = self.content if content is None else content
        for start in range(0, len(content), self.chunk):
            yield content[start : start + self.chunk]


def written(chunks: Sequence[bytes], *, chunk: int = 777) -> tuple[Memory, Written]:
    memory = Memory(chunk)
    return memory, streams.write(memory, "a", iter(chunks), level=3)  # type: ignore[arg-type]  # all of a store that it uses


def read(memory: Memory, record: Written, content: bytes | None = None) -> bytes:
    pieces = memory.pieces(content)
    return b"".join(streams.read(pieces, codec="zstd", written=record, name="the part"))


@given(chunks=CHUNKS, chunk=st.integers(1, 5000))
@settings(deadline=None, max_examples=60)
def test_what_is_read_is_what_was_written_however_it_is_cut(chunks: list[bytes], chunk: int) -> None:
    memory, record = written(chunks, chunk=chunk)
    plain = b"".join(chunks)

    assert read(memory, record) == plain
    assert record == Written(len(memory.content), sha256(memory.content), len(plain), sha256(plain))
    assert zstandard.ZstdDecompressor().decompressobj().decompress(memory.content) == plain, (
        "public tools too"
    )


def sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


PLAIN = random.Random(7).randbytes(5000) + b"text that compresses " * 900


@given(
    position=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
    chunk=st.sampled_from([1, 500, 1 << 20]),
)
@settings(deadline=None, max_examples=120)
def test_a_changed_byte_anywhere_is_refused(position: float, mask: int, chunk: int) -> None:
    memory, record = written([PLAIN], chunk=chunk)
    damaged = bytearray(memory.content)
    damaged[int(position * len(damaged))] ^= mask

    with pytest.raises(IntegrityError, match="the part is damaged"):
        read(memory, record, bytes(damaged))


@given(length=st.floats(0, 1, exclude_max=True), chunk=st.sampled_from([1, 500, 1 << 20]))
@settings(deadline=None, max_examples=80)
def test_a_stream_cut_short_anywhere_is_refused(length: float, chunk: int) -> None:
    memory, record = written([PLAIN], chunk=chunk)

    with pytest.raises(IntegrityError, match="the part is damaged"):
        read(memory, record, memory.content[: int(length * len(memory.content))])


@given(more=st.binary(min_size=1, max_size=50), chunk=st.sampled_from([1, 500, 1 << 20]))
@settings(deadline=None, max_examples=40)
def test_bytes_after_the_end_are_refused(more: bytes, chunk: int) -> None:
    memory, record = written([PLAIN], chunk=chunk)

    with pytest.raises(IntegrityError, match="the part is damaged"):
        read(memory, record, memory.content + more)


def test_a_second_frame_after_the_first_is_refused() -> None:
    memory, record = written([PLAIN])

    with pytest.raises(IntegrityError, match="damaged"):
        read(memory, record, memory.content * 2)


@pytest.mark.parametrize("field", ["size", "sha256", "plain_size", "plain_sha256"])
def test_each_side_is_held_against_its_record(field: str) -> None:
    memory, record = written([PLAIN])
    value = getattr(record, field)
    wrong = Written(**{**vars(record), field: value + 1 if isinstance(value, int) else "0" * 64})
    side = "plain" if field.startswith("plain") else "stored"

    with pytest.raises(IntegrityError, match=f"its {side} side has"):
        read(memory, wrong)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(IntegrityError, match="'lzma', which this version does not know"):
        list(streams.decompress([b"x"], codec="lzma", name="a"))


def test_an_empty_source_is_stored_and_read_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record = streams.write(store, "a", iter(()), level=3)

    assert (record.plain_size, record.plain_sha256) == (0, sha256(b""))
    assert record.size == store.stat("a").size > 0
    assert list(streams.read(store.get("a"), codec="zstd", written=record, name="a")) == []


@pytest.mark.parametrize("after", [0, 1, 40])
def test_a_source_that_raises_stores_nothing(tmp_path: Path, after: int) -> None:
    store = LocalStore(tmp_path)
    error = ValueError("the disk said no")

    def source() -> Iterator[bytes]:
        for _ in range(after):
            yield os.urandom(100_000)
        raise error

    with pytest.raises(ValueError, match="the disk said no") as raised:
        streams.write(store, "parts/a", source(), level=3)

    assert raised.value is error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(ObjectNotFound):
        store.stat("parts/a")


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_a_bomb_is_read_in_bounded_chunks_with_flat_memory(codec: str) -> None:
    size = 1 << 30
    zeros = bytes(4 * MEGABYTE)
    plain = (zeros for _ in range(size // len(zeros)))
    packed = b"".join(streams.compress(plain, level=1) if codec == "zstd" else streams.compress_gzip(plain))
    assert len(packed) < size / 100

    before, peak, total = resident(), 0, 0
    for chunk in streams.decompress([packed], codec=codec, name="a"):
        assert 0 < len(chunk) <= MEGABYTE
        total += len(chunk)
        if total % (32 * MEGABYTE) < MEGABYTE:
            peak = max(peak, resident())

    assert total == size
    assert peak - before < 32 * MEGABYTE


def test_compressing_holds_a_few_chunks_whatever_the_size() -> None:
    noise = random.Random(1).randbytes(MEGABYTE)
    for _ in streams.compress((noise for _ in range(8)), level=3):
        pass
    before, peak = resident(), 0
    for _ in streams.compress_gzip(streams.compress((noise for _ in range(256)), level=3)):
        peak = max(peak, resident())

    assert peak - before < 64 * MEGABYTE


@given(chunks=CHUNKS, chunk=st.integers(1, 3000))
@settings(deadline=None, max_examples=50)
def test_gzip_is_read_back_and_opened_by_public_tools(chunks: list[bytes], chunk: int) -> None:
    packed = b"".join(streams.compress_gzip(chunks))

    assert gzip.decompress(packed) == b"".join(chunks)
    assert unpacked(packed, chunk) == b"".join(chunks)


@given(
    members=st.lists(st.binary(max_size=2000) | st.integers(0, 100_000).map(bytes), min_size=1, max_size=4),
    chunk=st.integers(1, 500) | st.just(1 << 20),
    level=st.sampled_from([0, 1, 9]),
    bound=st.sampled_from([1, 7, 100, 1 << 20]),
)
@settings(deadline=None, max_examples=150)
def test_gzip_of_other_tools_with_many_members_is_read_whole(
    members: list[bytes], chunk: int, level: int, bound: int
) -> None:
    packed = b"".join(gzip.compress(member, compresslevel=level) for member in members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "DECOMPRESSED_CHUNK", max(bound, sum(map(len, members)) // 2000))
        assert unpacked(packed, chunk) == b"".join(members)


@given(length=st.floats(0, 1, exclude_max=True), chunk=st.integers(1, 500))
@settings(deadline=None, max_examples=60)
def test_gzip_cut_short_anywhere_is_refused(length: float, chunk: int) -> None:
    packed = gzip.compress(PLAIN)

    with pytest.raises(IntegrityError, match="it is cut short"):
        unpacked(packed[: int(length * len(packed))], chunk)


@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@settings(deadline=None, max_examples=100)
def test_gzip_with_a_changed_byte_is_refused_or_reads_the_same(position: float, mask: int) -> None:
    packed = bytearray(gzip.compress(PLAIN))
    packed[int(position * len(packed))] ^= mask

    try:
        plain = unpacked(bytes(packed), 500)
    except IntegrityError:
        return
    assert plain == PLAIN


@pytest.mark.parametrize("more", [b"x", b"no gzip at all", zlib.compress(b"x"), b"\x1f\x8b"])
def test_bytes_after_a_gzip_file_are_refused(more: bytes) -> None:
    with pytest.raises(IntegrityError):
        unpacked(gzip.compress(PLAIN) + more, 1 << 20)


def unpacked(packed: bytes, chunk: int) -> bytes:
    pieces = [packed[start : start + chunk] for start in range(0, len(packed), chunk)]
    return b"".join(streams.decompress(pieces, codec="gzip", name="the archive"))


@pytest.mark.parametrize("more", [[b"x"], [b"", b"x", b"y"], [b"\x28\xb5\x2f\xfd", b"another frame"]])
def test_chunks_after_a_zstd_frame_are_refused_even_without_a_record(more: list[bytes]) -> None:
    memory, _ = written([PLAIN])

    with pytest.raises(IntegrityError, match="a is damaged"):
        list(streams.decompress([memory.content, *more], codec="zstd", name="a"))
