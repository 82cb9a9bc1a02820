"""Databases and roles restored beside what stands, then swapped in one transaction, and the journal of it.

The journal is a database of its own, named by the run. Every step of a restore connects to it, because a database
that is renamed must have no connections. And because databases and roles are shared by the whole cluster, the
journal's rows change in the same transaction as the names and roles they describe. So whatever is interrupted, the
journal says what is true, and each step can start again:

    staging   staged databases may exist; live ones have their names, though they may refuse connections for now
    swapped   staged databases have the live names, what stood is kept under another, roles are as recorded
    settling  what stood is being dropped; there is no way back
"""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.components.postgres_roles import create_roles, drop_role, dump_roles, of_roles, set_roles
from tasks.components.psql import Server, Session, Statement, identifier, literal, statements
from workers.errors import Permanent, RuntimeUnavailable

NAME_BYTES = 63  # NAMEDATALEN - 1
SUFFIX_BYTES = 40
JOURNAL = "ai_micro_backup"
CLOSING_SECONDS = 30.0

TABLES = """
CREATE TABLE IF NOT EXISTS public.restore (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    state text NOT NULL DEFAULT 'staging',
    whole boolean NOT NULL DEFAULT false,
    roles_before text
);
INSERT INTO public.restore DEFAULT VALUES ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS public.databases (
    name text PRIMARY KEY,
    staged text NOT NULL,
    before text NOT NULL,
    verified boolean NOT NULL DEFAULT false,
    stood boolean NOT NULL DEFAULT false,
    was_open boolean
);
CREATE TABLE IF NOT EXISTS public.roles_created (name text PRIMARY KEY);
"""

_JOURNALS = JOURNAL.replace("_", r"\_") + r"\_\_restore\_%"
OWN_DATABASES = f"""
SELECT d.datname FROM pg_catalog.pg_database d, pg_catalog.pg_database j,
    LATERAL (SELECT substr(j.datname, {len(JOURNAL) + 1}) AS suffix) AS run
WHERE j.datname LIKE '{_JOURNALS}'
  AND (right(d.datname, length(suffix)) = suffix
       OR right(d.datname, length(suffix) - 1) = replace(suffix, '__restore_', '__before_'))
"""
"""The databases that belong to restores which are not settled: no backup is meant to hold them."""


def beside(database: str, purpose: str, run_id: str) -> str:
    """Return the name of the database that stands beside ``database`` for a run: always the same, at most 63 bytes.

    What does not fit is cut and told apart by a digest.
    """
    suffix = f"__{purpose}_{run_id}"
    if len(suffix.encode()) > SUFFIX_BYTES:
        suffix = f"__{purpose}_{hashlib.sha256(run_id.encode()).hexdigest()[:16]}"
    room = NAME_BYTES - len(suffix.encode())
    if len(database.encode()) > room:
        digest = hashlib.sha256(database.encode()).hexdigest()[:8]
        database = database.encode()[: room - 9].decode(errors="ignore") + "~" + digest
    return database + suffix


