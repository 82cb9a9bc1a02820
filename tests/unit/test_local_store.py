"""What the local store promises beyond `tests/contracts/test_store.py`: durability, permissions, what is swept."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.errors import Permanent, StoreUnavailable
from workers.sections import LocalStoreSettings
from workers.storage import remove_unfinished
from workers.storage.local import TEMPORARY_PREFIX, LocalStore

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_object_gets_its_name_only_after_its_bytes_are_durable_and_the_name_is_durable_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fsync(descriptor: int, real: Any = os.fsync) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        size = f" of {path.stat().st_size} bytes" if path.is_file() else ""
        done.append(f"fsync {'folder ' + path.name if path.is_dir() else 'file'}{size}")
        real(descriptor)

    def link(source: Path, target: Path, real: Any = os.link) -> None:
        done.append(f"link {Path(target).name}")
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    (tmp_path / "store").mkdir()
    LocalStore(tmp_path / "store").put("parts/run/a", [b"x" * 10, b"y" * 20])

    assert done == [
        "fsync folder store",  # so that the new folder parts is durable
        "fsync folder parts",
        "fsync file of 30 bytes",
        "link a",
        "fsync folder run",
    ]


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "new" / "store")
    previous = os.umask(0o000)
    try:
        store.put("parts/run/a", [b"secret"])
    finally:
        os.umask(previous)

    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")
    }
    assert modes == {
        "new": 0o700,
        "new/store": 0o700,
        "new/store/parts": 0o700,
        "new/store/parts/run": 0o700,
        "new/store/parts/run/a": 0o600,
    }


def leave(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half an object")
    return path


def test_the_next_put_removes_what_killed_writers_left_anywhere_below_the_same_first_folder(
    tmp_path: Path,
) -> None:
    leave(tmp_path / f"parts/run1/{TEMPORARY_PREFIX}dead")
    leave(tmp_path / f"parts/run2/{TEMPORARY_PREFIX}dead")
    LocalStore(tmp_path).put("parts/run2/a", [b"1"])

    assert files(tmp_path) == ["parts/run2/a"]
    assert not (tmp_path / "parts/run1").exists(), "a folder that is empty now"


def test_what_a_killed_writer_really_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from workers.storage.local import LocalStore\n"
        "def source():\n    yield b'x' * 100_000\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalStore(Path(sys.argv[1])).put('parts/run/a', source())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    (left,) = (tmp_path / "parts/run").iterdir()
    assert (left.name.startswith(TEMPORARY_PREFIX), left.stat().st_size) == (True, 100_000)

    LocalStore(tmp_path).put("parts/run/b", [b"1"])

    assert files(tmp_path) == ["parts/run/b"]


def test_what_a_living_writer_has_is_not_removed_however_old(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def source() -> Iterator[bytes]:
        yield b"first"
        (mine,) = (tmp_path / "a").iterdir()
        os.utime(mine, (0, 0))
        LocalStore(tmp_path).put("a/other", [b"1"])
        assert mine.exists()
        yield b" second"

    store.put("a/slow", source())

    assert b"".join(store.get("a/slow")) == b"first second"


def test_what_is_swept_away_before_its_writer_has_locked_it_is_created_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[Path] = []

    def mkstemp(*, real: Any = tempfile.mkstemp, **options: Any) -> tuple[int, str]:
        descriptor, name = real(**options)
        created.append(Path(name))
        if len(created) == 1:
            LocalStore(tmp_path)._sweep(tmp_path)
        return descriptor, name

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    store = LocalStore(tmp_path)
    store.put("a/b", [b"1"])

    assert len(created) == 2
    assert b"".join(store.get("a/b")) == b"1"
    assert files(tmp_path) == ["a/b"]


def test_a_put_waits_for_the_sweep_that_looks_at_its_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's sweep holds the lock for a moment, between this one's creating the file and locking it."""

    def mkstemp(*, real: Any = tempfile.mkstemp, **options: Any) -> tuple[int, str]:
        descriptor, name = real(**options)
        sweeper = Path(name).open("rb")  # noqa: SIM115 - closed by the timer
        fcntl.flock(sweeper.fileno(), fcntl.LOCK_EX)
        threading.Timer(0.3, sweeper.close).start()
        return descriptor, name

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    store = LocalStore(tmp_path)
    store.put("a/b", [b"1"])

    assert b"".join(store.get("a/b")) == b"1"


