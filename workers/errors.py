"""The exception tree. Libraries' errors are translated to it at the edge.

BackupError
├── Transient             trying again later can pass
│   ├── RuntimeUnavailable    the Docker engine, or a container, does not answer
│   ├── StoreUnavailable      the store does not answer
│   └── LeaseUnavailable      somebody else works on it, or the broker does not answer
└── Permanent             the same call fails again; somebody has to act
    ├── SettingsError         the configuration is wrong (every error at once, each with its path)
    ├── CommandFailed         a program ended with a non-zero status
    ├── ObjectNotFound        the store has no object under this key
    ├── ObjectExists          an object under this key was committed before
    ├── IntegrityError        bytes are not what was recorded when they were written
    ├── ComparisonError       what was restored is not what was backed up
    ├── LeaseLost             this worker is no longer the one to do the work
    ├── NotConfirmed          a destructive call without the right ``confirm``
    └── CatalogError          the catalogue refuses: unknown run, a run that already exists, ...
"""

from pathlib import PurePath


class BackupError(Exception):
    """Anything this system reports. Its text is safe to show: it never holds a secret."""


class Transient(BackupError):
    """Trying again later can pass."""


class Permanent(BackupError):
    """The same call fails again; somebody has to act."""


class RuntimeUnavailable(Transient):
    """The Docker engine, or the container or program a component lives in, does not answer."""


class StoreUnavailable(Transient):
    """The store does not answer, or refuses for now."""


class LeaseUnavailable(Transient):
    """Somebody else holds the lease, or the broker that keeps leases does not answer."""


class SettingsError(Permanent):
    """The configuration is wrong. ``errors`` holds a line for each fault, each starting with its path."""

    def __init__(self, source: str, errors: list[str]) -> None:
        # What an exception was made from, and not its text, is what the result backend makes it anew from.
        super().__init__(source, errors)
        self.source, self.errors = source, errors

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.source}: {len(self.errors)} error(s)", *(f"  {line}" for line in self.errors)]
        )


class CommandFailed(Permanent):
    """A program ended with a non-zero status. The text has its name, status and the end of its stderr."""

    def __init__(self, program: str, status: int, stderr: str) -> None:
        super().__init__(program, status, stderr.strip())
        self.program, self.status, self.stderr = program, status, stderr.strip()

    def __str__(self) -> str:
        return f"{PurePath(self.program).name} ended with status {self.status}: {self.stderr or 'no message'}"


class ObjectNotFound(Permanent):
    """The store has no object under this key."""


class ObjectExists(Permanent):
    """An object under this key was committed before; committed objects are never overwritten."""


class IntegrityError(Permanent):
    """Bytes are not what was recorded when they were written."""


class ComparisonError(Permanent):
    """What was restored is not what was backed up."""


class LeaseLost(Permanent):
    """This worker is no longer the one to do the work; it must not commit anything."""


class NotConfirmed(Permanent):
    """A destructive call without ``confirm``, or with the wrong one. The text says what it would do."""


class CatalogError(Permanent):
    """The catalogue refuses: an unknown run, or one that cannot be opened now."""


def can_go_on(error: BaseException) -> bool:
    """Whether work that ended so can be gone on with: what ended it can pass, or another worker does it now."""
    return isinstance(error, LeaseLost) or not isinstance(error, Permanent)
