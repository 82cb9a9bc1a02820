"""What happens when the broker or the control worker dies, a step takes too long, or beat stutters."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator

import pytest

from compose.demo.embedded_daemon import wait_until
from tests.conftest import Served
from tests.e2e.conftest import Factory
from tests.shops import Shop, attempts, shop_of
from tests.systems import System

COMPONENT_SECONDS = 25
SECONDS_AWAY = 4


@pytest.fixture
def shop(running: Shop) -> Shop:
    running.system.ensure_workers("control", "db1", "app1")
    return running


@pytest.fixture(scope="module")
def running(
    cluster_factory: Factory, postgres_server: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    limits = {"absent_host": 40, "component": COMPONENT_SECONDS}
    uploads = tmp_path_factory.mktemp("shop") / "uploads"
    with shop_of(cluster_factory, postgres_server, uploads, limits=limits) as shop:
        yield shop


def kill_broker(system: System) -> None:
    """SIGKILL the broker and start it again some seconds later, from its append-only file."""
    broker = system.cluster.broker
    os.kill(int(broker.data_dir.with_name("data.pid").read_text()), signal.SIGKILL)
    assert wait_until(lambda: not broker.is_running(), timeout=10)
    time.sleep(SECONDS_AWAY)
    broker.start()


def test_a_broker_killed_in_mid_run_loses_neither_what_runs_nor_what_waits(shop: Shop) -> None:
    shop.system.cluster.kill("app1")
    with shop.held_dump():
        run_id = shop.system.backup()
        dump = shop.system.wait_for_child("postgres", "pg_dump")
        kill_broker(shop.system)
        assert dump in shop.system.children("postgres", "pg_dump"), "it does not need the broker to go on"
    shop.system.start_worker("app1")

    run = shop.system.ended(run_id)

    assert (run["state"], attempts(run)) == ("complete", {"postgres": 1, "uploads": 1, "archive": 1}), run
    shop.assert_nothing_left()
    shop.assert_next_succeeds()


def test_a_control_worker_killed_while_it_assembles_is_made_up_for(shop: Shop) -> None:
    image = shop.uploads / "image"
    image.write_bytes(secrets.token_bytes(400_000_000))
    try:
        run_id = shop.system.backup("uploads")
        deadline = time.monotonic() + 60
        while max(shop.system.unfinished("components").values(), default=0) < 1_000_000:
            assert time.monotonic() < deadline, "the archive was finished before its worker could be killed"
            time.sleep(0.002)
        shop.system.cluster.kill("control")
        archives = [name for name in shop.system.objects("components") if run_id in name]
        assert archives == [], "killed too late"
        shop.system.start_worker("control")
        run = shop.system.ended(run_id)
    finally:
        image.unlink()

    assert (run["state"], attempts(run)) == ("complete", {"uploads": 1, "archive": 2}), run
    name = f"components/uploads_backup_{run_id}"
    assert [key for key in shop.system.objects() if run_id in key] == [
        f"{name}.metadata.json",
        f"{name}.tar.gz",
    ]
    shop.assert_verifies(run)
    shop.assert_nothing_left()


def test_a_component_that_takes_too_long_is_ended(shop: Shop) -> None:
    with shop.held_dump():
        run_id = shop.system.backup("postgres")
        shop.system.wait_for_child("postgres", "pg_dump")
        run = shop.system.ended(run_id, within=COMPONENT_SECONDS + 20)
        assert wait_until(lambda: not shop.system.children("postgres"), timeout=5)

    assert run["state"] == "failed"
    assert run["cause"] == f"postgres: it took longer than {COMPONENT_SECONDS} s (limits.component)"
    assert shop.system.unfinished() == {}
    shop.system.complete("postgres")
    shop.assert_nothing_left()


def test_a_scheduled_run_that_is_sent_several_times_happens_once(shop: Shop) -> None:
    with shop.system.client() as app:
        for _ in range(6):
            app.send_task("tasks.schedule.start_scheduled", ("full_system",), queue="control")
    scheduled = "SELECT id FROM run WHERE job = 'full_system' ORDER BY id"
    assert wait_until(lambda: bool(shop.system.query(scheduled)), timeout=20)
    run = shop.system.ended(shop.system.query(scheduled)[0][0])

    assert shop.system.call("tasks.schedule.start_scheduled", "full_system") is None
    assert run["state"] == "complete", run
    assert run["scheduled_at"].endswith("T02:00:00Z")
    assert len(shop.system.query(scheduled)) == 1
    shop.assert_nothing_left()
