"""Leases on a real Redis: exclusive, kept by their heartbeat, free soon after their holder died."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compose.demo.embedded import RedisServer, free_port
from tests.configured import write_settings
from tests.conftest import Served
from workers import locks
from workers.errors import LeaseLost, LeaseUnavailable
from workers.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
LEASE = 1.0


def settings_for(folder: Path, port: int, password: str, *, system: str = "") -> Settings:
    """Settings with short leases; each test's system, and so its leases, has a name of its own."""
    secret = folder / "password"
    secret.write_text(password)
    more = f'[broker]\nport = {port}\npassword = {{ file = "{secret}" }}\n[limits]\nlease = {LEASE}'
    path = write_settings(folder, more=more)
    path.write_text(path.read_text().replace('name = "shop"', f'name = "{system or secrets.token_hex(8)}"'))
    return read_settings(path)


@pytest.fixture
def settings(redis_server: Served, tmp_path: Path) -> Iterator[Settings]:
    yield settings_for(tmp_path, redis_server.port, redis_server.password)
    with locks.client(settings_for(tmp_path, redis_server.port, redis_server.password)) as broker:
        broker.flushdb()


def test_a_lease_has_one_holder_at_a_time(settings: Settings) -> None:
    assert locks.holder_of(settings, "keys") is None
    with locks.hold(settings, "keys", holder="first") as lease:
        lease.check()
        assert (lease.name, lease.holder) == ("keys", "first")
        assert locks.holder_of(settings, "keys") == "first"
        with (
            pytest.raises(LeaseUnavailable, match="keys is being worked on by first"),
            locks.hold(settings, "keys", holder="second"),
        ):
            pytest.fail("two hold it")
        with locks.hold(settings, "uploads", holder="second"):
            assert locks.holder_of(settings, "uploads") == "second"
    assert locks.holder_of(settings, "keys") is None
    with locks.hold(settings, "keys", holder="second") as lease:
        lease.check()


def test_of_many_that_ask_at_once_one_gets_it(settings: Settings) -> None:
    barrier, over = threading.Barrier(8), threading.Event()

    def ask(number: int) -> bool:
        barrier.wait(timeout=20)
        try:
            with locks.hold(settings, "keys", holder=f"holder {number}"):
                over.wait(timeout=20)
                return True
        except LeaseUnavailable:
            return False

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        while sum(job.done() for job in asked) < 7:
            time.sleep(0.01)
        over.set()
    assert sum(job.result() for job in asked) == 1


def test_systems_that_share_a_broker_do_not_share_leases(settings: Settings, tmp_path: Path) -> None:
    other = settings.model_copy(update={"system": settings.system.model_copy(update={"name": "other"})})

    with locks.hold(settings, "keys", holder="a"), locks.hold(other, "keys", holder="b"):
        assert (locks.holder_of(settings, "keys"), locks.holder_of(other, "keys")) == ("a", "b")


def test_it_is_given_back_when_the_work_fails(settings: Settings) -> None:
    with pytest.raises(ValueError, match="the work"), locks.hold(settings, "keys", holder="a"):
        raise ValueError("the work")
    assert locks.holder_of(settings, "keys") is None


def test_the_heartbeat_keeps_it_beyond_its_time(settings: Settings) -> None:
    with locks.hold(settings, "keys", holder="a"):
        deadline = time.monotonic() + 2.5 * LEASE
        while time.monotonic() < deadline:
            assert locks.holder_of(settings, "keys") == "a"
            time.sleep(0.02)


