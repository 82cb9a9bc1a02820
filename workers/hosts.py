"""A host's queue, and which hosts answer."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from workers.errors import RuntimeUnavailable
from workers.settings import Settings

CONTROL = "control"
"""Queue of the work that any control worker may do."""
PREFIX = "host."


def queue_of(host: str) -> str:
    """Return the queue of the work that must run on ``host``."""
    return f"{PREFIX}{host}"


def all_queues(settings: Settings) -> list[str]:
    """Return every queue there is: the control workers', and one a host."""
    return [CONTROL, *map(queue_of, settings.hosts)]


def hosts_of(queues: Iterable[str]) -> list[str]:
    """Return the hosts whose queues are among ``queues``; the inverse of `queue_of`."""
    return [queue.removeprefix(PREFIX) for queue in queues if queue.startswith(PREFIX)]


@dataclass(frozen=True)
class Census:
    """What the workers said when they were asked."""

    queues: frozenset[str]
    """Queues that a worker which answers consumes."""
    known_tasks: frozenset[str]
    """Ids of the tasks that workers are running or have taken from the broker."""


def answering_queues(app: Celery, *, timeout: float = 1.0) -> frozenset[str]:
    """Return the queues that a worker which answers within ``timeout`` seconds consumes; busy ones answer as well.

    Raises ``RuntimeUnavailable`` when the broker does not answer.
    """
    answers = _ask(app, "active_queues", timeout)
    return frozenset(queue["name"] for worker in answers.values() for queue in worker)


def take_census(app: Celery, *, timeout: float = 2.0) -> Census:
    """Ask every worker what it consumes and what it works on. Raises as `answering_queues` does."""
    questions = ("active", "reserved")
    with ThreadPoolExecutor() as pool:  # each question takes the whole timeout
        queues = pool.submit(answering_queues, app, timeout=timeout)
        answers = list(pool.map(lambda question: _ask(app, question, timeout), questions))
    tasks = (task["id"] for answer in answers for worker in answer.values() for task in worker)
    return Census(queues=queues.result(), known_tasks=frozenset(tasks))


def _ask(app: Celery, question: str, timeout: float) -> dict[str, list[dict[str, Any]]]:
    try:
        return getattr(app.control.inspect(timeout=timeout), question)() or {}
    except (OperationalError, OSError) as error:
        raise RuntimeUnavailable("the broker does not answer") from error
