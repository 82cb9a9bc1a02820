"""The catalogue's database, SQLite or PostgreSQL: one engine a process, and transactions on it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event, make_url
from sqlalchemy.exc import IntegrityError as UniqueViolation
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, create_engine

from workers.catalog import schema
from workers.errors import CatalogError
from workers.sections import CatalogSettings
from workers.settings import get_settings


@functools.lru_cache(maxsize=4)
def engine_of(settings: CatalogSettings, _pid: int) -> Engine:
    """Return the engine of a process, its database with the newest schema. Connections must not cross a fork: hence the id."""
    url = make_url(settings.url)
    if settings.password:
        url = url.set(password=settings.password.resolve())
    engine = create_engine(url, pool_pre_ping=True)
    if url.get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # else the driver begins transactions of its own
            connection.execute("PRAGMA busy_timeout=30000")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA foreign_keys=ON")

        @event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            # A transaction that reads first and writes later would fail at once, without waiting, after a writer.
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        schema.upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def session() -> Iterator[Session]:
    """A transaction on the catalogue: committed at the end, rolled back when the block raises.

    Raises ``CatalogError`` when the database refuses or does not answer.
    """
    try:
        engine = engine_of(get_settings().catalog, os.getpid())
        with Session(engine, expire_on_commit=False) as opened, opened.begin():
            yield opened
    except UniqueViolation:
        raise
    except SQLAlchemyError as error:
        raise CatalogError(f"the catalogue failed: {type(error).__name__}: {error.args[0]}") from error
