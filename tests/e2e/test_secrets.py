"""No secret shows: not on a command line, in a log, an event, a message, a result, the catalogue or an archive's texts."""

from __future__ import annotations

import base64
import json
import re
import tarfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest
import redis
from celery import Celery

from compose.demo.settings import BROKER_PASSWORD
from tests.rehearsal import Rehearsal, rehearsal
from tests.systems import System

pytestmark = pytest.mark.slow
KEPT = re.compile(r"flower-login|broker/data\.conf|store/.*\.tar\.gz")
"""What may hold secrets: files of the test's own servers, and archives, whose texts are looked at by themselves."""


class Watch:
    """Everything that can be seen from outside while the system works: command lines, events, what workers say."""

    def __init__(self, url: str) -> None:
        self.command_lines: set[bytes] = set()
        self.events: list[str] = []
        self.answers: list[str] = []
        self._stop = threading.Event()
        self._receiver: Any = None
        self._app = Celery("watch", broker=url, set_as_current=False)
        targets = (self._sample, self._receive, self._ask_what_is_active, self._ask_the_rest)
        self._threads = [threading.Thread(target=target, name=target.__name__) for target in targets]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._receiver.should_stop = True
        for thread in self._threads:
            thread.join()
        self._app.close()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.command_lines.add(path.read_bytes())
                except OSError:
                    continue

    def _receive(self) -> None:
        def keep(event: dict[str, Any]) -> None:
            self.events.append(json.dumps(event, default=str))

        with self._app.connection_for_read() as connection:
            self._receiver = self._app.events.Receiver(connection, handlers={"*": keep})
            # Without a timeout: it would only count the time in which no event comes, and workers send heartbeats.
            self._receiver.capture(limit=None, timeout=None, wakeup=False)

    def _ask_what_is_active(self) -> None:
        while not self._stop.is_set():
            self._ask("active", timeout=0.2)

    def _ask_the_rest(self) -> None:
        while not self._stop.is_set():
            for question in ("reserved", "stats", "conf"):
                self._ask(question, timeout=0.5)

    def _ask(self, question: str, *, timeout: float) -> None:
        found = getattr(self._app.control.inspect(timeout=timeout), question)()
        self.answers.append(json.dumps(found, default=str))


@pytest.fixture(scope="module")
def scene(
    cluster_factory: Callable[..., System], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rehearsal]:
    with rehearsal(cluster_factory, tmp_path_factory.mktemp("secrets")) as found:
        found.cluster.start_flower()
        yield found


@pytest.fixture(scope="module")
def secrets(scene: Rehearsal) -> dict[str, bytes]:
    """Every secret there is, by its name: passwords, and what the server keeps of those of its roles."""
    passwords, cluster = scene.demo.passwords, scene.cluster
    found = {
        "broker": cluster.environment[BROKER_PASSWORD],
        "redis": passwords.redis_password,
        "postgres": passwords.postgres_password,
        "app": passwords.app_password,
        "readonly": passwords.readonly_password,
        "flower": cluster.flower_login.read_text().partition(":")[2],
    }
    with psycopg.connect(scene.demo.admin_dsn, autocommit=True) as connection:
        rows = connection.execute("SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword IS NOT NULL")
        found |= {f"verifier of {name}": verifier for name, verifier in rows}
    return {name: secret.encode() for name, secret in found.items()}


@pytest.fixture(scope="module")
def seen(scene: Rehearsal, secrets: dict[str, bytes]) -> dict[str, bytes]:
    """All that was seen during a backup, a restore, a plan, and a backup that fails, by where."""
    url = f"redis://:{scene.cluster.environment[BROKER_PASSWORD]}@127.0.0.1:{scene.cluster.broker.port}/0"
    texts: dict[str, bytes] = {}
    with Watch(url) as watch:
        for words in (
            ["backup"],
            ["plan", scene.archive],
            ["restore", scene.archive, "--confirm", "ai-micro-service"],
            ["show", scene.archive],
            ["status"],
        ):
            done = scene.cli(*words)
            assert done.returncode == 0, done.stderr
            texts[f"output of {words[0]}"] = (done.stdout + done.stderr).encode()
        scene.demo.redis.stop()
        try:
            done = scene.cli("backup", "redis")
            assert done.returncode == 1, done.stderr
            texts["output of a failure"] = (done.stdout + done.stderr).encode()
        finally:
            scene.demo.redis.start()
        texts["Flower's pages"] = flower(scene)
    lines = watch.command_lines
    assert all(any(word in line for line in lines) for word in (b"pg_dump", b"pg_restore", b"redis"))
    assert any("task-progress" in event for event in watch.events)
    assert any("tasks.services.control_services" in answer for answer in watch.answers)
    texts["command lines"] = b"\n".join(lines)
    texts["events"] = "\n".join(watch.events).encode()
    texts["workers' answers"] = "\n".join(watch.answers).encode()
    return texts


def flower(scene: Rehearsal) -> bytes:
    login = base64.b64encode(scene.cluster.flower_login.read_bytes()).decode()
    found = b""
    for page in ("tasks", "workers", "broker", "api/tasks", "api/workers?refresh=1", "metrics"):
        request = urllib.request.Request(
            scene.cluster.flower_url.replace("/tasks", f"/{page}"),
            headers={"Authorization": f"Basic {login}"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            found += answer.read()
    assert b"backup_component" in found
    return found


def found_in(secrets: dict[str, bytes], texts: dict[str, bytes]) -> list[str]:
    return [
        f"{name} in {where}"
        for where, text in texts.items()
        for name, secret in secrets.items()
        if secret in text
    ]


def test_nothing_that_can_be_seen_from_outside_shows_a_secret(
    secrets: dict[str, bytes], seen: dict[str, bytes]
) -> None:
    assert len(set(secrets.values())) == len(secrets) >= 9
    assert found_in(secrets, seen) == []


def test_no_file_of_the_backup_system_holds_a_secret(
    scene: Rehearsal, secrets: dict[str, bytes], seen: dict[str, bytes]
) -> None:
    """Logs, catalogue, beat's file, sidecars, and the broker's own file: every message and result there was."""
    folder = scene.system.folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {
        name: path.read_bytes() for path in files if not KEPT.fullmatch(name := str(path.relative_to(folder)))
    }
    for expected in ("logs/control.log", "logs/beat.log", "logs/flower.log", "catalog.sqlite", "backup.toml"):
        assert expected in texts
    assert any(name.endswith(".metadata.json") for name in texts)
    assert any(
        name.startswith("broker/data/") and b"celery-task-meta" in text for name, text in texts.items()
    )
    assert found_in(secrets, texts) == []


def test_results_in_the_broker_hold_no_secret(
    scene: Rehearsal, secrets: dict[str, bytes], seen: dict[str, bytes]
) -> None:
    password = scene.cluster.environment[BROKER_PASSWORD]
    with redis.Redis(port=scene.cluster.broker.port, password=password) as broker:
        results = {
            str(key, "utf-8"): broker.get(key) or b"" for key in broker.scan_iter("celery-task-meta-*")
        }
    assert len(results) > 10
    assert found_in(secrets, results) == []


def test_the_texts_in_the_archive_hold_no_secret(scene: Rehearsal, secrets: dict[str, bytes]) -> None:
    with tarfile.open(scene.system.store / "full_system" / scene.archive) as tar:
        texts = {
            Path(member.name).name: file.read()
            for member in tar
            if not member.name.endswith(".zst") and (file := tar.extractfile(member))
        }
    assert sorted(texts) == ["RESTORE.md", "backup.log", "metadata.json"]
    assert found_in(secrets, texts) == []
