"""A custom-format dump of one database, with what its tables hold recorded in the dump's own snapshot; the globals."""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tasks.components.postgres_compare import LARGE_OBJECTS, TABLES, batches, contents, tables_of
from tasks.components.postgres_roles import globals_argv, role_created
from tasks.components.psql import Server, Session, installed, major_of, statements
from workers.component import Part
from workers.errors import CommandFailed, IntegrityError, Permanent
from workers.runtime import Runtime, run

DUMP, GLOBALS, PLAIN = "postgres-dump", "postgres-globals", "postgres-plain"
"""The kinds of parts: a dump of one database, the roles and other globals, plain SQL."""

SNAPSHOT = f"""
SELECT pg_export_snapshot() AS snapshot, transaction_timestamp() AS taken,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn,
       current_setting('server_encoding') AS encoding, pg_database_size(current_database()) AS size,
       {LARGE_OBJECTS} AS large_objects,
       (SELECT coalesce(json_object_agg(spcname, pg_tablespace_location(t.oid)), '{{}}') FROM pg_catalog.pg_tablespace t
        WHERE t.oid = (SELECT dattablespace FROM pg_catalog.pg_database WHERE datname = current_database())
              AND spcname <> 'pg_default'
           OR t.oid IN (SELECT reltablespace FROM pg_catalog.pg_class WHERE NOT relisshared)) AS tablespaces
"""

SIZE = f"SELECT coalesce(sum(pg_table_size(name::regclass)), 0)::bigint AS size FROM ({TABLES}) AS t"


def expected_size(server: Server, database: str) -> int:
    """Return about how many bytes the dump of ``database`` will have."""
    with server.session(database) as session:
        return int(session.rows(SIZE)[0]["size"])


def dump_globals(server: Server, database: str, holds: dict[str, Any]) -> Iterator[bytes]:
    """Yield the roles and other globals as SQL, and note the names of the roles."""
    script = b"".join(server.stream(globals_argv(server, database)))
    holds["roles"] = [name for statement in statements(script.decode()) if (name := role_created(statement))]
    yield script


def dump(server: Server, database: str, holds: dict[str, Any], *, checksums: bool) -> Iterator[bytes]:
    """Yield the dump of ``database``, counting its rows in the same snapshot while it is read.

    The tables are locked against change of form (not against writes) before pg_dump locks them, since TRUNCATE
    and ALTER TABLE show through a snapshot. Should somebody wait for a stronger lock just between the two,
    pg_dump waits behind them, which the server's ``lock_timeout`` bounds.
    """
    with ThreadPoolExecutor(1) as pool, server.session(database) as session:
        session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        snapshot = session.rows(SNAPSHOT)[0]
        tables = _locked(session)
        found = pool.submit(contents, session, tables, checksums=checksums)
        options = ["--format=custom", "--compress=0", f"--snapshot={snapshot['snapshot']}", server.patience]
        yield from server.stream(server.argv("pg_dump", database, *options))
        held = found.result()
        holds |= {
            key: snapshot[key] for key in ("encoding", "lsn", "taken", "size", "large_objects", "tablespaces")
        }
        holds |= {"tables": held.tables, "rows": sum(held.tables.values())}
        if checksums:
            holds["checksums"] = held.checksums


def check_dump(runtime: Runtime, bin_dir: str | None, part: Part, chunks: Iterator[bytes]) -> None:
    """Have pg_restore, of the dump's own version or a later one, read a dump to its end; no server is needed.

    Raises ``IntegrityError`` when it is no whole dump.
    """
    made_by = major_of(str(part.holds.get("server_version", "0")))
    programs = installed(runtime, bin_dir, made_by)
    folder = next((folder for folder, major, _ in programs if major >= made_by), None)
    if folder is None:
        raise Permanent(
            f"{part.host} has no pg_restore of PostgreSQL {made_by} or later, which {part.name} needs"
        )
    try:
        run(runtime, [f"{folder}/pg_restore", "--file=/dev/null"], chunks=chunks)
    except CommandFailed as error:
        raise IntegrityError(f"{part.name} is no whole dump: {error}") from error


def _locked(session: Session) -> list[str]:
    tables = tables_of(session)
    for batch in batches(tables):
        session.execute(f"LOCK TABLE ONLY {', ONLY '.join(batch)} IN ACCESS SHARE MODE")
    return tables
