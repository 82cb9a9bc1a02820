"""A changed configuration is backed up without being asked, and the run says what changed without a value of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compose.demo.embedded_daemon import wait_until
from tests.systems import System

COMPONENTS = """
[components.config]
kind = "config"
host = "app1"
root = "{root}"
paths = ["api/.env", "api/docker-compose.yml", "api/key.pem", "api/later.env"]

[components.data]
kind = "files"
host = "app1"
path = "{data}"
"""
COMPOSE = "services:\n  auth-api:\n    environment:\n      PASSWORD: {}\n"
SECRETS = ("geheim-1", "geheim-2", "geheim-3")
FIRST = {
    "api/.env": f"# of us\nPASSWORD={SECRETS[0]}\nDEBUG=1\n",
    "api/docker-compose.yml": COMPOSE.format(SECRETS[0]),
    "api/key.pem": SECRETS[0],
}
SECOND = {
    "api/.env": f"PASSWORD={SECRETS[1]}\nTOKEN={SECRETS[2]}\n",
    "api/docker-compose.yml": COMPOSE.format(SECRETS[1]),
    "api/later.env": f"X={SECRETS[2]}",
}
CHANGES = [
    "changed: api/.env",
    "  removed: DEBUG",
    "  value changed: PASSWORD",
    "  added: TOKEN",
    "changed: api/docker-compose.yml",
    "  value changed: services.auth-api.environment.PASSWORD",
    "removed: api/key.pem",
    "added: api/later.env",
]

pytestmark = pytest.mark.slow


class Configuration:
    """The watched folder: a link, so that all of its files change in one moment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self._versions = folder, folder / "srv", 0

    def become(self, files: dict[str, str], mode: int = 0o600) -> None:
        self._versions += 1
        version = self.folder / str(self._versions)
        for name, text in files.items():
            (version / name).parent.mkdir(parents=True, exist_ok=True)
            (version / name).write_text(text)
            (version / name).chmod(mode)
        new = self.folder / "new"
        new.symlink_to(version)
        new.rename(self.root)


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Configuration:
    configuration = Configuration(tmp_path_factory.mktemp("watched"))
    configuration.become(FIRST)
    data = configuration.folder / "data"
    data.mkdir()
    (data / "file").touch()
    os.mkfifo(data / "fifo")
    return configuration


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], configuration: Configuration) -> System:
    components = COMPONENTS.format(root=configuration.root, data=configuration.folder / "data")
    system = cluster_factory(
        components, workers=("control", "app1"), schedule="config_watch_seconds = 1", beat=False
    )
    assert system.cli("list") == []
    system.cluster.start_beat()
    return system


def noticed(system: System, lines: list[str]) -> dict[str, Any]:
    """Wait for a run that was started by a change, and recorded it as these lines; without lines, for the first."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        query = "SELECT id, archive, outcome FROM run WHERE job = 'config-changed' AND state = 'COMPLETE' ORDER BY id"
        for run_id, archive, outcome in system.query(query):
            change = json.loads(outcome).get("changes", {}).get("config", {})
            if change.get("lines", []) == lines:
                found.append({"id": run_id, "archive": archive, "since": change.get("since")})
        return bool(found)

    assert wait_until(is_there, timeout=90), system.cli("status")
    return found[0]


def test_what_changed_is_noticed_recorded_and_kept_without_a_value(
    system: System, configuration: Configuration
) -> None:
    first = noticed(system, [])
    configuration.become(SECOND)
    second = noticed(system, CHANGES)
    assert second["since"] < second["archive"]
    configuration.become(SECOND, mode=0o640)
    modes = [f"mode: {name}: 0600 → 0640" for name in sorted(SECOND)]
    noticed(system, modes)

    assert system.complete()["outcome"] == {"warnings": ["data: left out: data/fifo: a FIFO"]}
    names = (Path(first["archive"]).name, second["archive"].removesuffix(".tar.gz"))
    assert system.cli("show", "config", "--diff", *names)["differences"] == CHANGES
    assert system.cli("show", "config", "--diff", "previous", "latest")["differences"] == modes

    shown = system.cli("show", second["id"])
    assert shown["outcome"]["changes"]["config"]["lines"] == CHANGES
    log = ["tar", "-xzOf", str(system.store / second["archive"]), f"{second['id']}/backup.log"]
    lines = subprocess.run(log, check=True, capture_output=True, text=True).stdout.splitlines()
    assert all(any(line.endswith(f"Z {change}") for line in lines) for change in CHANGES)
    told = "".join([*lines, json.dumps(shown), *map(system.log, ("control", "app1", "beat"))])
    assert not [secret for secret in SECRETS if secret in told]
