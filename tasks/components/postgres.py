"""PostgreSQL: a custom-format dump of each database, with the rows of each table counted in the dump's own snapshot,
and the roles and other globals. A restore stands beside the live databases, is compared, and swapped in by name.

PostgreSQL 13 or later.
"""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from tasks.components.postgres_base import BASE, base_by_hand, base_source, check_base
from tasks.components.postgres_options import BackupOptions, RestoreOptions
from tasks.components.postgres_preflight import NO_WAL, preflight_server, preflight_wal
from tasks.components.postgres_recovery import Recovery, is_base
from tasks.components.postgres_roles import globals_argv, role_created
from tasks.components.postgres_swap import OWN_DATABASES, Swap
from tasks.components.psql import OPTIONS, ProcessGroup, Server, Session, Statement, literal, statements
from workers.component import (
    NO_OPTIONS,
    BaseComponent,
    Finding,
    Options,
    Part,
    Restore,
    Source,
    part_name,
    plain_command,
)
from workers.errors import CommandFailed, ComparisonError, Permanent
from workers.runtime import Runtime, open_runtime, run
from workers.secret import Secret

log = logging.getLogger(__name__)

DUMP, GLOBALS = "postgres-dump", "postgres-globals"
TABLES_A_QUERY = 100
LOADS = 8
SHOWN_DIFFERENCES = 5

TABLES = """
SELECT format('%I.%I', n.nspname, c.relname) AS name
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                  WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1
"""
"""Ordinary tables and the leaves of partitioned ones, quoted where SQL needs it. An extension makes its own tables."""

LARGE_OBJECTS = "(SELECT count(*) FROM pg_catalog.pg_largeobject_metadata)"
SNAPSHOT = f"""
SELECT pg_export_snapshot() AS snapshot, transaction_timestamp() AS taken,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn,
       current_setting('server_encoding') AS encoding, pg_database_size(current_database()) AS size,
       {LARGE_OBJECTS} AS large_objects
"""

SIZE = f"SELECT coalesce(sum(pg_table_size(name::regclass)), 0)::bigint AS size, count(*) AS tables FROM ({TABLES}) AS t"

LIVE = """
SELECT count(*) AS tables, coalesce(sum(greatest(c.reltuples, pg_stat_get_live_tuples(c.oid), 0)), 0)::bigint AS rows,
       pg_database_size(current_database()) AS size
FROM ({tables}) AS t JOIN pg_catalog.pg_class c ON c.oid = t.name::regclass
"""