def test_without_a_heartbeat_it_runs_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above is one of the heartbeat."""
    monkeypatch.setattr(locks.Lease, "beat", lambda *_args: None)
    with locks.hold(settings, "keys", holder="a"):
        time.sleep(1.2 * LEASE)
        assert locks.holder_of(settings, "keys") is None


HOLDER = """
import sys
from pathlib import Path
from workers import locks
from workers.settings import read_settings
with locks.hold(read_settings(Path(sys.argv[1])), "keys", holder="the dead"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_when_its_holder_is_killed_it_is_free_within_its_time(settings: Settings, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDER, str(tmp_path / "backup.toml")]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert locks.holder_of(settings, "keys") == "the dead"
        holder.send_signal(signal.SIGKILL)
        killed = time.monotonic()
    while locks.holder_of(settings, "keys"):
        assert time.monotonic() - killed < 1.5 * LEASE
        time.sleep(0.02)
    with locks.hold(settings, "keys", holder="the next"):
        assert locks.holder_of(settings, "keys") == "the next"


def take_away(settings: Settings, name: str, holder: str) -> None:
    """Let the lease run out and another take it, as when this process was stopped for too long."""
    with locks.client(settings) as broker:
        broker.set(locks._key(settings, name), holder, px=60_000)


def test_who_lost_it_to_another_must_not_commit(settings: Settings) -> None:
    with locks.hold(settings, "keys", holder="slow") as lease:
        lease.check()
        take_away(settings, "keys", "the other")
        for _ in range(2):
            with pytest.raises(LeaseLost, match="slow lost the lease on keys; another worker has it"):
                lease.check()
        time.sleep(0.6 * LEASE)  # the heartbeat does not take it back
        assert locks.holder_of(settings, "keys") == "the other"
    assert locks.holder_of(settings, "keys") == "the other", "nor does giving it back take it from the other"


def test_one_that_ran_out_and_that_nobody_took_is_taken_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.Lease, "beat", lambda *_args: None)
    with locks.hold(settings, "keys", holder="a") as lease:
        with locks.client(settings) as broker:
            broker.delete(locks._key(settings, "keys"))
        lease.check()
        assert locks.holder_of(settings, "keys") == "a"


def test_a_repeated_call_of_the_same_holder_is_no_stranger(settings: Settings) -> None:
    """The answer to the first call got lost with the connection, and it was sent again."""
    take_away(settings, "keys", "a")
    with locks.hold(settings, "keys", holder="a") as lease:
        lease.check()
    assert locks.holder_of(settings, "keys") is None


@pytest.mark.parametrize("appendonly", [True, False])
def test_it_outlives_a_broker_that_is_restarted(tmp_path: Path, *, appendonly: bool) -> None:
    password = secrets.token_hex(8)
    with RedisServer(
        tmp_path / "redis", free_port(), password, appendonly=appendonly, settings={"save": '""'}
    ) as server:
        settings = settings_for(tmp_path, server.port, password)
        with locks.hold(settings, "keys", holder="a") as lease:
            server.stop()
            time.sleep(1.2 * LEASE)  # longer than it lasts
            server.start()
            lease.check()
            deadline = time.monotonic() + 2 * LEASE
            while time.monotonic() < deadline:
                assert locks.holder_of(settings, "keys") == "a"
                time.sleep(0.05)
        assert locks.holder_of(settings, "keys") is None


def test_a_broker_that_is_away_is_said_to_be_within_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, free_port(), "none")

    def hold() -> None:
        with locks.hold(settings, "keys", holder="a"):
            pytest.fail("nobody gave it")

    calls: list[Callable[[], object]] = [
        hold,
        lambda: locks.holder_of(settings, "keys"),
        lambda: locks.queue_lengths(settings),
    ]

    def ask(number: int) -> float:
        began = time.monotonic()
        with pytest.raises(LeaseUnavailable, match="the broker does not answer"):
            calls[number]()
        return time.monotonic() - began

    with ThreadPoolExecutor() as pool:
        for seconds in pool.map(ask, range(len(calls))):
            assert 5 < seconds < 30, "it tries for a while, to outlast a restart, but not for ever"


def test_what_waits_in_the_queues_is_counted(settings: Settings) -> None:
    with locks.client(settings) as broker:
        broker.lpush("host.db1", "a", "b")
        broker.lpush("elsewhere", "c")
    assert locks.queue_lengths(settings) == {"control": 0, "host.db1": 2, "host.app1": 0}
