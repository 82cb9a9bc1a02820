"""What the settings of a tree, and what a restore of it is asked for, may hold."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from workers.component import Options


def absolute(path: str) -> str:
    """Return ``path`` when it is absolute, and no root. Raises ``ValueError``."""
    pure = PurePosixPath(path)
    if not pure.is_absolute() or not pure.name or ".." in pure.parts or "\0" in path:
        raise ValueError(f"expected an absolute path without '..': {path!r}")
    return str(pure)


def relative(path: str) -> str:
    """Return ``path`` when it is relative and stays below. Raises ``ValueError``."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.name or ".." in pure.parts or not path.isprintable():
        raise ValueError(f"expected a printable relative path without '..': {path!r}")
    return str(pure)


AbsolutePath = Annotated[str, AfterValidator(absolute)]
RelativePath = Annotated[str, AfterValidator(relative)]


class TreeRestoreOptions(Options):
    """One path out of many, or a folder beside what is live."""

    path: RelativePath | None = None
    """A file or folder as the backup names it, ``uploads/2026``; what stands beside it stays."""
    into: AbsolutePath | None = None
    """A folder, missing or empty, where the component lives (in a volume, from its top): nothing that is live is touched."""

    @property
    def overwrites(self) -> bool:
        return self.into is None

    @property
    def everything(self) -> bool:
        return self.path is None
