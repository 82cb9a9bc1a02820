"""What every Redis and every method promises: what comes back is what was there, and nothing half or damaged does.

6.2 and 7.0 run as processes of this machine, 8.0 in a container.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docker
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from compose.demo.docker_images import Images, ensure_engine
from tests.redis_servers import PASSWORD, PROGRAMS, ContainedServer, Server, back_up, restore, same
from workers import streams
from workers.component import Part, Restore
from workers.errors import BackupError, ComparisonError, IntegrityError, ObjectNotFound
from workers.runtime import sweep
from workers.storage.local import LocalStore

EXAMPLES = {"processes": 4, "container": 3}
"""Made key spaces for each version and method, beside the one that holds every type: each costs a restart."""
WORDS = st.binary(min_size=1, max_size=12) | st.sampled_from(
    [b"", b"\xff\x00\r\n", b"'\"\\ $1", "鍵".encode(), b"7"]
)
SCORES = st.floats(allow_nan=False, width=32)
VALUES = st.one_of(
    st.tuples(
        st.just("string"), st.binary(max_size=2000) | st.integers(-(2**63), 2**63 - 1).map(b"%d".__mod__)
    ),
    st.tuples(st.just("list"), st.lists(WORDS, min_size=1, max_size=200)),
    st.tuples(st.just("set"), st.sets(WORDS | st.integers().map(b"%d".__mod__), min_size=1, max_size=200)),
    st.tuples(st.just("zset"), st.dictionaries(WORDS, SCORES, min_size=1, max_size=200)),
    st.tuples(st.just("hash"), st.dictionaries(WORDS, WORDS, min_size=1, max_size=200)),
    st.tuples(st.just("stream"), st.lists(WORDS, min_size=1, max_size=30), st.integers(0, 30)),
    st.tuples(st.just("bitmap"), st.integers(0, 100_000)),
    st.tuples(st.just("hyperloglog"), st.lists(WORDS, min_size=1, max_size=50)),
    st.tuples(st.just("geo"), st.floats(-180, 180), st.floats(-85, 85)),
)
SECONDS = st.none() | st.integers(3600, 10**9)
KEYSPACES = st.dictionaries(
    st.sampled_from([0, 1, 9, 15]),
    st.dictionaries(WORDS, st.tuples(VALUES, SECONDS), min_size=3, max_size=12),
    min_size=2,
)
Keyspace = Mapping[int, Mapping[bytes, tuple[tuple[Any, ...], int | None]]]
EVERY: Keyspace = {
    0: {
        b"\xff\x00": (("string", b"\x00" * 500), 7200),
        b"": (("list", [b"%d" % i for i in range(200)]), None),
        b"numbers": (("set", {b"1", b"2"}), None),
        b"set": (("set", {b"%d x" % i for i in range(600)}), None),
        b"zset": (("zset", {b"%d" % i: i / 7 for i in range(300)}), 9000),
    },
    3: {
        b"hash": (("hash", {b"%d" % i: b"x" * 70 for i in range(600)}), None),
        b"small hash": (("hash", {b"": b""}), 3600),
        b"stream": (("stream", [b"a", b"b", b"c"], 2), None),
        b"bits": (("bitmap", 70_000), None),
        b"visitors": (("hyperloglog", [b"a", b"b"]), None),
        b"places": (("geo", 139.7, 35.7), None),
    },
    15: {b"\xff\x00": (("string", b"another database"), None)},
}


@pytest.fixture(
    scope="module", params=[*PROGRAMS, pytest.param("8.0 in a container", marks=pytest.mark.docker)]
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an append-only file: all methods work on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
        if request.param in PROGRAMS:
            folder = tmp_path_factory.mktemp("redis")
            server = Server(
                folder, PROGRAMS[request.param], appendonly="yes", save='""', repl_diskless_sync_delay="0"
            )
            server.start()
            yield server
            assert server.do("stop")
            return
        client: docker.DockerClient = request.getfixturevalue("docker_client")
        ensure_engine()
        Images().build()
        contained = ContainedServer(client, REDIS_APPENDONLY="yes", REDIS_SAVE="")
        try:
            contained.component().loaded()
            yield contained
        finally:
            contained.remove()


@pytest.fixture(params=["file", "network", "aof"])
def method(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def fill(server: Server, keyspace: Keyspace) -> None:
    """Make it the server's only data."""
    with server.client() as client:
        client.flushall()
    for number, keys in keyspace.items():
        with server.client(number) as client, client.pipeline(transaction=False) as pipeline:
            for key, (value, seconds) in keys.items():
                put(pipeline, key, value)
                if seconds is not None:
                    pipeline.expire(key, seconds)
            pipeline.execute()
            if server.version >= (7, 4):  # fields that expire, one type of many
                client.execute_command("HSET", "fields that expire", "a", "1", "b", "2")
                client.execute_command("HEXPIRE", "fields that expire", 9000, "FIELDS", 1, "a")
    if server.version >= (7,):
        with server.client() as client:
            client.function_load(
                "#!lua name=lib\nredis.register_function('one', function() return 1 end)", replace=True
            )


