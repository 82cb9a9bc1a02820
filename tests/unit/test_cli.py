"""The console script: usage, exit statuses and output of what needs no broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from kombu.exceptions import OperationalError
from typer.testing import CliRunner, Result

from compose.demo.embedded import free_port
from tasks import archive, cli
from tasks.commands import common
from tests.configured import configured, write_settings
from workers import catalog, errors
from workers.catalog import Artifact, Kind
from workers.errors import BackupError
from workers.settings import CONFIG_VARIABLE, Settings, get_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def configuration(tmp_path: Path) -> Iterator[Settings]:
    with configured(
        write_settings(tmp_path, more=f'[catalog]\nurl = "sqlite:///{tmp_path / "catalog.sqlite"}"')
    ) as found:
        yield found


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.cli, words)


@pytest.mark.parametrize(
    "words",
    [
        ["restore"],
        ["restore", "a", "b"],
        ["plan"],
        ["show"],
        ["list", "--colour"],
        ["backup", "--colour", "red"],
        ["destroy"],
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(words: list[str]) -> None:
    done = call(*words)

    assert done.exit_code == 2
    assert "Usage" in done.stderr
    assert done.stdout == ""


def test_every_command_explains_itself_and_has_json() -> None:
    help_text = call("--help")
    assert help_text.exit_code == 0
    for command in typer.main.get_command(cli.cli).commands:  # type: ignore[attr-defined]  # a group, as it has commands
        assert command in help_text.stdout
        done = call(command, "--help")
        assert done.exit_code == 0
        assert "--json" in done.stdout


@pytest.mark.parametrize("words", [["list"], ["show", "x"], ["status"]])
def test_wrong_settings_exit_2_with_every_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    path = write_settings(
        tmp_path,
        more="[limits]\nattempts = 0\ncolour = 1\n[components.Bad]\nkind='files'\nhost='db1'\npath='/a'",
    )
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    get_settings.cache_clear()
    done = call(*words)
    get_settings.cache_clear()

    assert done.exit_code == 2
    text = " ".join(done.stderr.split())
    assert "limits.attempts" in text
    assert "limits.colour" in text
    assert "'^[a-z0-9][a-z0-9-]{0,31}$'" in text, "brackets are not markup"
    assert done.stdout == ""


STATUSES = {
    "SettingsError": 2,
    "NotConfirmed": 3,
    "ObjectNotFound": 4,
    "CatalogError": 4,
    "RuntimeUnavailable": 5,
    "StoreUnavailable": 5,
    "LeaseUnavailable": 5,
    "Transient": 5,
}


def examples() -> list[Exception]:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BackupError)
    ]
    made: dict[type, Exception] = {
        errors.SettingsError: errors.SettingsError("backup.toml", ["a.b: wrong"]),
        errors.CommandFailed: errors.CommandFailed("pg_dump", 3, "no such table\n"),
    }
    return [made.get(kind) or kind("why") for kind in kinds]


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_every_error_has_its_exit_status_and_its_text_is_shown(
    configuration: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(catalog, "list_artifacts", fail)
    done = call("list", "--json")

    assert done.exit_code == STATUSES.get(type(error).__name__, 1)
    assert "".join(str(error).split()) in "".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.parametrize("error", [OperationalError("redis://:secret@x"), ConnectionRefusedError("refused")])
def test_a_broker_that_is_away_exits_5_without_its_address(
    configuration: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(common, "send", fail)
    done = call("backup")

    assert done.exit_code == 5
    assert "the broker does not answer" in done.stderr
    assert "secret" not in done.stderr


def test_the_exit_statuses_are_those_that_the_help_promises() -> None:
    document = str(cli.__doc__)
    words = {"DONE": "0 done", "FAILED": "1 the run failed", "USAGE": "2 wrong settings or usage",
             "NOT_CONFIRMED": "3 not confirmed", "NOT_FOUND": "4 no such archive or run", "UNAVAILABLE": "5\nthe broker"}  # fmt: skip
    assert {member.name: member.value for member in cli.Exit} == {
        name: int(text[0]) for name, text in words.items()
    }
    for text in words.values():
        assert " ".join(text.split()) in " ".join(document.split())


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_an_error_of_a_worker_arrives_as_what_it_was(error: Exception) -> None:
    """As it goes through the result backend: else the caller's exit status would be another."""
    from celery import Celery
    from celery.backends.base import Backend

    backend = Backend(Celery(set_as_current=False), serializer="json")
    arrived = backend.exception_to_python(
        json.loads(json.dumps(backend.prepare_exception(error, serializer="json")))
    )

    assert type(arrived) is type(error)
    assert str(arrived) == str(error)


def add(key: str, hours: int) -> None:
    catalog.add_artifact(
        Artifact(
            key=key, run_id="r", job="j", size=5_000_000, sha256="f" * 64, details={"parts": []},
            created=datetime(2026, 11, 22, tzinfo=UTC) + timedelta(hours=hours),
        )
    )  # fmt: skip


def test_archives_are_listed_the_newest_first(configuration: Settings) -> None:
    empty = call("list")
    assert (empty.exit_code, "no archive yet" in empty.stdout) == (0, True)
    assert json.loads(call("list", "--json").stdout) == []
    add("full_system/full_backup_20261122_010000.tar.gz", 1)
    add("full_system/full_backup_20261122_020000.tar.gz", 2)

    rows = json.loads(call("list", "--json").stdout)
    assert [row["archive"][-22:-7] for row in rows] == ["20261122_020000", "20261122_010000"]
    assert rows[0] == {
        "archive": "full_system/full_backup_20261122_020000.tar.gz",
        "created": "2026-11-22 02:00:00",
        "size": 5_000_000,
        "sha256": "f" * 64,
    }
    done = call("list")
    assert done.exit_code == 0
    assert done.stdout.index("020000") < done.stdout.index("010000")
    assert "5.0 MB" in done.stdout


