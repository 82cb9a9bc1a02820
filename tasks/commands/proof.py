"""What `status` and `show` say of how far backups are proven and protected."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape

from workers import catalog
from workers.catalog import Artifact, Proof, Verification
from workers.settings import Settings

DAY = 86400.0


def proof_document(proof: Proof | None, moment: datetime) -> dict[str, Any] | None:
    """Return how an archive stands, as one JSON document; ``None`` when nothing was ever verified."""
    if proof is None:
        return None
    return {
        "level": proof.level,
        "taken": proof.taken.isoformat(),
        "age_seconds": (moment - proof.taken).total_seconds(),
        "damaged": proof.damaged,
        "wrong": list(proof.wrong),
    }


def restored_in_part(lines: Iterable[Verification]) -> list[dict[str, Any]]:
    """Return the restores of some of an archive, which are no proof of the whole, the oldest first."""
    return [
        {
            "taken": line.taken.isoformat(),
            "store": line.store,
            "components": line.details["restored"],
            "options": line.details.get("options", {}),
        }
        for line in lines
        if line.details.get(catalog.PARTIAL)
    ]


def _of_archive(key: str, store: str, proof: Proof, moment: datetime) -> dict[str, Any]:
    return {"archive": key, "store": store, **(proof_document(proof, moment) or {})}


def proven() -> dict[str, Any]:
    """Return the newest archive that was restored, and that was proven at all, and those damaged in any store."""
    from tasks.archive import is_full

    moment, standing = catalog.now(), catalog.proofs(catalog.list_verifications())
    found: dict[str, Any] = {"restored": None, "proven": None, "damaged": []}
    for artifact in catalog.list_artifacts():
        for (store, key), standing_there in standing.items():
            if key == artifact.key and standing_there.damaged:
                found["damaged"].append(_of_archive(key, store, standing_there, moment))
        proof = standing.get(("store", artifact.key))
        if proof is None or proof.damaged:
            continue
        document = _of_archive(artifact.key, "store", proof, moment)
        if is_full(artifact.key) and proof.level in catalog.LEVELS[1:]:
            found["proven"] = found["proven"] or document
            if proof.level == "restore":
                found["restored"] = found["restored"] or document
    return found


def unencrypted(settings: Settings, artifacts: list[Artifact]) -> list[str]:
    """Return a warning for what holds secrets in clear text: the archives to come, and those that are there."""
    warnings = []
    if not settings.encryption.recipients:
        warnings.append(
            "backups of .env files and private keys are not encrypted: name encryption.recipients"
        )
    elif clear := [
        artifact.key
        for artifact in artifacts
        if any(not part.get("encryption") for part in artifact.details.get("parts", ()))
    ]:
        warnings.append(
            f"{len(clear)} archive(s) from before encryption are readable by whoever reads the store"
        )
    return warnings


def show_proven(document: dict[str, Any], out: Console) -> None:
    """Print what `proven` found."""
    for key, words in (("proven", "newest proven"), ("restored", "newest restored")):
        found = document[key]
        if found is None:
            out.print(f"{words}: [red]none[/red]; prove one with: ai-micro-backup verify --level restore")
        else:
            age = found["age_seconds"] / DAY
            name = PurePosixPath(found["archive"]).name
            out.print(f"{words}: {name} by {found['level']}, {age:.1f} d ago", highlight=False)
    for found in document["damaged"]:
        wrong = escape("; ".join(found["wrong"]))
        where = "" if found["store"] == "store" else f" in {found['store']}"
        out.print(f"[red]damaged:[/red] {found['archive']}{where}: {wrong}", highlight=False, soft_wrap=True)
