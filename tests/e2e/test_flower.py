"""Flower in a real browser: a backup's progress is seen to move, by those who may, and no secret is seen by anyone."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import Served
from tests.e2e.conftest import Factory
from tests.systems import System, wait_until

PICTURE = Path(__file__).parents[2] / "var" / "flower" / "tasks.png"
MEGABYTES = 290
MEGABYTES_A_SECOND = 16
PERCENT = re.compile(rf"uploads (\d+) % \((\d+) MB / {MEGABYTES} MB\)")
SLOW_TAR = """\
#!{python} -I
# The real tar, on a disk that reads {speed} MB a second.
import os, subprocess, sys, time
if sys.argv[1] != "--create":
    os.execv({tar!r}, ["tar", *sys.argv[1:]])
with subprocess.Popen([{tar!r}, *sys.argv[1:]], stdout=subprocess.PIPE) as tar:
    while chunk := tar.stdout.read({speed} * 100_000):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        time.sleep(0.1)
sys.exit(tar.returncode)
"""
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@dataclass(frozen=True)
class Flower:
    """A Flower, and the backup system that it shows, whose disk is slow enough to watch."""

    system: System
    login: str
    secrets: dict[str, str]

    @property
    def url(self) -> str:
        return self.system.cluster.flower_url.removesuffix("/tasks")

    def get(self, path: str, *, login: str | None = None, post: bytes | None = None) -> tuple[int, str]:
        """Ask for a page, as ``login`` or as nobody, and return the status and the text."""
        request = urllib.request.Request(self.url + path, data=post)
        if login:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def tasks(self) -> dict[str, dict[str, str]]:
        """Return what Flower knows of each task, by its id."""
        status, text = self.get("/api/tasks", login=self.login)
        assert status == 200
        found: dict[str, dict[str, str]] = json.loads(text)
        return found


@pytest.fixture(scope="module")
def flower(
    cluster_factory: Factory, redis_server: Served, tmp_path_factory: pytest.TempPathFactory
) -> Flower:
    folder = tmp_path_factory.mktemp("app1", numbered=False)
    uploads, programs = folder / "uploads", folder / "bin"
    for made in (uploads, folder / "keys", programs):
        made.mkdir()
    with (uploads / "scan.pdf").open("wb") as file:
        for _ in range(MEGABYTES):
            file.write(os.urandom(1_000_000))
    (folder / "keys" / "private.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    (folder / ".env").write_text("LEVEL=info\n")
    tar = programs / "tar"
    tar.write_text(
        SLOW_TAR.format(python=sys.executable, tar=str(shutil.which("tar")), speed=MEGABYTES_A_SECOND)
    )
    tar.chmod(0o755)
    components = f"""
[components.uploads]
kind = "files"
host = "app1"
path = "{uploads}"

[components.keys]
kind = "files"
host = "app1"
path = "{folder}/keys"

[components.config]
kind = "config"
host = "app1"
root = "{folder}"
paths = [".env"]

