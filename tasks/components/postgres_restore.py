"""A restore from dumps or plain SQL: databases staged beside the live ones, compared, and swapped in by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tasks.components.postgres_cluster import (
    IDENTIFIER,
    require_fit,
    require_replaceable,
    require_room,
    require_same_cluster,
)
from tasks.components.postgres_compare import TABLES
from tasks.components.postgres_dump import DUMP, GLOBALS, PLAIN
from tasks.components.postgres_options import RestoreOptions
from tasks.components.postgres_plain import roles_of
from tasks.components.postgres_stage import Staging
from tasks.components.postgres_swap import NAME_BYTES, Swap, exists
from tasks.components.psql import Server, Session, Statement, statements
from workers.component import Part, Restore
from workers.errors import Permanent

if TYPE_CHECKING:
    from tasks.components.postgres import Component

LIVE = f"""
SELECT count(*) AS tables, coalesce(sum(greatest(c.reltuples, pg_stat_get_live_tuples(c.oid), 0)), 0)::bigint AS rows,
       pg_database_size(current_database()) AS size
FROM ({TABLES}) AS t JOIN pg_catalog.pg_class c ON c.oid = t.name::regclass
"""  # noqa: S608  a query of ours


@dataclass(frozen=True)
class DumpRestore:
    """One restore of one component from dumps or SQL. Its four steps keep the promises of `BaseComponent`."""

    component: Component
    restore: Restore

    @cached_property
    def options(self) -> RestoreOptions:
        return RestoreOptions.model_validate(dict(self.restore.options))

    @cached_property
    def server(self) -> Server:
        return self.component.server(self.maintenance)

    @property
    def maintenance(self) -> str:
        """A database to connect to while those of the parts may be closed or renamed."""
        return self.component.maintenance_of(self.restore.parts)

    @property
    def place(self) -> str:
        return self.component.place

    @cached_property
    def databases(self) -> dict[str, Part]:
        """The dumps that are asked for, by their databases. Raises ``Permanent`` for one that is not there."""
        dumps = {_database(part): part for part in self.restore.parts if part.kind == DUMP}
        asked = self.options.databases
        if asked is None:
            return dumps
        if not self.scripts and (missing := [name for name in asked if name not in dumps]):
            raise Permanent(
                f"{self.component.name}: the archive holds no database {', '.join(missing)}; it holds {', '.join(dumps)}"
            )
        return {name: part for name, part in dumps.items() if name in asked}

    @property
    def scripts(self) -> list[Part]:
        return [part for part in self.restore.parts if part.kind == PLAIN]

    @property
    def beside(self) -> Swap:
        return Swap(self.server, self.restore.run_id, self.maintenance, self.component.user)

    def would_overwrite(self) -> list[str]:
        """Return the lines of the plan. Raises ``Permanent`` for a restore that would be refused."""
        asked = self.options
        with self.server.session(self.maintenance) as session:
            self._require_possible(session)
            there = {row["datname"] for row in session.rows("SELECT datname FROM pg_catalog.pg_database")}
            roles = {row["rolname"] for row in session.rows("SELECT rolname FROM pg_catalog.pg_roles")}
        lines = []
        for part in self.restore.parts:
            recorded = set(part.holds.get("roles", roles))
            if part.kind in (GLOBALS, PLAIN) and asked.everything:
                lines.append(
                    f"roles on {self.place}: attributes, passwords, settings and memberships of "
                    f"{len(roles & recorded)} would be set to those of {_when(part)}"
                )
            elif part.kind in (GLOBALS, PLAIN):
                lines.append(
                    f"roles on {self.place}: {len(recorded - roles)} that are missing would be created"
                )
            if part.kind == PLAIN:
                held = part.holds.get("databases", part.holds.get("database", ()))
                names = ", ".join(asked.databases or ([held] if isinstance(held, str) else held))
                into = f"restored as {asked.into}" if asked.into else "replaced"
                lines.append(
                    f"databases on {self.place} from {part.name}: {names or 'each that it holds'} would be {into}"
                )
        for database, part in self.databases.items():
            if asked.into:
                now = f"stays as it is; {asked.into} would be created as"
            elif database not in there:
                now = "does not exist yet, would be created as"
            else:
                now = f"{self._live(database)}, would be replaced by"
            lines.append(f"database {database} on {self.place}: {now} the one of {_when(part)}")
        return lines

    # -- the steps ----------------------------------------------------------------------------------------------

    def stage(self, *, scratch: bool = False) -> dict[str, Any]:
        """Restore each database under another name with owners and rights, and compare what its tables hold.

        Returns what was compared, by database. ``scratch``: nothing of it shall replace anything.
        """
        swap = self.beside
        with self.server.session(swap.maintenance) as session:
            if not exists(session, swap.journal):
                dumps = list(self.databases.values())
                if scratch:
                    require_fit(self.server, session, self.place, dumps)
                else:
                    self._require_possible(session)
                if self.component.is_here:
                    require_room(self.server, session, self.place, dumps)
        if swap.begin() != "staging":
            return {}
        if (record := self._record()) is not None:
            swap.create_roles(record)
        found = self._staging().stage(self.databases, self.scripts, self.options.databases)
        self.restore.found["databases"] = found
        return found

    def swap(self) -> None:
        self.beside.swap(self._record(), everything=self.options.everything, replace=self.options.overwrites)

    def revert(self) -> None:
        self.beside.revert()
        self._staging().remove_folder()

    def settle(self) -> None:
        self.beside.settle()

    # -- helpers ------------------------------------------------------------------------------------------------

    def _staging(self) -> Staging:
        component, restore = self.component, self.restore
        with self.server.session(self.maintenance) as session:
            cluster = session.value(IDENTIFIER)  # two of one host may have components of the same name
        folder = f"/tmp/ai-micro-backup.{component.name}.{cluster}.{restore.run_id}"  # noqa: S108  made by `mkdir`
        targets: Mapping[str, str] = {}
        if self.options.into:
            targets = {next(iter(self.options.databases or self.databases)): self.options.into}
        return Staging(self.server, self.beside, restore, folder, component.jobs, targets)

    def _require_possible(self, session: Session) -> None:
        """Raise ``Permanent`` for what is known to fail, or to hit what nobody meant to."""
        asked = self.options
        if asked.recovers:
            raise Permanent(f"{self.place}: the archive holds dumps; a recovery begins with a base backup")
        require_fit(self.server, session, self.place, list(self.databases.values()))
        if asked.into is not None:
            if len(asked.databases or self.databases) != 1:
                raise Permanent(f"into={asked.into!r} is for one database; name it with databases")
            if len(asked.into.encode()) > NAME_BYTES:
                raise Permanent(f"into={asked.into!r} is longer than the {NAME_BYTES} bytes of a name")
            if exists(session, asked.into):
                raise Permanent(f"{self.place}: there is a database {asked.into}; restore into another name")
            return
        if not asked.new_cluster:
            require_same_cluster(self.server, session, self.place, self.restore.parts)
        scripted = [name for part in self.scripts for name in part.holds.get("databases", ())]
        require_replaceable(session, self.place, [*self.databases, *(asked.databases or scripted)])

    def _live(self, database: str) -> str:
        with self.server.session(database) as session:
            live = session.rows(LIVE)[0]
        return f"{live['tables']} tables, about {live['rows']:,} rows now ({live['size'] / 1e6:,.1f} MB)"

    def _record(self) -> list[Statement] | None:
        """Return the statements about roles, ``None`` when they are not among the parts."""
        record: list[Statement] | None = None
        for part in self.restore.parts:
            if part.kind == GLOBALS:
                script = b"".join(self.restore.read(part)).decode()
                record = [*(record or []), *statements(script)]
            elif part.kind == PLAIN and "database" not in part.holds:
                record = [*(record or []), *roles_of(self.restore.read(part))]
        return record


def holds_dumps(parts: Sequence[Part]) -> bool:
    """Say whether there is anything among ``parts`` that a `DumpRestore` restores."""
    return any(part.kind in (DUMP, GLOBALS, PLAIN) for part in parts)


def _when(part: Part) -> str:
    return f"{part.started:%Y-%m-%d %H:%M:%S} UTC"


def _database(part: Part) -> str:
    if not isinstance(name := part.holds.get("database"), str):
        raise Permanent(f"{part.name} does not say which database it holds")
    return name
