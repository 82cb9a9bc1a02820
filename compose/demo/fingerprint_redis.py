"""Every key of a Redis server: its type, when it expires, and a hash of its value as commands give it.

Not of DUMP's bytes: those change with how the server keeps the value in memory, which a restart may change.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import redis

from compose.demo.seed_redis import database

_BATCH = 1000


def fingerprint_redis(url: str) -> dict[str, list[Any]]:
    """Give each key as `[type, moment of expiry in ms since 1970 or None, hash of the value]`, by database and name.

    Raise redis.RedisError when the server does not answer. A key that expires meanwhile is left out.
    """
    found: dict[str, list[Any]] = {}
    with database(url, 0) as client:
        spaces = sorted(int(name.removeprefix("db")) for name in client.info("keyspace"))
        libraries = _libraries(client)
    if libraries:
        found["functions"] = ["function", None, _hash(libraries)]
    for number in spaces:
        with database(url, number) as client:
            keys = client.scan_iter(count=_BATCH)
            while batch := list(islice(keys, _BATCH)):
                found |= {f"db{number} {_text(key)}": value for key, value in _batch(client, batch)}
    return found


def _batch(client: redis.Redis, keys: list[bytes]) -> Iterator[tuple[bytes, list[Any]]]:
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.type(key)
        pipeline.pttl(key)
    now = time.time()
    answers = pipeline.execute()
    kinds, lasting = [kind.decode() for kind in answers[::2]], answers[1::2]
    for key, kind in zip(keys, kinds, strict=True):
        _READ.get(kind, _read_string)(pipeline, key)
    values = pipeline.execute(raise_on_error=False)
    for key, kind, left, value in zip(keys, kinds, lasting, values, strict=True):
        if kind == "none" or value is None:
            continue
        if isinstance(value, Exception):
            raise value
        content = _groups(client, key, value) if kind == "stream" else _settled(kind, value)
        yield key, [kind, None if left < 0 else round(now * 1000 + left), _hash(content)]


def _read_string(pipeline: Any, key: bytes) -> None:
    pipeline.get(key)


_READ: dict[str, Callable[[Any, bytes], object]] = {
    "hash": lambda pipeline, key: pipeline.hgetall(key),
    "list": lambda pipeline, key: pipeline.lrange(key, 0, -1),
    "set": lambda pipeline, key: pipeline.smembers(key),
    "zset": lambda pipeline, key: pipeline.zrange(key, 0, -1, withscores=True),
    "stream": lambda pipeline, key: pipeline.xrange(key),
}


def _settled(kind: str, value: Any) -> object:
    """Give the value in an order that does not depend on the server."""
    if kind == "hash":
        return sorted(value.items())
    return sorted(value) if kind == "set" else value


def _groups(client: redis.Redis, key: bytes, entries: Any) -> object:
    """Give a stream's entries with its last identifier and what its consumer groups have read."""
    stream: Any = client.xinfo_stream(key)
    groups: Any = client.xinfo_groups(key)
    read = sorted((group["name"], group["last-delivered-id"], group["pending"]) for group in groups)
    return [[(name, sorted(fields.items())) for name, fields in entries], stream["last-generated-id"], read]


def _libraries(client: redis.Redis) -> object:
    try:
        return client.function_list(withcode=True)
    except redis.ResponseError:  # a server before 7 has none
        return None


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, dict):
        return sorted((_text(name), _plain(item)) for name, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(_plain(value)).encode()).hexdigest()[:32]


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
