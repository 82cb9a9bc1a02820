"""The catalogue: runs, their steps, and the artifacts they made. Only control workers write it; times are UTC."""

from workers.catalog.artifacts import add_artifact, drop_artifact, list_artifacts
from workers.catalog.copies import add_copy, drop_copy, list_copies
from workers.catalog.database import session
from workers.catalog.ledger import LEVELS, Proof, add_verification, list_verifications, proofs
from workers.catalog.models import (
    RUN_ID_FORMAT,
    Artifact,
    Copy,
    Kind,
    Run,
    State,
    Step,
    UTCDateTime,
    Verification,
    now,
)
from workers.catalog.runs import (
    BESIDE_NO_RESTORE,
    enter_phase,
    find_scheduled,
    finish_run,
    get_run,
    list_runs,
    note,
    open_run,
    save_step,
    steps_of,
)

__all__ = [
    "BESIDE_NO_RESTORE",
    "LEVELS",
    "RUN_ID_FORMAT",
    "Artifact",
    "Copy",
    "Kind",
    "Proof",
    "Run",
    "State",
    "Step",
    "UTCDateTime",
    "Verification",
    "add_artifact",
    "add_copy",
    "add_verification",
    "drop_artifact",
    "drop_copy",
    "enter_phase",
    "find_scheduled",
    "finish_run",
    "get_run",
    "list_artifacts",
    "list_copies",
    "list_runs",
    "list_verifications",
    "note",
    "now",
    "open_run",
    "proofs",
    "save_step",
    "session",
    "steps_of",
]
