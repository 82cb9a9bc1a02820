"""When a service of the demo system is healthy: only when the data it serves is really there."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import jwt
import psycopg
import redis

#: Documents whose file is read in one health check, and how much of them altogether.
SAMPLE_DOCUMENTS = 25
SAMPLE_BYTES = 64 * 1024 * 1024
TIMEOUT = 3
ALGORITHM = "RS256"

Settings = Mapping[str, str]


class UnhealthyError(Exception):
    """The data is not there, or not what was stored; the text says which."""


def check(settings: Settings) -> dict[str, int]:
    """Give what the service found of its data, in numbers.

    `settings` is the service's environment, with `ROLE`. Raise UnhealthyError when anything it needs is missing,
    unreachable or not what it was.
    """
    try:
        return _CHECKS[settings["ROLE"]](settings)
    except (psycopg.Error, redis.RedisError) as error:
        # The first line holds no password: both libraries name the server and the fault.
        raise UnhealthyError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    except (OSError, jwt.PyJWTError, ValueError) as error:
        raise UnhealthyError(f"{type(error).__name__}: {error}") from error


def connect(settings: Settings) -> psycopg.Connection[tuple[object, ...]]:
    """Open the service's database; every request has its own connection, closed after it."""
    return psycopg.connect(settings["DATABASE_URL"], connect_timeout=TIMEOUT, autocommit=True)


def sessions(settings: Settings) -> redis.Redis:
    """Open the service's Redis, which keeps the sessions."""
    return redis.Redis.from_url(settings["REDIS_URL"], socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)


def _count(connection: psycopg.Connection[tuple[object, ...]], table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    count = row[0] if row else 0
    if not isinstance(count, int) or count == 0:
        raise UnhealthyError(f"the table {table} holds no row")
    return count


def _auth(settings: Settings) -> dict[str, int]:
    keys = Path(settings["KEYS_DIR"])
    private, public = (keys / "private.pem").read_bytes(), (keys / "public.pem").read_bytes()
    with connect(settings) as connection:
        users = _count(connection, "users")
        rows = connection.execute("SELECT token FROM issued_tokens ORDER BY id LIMIT 20").fetchall()
    if not rows:
        raise UnhealthyError("no issued token is stored")
    for row in rows:
        jwt.decode(str(row[0]), public, algorithms=[ALGORITHM])
    # The private key must be the other half of the public one, else new tokens would be refused.
    jwt.decode(jwt.encode({"probe": 1}, private, algorithm=ALGORITHM), public, algorithms=[ALGORITHM])
    return {"users": users, "tokens_verified": len(rows)}


def _user(settings: Settings) -> dict[str, int]:
    with connect(settings) as connection:
        profiles = _count(connection, "profiles")
    with sessions(settings) as client:
        found = next(client.scan_iter("session:*", count=1000), None)
        if found is None:
            raise UnhealthyError("Redis holds no session")
        keys = int(client.dbsize())
    return {"profiles": profiles, "redis_keys": keys}


def _admin(settings: Settings) -> dict[str, int]:
    uploads = Path(settings["UPLOADS_DIR"])
    with connect(settings) as connection:
        documents = _count(connection, "documents")
        pages = _count(connection, "ocr_pages")
        sample = connection.execute(
            "SELECT path, size, sha256 FROM documents ORDER BY (id <= 10) DESC, md5(id::text) LIMIT %s",
            [SAMPLE_DOCUMENTS],
        ).fetchall()
    budget = SAMPLE_BYTES
    for path, size, sha256 in sample:
        file = uploads / str(path)
        if file.stat().st_size != size:
            raise UnhealthyError(f"{path} has {file.stat().st_size} bytes, not {size}")
        if file.stat().st_size > budget:
            continue
        budget -= file.stat().st_size
        with file.open("rb") as source:
            if hashlib.file_digest(source, "sha256").hexdigest() != sha256:
                raise UnhealthyError(f"{path} is not what was uploaded: its sha256 differs")
    return {"documents": documents, "pages": pages, "files_read": len(sample)}


def _front(settings: Settings) -> dict[str, int]:
    urls = settings["API_URLS"].split()
    for url in urls:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2 * TIMEOUT) as answer:  # noqa: S310 - own settings
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise UnhealthyError(f"{url} answers {error.code}") from error
    return {"apis": len(urls)}


_CHECKS: dict[str, Callable[[Settings], dict[str, int]]] = {
    "auth": _auth,
    "user": _user,
    "admin": _admin,
    "front-user": _front,
    "front-admin": _front,
}
