"""What happens when workers, children and hosts die in mid-run: every run ends, with its cause, and leaves nothing."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose.demo.embedded_daemon import wait_until
from tests.conftest import Served
from tests.e2e.conftest import Factory
from tests.shops import DUMP, Shop, attempts, shop_of

ABSENT_SECONDS = 20
"""Longer than a worker takes to start on a busy machine."""


@pytest.fixture
def shop(running: Shop) -> Shop:
    running.system.ensure_workers("control", "db1", "app1")
    return running


@pytest.fixture(scope="module")
def running(
    cluster_factory: Factory, postgres_server: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    uploads = tmp_path_factory.mktemp("shop") / "uploads"
    with shop_of(cluster_factory, postgres_server, uploads, limits={"absent_host": ABSENT_SECONDS}) as shop:
        yield shop


def test_a_host_worker_killed_in_mid_dump_and_restarted_is_made_up_for(shop: Shop) -> None:
    run_id, child = shop.freeze_dump()
    shop.system.cluster.kill("db1")
    assert wait_until(lambda: child not in shop.system.children("postgres"), timeout=5)
    shop.system.start_worker("db1")

    run = shop.system.ended(run_id)

    assert (run["state"], attempts(run)) == ("complete", {"postgres": 2, "uploads": 1, "archive": 1}), run
    shop.assert_verifies(run)
    shop.assert_nothing_left()


def test_a_host_that_went_away_or_never_was_there_fails_runs_in_time(shop: Shop) -> None:
    lost, _ = shop.freeze_dump()
    assert wait_until(lambda: shop.committed(lost, "uploads.tar.zst"), timeout=20)
    shop.system.cluster.kill("db1")
    absent = shop.system.backup()
    moment = time.monotonic()

    runs = [shop.system.ended(run_id, within=ABSENT_SECONDS + 20) for run_id in (lost, absent)]

    assert time.monotonic() - moment > ABSENT_SECONDS / 2
    for run in runs:
        assert (run["state"], run["archive"]) == ("failed", None)
        assert "postgres: no worker on db1 has answered" in run["cause"]
        assert not [name for name in shop.system.objects("full_system") if run["id"] in name]
    assert shop.committed(absent, "uploads.tar.zst"), "the parts of the other host are kept for inspection"
    shop.system.start_worker("db1")
    shop.assert_next_succeeds()
    late = [line for line in shop.system.log("db1").splitlines() if f"{absent}.backup.postgres" in line]
    assert late, "its message waited for the worker"
    assert not [line for line in late if "'ok': True" in line]
    assert not [name for name in shop.system.objects() if lost in name or absent in name]


def test_a_dump_killed_in_mid_stream_fails_its_component_alone(shop: Shop) -> None:
    run_id, child = shop.freeze_dump()
    os.kill(child, signal.SIGKILL)

    run = shop.system.ended(run_id, within=30)

    assert run["state"] == "failed"
    assert run["cause"].startswith("postgres: ")
    assert "pg_dump ended with status -9" in run["cause"]
    assert shop.committed(run_id, "uploads.tar.zst")
    assert not shop.committed(run_id, DUMP)
    assert shop.system.unfinished() == {}
    shop.assert_next_succeeds()


def test_a_failing_tar_fails_its_component_alone(shop: Shop) -> None:
    (shop.uploads / "image").write_bytes(secrets.token_bytes(200_000_000))
    try:
        run_id = shop.system.backup()
        os.kill(shop.system.wait_for_child("uploads", "tar"), signal.SIGKILL)
        run = shop.system.ended(run_id, within=30)
    finally:
        (shop.uploads / "image").unlink()

    assert run["state"] == "failed"
    assert "uploads: tar ended with status -9" in run["cause"]
    assert shop.committed(run_id, DUMP)
    assert not shop.committed(run_id, "uploads.tar.zst")
    shop.assert_next_succeeds()


def test_a_pool_process_killed_in_mid_dump_is_made_up_for(shop: Shop) -> None:
    run_id, child = shop.freeze_dump()
    os.kill(parent_of(child), signal.SIGKILL)
    assert wait_until(lambda: child not in shop.system.children("postgres"), timeout=5)

    run = shop.system.ended(run_id)

    assert (run["state"], attempts(run)) == ("complete", {"postgres": 2, "uploads": 1, "archive": 1}), run
    shop.assert_verifies(run)
    shop.assert_nothing_left()


def test_a_component_whose_process_always_dies_fails_the_run(shop: Shop) -> None:
    run_id, child = shop.freeze_dump()
    with shop.held_dump():
        os.kill(parent_of(child), signal.SIGKILL)
        assert wait_until(lambda: child not in shop.system.children("postgres"), timeout=5)
        os.kill(parent_of(shop.system.wait_for_child("postgres", "pg_dump")), signal.SIGKILL)

        run = shop.system.ended(run_id)

    assert (run["state"], attempts(run)) == ("failed", {"postgres": 2, "uploads": 1}), run
    assert run["cause"] == "postgres: its task was ended: its process died (killed, or out of memory)"
    shop.assert_next_succeeds()


def test_a_step_ended_by_revoke_ends_the_run_with_that_cause(shop: Shop) -> None:
    run_id, _ = shop.freeze_dump()
    with shop.system.client() as app:
        app.control.revoke(shop.system.step(run_id, "postgres")[0], terminate=True, signal="SIGQUIT")

    run = shop.system.ended(run_id, within=30)

    assert run["state"] == "failed"
    assert run["cause"] == "postgres: its task was ended: somebody revoked it"
    assert wait_until(lambda: not shop.system.children("postgres"), timeout=5)
    shop.assert_next_succeeds()


def test_a_component_that_another_run_works_on_waits_for_its_turn(shop: Shop) -> None:
    with shop.held_dump():
        first = shop.system.backup("postgres")
        shop.system.wait_for_child("postgres", "pg_dump")
        second = shop.system.backup("postgres")
        assert second != first
        task = shop.system.step(second, "postgres")[0]
        assert wait_until(lambda: task in shop.system.log("db1"), timeout=10)
        time.sleep(2)
        assert len(shop.system.children("postgres", "pg_dump")) == 1

    runs = [shop.system.ended(run_id) for run_id in (first, second)]

    assert [run["state"] for run in runs] == ["complete", "complete"], runs
    shop.assert_nothing_left()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
