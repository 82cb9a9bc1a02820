"""The configuration: every fault at once, each with its path, and nothing started with a wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from compose.demo.embedded import free_port
from tests.configured import MINIMAL, write_settings
from workers.component import load
from workers.errors import SettingsError
from workers.settings import CONFIG_VARIABLE, read_settings

ROOT = Path(__file__).parents[2]

WRONG = """
hosts = ["db1", "app 1"]
colour = "red"
compression_level = "high"

[system]
name = ""
verison = "2"

[store]
kind = "floppy"
path = "/srv/backups"

[broker]
port = "none"
password = { env = "A", file = "/b" }

[[services]]
name = "web"
host = "web9"
uses = ["keys", "nothing"]

[[services]]
name = "web"
host = "db1"

[components.keys]
kind = "files"
host = "db2"
path = "relative"
owner = ["root"]

[components.cache]
kind = "memcached"
host = "db1"

[components.blind]
host = "nowhere"

[components.settings]
kind = "config"
host = "db1"
root = "/srv"
paths = []

[components.Upper]
kind = "files"
host = "db1"
path = "/srv/upper"
compose_file = "compose.yml"

[schedule]
full_system = "61 2 * * *"
watchdog_seconds = 0

[schedule.components]
keys = "every day"
ghost = "0 * * * *"

[limits]
attempts = 0
"""

FAULTS = {
    "hosts.1": "pattern",
    "colour": "not permitted",
    "compression_level": "integer",
    "system.name": "at least 1 character",
    "system.verison": "not permitted",
    "store.kind": "'local'",
    "broker.port": "integer",
    "broker.password": "either { env",
    "services.0.host": "there is no host 'web9'",
    "services.0.uses": "there is no component 'nothing'",
    "services.1.name": "there is another service 'web'",
    "components.keys.path": "absolute path",
    "components.keys.owner": "valid string",
    "components.keys.host": "there is no host 'db2'; the hosts are db1, app 1",
    "components.cache.kind": "there is no component kind 'memcached'",
    "components.blind.kind": "there is no component kind ''",
    "components.blind.host": "there is no host 'nowhere'",
    "components.settings.paths": "at least 1 item",
    "components.Upper.name": "pattern",
    "components.Upper": "a compose_file needs the name of the container",
    "schedule.full_system": "not a cron line of five fields: '61 2 * * *'",
    "schedule.watchdog_seconds": "greater than or equal to 1",
    "schedule.components.keys": "not a cron line of five fields: 'every day'",
    "schedule.components.ghost": "there is no component 'ghost'",
    "limits.attempts": "greater than or equal to 1",
}


def faults(folder: Path, text: str) -> list[str]:
    path = folder / "backup.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as raised:
        read_settings(path)
    return raised.value.errors


def test_reports_every_fault_at_once_with_its_path_and_what_was_expected(tmp_path: Path) -> None:
    found = faults(tmp_path, WRONG)

    # A fault of one component's own check hides none of another's; only its own two cannot show together.
    found_paths = sorted({line.partition(": ")[0] for line in found})
    assert found_paths == sorted(set(FAULTS) - {"components.Upper"})
    for path, expected in FAULTS.items():
        if path != "components.Upper":
            assert any(line.startswith(f"{path}: ") and expected in line for line in found), (path, found)
    assert len(found) == len(set(found)), "no fault is told twice"


def test_checks_that_span_several_keys_have_a_path_as_well(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        MINIMAL.replace('"/srv/keys"', '"/srv/keys"\ncompose_file = "c.yml"') + '\n[store]\npath="/s"',
    )

    assert found == ["components.keys.(whole): Value error, a compose_file needs the name of the container"]


def test_the_text_counts_and_lists_the_faults(tmp_path: Path) -> None:
    path = tmp_path / "backup.toml"
    path.write_text(WRONG)
    with pytest.raises(SettingsError) as raised:
        read_settings(path)

    lines = str(raised.value).splitlines()
    assert lines[0] == f"{path}: {len(raised.value.errors)} error(s)"
    assert lines[1:] == [f"  {line}" for line in raised.value.errors]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("hosts = [", "not TOML"),
        ("", "hosts: Field required"),
        ("", "system: Field required"),
        ("", "store: Field required"),
        ("", "components: at least one component is needed"),
        ("components = 3", "components: expected tables"),
        ("[components]\nkeys = 3", "components.keys: expected a table"),
        ('schedule = "daily"', "schedule: Input should be a valid dictionary"),
        ('[schedule]\ncomponents = "daily"', "schedule.components: Input should be a valid dictionary"),
        ("[schedule.components]\nghost = '0 * * * *'", "schedule.components.ghost: there is no component"),
        ('services = "web"', "services: Input should be a valid tuple"),
        ('[[services]]\nuses = [["keys"]]', "services.0.uses.0: Input should be a valid string"),
        ('[[services]]\nuses = "keys"', "services.0.uses: Input should be a valid tuple"),
        ("[[services]]\nuses = ['ghost']", "services.0.uses: there is no component 'ghost'"),
        ('hosts = "db1"', "hosts: Input should be a valid tuple"),
        ('hosts = ["db1"]\n[components.x]\nhost = ["db1"]', "components.x.host: there is no host ['db1']"),
    ],
)
def test_whatever_the_file_holds_is_a_fault_with_a_path_and_no_traceback(
    tmp_path: Path, text: str, fault: str
) -> None:
    assert any(line.startswith(fault) for line in faults(tmp_path, text)), faults(tmp_path, text)


@pytest.mark.parametrize(
    "kind", ["", "memcached", "../files", "files.Component", "trees", "__init__", "psql", "os"]
)
def test_a_kind_is_a_module_with_a_component_and_nothing_else(kind: str) -> None:
    with pytest.raises(SettingsError, match="there is no component kind"):
        load(kind)


@pytest.mark.parametrize("kind", ["files", "config", "redis", "postgres"])
def test_the_four_kinds_are_found_by_name(kind: str) -> None:
    assert load(kind).__module__ == f"tasks.components.{kind}"


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"No such file or directory; set {CONFIG_VARIABLE}"):
        read_settings(tmp_path / "absent.toml")


def test_right_settings_are_read_with_their_defaults(tmp_path: Path) -> None:
    settings = read_settings(write_settings(tmp_path))

    assert settings.system.name == "shop"
    assert settings.hosts == ("db1", "app1")
    assert {name: (part.name, part.host) for name, part in settings.components.items()} == {
        "keys": ("keys", "app1"),
        "settings": ("settings", "app1"),
    }
    assert settings.catalog.url.startswith("sqlite:///")
    assert settings.schedule.full_system == "0 2 * * *"


SECRETS = """
[broker]
password = { env = "TEST_BROKER_PASSWORD" }

