"""What the commands share: exit statuses, errors as messages, sending a task and following its run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any

import typer
from celery.exceptions import TimeoutError as NoAnswer
from kombu.exceptions import OperationalError
from rich.console import Console
from rich.markup import escape

from workers import catalog
from workers.catalog import Run, State
from workers.errors import (
    BackupError,
    CatalogError,
    NotConfirmed,
    ObjectNotFound,
    RuntimeUnavailable,
    SettingsError,
    Transient,
)

console = Console(stderr=True)
MEGABYTE = 1_000_000
SECONDS_TO_START = 30

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")]
From = Annotated[
    str, typer.Option("--from", help="The store to read: `store`, or `offsite`.", metavar="STORE")
]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Show progress until the run has ended.")]


class Exit(IntEnum):
    """What the exit status means."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_CONFIRMED = 3
    NOT_FOUND = 4
    UNAVAILABLE = 5


@contextmanager
def translated() -> Iterator[None]:
    """Turn our errors into a message on stderr and a documented exit status."""
    statuses: dict[type[Exception], Exit] = {
        SettingsError: Exit.USAGE,
        NotConfirmed: Exit.NOT_CONFIRMED,
        ObjectNotFound: Exit.NOT_FOUND,
        CatalogError: Exit.NOT_FOUND,
        Transient: Exit.UNAVAILABLE,
    }
    try:
        yield
    except BackupError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        status = next((status for kind, status in statuses.items() if isinstance(error, kind)), Exit.FAILED)
        raise typer.Exit(status) from error
    except (OperationalError, ConnectionError) as error:
        console.print("[red]error:[/red] the broker does not answer; are the services running?")
        raise typer.Exit(Exit.UNAVAILABLE) from error


def send(task: Any, *args: Any, **kwargs: Any) -> str:
    """Let a control worker start a run, and return the run's id. Raises ``RuntimeUnavailable`` when none answers."""
    from workers.app import app
    from workers.hosts import CONTROL, answering_queues

    with app.connection_for_write() as connection:
        # The result backend would try for half a minute, and then raise what cannot be told from a fault of ours.
        connection.ensure_connection(max_retries=2)
    result = task.apply_async(args, kwargs)
    try:
        run_id = result.get(timeout=SECONDS_TO_START, interval=0.1)
    except NoAnswer as error:
        result.revoke()
        answers = CONTROL in answering_queues(app)
        raise RuntimeUnavailable(
            "the control workers are busy; try again"
            if answers
            else "no control worker answers; is one running?"
        ) from error
    return str(run_id)


def given(**options: Any) -> dict[str, Any]:
    """Return the keyword argument with the options that the command line gave; empty without any."""
    asked = {name: value for name, value in options.items() if value}
    return {"options": asked} if asked else {}


def follow(run_id: str, *, wait: bool, as_json: bool) -> None:
    """Show a run until it has ended, or with ``wait`` off just that it started; exit 1 when it failed."""
    from tasks.watch import follow, origin

    run = follow(run_id, console=None if as_json else console) if wait else catalog.get_run(run_id)
    document = run_document(run)
    if as_json:
        print(json.dumps(document))
    elif run.kind is catalog.Kind.PLAN:
        print(origin(run))
        for line in document["outcome"].get("overwrites", []):
            print(line)
    elif run.state is State.COMPLETE:
        what = f", archive {run.archive}" if run.archive else ""
        console.print(f"[green]complete:[/green] {run.kind} {run.id}{what}", highlight=False)
        _show_outcome(run.outcome)
    elif run.state is State.RUNNING:
        console.print(f"started: {run.kind} {run.id}; see: ai-micro-backup show {run.id}", highlight=False)
    if run.state is State.FAILED:
        cause = escape(str(run.cause))
        console.print(f"[red]failed:[/red] {run.kind} {run.id}: {cause}", highlight=False, soft_wrap=True)
        raise typer.Exit(Exit.FAILED)


def _show_outcome(outcome: dict[str, Any]) -> None:
    if reached := outcome.get("reached"):
        console.print(
            f"recovered {reached['target']}: position {reached['lsn']}, last commit {reached['last_commit'] or 'none'}, "
            f"now on timeline {reached['timeline']}; {reached['stopped'] or 'end of the WAL'}",
            highlight=False,
        )
    if start := outcome.get("start"):
        console.print(f"start it {start}", highlight=False)
    for component, change in outcome.get("changes", {}).items():
        lines = [f"{component} changed since {change['since']}:", *change["lines"]]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    for line in outcome.get("warnings", []):
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    if ill := outcome.get("ill"):
        console.print(f"[yellow]not asked for their health, being ill before:[/yellow] {', '.join(ill)}")


def run_document(run: Run) -> dict[str, Any]:
    """Return a run and its steps as one JSON document."""
    document = run.model_dump(mode="json")
    document["steps"] = [
        {
            "phase": step.phase,
            "name": step.name,
            "queue": step.queue,
            "attempt": step.attempt,
            "error": step.error,
        }
        for step in catalog.steps_of(run.id)
    ]
    return document


def size_of(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / MEGABYTE:.1f} MB"
