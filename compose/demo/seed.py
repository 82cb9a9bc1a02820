"""Fill a PostgreSQL, a Redis and two folders with the demo system's data.

    python -m compose.demo.seed --uploads DIR --keys DIR [--size MB] [--seed TEXT] [--owner UID]

The passwords and addresses come from the environment: DEMO_ADMIN_DSN, DEMO_REDIS_URL, DEMO_APP_PASSWORD, DEMO_READONLY_PASSWORD.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jwt
import psycopg
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from psycopg import sql

from compose.demo.config_tree import DATABASES, DEFAULT_SIZE, ROLES
from compose.demo.health import ALGORITHM
from compose.demo.material import BEGIN, Connection, Material, copy_rows
from compose.demo.seed_files import Document, seed_keys, seed_uploads
from compose.demo.seed_redis import seed_redis
from compose.demo.service_http import hash_password

_SCHEMA = Path(__file__).parent / "schema"
#: Users whose password is known (their name and "-password"); the hash takes time, so not everyone has one.
_KNOWN_PASSWORDS = 100


@dataclass(frozen=True)
class Target:
    """What is filled. `admin_dsn` is a superuser's, of any database; `redis_url` holds the password."""

    admin_dsn: str
    redis_url: str
    uploads: Path
    keys: Path
    app_password: str
    readonly_password: str
    #: The uid that files get when root seeds; None leaves them to whoever runs this.
    owner: int | None = None


def seed(target: Target, *, size: float = DEFAULT_SIZE, seed: str = "demo") -> dict[str, int]:
    """Fill `target` with about `size` megabytes in total and give how much of each thing there is.

    What was there is gone afterwards: the three databases and roles, every Redis key, all in the two folders.
    The same `seed` and `size` give the same rows, keys and files, but for the RSA keys and what is signed with them.
    """
    private_key = seed_keys(target.keys, owner=target.owner)
    material = Material(f"{seed}/files")
    documents = seed_uploads(target.uploads, megabytes=size * 0.4, material=material, owner=target.owner)
    _roles_and_databases(target)
    users = max(20, round(120 * size))
    _fill(
        target,
        "authdb",
        lambda connection: _authdb(connection, users, private_key, Material(f"{seed}/authdb")),
    )
    _fill(target, "apidb", lambda connection: _apidb(connection, users, Material(f"{seed}/apidb")))
    _fill(
        target,
        "admindb",
        lambda connection: _admindb(connection, documents, size, Material(f"{seed}/admindb")),
    )
    keys = seed_redis(target.redis_url, keys=round(200 * size), material=Material(f"{seed}/redis"))
    return {"users": users, "documents": len(documents), "redis_keys": keys}


def _roles_and_databases(target: Target) -> None:
    with psycopg.connect(target.admin_dsn, autocommit=True, connect_timeout=10) as connection:
        drop_all(connection)
        for role, password in (("app", target.app_password), ("readonly", target.readonly_password)):
            # The server gets the verifier: the password itself never stands in a statement it might log.
            verifier = connection.pgconn.encrypt_password(
                password.encode(), role.encode(), b"scram-sha-256"
            ).decode()
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), verifier)
            )
        connection.execute("CREATE ROLE reporting NOLOGIN")
        connection.execute("GRANT reporting TO readonly")
        connection.execute("ALTER ROLE readonly SET default_transaction_read_only = on")
        connection.execute("ALTER ROLE app CONNECTION LIMIT 50")
        for name in DATABASES:
            database = sql.Identifier(name)
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER app").format(database))
            connection.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(database))
            connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO readonly").format(database))
        connection.execute("ALTER DATABASE apidb SET timezone = 'Asia/Tokyo'")
        connection.execute("ALTER ROLE readonly IN DATABASE admindb SET work_mem = '8MB'")
        connection.execute("COMMENT ON DATABASE admindb IS '文書'")


def drop_all(connection: Connection) -> None:
    """Drop the demo's databases, whoever uses them, and its roles."""
    for name in DATABASES:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    for role in ROLES:
        connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


def _fill(target: Target, database: str, work: Callable[[Connection], None]) -> None:
    """Make the schema and the rows of `database` as the role that owns it, then let readonly read it."""
    dsn = psycopg.conninfo.make_conninfo(target.admin_dsn, dbname=database)
    with psycopg.connect(dsn, connect_timeout=10) as connection:
        connection.execute("SET ROLE app")
        connection.execute("GRANT USAGE ON SCHEMA public TO readonly")
        connection.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO readonly")
        connection.execute((_SCHEMA / f"{database}.sql").read_bytes())
        work(connection)
        connection.execute("RESET ROLE")
    with psycopg.connect(dsn, connect_timeout=10, autocommit=True) as connection:
        connection.execute("ANALYZE")