@dataclass(frozen=True)
class Swap:
    """The swap of one run on one server."""

    server: Server
    run_id: str
    maintenance: str
    """A database to connect to that is not restored itself."""
    user: str
    """The role that does it, whose own password and attributes stay, or it would lock itself out."""

    @property
    def journal(self) -> str:
        return beside(JOURNAL, "restore", self.run_id)

    def session(self) -> Session:
        """Connect to the journal. Close it in any case."""
        return self.server.session(self.journal, silent=True)

    def begin(self) -> str:
        """Create the journal unless there is one, and return its state."""
        with self.server.session(self.maintenance) as session:
            if not exists(session, self.journal):
                session.execute(
                    f"CREATE DATABASE {identifier(self.journal)} TEMPLATE template0 ENCODING 'UTF8'"
                )
            # It holds the hashes of passwords.
            session.execute(f"REVOKE ALL ON DATABASE {identifier(self.journal)} FROM PUBLIC")
        with self.session() as session:
            session.execute(TABLES)
            return self.state(session)

    def end_staging(self) -> None:
        """Note that all is staged that shall be."""
        with self.session() as session:
            session.execute("UPDATE public.restore SET whole = true")

    def create_roles(self, record: Sequence[Statement]) -> None:
        """Create the roles of the record that are missing, without login or rights, so that owners resolve."""
        with self.session() as session:
            session.execute("BEGIN")
            create_roles(session, record)
            session.execute("COMMIT")

    def state(self, session: Session) -> str:
        """Return the journal's state; one whose tables were not made yet is ``staging``."""
        if not session.value("to_regclass('public.restore') IS NOT NULL"):
            session.execute(TABLES)
        return str(session.value("(SELECT state FROM public.restore)"))

    def create_database(self, session: Session, name: str, script: Sequence[Statement]) -> str:
        """Create the empty staged database of ``name`` by ``script``, which creates the recorded one.

        Returns the staged name.
        """
        staged, before = beside(name, "restore", self.run_id), beside(name, "before", self.run_id)
        session.execute(
            "INSERT INTO public.databases (name, staged, before) VALUES "
            f"({literal(name)}, {literal(staged)}, {literal(before)}) "
            "ON CONFLICT (name) DO UPDATE SET verified = false"
        )
        self._drop(session, staged)
        recorded = next((s.after("DATABASE") for s in script if s.starts("CREATE", "DATABASE")), None)
        if recorded is None:
            raise Permanent(f"the dump of {name} does not say how its database is created")
        alter_database(session, recorded, staged, script)
        return staged

    def note_verified(self, name: str) -> None:
        """Note that the staged database of ``name`` was compared."""
        with self.session() as session:
            session.execute(f"UPDATE public.databases SET verified = true WHERE name = {literal(name)}")

    def verified(self, session: Session) -> set[str]:
        """Return the databases that are staged and were compared."""
        rows = session.rows(
            "SELECT name FROM public.databases WHERE verified AND staged IN (SELECT datname FROM pg_catalog.pg_database)"
        )
        return {row["name"] for row in rows}

    def swap(self, record: Sequence[Statement] | None, *, everything: bool, replace: bool) -> None:
        """Give the staged databases the live names and the roles what the record says, all in one transaction.

        Without ``everything``, roles that were there before the restore stay as they are. Without ``replace``, a
        database that has the name by now is not put aside, but ``Permanent`` raised.
        """
        with self.session() as session:
            if self.state(session) != "staging":
                return
            databases = self._databases(session)
            if missing := sorted({row["name"] for row in databases} - self.verified(session)):
                raise Permanent(f"not staged yet: {', '.join(missing)}")
            if not session.value("(SELECT whole FROM public.restore)"):
                raise Permanent("not staged yet: the databases of the restore")
            if taken := [row["name"] for row in databases if not replace and exists(session, row["name"])]:
                raise Permanent(f"there is a database {taken[0]} by now; restore into another name")
            if record is not None and not everything:
                created = {row["name"] for row in session.rows("SELECT name FROM public.roles_created")}
                record = of_roles(record, created)
            roles_before = None if record is None or not everything else dump_roles(self.server, self.journal)
            self._close(session, databases)
            session.execute("BEGIN")
            if record is not None:
                create_roles(session, record)
                set_roles(session, record, keep=self.user)
            if roles_before is not None:
                session.execute(f"UPDATE public.restore SET roles_before = {literal(roles_before)}")
            for row in databases:
                name, staged, before = row["name"], row["staged"], row["before"]
                if exists(session, name):
                    _rename(session, name, before)
                    session.execute(f"UPDATE public.databases SET stood = true WHERE name = {literal(name)}")
                _rename(session, staged, name)
                _allow(session, name, allowed=True)
            session.execute("UPDATE public.restore SET state = 'swapped'")
            session.execute("COMMIT")

    def revert(self) -> None:
        """Bring back names and roles as they stood, and drop what was staged and the roles created for it.

        A role on which something outside of the restore came to depend stays, and the log says so.
        """
        with self.server.session(self.maintenance) as session:
            if not exists(session, self.journal):
                return
        with self.session() as session:
            state = self.state(session)
            if state == "settling":
                raise Permanent("the restore was settled; what stood before it is being dropped")
            databases = self._databases(session)
            if state == "swapped":
                self._swap_back(session, databases)
            for row in databases:
                if row["was_open"] is not None and exists(session, row["name"]):
                    _allow(session, row["name"], allowed=row["was_open"])
            for row in databases:
                self._drop(session, row["staged"])
            for row in session.rows("SELECT name FROM public.roles_created"):
                drop_role(session, row["name"])
        with self.server.session(self.maintenance) as session:
            self._drop(session, self.journal)

    def settle(self) -> None:
        """Drop what stood before the swap, and the journal."""
        with self.server.session(self.maintenance) as session:
            if not exists(session, self.journal):
                return
        with self.session() as session:
            if self.state(session) == "staging":
                raise Permanent("nothing was swapped that could be settled")
            session.execute("UPDATE public.restore SET state = 'settling', roles_before = NULL")
            for row in self._databases(session):
                self._drop(session, row["before"])
        with self.server.session(self.maintenance) as session:
            self._drop(session, self.journal)

    def _swap_back(self, session: Session, databases: list[dict[str, Any]]) -> None:
        self._close(session, databases)
        session.execute("BEGIN")
        for row in databases:
            name, staged, before = row["name"], row["staged"], row["before"]
            _rename(session, name, staged)
            if row["stood"]:
                _rename(session, before, name)
                _allow(session, name, allowed=row["was_open"])
        roles_before = session.value("(SELECT roles_before FROM public.restore)")
        if roles_before is not None:
            set_roles(session, statements(roles_before), keep=self.user)
        session.execute("UPDATE public.restore SET state = 'staging', whole = false, roles_before = NULL")
        session.execute("UPDATE public.databases SET verified = false, stood = false")
        session.execute("COMMIT")

    def _drop(self, session: Session, database: str) -> None:
        """Drop ``database`` and whatever is connected to it; one that is not there is no error.

        Its subscriptions, which are disabled, go first; their slots on the publisher stay.
        """
        name = literal(database)
        if session.rows(f"SELECT 1 FROM pg_catalog.pg_database WHERE datname = {name} AND datistemplate"):
            session.execute(f"ALTER DATABASE {identifier(database)} IS_TEMPLATE false")
        subscriptions = session.rows(
            "SELECT subname FROM pg_catalog.pg_subscription "
            f"WHERE NOT subenabled AND subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = {name})"
        )
        if subscriptions:
            _allow(session, database, allowed=True)
            with self.server.session(database) as inside:
                for row in subscriptions:
                    subscription = identifier(row["subname"])
                    inside.execute(f"ALTER SUBSCRIPTION {subscription} SET (slot_name = NONE)")
                    inside.execute(f"DROP SUBSCRIPTION {subscription}")
        session.execute(f"DROP DATABASE IF EXISTS {identifier(database)} WITH (FORCE)")

    def _databases(self, session: Session) -> list[dict[str, Any]]:
        return session.rows("SELECT * FROM public.databases ORDER BY name")

    def _close(self, session: Session, databases: list[dict[str, Any]]) -> None:
        """Refuse new connections to the live and staged databases and end those that are there."""
        closed = []
        session.execute("BEGIN")
        for row in databases:
            name = row["name"]
            session.execute(
                "UPDATE public.databases d SET was_open = coalesce(was_open, p.datallowconn) "
                f"FROM pg_catalog.pg_database p WHERE d.name = {literal(name)} AND p.datname = d.name"
            )
            for database in (name, row["staged"]):
                if exists(session, database):
                    _allow(session, database, allowed=False)
                    closed.append(database)
        session.execute("COMMIT")
        if not closed:
            return
        connections = (
            f"FROM pg_catalog.pg_stat_activity WHERE datname IN ({', '.join(map(literal, closed))}) "
            "AND pid <> pg_backend_pid()"
        )
        deadline = time.monotonic() + CLOSING_SECONDS
        while session.value(f"(SELECT count(pg_terminate_backend(pid)) {connections})"):
            if time.monotonic() > deadline:
                rows = session.rows(f"SELECT DISTINCT datname, usename, application_name {connections}")
                raise RuntimeUnavailable(f"connections do not end: {rows}")
            time.sleep(0.1)


def alter_database(session: Session, recorded: str, staged: str, script: Sequence[Statement]) -> None:
    """Do to the database ``staged`` what ``script`` does to the one that it calls ``recorded`` (a token of SQL)."""
    for statement in script:
        if statement.starts("SET", "SESSION") or statement.starts("RESET", "SESSION"):
            session.execute(statement.sql)
        elif staged_statement := statement.with_database(recorded, identifier(staged)):
            session.execute(staged_statement.sql)


def exists(session: Session, database: str) -> bool:
    """Say whether there is a database of that name."""
    return bool(
        session.value(f"EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname = {literal(database)})")
    )


def _rename(session: Session, old: str, new: str) -> None:
    session.execute(f"ALTER DATABASE {identifier(old)} RENAME TO {identifier(new)}")


def _allow(session: Session, database: str, *, allowed: bool) -> None:
    session.execute(f"ALTER DATABASE {identifier(database)} ALLOW_CONNECTIONS {str(allowed).lower()}")
