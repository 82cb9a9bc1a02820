"""The ledger: what was proven of each archive, when, how deeply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlmodel import col, delete, select

from workers.catalog.artifacts import list_artifacts
from workers.catalog.database import session
from workers.catalog.models import Artifact, Verification

LEVELS = ("exists", "checksum", "structure", "restore")
"""The levels of verification, each deeper than the one before it."""
PARTIAL = "partial"
"""Key in the details of what was proven of some of an archive only, which says nothing of the whole."""


@dataclass(frozen=True)
class Proof:
    """How an archive stands: the deepest level proven since a verification last failed, or what failed last."""

    level: str | None
    taken: datetime
    damaged: bool = False
    wrong: tuple[str, ...] = ()


def list_sound_artifacts() -> list[Artifact]:
    """Return the archives of the main store that are not known to be damaged, the newest first."""
    standing = proofs(list_verifications())
    damaged = {key for (table, key), proof in standing.items() if table == "store" and proof.damaged}
    return [artifact for artifact in list_artifacts() if artifact.key not in damaged]


def add_verification(verification: Verification) -> None:
    """Write a line of the ledger; a second one of the same run and level changes nothing."""
    with session() as catalog:
        same = select(Verification.id).where(
            Verification.run_id == verification.run_id, Verification.level == verification.level
        )
        if catalog.exec(same).first() is None:
            catalog.add(verification)


def list_verifications(key: str | None = None) -> Sequence[Verification]:
    """Return the lines of the ledger, of one archive or of all, the oldest first."""
    query = select(Verification).order_by(col(Verification.taken), col(Verification.id))
    with session() as catalog:
        return catalog.exec(query.where(Verification.key == key) if key else query).all()


def drop_verifications(key: str, store: str) -> None:
    """Forget what was proven of an archive that is gone from a store (a table of the settings)."""
    with session() as catalog:
        catalog.exec(
            delete(Verification).where(col(Verification.key) == key, col(Verification.store) == store)
        )


def proofs(lines: Iterable[Verification]) -> dict[tuple[str, str], Proof]:
    """Return how each archive stands, by its store (a table of the settings) and key, of ``lines`` the oldest first."""
    found: dict[tuple[str, str], Proof] = {}
    for line in lines:
        if line.details.get(PARTIAL):
            continue
        before = found.get((line.store, line.key))
        if not line.ok:
            wrong = tuple(line.details.get("wrong", ()))
            proof = Proof(None, line.taken, damaged=True, wrong=wrong)
        elif before and before.level and LEVELS.index(before.level) > LEVELS.index(line.level):
            proof = before
        else:
            proof = Proof(line.level, line.taken)
        found[line.store, line.key] = proof
    return found
