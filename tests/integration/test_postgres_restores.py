"""PostgreSQL 15, 17 and 18: one database restored, looked at beside, rehearsed; plain SQL; what must not be restored."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import logging
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from tasks.components import postgres_stage
from tasks.components.postgres import Component
from tasks.components.postgres_compare import compare
from tasks.components.postgres_dump import DUMP, PLAIN
from tests.integration.test_postgres_base import back_up
from tests.postgres_servers import Postgres, ServePostgres, postgres_server
from workers import streams
from workers.component import Part, Restore
from workers.errors import CommandFailed, ComparisonError, IntegrityError, Permanent
from workers.storage.local import LocalStore

majors = pytest.mark.parametrize("shop", [15, 17, 18], indirect=True)

AUTH = r"""
CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text COLLATE "C" NOT NULL UNIQUE,
    twice integer GENERATED ALWAYS AS (length(name) * 2) STORED, at timestamptz DEFAULT now(), f double precision);
INSERT INTO users (name, f) SELECT 'n' || i, i / 7.0 FROM generate_series(1, 300) i;
CREATE TABLE no_key (v text); INSERT INTO no_key SELECT 'same' FROM generate_series(1, 1000);
CREATE TABLE orders (id integer PRIMARY KEY, owner bigint REFERENCES users); INSERT INTO orders VALUES (1, 1), (2, 9);
CREATE INDEX ON users (f); CREATE TABLE empty ();
CREATE FUNCTION hint() RETURNS text LANGUAGE sql AS $x$ SELECT 'ALTER DATABASE auth OWNER TO nobody;
\connect nowhere'; $x$;
COMMENT ON TABLE users IS 'GRANT ALL ON DATABASE x TO y; '; ALTER TABLE users OWNER TO shop_app;
SELECT lo_from_bytea(0, decode(repeat('00ff', 3000), 'hex'));
ALTER TABLE users ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON users USING (name = current_user);
"""


class Shop:
    """Two databases and a role on a server, and a store for their backups."""

    def __init__(self, server: Postgres, store: Path) -> None:
        self.server, self.store = server, LocalStore(store)

    def fill(self) -> None:
        self.server.execute("CREATE ROLE shop_app LOGIN PASSWORD 'then' CONNECTION LIMIT 7")
        for name, script in (
            ("auth", AUTH),
            ("api", "CREATE TABLE t AS SELECT 1 AS a; ALTER TABLE t OWNER TO shop_app"),
        ):
            self.server.execute(f"CREATE DATABASE {name} TEMPLATE template0 OWNER shop_app")
            self.server.execute(script, name)
        self.server.execute(
            "ALTER DATABASE auth SET work_mem = '9MB'; COMMENT ON DATABASE auth IS 'of the shop'"
        )
        self.server.execute(
            "GRANT CONNECT ON DATABASE auth TO shop_app; ALTER ROLE shop_app IN DATABASE auth SET jit = off"
        )

    def clean(self) -> None:
        for gid, database in self.server.rows("SELECT gid, database FROM pg_prepared_xacts"):
            self.server.execute(f"ROLLBACK PREPARED '{gid}'", database)
        for name in self.databases():
            self.server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
            for (subscription,) in self.server.rows(
                "SELECT subname FROM pg_subscription WHERE subdbid = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())",
                name,
            ):
                self.server.execute(f"ALTER SUBSCRIPTION {subscription} DISABLE", name)
                self.server.execute(f"ALTER SUBSCRIPTION {subscription} SET (slot_name = NONE)", name)
                self.server.execute(f"DROP SUBSCRIPTION {subscription}", name)
            self.server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        self.server.execute("DROP ROLE IF EXISTS shop_app")

    def component(self, **settings: Any) -> Component:
        return Component.model_validate({**self.server.settings(), **settings})

    def databases(self) -> set[str]:
        rows = self.server.rows("SELECT datname FROM pg_database WHERE NOT datistemplate")
        return {row[0] for row in rows} - {"postgres"}

    def dump(self, database: str) -> str:
        """Return everything that pg_dump says of a database."""
        text = self.server.program("pg_dump", "--create", database).decode()
        return "\n".join(line for line in text.splitlines() if "restrict " not in line)

    def backup(self, options: Mapping[str, Any] = {}, **settings: Any) -> list[Part]:
        folder = secrets.token_hex(4)
        return [
            self.part(f"{folder}/{source.name}", source.kind, source.chunks, source.holds, codec=source.codec)
            for source in self.component(**settings).sources(options)
        ]

    def part(
        self, name: str, kind: str, chunks: Iterator[bytes], holds: dict[str, Any], *, codec: str = "zstd"
    ) -> Part:
        now = datetime.now(UTC)
        written = streams.write(self.store, name, chunks, level=1, codec=codec)
        return Part(
            name=name, component="pg", host="db1", kind=kind, codec=codec, started=now, finished=now, holds=holds,
            **dataclasses.asdict(written),
        )  # fmt: skip

    def restore(self, parts: list[Part], **options: Any) -> Restore:
        def read(part: Part) -> Iterator[bytes]:
            return streams.read(
                self.store.get(part.name), codec=part.codec, written=part.written, name=part.name
            )

        return Restore("20261122_020000", parts, read, options, cast("Any", self.store))

    def put_back(self, parts: list[Part], **options: Any) -> None:
        component, restore = self.component(), self.restore(parts, **options)
        component.overwrites(parts, options)
        component.stage(restore)
        component.swap(restore)
        component.settle(restore)
        assert self.left_behind() == []

    def left_behind(self) -> list[str]:
        """Return what restores left in the server's /tmp, and databases of their own."""
        own = [name for name in self.databases() if "__" in name]
        command = ["sh", "-c", "ls -d /tmp/ai-micro-backup.pg.$1.* 2>/dev/null || true", "sh", self.system]
        if self.server.container:
            command = ["docker", "exec", self.server.container, *command]
        return own + subprocess.check_output(command, text=True).split()

    @property
    def system(self) -> str:
        return str(self.server.rows("SELECT system_identifier FROM pg_control_system()")[0][0])


