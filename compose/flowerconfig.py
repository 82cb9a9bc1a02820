"""Flower's configuration: ``celery -A workers flower --conf=compose/flowerconfig.py``.

From the environment: ``FLOWER_BASIC_AUTH`` (``user:password``) or ``FLOWER_BASIC_AUTH_FILE`` (a file with such a line
for each user), one of which is needed; ``FLOWER_ADDRESS`` to listen on (127.0.0.1); ``FLOWER_READ_ONLY``. What the
command line says goes before.

Flower runs this file and takes its options from the names in it. The rest teaches Flower 2.2 to show progress: a task
that runs sends ``task-progress`` events (`workers.progress`), and the pages bring themselves up to date.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from celery.events.state import Task
from flower.events import EventsState
from flower.utils import strtobool
from flower.views.monitor import Metrics
from flower.views.tasks import TasksView, TaskView
from tornado.web import RequestHandler, authenticated

SECONDS_BETWEEN_UPDATES = 2
COLUMNS = ["name", "state", "result", "received", "runtime", "worker", "uuid"]
FAILED = re.compile(r"\{'ok': False, 'error': ['\"](.*?)['\"]?\}?", re.DOTALL)
DONE = re.compile(r"\{'ok': True, .*?'parts': \[", re.DOTALL)
PART = re.compile(r"'name': '([^']+)'.*?'plain_size': (\d+)", re.DOTALL)
"""How the records that steps return (`tasks.step`) are told apart, in the form that events have: Python's, cut short."""


class StepTask(Task):
    """A task whose state says what people take it for.

    It stays STARTED while it tells of its progress. Celery would give it the state PROGRESS, which outranks REVOKED: one
    that was ended would run for ever. It would also be missing under Flower's filter "Started", and have no button
    that ends it. A step that returns its failure, so that its chord goes on (`tasks.step`), is a FAILURE.
    """

    def event(self, type_: str | None, *args: Any, **kwargs: Any) -> None:
        """Take in an event of this task; progress that arrives after its end is none."""
        fields = next((argument for argument in args if isinstance(argument, dict)), {})
        result = str(fields.get("result"))
        if type_ == "progress":
            if self.ready:
                return
            type_ = "started"
        elif type_ == "succeeded" and (failed := FAILED.fullmatch(result)):
            type_, fields["result"] = "failed", failed[1]
        elif type_ == "succeeded" and DONE.match(result):
            parts = [f"{name} ({int(size) / 1_000_000:.0f} MB)" for name, size in PART.findall(result)]
            fields["result"] = "done: " + " · ".join(parts + ["…"] * result.endswith("..."))
        super().event(type_, *args, **kwargs)


def enliven_list(self: RequestHandler, chunk: bytes | None = None) -> Any:
    """Let the list of tasks load its rows again every so often, and show results whole.

    What was searched for, the page and the order stay as they are.
    """
    page = (
        "<script>setInterval(function () {"
        " if (!document.hidden) { $('#tasks-table').DataTable().ajax.reload(null, false); } },"
        f" {SECONDS_BETWEEN_UPDATES * 1000});</script>"
        f"<style>#tasks-table td:nth-child({COLUMNS.index('name') + 1}) {{ white-space: nowrap; }}"
        f" #tasks-table td:nth-child({COLUMNS.index('result') + 1})"
        " { white-space: normal !important; max-width: none; min-width: 26rem; overflow-wrap: anywhere; }</style></body>"
    )
    return RequestHandler.finish(self, chunk and chunk.replace(b"</body>", page.encode()))


def render_task(self: RequestHandler, template: str, **values: Any) -> Any:
    """Let the page of a task load itself again until the task has ended."""
    if not values["task"].ready:
        self.set_header("Refresh", str(SECONDS_BETWEEN_UPDATES))
    return super(TaskView, self).render(template, **values)


def users() -> list[str]:
    """Return who may log in, as ``user:password``. Ends the program when nobody is named."""
    given = os.environ.get("FLOWER_BASIC_AUTH", "").split(",")
    if name := os.environ.get("FLOWER_BASIC_AUTH_FILE"):
        given += Path(name).read_text().splitlines()
    if not any(given):
        # Without users, Flower shows everything to everyone who reaches it.
        print(
            "flower: FLOWER_BASIC_AUTH or FLOWER_BASIC_AUTH_FILE is needed, with user:password",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return [user for user in given if user]


EventsState.Task = StepTask
TasksView.finish = enliven_list
TaskView.render = render_task
# Flower leaves its metrics open, which name hosts and components. /healthcheck, which says OK, stays open.
Metrics.get = authenticated(Metrics.get)

basic_auth = users()
address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")
# Who may do more than look may send any task, a restore as well.
read_only = bool(strtobool(os.environ.get("FLOWER_READ_ONLY", "true")))
tasks_columns = ",".join(COLUMNS)
