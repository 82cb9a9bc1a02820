"""The deployment's service ``receive-wal``: it takes WAL as it is written, under its slot, and goes on after it was ended."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose.demo.docker_images import Images
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Service:
    """The service, as `scripts/deploy compose` starts it."""

    def __init__(self, server: Postgres, folder: Path) -> None:
        self.folder = folder / "wal"
        self.folder.mkdir()
        passwords = folder / "state/secrets/components"
        passwords.mkdir(parents=True)
        (passwords / "postgres_password").write_text(server.password)
        self.environment = {
            **os.environ,
            "BACKUP_PROJECT": f"receive-{secrets.token_hex(4)}",
            "BACKUP_STATE": str(folder / "state"),
            "BACKUP_WAL_FOLDER": str(self.folder),
            "BACKUP_WAL_IMAGE": Images("trixie").postgres,
            "BACKUP_WAL_HOST": server.host,
            "BACKUP_WAL_PORT": str(server.port),
            "BACKUP_WAL_USER": server.user,
        }

    def compose(self, *words: str) -> str:
        done = subprocess.run(
            [ROOT / "scripts/deploy", "compose", "--profile", "wal", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Postgres]:
    with postgres_server(17, tmp_path / "server", settings={"max_slot_wal_keep_size": "1GB"}) as started:
        yield started


@pytest.fixture
def service(server: Postgres, tmp_path: Path) -> Iterator[Service]:
    made = Service(server, tmp_path)
    try:
        made.compose("up", "--detach", "--no-build", "receive-wal")
        yield made
    finally:
        made.compose("rm", "--stop", "--force", "receive-wal")


def test_wal_is_there_within_seconds_and_nothing_is_lost_when_it_is_ended(
    server: Postgres, service: Service
) -> None:
    def segment() -> str:
        server.execute("CREATE TABLE IF NOT EXISTS t (n int); INSERT INTO t VALUES (1)")
        return str(server.rows("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")[0][0])

    def received() -> bool:
        """Whether all that is written has been written down by the receiver, too."""
        lag = "SELECT pg_current_wal_lsn() <= restart_lsn OR active FROM pg_replication_slots"
        return server.rows(lag) == [(True,)]

    assert wait_until(received, timeout=60), service.compose("logs", "receive-wal")
    first = segment()
    assert wait_until(lambda: f"{first}.partial" in service.names(), timeout=30), service.names()
    server.execute("SELECT pg_switch_wal()")
    assert wait_until(lambda: first in service.names(), timeout=30), service.names()

    service.compose("kill", "--signal", "KILL", "receive-wal")
    lost = segment()
    server.execute("SELECT pg_switch_wal()")
    later = segment()
    service.compose("up", "--detach", "--no-build", "receive-wal")
    assert wait_until(lambda: {lost, f"{later}.partial"} <= service.names(), timeout=60), service.names()
    assert server.rows("SELECT slot_name, active FROM pg_replication_slots") == [("ai_micro_backup", True)]
    assert server.password not in service.compose("logs", "receive-wal")
    assert server.password not in service.compose("ps", "--no-trunc")
