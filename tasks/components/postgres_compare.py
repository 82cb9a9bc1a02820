"""What the tables of a database hold, as one snapshot shows it: rows counted, and contents digested when asked for."""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.components.psql import Server, Session, literal, major_of
from workers.errors import ComparisonError

log = logging.getLogger(__name__)

TABLES_A_QUERY = 100
SHOWN_DIFFERENCES = 5
OBJECTS = "large objects"

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

DIGEST = (
    "coalesce(sum(hashtextextended({text}, 0))::text || ':' || sum(hashtextextended({text}, 1))::text, '0:0')"
)
"""Two sums of 64-bit hashes of each row's text: whatever the order of the rows, and every one of equal rows counts.

``hashtextextended`` takes bytes of any encoding, and is what hash partitions of a dump go by, so no version changes it.
"""
OBJECTS_DIGEST = f"""
SELECT {DIGEST.format(text="page")} AS digest
FROM (SELECT loid || ' ' || pageno || ' ' || rtrim(encode(data, 'hex'), '0') COLLATE "C" AS page
      FROM pg_catalog.pg_largeobject WHERE rtrim(encode(data, 'hex'), '0') <> '') AS pages
"""
"""Zeros at the end of a page are left out: where an object was never written, a restored one holds zeros."""
ROW = "ai_micro_backup_row"

TEXT_SETTINGS = {
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "lc_monetary": "C",
}
"""What the text of a value depends on."""


@dataclass(frozen=True)
class Contents:
    """What tables hold: the number of rows of each, and a digest of each and of the large objects when asked for."""

    tables: dict[str, int]
    checksums: dict[str, str] = field(default_factory=dict)


def tables_of(session: Session) -> list[str]:
    """Return the tables that are counted (`TABLES`), quoted."""
    return [row["name"] for row in session.rows(TABLES)]


def contents(session: Session, tables: Sequence[str], *, checksums: bool) -> Contents:
    """Return the exact number of rows of each of ``tables`` (quoted), without those of its children.

    With ``checksums``, every value is read as well.
    """
    if checksums:
        session.set(TEXT_SETTINGS)
    digest = DIGEST.format(text=f'{ROW}::text COLLATE "C"') if checksums else "NULL"
    found: dict[str, int] = {}
    digests: dict[str, str] = {}
    for batch in batches(tables):
        selects = [
            f"SELECT {literal(table)} AS name, count(*) AS rows, {digest} AS digest FROM ONLY {table} AS {ROW}"
            for table in batch
        ]
        for row in session.rows(" UNION ALL ".join(selects)):
            found[row["name"]] = row["rows"]
            digests[row["name"]] = row["digest"]
    if not checksums:
        return Contents(found)
    digests[OBJECTS] = session.rows(OBJECTS_DIGEST)[0]["digest"]
    return Contents(found, digests)


def compare(server: Server, session: Session, database: str, holds: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the database of ``session`` with what its dump's record ``holds``; return what was compared.

    Checksums are compared when the record has them and was made by the same major version, whose text of a value is
    the same. Raises ``ComparisonError`` unless all tables are those recorded and hold the same.
    """
    recorded = holds.get("tables")
    if recorded is None:
        log.warning("%s: the dump has no record of its rows, so they are not compared", database)
        return {"tables": None, "rows": None, "checksums": False}
    then = dict(holds.get("checksums", {}))
    if then and major_of(str(holds.get("server_version", "0"))) != server.major:
        log.warning(
            "%s: its checksums are of PostgreSQL %s, this is %s: rows are counted instead",
            database,
            holds.get("server_version"),
            server.version,
        )
        then = {}
    found = contents(session, tables_of(session), checksums=bool(then))
    objects = session.value(LARGE_OBJECTS)
    require_equal(
        database,
        Contents({**recorded, OBJECTS: holds.get("large_objects", objects)}, then),
        Contents({**found.tables, OBJECTS: objects}, found.checksums),
    )
    return {"tables": len(found.tables), "rows": sum(found.tables.values()), "checksums": bool(then)}


def require_equal(database: str, recorded: Contents, found: Contents) -> None:
    """Raise ``ComparisonError`` unless the tables found are those recorded, each with as many rows and the same."""
    lines = [
        f"{table}: expected {_rows(recorded.tables.get(table))}, found {_rows(found.tables.get(table))}"
        for table in sorted(recorded.tables.keys() | found.tables.keys())
        if recorded.tables.get(table) != found.tables.get(table)
    ]
    if not lines:
        lines = [
            f"{table}: as many rows as expected, but with other contents"
            for table in sorted(recorded.checksums.keys() | found.checksums.keys())
            if recorded.checksums.get(table) != found.checksums.get(table)
        ]
    if lines:
        more = f" and {len(lines) - SHOWN_DIFFERENCES} more" if len(lines) > SHOWN_DIFFERENCES else ""
        raise ComparisonError(f"database {database}: {'; '.join(lines[:SHOWN_DIFFERENCES])}{more}")


def batches(tables: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield ``tables`` in pieces that one statement may name."""
    for start in range(0, len(tables), TABLES_A_QUERY):
        yield tables[start : start + TABLES_A_QUERY]


def _rows(count: int | None) -> str:
    return "no such table" if count is None else f"{count:,} rows"
