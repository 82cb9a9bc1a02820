"""A run as it goes, in the terminal: a bar for each stream, with its rate and the time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kombu.exceptions import OperationalError
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from tasks import archive
from workers import catalog
from workers.app import app
from workers.catalog import Run, State
from workers.progress import EVENT
from workers.settings import get_settings
from workers.storage import open_store

POLL_SECONDS = 0.3


def follow(run_id: str, *, console: Console | None) -> Run:
    """Return the run when it has ended; the watchdog sees to it that it does. ``console`` shows bars meanwhile."""
    headline = Progress(SpinnerColumn(), "[progress.description]{task.description}", TimeElapsedColumn())
    bars = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    phase = headline.add_task(f"run {run_id}", total=1)
    shown = Group(headline, bars) if console else Group()
    with Live(shown, console=console or Console(quiet=True)), _events(run_id, bars):
        while (run := catalog.get_run(run_id)).state is State.RUNNING:
            headline.update(phase, description=f"run {run_id}: {run.phase}")
            time.sleep(POLL_SECONDS)
        headline.update(phase, description=f"run {run_id}: {run.state}", completed=1)
    if console and not console.is_interactive:
        console.print()  # Live ends its last line only on a terminal
    return run


def origin(run: Run) -> str:
    """Return a line that says from what a plan would restore, and how old that is."""
    metadata = archive.read_metadata(open_store(get_settings().store_of(run.store)), str(run.archive))
    age = catalog.now() - metadata.backup_time
    hours, minutes = divmod(age.seconds // 60, 60)
    when = f"{metadata.backup_time:%Y-%m-%d %H:%M:%S} UTC, {age.days} d {hours} h {minutes} min old"
    return f"{run.archive}: {metadata.system_name} {metadata.system_version} of {when}"


@contextmanager
def _events(run_id: str, bars: Progress) -> Iterator[None]:
    """Show the progress events of the run's tasks while the block runs."""
    shown: dict[tuple[str, str], Any] = {}

    def show(event: dict[str, Any]) -> None:
        if not event["uuid"].startswith(f"{run_id}."):
            return
        for item in event["items"]:
            key = (event["uuid"], item["label"])
            if key not in shown:
                component, label = event["component"], item["label"].removeprefix(f"{event['component']}.")
                name = component if label == component else f"{component} {label}"
                shown[key] = bars.add_task(escape(name), total=item["expected"])
            total = (
                item["done"] if item["finished"] else item["expected"] and max(item["expected"], item["done"])
            )
            bars.update(shown[key], completed=item["done"], total=total)

    stop = threading.Event()

    def receive() -> None:
        while not stop.is_set():
            try:
                with app.connection_for_read() as connection:
                    receiver = app.events.Receiver(connection, handlers={EVENT: show})
                    for _ in receiver.itercapture(limit=None, timeout=None, wakeup=False):
                        if stop.is_set():
                            return
            except (OperationalError, OSError):
                stop.wait(1)  # the broker is away; the run goes on without being shown

    # A daemon, and not joined: it may wait for an event that never comes.
    threading.Thread(target=receive, name="events", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