def put(pipeline: Any, key: bytes, value: tuple[Any, ...]) -> None:  # noqa: C901  one case a type
    match value:
        case ("string", content):
            pipeline.set(key, content)
        case ("list", items):
            pipeline.rpush(key, *items)
        case ("set", members):
            pipeline.sadd(key, *members)
        case ("zset", scores):
            pipeline.zadd(key, scores)
        case ("hash", fields):
            pipeline.hset(key, mapping=fields)
        case ("stream", entries, read):
            for number, entry in enumerate(entries, 1):
                pipeline.xadd(key, {b"field": entry}, id=f"1-{number}")
            pipeline.xgroup_create(key, b"group", id=0)
            pipeline.xreadgroup(b"group", b"consumer", {key: ">"}, count=read or 1)
            pipeline.xack(key, b"group", "1-1")
            pipeline.xdel(key, "1-1")
        case ("bitmap", bit):
            pipeline.setbit(key, bit, 1)
        case ("hyperloglog", items):
            pipeline.pfadd(key, *items)
        case ("geo", longitude, latitude):
            pipeline.geoadd(key, (longitude, latitude, b"place"))
        case _:
            raise AssertionError(value)


def counts(fingerprint: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key in fingerprint:
        if key != "functions":
            found[key.split(" ")[0]] = found.get(key.split(" ")[0], 0) + 1
    return found


def test_what_comes_back_is_what_was_there(server: Server, method: str) -> None:
    @settings(
        max_examples=EXAMPLES["container" if isinstance(server, ContainedServer) else "processes"],
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @example(EVERY)
    @given(KEYSPACES)
    def comes_back(keyspace: Keyspace) -> None:
        round_trip(server, method, keyspace)

    comes_back()


def round_trip(server: Server, method: str, keyspace: Keyspace) -> None:
    fill(server, keyspace)
    before = server.fingerprint()
    component = server.component(method=method)
    part, data = back_up(component)
    assert part.holds["databases"] == counts(before)
    assert sum(part.holds["expiring"].values()) == part.holds["expires"]
    component.check(part, iter([data]))
    assert component.rehearse(restore(part, data))["databases"] == counts(before)
    with server.client() as client:
        client.flushall()
        client.set("another", 1)
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(part, data))
    assert same(server.fingerprint(), before)


def test_nothing_half_is_stored_and_nothing_damaged_restored(
    server: Server, method: str, tmp_path: Path
) -> None:
    with server.client() as client:
        client.flushall()
        client.set("large", PASSWORD.encode() * 100)
        for number in range(6):
            client.set(f"random {number}", os.urandom(1_000_000))
    component = server.component(method=method)
    store = LocalStore(tmp_path / "store")
    [source] = component.sources()

    def interrupted() -> Iterator[bytes]:
        yield next(source.chunks)
        sweep(component.runtime, component.name)  # ends the programs that it comes from
        yield from source.chunks

    with pytest.raises(BackupError):
        streams.write(store, "half", interrupted(), level=1)
    assert not list(store.list(""))

    [source] = component.sources()
    written = streams.write(store, "whole", source.chunks, level=1)
    part = back_up(component)[0].model_copy(
        update={
            "codec": "zstd",
            "size": written.size,
            "sha256": written.sha256,
            "plain_size": written.plain_size,
            "plain_sha256": written.plain_sha256,
            "holds": source.holds,
        }
    )
    before = server.fingerprint()
    stored = bytearray((tmp_path / "store/whole").read_bytes())
    stored[len(stored) // 2] ^= 1

    def read(_: Part) -> Iterator[bytes]:
        chunks = (bytes(stored[start : start + 100_000]) for start in range(0, len(stored), 100_000))
        return streams.read(chunks, codec="zstd", written=written, name="whole")

    wanted = Restore("20261122_020000", [part], read)
    for refused in (component.stage, component.rehearse):
        with pytest.raises((IntegrityError, ComparisonError)):
            refused(wanted)
    component.revert(wanted)
    assert same(server.fingerprint(), before)
    with pytest.raises(ObjectNotFound):
        b"".join(store.get("half"))
