"""What one backup or restore of a PostgreSQL server may be asked for."""

from __future__ import annotations

from typing import Literal

from workers.component import Options


class BackupOptions(Options):
    """What to back up, and in which form."""

    base: Literal["full"] | None = None
    """A base backup of the whole cluster, from which it can be recovered to a point in time, instead of dumps."""
