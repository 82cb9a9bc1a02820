"""backup.example.toml is the runbook's system, valid, and complete: it shows every key there is."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from workers.component import BaseComponent, load
from workers.sections import OffsiteSettings, S3StoreSettings, ServiceSettings
from workers.settings import Settings, read_settings

EXAMPLE = Path(__file__).parents[2] / "backup.example.toml"
FOLDERS = ("api-auth", "api-user", "api-admin", "front-user", "front-admin", "postgres", "redis")


@pytest.fixture(scope="module")
def settings() -> Settings:
    return read_settings(EXAMPLE)


def test_the_components_are_the_runbooks(settings: Settings) -> None:
    found = {
        name: (component.metadata_key, component.container) for name, component in settings.components.items()
    }
    assert found == {
        "postgres": ("postgresql", "postgres"),
        "redis": ("redis", "redis"),
        "uploads": ("files", "admin-api"),
        "keys": ("files", "auth-service"),
        "config": ("config", None),
    }
    dumped = {name: component.model_dump() for name, component in settings.components.items()}
    assert dumped["postgres"]["databases"] == ("authdb", "apidb", "admindb")
    assert (dumped["uploads"]["path"], dumped["keys"]["path"]) == ("/app/uploads", "/app/keys")
    files = {f"ai-micro-{folder}/{name}" for folder in FOLDERS for name in (".env", "docker-compose.yml")}
    assert set(dumped["config"]["paths"]) == files
    assert len(dumped["config"]["paths"]) == 14
    assert dumped["config"]["exclude"] == ("node_modules", ".next", "__pycache__", "*.pyc")


def test_the_services_stop_in_the_runbooks_order_and_their_health_is_asked(settings: Settings) -> None:
    order = ["front-admin", "front-user", "admin-api", "user-api", "auth-service"]
    assert [service.name for service in settings.services] == order
    ports = {service.name: service.health.port for service in settings.services if service.health}
    assert ports == {"auth-service": 8001, "user-api": 8002, "admin-api": 8003}


def test_the_schedule_is_the_runbooks(settings: Settings) -> None:
    assert settings.schedule.full_system == "0 2 * * *"
    # Redis every six hours, the files daily, and the configuration when it changes: the full backup is among them.
    assert settings.schedule.components == {
        "redis": "0 8,14,20 * * *",
        "uploads": "0 14 * * *",
        "keys": "0 14 * * *",
    }
    assert settings.schedule.config_watch_seconds == 240


def test_secrets_are_named_and_not_contained(settings: Settings) -> None:
    sources = [settings.broker.password, *settings.components["redis"].secrets().values()]
    assert all(source and source.file and source.file.is_relative_to("/run/secrets") for source in sources)


def test_every_key_is_shown_and_what_is_commented_out_is_right() -> None:
    """With every commented-out key taken in, the file still validates, except for pairs that exclude each other."""
    text = EXAMPLE.read_text()
    key = re.compile(r"^(?:# )?([a-z_]+) = ", re.MULTILINE)
    shown = set(key.findall(text))
    kinds: list[type[BaseComponent]] = [load(kind) for kind in ("postgres", "redis", "files", "config")]
    models: list[type[BaseModel]] = [*kinds, ServiceSettings, *_tables(Settings)]
    known = {name for model in models for name in model.model_fields}
    tables = {
        "components",
        "services",
        "system",
        "encryption",
        "store",
        "offsite",
        "broker",
        "catalog",
        "schedule",
        "limits",
        "retention",
    }
    explained = {
        "start",
        "stop",
        "status",
        "compose_service",
        "stop_timeout",
        "volume",
        "image",
    }  # in prose
    assert known - tables - explained <= shown
    assert all(f"`{name}`" in text for name in explained)
    assert shown <= known | set(tomllib.loads(text)["schedule"]["components"])


def test_the_values_shown_for_optional_keys_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    # Inside a table only: prose lines never look like a key. A table that is commented out comes with its keys.
    path.write_text(re.sub(r"^# (\[[a-z.]+\]|[a-z_]+ = .*)$", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    settings = read_settings(path)
    defaults = read_settings(EXAMPLE)
    assert settings.limits == defaults.limits, "what is shown for a limit is not its default"
    assert settings.schedule == defaults.schedule
    assert settings.broker == defaults.broker
    assert settings.catalog.password is not None


def test_every_key_of_an_s3_store_is_shown_with_its_default_or_a_valid_value() -> None:
    example, _, offsite = EXAMPLE.read_text().partition("#   [offsite]")
    lines = re.findall(r"^#   ([a-z_]+ = .*)$", example, flags=re.MULTILINE)
    shown = S3StoreSettings.model_validate(tomllib.loads("\n".join(lines)))
    assert shown.model_fields_set == set(S3StoreSettings.model_fields) - {
        "lock"
    }  # which is for offsite stores
    for name in ("checksums", "attempts", "unfinished_hours"):
        assert getattr(shown, name) == S3StoreSettings.model_fields[name].default

    keys = re.findall(r"^#   ([a-z_]+ = .*)$", offsite, flags=re.MULTILINE)
    table = tomllib.loads("\n".join(keys))
    store = {"kind": "s3", "bucket": "b", "lock": table.pop("lock")}
    described = OffsiteSettings.model_validate({"store": store, **table})
    assert described.model_fields_set == set(OffsiteSettings.model_fields)
    assert (described.what, described.read_back) == (("full",), True)


def _tables(model: type[BaseModel]) -> list[type[BaseModel]]:
    tables = [
        field.annotation
        for field in model.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    return [model, *tables]