def _authdb(connection: Connection, users: int, private_key: RSAPrivateKey, material: Material) -> None:
    def user(number: int) -> tuple[object, ...]:
        name, salt = f"user{number:06}", material.data(16)
        known = number <= _KNOWN_PASSWORDS
        password = (
            hash_password(f"{name}-password", salt) if known else f"{salt.hex()}${material.data(32).hex()}"
        )
        return number, name, f"{name}@例え.example", password, material.text(12), known, material.moment()

    columns = ("id", "username", "email", "password_hash", "display_name", "active", "created_at")
    copy_rows(connection, "users", columns, (user(number) for number in range(1, users + 1)))
    connection.execute("SELECT setval('users_id_seq', %s)", [users])
    tokens = ((n % users + 1, material.data(32), material.moment()) for n in range(users * 3))
    copy_rows(connection, "refresh_tokens", ("user_id", "digest", "expires_at"), tokens)
    issued = int(BEGIN.timestamp())
    signed = (
        (
            n,
            jwt.encode({"sub": f"user{n:06}", "iat": issued, "n": n}, private_key, algorithm=ALGORITHM),
            BEGIN,
        )
        for n in range(1, min(users, 20) + 1)
    )
    copy_rows(connection, "issued_tokens", ("user_id", "token", "issued_at"), signed)


def _apidb(connection: Connection, users: int, material: Material) -> None:
    def profile(number: int) -> tuple[object, ...]:
        biography = (
            None if number % 7 == 0 else material.text(material.random.randrange(300)) + "\n\t改行と\\タブ\r"
        )
        preferences = {
            "theme": material.random.choice(["dark", "light"]),
            "語": material.text(8),
            "n": [number, None, 0.1],
        }
        avatar = None if number % 3 == 0 else material.data(1000)
        shown = material.random.choice(["private", "friends", "public"])
        return f"user{number:06}", material.text(10), biography, preferences, avatar, shown, material.moment()

    columns = ("username", "name", "biography", "preferences", "avatar", "shown_to", "changed_at")
    copy_rows(connection, "profiles", columns, (profile(number) for number in range(1, users + 1)))
    addresses = ((n, '{"東京都, 1-2-3","back\\\\slash"}', f"{n:08}"[-8:]) for n in range(1, users // 3 + 1))
    copy_rows(connection, "addresses", ("profile_id", "lines", "postcode"), addresses)
    notes = ((n, material.text(50)) for n in range(1, 51))
    copy_rows(connection, 'メモ "notes"', ("番号", "本文"), notes)
    connection.execute("SELECT nextval('member_number') FROM generate_series(1, 1234)")


def _admindb(connection: Connection, documents: list[Document], size: float, material: Material) -> None:
    rows = (
        (
            number,
            material.text(20),
            item.path,
            item.size,
            item.sha256,
            ["文書", number % 5],
            material.moment(),
        )
        for number, item in enumerate(documents, start=1)
    )
    columns = ("id", "title", "path", "size", "sha256", "labels", "created_at")
    copy_rows(connection, "documents", columns, rows)
    connection.execute("SELECT setval('documents_id_seq', %s)", [len(documents)])
    # A page is about 3 kB of text (words of one to three bytes a character) and 2.5 kB of picture.
    pages = max(len(documents), round(size * 80))
    texts = (
        (
            n % len(documents) + 1,
            n // len(documents) + 1,
            material.text(1700),
            material.random.random(),
            material.data(2500),
        )
        for n in range(pages)
    )
    copy_rows(connection, "ocr_pages", ("document_id", "page", "body", "confidence", "thumbnail"), texts)
    actions = (
        (
            BEGIN + timedelta(minutes=n // 3),
            f"user{n // 3 % 50:06}",
            "表示",
            None if n % 2 else {"page": n // 6},
        )
        for n in range(round(size * 200))
    )
    copy_rows(connection, "audit_log", ("happened_at", "actor", "action", "detail"), actions)
    connection.execute("REFRESH MATERIALIZED VIEW actions_per_actor")
    connection.execute("GRANT USAGE ON SCHEMA reports TO reporting")
    connection.execute("GRANT SELECT, INSERT (month) ON reports.monthly TO reporting")
    months = ((f"2025-{month:02}-01", {"documents": month * 7}) for month in range(1, 13))
    copy_rows(connection, "reports.monthly", ("month", "figures"), months)
    connection.execute("SELECT lo_from_bytea(471100, %s)", [material.data(10_000)])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: seed, then print what there is as JSON."""
    parser = argparse.ArgumentParser(prog="compose.demo.seed", description="Fill the demo system with data.")
    parser.add_argument("--uploads", type=Path, required=True)
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument(
        "--size", type=float, default=DEFAULT_SIZE, help="megabytes in total (default %(default)s)"
    )
    parser.add_argument("--seed", default="demo")
    parser.add_argument("--owner", type=int, help="uid of the files, when root seeds")
    given = parser.parse_args(arguments)
    target = Target(
        admin_dsn=os.environ["DEMO_ADMIN_DSN"],
        redis_url=os.environ["DEMO_REDIS_URL"],
        uploads=given.uploads,
        keys=given.keys,
        app_password=os.environ["DEMO_APP_PASSWORD"],
        readonly_password=os.environ["DEMO_READONLY_PASSWORD"],
        owner=given.owner,
    )
    began = time.monotonic()
    counts = seed(target, size=given.size, seed=given.seed)
    print(json.dumps(counts | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