@pytest.mark.parametrize("call", ["put", "get", "stat", "delete"])
def test_the_names_of_unfinished_puts_are_no_keys(tmp_path: Path, call: str) -> None:
    left = leave(tmp_path / f"a/{TEMPORARY_PREFIX}left")
    store = LocalStore(tmp_path)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: store.put(f"a/{left.name}", [b"x"]),
        "get": lambda: list(store.get(f"a/{left.name}")),
        "stat": lambda: store.stat(f"a/{left.name}"),
        "delete": lambda: store.delete(f"a/{left.name}"),
    }
    with pytest.raises(Permanent, match="not a key"):
        calls[call]()
    assert left.exists()


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands for it; in a process of its own, for it cannot be lifted again."""
    code = (
        "import resource, sys; from pathlib import Path; from workers.storage.local import LocalStore\n"
        "from workers.errors import StoreUnavailable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n    LocalStore(Path(sys.argv[1])).put('parts/a', (b'x' * 300_000 for _ in range(5)))\n"
        "except StoreUnavailable as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == "the store failed at parts/a: File too large\n"
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "turn"), [("write", 1), ("write", 2), ("fsync", 1), ("fsync", 2), ("link", 1)]
)
def test_an_error_of_the_disk_anywhere_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, turn: int
) -> None:
    real, calls = getattr(os, call), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            raise OSError(28, os.strerror(28))
        return real(*args)

    store = LocalStore(tmp_path)
    (tmp_path / "parts").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreUnavailable, match="the store failed at parts/a: No space left"):
            store.put("parts/a", [b"1", b"2"])
    left = files(tmp_path)
    # Only when the very last call fails, to make the name durable, the whole object is there already.
    assert left == (["parts/a"] if (call, turn) == ("fsync", 2) else [])


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        code = (
            "import os, sys; from pathlib import Path; from workers.storage.local import LocalStore\n"
            "from workers.errors import Permanent; os.setuid(65534)\n"
            "try:\n    print(list(LocalStore(Path(sys.argv[1])).list('')))\nexcept Permanent as error:\n    print(error)"
        )
        folder = Path(tempfile.mkdtemp(dir="/tmp"))
        try:
            folder.chmod(0o700)
            done = subprocess.run(
                [sys.executable, "-c", code, str(folder)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            folder.rmdir()
        assert done.stdout == "the store refuses : Permission denied\n"
    else:
        (tmp_path / "closed").mkdir(mode=0o000)
        with pytest.raises(Permanent, match="Permission denied"):
            list(LocalStore(tmp_path).list(""))


DIGEST = "0" * 64
UNFINISHED = f".incoming-{DIGEST}"


def test_what_a_put_could_go_on_with_is_kept_for_two_days(tmp_path: Path) -> None:
    store, settings = LocalStore(tmp_path), LocalStoreSettings(path=tmp_path)
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a" / UNFINISHED, tmp_path / "a" / ".incoming-x"):
        path.write_text("half")
    assert remove_unfinished(settings) == ["a/.incoming-x"]
    store.put("a/b", [b"1"])
    assert files(tmp_path) == [f"a/{UNFINISHED}", "a/b"]

    os.utime(tmp_path / "a" / UNFINISHED, (0, time.time() - 49 * 3600))
    assert remove_unfinished(settings) == [f"a/{UNFINISHED}"]
    assert files(tmp_path) == ["a/b"]


def test_what_was_committed_is_never_taken_for_something_unfinished(tmp_path: Path) -> None:
    """Its writer was killed between the two names; then the object was lost, and is put again while another keeps it."""
    store = LocalStore(tmp_path)
    store.put("a", [b"committed"], sha256=DIGEST)
    assert files(tmp_path) == ["a"]
    (tmp_path / UNFINISHED).hardlink_to(tmp_path / "a")
    store.put("b", [b"other"], sha256=DIGEST)
    assert b"".join(store.get("a")) == b"committed"
    assert b"".join(store.get("b")) == b"other"


def test_two_puts_of_one_content_do_not_write_one_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def source() -> Iterator[bytes]:
        yield b"first "
        store.put("b", [b"first ", b"second"], sha256=DIGEST)
        yield b"second"

    store.put("a", source(), sha256=DIGEST)
    assert [b"".join(store.get(key)) for key in "ab"] == [b"first second"] * 2
    assert files(tmp_path) == ["a", "b"]


def test_a_full_disk_is_not_kept_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int, _chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("workers.storage.local._write_all", full)
    with pytest.raises(StoreUnavailable, match="No space left"):
        LocalStore(tmp_path).put("a", [b"1"], sha256=DIGEST)
    assert files(tmp_path) == []
