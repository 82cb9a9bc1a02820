"""Where a recovery is to stop, what that takes, and where it came to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from tasks.components.postgres_options import RestoreOptions
from tasks.components.postgres_segments import parse_lsn
from tasks.components.postgres_wal import BaseBackup, Collection, Wal, goes_on, missing
from workers.errors import ComparisonError, Permanent
from workers.secret import Strict


class Reached(Strict):
    """Where a recovery came to."""

    lsn: str
    """The end of the last record that was replayed."""
    last_commit: datetime | None
    """Time of the last transaction that was replayed; ``None`` when there was none after the base backup."""
    timeline: int
    """The new one that begins here."""
    system_identifier: str
    databases: tuple[str, ...]
    target: str
    stopped: str
    """PostgreSQL's own words on why it stopped; empty at the end of the WAL."""

    @classmethod
    def of(cls, answer: Mapping[str, Any], stopped: str, target: str) -> Self:
        values = {key: answer[key] for key in ("lsn", "last_commit", "system_identifier", "databases")}
        timeline = int(answer["wal_file"][:8], 16)
        return cls.model_validate({**values, "timeline": timeline, "stopped": stopped, "target": target})


@dataclass(frozen=True)
class Target:
    """The target of one recovery, as PostgreSQL's settings."""

    options: RestoreOptions
    timeline: int
    settings: Mapping[str, str]
    need: int
    """The position up to which all WAL must be there, as far as it is known before."""
    until: int | None = None
    """The position after which no WAL is given, for a target at which no transaction follows."""

    @classmethod
    def of(
        cls, options: RestoreOptions, wal: Wal, collections: Sequence[Collection], holds: Mapping[str, Any]
    ) -> Self:
        """Return the target that was asked for; without any it is the end of the base backup."""
        base = BaseBackup.of("", holds)
        timeline = options.timeline or base.timeline
        settings = {"recovery_target_timeline": str(timeline), "recovery_target_action": "promote"}
        settings["recovery_target_inclusive"] = "off" if options.exclusive else "on"
        need, until = base.stop_lsn, None
        on_the_way = [one for one in collections if one.timeline <= timeline]
        if options.to_time:
            after = next((one for one in on_the_way if one.marked > options.to_time), None)
            last = next((one for one in reversed(on_the_way) if one.taken >= options.to_time), None)
            if after:
                need = max(need, after.end)
                settings["recovery_target_time"] = options.to_time.isoformat(sep=" ")
            elif last:  # nothing was committed from there to the target: all the WAL is its state
                need = until = max(need, last.end)
            elif goes_on(wal, timeline, base, collections):  # PostgreSQL fails when it ends before the target
                settings["recovery_target_time"] = options.to_time.isoformat(sep=" ")
            else:
                raise Permanent(f"nothing that was collected reaches {options.to_time.isoformat()}")
        elif options.to_lsn:
            need = max(need, parse_lsn(options.to_lsn))
            settings["recovery_target_lsn"] = options.to_lsn
        elif options.to_xid is not None:
            settings["recovery_target_xid"] = str(options.to_xid % (1 << 32))
        elif options.to_name:
            settings["recovery_target_name"] = options.to_name
        elif not options.latest:
            settings["recovery_target"] = "immediate"
        elif on_the_way:
            need = max(need, on_the_way[-1].end)
        return cls(options, timeline, settings, need, until)

    def __str__(self) -> str:
        return describe(self.options)

    def require_wal(self, wal: Wal, holds: Mapping[str, Any]) -> None:
        """Raise ``Permanent``, naming what is missing, unless all the WAL is there that the target is known to take."""
        base = BaseBackup.of("", holds)
        if base.with_wal and self.need <= base.stop_lsn:
            return
        if names := missing(wal, self.timeline, base.needs_from, self.need):
            raise Permanent(
                f"a recovery {self} needs WAL that the store does not hold: {', '.join(names[:5])}"
            )

    def require(self, reached: Reached) -> None:
        """Raise ``ComparisonError`` when a recovery ended anywhere but at its target."""
        asked, last = self.options, reached.last_commit
        wrong = bool(
            asked.to_time and last and (last > asked.to_time or (asked.exclusive and last == asked.to_time))
        )
        if asked.to_lsn and not asked.exclusive:
            wrong = parse_lsn(reached.lsn) < parse_lsn(asked.to_lsn)
        if asked.to_xid is not None:
            wrong = not re.search(rf"transaction {asked.to_xid % (1 << 32)}\b", reached.stopped)
        if self.until is not None or asked.latest:
            # The rest of the last segment holds nothing but its end.
            wrong = wrong or parse_lsn(reached.lsn) + (16 << 20) < self.need
        if wrong:
            raise ComparisonError(
                f"the recovery {self} ended at {reached.lsn}, last commit {last}: {reached.stopped}"
            )


def describe(asked: RestoreOptions) -> str:
    """Return the target as part of a sentence."""
    how = "up to and without" if asked.exclusive else "up to"
    if asked.to_time:
        return f"{how} {asked.to_time.isoformat(sep=' ')}"
    if asked.to_lsn:
        return f"{how} {asked.to_lsn}"
    if asked.to_xid is not None:
        return f"{how} transaction {asked.to_xid}"
    if asked.to_name:
        return f"to restore point {asked.to_name}"
    return "to the end of the WAL" if asked.latest else "to the end of the base backup"
