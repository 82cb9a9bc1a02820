"""Which archives of one store are kept, and why: one pure function over what there is, the policies and the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tasks.components.postgres_wal import BaseBackup
from workers.catalog import LEVELS
from workers.sections import RetentionPolicy

PROOFS = LEVELS[1:]
"""Those that read what they prove."""
CLOCK_SKEW = timedelta(minutes=5)
"""How far the clocks of two control workers may be apart."""
PERIODS: dict[str, Callable[[datetime], object]] = {
    "daily": lambda moment: moment.date(),
    "weekly": lambda moment: moment.isocalendar()[:2],
    "monthly": lambda moment: (moment.year, moment.month),
    "yearly": lambda moment: moment.year,
}


@dataclass(frozen=True)
class Backup:
    """What retention has to know of an archive."""

    key: str
    created: datetime
    series: str
    """Archives of one series replace each other: ``full_system``, or the components that they hold."""
    holds: frozenset[tuple[str, str]]
    """The kinds of parts in it, each with its component."""
    proven: str | None = None
    """The deepest level that was proven of it, since a verification last failed."""
    damaged: bool = False
    """Whether its last verification failed."""
    bases: Mapping[str, BaseBackup] = field(default_factory=dict)
    """The base backups in it, by component."""
    needs: frozenset[str] = frozenset()
    """Keys of the archives without which it cannot be restored."""


@dataclass(frozen=True)
class Decision:
    """Whether an archive stays, and why."""

    key: str
    keep: bool
    reason: str


@dataclass(frozen=True)
class Plan:
    """What becomes of the archives of a store, the newest first; ``note`` says why none goes at all."""

    decisions: Sequence[Decision]
    note: str | None = None

    @property
    def kept(self) -> frozenset[str]:
        return frozenset(decision.key for decision in self.decisions if decision.keep)

    @property
    def dropped(self) -> list[Decision]:
        """The newest first, so an archive before the older ones that it needs: an ended prune leaves none without them."""
        return [decision for decision in self.decisions if not decision.keep]


def decide(
    backups: Iterable[Backup],
    policies: Callable[[Backup], Mapping[str, RetentionPolicy]],
    now: datetime,
    *,
    read: Collection[str] = (),
    wal_days: Mapping[str, float] | None = None,
) -> Plan:
    """Say for each archive of a store whether it stays.

    ``policies`` names those that an archive is under; any rule of any of them keeps it, and one without rules keeps all.
    ``read`` are the archives that a run reads now. ``wal_days`` says how many days of WAL are kept, by component.

    Whatever the policies say, these stay: what is read; the newest of each kind of part; the newest proven on each
    level; a base backup that kept WAL needs; what an archive that stays needs. With a clock that is behind the newest
    archive, all stay.
    """
    ordered = sorted(backups, key=lambda backup: (backup.created, backup.key), reverse=True)
    if not ordered:
        return Plan([], "the catalogue has no archive in this store: nothing to delete")
    if ordered[0].created > now + CLOCK_SKEW:
        reason = (
            f"the clock says {now:%Y-%m-%d %H:%M} UTC, which is before the newest archive {ordered[0].key} was made: "
            "one of them is wrong, and nothing is deleted"
        )
        return Plan([Decision(backup.key, keep=True, reason=reason) for backup in ordered], reason)
    keep = (
        {backup.key: "a run reads it now" for backup in reversed(ordered) if backup.key in read}
        | _by_policies(ordered, policies, now)
        | _needed_by_wal(ordered, now, wal_days or {})
        | _newest(ordered)
    )
    _add_needed(ordered, keep)
    reasons = {backup.key: keep.get(backup.key) or _outlived(policies(backup)) for backup in ordered}
    return Plan([Decision(key, key in keep, reason) for key, reason in reasons.items()])


def _newest(ordered: Sequence[Backup]) -> dict[str, str]:
    """Keep the newest archive of each kind of part: of all, of those not known to be damaged, of those proven."""
    keep: dict[str, str] = {}
    for component, kind in sorted({held for backup in ordered for held in backup.holds}):
        having = [backup for backup in ordered if (component, kind) in backup.holds]
        whole = [backup for backup in having if not backup.damaged]
        for level in PROOFS:
            proven = [backup for backup in whole if _rank(backup.proven) >= _rank(level)]
            keep |= {backup.key: f"the newest of {component} proven by {level}" for backup in proven[:1]}
        keep |= {backup.key: f"the newest of {component}" for backup in (*whole[:1], *having[:1])}
    return keep


def _by_policies(
    ordered: Sequence[Backup], policies: Callable[[Backup], Mapping[str, RetentionPolicy]], now: datetime
) -> dict[str, str]:
    series: defaultdict[str, list[Backup]] = defaultdict(list)
    for backup in ordered:
        series[backup.series].append(backup)
    keep: dict[str, str] = {}
    for members in series.values():
        for name, policy in policies(members[0]).items():
            keep |= _by_policy(members, name, policy, now)
    return keep


def _by_policy(
    members: Sequence[Backup], name: str, policy: RetentionPolicy, now: datetime
) -> dict[str, str]:
    if policy.is_empty:
        return {backup.key: f"{name} keeps all" for backup in members}
    keep: dict[str, str] = {}
    for period, of in PERIODS.items():
        newest: dict[object, Backup] = {}
        for backup in members:
            other = newest.get(of(backup.created))
            if other is None or (other.damaged and not backup.damaged):
                newest[of(backup.created)] = backup
        chosen = list(newest.values())[: getattr(policy, period)]
        keep |= {backup.key: f"{name} keeps {getattr(policy, period)} {period}" for backup in chosen}
    if policy.last:
        whole = [backup for backup in members if not backup.damaged][: policy.last]
        oldest = whole[-1].created if whole else members[-1].created
        last = [backup for backup in members if backup.created >= oldest]
        keep |= {backup.key: f"{name} keeps the last {policy.last}" for backup in last}
    if policy.days is not None:
        keep |= _by_age(members, name, policy.days, now)
    return keep


def _by_age(members: Sequence[Backup], name: str, days: float, now: datetime) -> dict[str, str]:
    """Keep the young ones. Age counts only where backups went on being made: else the clock jumped, or they stopped."""
    young = [backup for backup in members if now - backup.created <= timedelta(days=days)]
    if len(young) < len(members) and (not young or now - young[-1].created < timedelta(days=days) / 2):
        found = f"made only for {(now - young[-1].created).days} days" if young else "not made any more"
        reason = f"{name} keeps {days:g} days, but backups were {found}: they stopped, or the clock jumped"
        return {backup.key: reason for backup in members}
    return {backup.key: f"{name} keeps {days:g} days" for backup in young}


def _needed_by_wal(ordered: Sequence[Backup], now: datetime, wal_days: Mapping[str, float]) -> dict[str, str]:
    """Keep, for each cluster, the base backups from which all of the time that WAL is kept for is reached."""
    bases: defaultdict[tuple[str, str], list[tuple[datetime, str]]] = defaultdict(list)
    for backup in ordered:
        for component, base in backup.bases.items():
            if not backup.damaged:
                bases[component, base.system_identifier].append((base.finished, backup.key))
    keep: dict[str, str] = {}
    for (component, _), found in bases.items():
        if component in wal_days:
            begin = now - timedelta(days=wal_days[component])
            newest_first = sorted(found, reverse=True)
            before = sum(finished > begin for finished, _ in newest_first)
            keep |= {key: f"kept WAL of {component} begins with it" for _, key in newest_first[: before + 1]}
    return keep


def _add_needed(ordered: Sequence[Backup], keep: dict[str, str]) -> None:
    needs = {backup.key: backup.needs for backup in ordered}
    todo = list(keep)
    while todo:
        key = todo.pop()
        for needed in needs.get(key, frozenset()) - keep.keys():
            keep[needed] = f"{key} needs it"
            todo.append(needed)


def _outlived(policies: Mapping[str, RetentionPolicy]) -> str:
    return "no rule keeps it: " + "; ".join(f"{name} keeps {policy}" for name, policy in policies.items())


def _rank(level: str | None) -> int:
    return LEVELS.index(level) if level in LEVELS else -1
