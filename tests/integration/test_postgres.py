"""PostgreSQL backed up and restored for real: what comes back, what stays when something fails, what is left behind."""

import contextlib
import dataclasses
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from psycopg import sql

from compose.demo.embedded import PostgresServer, free_port
from tasks.components import postgres_dump, postgres_swap
from tasks.components.postgres import Component
from tasks.components.postgres_compare import Contents, contents
from tasks.components.postgres_swap import beside
from tasks.components.psql import Server, Session, statements
from workers import streams
from workers.component import Part, Restore
from workers.errors import (
    BackupError,
    CommandFailed,
    ComparisonError,
    IntegrityError,
    Permanent,
    RuntimeUnavailable,
)
from workers.secret import Secret
from workers.storage.local import LocalStore

PASSWORD = "pass 'word' é%"
AWKWARD = "Ünï \"q\" 'a=b' $x; データ"
BUILT_IN = {"postgres", "template0", "template1"}
FSYNC_OFF = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
LEFT_ALONE = {"postgres"}

ROLES = """
CREATE ROLE app LOGIN PASSWORD 'app-secret' CONNECTION LIMIT 9 VALID UNTIL '2099-01-01 00:00:00+00';
CREATE ROLE readonly; CREATE ROLE "Odd ""Role""; é" NOLOGIN; GRANT readonly TO app WITH ADMIN OPTION;
GRANT readonly TO "Odd ""Role""; é"; ALTER ROLE app SET work_mem = '7MB'; COMMENT ON ROLE app IS 'the app; it''s ours';
"""

RICH = r"""
ALTER DATABASE {db} OWNER TO app;
COMMENT ON DATABASE {db} IS 'it''s DATABASE "x";
\connect nowhere';
ALTER DATABASE {db} SET default_transaction_read_only = on;
ALTER DATABASE {db} SET search_path = 'Odd Schema é', public;
ALTER ROLE app IN DATABASE {db} SET work_mem = '9MB';
ALTER DATABASE {db} CONNECTION LIMIT 50;
REVOKE CONNECT ON DATABASE {db} FROM PUBLIC; GRANT CONNECT ON DATABASE {db} TO readonly;
"""

TABLES = r"""
SET search_path = public;
CREATE SCHEMA "Odd Schema é" AUTHORIZATION app; GRANT USAGE ON SCHEMA "Odd Schema é" TO readonly;
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text COLLATE "C" NOT NULL UNIQUE,
    mood mood DEFAULT 'ok', twice integer GENERATED ALWAYS AS (length(name) * 2) STORED, blob bytea);
INSERT INTO users (name, blob) SELECT 'n' || i, decode(md5(i::text), 'hex') FROM generate_series(1, 500) i;
COMMENT ON COLUMN users.name IS 'Name; of ''them''';
CREATE SEQUENCE loose START 1000 INCREMENT 5; SELECT nextval('loose');
CREATE TABLE "Odd Schema é"."T ""1""; --" ("a b" positive DEFAULT nextval('public.loose'), t text);
INSERT INTO "Odd Schema é"."T ""1""; --" (t) VALUES (E'tab\tnew\nline\\.'), (''), (NULL), ('データ');
CREATE TABLE empty (id integer PRIMARY KEY, owner bigint REFERENCES users ON DELETE CASCADE);
CREATE TABLE no_key (v double precision); INSERT INTO no_key VALUES (1), (1), ('NaN'), ('-Infinity'), (0.1);
CREATE TABLE parent (k integer, v text) PARTITION BY RANGE (k);
CREATE TABLE parent_1 PARTITION OF parent FOR VALUES FROM (0) TO (10);
CREATE TABLE parent_2 PARTITION OF parent DEFAULT;
INSERT INTO parent SELECT i, 'p' FROM generate_series(1, 25) i;
CREATE TABLE base (a integer); CREATE TABLE derived (b integer) INHERITS (base);
INSERT INTO base VALUES (1); INSERT INTO derived VALUES (2, 3), (4, 5);
ALTER TABLE users OWNER TO app; GRANT SELECT ON users TO readonly; GRANT UPDATE (mood) ON users TO "Odd ""Role""; é";
ALTER TABLE "Odd Schema é"."T ""1""; --" OWNER TO "Odd ""Role""; é";
ALTER TABLE users ENABLE ROW LEVEL SECURITY; ALTER TABLE users FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON users FOR SELECT TO readonly USING (name = current_user);
CREATE VIEW happy AS SELECT * FROM users WHERE mood = 'happy';
CREATE MATERIALIZED VIEW counted AS SELECT mood, count(*) FROM users GROUP BY mood; CREATE INDEX ON counted (mood);
CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN NEW.v := NEW.v || ';'; RETURN NEW; END $f$;
CREATE TRIGGER bump BEFORE UPDATE ON parent_1 FOR EACH ROW EXECUTE FUNCTION bump();
CREATE EXTENSION vector; CREATE TABLE points (p vector(2)); INSERT INTO points VALUES ('[1,2]');
SELECT lo_from_bytea(0, decode(repeat('00ff', 3000), 'hex')), lo_from_bytea(0, '');
ALTER DEFAULT PRIVILEGES FOR ROLE app GRANT SELECT ON TABLES TO readonly;
"""


