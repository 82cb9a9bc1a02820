"""The append-only file as one consistent set, while the server writes and rewrites it; and its restore anywhere."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.redis_servers import (
    NEWEST,
    OLDEST,
    PASSWORD,
    PROGRAMS,
    Server,
    back_up,
    fill,
    replace_all,
    restore,
    same,
)
from workers.errors import ComparisonError, IntegrityError, Permanent
from workers.runtime import sweep


@pytest.fixture(scope="module", params=list(PROGRAMS.values()), ids=list(PROGRAMS))
def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an append-only file of an unusual name."""
    names = {"appendfilename": '"my \\"log\\".aof"', "dbfilename": '"my dump.rdb"'}
    shared = Server(tmp_path_factory.mktemp("redis"), request.param, appendonly="yes", save='""', **names)
    shared.start()
    fill(shared)
    yield shared
    assert shared.do("stop")


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    yield
    assert not list(scratch.iterdir())


@contextlib.contextmanager
def writing(server: Server) -> Iterator[list[int]]:
    """Within, two counters go up in one transaction with a new key; yields what was acknowledged last."""
    acknowledged, stop = [0], threading.Event()

    def write() -> None:
        with server.client(5) as client:
            while not stop.is_set():
                with client.pipeline() as pipeline:
                    pipeline.incr("one").incr("two").set(f"new {time.monotonic_ns()}", os.urandom(50))
                    acknowledged[0] = pipeline.execute()[0]

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not acknowledged[0]:
            time.sleep(0.01)
        yield acknowledged
    finally:
        stop.set()
        writer.join()
        with server.client(5) as client:
            client.flushdb()


def rewrite(server: Server) -> None:
    with server.client() as client:
        client.bgrewriteaof()
    assert server.becomes("aof_rewrite_in_progress", "0")


def pinned(server: Server) -> list[str]:
    return [path.name for path in server.data.iterdir() if "pinned" in path.name]


def test_one_moment_while_it_is_written_and_rewritten(server: Server) -> None:
    """All that was acknowledged is in it, no transaction is torn, and every count is exact."""
    component = server.component(method="aof")
    before = server.fingerprint()
    (server.data / f".ai-micro-backup-pinned-{component.name}").mkdir()  # of a worker that was killed
    (server.data / f".ai-micro-backup-pinned-{component.name}" / "1").write_text("left")
    with writing(server) as acknowledged:
        time.sleep(0.1)
        sent = acknowledged[0]
        [source] = component.sources()
        data = next(source.chunks)
        assert pinned(server)
        rewrite(server)
        data += b"".join(source.chunks)
    assert not pinned(server)
    part, _ = back_up(component)
    part = part.model_copy(update={"holds": source.holds})
    assert part.holds["databases"]["db5"] > 2
    assert component.rehearse(restore(part, data))["databases"] == part.holds["databases"]
    component.check(part, iter([data]))
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(part, data))
    with server.client(5) as client:
        assert sent <= int(client.get("one") or 0) == int(client.get("two") or 0)
        client.flushdb()
    assert same(server.fingerprint(), before)


def test_a_torn_tail_is_no_part_of_it(server: Server) -> None:
    """A server that dropped one while it loaded counts its file's length wrongly from then on (7.0)."""
    rewrite(server)  # its increment is the youngest file then
    with server.client() as client:
        client.set("after the rewrite", 1)
    assert server.do("stop")
    last = max(server.data.rglob("*.aof"), key=lambda path: path.stat().st_mtime_ns)
    with last.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nto")
    server.start()
    before = server.fingerprint()
    component = server.component(method="aof")
    with writing(server):
        [source] = component.sources()
        data = b"".join(source.chunks)
    part = back_up(component)[0].model_copy(update={"holds": source.holds})
    assert component.rehearse(restore(part, data))["databases"] == part.holds["databases"]
    assert same(server.fingerprint(), before)


def test_closed_early_it_leaves_nothing(server: Server) -> None:
    [unread] = server.component(method="aof").sources()
    [source] = server.component(method="aof").sources()
    next(source.chunks)
    assert pinned(server)
    source.chunks.close()  # type: ignore[attr-defined]
    assert not pinned(server)
    del unread


READER = """
import sys
from tasks.components.redis import Component
[source] = Component.model_validate_json(sys.argv[1]).sources()
print(len(next(source.chunks)), flush=True)
sys.stdin.read()
"""