def test_a_run_is_shown_with_its_steps_and_a_cause_of_any_characters(configuration: Settings) -> None:
    run = catalog.open_run(Kind.BACKUP, job="manual", components=["keys"])
    assert run
    catalog.finish_run(run.id, cause="keys: [/red] [bold] ['a'] é")

    done = call("show", run.id, "--json")
    document = json.loads(done.stdout)
    assert (document["id"], document["state"], document["steps"]) == (run.id, "failed", [])
    assert document["cause"] == "keys: [/red] [bold] ['a'] é"
    assert call("show", run.id).exit_code == 0


def test_a_run_that_failed_exits_1_with_its_cause_whatever_it_holds(
    configuration: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = catalog.open_run(Kind.BACKUP, job="manual", components=["keys"])
    assert run
    catalog.finish_run(run.id, cause="keys: [/red] [bold] ['a'] é")
    monkeypatch.setattr(common, "send", lambda *_args, **_kwargs: run.id)

    for words in (["backup"], ["backup", "--no-wait"], ["restore", "a", "--confirm", "shop"]):
        done = call(*words)
        assert done.exit_code == 1, words
        assert "keys: [/red] [bold] ['a'] é" in " ".join(done.stderr.split())
    done = call("backup", "--json")
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (1, "failed")


def test_what_is_not_there_exits_4(configuration: Settings) -> None:
    done = call("show", "full_backup_20200101_000000")

    assert done.exit_code == 4
    assert "there is no archive full_backup_20200101_000000; the newest are: none" in " ".join(
        done.stderr.split()
    )


def test_what_is_sent_is_what_was_asked_for(configuration: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = catalog.open_run(Kind.PLAN, job="manual", components=["keys"], archive="full_system/a.tar.gz")
    assert run
    made = datetime.now(UTC) - timedelta(days=2, hours=3, minutes=4, seconds=30)
    record = archive.RunRecord(id="a", job="j", started=made, finished=made)
    metadata = archive.Metadata(
        backup_time=made, system_version="2.1", components={}, system_name="[shop]", run=record, parts=()
    )
    monkeypatch.setattr(archive, "read_metadata", lambda _store, key: {"full_system/a.tar.gz": metadata}[key])
    catalog.note(run.id, outcome={"overwrites": ["keys: [all] of /srv"]})
    catalog.finish_run(run.id)
    sent: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def send(task: Any, *args: Any, **kwargs: Any) -> str:
        sent.append((task.name.rpartition(".")[2], args, kwargs))
        return run.id

    monkeypatch.setattr(common, "send", send)
    for words in (
        ["backup"],
        ["backup", "keys", "settings"],
        ["restore", "a", "--confirm", "shop"],
        ["restore", "a", "--component", "keys"],
        ["restore", "a", "--plan"],
        ["backup", "keys", "--database", "authdb", "--format", "dumpall"],
        ["restore", "a", "--component", "keys", "--database", "x", "--into", "y", "--onto-new-cluster"],
        ["plan", "a", "--component", "keys"],
        ["restore", "a", "--confirm", "shop", "--from", "offsite"],
        ["plan", "a", "--from", "offsite"],
        ["offsite"],
    ):
        done = call(*words)
        assert done.exit_code == 0, done.output
        origin, *lines = done.stdout.splitlines()
        assert origin == (
            f"full_system/a.tar.gz: [shop] 2.1 of {made:%Y-%m-%d %H:%M:%S} UTC, 2 d 3 h 4 min old"
        )
        assert lines == ["keys: [all] of /srv"]

    assert sent == [
        ("backup_full_system", (None,), {}),
        ("backup_full_system", (["keys", "settings"],), {}),
        ("restore_full_system", ("a",), {"confirm": "shop", "plan": False, "store": "store"}),
        ("restore_component", ("a", "keys"), {"confirm": None, "plan": False, "store": "store"}),
        ("restore_full_system", ("a",), {"confirm": None, "plan": True, "store": "store"}),
        (
            "backup_full_system",
            (["keys"],),
            {"options": {"databases": ["authdb"], "format": "dumpall"}},
        ),
        (
            "restore_component",
            ("a", "keys"),
            {
                "options": {"databases": ["x"], "into": "y", "new_cluster": True},
                "confirm": None,
                "plan": False,
                "store": "store",
            },
        ),
        ("restore_component", ("a", "keys"), {"confirm": None, "plan": True, "store": "store"}),
        ("restore_full_system", ("a",), {"confirm": "shop", "plan": False, "store": "offsite"}),
        ("restore_full_system", ("a",), {"confirm": None, "plan": True, "store": "offsite"}),
        ("copy_offsite", (), {}),
    ]


@pytest.mark.parametrize("words", [["status", "--json"], ["backup"]])
def test_without_a_broker_it_exits_5_soon(tmp_path: Path, words: list[str]) -> None:
    config = write_settings(
        tmp_path, more=f"[broker]\nport = {free_port()}\n[catalog]\nurl = 'sqlite:///{tmp_path}/c'"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tasks.cli", *words], cwd=ROOT, env={**os.environ, CONFIG_VARIABLE: str(config)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip

    assert done.returncode == 5, done.stderr[-2000:]
    assert "the broker does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert time.monotonic() - began < 45