[components.cache]
kind = "redis"
host = "db1"
start = ["true"]
stop = ["true"]
password = { env = "TEST_CACHE_PASSWORD" }

[components.other]
kind = "redis"
host = "app1"
start = ["true"]
stop = ["true"]
password = { file = "/nowhere/other" }
"""


def test_missing_secrets_are_those_of_the_broker_and_of_the_hosts_own_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_settings(write_settings(tmp_path, more=SECRETS))
    for name in ("TEST_BROKER_PASSWORD", "TEST_CACHE_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    broker = "broker.password: the environment variable TEST_BROKER_PASSWORD is not set"
    cache = "components.cache.password: the environment variable TEST_CACHE_PASSWORD is not set"
    other = "components.other.password: /nowhere/other cannot be read: No such file or directory"

    assert settings.missing_secrets([]) == [broker]
    assert settings.missing_secrets(["db1"]) == [broker, cache]
    assert settings.missing_secrets(["app1"]) == [broker, other]
    assert settings.missing_secrets(["db1", "app1"]) == [broker, cache, other]

    monkeypatch.setenv("TEST_BROKER_PASSWORD", "b")
    monkeypatch.setenv("TEST_CACHE_PASSWORD", "")  # empty is missing
    assert settings.missing_secrets(["db1"]) == [cache]
    monkeypatch.setenv("TEST_CACHE_PASSWORD", "c")
    assert settings.missing_secrets(["db1"]) == []


def test_a_broker_password_of_any_characters_fits_into_its_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_settings(write_settings(tmp_path, more=SECRETS))
    monkeypatch.setenv("TEST_BROKER_PASSWORD", "p@ss:/?#[é] %")

    assert unquote(urlsplit(settings.broker.url).password or "") == "p@ss:/?#[é] %"
    assert "p@ss" not in repr(settings)


def start(config: Path, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TEST_")}
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", *program.split()],
        cwd=ROOT,
        env={**environment, CONFIG_VARIABLE: str(config), **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    "case", ["wrong settings", "missing secrets", "component's secret", "unknown queue", "no file", "beat"]
)
def test_a_worker_that_is_not_set_up_right_exits_2_and_starts_nothing(tmp_path: Path, case: str) -> None:
    port = free_port()  # nothing listens there: a worker that tried to start would say so
    broker = f"[broker]\nport = {port}\n"
    program, variables = "workers worker --pool solo -n test@%h -Q host.db1", dict[str, str]()
    match case:
        case "wrong settings":
            config = write_settings(tmp_path, more=f'{broker}colour = "red"\n[limits]\nattempts = 0')
            expected = ["broker.colour: Extra inputs", "limits.attempts: Input should be"]
        case "missing secrets":
            config = write_settings(tmp_path, more=SECRETS.replace("[broker]", broker))
            expected = ["broker.password: the environment", "components.cache.password: the environment"]
        case "component's secret":
            config = write_settings(tmp_path, more=SECRETS.replace("[broker]", broker))
            variables["TEST_BROKER_PASSWORD"] = "b"
            expected = ["components.cache.password: the environment"]
        case "beat":
            config = write_settings(tmp_path, more='[schedule]\nfull_system = "at night"')
            program = f"beat_schedule beat --schedule {tmp_path / 'beat'}"
            expected = ["schedule.full_system: Value error, not a cron line"]
        case "unknown queue":
            config, program = write_settings(tmp_path, more=broker), f"{program},host.web9"
            expected = ["hosts: there is no queue 'host.web9'"]
        case _:
            config, expected = tmp_path / "absent.toml", ["absent.toml: 1 error(s)", "No such file"]

    done = start(config, program, **variables)

    assert done.returncode == 2, done.stderr
    for line in expected:
        assert line in done.stderr
    assert "components.other" not in done.stderr, "another host's secrets are not this one's concern"
    assert "Traceback" not in done.stderr
    assert "127.0.0.1" not in done.stdout + done.stderr, "it went on to the broker"
