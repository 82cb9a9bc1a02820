"""Bytes done of bytes expected, sent to Flower and to the terminal as Celery events."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from celery import Task
from kombu.exceptions import OperationalError

EVENT = "task-progress"
SECONDS_BETWEEN_EVENTS = 0.5
MEGABYTE = 1_000_000


@dataclass
class Item:
    """One stream: what people call it, its bytes so far, and the estimate of all."""

    label: str
    expected: int | None = None
    done: int = 0
    finished: bool = False

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.done += len(chunk)
            yield chunk
        self.finished = True

    def __str__(self) -> str:
        done = f"{self.done / MEGABYTE:.0f} MB"
        if self.finished:
            return f"{self.label} done ({done})"
        if not self.expected:
            return f"{self.label} {done}"
        percent = min(
            99, 100 * self.done // self.expected
        )  # the estimate may be low; 100 % is said when it is done
        return f"{self.label} {percent} % ({done} / {self.expected / MEGABYTE:.0f} MB)"


class Progress:
    """The progress of one task; its items may be counted in any thread."""

    def __init__(self, task: Task[Any, Any], component: str) -> None:
        request: Any = task.request
        self._app, self._uuid, self._hostname = task.app, request.id, request.hostname
        self._items: list[Item] = []
        # Flower renders only the fields of a task that it knows, and forgets those that an event leaves out.
        self._fields: dict[str, Any] = {
            "name": request.shadow or task.name,
            "args": request.argsrepr,
            "kwargs": request.kwargsrepr,
            "root_id": request.root_id,
            "parent_id": request.parent_id,
            "started": time.time(),
            "component": component,
        }

    def add(self, label: str, expected: int | None) -> Item:
        """Add a stream and return the item that counts what goes ``through`` it."""
        item = Item(label, expected)
        self._items.append(item)
        return item

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Send how far it is, twice a second, while the block runs."""
        stop = threading.Event()

        def report() -> None:
            while not stop.wait(SECONDS_BETWEEN_EVENTS):
                self._send()

        thread = threading.Thread(target=report, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._send()
            self._send()  # how it ended, so that no bar stays short of its end

    def _send(self) -> None:
        items = [
            {"label": item.label, "done": item.done, "expected": item.expected, "finished": item.finished}
            for item in self._items
        ]
        # ``result`` is the one field of a running task that Flower shows and that nothing else uses.
        fields = {**self._fields, "result": " · ".join(map(str, self._items)), "items": items}
        # Progress must never fail a backup: while the broker is away, it is not seen.
        with (
            contextlib.suppress(OperationalError, OSError),
            self._app.events.default_dispatcher(hostname=self._hostname) as dispatcher,
        ):
            dispatcher.send(EVENT, uuid=self._uuid, retry=False, **fields)
