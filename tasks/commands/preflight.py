"""The command that says what to change before backups can work."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape

from tasks.commands.common import Exit, Json, console, translated
from workers.errors import Permanent

SECONDS_TO_ANSWER = 60
SECONDS_TO_LOOK = 5
"""After these, a host that no worker answers for is not waited for any more."""
PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Asked:
    """A task that was sent, and the queue it waits in."""

    result: Any
    queue: str


def preflight(
    components: Annotated[list[str] | None, typer.Argument(help="Components; by default all.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Say exactly what to change so that everything in the settings works: exit 0 nothing, 1 something, 5 no answer."""
    with translated():
        found = _ask_hosts(components) | ({} if components else _ask_stores())
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    if any(findings is None for findings in found.values()):
        raise typer.Exit(Exit.UNAVAILABLE)
    if any(not finding["advice"] for findings in found.values() for finding in findings or ()):
        raise typer.Exit(Exit.FAILED)


def _ask_hosts(names: list[str] | None) -> dict[str, list[dict[str, Any]] | None]:
    """Return each component's findings, ``None`` where its host does not answer. Raises ``Permanent`` for an unknown one."""
    from tasks.preflight import check_component
    from workers.app import app
    from workers.hosts import queue_of
    from workers.settings import get_settings

    known = get_settings().components
    chosen = names or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise Permanent(f"there is no component {', '.join(unknown)}; there are {', '.join(known)}")
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=2)
    places = {name: ((name,), queue_of(known[name].host)) for name in chosen}
    return _answers({name: _ask(check_component, name, *place) for name, place in places.items()})


def _ask_stores() -> dict[str, list[dict[str, Any]] | None]:
    """Return what each host finds of the main store, and a control worker of both stores."""
    from tasks.preflight import check_store
    from workers.hosts import CONTROL, queue_of
    from workers.settings import get_settings

    settings = get_settings()
    places = [("store", f"store@{host}", queue_of(host)) for host in settings.hosts]
    places += [("store", "store@control", CONTROL)]
    places += [("offsite", "offsite@control", CONTROL)] if settings.offsite else []
    return _answers({name: _ask(check_store, name, (table,), queue) for table, name, queue in places})


def _ask(task: Any, name: str, args: tuple[str, ...], queue: str) -> Asked:
    result = task.apply_async(args, queue=queue, shadow=f"preflight {name}", expires=SECONDS_TO_ANSWER)
    return Asked(result, queue)


def _answers(asked: dict[str, Asked]) -> dict[str, list[dict[str, Any]] | None]:
    """Return what each task returned, ``None`` for one that nobody did in time.

    The tasks are polled: waiting for a result that never comes leaves it to the end of the interpreter, which complains.
    """
    from workers.app import app
    from workers.hosts import answering_queues

    waiting, began, looked = dict(asked), time.monotonic(), False
    while waiting and time.monotonic() < began + SECONDS_TO_ANSWER:
        waiting = {name: one for name, one in waiting.items() if not one.result.ready()}
        if waiting and not looked and time.monotonic() > began + SECONDS_TO_LOOK:
            looked = True
            there = answering_queues(app, timeout=SECONDS_TO_LOOK)
            waiting = {name: one for name, one in waiting.items() if one.queue in there}
        elif waiting:
            time.sleep(PAUSE_SECONDS)
    return {name: one.result.get() if one.result.ready() else None for name, one in asked.items()}


def _show(found: dict[str, list[dict[str, Any]] | None]) -> None:
    for name, findings in found.items():
        if findings is None:
            console.print(f"{name}: [red]its host does not answer[/red]")
        elif not findings:
            console.print(f"{name}: [green]nothing to change[/green]")
        for finding in findings or ():
            color = "yellow" if finding["advice"] else "red"
            what = escape(finding["what"])
            console.print(f"{name}: [{color}]{what}[/{color}]", highlight=False, soft_wrap=True)
            if finding["change"]:
                print(f"    {finding['change']}")
