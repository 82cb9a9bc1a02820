"""Host workers killed while a restore swaps: the run ends, and no component is ever left between old and new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from compose.demo.fingerprint import Fingerprint, diff
from tests.rehearsal import Rehearsal, rehearsal
from tests.systems import System, wait_until

pytestmark = pytest.mark.slow
COMPONENTS = {
    "postgres": "postgres:",
    "redis": "redis:",
    "uploads": "files uploads:",
    "auth-keys": "files keys:",
    "config": "files config:",
}


@pytest.fixture(scope="module")
def scene(
    cluster_factory: Callable[..., System], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rehearsal]:
    with rehearsal(cluster_factory, tmp_path_factory.mktemp("interrupted"), absent_host=15) as found:
        yield found


@pytest.fixture
def lost(scene: Rehearsal) -> Iterator[Fingerprint]:
    """The data is lost, as before a restore in earnest; afterwards all is well again whatever the test did."""
    scene.demo.destroy_data()
    yield scene.demo.fingerprint()
    if scene.differences():
        scene.restore()
    assert scene.differences() == []
    assert scene.leftovers() == []


def torn(scene: Rehearsal, old: Fingerprint) -> list[str]:
    """The components that are neither as they were before the restore nor as in the backup."""
    now = scene.demo.fingerprint()
    to_old, to_new = diff(old, now), diff(scene.before, now)
    return [
        name
        for name, prefix in COMPONENTS.items()
        if any(line.startswith(prefix) for line in to_old) and any(line.startswith(prefix) for line in to_new)
    ]


@contextmanager
def held_swap(scene: Rehearsal, run_id: str) -> Iterator[None]:
    """PostgreSQL's swap, when it comes, waits in the middle of its transaction."""
    journal = f"ai_micro_backup__restore_{run_id}"
    assert wait_until(lambda: scene.phase(run_id).startswith("stop."), timeout=60)
    with psycopg.connect(scene.demo.admin_dsn, dbname=journal) as connection:
        connection.execute("LOCK TABLE public.restore IN SHARE MODE")
        yield


@pytest.mark.parametrize("moment", ["/old", "/new/"])
def test_workers_killed_in_mid_swap_and_back_at_once(
    scene: Rehearsal, lost: Fingerprint, moment: str
) -> None:
    with scene.gate.holding(moment):
        run_id = scene.start_restore()
        assert scene.gate.reached(within=60)
        scene.kill_hosts()
    scene.start_hosts()
    run = scene.system.ended(run_id)
    assert run["state"] == "complete", run["cause"]
    assert max(step["attempt"] for step in run["steps"] if step["phase"] == "swap") == 2
    assert scene.differences() == []
    assert scene.leftovers() == []


def test_workers_killed_in_mid_swap_that_come_back_late(scene: Rehearsal, lost: Fingerprint) -> None:
    """Nothing can be put back on a host that is away: the run fails only when all is as it was."""
    with scene.gate.holding("/new/"):
        run_id = scene.start_restore()
        assert scene.gate.reached(within=60)
        scene.kill_hosts()
    assert wait_until(lambda: scene.phase(run_id).startswith("abort-"), timeout=60)
    refused = scene.cli("backup")
    assert refused.returncode == 1
    assert f"the restore {run_id} was running" in " ".join(refused.stderr.split())
    scene.start_hosts()
    run = scene.system.ended(run_id)
    assert run["state"] == "failed"
    assert "no worker on app1 has answered" in run["cause"]
    assert torn(scene, lost) == []
    assert diff(lost, scene.demo.fingerprint()) == []
    assert scene.leftovers() == []
    assert None not in scene.pids().values()


def test_a_worker_killed_while_the_databases_swap(scene: Rehearsal, lost: Fingerprint) -> None:
    run_id = scene.start_restore()
    with held_swap(scene, run_id):
        assert wait_until(lambda: scene.phase(run_id) == "swap", timeout=60)
        assert wait_until(lambda: waiting_for_locks(scene) > 0, timeout=30)
        scene.cluster.kill("db1")
        assert "authdb" not in databases(scene)
    scene.system.start_worker("db1")
    run = scene.system.ended(run_id)
    assert run["state"] == "complete", run["cause"]
    assert scene.differences() == []


def waiting_for_locks(scene: Rehearsal) -> int:
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with psycopg.connect(scene.demo.admin_dsn) as connection:
        row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def databases(scene: Rehearsal) -> set[str]:
    with psycopg.connect(scene.demo.admin_dsn) as connection:
        return {str(row[0]) for row in connection.execute("SELECT datname FROM pg_database")}
