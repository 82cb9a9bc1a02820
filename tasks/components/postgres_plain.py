"""All databases and roles as one file of plain SQL, as pg_dumpall writes it; and such files restored.

A script is not run as it is: it would add its rows to those that are there. Its statements are read one by one, and
what belongs to a database goes into a new one beside the live one, as with any other restore.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tasks.components.postgres_compare import Contents, contents, require_equal, tables_of
from tasks.components.postgres_roles import role_concerned, role_created
from tasks.components.postgres_script import Connect, Item, MadeBy, Rows, Sql, read_script
from tasks.components.psql import Server, Session, Statement, identifier, statements, unquoted
from workers.errors import Permanent

log = logging.getLogger(__name__)

NOT_RESTORED = ("postgres", "template1")
"""Databases of every server, which a script holds without creating them; restored only when they are named."""
WHOLE = re.compile(rb"\b(ROLE|DATABASE|pg_database)\b|^\s*GRANT ", re.MULTILINE)
"""What a statement has that concerns roles, or a database as a whole."""
OF_A_LATER_SERVER = {b"SET transaction_timeout = 0;": 17}
"""What a later pg_dump writes for an earlier server, too, and the version that knows it."""


def dump_all(server: Server, database: str, exclude: Iterable[str], holds: dict[str, Any]) -> Iterator[bytes]:
    """Yield what pg_dumpall writes, without the databases ``exclude``, and note roles and the rows of each table."""
    argv = [f"{server.tools}/pg_dumpall", "--no-password", server.patience, f"--database={database}"]
    argv += [f"--exclude-database={identifier(name)}" for name in exclude]
    pending: list[bytes] = []

    def noted() -> Iterator[bytes]:
        for chunk in server.stream(argv):
            pending.append(chunk)
            yield chunk

    roles: list[str] = []
    databases: dict[str, dict[str, int]] = {}
    tables: dict[str, int] = {}
    for item in read_script(noted()):
        yield from pending
        pending.clear()
        match item:
            case Connect(name):
                tables = databases.setdefault(name, {})
            case Rows(table, _, count):
                tables[table] = tables.get(table, 0) + count
            case Sql() if not databases:
                roles += [role for s in _parsed(item) if (role := role_created(s)) is not None]
    yield from pending
    holds |= {"roles": roles, "databases": databases}
    holds["rows"] = sum(sum(rows.values()) for rows in databases.values())


def roles_of(chunks: Iterable[bytes]) -> list[Statement]:
    """Return the statements about roles at the head of a script of a whole cluster; no more than that is read."""
    items = read_script(chunks)
    found: list[Statement] = []
    for item in items:
        if isinstance(item, Connect):
            break
        if isinstance(item, Sql):
            found += _parsed(item)
    # pg_dumpall --clean drops databases and roles here.
    return [statement for statement in found if role_created(statement) or role_concerned(statement)]


@dataclass
class Script:
    """A script that is being read, database by database."""

    items: Iterator[Item]
    server: Server
    roles: list[Statement] = field(default_factory=list)
    """The statements about roles, when the first database has come."""
    properties: dict[str, list[Statement]] = field(default_factory=dict)
    """What was read so far of statements that concern a database as a whole, by its name."""
    counts: dict[str, int] = field(default_factory=dict)
    """The rows of each table of the database that was read last."""
    current: str | None = None
    """The database that is being read."""
    following: str | None = None
    """The database that comes next."""

    def read_head(self) -> None:
        """Read what comes before the first database."""
        for item in self._until_connect():
            self.roles += [s for s in _parsed(item) if role_created(s) or role_concerned(s)]

    def read_database(self) -> Iterator[bytes]:
        """Yield the SQL of the database that comes next, without what concerns it as a whole."""
        self.counts.clear()
        self.current = self.following
        for item in self._until_connect():
            if (
                item.text.strip() not in OF_A_LATER_SERVER
                or self.server.major >= OF_A_LATER_SERVER[item.text.strip()]
            ):
                yield item.text

    def properties_of(self, database: str) -> list[Statement]:
        """Return what was read about ``database`` as a whole since this was last asked."""
        return self.properties.pop(database, [])

    def _until_connect(self) -> Iterator[Sql | Rows]:
        self.following = None
        for item in self.items:
            match item:
                case Connect(database):
                    if database != self.current:  # pg_dump connects anew when it has set what a database sets
                        self.following = database
                        return
                case MadeBy(major) if major > self.server.major:
                    raise Permanent(f"the SQL is of PostgreSQL {major}, the server has {self.server.version}")
                case Rows(table, _, count):
                    self.counts[table] = self.counts.get(table, 0) + count
                    yield item
                case Sql() if (concerned := _database_concerned(item)) is not None:
                    name, statement = concerned
                    if not statement.starts("DROP"):  # of pg_dumpall --clean
                        self.properties.setdefault(name, []).append(statement)
                case Sql():
                    yield item


def is_wanted(database: str, chosen: Collection[str] | None) -> bool:
    """Say whether a database of a script is to be restored."""
    return database not in NOT_RESTORED if chosen is None else database in chosen


def compare_rows(session: Session, database: str, counts: dict[str, int]) -> dict[str, Any]:
    """Compare the rows of a restored database with those that the script had for each table."""
    ordinary = set(tables_of(session))
    found = contents(session, [table for table in counts if table in ordinary], checksums=False).tables
    for table in counts.keys() - ordinary:  # a partitioned one, or an extension's
        found[table] = session.value(f"(SELECT count(*) FROM {table})")  # noqa: S608  quoted by pg_dump
    require_equal(database, Contents(counts), Contents(found))
    return {"tables": len(counts), "rows": sum(counts.values()), "checksums": False}


def _database_concerned(item: Sql) -> tuple[str, Statement] | None:
    """Return the database that a statement concerns as a whole, with the statement; ``None`` for any other."""
    for statement in _parsed(item)[:1]:
        words = statement.words
        if statement.starts("UPDATE", "pg_catalog", ".", "pg_database"):
            return "", statement  # pg_dumpall --clean makes templates ordinary databases
        if words[0] in ("CREATE", "ALTER", "DROP") and words[1:2] == ["DATABASE"]:
            return unquoted(words[4] if words[2:4] == ["IF", "EXISTS"] else words[2]), statement
        if words[:2] == ["ALTER", "ROLE"] and words[3:5] == ["IN", "DATABASE"]:
            return unquoted(words[5]), statement
        if words[0] in ("COMMENT", "GRANT", "REVOKE", "SECURITY"):
            for on, kind, name in zip(words, words[1:], words[2:], strict=False):
                if (on, kind) == ("ON", "DATABASE"):
                    return unquoted(name), statement
    return None


def _parsed(item: Sql | Rows) -> list[Statement]:
    # Rows and the bodies of functions are of no interest here, and may be large.
    if isinstance(item, Rows) or not WHOLE.search(item.text):
        return []
    return statements(item.text.decode(errors="surrogateescape"))
