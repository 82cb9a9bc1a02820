"""The schema's version: a catalogue of an earlier one is upgraded in place when it is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, inspect, text

from workers.errors import CatalogError

NEWEST = "0003"
"""The version that this code reads and writes: the revision of the last module of ``migrations.versions``."""
BEFORE_VERSIONS = "0001"
"""What a catalogue with tables, but without a version is."""
LOCK = 0x61696D62
"""Number of the PostgreSQL advisory lock under which the schema is changed."""


def upgrade(engine: Engine) -> None:
    """Bring the catalogue to the newest schema, an empty one too: whole, or not at all.

    Of workers that start at once, one does it and the others wait. Raises ``CatalogError`` for a catalogue that a
    newer version of this system has upgraded already.
    """
    with _alone(engine) as connection:
        version = _version(connection)
        if version == NEWEST:
            return
        if version and version > NEWEST:
            raise CatalogError(
                f"the catalogue has schema {version}, which a newer version of ai-micro-backup made; this one knows "
                f"schemas up to {NEWEST}: install the newer version here, too"
            )
        _migrate(connection, version)


def _migrate(connection: Connection, version: str | None) -> None:
    from alembic import command  # takes longer to import than a command that finds nothing to upgrade
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "workers.catalog:migrations")
    if version == BEFORE_VERSIONS:
        command.stamp(config, version)
    command.upgrade(config, NEWEST)


def _version(connection: Connection) -> str | None:
    tables = inspect(connection)
    if tables.has_table("alembic_version"):
        version: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return version
    return BEFORE_VERSIONS if tables.has_table("run") else None


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A transaction beside which no other changes the schema, committed at the end."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # SQLite changes a column by making the table anew, which must not delete what refers to the old one; this
            # cannot be said inside a transaction. The transaction itself begins with the right to write.
            _foreign_keys(connection, on=False)
        try:
            with connection.begin():
                if engine.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
                yield connection
        finally:
            if engine.dialect.name == "sqlite":
                _foreign_keys(connection, on=True)


def _foreign_keys(connection: Connection, *, on: bool) -> None:
    cursor = connection.connection.cursor()
    cursor.execute(f"PRAGMA foreign_keys={'ON' if on else 'OFF'}")
    cursor.close()
