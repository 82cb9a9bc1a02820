"""What a component is: the records and the one base class that `tasks.components` fill in.

To add a kind, write ``tasks/components/<kind>.py`` with a class ``Component`` (see `load`) and a test; nothing else
changes.
"""

from __future__ import annotations

import importlib
import shlex
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import quote

from pydantic import Field, ValidationError

from workers.errors import Permanent, SettingsError
from workers.location import Location
from workers.runtime import Runtime, Service, open_runtime, open_service
from workers.secret import Secret, Strict
from workers.storage import Store
from workers.streams import Written

if TYPE_CHECKING:
    from workers.catalog import Artifact

KIND_PACKAGE = "tasks.components"
DECRYPT = "age --decrypt --identity <file of the private key>"
"""The public program that opens what is encrypted."""
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Options(Strict):
    """What a caller asks of one backup or restore of one component, beside its settings. A kind adds its own fields."""

    @property
    def overwrites(self) -> bool:
        """Whether a restore with these options replaces what is live; one that does not needs no confirmation."""
        return True

    @property
    def everything(self) -> bool:
        """Whether a restore with these options brings back all that was backed up, wherever to."""
        return True


class Part(Strict):
    """One stored stream of a component, as `metadata.json` records it. Sizes are bytes, times UTC."""

    name: str
    """File name in the archive and, below the run's folder, in the store, for example ``postgres.authdb.dump.zst``."""
    component: str
    host: str
    kind: str
    """What the plain bytes are, for example ``postgres-dump``; the component's restore goes by it."""
    codec: str
    encryption: Literal["age"] | None = None
    """What the compressed bytes are encrypted with."""
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

    @property
    def remarks(self) -> list[str]:
        """What people should know of it, a line each: warnings, and what was left out."""
        left_out = [f"left out: {line}" for line in self.holds.get("skipped", [])]
        return [*self.holds.get("warnings", []), *left_out]


READERS = {"zstd": "zstd -dc", "gzip": "gzip -dc", "none": "cat"}
"""The public program that prints the plain bytes, by codec."""


def plain_command(part: Part) -> str:
    """Return the shell command that prints the plain bytes of the part's file with public tools."""
    name = shlex.quote(part.name)
    if part.encryption:
        return f"{DECRYPT} {name} | {READERS[part.codec]}"
    return f"{READERS[part.codec]} {name}"


class Finding(Strict):
    """Something that `BaseComponent.preflight` found, and what to do about it."""

    what: str
    change: str = ""
    """What to change, to be copied: statements, commands, settings."""
    advice: bool = False
    """Whether everything that the settings ask for works without the change."""


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
    codec: Literal["zstd", "gzip"] = "zstd"
    """How it is compressed; gzip is for what people expect to open with it."""


@dataclass(frozen=True)
class Restore:
    """One restore of one component: the run it belongs to, the parts, and how to read them."""

    run_id: str
    parts: Sequence[Part]
    read: Callable[[Part], Iterator[bytes]]
    """Yields a part's plain bytes and raises ``IntegrityError`` at their end when they are not as recorded."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `BaseComponent.restore_options` validates."""
    store: Store | None = None
    """Where the archive lies, for what a restore needs beside its parts: WAL segments."""
    warnings: list[str] = field(default_factory=list)
    """What could not be restored, without being a reason to fail: the run's record says it."""
    found: dict[str, Any] = field(default_factory=dict)
    """What the steps found out, for the run's outcome."""


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
    days_kept: ClassVar[float | None] = 30
    """How long archives of it alone are kept where the settings say nothing; ``None``: for ever."""
    backup_options: ClassVar[type[Options]] = Options
    restore_options: ClassVar[type[Options]] = Options
    """What one backup or restore may be asked for."""

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
    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Open what there is to back up, of what `backup_options` ask for. Nothing is left open when this raises."""

    def completed(self, options: Mapping[str, Any], artifacts: Sequence[Artifact]) -> Mapping[str, Any]:
        """Return the options of a backup with what it takes from earlier ones: ``artifacts``, of which none is known to be damaged."""
        return options

    def content_digest(self) -> str:
        """Return what the ``content_sha256`` of its part would be now; for ``watched`` components."""
        raise TypeError(f"components of kind {self.kind} are not watched")

    @abstractmethod
    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        """Say in a line each what a restore of ``parts`` with these options would overwrite, for the plan.

        Raises ``Permanent`` when it would be refused.
        """

    @abstractmethod
    def stage(self, restore: Restore) -> None:
        """Put the data beside what is there and compare it. What is live is not touched."""

    @abstractmethod
    def swap(self, restore: Restore) -> None:
        """Put what was staged in place and keep what stood there."""

    @abstractmethod
    def revert(self, restore: Restore) -> None:
        """Bring back what stood before ``swap`` and remove what was staged; fine when there is neither."""

    def preflight(self) -> list[Finding]:
        """Look whether what the settings ask for can work, changing nothing, and return what to change."""
        return []

    def check(self, part: Part, chunks: Iterator[bytes]) -> None:
        """Read a part's plain ``chunks`` to their end with what knows their format, touching nothing.

        Raises ``IntegrityError`` when they are no whole file of that format. Without a format: nothing to add.
        """
        for _ in chunks:
            pass

    def rehearse(self, restore: Restore) -> dict[str, Any]:
        """Restore into a scratch place, compare with the record and remove it again; what is live is not touched.

        Returns what was compared, for the ledger. Raises ``ComparisonError`` or ``IntegrityError``.
        """
        raise Permanent(f"components of kind {self.kind} cannot be rehearsed yet")

    @abstractmethod
    def by_hand(self, parts: Sequence[Part]) -> str:
        """Return Markdown for the archive's RESTORE.md: how to restore ``parts`` with public tools alone."""

    @abstractmethod
    def settle(self, restore: Restore) -> None:
        """Drop what stood before ``swap``."""


def check_options(model: type[Options], options: Mapping[str, Any], component: str) -> Options:
    """Return the validated options. Raises ``SettingsError`` with a line for each that the component does not know."""
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
        lines = [f"{'.'.join(map(str, fault['loc'])) or 'options'}: {fault['msg']}" for fault in faults]
        raise SettingsError(f"options of {component}", lines) from error


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