class Cluster:
    """A server of the test's own, the component for it, and a store for its parts."""

    def __init__(self, server: PostgresServer, folder: Path) -> None:
        self.server = server
        secret = folder / "password"
        secret.write_text(PASSWORD + "\n")
        self.folder = folder
        self.secret = Secret(file=secret)
        self.component = self.make()

    def make(self, **settings: Any) -> Component:
        values: dict[str, Any] = {
            "name": "pg",
            "kind": "postgres",
            "host": "db1",
            "address": "127.0.0.1",
            "port": self.server.port,
            "password": self.secret,
            "bin_dir": str(self.server.bin_dir),
        }
        return Component.model_validate(values | settings)

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection:
        values: dict[str, Any] = {"user": "postgres", "password": PASSWORD, "autocommit": True}
        return psycopg.connect(host="127.0.0.1", port=self.server.port, dbname=database, **(values | options))

    def execute(self, database: str, script: str) -> None:
        with self.connect(database, options="-c default_transaction_read_only=off") as connection:
            connection.execute(script.encode())

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        with self.connect(database) as connection:
            return connection.execute(query.encode()).fetchall()

    def create(self, database: str, script: str = "", *, encoding: str = "UTF8") -> str:
        with self.connect() as connection:
            create = "CREATE DATABASE {} TEMPLATE template0 LOCALE 'C' ENCODING {}"
            connection.execute(sql.SQL(create).format(sql.Identifier(database), encoding))
        if script:
            self.execute(database, script)
        return database

    def databases(self) -> set[str]:
        return {row[0] for row in self.rows("postgres", "SELECT datname FROM pg_database")} - BUILT_IN

    def roles(self) -> set[str]:
        query = "SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_'"
        return {row[0] for row in self.rows("postgres", query)} - LEFT_ALONE

    def clean(self) -> None:
        with self.connect() as connection:
            for database in self.databases():
                name = sql.Identifier(database)
                connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
            for role in self.roles():
                connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))

    def program(self, name: str, *arguments: str) -> str:
        env = {**os.environ, "PGPASSWORD": PASSWORD, "PGUSER": "postgres", "PGHOST": "127.0.0.1"}
        text = subprocess.check_output(
            [self.server.bin_dir / name, *arguments], env={**env, "PGPORT": str(self.server.port)}
        ).decode()
        return re.sub(r"^\\(un)?restrict .*$", "", text, flags=re.MULTILINE)

    def fingerprint(self, *databases: str) -> dict[str, str]:
        """Everything that PostgreSQL's own tools say about the roles and the databases, rows included."""
        found = {"": self.program("pg_dumpall", "--globals-only")}
        for name in databases:
            escaped = name.replace("\\", "\\\\").replace("'", "\\'")
            found[name] = self.program("pg_dump", "--create", f"--dbname=dbname='{escaped}'")
        return found

    # -- backup and restore ---------------------------------------------------------------------------------

    def backup(self, component: Component | None = None) -> list[Part]:
        store = LocalStore(self.folder / "store" / str(time.monotonic_ns()))
        parts = []
        for source in (component or self.component).sources():
            started = datetime.now(UTC)
            written = streams.write(store, f"{source.name}.zst", source.chunks, level=1)
            parts.append(
                Part(
                    name=f"{source.name}.zst",
                    component="pg",
                    host="db1",
                    kind=source.kind,
                    codec="zstd",
                    **dataclasses.asdict(written),
                    started=started,
                    finished=datetime.now(UTC),
                    holds=source.holds,
                )
            )
        self.store = store
        return parts

    def restore(self, parts: Sequence[Part], run_id: str = "20261122_020000") -> Restore:
        store = self.store

        def read(part: Part) -> Iterator[bytes]:
            stored = store.get(part.name)
            return streams.read(stored, codec=part.codec, written=part.written, name=part.name)

        return Restore(run_id, parts, read)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], PostgresServer]]:
    with contextlib.ExitStack() as stack:
        started: dict[int, PostgresServer] = {}

        def serve(major: int) -> PostgresServer:
            if major not in started:
                folder = tmp_path_factory.mktemp(f"postgres{major}")
                server = PostgresServer(
                    folder / "data", free_port(), PASSWORD, major=major, settings=FSYNC_OFF
                )
                started[major] = stack.enter_context(server)
            return started[major]

        yield serve


@pytest.fixture(params=[18])
def cluster(
    servers: Callable[[int], PostgresServer], request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Cluster]:
    cluster = Cluster(servers(request.param), tmp_path)
    cluster.clean()
    yield cluster
    cluster.clean()


both_majors = pytest.mark.parametrize("cluster", [16, 18], indirect=True)


