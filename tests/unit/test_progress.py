"""Progress: counted in any thread, sent in the fields that Flower shows, and never in the way of a backup."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Self

import pytest
from kombu.exceptions import OperationalError

from workers import progress
from workers.progress import EVENT, Item, Progress


class Dispatcher:
    """Where events go, as far as progress uses it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.error = error

    def default_dispatcher(self, *, hostname: str) -> Dispatcher:
        assert hostname == "backup@db1"
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def send(self, kind: str, *, retry: bool, **fields: Any) -> None:
        assert not retry, "an outage of the broker would stop the reporting thread"
        if self.error:
            raise self.error
        self.sent.append({"type": kind, **fields})


def task(dispatcher: Dispatcher) -> Any:
    request = SimpleNamespace(
        id="id-1", hostname="backup@db1", shadow="backup db@db1", argsrepr="('run', 'db')", kwargsrepr="{}",
        root_id="root", parent_id="parent",
    )  # fmt: skip
    return SimpleNamespace(app=SimpleNamespace(events=dispatcher), name="tasks.backup", request=request)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_EVENTS", 0.02)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (Item("authdb", 290_000_000, 120_000_000), "authdb 41 % (120 MB / 290 MB)"),
        (Item("authdb", 290_000_000), "authdb 0 % (0 MB / 290 MB)"),
        (Item("authdb", 100_000_000, 250_000_000), "authdb 99 % (250 MB / 100 MB)"),
        (Item("authdb", 100_000_000, 100_000_000), "authdb 99 % (100 MB / 100 MB)"),
        (Item("authdb", 100_000_000, 80_000_000, finished=True), "authdb done (80 MB)"),
        (Item("authdb", None, 7_000_000), "authdb 7 MB"),
        (Item("authdb", 0, 0), "authdb 0 MB"),
    ],
)
def test_how_far_it_is_reads_like_this(item: Item, text: str) -> None:
    assert str(item) == text


def test_an_item_counts_what_goes_through_it_and_is_done_only_at_its_end() -> None:
    item = Item("a", 6)
    seen = [(chunk, item.done, item.finished) for chunk in item.through([b"abc", b"", b"def"])]

    assert seen == [(b"abc", 3, False), (b"", 3, False), (b"def", 6, False)]
    assert item.finished


def test_an_item_whose_source_failed_is_not_done() -> None:
    def source() -> Iterator[bytes]:
        yield b"abc"
        raise ValueError("no")

    item = Item("a")
    with pytest.raises(ValueError, match="no"):
        list(item.through(source()))
    assert (item.done, item.finished) == (3, False)


def test_events_have_the_fields_that_flower_shows_and_those_that_the_terminal_needs() -> None:
    dispatcher = Dispatcher()
    shown = Progress(task(dispatcher), "db")
    first, second = shown.add("authdb", 290_000_000), shown.add("roles", None)
    first.done = 120_000_000
    with shown.reporting():
        wait_for(dispatcher, 2)
        list(second.through([b"x" * 3_000_000]))
        wait_for(dispatcher, len(dispatcher.sent) + 2)

    event = dispatcher.sent[0]
    assert event["type"] == EVENT == "task-progress"
    assert event["result"] == "authdb 41 % (120 MB / 290 MB) · roles 0 MB"
    assert (event["uuid"], event["name"], event["component"]) == ("id-1", "backup db@db1", "db")
    assert (event["args"], event["kwargs"]) == ("('run', 'db')", "{}")
    assert (event["root_id"], event["parent_id"]) == ("root", "parent")
    assert abs(event["started"] - time.time()) < 60
    assert event["items"][0] == {
        "label": "authdb",
        "done": 120_000_000,
        "expected": 290_000_000,
        "finished": False,
    }
    last = dispatcher.sent[-1]
    assert last["result"] == "authdb 41 % (120 MB / 290 MB) · roles done (3 MB)"
    assert last["items"][1] == {"label": "roles", "done": 3_000_000, "expected": None, "finished": True}


def wait_for(dispatcher: Dispatcher, events: int) -> None:
    deadline = time.monotonic() + 10
    while len(dispatcher.sent) < events:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_is_sent_only_while_the_block_runs() -> None:
    dispatcher = Dispatcher()
    shown = Progress(task(dispatcher), "db")
    shown.add("a", 1)
    assert dispatcher.sent == []

    def work() -> None:
        with shown.reporting():
            wait_for(dispatcher, 1)
            raise ValueError("the work")

    with pytest.raises(ValueError, match="the work"):
        work()
    sent = len(dispatcher.sent)
    time.sleep(0.1)
    assert len(dispatcher.sent) == sent


@pytest.mark.parametrize("error", [OperationalError("away"), ConnectionRefusedError(), TimeoutError()])
def test_a_broker_that_is_away_is_no_concern_of_the_backup(error: Exception) -> None:
    dispatcher = Dispatcher(error)
    shown = Progress(task(dispatcher), "db")
    item = shown.add("a", None)
    with shown.reporting():
        time.sleep(0.1)
        assert list(item.through([b"abc"])) == [b"abc"]
        dispatcher.error = None
        wait_for(dispatcher, 1)  # the thread that reports outlived the outage
    assert dispatcher.sent[-1]["result"] == "a done (0 MB)"


def test_streams_are_counted_in_threads_of_their_own() -> None:
    dispatcher = Dispatcher()
    shown = Progress(task(dispatcher), "db")

    def stream(number: int) -> None:
        for _ in shown.add(f"db{number}", 10_000).through([b"x" * 10] * 1000):
            pass

    with shown.reporting(), ThreadPoolExecutor(8) as pool:
        list(pool.map(stream, range(8)))
        wait_for(dispatcher, 1)
    shown._send()

    items = dispatcher.sent[-1]["items"]
    assert sorted(item["label"] for item in items) == [f"db{number}" for number in range(8)]
    assert {(item["done"], item["finished"]) for item in items} == {(10_000, True)}
