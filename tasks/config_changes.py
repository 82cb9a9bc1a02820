"""What changed in the configuration from one archive to another, and since the backup before."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from tasks import archive
from tasks.components.config_diff import Version, diff, read_versions, recorded_versions
from workers import catalog
from workers.catalog import Artifact, Step
from workers.component import Part
from workers.errors import BackupError, Permanent
from workers.settings import get_settings
from workers.storage import Store, open_store

log = logging.getLogger(__name__)
LARGEST = 1_000_000_000
"""Bytes of an archive that is read for a difference nobody asked for; archives of configuration alone have some kB."""
LINES = 200
"""How many lines a run records; of more, the number."""


def versions_in(store: Store, key: str, component: str) -> dict[str, Version]:
    """Return the configuration files of ``component`` in an archive. Raises ``Permanent`` when it holds none."""
    return read_versions(archive.read_part(store, key, _part_in(store, key, component)))


def record_changes(run_id: str, steps: Sequence[Step]) -> None:
    """Note in a run what changed in the configuration that its ``steps`` backed up, by component.

    ``since`` is an archive that holds what the newest backup before held, ``lines`` are those of `diff`. Where that
    cannot be read (no private key is here, for example), they name files alone. A backup never fails by this.
    """
    store = open_store(get_settings().store)
    changes = {}
    for part in (Part.model_validate(part) for step in steps for part in (step.result or {})["parts"]):
        if before := _before(run_id, part):
            lines = _lines(store, run_id, part, before)
            rest = [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
            changes[part.component] = {"since": before.key, "lines": lines[:LINES] + rest}
    if changes:
        catalog.note(run_id, outcome={"changes": changes})


def _before(run_id: str, part: Part) -> Artifact | None:
    """Return an archive with the version of the newest backup before; ``None`` where that is the same, or none."""
    new, old = part.holds.get("content_sha256"), None
    holding: list[Artifact] = []
    for artifact in catalog.list_artifacts() if new else ():
        digest = recorded(artifact, part.component).get("content_sha256")
        if digest and artifact.run_id != run_id:
            old = old or digest
            if digest == old:
                holding.append(artifact)
    if old in (None, new):
        return None
    # One of the configuration alone is read sooner.
    return next((artifact for artifact in holding if artifact.key.startswith(archive.FOLDERS[1])), holding[0])


def recorded(artifact: Artifact, component: str) -> dict[str, Any]:
    """Return what an archive's record says of what it holds of ``component``; nothing when it holds none of it."""
    parts = artifact.details["parts"]
    return next((dict(part["holds"]) for part in parts if part["component"] == component), {})


def _lines(store: Store, run_id: str, part: Part, before: Artifact) -> list[str]:
    try:
        if before.size > LARGEST:
            raise Permanent(f"{before.key} has {before.size:,} bytes")
        stored = store.get(f"parts/{run_id}/{part.name}")
        new = read_versions(archive.plain_chunks(part, stored, part.name))
        return diff(versions_in(store, before.key, part.component), new)
    except SoftTimeLimitExceeded:
        raise
    except BackupError as error:
        reason = str(error)
    except Exception as error:
        log.exception("what changed in %s since %s", part.component, before.key)
        reason = f"unexpected {type(error).__name__}; the worker's log has the details"
    old = recorded_versions(recorded(before, part.component))
    return [f"only files are compared: {reason}", *diff(old, recorded_versions(part.holds))]


def _part_in(store: Store, key: str, component: str) -> Part:
    parts = [part for part in archive.read_metadata(store, key).parts if part.component == component]
    if len(parts) != 1 or parts[0].kind != "config":
        raise Permanent(f"{key} holds no configuration of the component {component}")
    return parts[0]