def make_rich(cluster: Cluster) -> list[str]:
    cluster.execute("postgres", ROLES)
    cluster.create(AWKWARD, TABLES)
    with cluster.connect() as connection:
        connection.execute(RICH.replace("{db}", sql.Identifier(AWKWARD).as_string(connection)).encode())
    cluster.create(
        "dbname=other", "CREATE TABLE é AS SELECT generate_series(1, 5000) AS a, 'é' AS b", encoding="LATIN1"
    )
    cluster.execute("dbname=other", "COMMENT ON DATABASE \"dbname=other\" IS 'é in Latin 1'")
    cluster.create("Empty")
    return [AWKWARD, "dbname=other", "Empty"]


def make_small(cluster: Cluster) -> None:
    cluster.execute("postgres", "CREATE ROLE app LOGIN PASSWORD 'then'")
    for name in ("one", "two"):
        cluster.create(name, "CREATE TABLE t AS SELECT 1 AS a; ALTER TABLE t OWNER TO app")


def spoil_small(cluster: Cluster) -> None:
    """Make "one" differ from its backup, take "two" away, and change the roles."""
    cluster.execute("one", "INSERT INTO t VALUES (2)")
    cluster.execute("postgres", "DROP DATABASE two")
    cluster.execute(
        "postgres", "ALTER ROLE app PASSWORD 'now' CREATEDB; CREATE ROLE later; GRANT later TO app"
    )


@both_majors
def test_what_was_backed_up_is_what_is_restored(cluster: Cluster) -> None:
    names = make_rich(cluster)
    then = cluster.fingerprint(*names)
    parts = cluster.backup()
    awkward = next(part for part in parts if part.holds.get("database") == AWKWARD)
    tables = awkward.holds["tables"]
    assert tables["public.users"] == 500
    assert tables["public.base"] == 1
    assert tables["public.parent_1"] == 9
    assert tables['"Odd Schema é"."T ""1""; --"'] == 4
    assert "public.parent" not in tables
    assert awkward.holds["rows"] == sum(tables.values()) == 500 + 4 + 0 + 5 + 25 + 3 + 1
    assert awkward.holds["large_objects"] == 2
    assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", awkward.holds["lsn"])
    assert {part.name for part in parts if "Empty" in part.name} == {"pg.Empty.dump.zst"}

    cluster.execute(AWKWARD, "DELETE FROM users WHERE id > 7; DROP TABLE no_key; CREATE TABLE newer ()")
    cluster.execute("postgres", 'DROP DATABASE "Empty"')
    cluster.execute("postgres", "ALTER ROLE app PASSWORD 'x' SUPERUSER; REVOKE readonly FROM app")
    cluster.execute(
        "postgres", "ALTER ROLE readonly PASSWORD 'x' CONNECTION LIMIT 3; GRANT pg_monitor TO readonly"
    )
    cluster.execute("postgres", "ALTER ROLE readonly SET work_mem = '1MB'; COMMENT ON ROLE readonly IS 'x'")
    live = cluster.fingerprint(*names[:2])
    restore = cluster.restore(parts)
    cluster.component.stage(restore)
    assert cluster.fingerprint(*names[:2]) == live
    cluster.component.swap(restore)
    assert cluster.fingerprint(*names) == then
    assert cluster.databases() > set(names)
    cluster.component.settle(restore)
    assert cluster.fingerprint(*names) == then
    assert cluster.databases() == set(names)
    statistics = "SELECT reltuples FROM pg_class WHERE relname = 'users'"
    assert cluster.rows(AWKWARD, statistics) == [(500,)]


@both_majors
def test_onto_an_empty_server_and_back(cluster: Cluster) -> None:
    names = make_rich(cluster)
    then = cluster.fingerprint(*names)
    parts = cluster.backup()
    cluster.clean()
    nothing = cluster.fingerprint()
    restore = cluster.restore(parts)
    cluster.component.stage(restore)
    cluster.component.swap(restore)
    assert cluster.fingerprint(*names) == then
    cluster.component.revert(restore)
    assert cluster.databases() == set()
    assert cluster.fingerprint() == nothing


def test_an_older_server_s_backup_restores_on_a_newer_one(
    servers: Callable[[int], PostgresServer], tmp_path: Path
) -> None:
    old, new = Cluster(servers(16), tmp_path), Cluster(servers(18), tmp_path)
    names = make_rich(old)
    parts = old.backup()
    old.clean()
    new.store = old.store
    restore = new.restore(parts)
    new.component.stage(restore)
    new.component.swap(restore)
    new.component.settle(restore)
    assert new.databases() == set(names)
    owner = "SELECT pg_get_userbyid(relowner), relrowsecurity FROM pg_class WHERE relname = 'users'"
    assert new.rows(AWKWARD, owner) == [("app", True)]
    with new.connect(AWKWARD, user="app", password="app-secret") as connection:
        assert connection.execute("SHOW work_mem").fetchall() == [("9MB",)]
    new.clean()


def test_revert_after_a_swap_brings_back_what_stood(cluster: Cluster) -> None:
    make_small(cluster)
    parts = cluster.backup()
    spoil_small(cluster)
    before = cluster.fingerprint("one")
    restore = cluster.restore(parts)
    cluster.component.stage(restore)
    cluster.component.swap(restore)
    with cluster.connect("two", user="app", password="then") as connection:
        assert connection.execute("SELECT rolcreatedb FROM pg_roles WHERE rolname = 'app'").fetchall() == [
            (False,)
        ]
    cluster.component.revert(restore)
    assert cluster.fingerprint("one") == before
    assert cluster.databases() == {"one"}
    cluster.connect("one", user="app", password="now").close()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        cluster.connect("one", user="app", password="then")


