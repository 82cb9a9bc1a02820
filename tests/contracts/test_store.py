"""What every store promises (`workers.storage.Store`): a folder, moto's S3, and a real object store's S3.

A new kind is one more entry of ``KINDS`` and its function.
"""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compose.demo.embedded_daemon import wait_until
from tests.s3_servers import S3Server, moto_server, swift_server
from workers.errors import (
    IntegrityError,
    LeaseLost,
    ObjectExists,
    ObjectNotFound,
    Permanent,
    StoreUnavailable,
)
from workers.sections import LocalStoreSettings, S3StoreSettings
from workers.storage import Store, StoredObject, open_store

ROOT = Path(__file__).parents[2]
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Backend:
    """An empty store of a kind: what opens it, in any process, and all that it holds, whatever it calls it."""

    settings: LocalStoreSettings | S3StoreSettings
    everything: Callable[[], list[str]]
    """Committed objects as well as what unfinished puts left (temporary files, parts of uploads)."""
    arrived: Callable[[], int]
    """How many bytes unfinished puts have sent."""
    turns: int = 1
    """By how much repetitions are cut where a request takes milliseconds."""
    one_winner: bool = True
    """Whether of several that put a key at the same moment only one succeeds."""

    def open(self) -> Store:
        return open_store(self.settings)


def local(request: pytest.FixtureRequest, folder: Path) -> Backend:
    return Backend(
        LocalStoreSettings(path=folder / "store"),
        lambda: [str(path) for path in (folder / "store").rglob("*") if path.is_file()],
        lambda: sum(path.stat().st_size for path in (folder / "store").rglob(".incoming-*")),
    )


def moto(request: pytest.FixtureRequest, folder: Path) -> Backend:
    server: S3Server = request.getfixturevalue("moto_s3")
    settings = server.store()
    return Backend(settings, lambda: server.everything(settings), lambda: server.arrived(settings), turns=8)


def swift(request: pytest.FixtureRequest, folder: Path) -> Backend:
    server: S3Server = request.getfixturevalue("swift_s3")
    settings = server.store()
    return Backend(
        settings,
        lambda: server.everything(settings),
        lambda: server.arrived(settings),
        turns=20,
        one_winner=False,
    )


KINDS = {"local": local, "moto": moto, "swift": swift}


@pytest.fixture(scope="module")
def moto_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="module")
def swift_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return KINDS[request.param](request, tmp_path)


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.open()


def keys(store: Store, prefix: str = "") -> list[str]:
    return [item.key for item in store.list(prefix)]


def content(store: Store, key: str) -> bytes:
    return b"".join(store.get(key))


def test_what_was_put_is_there_and_described(store: Store) -> None:
    before = time.time()
    put = store.put("full_system/full_backup_20261122_020000.tar.gz", [b"abc", b"", b"defg"])

    assert content(store, put.key) == b"abcdefg"
    assert put == StoredObject("full_system/full_backup_20261122_020000.tar.gz", 7, put.modified)
    assert before - 5 < put.modified < time.time() + 5
    assert store.stat(put.key) == put
    assert list(store.list("")) == [put]


def test_an_object_may_be_empty(store: Store) -> None:
    assert store.put("a/empty", []).size == 0
    assert content(store, "a/empty") == b""
    assert keys(store) == ["a/empty"]


@pytest.mark.parametrize(
    "name",
    ["postgres.%E5%86%99%20%2F.dump.zst", "a+b_backup-1~2.tar.gz", "x" * 200, ".hidden", "..x", "a..b"],
)
def test_names_are_kept_as_they_are(store: Store, name: str) -> None:
    store.put(f"parts/run/{name}", [b"1"])

    assert keys(store) == [f"parts/run/{name}"]
    assert content(store, f"parts/run/{name}") == b"1"


def test_an_object_of_many_chunks_comes_in_bounded_chunks(store: Store) -> None:
    noise = random.Random(3).randbytes(MEGABYTE)
    chunks = [noise[: 1 + number * 50_000] for number in range(20)] + [noise * 9]
    put = store.put("big", chunks)

    got = list(store.get("big"))
    assert b"".join(got) == b"".join(chunks)
    assert put.size == sum(map(len, chunks))
    assert max(map(len, got)) <= 8 * MEGABYTE
    assert all(got), "no empty chunk"


