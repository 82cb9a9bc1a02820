"""What the catalogue knows of the archives."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import col, select

from workers.catalog.database import session
from workers.catalog.models import Artifact


def list_artifacts() -> Sequence[Artifact]:
    """Return the archives, the newest first."""
    with session() as catalog:
        return catalog.exec(select(Artifact).order_by(col(Artifact.created).desc())).all()


def add_artifact(artifact: Artifact) -> None:
    """Record an archive; recording it again changes nothing."""
    with session() as catalog:
        catalog.merge(artifact)


def drop_artifact(key: str) -> None:
    """Forget an archive; one that is not known is no error."""
    with session() as catalog:
        if artifact := catalog.get(Artifact, key):
            catalog.delete(artifact)
