"""What one backup or restore of a PostgreSQL server may be asked for."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal, Self

from pydantic import AwareDatetime, Field, field_validator, model_validator

from tasks.components.postgres_incremental import Parent
from tasks.components.postgres_segments import parse_lsn
from workers.component import Options


class BackupOptions(Options):
    """What to back up, and in which form."""

    base: Literal["full", "incremental"] | None = None
    """A base backup of the whole cluster, from which it can be recovered to a point in time, instead of dumps; ``incremental``:
    of what changed since the newest one (PostgreSQL 17 and later)."""
    parent: Parent | None = None
    """The base backup that an incremental one is based on; found by itself."""
    databases: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names; by default those of the settings."""
    format: Literal["custom", "dumpall"] = "custom"
    """A dump of each database that pg_restore reads, or one file of plain SQL by pg_dumpall."""


class RestoreOptions(Options):
    """What to restore, and where to. From a base backup: the moment to recover to; by default the end of the base backup."""

    databases: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names; by default all that the archive holds. Of the roles, only those that are missing are created then."""
    into: str | None = Field(default=None, min_length=1)
    """Restore one database under this name, which must be free, and leave the live one alone."""
    to_time: AwareDatetime | None = None
    """With its zone."""
    to_lsn: str | None = None
    to_xid: int | None = Field(default=None, ge=3)
    to_name: str | None = Field(default=None, min_length=1, max_length=63)
    """A restore point that `pg_create_restore_point` made."""
    latest: bool = False
    """The end of the WAL."""
    exclusive: bool = False
    """Stop just before the target, not just after it."""
    timeline: int | None = Field(default=None, ge=1)
    """The timeline to recover along; by default that of the base backup."""
    folder: PurePosixPath | None = None
    """Recover into this folder, where the server is, and leave the live one alone."""
    new_cluster: bool = False
    """The server was set up anew: its system identifier is another one than that of the backup, and that is right."""

    @property
    def overwrites(self) -> bool:
        return self.folder is None and self.into is None

    @property
    def everything(self) -> bool:
        """Whether all of a backup is restored, so that the roles become what they were, too."""
        return self.databases is None and self.into is None

    @property
    def recovers(self) -> bool:
        """Whether anything is asked for that only a base backup can give."""
        return bool(self.targets) or self.folder is not None

    @property
    def targets(self) -> list[object]:
        """The moments that are asked for; more than one is refused."""
        given = (self.to_time, self.to_lsn, self.to_xid, self.to_name, self.latest or None)
        return [target for target in given if target is not None]

    @field_validator("to_lsn")
    @classmethod
    def _is_lsn(cls, text: str | None) -> str | None:
        if text is not None:
            parse_lsn(text)
        return text

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, folder: PurePosixPath | None) -> PurePosixPath | None:
        if folder is not None and not folder.is_absolute():
            raise ValueError("must be an absolute path")
        return folder

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if len(self.targets) > 1:
            raise ValueError("more than one target: give one of to_time, to_lsn, to_xid, to_name, latest")
        return self