class Component(BaseComponent):
    """The databases and roles of one server."""

    metadata_key: ClassVar[str] = "postgresql"
    backup_options: ClassVar[type[Options]] = BackupOptions
    restore_options: ClassVar[type[Options]] = RestoreOptions

    kind: Literal["postgres"]
    user: str = "postgres"
    """A superuser: the roles' passwords and the names of databases are nobody else's to read and change."""
    password: Secret | None = None
    address: str | None = None
    """Host name, or folder of the socket. ``None``: the default socket where the server is."""
    port: int | None = Field(default=None, ge=1, le=65535)
    databases: Literal["*"] | tuple[str, ...] = "*"
    """Names, or all that can be connected to, save templates and ``postgres``."""
    bin_dir: str | None = None
    """The folder of the server's programs; by default looked for by the server's version, then on ``PATH``."""
    lock_timeout: float = Field(default=60, gt=0)
    """Seconds that a statement waits for a lock that somebody holds, on a table or database, before it fails."""
    maintenance_database: str = "postgres"
    """Where to connect for what concerns no single database."""
    data_dir: PurePosixPath | None = None
    """The data folder, for recoveries; in containers by default ``/var/lib/postgresql/data``."""
    wal_archive: PurePosixPath | None = None
    """The folder, where the server is, into which its ``archive_command`` or ``pg_receivewal`` puts WAL. ``None``: WAL is not
    collected."""
    wal_timeout: float = Field(default=120, gt=0)
    """Seconds that a collection waits for the server to archive its newest segment."""
    wal_slot: str | None = Field(default=None, pattern=r"^[a-z0-9_]{1,63}$")
    """The replication slot of a ``pg_receivewal``, which is watched; see compose/README.md."""

    def secrets(self) -> dict[str, Secret]:
        return {} if self.password is None else {"password": self.password}

    # -- backup -------------------------------------------------------------------------------------------------

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Return a source for the globals and one for each database, or that of a base backup.

        Raises ``Permanent`` when a database is missing.
        """
        asked = BackupOptions.model_validate(dict(options))
        server = self._server(self.maintenance_database)
        if asked.base:
            return [base_source(server, self.name, self.maintenance_database)]
        with server.session(self.maintenance_database) as session:
            names = self._names(session)
        held = {"server_version": server.version, "roles": []}
        opened = self._globals(server, held)
        sources = [Source("globals", part_name(f"{self.name}.globals.sql"), GLOBALS, opened, holds=held)]
        for name in names:
            with server.session(name) as session:
                expected = session.rows(SIZE)[0]["size"]
            held = {"database": name, "server_version": server.version}
            opened = self._dump(server, name, held)
            sources.append(
                Source(
                    name, part_name(f"{self.name}.{name}.dump"), DUMP, opened, expected=expected, holds=held
                )
            )
        return sources

    def _names(self, session: Session) -> list[str]:
        there = [
            row["datname"]
            for row in session.rows(
                "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn "
                f"AND (NOT datistemplate AND datname <> 'postgres' OR {str(self.databases != '*').lower()}) "
                f"AND datname NOT IN ({OWN_DATABASES}) ORDER BY datname"
            )
        ]
        if self.databases == "*":
            return there
        if missing := [name for name in self.databases if name not in there]:
            raise Permanent(
                f"{self._place}: no database {', '.join(map(repr, missing))} that can be connected to"
            )
        return list(dict.fromkeys(self.databases))

    def _globals(self, server: Server, holds: dict[str, Any]) -> Iterator[bytes]:
        script = b"".join(server.stream(globals_argv(server, self.maintenance_database)))
        holds["roles"] = [
            name for statement in statements(script.decode()) if (name := role_created(statement))
        ]
        yield script

    def _dump(self, server: Server, database: str, holds: dict[str, Any]) -> Iterator[bytes]:
        """Yield the dump of ``database``, counting its rows in the same snapshot while it is read.

        The tables are locked against change of form (not against writes) before pg_dump locks them, since TRUNCATE
        and ALTER TABLE show through a snapshot. Should somebody wait for a stronger lock just between the two,
        pg_dump waits behind them, which ``lock_timeout`` bounds.
        """
        patience = f"--lock-wait-timeout={round(self.lock_timeout * 1000)}"
        with ThreadPoolExecutor(1) as pool, server.session(database) as session:
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            snapshot = session.rows(SNAPSHOT)[0]
            tables = [row["name"] for row in session.rows(TABLES)]
            for batch in _batches(tables):
                session.execute(f"LOCK TABLE ONLY {', ONLY '.join(batch)} IN ACCESS SHARE MODE")
            counts = pool.submit(_count, session, tables)
            options = ["--format=custom", "--compress=0", f"--snapshot={snapshot['snapshot']}"]
            yield from server.stream(server.argv("pg_dump", database, *options, patience))
            rows = counts.result()
            holds |= {key: snapshot[key] for key in ("encoding", "lsn", "taken", "size", "large_objects")}
            holds |= {"tables": rows, "rows": sum(rows.values())}

    # -- restore ------------------------------------------------------------------------------------------------

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        if is_base(parts):
            return [Recovery(self, Restore("", parts, lambda _: iter(()), options)).would_overwrite()]
        server = self._server(self._maintenance(parts))
        lines = []
        with server.session(self._maintenance(parts)) as session:
            there = {row["datname"] for row in session.rows("SELECT datname FROM pg_catalog.pg_database")}
            roles = {row["rolname"] for row in session.rows("SELECT rolname FROM pg_catalog.pg_roles")}
        for part in parts:
            when = f"{part.started:%Y-%m-%d %H:%M:%S} UTC"
            if part.kind == GLOBALS:
                known = roles & set(part.holds.get("roles", roles))
                lines.append(
                    f"{len(known)} roles on {self._place}: attributes, passwords, settings and memberships would be "
                    f"set to those of {when}"
                )
                continue
            database = _database(part)
            if database not in there:
                now = "does not exist yet, would be created as"
            else:
                with server.session(database) as session:
                    live = session.rows(LIVE.format(tables=TABLES))[0]
                now = (
                    f"{live['tables']} tables, about {live['rows']:,} rows now ({live['size'] / 1e6:,.1f} MB), "
                    "would be replaced by"
                )
            lines.append(f"database {database} on {self._place}: {now} the one of {when}")
        return lines

    def check(self, part: Part, chunks: Iterator[bytes]) -> None:
        """Compare every file of a base backup with its manifest."""
        if part.kind == BASE:
            check_base(chunks, part.holds)
        else:
            super().check(part, chunks)

    def by_hand(self, parts: Sequence[Part]) -> str:
        if bases := [part for part in parts if part.kind == BASE]:
            return base_by_hand(bases[0])
        tools = ["docker", "exec", "-i", self.container] if self.container else []
        login = [f"--username={self.user}"]
        login += [f"--host={self.address}"] if self.address else []
        login += [f"--port={self.port}"] if self.port else []
        connect = [*login, f"--dbname={self._maintenance(parts)}"]
        # A database may be set to be read-only by default.
        restore = [
            "env",
            f"PGOPTIONS={OPTIONS}",
            "pg_restore",
            "--clean",
            "--if-exists",
            "--create",
            *connect,
        ]
        restores = [["psql", "--no-psqlrc", *connect], restore]
        lines = [
            f"{plain_command(part)} | {shlex.join([*tools, *restores[part.kind == DUMP]])}"
            for part in sorted(parts, key=lambda part: part.kind == DUMP)
        ]
        return (
            "Stop what uses the databases: each is dropped and made again, with its owner, rights and settings. Roles come\n"
            "first; `role … already exists` is fine there. The tools must be of the server's version or later; they ask\n"
            "for a password or take it from `PGPASSWORD`. With the roles come their passwords of then, that of "
            f"`{self.user}` as well.\n\n```sh\n" + "\n".join(lines) + "\n```\n"
        )

    def stage(self, restore: Restore) -> None:
        """Restore each database under another name with owners and rights, and compare the rows of its tables.

        How a database is created (encoding, locale, owner, rights, settings, comment, connection limit) is taken
        from its own dump: ``pg_restore --create`` with the name of a table that is in no dump writes nothing but
        that, in the words of the server's own version, and reads no more than the dump's head; only the name is
        changed. That holds for any dump, whoever made it, which a list of catalogue columns would not.
        """
        if is_base(restore.parts):
            Recovery(self, restore).stage()
            return
        if RestoreOptions.model_validate(dict(restore.options)).recovers:
            raise Permanent(f"{self._place}: the archive holds dumps; a recovery begins with a base backup")
        dumps = self._dumps(restore.parts)
        server = self._server(self._maintenance(restore.parts))
        for part in restore.parts:
            made_by = str(part.holds.get("server_version", "0"))
            if int(re.split(r"\D", made_by)[0]) > server.major:
                raise Permanent(f"{part.name} is of PostgreSQL {made_by}, {self._place} has {server.version}")
        swap = self._beside(server, restore)
        swap.begin()
        with swap.session() as session:
            if swap.state(session) != "staging":
                return
            done = swap.verified(session)
        waiting = {name: part for name, part in dumps.items() if name not in done}
        self._require_room(server, list(waiting.values()))
        if (record := self._record(restore)) is not None:
            swap.create_roles(record)
        with swap.session() as session:
            staged = {
                name: swap.create_database(session, name, _creation(server, part, restore))
                for name, part in waiting.items()
            }
        group = ProcessGroup(server.runtime)
        with ThreadPoolExecutor(LOADS) as pool:
            loading = dataclasses.replace(server, runtime=cast("Runtime", group))
            try:
                futures = [
                    pool.submit(_load, loading, swap, staged[name], part, restore.read(part))
                    for name, part in waiting.items()
                ]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                group.kill()
                raise

    def swap(self, restore: Restore) -> None:
        if is_base(restore.parts):
            Recovery(self, restore).swap()
            return
        server = self._server(self._maintenance(restore.parts))
        names = list(self._dumps(restore.parts))
        self._beside(server, restore).swap(names, self._record(restore))

    def revert(self, restore: Restore) -> None:
        if is_base(restore.parts):
            Recovery(self, restore).revert()
            return
        self._beside(self._server(self._maintenance(restore.parts)), restore).revert()

    def settle(self, restore: Restore) -> None:
        if is_base(restore.parts):
            Recovery(self, restore).settle()
            return
        self._beside(self._server(self._maintenance(restore.parts)), restore).settle()

    def _require_room(self, server: Server, parts: Sequence[Part]) -> None:
        """Refuse what cannot fit beside the live databases, where the data folder can be seen."""
        if self.address is not None and not self.address.startswith(("/", "127.", "localhost", "::1")):
            return
        needed = sum(int(part.holds.get("size", 0)) for part in parts)
        with server.session(self._maintenance(parts)) as session:
            folder = str(session.value("current_setting('data_directory')"))
        try:
            lines = run(server.runtime, ["df", "--output=avail", "-B1", "--", folder]).splitlines()
        except CommandFailed:
            return
        available = int(lines[-1])
        if needed > available:
            raise Permanent(
                f"{self._place}: {needed:,} bytes are needed beside the live databases, {folder} has {available:,} free"
            )

    # -- helpers ------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        where = f"container {self.container}" if self.container else (self.address or "this host")
        return f"{self.name} ({where})"

    def preflight(self) -> list[Finding]:
        server = self.wal_server()
        with server.session(self.maintenance_database) as session:
            found = preflight_server(session, self.wal_slot)
            if self.wal_archive is None:
                return [*found, NO_WAL]
            return found + preflight_wal(session, server.runtime, str(self.wal_archive), self.wal_slot)

    @property
    def wal_name(self) -> str:
        """The name of its lease, and of the mark of its programs, while WAL is collected beside a backup."""
        return f"{self.name}.wal"

    def wal_server(self) -> Server:
        """Return the server, with the programs that a collection starts marked as its own."""
        return self._server(self.maintenance_database, open_runtime(self, component=self.wal_name))

    def _server(self, database: str, runtime: Runtime | None = None) -> Server:
        env = {"PGUSER": self.user}
        if self.password is not None:
            env["PGPASSWORD"] = self.password.resolve()
        if self.address is not None:
            env["PGHOST"] = self.address
        if self.port is not None:
            env["PGPORT"] = str(self.port)
        return Server.find(
            runtime or self.runtime,
            env,
            database=database,
            bin_dir=self.bin_dir,
            lock_timeout=self.lock_timeout,
        )

    def _beside(self, server: Server, restore: Restore) -> Swap:
        return Swap(server, restore.run_id, self._maintenance(restore.parts), self.user)

    def _maintenance(self, parts: Sequence[Part]) -> str:
        """Return a database to connect to while those of ``parts`` may be closed or renamed."""
        restored = {part.holds.get("database") for part in parts}
        return "template1" if self.maintenance_database in restored else self.maintenance_database

    def _dumps(self, parts: Sequence[Part]) -> dict[str, Part]:
        return {_database(part): part for part in parts if part.kind == DUMP}

    def _record(self, restore: Restore) -> list[Statement] | None:
        """Return the statements of the globals, ``None`` when they are not among the parts."""
        parts = [part for part in restore.parts if part.kind == GLOBALS]
        return (
            [s for part in parts for s in statements(b"".join(restore.read(part)).decode())]
            if parts
            else None
        )


def _database(part: Part) -> str:
    if not isinstance(name := part.holds.get("database"), str):
        raise Permanent(f"{part.name} does not say which database it holds")
    return name


def _creation(server: Server, part: Part, restore: Restore) -> list[Statement]:
    """Return the statements that create the database of a dump, its own properties only (see `Component.stage`)."""
    no_table = f"--table=none_{uuid.uuid4().hex}"
    argv = [f"{server.tools}/pg_restore", "--create", "--schema-only", no_table, "--file=-"]
    script = server.run(argv, chunks=restore.read(part), reads_all=False)
    return statements(script.decode(errors="surrogateescape"))


def _load(server: Server, swap: Swap, staged: str, part: Part, chunks: Iterator[bytes]) -> None:
    """Fill a staged database, compare it with the record, and note in the journal that it is good."""
    database = _database(part)
    server.run(server.argv("pg_restore", staged, "--exit-on-error"), chunks=chunks)
    with server.session(staged) as session:
        session.execute("ANALYZE")
        if (recorded := part.holds.get("tables")) is None:
            log.warning("%s: the dump has no record of its rows, so they are not compared", database)
        else:
            found = _count(session, [row["name"] for row in session.rows(TABLES)])
            objects = session.value(LARGE_OBJECTS)
            recorded = {**recorded, "large objects": part.holds.get("large_objects", objects)}
            _compare(database, recorded, {**found, "large objects": objects})
    with swap.session() as session:
        session.execute(f"UPDATE public.databases SET verified = true WHERE name = {literal(database)}")


def _batches(tables: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(tables), TABLES_A_QUERY):
        yield tables[start : start + TABLES_A_QUERY]


def _count(session: Session, tables: Sequence[str]) -> dict[str, int]:
    """Return the exact number of rows of each of ``tables`` (quoted), without those of its children."""
    counts: dict[str, int] = {}
    for batch in _batches(tables):
        values = ", ".join(f"({literal(table)}, (SELECT count(*) FROM ONLY {table}))" for table in batch)
        rows = session.rows(f"SELECT * FROM (VALUES {values}) AS v (name, rows)")
        counts |= {row["name"]: row["rows"] for row in rows}
    return counts


def _compare(database: str, recorded: dict[str, int], found: dict[str, int]) -> None:
    """Raise ``ComparisonError`` unless the restored tables are those recorded, each with as many rows."""
    lines = [
        f"{table}: expected {_rows(recorded.get(table))}, found {_rows(found.get(table))}"
        for table in sorted(recorded.keys() | found.keys())
        if recorded.get(table) != found.get(table)
    ]
    if lines:
        more = f" and {len(lines) - SHOWN_DIFFERENCES} more" if len(lines) > SHOWN_DIFFERENCES else ""
        raise ComparisonError(f"database {database}: {'; '.join(lines[:SHOWN_DIFFERENCES])}{more}")


def _rows(count: int | None) -> str:
    return "no such table" if count is None else f"{count:,} rows"
