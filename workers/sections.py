"""The tables of the configuration, each a model; `workers.settings` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from celery.schedules import ParseException, crontab
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, HttpUrl, Tag, model_validator

from workers.encryption import identities, recipient
from workers.errors import SettingsError
from workers.location import Location
from workers.secret import Secret, Strict


def parse_cron(line: str) -> crontab:
    """Return the schedule of a five-field cron line (UTC). Raises ``ValueError``."""
    try:
        return crontab.from_string(line)
    except (ValueError, ParseException) as error:
        raise ValueError(f"not a cron line of five fields: {line!r} ({error})") from error


def _cron(line: str) -> str:
    parse_cron(line)
    return line


Cron = Annotated[str, AfterValidator(_cron)]
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class SystemSettings(Strict):
    """The system that is backed up."""

    name: str = Field(min_length=1)
    """What a destructive call must ``confirm``."""
    version: str = "1.0.0"


class ServiceSettings(Location):
    """A service that is stopped before a restore and started after it. Their order is the order of stopping."""

    name: str
    host: HostName
    health: HttpUrl | None = None
    """Answers 200 when the service is healthy; asked from its host."""
    uses: tuple[str, ...] = ()
    """The components it uses: a restore of others leaves it running. By default it uses all."""


def _known_kind(kind: Any) -> Any:
    if kind not in ("local", "s3"):
        raise ValueError(f"a store's kind is 'local' or 's3', not {kind!r}")
    return kind


class LocalStoreSettings(Strict):
    """A folder that every host sees under the same path."""

    kind: Annotated[Literal["local"], BeforeValidator(_known_kind)] = "local"
    path: Path

    def secrets(self) -> dict[str, Secret]:
        return {}


class LockSettings(Strict):
    """Object lock: nobody may delete an object before its time."""

    mode: Literal["governance", "compliance"]
    """``governance``: those with a special permission still may; ``compliance``: not even the account's owner."""
    days: int = Field(ge=1)


class S3StoreSettings(Strict):
    """A bucket of S3, or of a server that speaks its protocol."""

    kind: Literal["s3"]
    bucket: str = Field(min_length=1)
    prefix: str = Field(default="", pattern=r"^([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$")
    """The folder of the bucket that is used; several systems can share a bucket."""
    endpoint: HttpUrl | None = None
    """The server, when it is not Amazon's."""
    region: str | None = None
    path_style: bool = False
    """``https://server/bucket/key`` instead of ``https://bucket.server/key``; most other servers need it."""
    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    """Both or neither; without them boto3 finds credentials in its own places (environment, files, roles)."""
    storage_class: str | None = None
    """By default the bucket's; offsite ``STANDARD_IA``."""
    checksums: Literal["sha256", "md5"] = "sha256"
    """What the server checks uploads by; ``md5`` for servers that do not know the newer checksums."""
    attempts: int = Field(default=5, ge=1)
    """How often a request is tried, with growing pauses."""
    unfinished_hours: float = Field(default=48, gt=0)
    """Uploads to which nothing was added for so long were left by killed writers and are aborted; longer than any run may
    take. Until then a copy goes on with its own."""
    lock: LockSettings | None = None
    """For the offsite store only: what the main store holds in between must be deleted."""

    @model_validator(mode="after")
    def _both_keys(self) -> S3StoreSettings:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key: give both or neither")
        return self

    def secrets(self) -> dict[str, Secret]:
        keys = {"access_key_id": self.access_key_id, "secret_access_key": self.secret_access_key}
        return {name: secret for name, secret in keys.items() if secret is not None}


def _store_kind(table: Any) -> str:
    kind = table.get("kind") if isinstance(table, dict) else getattr(table, "kind", None)
    return "(s3)" if kind == "s3" else "(local)"


# The tags stand in the path of an error, where `workers.settings` leaves out what is in parentheses.
StoreSettings = Annotated[
    Annotated[LocalStoreSettings, Tag("(local)")] | Annotated[S3StoreSettings, Tag("(s3)")],
    Discriminator(_store_kind),
]
"""Where artifacts lie."""


class EncryptionSettings(Strict):
    """Encryption at rest with age. Who holds none of the private keys can back up, and read nothing."""

    recipients: tuple[Annotated[str, AfterValidator(recipient)], ...] = ()
    """Public keys; the private key of any one opens what is stored from now on. None: nothing is encrypted."""
    identities: tuple[Secret, ...] = ()
    """Files with private keys, of old recipients as well; needed only where restores and verifications run."""

    def private_keys(self) -> list[Any]:
        """Return the private keys that can be read here. Raises ``SettingsError`` for a file that holds no key."""
        keys = []
        for index, secret in enumerate(self.identities):
            try:
                text = secret.resolve()
            except SettingsError:
                continue  # this host is not meant to read backups
            try:
                keys += identities(text)
            except ValueError as error:
                raise SettingsError("settings", [f"encryption.identities.{index}: {error}"]) from None
        return keys


