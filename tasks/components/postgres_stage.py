"""Databases restored beside the live ones from dumps and scripts, each compared with its record.

A dump is read once, as it comes: pg_restore loads the tables from its stdin. What comes after the rows (indexes,
constraints, triggers) several connections make at the same time, and for that pg_restore needs a file, but only the
dump's head, its list of contents. So the head alone is kept where the server is, for as long as the restore stages.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, cast

from tasks.components.postgres_compare import compare
from tasks.components.postgres_plain import Script, compare_rows, is_wanted
from tasks.components.postgres_script import read_script
from tasks.components.postgres_swap import Swap, alter_database, exists
from tasks.components.psql import ProcessGroup, Server, Session, Statement, identifier, statements
from workers.component import Part, Restore
from workers.errors import Permanent
from workers.runtime import Runtime, run

log = logging.getLogger(__name__)

LOADS = 4
"""Databases that are loaded at the same time."""

CREATION = (
    'tee "$1" | "$2/pg_restore" --create --schema-only --table="$3" --file=-'  # tee ends when pg_restore does
)
MAKE_FOLDER = 'umask 077 && rm -rf "$1" && mkdir "$1"'
SUBSCRIPTIONS = """
SELECT subname FROM pg_catalog.pg_subscription
WHERE subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
"""


@dataclass(frozen=True)
class Staging:
    """The staging of one restore on one server."""

    server: Server
    swap: Swap
    restore: Restore
    folder: str
    """Where the server is; for the heads of dumps."""
    jobs: int
    targets: Mapping[str, str]
    """The names that restored databases get, where they are not those that were backed up."""

    def stage(
        self, dumps: Mapping[str, Part], scripts: Sequence[Part], chosen: Sequence[str] | None
    ) -> dict[str, Any]:
        """Restore and compare what is not staged yet; return what was compared, by database."""
        with self.swap.session() as session:
            done = self.swap.verified(session)
        waiting = {name: part for name, part in dumps.items() if self.target(name) not in done}
        self._shell(MAKE_FOLDER)
        try:
            with self.swap.session() as session:
                staged = {
                    name: self.swap.create_database(session, self.target(name), self._creation(part))
                    for name, part in waiting.items()
                }
            found = self._load_all(staged, waiting, scripts, chosen, done)
        finally:
            self.remove_folder()
        self.swap.end_staging()
        return found

    def target(self, database: str) -> str:
        return self.targets.get(database, database)

    def remove_folder(self) -> None:
        """Remove what is kept where the server is."""
        self._shell('rm -rf "$1"')

    def _load_all(
        self,
        staged: Mapping[str, str],
        waiting: Mapping[str, Part],
        scripts: Sequence[Part],
        chosen: Sequence[str] | None,
        done: set[str],
    ) -> dict[str, Any]:
        group = ProcessGroup(self.server.runtime)
        server = dataclasses.replace(self.server, runtime=cast("Runtime", group))
        found: dict[str, Any] = {}
        with ThreadPoolExecutor(LOADS) as pool:
            try:
                futures = [
                    pool.submit(self._load_dump, server, name, staged[name], part)
                    for name, part in waiting.items()
                ]
                futures += [pool.submit(self._load_script, server, part, chosen, done) for part in scripts]
                for future in as_completed(futures):
                    found |= future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                group.kill()
                raise
        return found

    # -- dumps --------------------------------------------------------------------------------------------------

    def _creation(self, part: Part) -> list[Statement]:
        """Return the statements that create the database of a dump, its own properties only; and keep the head.

        Encoding, locale, owner, rights, settings, comment and connection limit are taken from the dump: ``pg_restore
        --create`` with the name of a table that is in no dump writes nothing but that, in the words of the server's
        own version, and reads no more than the head. That holds for any dump, whoever made it, which a list of
        catalogue columns would not.
        """
        arguments = [self._head(part), self.server.tools, f"none_{uuid.uuid4().hex}"]
        argv = ["sh", "-c", f"umask 077; {CREATION}", "sh", *arguments]
        script = self.server.run(argv, chunks=self.restore.read(part), reads_all=False)
        return statements(script.decode(errors="surrogateescape"))

    def _head(self, part: Part) -> str:
        return f"{self.folder}/{self.restore.parts.index(part)}"

    def _load_dump(self, server: Server, database: str, staged: str, part: Part) -> dict[str, Any]:
        into = server.argv("pg_restore", staged, "--exit-on-error")
        server.run([*into, "--section=pre-data", "--section=data"], chunks=self.restore.read(part))
        server.run([*into, "--section=post-data", f"--jobs={self.jobs}", self._head(part)])
        with server.session(staged) as session:
            session.execute("ANALYZE")
            found = compare(self.server, session, database, part.holds)
            _warn_of_subscriptions(session, database)
        self.swap.note_verified(self.target(database))
        return {database: found}

    # -- scripts ------------------------------------------------------------------------------------------------

    def _load_script(
        self, server: Server, part: Part, chosen: Sequence[str] | None, done: set[str]
    ) -> dict[str, Any]:
        script = Script(read_script(self.restore.read(part)), server)
        found: dict[str, Any] = {}
        seen: list[str] = []
        if (only := part.holds.get("database")) is not None:
            script.following = str(only)
        else:
            script.read_head()
            self.swap.create_roles(script.roles)
        while (database := script.following) is not None:
            if database in seen:
                raise Permanent(f"{part.name} comes back to the database {database}, which no dump does")
            seen.append(database)
            if self.target(database) in done or not is_wanted(database, chosen):
                for _ in script.read_database():
                    pass
                rows = sum(script.counts.values())
                if rows and chosen is None and not is_wanted(database, chosen):
                    log.warning("%s: the %d rows of database %s are not restored", part.name, rows, database)
            else:
                found[database] = self._load_database(server, script, database)
        if missing := [name for name in chosen or () if name not in seen]:
            raise Permanent(f"{part.name} holds no database {', '.join(missing)}; it holds {', '.join(seen)}")
        if not found and not done:
            raise Permanent(f"{part.name} holds no database to restore; it holds {', '.join(seen) or 'none'}")
        return found

    def _load_database(self, server: Server, script: Script, database: str) -> dict[str, Any]:
        target = self.target(database)
        creation = script.properties_of(database)
        if not any(statement.starts("CREATE", "DATABASE") for statement in creation):
            creation = self._like_live(database)
        recorded = next(s.after("DATABASE") for s in creation if s.starts("CREATE", "DATABASE"))
        with self.swap.session() as session:
            staged = self.swap.create_database(session, target, creation)
        server.run(server.script_argv(staged), chunks=script.read_database())
        with self.swap.session() as session:
            alter_database(session, str(recorded), staged, script.properties_of(database))
        with server.session(staged) as session:
            session.execute("ANALYZE")
            found = compare_rows(session, database, script.counts)
            _warn_of_subscriptions(session, database)
        self.swap.note_verified(target)
        return found

    def _like_live(self, database: str) -> list[Statement]:
        """Return statements that create a database like the live one; without one, as the server does by default."""
        with self.swap.session() as session:
            if not exists(session, database):
                return statements(f"CREATE DATABASE {identifier(database)} TEMPLATE template0;")
        dump = self.server.argv("pg_dump", database, "--format=custom", "--schema-only", self.server.patience)
        tools = f"{self.server.tools}/pg_restore"
        nothing = f"--table=none_{uuid.uuid4().hex}"
        argv = [tools, "--create", "--schema-only", nothing, "--file=-"]
        script = self.server.run(argv, chunks=self.server.stream(dump), reads_all=False)
        return statements(script.decode(errors="surrogateescape"))

    def _shell(self, script: str) -> None:
        run(self.server.runtime, ["sh", "-c", script, "sh", self.folder])


def _warn_of_subscriptions(session: Session, database: str) -> None:
    for row in session.rows(SUBSCRIPTIONS):
        log.warning(
            "database %s: the subscription %s is restored disabled, so that it takes nothing before somebody has "
            "looked; ALTER SUBSCRIPTION … ENABLE lets it go on",
            database,
            row["subname"],
        )
