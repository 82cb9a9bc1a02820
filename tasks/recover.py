"""Recoveries of PostgreSQL to a point in time: which base backup, along which timeline; then a restore from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.components.postgres_base import BASE
from tasks.components.postgres_options import RestoreOptions
from tasks.components.postgres_segments import format_lsn, parse_lsn
from tasks.components.postgres_target import describe
from tasks.components.postgres_wal import BaseBackup
from tasks.recoverable import Recoverable, Span, base_backups, clusters
from tasks.restore import restore_component
from tasks.wal import wal_components
from workers import catalog
from workers.app import app
from workers.catalog import Artifact
from workers.component import check_options
from workers.errors import Permanent
from workers.settings import get_settings
from workers.storage import open_store


@app.task(name="tasks.recover.recover_component")
def recover_component(
    component: str,
    *,
    options: Mapping[str, Any],
    archive: str | None = None,
    confirm: str | None = None,
    plan: bool = False,
) -> str:
    """Start the recovery of a PostgreSQL component to the target in ``options`` and return the id of its run.

    ``options`` are those of `tasks.components.postgres_options.RestoreOptions`. The base backup and the timeline are
    chosen from what the store holds and is not known to be damaged, unless ``archive`` names the base backup. ``confirm`` must be the component's
    name when the live cluster is overwritten. Raises ``Permanent``, with the range that is possible, for a target that
    cannot be reached.
    """
    known = wal_components(get_settings())
    if component not in known:
        raise Permanent(f"{component}: no postgres component of this name has a wal_archive")
    check_options(RestoreOptions, options, component)
    asked = RestoreOptions.model_validate(dict(options))
    if not asked.targets:
        raise Permanent("no target: give a time, a position, a transaction id, a restore point, or latest")
    artifacts = catalog.list_artifacts() if archive else catalog.list_sound_artifacts()
    found = clusters(open_store(get_settings().store), component, artifacts)
    if not found or not found[-1].spans:
        hint = "; status names the damaged ones, and --base takes one of them all the same"
        damaged = base_backups(component, catalog.list_artifacts()) != base_backups(component, artifacts)
        raise Permanent(
            f"{component}: nothing can be recovered: there is no base backup with its WAL{hint if damaged else ' yet'}"
        )
    choice = choose(found[-1], asked, next_xids(component, artifacts))
    chosen = {**options, "timeline": choice.timeline}
    run_id: str = restore_component(
        archive or choice.base.archive, component, options=chosen, confirm=confirm, plan=plan
    )
    return run_id


@dataclass(frozen=True)
class Choice:
    """Where a recovery begins and along which timeline it goes."""

    base: BaseBackup
    timeline: int


def choose(found: Recoverable, asked: RestoreOptions, next_xids: Mapping[str, int]) -> Choice:
    """Return the newest base backup before the target, on the timeline that was live at it.

    ``next_xids``: by archive, the first transaction id that was not given out when its base backup ended. A restore
    point's place is not known before the WAL is read, so the search for it begins at the oldest base backup.
    Raises ``Permanent`` with what is possible.
    """
    spans = [span for span in found.spans if asked.timeline in (None, span.timeline)]
    live = asked.timeline
    if asked.to_time is not None:
        live = live or next((one.timeline for one in found.collections if one.taken >= asked.to_time), None)
    for span in reversed(spans):
        base = _base(span, asked, next_xids)
        if base and (asked.to_time is None or span.timeline == live):
            return Choice(base, span.timeline)
    for span in reversed(
        spans
    ):  # up to which time the WAL goes that no collection speaks of, the recovery will tell
        if asked.to_time is not None and span.goes_on and (base := span.base_before(asked.to_time)):
            return Choice(base, span.timeline)
    raise Permanent(f"a recovery {describe(asked)} is not possible; {_possible(spans)}")


def _base(span: Span, asked: RestoreOptions, next_xids: Mapping[str, int]) -> BaseBackup | None:
    """Return the base backup of a range from which the target can be reached, ``None`` when it is not in the range."""
    newest_first = reversed(span.bases)
    if asked.to_time is not None:
        return span.base_before(asked.to_time) if asked.to_time <= span.end else None
    if asked.to_lsn is not None:
        lsn = parse_lsn(asked.to_lsn)
        return next((base for base in newest_first if base.stop_lsn <= lsn <= span.end_lsn), None)
    if asked.to_xid is not None:
        return next((base for base in newest_first if next_xids[base.archive] <= asked.to_xid), None)
    return span.bases[0] if asked.to_name is not None else span.bases[-1]


def next_xids(component: str, artifacts: Sequence[Artifact]) -> dict[str, int]:
    """Return, for the archive of each base backup, the first transaction id that was not given out at its end."""
    return {
        artifact.key: int(part["holds"]["next_xid"])
        for artifact in artifacts
        for part in artifact.details["parts"]
        if part["component"] == component and part["kind"] == BASE
    }


def _possible(spans: Sequence[Span]) -> str:
    lines = [
        f"{span.start:%Y-%m-%d %H:%M:%S} to {span.end:%Y-%m-%d %H:%M:%S} UTC "
        f"({format_lsn(span.start_lsn)} to {format_lsn(span.end_lsn)}, timeline {span.timeline})"
        for span in spans
    ]
    return f"possible is {'; '.join(lines) or 'nothing'}; collect WAL for a later moment: ai-micro-backup collect"
