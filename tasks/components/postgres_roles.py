"""Roles and other globals: recorded by pg_dumpall, and made again what the record says.

Roles that are not in the record stay as they are. So do tablespaces, whose folders no SQL can make, and the
attributes and password of the role that connects, which would lock itself out.
"""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

import logging
from collections.abc import Container, Sequence

from tasks.components.psql import Server, Session, Statement, identifier, literal, unquoted

log = logging.getLogger(__name__)

RESET_ROLES = """
WITH named AS (
    SELECT oid, rolname, rolpassword, rolvaliduntil, rolconnlimit
    FROM pg_catalog.pg_authid WHERE rolname IN ({names})
)
SELECT 1 AS step, format('REVOKE %I FROM %I%s CASCADE', g.rolname, n.rolname, ' GRANTED BY ' || quote_ident(b.rolname))
       AS sql
FROM pg_catalog.pg_auth_members m JOIN named n ON n.oid = m.member JOIN pg_catalog.pg_roles g ON g.oid = m.roleid
LEFT JOIN pg_catalog.pg_roles b ON b.oid = m.grantor
UNION ALL SELECT 2, format('ALTER ROLE %I RESET ALL', rolname) FROM named
UNION ALL SELECT 3, format('COMMENT ON ROLE %I IS NULL', rolname) FROM named
UNION ALL SELECT 4, format('ALTER ROLE %I CONNECTION LIMIT -1', rolname) FROM named WHERE rolconnlimit <> -1
UNION ALL SELECT 5, format('ALTER ROLE %I VALID UNTIL ''infinity''', rolname) FROM named WHERE rolvaliduntil IS NOT NULL
UNION ALL SELECT 6, format('ALTER ROLE %I PASSWORD NULL', rolname) FROM named WHERE rolpassword IS NOT NULL AND {passwords}
ORDER BY step, sql
"""
"""What ALTER and GRANT statements of a record add to must be gone first, or it would stay beside what they add."""


def globals_argv(server: Server, database: str) -> list[str]:
    """Return the command line that writes the roles and other globals as they are now."""
    argv = [f"{server.tools}/pg_dumpall", "--globals-only", "--encoding=UTF8", "--no-password"]
    return [*argv, f"--database={database}"]


def dump_roles(server: Server, database: str) -> str:
    """Return the roles and other globals as SQL. It holds the hashes of passwords: a secret."""
    return server.run(globals_argv(server, database)).decode()


def role_created(statement: Statement) -> str | None:
    """Return the name of the role that ``statement`` creates, if it does."""
    return unquoted(statement.after("ROLE") or "") if statement.starts("CREATE", "ROLE") else None


def create_roles(session: Session, record: Sequence[Statement]) -> None:
    """Create the roles of the record that are missing, without login or rights, and note them in the journal."""
    there = {row["rolname"] for row in session.rows("SELECT rolname FROM pg_catalog.pg_roles")}
    for statement in record:
        name = role_created(statement)
        if name is not None and name not in there:
            session.execute(statement.sql)
            session.execute(
                f"INSERT INTO public.roles_created VALUES ({literal(name)}) ON CONFLICT DO NOTHING"
            )


def role_concerned(statement: Statement) -> str | None:
    """Return the role that a statement of a record sets something of; of a GRANT, the role that gets it."""
    words = statement.words
    if statement.starts("ALTER", "ROLE"):
        return unquoted(words[2])
    if statement.starts("COMMENT", "ON", "ROLE"):
        return unquoted(words[3])
    if statement.starts("GRANT") and "ON" not in words:
        return unquoted(statement.after("TO") or "")
    return None


def of_roles(record: Sequence[Statement], roles: Container[str]) -> list[Statement]:
    """Return the part of a record that creates and sets ``roles``."""
    return [s for s in record if (role_created(s) or role_concerned(s)) in roles]


def set_roles(session: Session, record: Sequence[Statement], *, keep: str) -> None:
    """Make the recorded roles what the record says: attributes, passwords, settings, comments, memberships.

    ``keep`` is the role that connects.
    """
    names = [name for statement in record if (name := role_created(statement)) is not None and name != keep]
    if names:
        # Dumped without passwords, the record says nothing about them.
        passwords = any("PASSWORD" in statement.words for statement in record)
        query = RESET_ROLES.format(names=", ".join(map(literal, names)), passwords=str(passwords).lower())
        for row in session.rows(query):
            session.execute(row["sql"])
    for statement in record:
        words = statement.words
        own = statement.starts("ALTER", "ROLE") and unquoted(words[2]) == keep and "WITH" in words
        if not own and "TABLESPACE" not in words and words[0] != "SET" and role_created(statement) is None:
            session.execute(statement.sql)


def drop_role(session: Session, name: str) -> None:
    """Drop a role that a restore created, unless something depends on it, which the log says."""
    body = f"BEGIN DROP ROLE IF EXISTS {identifier(name)}; EXCEPTION WHEN dependent_objects_still_exist THEN NULL; END"
    session.execute(f"DO {literal(body)}")
    if session.value(f"EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {literal(name)})"):
        log.warning("the role %s, created by this restore, stays: something depends on it", name)
