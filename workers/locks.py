"""Leases: who works on a component now. They live in the broker's Redis, so hosts need nothing else for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import LockError, LockNotOwnedError, RedisError
from redis.lock import Lock
from redis.retry import Retry

from workers.errors import LeaseLost, LeaseUnavailable
from workers.hosts import all_queues
from workers.settings import Settings

HEARTBEATS_PER_LEASE = 3
SECONDS_REMEMBERED = 30 * 86400
"""How long it is known that a holder was ended; longer than a host may be away."""


class Lease:
    """The right to work on ``name``, kept alive by a heartbeat until the block of `hold` ends."""

    def __init__(self, lock: Lock, name: str, holder: str, *, ended: str) -> None:
        self._lock, self.name, self.holder, self._ended = lock, name, holder, ended

    def check(self) -> None:
        """Return if this holder may commit now; renews the lease on the way.

        Raises ``LeaseLost`` when somebody else holds it or the holder was ended (`end_holder`),
        ``LeaseUnavailable`` when the broker does not answer. A lease that ran out and that nobody took (the broker
        was away) is taken again.
        """
        try:
            if self._lock.redis.exists(self._ended):
                raise LeaseLost(f"{self.holder} was ended; it must not work on {self.name}")
            try:
                self._lock.reacquire()
            except LockNotOwnedError:
                if not self._lock.acquire(blocking=False, token=self.holder):
                    raise LeaseLost(
                        f"{self.holder} lost the lease on {self.name}; another worker has it"
                    ) from None
        except LockError as error:
            raise LeaseLost(f"{self.holder} lost the lease on {self.name}: {error}") from error
        except RedisError as error:
            raise LeaseUnavailable(f"the broker does not answer for the lease on {self.name}") from error

    def beat(self, stop: threading.Event, seconds: float) -> None:
        """Renew the lease every so many seconds until told to stop, or until it is lost."""
        while not stop.wait(seconds):
            with contextlib.suppress(
                LeaseUnavailable
            ):  # the next beat, or the check before a commit, tries again
                try:
                    self.check()
                except LeaseLost:
                    return  # the check before the commit raises it again, in the thread that works


def client(settings: Settings) -> redis.Redis:
    """Return a client of the broker that tries again, with growing pauses, for about ten seconds."""
    retry = Retry(ExponentialBackoff(cap=2, base=0.1), retries=8)
    return redis.Redis.from_url(
        settings.broker.url,
        retry=retry,
        retry_on_error=[redis.ConnectionError, redis.TimeoutError],
        socket_timeout=5,
        socket_connect_timeout=5,
        decode_responses=True,
    )


@contextlib.contextmanager
def hold(settings: Settings, name: str, *, holder: str) -> Iterator[Lease]:
    """Hold the lease on ``name`` as ``holder`` for the block.

    Raises ``LeaseUnavailable`` when somebody has it, ``LeaseLost`` when ``holder`` was ended (`end_holder`).
    """
    broker = client(settings)
    lock = Lock(broker, _key(settings, name), timeout=settings.limits.lease, thread_local=False)
    lease = Lease(lock, name, holder, ended=_ended_key(settings, holder))
    try:
        if broker.exists(_ended_key(settings, holder)):
            raise LeaseLost(f"{holder} was ended before it began")
        if not lock.acquire(blocking=False, token=holder):
            other = holder_of(settings, name)
            if other != holder:
                raise LeaseUnavailable(f"{name} is being worked on by {other or 'another worker'}")
            lock.local.token = holder.encode()  # taken by a call whose answer got lost
    except RedisError as error:
        raise LeaseUnavailable(f"the broker does not answer for the lease on {name}") from error
    stop = threading.Event()
    interval = settings.limits.lease / HEARTBEATS_PER_LEASE
    heartbeat = threading.Thread(target=lease.beat, args=(stop, interval), name=f"lease {name}", daemon=True)
    heartbeat.start()
    try:
        yield lease
    finally:
        stop.set()
        heartbeat.join()
        with contextlib.suppress(LockError, RedisError):  # lost, or it runs out by itself
            lock.release()
        broker.close()


def end_holder(settings: Settings, holder: str) -> None:
    """Let ``holder`` neither get nor keep a lease from now on: its message may wait for a worker that comes back.

    Raises ``LeaseUnavailable`` when the broker does not answer.
    """
    try:
        with client(settings) as broker:
            broker.set(_ended_key(settings, holder), "", ex=SECONDS_REMEMBERED)
    except RedisError as error:
        raise LeaseUnavailable("the broker does not answer") from error


def holder_of(settings: Settings, name: str) -> str | None:
    """Return who holds the lease on ``name`` now. Raises ``LeaseUnavailable`` when the broker does not answer."""
    try:
        with client(settings) as broker:
            holder = broker.get(_key(settings, name))
    except RedisError as error:
        raise LeaseUnavailable("the broker does not answer") from error
    return str(holder) if holder is not None else None


def _key(settings: Settings, name: str) -> str:
    return f"ai-micro-backup:{settings.system.name}:lease:{name}"


def _ended_key(settings: Settings, holder: str) -> str:
    return f"ai-micro-backup:{settings.system.name}:ended:{holder}"


def queue_lengths(settings: Settings) -> dict[str, int]:
    """Return how many messages wait in each queue. Raises ``LeaseUnavailable`` when the broker does not answer."""
    try:
        with client(settings) as broker:
            return {name: int(broker.llen(name)) for name in all_queues(settings)}
    except RedisError as error:
        raise LeaseUnavailable("the broker does not answer") from error