@given(offset=st.integers(0, 130), length=st.none() | st.integers(0, 130))
@example(offset=0, length=0)
@example(offset=99, length=1)
@example(offset=100, length=None)
@example(offset=101, length=1)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_range_is_a_slice(store: Store, offset: int, length: int | None) -> None:
    whole = bytes(range(100))
    with suppress(ObjectExists):
        store.put("a", [whole])

    end = None if length is None else offset + length
    assert b"".join(store.get("a", offset=offset, length=length)) == whole[offset:end]


def test_a_range_of_a_large_object(store: Store) -> None:
    whole = random.Random(4).randbytes(3 * MEGABYTE + 17)
    store.put("a", [whole])

    for offset, length in [(0, MEGABYTE + 1), (MEGABYTE - 1, 2), (len(whole) - 1, 5), (1, 2 * MEGABYTE)]:
        assert b"".join(store.get("a", offset=offset, length=length)) == whole[offset : offset + length]


def test_lists_what_starts_with_a_prefix_in_order_of_keys(store: Store) -> None:
    names = ["b/2", "a/1", "b-c/1", "b/10", "b/x/1", "bb", "b.d"]
    for name in names:
        store.put(name, [name.encode()])

    assert keys(store) == sorted(names)
    assert keys(store, "b") == sorted(name for name in names if name.startswith("b"))
    assert keys(store, "b/") == ["b/10", "b/2", "b/x/1"]
    assert keys(store, "b/1") == ["b/10"]
    assert keys(store, "b/x") == ["b/x/1"]
    assert keys(store, "absent/") == []
    assert [item.size for item in store.list("b/1")] == [4]


def test_an_object_that_is_not_there_is_said_not_to_be(store: Store) -> None:
    for call in (store.stat, lambda key: list(store.get(key)), lambda key: list(store.get(key, offset=3))):
        with pytest.raises(ObjectNotFound, match="absent/a"):
            call("absent/a")
    store.delete("absent/a")


def test_a_prefix_is_no_object_and_an_object_no_prefix(store: Store) -> None:
    store.put("a/b/c", [b"1"])

    for key in ("a", "a/b", "a/b/c/d"):
        with pytest.raises(ObjectNotFound):
            store.stat(key)
        with pytest.raises(ObjectNotFound):
            list(store.get(key))
        store.delete(key)
    assert keys(store) == ["a/b/c"]


def test_what_was_deleted_is_gone_and_its_key_is_free(store: Store, backend: Backend) -> None:
    store.put("a/b", [b"old"])
    store.put("a/c", [b"stays"])
    store.delete("a/b")

    assert keys(store) == ["a/c"]
    with pytest.raises(ObjectNotFound):
        store.stat("a/b")
    store.put("a/b", [b"new"])
    assert content(store, "a/b") == b"new"
    for key in ("a/b", "a/c"):
        store.delete(key)
    assert backend.everything() == []


def test_a_taken_key_is_refused_and_keeps_what_it_has(store: Store, backend: Backend) -> None:
    put = store.put("a/b", [b"old"])

    with pytest.raises(ObjectExists, match="a/b"):
        store.put("a/b", [b"new and longer"])
    assert content(store, "a/b") == b"old"
    assert store.stat("a/b") == put
    assert len(backend.everything()) == 1


INVALID = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", "./a", "a/./b", "a\0b"]


@pytest.mark.parametrize("key", INVALID)
def test_a_key_that_could_lead_elsewhere_is_refused(store: Store, backend: Backend, key: str) -> None:
    store.put("a/b/c", [b"1"])

    def source() -> Iterator[bytes]:
        yield b"x"

    for call in (
        lambda: store.put(key, source()),
        lambda: list(store.get(key)),
        lambda: store.stat(key),
        lambda: store.delete(key),
    ):
        with pytest.raises(Permanent, match="not a key"):
            call()
    assert keys(store) == ["a/b/c"]
    assert len(backend.everything()) == 1


@pytest.mark.parametrize("prefix", ["/", "/tmp/", "..", "../", "a/../../", "a/\0/"])
def test_no_prefix_leads_elsewhere(store: Store, backend: Backend, prefix: str) -> None:
    store.put("a/b", [b"1"])

    assert keys(store, prefix) == []


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(28, "of the source"), KeyboardInterrupt(), SystemExit(1)]
)
@pytest.mark.parametrize("position", [0, 1, 3, 6])
def test_a_source_that_raises_leaves_nothing_and_its_error_goes_on(
    store: Store, backend: Backend, position: int, error: BaseException
) -> None:
    def source() -> Iterator[bytes]:
        for number in range(6):
            if number == position:
                raise error
            yield bytes([number]) * 300_000
        raise error

    with pytest.raises(type(error)) as raised:
        store.put("parts/run/a", source())

    assert raised.value is error
    assert backend.everything() == []
    assert keys(store) == []
    store.put("parts/run/a", [b"the next one succeeds"])
    assert content(store, "parts/run/a") == b"the next one succeeds"


