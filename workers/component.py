"""What a component is: the records and the one base class that `tasks.components` fill in.

To add a kind, write ``tasks/components/<kind>.py`` with a class ``Component`` (see `load`) and a test; nothing else
changes.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar
from urllib.parse import quote

from pydantic import Field

from workers.errors import SettingsError
from workers.location import Location
from workers.runtime import Runtime, Service, open_runtime, open_service
from workers.secret import Secret, Strict
from workers.streams import Written

KIND_PACKAGE = "tasks.components"


class Part(Strict):
    """One stored stream of a component, as `metadata.json` records it. Sizes are bytes, times UTC."""

    name: str
    """File name in the archive and, below the run's folder, in the store, for example ``postgres.authdb.dump.zst``."""
    component: str
    host: str
    kind: str
    """What the plain bytes are, for example ``postgres-dump``; the component's restore goes by it."""
    codec: str
    size: int
    sha256: str
    plain_size: int
    plain_sha256: str
    started: datetime
    finished: datetime
    holds: dict[str, Any]
    """What it holds, as the component described it: database and row counts, key count, file count and bytes."""

    @property
    def written(self) -> Written:
        return Written(self.size, self.sha256, self.plain_size, self.plain_sha256)


@dataclass
class Source:
    """One stream that a component backs up. Several of a component are read at the same time."""

    label: str
    """What people read while it runs: ``authdb``, ``keys``, ``/app/uploads``."""
    name: str
    """File name of the plain stream in an archive, safe everywhere (`part_name`): ``postgres.authdb.dump``."""
    kind: str
    chunks: Iterator[bytes]
    """The plain bytes. Raises when anything went wrong, after the last byte at the latest."""
    expected: int | None = None
    """Estimated number of plain bytes, for the progress bar; ``None`` when nobody knows."""
    holds: dict[str, Any] = field(default_factory=dict)
    """What it holds; complete when ``chunks`` has ended."""


@dataclass(frozen=True)
class Restore:
    """One restore of one component: the run it belongs to, the parts, and how to read them."""

    run_id: str
    parts: Sequence[Part]
    read: Callable[[Part], Iterator[bytes]]
    """Yields a part's plain bytes and raises ``IntegrityError`` at their end when they are not as recorded."""


class BaseComponent(Location):
    """A component is its validated settings, plus how to back it up and restore it.

    A restore takes four steps, each of which may run twice. ``stage`` puts the data beside what is there and
    compares it with the record; ``swap`` puts it in place and keeps what stood there; then either ``settle`` drops
    that, or ``revert`` brings it back (also after a ``stage`` or ``swap`` that failed half way).
    """

    metadata_key: ClassVar[str]
    """Its key in ``metadata.json``'s ``components``, as the runbook names it."""
    watched: ClassVar[bool] = False
    """Whether it is looked at often, and backed up when its `content_digest` changes."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    kind: str
    host: str

    @property
    def runtime(self) -> Runtime:
        return open_runtime(self, component=self.name)

    @property
    def service(self) -> Service:
        return open_service(self)

    def secrets(self) -> dict[str, Secret]:
        """Its secrets by the path of the setting, so that a missing one is reported before anything starts."""
        return {}

    @abstractmethod
    def sources(self) -> list[Source]:
        """Open what there is to back up. Nothing is left open when this raises."""

    def content_digest(self) -> str:
        """Return what the ``content_sha256`` of its part would be now; for ``watched`` components."""
        raise TypeError(f"components of kind {self.kind} are not watched")

    @abstractmethod
    def overwrites(self, parts: Sequence[Part]) -> list[str]:
        """Say in a line each what a restore of ``parts`` would overwrite, for the plan."""

    @abstractmethod
    def stage(self, restore: Restore) -> None:
        """Put the data beside what is there and compare it. What is live is not touched."""

    @abstractmethod
    def swap(self, restore: Restore) -> None:
        """Put what was staged in place and keep what stood there."""

    @abstractmethod
    def revert(self, restore: Restore) -> None:
        """Bring back what stood before ``swap`` and remove what was staged; fine when there is neither."""

    @abstractmethod
    def by_hand(self, parts: Sequence[Part]) -> str:
        """Return Markdown for the archive's RESTORE.md: how to restore ``parts`` with public tools alone."""

    @abstractmethod
    def settle(self, restore: Restore) -> None:
        """Drop what stood before ``swap``."""


def part_name(name: str) -> str:
    """Return a file name that is safe everywhere: all but ASCII letters, digits and ``_.-~`` percent-encoded."""
    return quote(name, safe="")


def load(kind: str) -> type[BaseComponent]:
    """Return the component class of ``kind`` (a module of ``tasks.components``), found by name.

    Raises ``SettingsError`` for a kind that does not exist.
    """
    if kind.isidentifier():
        try:
            module = importlib.import_module(f"{KIND_PACKAGE}.{kind}")
        except ModuleNotFoundError as error:
            if error.name != f"{KIND_PACKAGE}.{kind}":
                raise
        else:
            # Modules that a kind is made of lie there, too.
            component: type[BaseComponent] | None = getattr(module, "Component", None)
            if component is not None:
                return component
    raise SettingsError("settings", [f"kind: there is no component kind {kind!r}"])