@pytest.fixture(params=[18])
def shop(serve_postgres: ServePostgres, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(serve_postgres(request.param), tmp_path)
    shop.clean()
    shop.fill()
    yield shop
    shop.clean()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that the user of a recovering server may enter, unlike this process's own."""
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# -- one database ------------------------------------------------------------------------------------------------


@majors
def test_one_database_comes_back_and_nothing_else_changes(shop: Shop) -> None:
    then = shop.dump("auth")
    parts = shop.backup({"databases": ["auth"]}, checksums=True)
    assert [part.holds.get("database") for part in parts] == [None, "auth"]
    shop.server.execute("DELETE FROM orders; UPDATE users SET name = name || '!'", "auth")
    shop.server.execute("INSERT INTO t VALUES (2)", "api")
    shop.server.execute("ALTER ROLE shop_app PASSWORD 'now'")
    api = shop.dump("api")
    lines = shop.component().overwrites(parts, {"databases": ["auth"]})
    assert "0 that are missing would be created" in lines[0]
    assert "database auth on" in lines[1]
    shop.put_back(parts, databases=["auth"])
    assert shop.dump("auth") == then
    assert shop.dump("api") == api
    shop.server.connect("api", user="shop_app", password="now").close()

    shop.server.execute("DROP DATABASE auth")
    shop.server.execute("DROP DATABASE api")
    shop.server.execute("DROP ROLE shop_app")
    shop.put_back(parts, databases=["auth"])
    assert shop.dump("auth") == then
    with shop.server.connect("auth", user="shop_app", password="then") as connection:
        assert connection.execute("SHOW work_mem").fetchone() == ("9MB",)


def test_a_database_restored_beside_for_a_look(shop: Shop) -> None:
    parts = shop.backup()
    shop.server.execute("DROP TABLE orders", "auth")
    live = shop.dump("auth")
    component = shop.component()
    asked = {"databases": ["auth"], "into": "Auth before"}
    assert not component.restore_options.model_validate(asked).overwrites
    [_, line] = component.overwrites(parts, asked)
    assert "auth on pg (127.0.0.1): stays as it is; Auth before would be created" in line
    restore = shop.restore(parts, **asked)
    component.stage(restore)
    component.swap(restore)
    assert shop.server.rows("SELECT count(*) FROM orders", "Auth before") == [(2,)]
    component.revert(restore)
    assert shop.databases() == {"auth", "api"}
    shop.put_back(parts, **asked)
    assert shop.databases() == {"auth", "api", "Auth before"}
    assert shop.dump("auth") == live

    with pytest.raises(Permanent, match="there is a database Auth before; restore into another name"):
        component.overwrites(parts, asked)
    with pytest.raises(Permanent, match="there is a database Auth before"):
        component.stage(shop.restore(parts, **asked))
    with pytest.raises(Permanent, match="is for one database"):
        component.stage(shop.restore(parts, into="x"))
    with pytest.raises(Permanent, match="holds no database nothing; it holds api, auth"):
        component.stage(shop.restore(parts, databases=["nothing"]))
    late = shop.restore(parts, databases=["auth"], into="late")
    component.stage(late)
    shop.server.execute("CREATE DATABASE late")
    with pytest.raises(Permanent, match="there is a database late by now"):
        component.swap(late)
    component.revert(late)
    assert shop.databases() == {"auth", "api", "Auth before", "late"}


def test_other_contents_are_found_by_checksums_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = shop.backup(checksums=True)
    counted = shop.backup()

    def altered(server: Any, session: Any, database: str, holds: Mapping[str, Any]) -> dict[str, Any]:
        if database == "auth":
            session.execute("UPDATE public.users SET f = f + 0.000000001 WHERE id = 7")
        return compare(server, session, database, holds)

    monkeypatch.setattr(postgres_stage, "compare", altered)
    with pytest.raises(
        ComparisonError, match=r"auth: public\.users: as many rows as expected, but with other contents"
    ):
        shop.component().rehearse(shop.restore(parts))
    found = shop.component().rehearse(shop.restore(counted))
    assert found["databases"]["auth"] == {"tables": 4, "rows": 1302, "checksums": False}
    assert shop.left_behind() == []


@majors
def test_a_rehearsal_compares_everything_and_leaves_nothing(shop: Shop) -> None:
    parts = shop.backup(checksums=True)
    before = shop.dump("auth")
    found = shop.component().rehearse(shop.restore(parts))
    assert found["databases"]["auth"] == {"tables": 4, "rows": 1302, "checksums": True}
    assert set(found["databases"]) == {"auth", "api"}
    assert shop.dump("auth") == before
    assert shop.left_behind() == []
    wrong = [part.model_copy(update={"holds": part.holds | {"tables": {}}}) for part in parts]
    with pytest.raises(ComparisonError):
        shop.component().rehearse(shop.restore(wrong))
    assert shop.left_behind() == []
    assert shop.databases() == {"auth", "api"}


# -- damage ------------------------------------------------------------------------------------------------------


@majors
def test_a_damaged_dump_is_found_and_touches_nothing(shop: Shop) -> None:
    parts = shop.backup()
    component = shop.component()
    for part in parts:
        component.check(part, shop.restore(parts).read(part))
    [globals_part, dump] = [
        next(part for part in parts if part.holds.get("database") == name) for name in (None, "auth")
    ]
    for part in (globals_part, dump):
        plain = b"".join(shop.restore(parts).read(part))
        for damaged in (plain[:-40], plain[: len(plain) // 2], b""):
            with pytest.raises(IntegrityError):
                component.check(part, iter([damaged]))
    before = shop.dump("auth")
    path = shop.store.root / dump.name
    stored = bytearray(path.read_bytes())
    stored[-30] ^= 1
    path.write_bytes(stored)
    restore = shop.restore(parts)
    with pytest.raises(IntegrityError, match="damaged"):
        component.stage(restore)
    with pytest.raises(Permanent, match="not staged yet"):
        component.swap(restore)
    component.revert(restore)
    assert shop.dump("auth") == before
    assert shop.left_behind() == []


# -- plain SQL ---------------------------------------------------------------------------------------------------


@majors
def test_plain_sql_of_all_databases_doubles_no_row(shop: Shop) -> None:
    then = {name: shop.dump(name) for name in ("auth", "api")}
    [part] = shop.backup({"format": "dumpall"})
    assert (part.kind, part.codec) == (PLAIN, "gzip")
    assert part.holds["databases"]["auth"]["public.no_key"] == 1000
    assert part.holds["roles"].count("shop_app") == 1
    text = gzip.decompress((shop.store.root / part.name).read_bytes())
    assert text.startswith(b"--\n-- PostgreSQL database cluster dump\n")
    shop.component().check(part, iter([text]))
    with pytest.raises(IntegrityError, match="cut short"):
        shop.component().check(part, iter([text[:-100]]))

    shop.server.execute("INSERT INTO no_key VALUES ('later')", "auth")
    shop.server.execute("DROP DATABASE api")
    shop.server.execute("ALTER ROLE shop_app PASSWORD 'now' CONNECTION LIMIT 9")
    shop.put_back([part])  # over what is there: the runbook's restore doubled the rows of no_key
    assert {name: shop.dump(name) for name in then} == then
    shop.server.connect("api", user="shop_app", password="then").close()
    shop.put_back([part], databases=["api"], into="api_then")
    assert shop.server.rows("SELECT a FROM t", "api_then") == [(1,)]
    assert {name: shop.dump(name) for name in then} == then


@majors
def test_files_of_the_runbook_restore(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """all_databases_*.sql.gz of pg_dumpall, <db>_*.dump of pg_dump -Fc, <db>.sql.gz of pg_dump: without any record."""
    then = shop.dump("auth")
    program = shop.server.program
    shop.server.execute("CREATE TABLE IF NOT EXISTS forgotten AS SELECT 1")
    everything = shop.part(
        "all_databases_20250930_020000.sql.gz",
        PLAIN,
        iter([program("pg_dumpall", "--clean")]),
        {},
        codec="gzip",
    )
    shop.server.execute("DROP TABLE forgotten")
    custom = program("pg_dump", "-d", "auth", "--format=custom", "--compress=9")
    dump = shop.part("auth_20250930_020000.dump", DUMP, iter([custom]), {"database": "auth"})
    plain = shop.part(
        "auth.sql.gz", PLAIN, iter([program("pg_dump", "auth")]), {"database": "auth"}, codec="gzip"
    )
    for part in (everything, dump, plain):
        shop.server.execute("INSERT INTO no_key VALUES ('later'); DROP TABLE orders", "auth")
        with caplog.at_level(logging.WARNING):
            shop.put_back([part])
        assert shop.dump("auth") == then, part.name
    assert "the 1 rows of database postgres are not restored" in caplog.text
    assert "auth: the dump has no record of its rows" in caplog.text
    shop.server.execute("DROP DATABASE auth")
    shop.put_back([plain])
    assert shop.server.rows("SELECT count(*) FROM no_key", "auth") == [(1000,)]


def test_a_script_that_fails_or_is_of_a_later_server_touches_nothing(shop: Shop) -> None:
    before = shop.dump("api")
    script = shop.server.program("pg_dump", "api")
    broken = script.replace(b"COPY public.t (a) FROM stdin;\n1\n", b"COPY public.t (a) FROM stdin;\n1\nx\n")
    later = script.replace(b"Dumped from database version 18", b"Dumped from database version 99")
    assert script not in (broken, later)
    cases: list[tuple[bytes, type[Permanent], str]] = [
        (broken, CommandFailed, "invalid input syntax"),
        (later, Permanent, "the SQL is of PostgreSQL 99"),
        (script[: len(script) // 2], Permanent, "cut short|ended with status"),
    ]
    for number, (text, kind, message) in enumerate(cases):
        part = shop.part(f"{number}.sql", PLAIN, iter([text]), {"database": "api"})
        restore = shop.restore([part])
        with pytest.raises(kind, match=message):
            shop.component().stage(restore)
        with pytest.raises(Permanent, match="not staged yet"):
            shop.component().swap(restore)
        shop.component().revert(restore)
    assert shop.dump("api") == before
    assert shop.left_behind() == []


# -- what must not be restored -----------------------------------------------------------------------------------


@majors
def test_a_wrong_server_beside_the_right_one_is_refused(shop: Shop, open_folder: Path) -> None:
    parts, base = shop.backup(), back_up(shop.component(), shop.store)
    with postgres_server(shop.server.major, open_folder) as server:
        other = Shop(server, shop.store.root)
        component = other.component(**server.control())

        # An empty cluster: a new machine after a disaster.
        empty, recovery = other.system, shop.restore([base])
        component.stage(recovery)
        component.swap(recovery)
        assert (other.system, other.dump("api")) == (shop.system, shop.dump("api"))
        component.revert(recovery)
        assert other.system == empty
        other.put_back(parts, databases=["api"])
        assert other.dump("api") == shop.dump("api")

        other.server.execute("INSERT INTO t VALUES (2)", "api")
        before = other.dump("api")
        for refused in (
            lambda: component.overwrites(parts),
            lambda: component.stage(other.restore(parts)),
            lambda: component.stage(other.restore(parts, databases=["auth"])),
            lambda: component.overwrites([base]),
            lambda: component.stage(shop.restore([base])),
        ):
            with pytest.raises(Permanent, match="it is in use: database") as caught:
                refused()
            assert f"identifier is {other.system}, the backup's {shop.system}" in str(caught.value)
            assert "--onto-new-cluster" in str(caught.value)
        server.stop()
        with pytest.raises(
            Permanent, match=f"another cluster .*{empty}.*does not answer.*--onto-new-cluster"
        ):
            component.stage(shop.restore([base]))
        server.start()
        assert other.dump("api") == before
        assert other.left_behind() == []
        other.put_back(parts, databases=["api"], into="look")
        other.put_back(parts, databases=["api"], new_cluster=True)
        assert other.dump("api") == shop.dump("api")


def test_subscriptions_and_prepared_transactions(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    connection = "CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1 port=1' PUBLICATION p WITH (connect = false, slot_name = s)"
    shop.server.execute(connection, "auth")
    shop.server.execute("ALTER SUBSCRIPTION s ENABLE", "auth")
    parts = shop.backup()
    with pytest.raises(
        Permanent, match="auth has the subscription s, which is enabled; ALTER SUBSCRIPTION … DISABLE"
    ):
        shop.component().stage(shop.restore(parts))
    shop.component().rehearse(shop.restore(parts))
    shop.server.execute("ALTER SUBSCRIPTION s DISABLE", "auth")
    with caplog.at_level(logging.WARNING):
        shop.put_back(parts)
    assert shop.server.rows("SELECT subenabled, subslotname FROM pg_subscription") == [(False, "s")]
    assert "the subscription s is restored disabled" in caplog.text
    shop.put_back(parts)


def test_prepared_transactions_and_missing_tablespaces_are_refused(tmp_path: Path) -> None:
    with postgres_server(18, tmp_path / "one", settings={"max_prepared_transactions": "2"}) as server:
        shop = Shop(server, tmp_path)
        shop.fill()
        location = server.archive
        server.execute(f"CREATE TABLESPACE fast LOCATION '{location}'")
        server.execute("CREATE TABLE quick TABLESPACE fast AS SELECT 1 AS a", "api")
        parts = shop.backup()
        with server.connect("api", autocommit=False) as connection:
            connection.execute("INSERT INTO t VALUES (3)")
            connection.execute("PREPARE TRANSACTION 'half done'")
        with pytest.raises(
            Permanent, match="api has the prepared transaction 'half done'; COMMIT PREPARED or"
        ):
            shop.component().stage(shop.restore(parts))
        server.execute("ROLLBACK PREPARED 'half done'", "api")
        shop.put_back(parts)
        assert server.rows("SELECT tablespace FROM pg_tables WHERE tablename = 'quick'", "api") == [("fast",)]
        server.execute("DROP DATABASE api")
        server.execute("DROP TABLESPACE fast")
        with pytest.raises(
            Permanent, match=f"needs the tablespace fast, which was at {location}; make a folder"
        ):
            shop.component().stage(shop.restore(parts))
        assert shop.databases() == {"auth"}


# -- while it is written to --------------------------------------------------------------------------------------


@majors
def test_while_pgbench_writes_the_dump_is_of_one_moment(shop: Shop) -> None:
    server = shop.server
    server.program("pgbench", "--initialize", "--quiet", "--scale=1", "api")
    if server.container:
        names = [
            "--env",
            f"PGPASSWORD={server.password}",
            "--env",
            "PGUSER=postgres",
            "--env",
            "PGHOST=127.0.0.1",
        ]
        command = ["docker", "exec", *names, server.container, "pgbench"]
        environment: dict[str, str] | None = None
    else:
        command = [str(server.bin_dir and server.bin_dir / "pgbench")]
        environment = {
            "PGPASSWORD": server.password,
            "PGUSER": "postgres",
            "PGHOST": server.host,
            "PGPORT": str(server.port),
        }
    writer = subprocess.Popen(
        [*command, "--client=2", "--time=120", "--no-vacuum", "api"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not server.rows("SELECT EXISTS (SELECT FROM pgbench_history)", "api")[0][0]:
            assert writer.poll() is None
        parts = shop.backup({"databases": ["api"]}, checksums=True)
        first = server.rows("SELECT count(*) FROM pgbench_history", "api")[0][0]
        assert parts[1].holds["tables"]["public.pgbench_history"] <= first
        found = shop.component().rehearse(shop.restore(parts))
        assert found["databases"]["api"]["checksums"] is True
        shop.put_back(parts, databases=["api"], into="then")
        assert writer.poll() is None
        sums = ["SELECT coalesce(sum(delta), 0) FROM pgbench_history"]
        sums += [
            f"SELECT sum({kind[0]}balance) FROM pgbench_{table}"
            for kind, table in (("a", "accounts"), ("t", "tellers"), ("b", "branches"))
        ]
        assert (
            len({server.rows(query, "then")[0][0] for query in sums}) == 1
        )  # no transaction is there by half
        later = server.rows("SELECT count(*) FROM pgbench_history", "api")[0][0]
        assert later > parts[1].holds["tables"]["public.pgbench_history"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            writer.kill()
        writer.wait()
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench'"
        )