def test_a_worker_killed_while_it_reads_leaves_what_the_next_one_removes(server: Server) -> None:
    """Its programs end with it; the links that it leaves hold up neither rewrites nor the next backup."""
    component = server.component(method="aof")
    with server.client(7) as client:
        for number in range(5):
            client.set(f"large {number}", os.urandom(1_000_000))  # more than pipes hold
    argv = [sys.executable, "-c", READER, component.model_dump_json()]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert int(worker.stdout.readline()) > 0
        worker.kill()
    assert pinned(server)
    rewrite(server)
    with server.client(7) as client:
        client.set("written since", 1, ex=5000)
        before = server.fingerprint()
        sweep(component.runtime, component.name)  # as every attempt begins
        part, data = back_up(component)
        assert not pinned(server)
        client.flushall()
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(part, data))
    assert same(server.fingerprint(), before)
    with server.client(7) as client:
        client.flushdb()


def test_what_cannot_be_had_says_why(server: Server, tmp_path: Path) -> None:
    with pytest.raises((Permanent, IntegrityError), match=r"is data_dir right\?|cannot be linked"):
        back_up(server.component(method="aof", data_dir=tmp_path))
    with server.client() as client:
        client.config_set("appendonly", "no")
    try:
        with pytest.raises(Permanent, match=r'appendonly no.*method = "file"'):
            server.component(method="aof").sources()
    finally:
        with server.client() as client:
            client.config_set("appendonly", "yes")
        assert server.becomes("aof_rewrite_in_progress", "0")


def test_damage_is_found(server: Server) -> None:
    component = server.component(method="aof")
    rewrite(server)
    with server.client() as client:
        client.set("a key that is in an increment", "x" * 1000)
    part, data = back_up(component)
    flipped = bytearray(data)
    flipped[1000] ^= 4
    torn = data[:-10]
    command = data.replace(b"$1000\r\n", b"$1001\r\n")
    for damaged in (bytes(flipped), torn, command, b"", data[: len(data) // 2]):
        with pytest.raises(IntegrityError) as caught:
            component.check(part, iter([damaged]))
        with pytest.raises(ComparisonError):
            component.stage(restore(part, damaged))
        if damaged:
            with pytest.raises((IntegrityError, ComparisonError)):
                component.rehearse(restore(part, damaged))
        assert "session" not in str(caught.value)
    component.revert(restore(part, data))


@pytest.mark.parametrize("appendonly", ["yes", "no"])
@pytest.mark.parametrize("origin", [OLDEST, NEWEST])
def test_it_is_put_where_that_server_reads_it(tmp_path: Path, origin: str, appendonly: str) -> None:
    """Of both layouts on the newest server, which may read an append-only file or not; then it starts again."""
    source, target = (
        Server(tmp_path / name, PROGRAMS[version], appendonly=setting, save='""')
        for name, version, setting in (("source", origin, "yes"), ("target", NEWEST, appendonly))
    )
    source.start()
    target.start()
    try:
        fill(source)
        rewrite(source)
        with source.client() as client:
            client.set("after the rewrite", 1, px=1)  # gone before it is loaded
            client.set("in the increment", 1)
        before = source.fingerprint()
        part, data = back_up(source.component(method="aof"))
        replace_all(target)
        other = target.fingerprint()
        component = target.component()
        for step in ("stage", "swap", "revert"):
            getattr(component, step)(restore(part, data))
        assert same(target.fingerprint(), other)
        for step in ("stage", "swap", "settle"):
            getattr(component, step)(restore(part, data))
        assert same(target.fingerprint(), before)
        with target.client() as client:
            client.set("later", 1)
            client.save()
        assert target.do("stop")
        target.start()
        with target.client() as client:
            assert client.delete("later") == 1
        assert same(target.fingerprint(), before)
    finally:
        assert source.do("stop")
        assert target.do("stop")


def test_an_older_server_refuses_it(server: Server, tmp_path: Path) -> None:
    if server.program == PROGRAMS[OLDEST]:
        pytest.skip("there is no older one") if OLDEST == NEWEST else None
        return
    older = Server(tmp_path / "older", PROGRAMS[OLDEST], appendonly="yes")
    older.start()
    try:
        part, data = back_up(server.component(method="aof"))
        with pytest.raises(ComparisonError, match=f"(?s)Redis {OLDEST}.*which Redis .* wrote"):
            older.component().stage(restore(part, data))
        older.component().revert(restore(part, data))
    finally:
        assert older.do("stop")