def test_a_role_that_something_else_uses_by_now_stays(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    make_small(cluster)
    parts = cluster.backup()
    cluster.clean()
    restore = cluster.restore(parts)
    cluster.component.stage(restore)
    cluster.create("unrelated", "CREATE TABLE t (); ALTER TABLE t OWNER TO app")
    cluster.component.revert(restore)
    assert cluster.roles() == {"app"}
    assert "the role app, created by this restore, stays" in caplog.text


def test_the_role_that_connects_keeps_its_password(cluster: Cluster) -> None:
    make_small(cluster)
    cluster.execute("postgres", "ALTER ROLE postgres PASSWORD 'another'")
    try:
        other = cluster.folder / "another"
        other.write_text("another")
        parts = cluster.backup(cluster.make(password=Secret(file=other)))
    finally:
        with cluster.connect(password="another") as connection:
            connection.execute(sql.SQL("ALTER ROLE postgres PASSWORD {}").format(PASSWORD))
    restore = cluster.restore(parts)
    cluster.component.stage(restore)
    cluster.component.swap(restore)
    cluster.component.settle(restore)
    cluster.connect().close()


def count_later(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the rows be counted only after the event that is returned."""
    awaited = threading.Event()

    def count_late(session: Session, tables: Sequence[str], *, checksums: bool) -> Contents:
        assert awaited.wait(60)
        return contents(session, tables, checksums=checksums)

    monkeypatch.setattr(postgres_dump, "contents", count_late)
    return awaited


def test_rows_are_counted_in_the_dump_s_snapshot(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = count_later(monkeypatch)
    cluster.create(
        "busy", "CREATE TABLE t AS SELECT i, repeat('x', 500) AS x FROM generate_series(1, 20000) i"
    )
    component = cluster.make(databases=("busy",))
    dump = component.sources()[1]
    assert dump.label == "busy"
    assert dump.expected is not None
    assert 10_000_000 < dump.expected < 20_000_000
    first = next(dump.chunks)
    cluster.execute(
        "busy", "INSERT INTO t SELECT i, 'new' FROM generate_series(1, 5000) i; DELETE FROM t WHERE i < 9"
    )
    changed.set()
    whole = first + b"".join(dump.chunks)
    assert dump.holds["tables"] == {"public.t": 20_000}
    store = cluster.store = LocalStore(cluster.folder / "busy")
    written = streams.write(store, "busy", iter([whole]), level=1)
    now = datetime.now(UTC)
    part = Part(
        name="busy", component="pg", host="db1", kind=dump.kind, codec="zstd", started=now, finished=now,
        holds=dump.holds, **dataclasses.asdict(written),
    )  # fmt: skip
    component.stage(cluster.restore([part]))
    component.revert(cluster.restore([part]))


def before_pg_dump(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let ``act`` happen after the snapshot was taken and before pg_dump starts."""
    argv = Server.argv

    def delayed(server: Server, tool: str, *arguments: str) -> list[str]:
        if tool == "pg_dump":
            act()
        return argv(server, tool, *arguments)

    monkeypatch.setattr(Server, "argv", delayed)


def test_a_table_may_not_be_truncated_before_it_is_dumped(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.create("busy", "CREATE TABLE t AS SELECT 1 AS a")

    def truncate() -> None:
        with pytest.raises(psycopg.errors.LockNotAvailable):
            cluster.execute("busy", "SET lock_timeout = 100; TRUNCATE t")
        tried.set()

    tried = count_later(monkeypatch)
    before_pg_dump(monkeypatch, truncate)
    cluster.backup()
    assert tried.is_set()


def test_pg_dump_does_not_wait_for_ever_behind_who_waits_for_us(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.create("busy", "CREATE TABLE t AS SELECT 1 AS a")
    waiting = threading.Thread(target=cluster.execute, args=("busy", "ALTER TABLE t ADD b integer"))

    def alter() -> None:
        waiting.start()
        while not cluster.rows("busy", "SELECT 1 FROM pg_locks WHERE NOT granted"):
            time.sleep(0.02)

    before_pg_dump(monkeypatch, alter)
    dump = cluster.make(lock_timeout=0.5).sources()[1]
    with pytest.raises(CommandFailed, match=r"pg_dump .* canceling statement due to"):
        list(dump.chunks)
    waiting.join()


def test_writers_all_the_time(cluster: Cluster) -> None:
    cluster.create("busy", "CREATE TABLE a (i integer); CREATE TABLE b (i integer)")
    ended = threading.Event()

    def write() -> None:
        with cluster.connect("busy") as connection:
            while not ended.is_set():
                connection.execute(
                    "WITH n AS (INSERT INTO a SELECT generate_series(1, 9)) INSERT INTO b VALUES (1)"
                )

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2):
            parts = cluster.backup()
            tables = parts[1].holds["tables"]
            assert tables["public.a"] == 9 * tables["public.b"]
            cluster.component.stage(cluster.restore(parts))
            cluster.component.revert(cluster.restore(parts))
    finally:
        ended.set()
        writer.join()


def flip(cluster: Cluster, part: Part) -> Part:
    path = cluster.store.root / part.name
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    return part


def cut(cluster: Cluster, part: Part) -> Part:
    path = cluster.store.root / part.name
    path.write_bytes(path.read_bytes()[:-9])
    return part


def misrecord(_: Cluster, part: Part) -> Part:
    return part.model_copy(update={"plain_sha256": "0" * 64})


@pytest.mark.parametrize("damage", [flip, cut, misrecord])
@pytest.mark.parametrize("which", ["one", None])
def test_a_damaged_part_touches_nothing(
    cluster: Cluster, damage: Callable[[Cluster, Part], Part], which: str | None
) -> None:
    make_small(cluster)
    parts = cluster.backup()
    spoil_small(cluster)
    before = cluster.fingerprint("one")
    parts = [damage(cluster, part) if part.holds.get("database") == which else part for part in parts]
    restore = cluster.restore(parts)
    with pytest.raises(IntegrityError, match="damaged"):
        cluster.component.stage(restore)
    with pytest.raises(Permanent):
        cluster.component.swap(restore)
    assert cluster.fingerprint("one") == before
    cluster.component.revert(restore)
    assert cluster.fingerprint("one") == before
    assert cluster.databases() == {"one"}


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"public.t": 3}, "database one: public.t: expected 3 rows, found 1 rows"),
        ({"public.t": 1, "public.u": 0}, "public.u: expected 0 rows, found no such table"),
        ({}, "public.t: expected no such table, found 1 rows"),
    ],
)
def test_other_rows_than_recorded_are_refused(
    cluster: Cluster, recorded: dict[str, int], message: str
) -> None:
    make_small(cluster)
    parts = [
        part.model_copy(update={"holds": part.holds | {"tables": recorded}})
        for part in cluster.backup(cluster.make(databases=("one",)))
    ]
    with pytest.raises(ComparisonError) as caught:
        cluster.component.stage(cluster.restore(parts))
    assert message in str(caught.value)
    with pytest.raises(Permanent, match="not staged yet: one"):
        cluster.component.swap(cluster.restore(parts))
    cluster.component.revert(cluster.restore(parts))
    assert cluster.databases() == {"one", "two"}


