"""What the catalogue knows of the copies in the offsite store."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import select

from workers.catalog.database import session
from workers.catalog.models import Copy


def list_copies() -> Sequence[Copy]:
    """Return the verified copies, by key."""
    with session() as catalog:
        return catalog.exec(select(Copy).order_by(Copy.key)).all()


def add_copy(copy: Copy) -> None:
    """Record a copy; a newer one of the same archive takes its place."""
    with session() as catalog:
        catalog.merge(copy)


def drop_copy(key: str) -> None:
    """Forget a copy that is not there any more; one that is not known is no error."""
    with session() as catalog:
        if copy := catalog.get(Copy, key):
            catalog.delete(copy)