def test_nothing_shows_before_the_source_has_ended(store: Store, backend: Backend) -> None:
    other = backend.open()
    looked = []

    def source() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(500_000)
            with pytest.raises(ObjectNotFound):
                other.stat("a/b")
            with pytest.raises(ObjectNotFound):
                list(other.get("a/b"))
            looked.append(keys(other))

    store.put("a/b", source())

    assert looked == [[], [], []]
    assert keys(other) == ["a/b"]


def test_of_many_that_put_the_same_key_one_wins_and_is_whole(backend: Backend) -> None:
    writers = 12 if backend.turns == 1 else 6
    barrier = threading.Barrier(writers)

    def write(number: int) -> int | None:
        def source() -> Iterator[bytes]:
            for _ in range(5):
                yield bytes([number]) * 50_000
            barrier.wait(timeout=20)  # all have begun, none has ended

        try:
            backend.open().put("a/b", source())
        except ObjectExists:
            return None
        return number

    with ThreadPoolExecutor(writers) as pool:
        winners = [number for number in pool.map(write, range(writers)) if number is not None]
    assert len(winners) == 1 or (winners and not backend.one_winner)
    assert content(backend.open(), "a/b") in [bytes([winner]) * 250_000 for winner in winners]
    assert len(backend.everything()) == 1


def test_many_put_into_one_folder_at_the_same_time(backend: Backend) -> None:
    writers, each = 8, max(2, 15 // backend.turns)
    barrier = threading.Barrier(writers)

    def write(number: int) -> None:
        store = backend.open()
        barrier.wait(timeout=20)
        for turn in range(each):
            store.put(f"parts/run/{number}.{turn}", [bytes([number, turn])] * 100)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))

    store = backend.open()
    assert len(keys(store)) == writers * each
    for number in range(writers):
        for turn in range(each):
            assert content(store, f"parts/run/{number}.{turn}") == bytes([number, turn]) * 100


