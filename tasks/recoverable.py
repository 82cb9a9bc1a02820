"""What a PostgreSQL cluster can be brought back to: from base backups and the WAL after them, with gaps and their meaning.

Everything here follows from the store and the catalogue; the server need not be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from tasks.components.postgres_base import BASE
from tasks.components.postgres_segments import format_lsn
from tasks.components.postgres_wal import (
    BaseBackup,
    Collection,
    Range,
    Wal,
    covered,
    goes_on,
    list_collections,
    list_systems,
    list_wal,
    missing,
    reach,
)
from workers.catalog import Artifact
from workers.storage import Store


@dataclass(frozen=True)
class Span:
    """A recoverable range: any moment from ``start`` to ``end``, from one of its base backups and the WAL after it."""

    timeline: int
    bases: tuple[BaseBackup, ...]
    """The oldest first."""
    start_lsn: int
    end_lsn: int
    start: datetime
    end: datetime
    goes_on: bool = False
    """Whether there is WAL after ``end``, of which nobody knows up to which time it goes."""

    def base_before(self, moment: datetime) -> BaseBackup | None:
        """Return the newest base backup from which ``moment`` can be reached."""
        return next((base for base in reversed(self.bases) if base.finished <= moment), None)


@dataclass(frozen=True)
class Gap:
    """WAL that is missing: nothing between ``start`` and ``end`` can be recovered."""

    missing: tuple[str, ...]
    start: datetime | None
    """The last moment before it; ``None`` when nothing before it is recoverable."""
    end: datetime | None
    """The first moment after it; ``None`` when there is no base backup after it yet."""

    def __str__(self) -> str:
        names = self.missing[0] if len(self.missing) == 1 else f"{self.missing[0]} … {self.missing[-1]}"
        what = (
            f"{names} is missing"
            if len(self.missing) == 1
            else f"{len(self.missing)} files {names} are missing"
        )
        start = f"{self.start:%Y-%m-%d %H:%M:%S}" if self.start else "the beginning"
        end = f"{self.end:%Y-%m-%d %H:%M:%S} UTC" if self.end else "now: it takes a new base backup"
        return f"not recoverable from {start} to {end} ({what})"


@dataclass(frozen=True)
class Recoverable:
    """What one cluster can be brought back to."""

    component: str
    system_identifier: str
    spans: tuple[Span, ...]
    """A timeline each, or several where it has gaps; ordered by their ends."""
    gaps: tuple[Gap, ...]
    """On the newest timeline."""
    collections: tuple[Collection, ...]
    """The oldest first."""

    @property
    def newest(self) -> datetime | None:
        """The newest moment that can be recovered; its age is the true RPO."""
        return max((span.end for span in self.spans), default=None)

    @property
    def needs_base(self) -> bool:
        """Whether the newest WAL cannot be used, because no base backup reaches it without a gap."""
        if not self.collections:
            return not self.spans
        last = self.collections[-1]
        return not any(span.timeline == last.timeline and span.end_lsn >= last.end for span in self.spans)

    def document(self) -> dict[str, Any]:
        """Return it for JSON: times in ISO 8601, positions as PostgreSQL writes them."""
        return {
            "component": self.component,
            "system_identifier": self.system_identifier,
            "newest": self.newest.isoformat() if self.newest else None,
            "needs_base": self.needs_base,
            "ranges": [
                {
                    "timeline": span.timeline,
                    "start": span.start.isoformat(),
                    "end": span.end.isoformat(),
                    "start_lsn": format_lsn(span.start_lsn),
                    "end_lsn": format_lsn(span.end_lsn),
                    "bases": [base.archive for base in span.bases],
                    "needs": {base.archive: list(base.needs) for base in span.bases if base.needs},
                }
                for span in self.spans
            ],
            "gaps": [
                {
                    "missing": list(gap.missing),
                    "start": gap.start.isoformat() if gap.start else None,
                    "end": gap.end.isoformat() if gap.end else None,
                    "text": str(gap),
                }
                for gap in self.gaps
            ],
        }


def clusters(store: Store, component: str, artifacts: Iterable[Artifact]) -> list[Recoverable]:
    """Return what each cluster of a component can be brought back to, the one collected from last at the end.

    Raises ``IntegrityError`` for WAL records that are damaged.
    """
    bases = base_backups(component, artifacts)
    systems = {*list_systems(store, component), *(base.system_identifier for base in bases)}
    found = [
        examine(
            list_wal(store, component, system),
            list_collections(store, component, system),
            [base for base in bases if base.system_identifier == system],
        )
        for system in systems
    ]
    return sorted(found, key=_newest_sign)


def base_backups(component: str, artifacts: Iterable[Artifact]) -> list[BaseBackup]:
    """Return the base backups of a component among archives, the oldest first; of incremental ones, those with all they need."""
    artifacts = list(artifacts)
    there = {artifact.key for artifact in artifacts}
    found = [
        BaseBackup.of(artifact.key, part["holds"])
        for artifact in artifacts
        for part in artifact.details["parts"]
        if part["component"] == component and part["kind"] == BASE
    ]
    return sorted((base for base in found if there.issuperset(base.needs)), key=lambda base: base.finished)


def examine(wal: Wal, collections: Sequence[Collection], bases: Sequence[BaseBackup]) -> Recoverable:
    """Return what a cluster can be brought back to, from what there is of it."""
    timelines = {*wal.timelines, *(base.timeline for base in bases)}
    spans = [span for timeline in timelines for span in _spans(wal, timeline, collections, bases)]
    return Recoverable(
        wal.component,
        wal.system_identifier,
        tuple(sorted(spans, key=lambda span: (span.end, span.end_lsn))),
        tuple(_gaps(wal, collections, bases)) if collections else (),
        tuple(collections),
    )


def _spans(
    wal: Wal, timeline: int, collections: Sequence[Collection], bases: Sequence[BaseBackup]
) -> list[Span]:
    ends: dict[int, list[BaseBackup]] = {}
    for base in sorted(bases, key=lambda base: base.stop_lsn):
        if base.stop_lsn <= wal.left_at(base.timeline, timeline):
            end = reach(wal, timeline, base.needs_from)
            if base.with_wal or end >= base.stop_lsn:
                ends.setdefault(max(end, base.stop_lsn), []).append(base)
    spans = []
    for end, found in ends.items():
        last = _last_before(wal, timeline, collections, end)
        # What was collected before the base backup ended says nothing of it.
        taken = max(last.taken, found[-1].finished) if last else found[-1].finished
        more = goes_on(wal, timeline, found[-1], collections)
        spans.append(Span(timeline, tuple(found), found[0].stop_lsn, end, found[0].finished, taken, more))
    return spans


def _last_before(wal: Wal, timeline: int, collections: Sequence[Collection], end: int) -> Collection | None:
    """Return the newest collection on the way to ``timeline`` whose WAL is all before ``end``."""
    on_the_way = (
        one for one in reversed(collections) if one.end <= min(end, wal.left_at(one.timeline, timeline))
    )
    return next(on_the_way, None)


def _gaps(wal: Wal, collections: Sequence[Collection], bases: Sequence[BaseBackup]) -> list[Gap]:
    """Return the gaps of the newest timeline that a base backup stands before, or none after."""
    last = collections[-1]
    on_the_way = [base for base in bases if base.stop_lsn <= wal.left_at(base.timeline, last.timeline)]
    if not on_the_way:
        return []  # nothing has been recoverable yet
    held = covered(wal, last.timeline)
    at = min(*(found.start for found in held), *(base.needs_from for base in on_the_way), last.end)
    gaps: list[Gap] = []
    for start, end in [*held, (last.end, last.end)]:
        if start > at and (names := missing(wal, last.timeline, at, start)):
            gap = _gap(wal, last.timeline, collections, on_the_way, Range(at, start), tuple(names))
            if gaps and gaps[-1].end == gap.end:  # nothing between the two is recoverable
                gaps[-1] = replace(gaps[-1], missing=gaps[-1].missing + gap.missing)
            elif gap.start or not gap.end:
                gaps.append(gap)
        at = max(at, end)
    return gaps


def _gap(
    wal: Wal,
    timeline: int,
    collections: Sequence[Collection],
    bases: Sequence[BaseBackup],
    hole: Range,
    names: tuple[str, ...],
) -> Gap:
    moments = [base.finished for base in bases if base.stop_lsn <= hole.start]
    if moments and (before := _last_before(wal, timeline, collections, hole.start)):
        moments.append(before.taken)
    after = (base.finished for base in bases if base.needs_from >= hole.end)
    return Gap(names, max(moments, default=None), min(after, default=None))


def _newest_sign(found: Recoverable) -> float:
    moments = [one.taken for one in found.collections] + [span.end for span in found.spans]
    return max((moment.timestamp() for moment in moments), default=0)
