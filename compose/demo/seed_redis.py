"""The demo's Redis: sessions that expire, a cache, and a value of every type."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from urllib.parse import urlsplit, urlunsplit

import redis

from compose.demo.material import Material

Fields = dict[
    str | bytes | bytearray | memoryview | int | float, str | bytes | bytearray | memoryview | int | float
]
#: A key, its value (a hash or a string), the seconds it lasts.
Entry = tuple[str, Fields | bytes, int | None]

_BATCH = 2000
_DAY = 86_400


def database(url: str, number: int) -> redis.Redis:
    """Open database `number` of the server at `url` (its own number does not matter)."""
    return redis.Redis.from_url(urlunsplit(urlsplit(url)._replace(path=f"/{number}")), socket_timeout=60)


def seed_redis(url: str, *, keys: int, material: Material) -> int:
    """Fill the server, emptied first, with about `keys` keys in the databases 0 and 1, and give their number."""
    with database(url, 0) as client:
        client.flushall()
        _batches(client, (_session(material, number) for number in range(keys * 6 // 10)))
        _one_of_each(client, material)
        count = int(client.dbsize())
    with database(url, 1) as cache:
        _batches(cache, (_cached(material, number) for number in range(keys * 4 // 10)))
        return count + int(cache.dbsize())


def _session(material: Material, number: int) -> Entry:
    fields: Fields = {
        "user": f"user{number:06}",
        "since": material.moment().isoformat(),
        "agent": material.text(60),
        "csrf": material.data(32),
    }
    return f"session:{material.data(16).hex()}", fields, material.random.randrange(10 * _DAY, 30 * _DAY)


def _cached(material: Material, number: int) -> Entry:
    lasting = None if number % 4 else material.random.randrange(10 * _DAY, 30 * _DAY)
    return f"cache:page:{number}", material.data(40) + material.text(200).encode(), lasting


def _batches(client: redis.Redis, entries: Iterable[Entry]) -> None:
    entries = iter(entries)
    while batch := list(islice(entries, _BATCH)):
        pipeline = client.pipeline(transaction=False)
        for key, value, lasting in batch:
            if isinstance(value, dict):
                pipeline.hset(key, mapping=value)
            else:
                pipeline.set(key, value)
            if lasting is not None:
                pipeline.expire(key, lasting)
        pipeline.execute()


def _one_of_each(client: redis.Redis, material: Material) -> None:
    client.set("設定:題名", "管理画面")
    client.set(b"binary\x00\xff key\n", material.data(3000))
    client.set("counter", 41)
    client.setbit("seen", 100_000, 1)
    client.pfadd("visitors", *(f"visitor-{number}" for number in range(2000)))
    client.rpush("queue:ocr", *(material.text(40) for _ in range(500)))
    client.sadd("online", *(f"user{number:06}" for number in range(700)))
    client.sadd("numbers", *range(200))
    client.zadd("ranking", {f"user{number:06}": material.random.random() * 1000 for number in range(600)})
    client.hset("flags", mapping={f"flag-{number}": material.text(20) for number in range(300)})
    for number in range(1, 301):
        client.xadd("events", {"kind": "upload", "text": material.text(30)}, id=f"1735689600000-{number}")
    client.xgroup_create("events", "workers", id="1735689600000-100")
