"""What the catalogue knows of the archives."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import col, select

from workers.catalog.database import session
from workers.catalog.models import Artifact


def list_artifacts(*, deleting: bool = False) -> Sequence[Artifact]:
    """Return the archives, the newest first; or those whose deletion was begun, which are no backups any more."""
    query = select(Artifact).where(Artifact.deleting == deleting)
    with session() as catalog:
        return catalog.exec(query.order_by(col(Artifact.created).desc())).all()


def add_artifact(artifact: Artifact) -> None:
    """Record an archive; recording it again changes nothing."""
    with session() as catalog:
        catalog.merge(artifact)


def begin_deletion(key: str) -> None:
    """Note that an archive is being deleted, so that nothing takes it for a backup; an unknown one is no error."""
    with session() as catalog:
        if artifact := catalog.get(Artifact, key):
            artifact.deleting = True


def drop_artifact(key: str) -> None:
    """Forget an archive; one that is not known is no error."""
    with session() as catalog:
        if artifact := catalog.get(Artifact, key):
            catalog.delete(artifact)