class RetentionPolicy(Strict):
    """What is kept of a series of archives. Any rule keeps an archive; without a rule all are kept."""

    days: float | None = Field(default=None, gt=0)
    """Those that are no older."""
    last: int = Field(default=0, ge=0)
    """So many of the newest."""
    daily: int = Field(default=0, ge=0)
    """The newest of each day, for as many of the last days as had one; alike the following."""
    weekly: int = Field(default=0, ge=0)
    monthly: int = Field(default=0, ge=0)
    yearly: int = Field(default=0, ge=0)

    @property
    def is_empty(self) -> bool:
        return not any(self.model_dump().values())

    def __str__(self) -> str:
        days = [f"{self.days:g} days"] if self.days is not None else []
        counts = self.model_dump(exclude={"days"}, exclude_defaults=True)
        return ", ".join(days + [f"{count} {rule}" for rule, count in counts.items()])


class RetentionSettings(Strict):
    """How long what is kept; the runbook's times by default."""

    full_system: RetentionPolicy = RetentionPolicy(days=30)
    components: dict[str, RetentionPolicy] = Field(default_factory=dict)
    """For archives of single components, by the component's name; by default its kind says it."""
    wal_days: float = Field(default=7, gt=0)
    """How far back a recovery to a point in time reaches."""
    imported: RetentionPolicy = RetentionPolicy()
    """For archives that something else made."""


class OffsiteSettings(Strict):
    """A second store, elsewhere, that archives are copied to."""

    store: StoreSettings
    what: tuple[Literal["full", "components", "base", "wal"], ...] = ("full",)
    """Full archives; archives of single components; base backups of PostgreSQL; its WAL."""
    bytes_per_second: int | None = Field(default=None, gt=0)
    """The bandwidth that copying may take."""
    read_back: bool = True
    """Whether a copy is read again and compared; else the checksums of the transfer have to do."""
    retention: RetentionSettings = RetentionSettings()
    """Of the copies. What it would delete at once is not copied."""

    @model_validator(mode="after")
    def _infrequent_access(self) -> OffsiteSettings:
        if isinstance(self.store, S3StoreSettings) and "storage_class" not in self.store.model_fields_set:
            store = self.store.model_copy(update={"storage_class": "STANDARD_IA"})
            return self.model_copy(update={"store": store})
        return self


class BrokerSettings(Strict):
    """The Redis that carries tasks, results and leases."""

    host: str = "127.0.0.1"
    port: int = 6379
    database: int = 0
    password: Secret | None = None

    @property
    def url(self) -> str:
        """The URL with the password in it: a secret."""
        login = f":{quote(self.password.resolve(), safe='')}@" if self.password else ""
        return f"redis://{login}{self.host}:{self.port}/{self.database}"


class CatalogSettings(Strict):
    """The database of the catalogue, for the control workers and the command line."""

    url: str = "sqlite:///catalog.sqlite"
    """An SQLAlchemy URL without a password: ``sqlite:///…`` or ``postgresql+psycopg://user@host/database``."""
    password: Secret | None = None


class ScheduleSettings(Strict):
    """When beat sends what, as cron lines in UTC."""

    full_system: Cron | None = "0 2 * * *"
    components: dict[str, Cron] = Field(default_factory=dict)
    """A schedule of its own for a component, by its name."""
    wal: Cron | None = "0 */6 * * *"
    """When WAL is collected, where there is a ``wal_archive``."""
    base: Cron | None = "0 3 * * 0"
    """When a full base backup is made, where there is a ``wal_archive``."""
    incremental: Cron | None = "0 3 * * 1-6"
    """When an incremental one is made, where ``incremental`` is on as well."""
    prune: Cron | None = "30 4 * * *"
    """When what retention does not keep is deleted."""
    offsite: Cron | None = "0 4 * * *"
    """When the offsite store gets what it lacks, beside the copy after each backup."""
    verify: Cron | None = "0 5 * * *"
    """When the newest full archive is read and each part of it checked by its format."""
    rehearse: Cron | None = "0 6 * * 0"
    """When it is restored in scratch places and compared, and the newest base backup of each PostgreSQL server as well."""
    config_watch_seconds: float = Field(default=240, ge=1)
    """How often each ``config`` component is looked at for changes."""
    watchdog_seconds: float = Field(default=30, ge=1)


class LimitsSettings(Strict):
    """Bounds in seconds, so that every run ends."""

    component: float = Field(default=4 * 3600, gt=0)
    """The longest that one component's backup, or one step of its restore, may take."""
    run: float = Field(default=24 * 3600, gt=0)
    """The longest that a run may take, whatever happens."""
    absent_host: float = Field(default=120, gt=0)
    """How long a host's worker may stay away before the steps that wait for it fail."""
    lease: float = Field(default=30, gt=0)
    """How long a lease outlives its last heartbeat: how soon a dead worker is noticed."""
    lease_wait: float = Field(default=3600, gt=0)
    """How long a step waits for another run that works on the same component."""
    attempts: int = Field(default=2, ge=1)
    """How often a step is tried, the first time included."""
    streams: int = Field(default=4, ge=1)
    """How many streams of one component, databases for example, are read at the same time."""
    recovery_point: float = Field(default=6 * 3600, gt=0)
    """The age that the newest recoverable point of a PostgreSQL cluster should not exceed; ``status`` measures it."""
    health: float = Field(default=120, gt=0)
    """How long services may take to become healthy after a restore."""