def test_puts_deletes_and_lists_do_not_disturb_one_another(backend: Backend) -> None:
    """A component removes the leftovers of its last attempt while others put the first parts of the same run."""
    writers, each = 4, max(2, 40 // backend.turns)
    done = threading.Event()

    def write(number: int) -> None:
        store = backend.open()
        for turn in range(each):
            store.put(f"parts/run/deeper/{number}", [b"%d" % turn])
            assert content(store, f"parts/run/deeper/{number}") == b"%d" % turn
            store.delete(f"parts/run/deeper/{number}")

    def look() -> int:
        store, looks = backend.open(), 0
        while not done.is_set():
            assert set(keys(store)) <= {f"parts/run/deeper/{number}" for number in range(writers)}
            looks += 1
        return looks

    with ThreadPoolExecutor(writers + 1) as pool:
        looking = pool.submit(look)
        try:
            list(pool.map(write, range(writers)))
        finally:
            done.set()
        assert looking.result() > 0
    assert backend.everything() == []


WRITER = """
import sys
from pydantic import TypeAdapter
from workers.sections import StoreSettings
from workers.storage import open_store

def source():
    for number in range(int(sys.argv[3])):
        yield bytes([number % 256]) * 100_000
    print("written", flush=True)
    sys.stdin.read()

store = open_store(TypeAdapter(StoreSettings).validate_json(sys.argv[1]))
store.put(sys.argv[2], source(), sha256=sys.argv[4] or None)
"""


def start_writer(backend: Backend, key: str, *, chunks: int, sha256: str = "") -> subprocess.Popen[bytes]:
    """Return a process that has put so many chunks and waits before it ends its source."""
    argv = [sys.executable, "-c", WRITER, backend.settings.model_dump_json(), key, str(chunks), sha256]
    writer = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout
    assert writer.stdout.readline() == b"written\n"
    return writer


@pytest.mark.parametrize("chunks", [0, 5])
def test_what_a_killed_writer_left_is_never_an_object(backend: Backend, chunks: int) -> None:
    store = backend.open()
    with start_writer(backend, "parts/run/a", chunks=chunks) as writer:
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL

    assert keys(store) == []
    with pytest.raises(ObjectNotFound):
        store.stat("parts/run/a")
    with pytest.raises(ObjectNotFound):
        list(store.get("parts/run/a"))
    store.put("parts/run/a", [b"the next attempt"])
    assert content(store, "parts/run/a") == b"the next attempt"
    assert keys(store) == ["parts/run/a"]


CHUNKS = [bytes([number % 256]) * 100_000 for number in range(250)]
"""What a writer of so many chunks puts: in S3, two parts of 8 MiB and a smaller one."""
DIGEST = hashlib.sha256(b"".join(CHUNKS)).hexdigest()


def put_counting(store: Store, key: str, chunks: Iterable[bytes], sha256: str) -> int:
    """Put and return how many bytes had to be sent."""
    sent: list[int] = []
    store.put(key, chunks, sha256=sha256, sending=sent.append)
    return sum(sent)


def test_a_put_goes_on_where_one_of_the_same_content_was_killed(backend: Backend) -> None:
    store = backend.open()
    with start_writer(backend, "full_system/a", chunks=200, sha256=DIGEST) as writer:
        assert wait_until(lambda: backend.arrived() >= 16 * MEGABYTE, timeout=60)
        writer.send_signal(signal.SIGKILL)
    assert keys(store) == []
    store.put("full_system/other", [b"of another content, which sweeps below the same folder"])
    there = backend.arrived()

    sent = put_counting(store, "full_system/a", CHUNKS, DIGEST)

    assert sent == len(CHUNKS) * 100_000 - there
    assert content(store, "full_system/a") == b"".join(CHUNKS)
    assert backend.arrived() == 0
    assert len(backend.everything()) == 2


def test_what_can_pass_leaves_what_was_sent_for_the_next_one_and_what_cannot_leaves_nothing(
    backend: Backend,
) -> None:
    store = backend.open()

    def source(error: BaseException) -> Iterator[bytes]:
        yield from CHUNKS[:200]
        raise error

    for error in (StoreUnavailable("away"), LeaseLost("another does it"), SystemExit(1)):
        with pytest.raises(type(error)):
            store.put("a", source(error), sha256=DIGEST)
        assert backend.arrived() >= 16 * MEGABYTE
        assert keys(store) == []
    with pytest.raises(IntegrityError):
        store.put("a", source(IntegrityError("its source is damaged")), sha256=DIGEST)
    assert backend.everything() == []


@pytest.mark.parametrize("changed", [0, 100, 249])
def test_what_was_sent_of_other_content_is_never_put_together_with_this(
    backend: Backend, changed: int
) -> None:
    """The same digest is claimed, and a byte differs: in the first part, in a later one, in what was not sent."""
    store = backend.open()
    other = [*CHUNKS[:changed], b"!" + CHUNKS[changed][1:], *CHUNKS[changed + 1 :]]

    def source() -> Iterator[bytes]:
        yield from CHUNKS
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        store.put("a", source(), sha256=DIGEST)

    assert put_counting(store, "a", other, DIGEST) > 0
    assert content(store, "a") == b"".join(other)
    store.delete("a")

    if changed == 249:
        with pytest.raises(StoreUnavailable):
            store.put("a", source(), sha256=DIGEST)
        store.put("a", CHUNKS[:90], sha256=DIGEST)
        assert content(store, "a") == b"".join(CHUNKS[:90]), "nor does anything of it stand behind this"


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "fail", "delete"]),
        st.sampled_from(["a", "b/a", "b/c", "b/d/e", "full_system/x"]),
        st.binary(max_size=20),
    ),
    max_size=25,
)


def check_sequence(backend: Backend, operations: list[tuple[str, str, bytes]]) -> None:
    store, model = backend.open(), dict[str, bytes]()

    def failing(chunk: bytes) -> Iterator[bytes]:
        yield chunk
        raise ValueError

    for operation, key, chunk in operations:
        if operation == "delete":
            store.delete(key)
            model.pop(key, None)
        elif operation == "fail" or key in model:
            with pytest.raises((ValueError, ObjectExists)):
                store.put(key, failing(chunk))
        else:
            store.put(key, [chunk])
            model[key] = chunk
        assert {item.key: content(store, item.key) for item in store.list("")} == model
    assert len(backend.everything()) == len(model)


@given(operations=OPERATIONS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_after_any_sequence_it_holds_what_a_dictionary_would(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[str, str, bytes]],
) -> None:
    check_sequence(local(request, tmp_path_factory.mktemp("sequence")), operations)


@pytest.mark.parametrize("kind", ["moto", "swift"])
@given(operations=OPERATIONS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=3)
def test_so_it_does_behind_a_network(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    operations: list[tuple[str, str, bytes]],
) -> None:
    check_sequence(KINDS[kind](request, tmp_path_factory.mktemp("sequence")), operations)