def test_a_dump_without_counts_says_that_nothing_was_compared(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    make_small(cluster)
    parts = [
        part.model_copy(update={"holds": {"database": "one"}})
        for part in cluster.backup()
        if ".one." in part.name
    ]
    with caplog.at_level(logging.WARNING):
        cluster.component.stage(cluster.restore(parts))
    assert "one: the dump has no record of its rows" in caplog.text


class Interrupted(BaseException):
    """Stands for the end of the worker: nothing of the code under test catches it."""


def interrupted(*_arguments: object) -> None:
    raise Interrupted


def interrupt_each_statement(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], then: Callable[[], None]
) -> int:
    """Let ``act`` be interrupted at its first statement, then at its second, ... with ``then`` after each.

    Returns how many statements ``act`` has, when it is no longer interrupted.
    """
    execute = Session.execute
    left = 0

    def counted(session: Session, statement: str) -> str:
        nonlocal left
        if statement.startswith("SELECT"):  # changes nothing
            return execute(session, statement)
        if left == 0:
            raise Interrupted
        left -= 1
        return execute(session, statement)

    for statement in range(200):
        with monkeypatch.context() as patch:
            patch.setattr(Session, "execute", counted)
            left = statement
            try:
                act()
            except Interrupted:
                pass
            else:
                return statement
        then()
    raise AssertionError("it never ended")