[components.sessions]
kind = "redis"
host = "app1"
port = {redis_server.port}
password = {{ env = "SESSIONS_PASSWORD" }}
"""
    system = cluster_factory(
        components,
        environment={"SESSIONS_PASSWORD": redis_server.password},
        workers=("control",),
        beat=False,
    )
    environment = system.cluster.environment
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    system.start_worker("app1")
    system.cluster.start_flower()
    login = system.cluster.flower_login.read_text()
    broker_password = environment["BROKER_PASSWORD"]
    hidden = {
        "the broker's password": broker_password,
        "a component's password": redis_server.password,
        "Flower's password": login.partition(":")[2],
    }
    flower = Flower(system, login, hidden)
    # It says that it is there before it listens to events; what it missed it would show without a name.
    assert wait_until(lambda: len(workers(flower)) == 2, timeout=30)
    return flower


@pytest.fixture(scope="module")
def run_id(flower: Flower) -> str:
    """The id of a full backup that was just started."""
    return flower.system.backup()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here; as root on Debian, scripts/install-test-tools installs it")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-device-scale-factor=1",
    ]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()


@pytest.fixture
def page(flower: Flower, browser: Browser) -> Iterator[Page]:
    user, _, password = flower.login.partition(":")
    context = browser.new_context(
        http_credentials={"username": user, "password": password}, viewport={"width": 1760, "height": 580}
    )
    yield context.new_page()
    context.close()


def test_progress_moves_in_the_list_and_the_page_of_a_task(flower: Flower, run_id: str, page: Page) -> None:
    page.goto(f"{flower.url}/tasks")
    row = page.locator("#tasks-table tbody tr", has_text="backup uploads@app1")
    expect(row).to_contain_text(PERCENT, timeout=30_000)
    expect(row).to_contain_text("STARTED")
    page.evaluate("window.opened = true")
    # It is among what is running, too.
    page.get_by_role("button", name="Started", exact=True).click()
    expect(row).to_contain_text(PERCENT)
    first = percent(row.inner_text())
    later = moved(row.inner_text, first, within=10)
    page.get_by_role("button", name="All", exact=True).click()
    expect(page.locator("#tasks-table tbody")).to_contain_text("backup keys@app1")
    expect(row).to_contain_text(PERCENT)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURE)
    assert page.evaluate("window.opened"), (
        "the list was loaded as a whole; what one types in it would be lost"
    )

    row.locator("a[href*='/task/']").click()
    details = page.locator("#task-page")
    expect(details).to_contain_text(PERCENT)
    assert percent(details.inner_text()) >= later
    moved(details.inner_text, percent(details.inner_text()), within=10)

    page.goto(f"{flower.url}/tasks")
    expect(row).to_contain_text("SUCCESS", timeout=60_000)
    assert_complete(flower, run_id)


def assert_complete(flower: Flower, run_id: str) -> None:
    run = flower.system.ended(run_id)
    assert run["state"] == "complete", run["cause"]


def percent(text: str) -> int:
    found = PERCENT.search(text)
    assert found, text
    assert abs(int(found[1]) - 100 * int(found[2]) / MEGABYTES) < 1.5, "percentage and bytes disagree"
    return int(found[1])


def moved(read: Callable[[], str], before: int, *, within: float) -> int:
    """Return the percentage as soon as it is above ``before``. Fails when it does not move."""
    deadline = time.monotonic() + within
    while (now := percent(read())) <= before:
        assert time.monotonic() < deadline, f"it stayed at {before} % for {within:g} s"
        time.sleep(0.2)
    return now


def test_tasks_are_named_by_what_they_do_and_where(flower: Flower, run_id: str) -> None:
    assert_complete(flower, run_id)
    named = {str(task["name"]) for task in flower.tasks().values()}
    components = ("uploads", "keys", "config", "sessions")
    expected = {f"backup {name}@app1" for name in components} | {"archive archive@control"}
    assert expected <= named, named


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/workers?json=1",
        "/tasks",
        "/task/x",
        "/worker/x",
        "/broker",
        "/api/tasks",
        "/api/workers",
        "/metrics",
    ],
)
def test_nobody_sees_anything_without_logging_in(flower: Flower, path: str) -> None:
    user = flower.login.partition(":")[0]
    for login in (None, f"{user}:", f"{user}:wrong", "other:" + flower.login.partition(":")[2]):
        assert flower.get(path, login=login)[0] == 401, login
    assert flower.get(path, login=flower.login)[0] in (200, 404)


def test_the_rows_of_the_list_need_a_login_and_the_health_check_does_not(flower: Flower) -> None:
    assert flower.get("/tasks/datatable", post=b"draw=1&start=0&length=5")[0] == 401
    assert flower.get("/healthcheck") == (200, "OK")


def test_who_looks_cannot_send_or_end_a_task(flower: Flower) -> None:
    send = "/api/task/send-task/tasks.backup.backup_full_system"
    worker = next(name for name in workers(flower) if name.startswith("app1@"))
    for path in (send, "/api/task/revoke/x", f"/api/worker/shutdown/{worker}"):
        assert flower.get(path, login=flower.login, post=b"{}")[0] == 403


def test_no_page_holds_a_secret(flower: Flower, run_id: str) -> None:
    assert_complete(flower, run_id)
    names = workers(flower)
    assert {name.partition("@")[0] for name in names} == {"control", "app1"}
    paths = ["/", "/tasks", "/broker", "/workers?json=1", "/api/tasks", "/metrics"]
    paths += ["/api/workers?refresh=1", *(f"/worker/{name}" for name in names)]
    paths += [f"/task/{task_id}" for task_id in flower.tasks()]
    pages = {path: flower.get(path, login=flower.login) for path in paths}
    pages["its log"] = (200, flower.system.log("flower"))
    assert {path: status for path, (status, _) in pages.items() if status != 200} == {}
    configuration = next(text for path, (_, text) in pages.items() if path.startswith("/worker/app1@"))
    assert f"redis://:********@127.0.0.1:{flower.system.cluster.broker.port}" in configuration
    for path, (_, text) in pages.items():
        for what, secret in flower.secrets.items():
            assert secret not in text, f"{path} shows {what}"
            assert quote(secret, safe="") not in text, f"{path} shows {what}"


def workers(flower: Flower) -> list[str]:
    status, text = flower.get("/workers?json=1", login=flower.login)
    assert status == 200
    return [str(worker["hostname"]) for worker in json.loads(text)["data"]]


def test_it_does_not_start_without_users(flower: Flower) -> None:
    cluster = flower.system.cluster
    login = cluster.environment.pop("FLOWER_BASIC_AUTH")
    try:
        configuration = Path(__file__).parents[2] / "compose" / "flowerconfig.py"
        done = cluster.run("celery", "-A", "workers", "flower", f"--conf={configuration}", timeout=60)
    finally:
        cluster.environment["FLOWER_BASIC_AUTH"] = login
    assert done.returncode == 2
    assert "FLOWER_BASIC_AUTH_FILE" in done.stderr


PART = {"name": "postgres.authdb.dump.zst", "size": 20_000_000, "plain_size": 290_400_000, "holds": {}}
DONE = "done: postgres.authdb.dump.zst (290 MB) · postgres.authdb.dump.zst (290 MB)"


@pytest.mark.parametrize(
    ("events", "state", "result"),
    [
        (("received", "started", "progress", "ended badly"), "FAILURE", "it's full"),
        (("received", "started", "progress"), "STARTED", "authdb 42 %"),
        (("received", "progress", "started"), "STARTED", "authdb 42 %"),
        (("received", "started", "progress", "succeeded"), "SUCCESS", DONE),
        (("received", "started", "progress", "revoked"), "REVOKED", "authdb 42 %"),
        (("received", "started", "revoked", "progress"), "REVOKED", None),
        (("received", "started", "progress", "failed"), "FAILURE", "authdb 42 %"),
        (("received", "started", "succeeded", "progress"), "SUCCESS", DONE),
    ],
)
def test_a_task_is_in_the_state_that_it_is_in(
    monkeypatch: pytest.MonkeyPatch, events: tuple[str, ...], state: str, result: str | None
) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "somebody:" + secrets.token_hex(8))
    from compose.flowerconfig import StepTask

    fields: dict[str, dict[str, object]] = {
        "progress": {"result": "authdb 42 %", "started": 3.0},
        "succeeded": {"result": repr({"ok": True, "parts": [PART, PART]})},
        "ended badly": {"result": repr({"ok": False, "error": "it's full"})},
    }
    task = StepTask("x")
    for moment, event in enumerate(events):
        type_ = "succeeded" if event == "ended badly" else event
        task.event(type_, float(moment), float(moment), dict(fields.get(event, {})))
    assert (task.state, task.result) == (state, result)
