"""The validated configuration: one TOML file, every error at once, each with its path.

The file is named by the environment variable ``AI_MICRO_BACKUP_CONFIG``, by default ``backup.toml`` in the working
folder. ``backup.example.toml`` describes every key.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from workers.component import BaseComponent, load
from workers.errors import Permanent, SettingsError
from workers.secret import Strict
from workers.sections import (
    BrokerSettings,
    CatalogSettings,
    EncryptionSettings,
    HostName,
    LimitsSettings,
    LocalStoreSettings,
    OffsiteSettings,
    RetentionSettings,
    S3StoreSettings,
    ScheduleSettings,
    ServiceSettings,
    StoreSettings,
    SystemSettings,
)

CONFIG_VARIABLE = "AI_MICRO_BACKUP_CONFIG"


class Settings(Strict):
    """The whole configuration."""

    system: SystemSettings
    hosts: tuple[HostName, ...] = Field(min_length=1)
    components: dict[str, BaseComponent]
    services: tuple[ServiceSettings, ...] = ()
    store: StoreSettings
    offsite: OffsiteSettings | None = None
    broker: BrokerSettings = BrokerSettings()
    encryption: EncryptionSettings = EncryptionSettings()
    catalog: CatalogSettings = CatalogSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    retention: RetentionSettings = RetentionSettings()
    limits: LimitsSettings = LimitsSettings()
    compression_level: int = Field(default=3, ge=1, le=19)

    @field_validator("store")
    @classmethod
    def _deletable(cls, store: LocalStoreSettings | S3StoreSettings) -> LocalStoreSettings | S3StoreSettings:
        if isinstance(store, S3StoreSettings) and store.lock:
            raise ValueError("parts must be deleted from the main store; `lock` is for offsite.store")
        return store

    def store_of(self, table: str) -> LocalStoreSettings | S3StoreSettings:
        """Return the store of the table ``store`` or ``offsite``. Raises ``Permanent`` when there is none."""
        if table == "store":
            return self.store
        if table == "offsite" and self.offsite:
            return self.offsite.store
        raise Permanent(f"the settings have no store {table!r}")

    def missing_secrets(self, hosts: Iterable[str]) -> list[str]:
        """Return a line for each secret missing here: the broker's, the store's, those of the components of ``hosts``."""
        secrets = {"broker.password": self.broker.password}
        secrets |= {f"store.{key}": secret for key, secret in self.store.secrets().items()}
        for name, component in self.components.items():
            if component.host in hosts:
                secrets |= {f"components.{name}.{key}": secret for key, secret in component.secrets().items()}
        lines = []
        for path, secret in secrets.items():
            if secret is not None:
                try:
                    secret.resolve()
                except SettingsError as error:
                    lines += [f"{path}: {line}" for line in error.errors]
        return lines


class Environment(BaseSettings):
    """What the environment says, each variable with the prefix ``AI_MICRO_BACKUP_``."""

    model_config = SettingsConfigDict(env_prefix="AI_MICRO_BACKUP_")

    config: Path = Path("backup.toml")


@functools.cache
def get_settings() -> Settings:
    """Return the settings of the file that ``AI_MICRO_BACKUP_CONFIG`` names, read once a process."""
    return read_settings(Environment().config)


def read_settings(path: Path) -> Settings:
    """Return the settings in the TOML file at ``path``.

    Raises ``SettingsError`` with every fault of the file, each with its path and what was expected.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        hint = f"set {CONFIG_VARIABLE} to your configuration, or copy backup.example.toml"
        raise SettingsError(str(path), [f"cannot be read: {error.strerror}; {hint}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), [f"not TOML: {error}"]) from error
    tables = data.pop("components", {})
    components, lines = _components(tables if isinstance(tables, dict) else {})
    settings = None
    try:
        settings = Settings.model_validate({**data, "components": components})
    except ValidationError as error:
        lines += _lines(error)
    lines += _unknown_names(data, tables)
    if settings is None or lines:
        raise SettingsError(str(path), lines)
    return settings


def _components(tables: dict[str, Any]) -> tuple[dict[str, BaseComponent], list[str]]:
    components, lines = {}, []
    for name, table in tables.items():
        path = f"components.{name}"
        if not isinstance(table, dict):
            lines.append(f"{path}: expected a table")
            continue
        try:
            components[name] = load(str(table.get("kind", ""))).model_validate({**table, "name": name})
        except SettingsError as error:
            lines += [f"{path}.{line}" for line in error.errors]
        except ValidationError as error:
            lines += [f"{path}.{line}" for line in _lines(error)]
    return components, lines


def _lines(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(part for part in map(str, fault['loc']) if part[:1] != '(') or '(whole)'}: {fault['msg']}"
        for fault in error.errors(include_input=False, include_url=False)
    ]


def _unknown_names(data: dict[str, Any], tables: Any) -> list[str]:
    """Check the names that one part of the file takes from another, whether or not those parts are right."""
    hosts, schedule, services = data.get("hosts", ()), data.get("schedule", {}), data.get("services", ())
    if not isinstance(tables, dict):
        return ["components: expected tables"]
    lines = [] if tables else ["components: at least one component is needed"]
    placed = {f"components.{name}": table for name, table in tables.items()}
    for index, service in enumerate(services if isinstance(services, list) else ()):
        placed[f"services.{index}"] = service
        used = service.get("uses") if isinstance(service, dict) else None
        names = [name for name in used if isinstance(name, str)] if isinstance(used, list) else []
        name = service.get("name") if isinstance(service, dict) else None
        if any(isinstance(other, dict) and other.get("name") == name for other in services[:index]):
            lines.append(f"services.{index}.name: there is another service {name!r}")
        unknown = [name for name in names if name not in tables]
        lines += [f"services.{index}.uses: there is no component {name!r}" for name in unknown]
    known = f"the hosts are {', '.join(map(str, hosts))}" if isinstance(hosts, list) else ""
    for path, table in placed.items():
        if known and isinstance(table, dict) and "host" in table and table["host"] not in hosts:
            lines.append(f"{path}.host: there is no host {table['host']!r}; {known}")
    offsite = data.get("offsite", {})
    named = {"schedule": schedule, "retention": data.get("retention", {})}
    named["offsite.retention"] = offsite.get("retention", {}) if isinstance(offsite, dict) else {}
    for path, table in named.items():
        components = table.get("components", {}) if isinstance(table, dict) else {}
        for name in components if isinstance(components, dict) else ():
            if name not in tables:
                lines.append(f"{path}.components.{name}: there is no component {name!r}")
    return lines