@pytest.fixture
def interrupted_restore(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> tuple[Cluster, Restore]:
    """A spoiled system with its backup; the search for programs, which changes nothing, is done once only."""
    make_small(cluster)
    restore = cluster.restore(cluster.backup())
    spoil_small(cluster)
    found = cluster.component.server("postgres")
    monkeypatch.setattr(Server, "find", lambda *_arguments, **_options: found)
    return cluster, restore


@pytest.mark.slow
def test_stage_interrupted_anywhere_can_be_reverted(
    interrupted_restore: tuple[Cluster, Restore], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, restore = interrupted_restore
    component, before = cluster.component, cluster.fingerprint("one")

    def revert() -> None:
        component.revert(restore)
        assert cluster.databases() == {"one"}

    assert interrupt_each_statement(monkeypatch, lambda: component.stage(restore), revert) > 15
    revert()
    assert cluster.fingerprint("one") == before


@pytest.mark.slow
def test_swap_interrupted_anywhere_can_be_repeated_or_reverted(
    interrupted_restore: tuple[Cluster, Restore], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, restore = interrupted_restore
    component, before = cluster.component, cluster.fingerprint("one")
    component.stage(restore)
    component.swap(restore)
    after = cluster.fingerprint("one", "two")
    component.revert(restore)
    component.stage(restore)
    repeat = iter([True, False] * 200)

    def converge() -> None:
        if next(repeat):
            component.swap(restore)
            assert cluster.rows("one", "SELECT count(*) FROM t") == [(1,)]
        component.revert(restore)
        assert cluster.databases() == {"one"}
        assert cluster.rows("one", "SELECT count(*) FROM t") == [(2,)]
        assert cluster.rows("one", "SELECT rolcreatedb FROM pg_roles WHERE rolname = 'app'") == [(True,)]
        component.stage(restore)

    assert interrupt_each_statement(monkeypatch, lambda: component.swap(restore), converge) > 15
    assert cluster.fingerprint("one", "two") == after
    component.revert(restore)
    assert cluster.fingerprint("one") == before


@pytest.mark.slow
def test_revert_interrupted_anywhere_can_be_repeated(
    interrupted_restore: tuple[Cluster, Restore], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, restore = interrupted_restore
    component, before = cluster.component, cluster.fingerprint("one")

    def swapped() -> None:
        component.revert(restore)
        assert cluster.rows("one", "SELECT count(*) FROM t") == [(2,)]
        component.stage(restore)
        component.swap(restore)

    swapped()
    assert interrupt_each_statement(monkeypatch, lambda: component.revert(restore), swapped) > 15
    assert cluster.databases() == {"one"}
    assert cluster.fingerprint("one") == before


@pytest.mark.slow
def test_settle_interrupted_anywhere_can_be_repeated(
    interrupted_restore: tuple[Cluster, Restore], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, restore = interrupted_restore
    component = cluster.component
    component.stage(restore)
    component.swap(restore)
    after = cluster.fingerprint("one", "two")

    def again() -> None:
        component.settle(restore)
        assert cluster.fingerprint("one", "two") == after
        component.stage(restore)
        component.swap(restore)

    assert interrupt_each_statement(monkeypatch, lambda: component.settle(restore), again) >= 4
    assert cluster.databases() == {"one", "two"}
    component.settle(restore)
    component.revert(restore)
    assert cluster.fingerprint("one", "two") == after


def test_what_is_being_settled_cannot_be_reverted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(cluster)
    restore = cluster.restore(cluster.backup())
    cluster.component.stage(restore)
    with pytest.raises(Permanent, match="nothing was swapped"):
        cluster.component.settle(restore)
    cluster.component.swap(restore)
    with monkeypatch.context() as patch:
        patch.setattr(postgres_swap.Swap, "_drop", interrupted)
        with pytest.raises(Interrupted):
            cluster.component.settle(restore)
    with pytest.raises(Permanent, match="was settled"):
        cluster.component.revert(restore)
    assert cluster.databases() >= {"one", "two"}


def test_clients_that_will_not_leave_do_not_stop_a_swap(cluster: Cluster) -> None:
    make_small(cluster)
    parts = cluster.backup()
    cluster.execute("one", "DELETE FROM t")
    restore = cluster.restore(parts)
    cluster.component.stage(restore)
    ended = threading.Event()

    def insist() -> None:
        while not ended.is_set():
            with contextlib.suppress(psycopg.Error), cluster.connect("one") as connection:
                while not ended.is_set():
                    connection.execute("SELECT pg_sleep(0.01)")

    clients = [threading.Thread(target=insist) for _ in range(4)]
    for client in clients:
        client.start()
    open_transaction = cluster.connect("one", autocommit=False)
    try:
        open_transaction.execute("INSERT INTO t VALUES (99)")
        cluster.component.swap(restore)
        with pytest.raises(psycopg.OperationalError):
            open_transaction.execute("SELECT 1")
        assert cluster.rows("one", "SELECT a FROM t") == [(1,)]
        cluster.component.revert(restore)
        assert cluster.rows("one", "SELECT a FROM t") == []
    finally:
        ended.set()
        open_transaction.close()
        for client in clients:
            client.join()


def test_the_maintenance_database_itself_can_be_restored(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.execute("postgres", "CREATE TABLE mine AS SELECT 42 AS a")
    try:
        component = cluster.make(databases=("postgres",))
        restore = cluster.restore(cluster.backup(component))
        cluster.execute("postgres", "UPDATE mine SET a = 0")
        component.stage(restore)
        with monkeypatch.context() as patch:
            patch.setattr(postgres_swap, "_rename", interrupted)
            with pytest.raises(Interrupted):
                component.swap(restore)
        with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
            cluster.connect()
        component.swap(restore)
        assert cluster.rows("postgres", "SELECT a FROM mine") == [(42,)]
        component.revert(restore)
        assert cluster.rows("postgres", "SELECT a FROM mine") == [(0,)]
        assert cluster.databases() == set()
    finally:
        with cluster.connect("template1") as connection:
            connection.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS true")
        cluster.execute("postgres", "DROP TABLE mine")


# -- backups that fail, and what they leave -----------------------------------------------------------------


def programs_of(cluster: Cluster) -> list[bytes]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PGPORT={cluster.server.port}\0".encode() in process.joinpath("environ").read_bytes():
                found.append(process.joinpath("cmdline").read_bytes())
    return found


def sessions(cluster: Cluster) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ai-micro-backup'"
    return cast("int", cluster.rows("postgres", query)[0][0])


def big(cluster: Cluster) -> str:
    return cluster.create(
        "big", "CREATE TABLE t AS SELECT i, repeat(md5(i::text), 20) AS x FROM generate_series(1, 50000) i"
    )


def wait_until_no_sessions(cluster: Cluster) -> None:
    deadline = time.monotonic() + 10
    while sessions(cluster):
        assert time.monotonic() < deadline, "sessions are left on the server"
        time.sleep(0.05)


def test_the_password_is_in_no_command_line_and_no_record(cluster: Cluster) -> None:
    big(cluster)
    dump = cluster.component.sources()[1]
    next(dump.chunks)
    lines = programs_of(cluster)
    assert any(b"pg_dump" in line for line in lines)
    assert any(b"psql" in line for line in lines)
    assert not any(PASSWORD.encode() in line for line in lines)
    for _ in dump.chunks:
        pass
    assert PASSWORD not in str(dump.holds)


def test_a_wrong_password_is_permanent_and_not_shown(cluster: Cluster) -> None:
    wrong = cluster.folder / "wrong"
    wrong.write_text("wrong-secret")
    with pytest.raises(Permanent, match="password authentication failed") as caught:
        cluster.make(password=Secret(file=wrong)).sources()
    assert "wrong-secret" not in str(caught.value)


def test_a_server_that_does_not_answer_is_transient(cluster: Cluster) -> None:
    with pytest.raises(RuntimeUnavailable, match="refused"):
        cluster.make(port=free_port()).sources()


def test_a_password_hash_is_neither_shown_nor_logged(cluster: Cluster) -> None:
    make_small(cluster)
    parts = cluster.backup()
    restore = cluster.restore(parts)
    [record] = [part for part in parts if part.kind == "postgres-globals"]
    script = b"".join(restore.read(record)).decode()
    [digest] = re.findall(r"ALTER ROLE app .* PASSWORD '([^']+)'", script)
    assert "ALTER ROLE" not in str(record.holds)
    broken = script.replace("ALTER ROLE app WITH", "ALTER ROLE app WITH NOSUCHTHING")

    def read(part: Part) -> Iterator[bytes]:
        return iter([broken.encode()]) if part is record else restore.read(part)

    cluster.execute("postgres", "ALTER SYSTEM SET log_statement = 'all'")
    cluster.execute("postgres", "SELECT pg_reload_conf()")
    try:
        failing = dataclasses.replace(restore, read=read)
        cluster.component.stage(failing)
        with pytest.raises(CommandFailed) as caught:
            cluster.component.swap(failing)
        assert "unrecognized role option" in str(caught.value)
        assert digest not in str(caught.value)
        cluster.component.revert(restore)
        cluster.component.stage(restore)
        cluster.component.swap(restore)
        cluster.component.settle(restore)
        log = cluster.server.log.read_text()
        assert "CREATE DATABASE" in log
        assert digest not in log
    finally:
        cluster.execute("postgres", "ALTER SYSTEM RESET log_statement")
        cluster.execute("postgres", "SELECT pg_reload_conf()")


def test_a_backup_given_up_leaves_no_program_and_no_session(cluster: Cluster) -> None:
    big(cluster)
    dump = cluster.component.sources()[1]
    next(dump.chunks)
    assert sessions(cluster) == 2
    cast("Any", dump.chunks).close()
    assert programs_of(cluster) == []
    wait_until_no_sessions(cluster)


def test_a_connection_lost_in_mid_dump_fails_loudly(cluster: Cluster) -> None:
    big(cluster)
    dump = cluster.component.sources()[1]
    store = LocalStore(cluster.folder / "store")

    def cut_off() -> Iterator[bytes]:
        yield next(dump.chunks)
        terminated = cluster.rows(
            "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COPY %'"
        )
        assert terminated == [(True,)]
        yield from dump.chunks

    with pytest.raises(BackupError, match="ended with status"):
        streams.write(store, "dump", cut_off(), level=1)
    assert list(store.list("")) == []
    assert "tables" not in dump.holds
    assert programs_of(cluster) == []
    wait_until_no_sessions(cluster)


def test_a_database_that_vanishes_fails_loudly(cluster: Cluster) -> None:
    cluster.create("gone")
    dump = cluster.component.sources()[1]
    cluster.execute("postgres", "DROP DATABASE gone")
    with pytest.raises(CommandFailed, match='database "gone" does not exist'):
        list(dump.chunks)


def test_a_locked_table_fails_the_dump_in_time(cluster: Cluster) -> None:
    cluster.create("locked", "CREATE TABLE t ()")
    dump = cluster.make(lock_timeout=0.3).sources()[1]
    started = time.monotonic()
    with cluster.connect("locked", autocommit=False) as holder:
        holder.execute("LOCK TABLE t")
        with pytest.raises(CommandFailed, match="lock timeout"):
            list(dump.chunks)
        with pytest.raises(CommandFailed, match="lock timeout"):
            cluster.make(lock_timeout=0.3).sources()
    assert time.monotonic() - started < 10


def test_all_databases_are_those_that_a_user_made(cluster: Cluster) -> None:
    make_small(cluster)
    cluster.create("a template")
    cluster.execute("postgres", 'ALTER DATABASE "a template" IS_TEMPLATE true')
    assert [source.label for source in cluster.component.sources()] == ["globals", "one", "two"]
    restore = cluster.restore(cluster.backup(), run_id="r" * 60)
    cluster.component.stage(restore)
    assert [source.label for source in cluster.component.sources()] == ["globals", "one", "two"]
    cluster.component.swap(restore)
    assert len(cluster.databases()) == 6
    assert [source.label for source in cluster.component.sources()] == ["globals", "one", "two"]
    cluster.execute("postgres", 'ALTER DATABASE "a template" IS_TEMPLATE false')
    chosen = cluster.make(databases=("two", "postgres"))
    assert [source.label for source in chosen.sources()] == ["globals", "two", "postgres"]
    with pytest.raises(Permanent, match="no database 'three'"):
        cluster.make(databases=("one", "three")).sources()


# -- what a restore refuses, and what it says before ---------------------------------------------------------


def test_refusals(cluster: Cluster) -> None:
    make_small(cluster)
    parts = [part for part in cluster.backup() if ".one." in part.name]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"server_version": "99.1"}, r"is of PostgreSQL 99\.1, pg \(127\.0\.0\.1\) has 18"),
        ({"size": 10**18}, "1,000,000,000,000,000,000 bytes are needed"),
        ({"database": None}, "does not say which database"),
    ]
    for change, message in cases:
        changed = [part.model_copy(update={"holds": part.holds | change}) for part in parts]
        with pytest.raises(Permanent, match=message):
            cluster.component.stage(cluster.restore(changed))
        if "database" not in change:
            cluster.component.revert(cluster.restore(changed))
    assert cluster.databases() == {"one", "two"}


def test_programs_of_another_version_are_refused(
    cluster: Cluster, servers: Callable[[int], PostgresServer]
) -> None:
    with pytest.raises(Permanent, match=r"needs pg_dump of 18; found .* 16\."):
        cluster.make(bin_dir=str(servers(16).bin_dir)).sources()


def test_the_plan_says_what_would_be_overwritten(cluster: Cluster) -> None:
    make_small(cluster)
    parts = cluster.backup()
    spoil_small(cluster)
    cluster.execute("one", "ANALYZE")
    globals_line, one, two = cluster.component.overwrites(parts)
    assert re.match(
        r"roles on pg \(127\.0\.0\.1\): attributes, passwords, settings and memberships of 2", globals_line
    )
    assert re.match(
        r"database one on pg \(127\.0\.0\.1\): 1 tables, about 2 rows now \([0-9.]+ MB\), would be replaced by the one of 20",
        one,
    )
    assert "database two on pg (127.0.0.1): does not exist yet, would be created as the one of 20" in two
    assert cluster.databases() == {"one"}


def test_the_archive_s_own_words_restore_it(cluster: Cluster) -> None:
    names = make_rich(cluster)
    then = cluster.fingerprint(*names)
    parts = cluster.backup()
    cluster.execute(AWKWARD, "DELETE FROM users")
    cluster.execute("postgres", 'DROP DATABASE "Empty"')
    text = cluster.component.by_hand(parts)
    [commands] = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    env = {
        **os.environ,
        "PGPASSWORD": PASSWORD,
        "PATH": f"{cluster.server.bin_dir}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["sh", "-c", commands], cwd=cluster.store.root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert [line for line in errors if not re.search(r'role ".*" already exists', line)] == []
    assert cluster.fingerprint(*names) == then


def test_names_beside() -> None:
    assert beside("authdb", "before", "20261122_020000") == "authdb__before_20261122_020000"
    long = ["デ" * 21, "デ" * 20 + "ー", "x" * 63, "x" * 62 + "y"]
    for run_id in ("20261122_020000", "r" * 200):
        names = {beside(name, purpose, run_id) for name in long for purpose in ("restore", "before")}
        assert len(names) == 2 * len(long)
        assert all(len(name.encode()) <= 63 for name in names)


def test_what_pg_dumpall_writes_is_read_as_statements() -> None:
    script = """-- a; comment\nCREATE ROLE "a ""b""; c";\n\\restrict x;y
    ALTER ROLE q SET a TO E'it''s \\\\; x', 'y;\n\\connect z';COMMENT ON DATABASE "DATABASE" IS 'DATABASE "DATABASE"';"""
    first, second, third = statements(script)
    assert first.sql == 'CREATE ROLE "a ""b""; c"'
    assert second.sql.endswith("'y;\n\\connect z'")
    changed = third.with_database('"DATABASE"', '"new"')
    assert changed is not None
    assert changed.sql == """COMMENT ON DATABASE "new" IS 'DATABASE "DATABASE"'"""
    assert second.with_database('"DATABASE"', '"new"') is None
