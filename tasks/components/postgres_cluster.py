"""What the server says of itself before a restore may touch it: which cluster it is, and what stands in the way."""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

from collections.abc import Iterable, Sequence

from tasks.components.postgres_compare import tables_of
from tasks.components.postgres_swap import OWN_DATABASES
from tasks.components.psql import Server, Session, literal, major_of
from workers.component import Part
from workers.errors import CommandFailed, Permanent
from workers.runtime import run

IDENTIFIER = "(SELECT system_identifier::text FROM pg_catalog.pg_control_system())"
"""A number that initdb gives a cluster; its copies and standbys have the same."""


def require_same_cluster(server: Server, session: Session, place: str, parts: Iterable[Part]) -> None:
    """Refuse a cluster that is not the one backed up, unless it holds no table at all, as a new one does.

    The backups of other makers have no record of the cluster, and are not refused.
    """
    recorded = {str(part.holds["system_identifier"]) for part in parts if "system_identifier" in part.holds}
    found = str(session.value(IDENTIFIER))
    if not recorded - {found}:
        return
    databases = session.rows(
        "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate "
        f"AND datname NOT IN ({OWN_DATABASES}) ORDER BY datname"
    )
    for row in databases:
        with server.session(row["datname"]) as other:
            tables = len(tables_of(other))
        if tables:
            raise Permanent(
                f"{place} is another cluster than the one backed up: its system identifier is {found}, the backup's "
                f"{', '.join(sorted(recorded))}; and it is in use: database {row['datname']} has {tables} tables. Is the "
                "restore aimed at the wrong server? If this one was set up anew in its place, restore this component "
                "with --onto-new-cluster (option new_cluster)"
            )


def require_replaceable(session: Session, place: str, databases: Sequence[str]) -> None:
    """Refuse to replace databases with transactions that are prepared, or with subscriptions that are enabled.

    Neither can be put aside: PostgreSQL renames no database with prepared transactions, and an enabled subscription
    would go on taking from its publisher what the restored one is to get.
    """
    names = ", ".join(map(literal, databases)) or "NULL"
    for row in session.rows(
        f"SELECT gid, database FROM pg_catalog.pg_prepared_xacts WHERE database IN ({names})"
    ):
        raise Permanent(
            f"{place}: database {row['database']} has the prepared transaction {row['gid']!r}; "
            "COMMIT PREPARED or ROLLBACK PREPARED it first"
        )
    subscriptions = (
        "SELECT subname, datname FROM pg_catalog.pg_subscription JOIN pg_catalog.pg_database d ON d.oid = subdbid "
        f"WHERE subenabled AND datname IN ({names})"
    )
    for row in session.rows(subscriptions):
        raise Permanent(
            f"{place}: database {row['datname']} has the subscription {row['subname']}, which is enabled; "
            "ALTER SUBSCRIPTION … DISABLE it first. Its slot on the publisher stays for the restored one"
        )


def require_fit(server: Server, session: Session, place: str, parts: Sequence[Part]) -> None:
    """Refuse dumps of a later version than the server's, or of databases with a tablespace that it does not have."""
    there = {row["spcname"] for row in session.rows("SELECT spcname FROM pg_catalog.pg_tablespace")}
    for part in parts:
        made_by = str(part.holds.get("server_version", "0"))
        if major_of(made_by) > server.major:
            raise Permanent(f"{part.name} is of PostgreSQL {made_by}, {place} has {server.version}")
        for name, location in part.holds.get("tablespaces", {}).items():
            if name not in there:
                raise Permanent(
                    f"{place}: {part.name} needs the tablespace {name}, which was at {location}; make a folder for it "
                    f"where the server is, and CREATE TABLESPACE first"
                )


def require_room(server: Server, session: Session, place: str, parts: Sequence[Part]) -> None:
    """Refuse what cannot fit beside the live databases, where the data folder can be seen."""
    needed = sum(int(part.holds.get("size", 0)) for part in parts)
    folder = str(session.value("current_setting('data_directory')"))
    try:
        lines = run(server.runtime, ["df", "--output=avail", "-B1", "--", folder]).splitlines()
    except CommandFailed:
        return
    available = int(lines[-1])
    if needed > available:
        raise Permanent(
            f"{place}: {needed:,} bytes are needed beside the live databases, {folder} has {available:,} free"
        )
