"""PostgreSQL: a custom-format dump of each database, with the rows of each table counted in the dump's own snapshot,
and the roles and other globals; or all as plain SQL. A restore stands beside the live databases, is compared, and
swapped in by name.

PostgreSQL 13 or later.
"""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import Field

from tasks.components.postgres_base import BASE, base_by_hand, base_source, check_base
from tasks.components.postgres_cluster import IDENTIFIER
from tasks.components.postgres_dump import DUMP, GLOBALS, PLAIN, check_dump, dump, dump_globals, expected_size
from tasks.components.postgres_incremental import newest_parent
from tasks.components.postgres_options import BackupOptions, RestoreOptions
from tasks.components.postgres_plain import dump_all
from tasks.components.postgres_preflight import NO_WAL, preflight_incremental, preflight_server, preflight_wal
from tasks.components.postgres_recovery import Recovery, is_base
from tasks.components.postgres_restore import DumpRestore, holds_dumps
from tasks.components.postgres_script import read_script
from tasks.components.postgres_swap import OWN_DATABASES
from tasks.components.psql import OPTIONS, Server, Session
from workers.catalog import Artifact
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
from workers.errors import Permanent
from workers.runtime import Runtime, open_runtime
from workers.secret import Secret


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
    checksums: bool = False
    """Whether a backup digests the content of every table, too, which reads everything twice; a restore compares them."""
    jobs: int = Field(default=4, ge=1, le=64)
    """Connections that make the indexes and constraints of one database at the same time when it is restored."""
    maintenance_database: str = "postgres"
    """Where to connect for what concerns no single database."""
    data_dir: PurePosixPath | None = None
    """The data folder, for recoveries; in containers by default ``/var/lib/postgresql/data``."""
    wal_archive: PurePosixPath | None = None
    """The folder, where the server is, into which its ``archive_command`` or ``pg_receivewal`` puts WAL. ``None``: WAL is not
    collected."""
    incremental: bool = False
    """Whether base backups between the full ones are made, of what changed (``schedule.incremental``); PostgreSQL 17 and later,
    with ``summarize_wal`` on."""
    wal_timeout: float = Field(default=120, gt=0)
    """Seconds that a collection waits for the server to archive its newest segment."""
    wal_slot: str | None = Field(default=None, pattern=r"^[a-z0-9_]{1,63}$")
    """The replication slot of a ``pg_receivewal``, which is watched; see compose/README.md."""

    def secrets(self) -> dict[str, Secret]:
        return {} if self.password is None else {"password": self.password}

    # -- backup -------------------------------------------------------------------------------------------------

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Return a source for the globals and one for each database, one of plain SQL, or that of a base backup.

        Raises ``Permanent`` when a database is missing.
        """
        asked = BackupOptions.model_validate(dict(options))
        server = self.server(self.maintenance_database)
        if asked.base:
            return [base_source(server, self.name, self.maintenance_database, asked)]
        with server.session(self.maintenance_database) as session:
            there = self._there(session)
            names = self._names(there, asked.databases or self.databases)
            held = {
                "server_version": server.version,
                "system_identifier": session.value(IDENTIFIER),
            }
        if asked.format == "dumpall":
            return [self._plain(server, [name for name in there if name not in names], held)]
        roles = {**held, "roles": []}
        opened = dump_globals(server, self.maintenance_database, roles)
        sources = [Source("globals", part_name(f"{self.name}.globals.sql"), GLOBALS, opened, holds=roles)]
        for name in names:
            holds = {"database": name, **held}
            sources.append(
                Source(
                    name,
                    part_name(f"{self.name}.{name}.dump"),
                    DUMP,
                    dump(server, name, holds, checksums=self.checksums),
                    expected=expected_size(server, name),
                    holds=holds,
                )
            )
        return sources

    def completed(self, options: Mapping[str, Any], artifacts: Sequence[Artifact]) -> Mapping[str, Any]:
        """Name the parent of an incremental base backup: the newest one that all archives are there of."""
        if options.get("base") != "incremental":
            return options
        parent = newest_parent(self.name, BASE, artifacts)
        return {**options, "parent": parent.model_dump(mode="json") if parent else None}

    def _there(self, session: Session) -> dict[str, bool]:
        """Return the databases that can be connected to, and whether they are among all that a user made."""
        rows = session.rows(
            "SELECT datname, NOT datistemplate AND datname <> 'postgres' AS made FROM pg_catalog.pg_database "
            f"WHERE datallowconn AND datname NOT IN ({OWN_DATABASES}) ORDER BY datname"
        )
        return {row["datname"]: row["made"] for row in rows}

    def _names(self, there: Mapping[str, bool], wanted: Literal["*"] | Sequence[str]) -> list[str]:
        if wanted == "*":
            return [name for name, made in there.items() if made]
        if missing := [name for name in wanted if name not in there]:
            raise Permanent(
                f"{self.place}: no database {', '.join(map(repr, missing))} that can be connected to"
            )
        return list(dict.fromkeys(wanted))

    def _plain(self, server: Server, exclude: Sequence[str], held: Mapping[str, Any]) -> Source:
        holds = dict(held)
        name = part_name(f"{self.name}.all_databases.sql")
        opened = dump_all(server, self.maintenance_database, exclude, holds)
        return Source("all databases", name, PLAIN, opened, holds=holds, codec="gzip")

    # -- restore ------------------------------------------------------------------------------------------------

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        way = self._way(Restore("", parts, lambda _: iter(()), options))
        return [way.would_overwrite()] if isinstance(way, Recovery) else way.would_overwrite()

    def by_hand(self, parts: Sequence[Part]) -> str:
        if bases := [part for part in parts if part.kind == BASE]:
            return base_by_hand(bases[0])
        tools = ["docker", "exec", "-i", self.container] if self.container else []
        login = [f"--username={self.user}"]
        login += [f"--host={self.address}"] if self.address else []
        login += [f"--port={self.port}"] if self.port else []
        connect = [*login, f"--dbname={self.maintenance_of(parts)}"]
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
        lines = []
        for part in sorted(parts, key=lambda part: part.kind == DUMP):
            if part.kind == PLAIN:
                lines.append(
                    f"# Drop those of its databases that are there first: {part.name} only makes them"
                )
            lines.append(f"{plain_command(part)} | {shlex.join([*tools, *restores[part.kind == DUMP]])}")
        return (
            "Stop what uses the databases: each is dropped and made again, with its owner, rights and settings. Roles come\n"
            "first; `role … already exists` is fine there. The tools must be of the server's version or later; they ask\n"
            "for a password or take it from `PGPASSWORD`. With the roles come their passwords of then, that of "
            f"`{self.user}` as well.\n\n```sh\n" + "\n".join(lines) + "\n```\n"
        )

    def stage(self, restore: Restore) -> None:
        self._way(restore).stage()

    def swap(self, restore: Restore) -> None:
        self._way(restore).swap()

    def revert(self, restore: Restore) -> None:
        self._way(restore).revert()

    def settle(self, restore: Restore) -> None:
        self._way(restore).settle()

    def rehearse(self, restore: Restore) -> dict[str, Any]:
        """Restore every database beside the live ones, compare, and drop them again; return what was compared.

        Roles that are missing exist meanwhile, without login or rights, so that owners resolve. A base backup is recovered in a
        scratch folder beside the live data, which has one name, so that what a killed rehearsal left is found.
        """
        if is_base(restore.parts):
            return Recovery(self, replace(restore, run_id="rehearsal")).rehearse()
        way = self._way(restore)
        assert isinstance(way, DumpRestore)  # noqa: S101
        try:
            return {"databases": way.stage(scratch=True)}
        finally:
            way.revert()

    def check(self, part: Part, chunks: Iterator[bytes]) -> None:
        """Compare a base backup with its manifest, have pg_restore read a dump, read SQL as statements; to their end."""
        if part.kind == BASE:
            check_base(chunks, part.holds)
        elif part.kind == DUMP:
            check_dump(self.runtime, self.bin_dir, part, chunks)
        else:
            for _ in read_script(chunks):
                pass

    def _way(self, restore: Restore) -> DumpRestore | Recovery:
        """Return how ``restore`` goes: from dumps, or from a base backup."""
        if is_base(restore.parts):
            if not RestoreOptions.model_validate(dict(restore.options)).everything:
                raise Permanent(
                    f"{self.place}: the archive holds a base backup, which is restored as a whole"
                )
            return Recovery(self, restore)
        if not holds_dumps(restore.parts):
            raise Permanent(f"{self.place}: the archive holds neither dumps nor SQL nor a base backup")
        return DumpRestore(self, restore)

    # -- helpers ------------------------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether the server is where its programs are run."""
        return self.address is None or self.address.startswith(("/", "127.", "localhost", "::1"))

    @property
    def place(self) -> str:
        """Its name and where it is, for messages."""
        where = f"container {self.container}" if self.container else (self.address or "this host")
        return f"{self.name} ({where})"

    def preflight(self) -> list[Finding]:
        server = self.wal_server()
        with server.session(self.maintenance_database) as session:
            found = preflight_server(session, self.wal_slot)
            found += preflight_incremental(session) if self.incremental else []
            if self.wal_archive is None:
                return [*found, NO_WAL]
            return found + preflight_wal(session, server.runtime, str(self.wal_archive), self.wal_slot)

    @property
    def wal_name(self) -> str:
        """The name of its lease, and of the mark of its programs, while WAL is collected beside a backup."""
        return f"{self.name}.wal"

    def wal_server(self) -> Server:
        """Return the server, with the programs that a collection starts marked as its own."""
        return self.server(self.maintenance_database, open_runtime(self, component=self.wal_name))

    def server(self, database: str, runtime: Runtime | None = None) -> Server:
        """Connect to ``database`` and return the server; see `Server.find`."""
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

    def maintenance_of(self, parts: Sequence[Part]) -> str:
        """Return a database to connect to while those of ``parts`` may be closed or renamed."""
        restored = {part.holds.get("database") for part in parts}
        return "template1" if self.maintenance_database in restored else self.maintenance_database
