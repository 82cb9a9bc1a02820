"""The console script ``ai-micro-backup``: sends the same tasks, reads the same catalogue.

Exit status: 0 done, 1 the run failed, 2 wrong settings or usage, 3 not confirmed, 4 no such archive or run,
5 the broker or a worker does not answer.
"""

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
from rich.table import Table

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

cli = typer.Typer(
    help="Backs up, verifies and restores a system of Docker-hosted services.", no_args_is_help=True
)
console = Console(stderr=True)
MEGABYTE = 1_000_000
SECONDS_TO_START = 30

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")]
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


@cli.command()
def backup(
    components: Annotated[
        list[str] | None, typer.Argument(help="Components; by default the full system.")
    ] = None,
    *,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Back up the full system, or the components named."""
    from tasks.backup import backup_full_system

    with translated():
        run_id = _send(backup_full_system, components or None)
        _follow(run_id, wait=wait, as_json=as_json)


@cli.command()
def restore(
    archive: Annotated[str, typer.Argument(help="Name of the archive, as `list` shows it.")],
    *,
    component: Annotated[str | None, typer.Option(help="Restore only this component.")] = None,
    confirm: Annotated[
        str | None, typer.Option(help="Name of the system or component to be overwritten.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be overwritten.")] = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Restore a full archive, or one component of it, and show that it is in place."""
    from tasks.restore import restore_component, restore_full_system

    with translated():
        if component:
            run_id = _send(restore_component, archive, component, confirm=confirm, plan=plan)
        else:
            run_id = _send(restore_full_system, archive, confirm=confirm, plan=plan)
        _follow(run_id, wait=wait or plan, as_json=as_json)


@cli.command()
def plan(
    archive: str, *, component: Annotated[str | None, typer.Option()] = None, as_json: Json = False
) -> None:
    """Show what a restore would overwrite, from what, how old, and do nothing."""
    restore(archive, component=component, plan=True, as_json=as_json)


@cli.command("list")
def list_archives(*, as_json: Json = False) -> None:
    """List the archives, the newest first."""
    with translated():
        rows = [
            {
                "archive": row.key,
                "created": f"{row.created:%Y-%m-%d %H:%M:%S}",
                "size": row.size,
                "sha256": row.sha256,
            }
            for row in catalog.list_artifacts()
        ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("archive", "created (UTC)", "size", box=None)
    for row in rows:
        table.add_row(str(row["archive"]), str(row["created"]), _size(int(str(row["size"]))))
    Console().print(table if rows else "no archive yet; make one with: ai-micro-backup backup")


@cli.command()
def show(name: Annotated[str, typer.Argument(help="An archive or a run.")], *, as_json: Json = False) -> None:
    """Show what an archive holds, or how a run went."""
    from tasks import archive as archives
    from workers.settings import get_settings
    from workers.storage import open_store

    with translated():
        try:
            document = _run_document(catalog.get_run(name))
        except CatalogError:
            store = open_store(get_settings().store)
            document = archives.read_metadata(store, archives.resolve(store, name)).model_dump(mode="json")
    if as_json:
        print(json.dumps(document))
    elif "parts" in document:
        _show_archive(document)
    else:
        Console().print_json(data=document)


@cli.command()
def status(*, as_json: Json = False) -> None:
    """Show which hosts answer, what runs, and the newest backup with its age."""
    from workers.app import app
    from workers.hosts import CONTROL, answering_queues, queue_of
    from workers.settings import get_settings

    with translated():
        settings = get_settings()
        answering = answering_queues(app)
        hosts = {host: queue_of(host) in answering for host in settings.hosts}
        runs = [_run_document(run) for run in catalog.list_runs(limit=10)]
        newest = next((row for row in catalog.list_artifacts() if row.key.startswith("full_system/")), None)
    age = (catalog.now() - newest.created).total_seconds() if newest else None
    document = {
        "system": settings.system.name,
        "control": CONTROL in answering,
        "hosts": hosts,
        "newest_full_backup": newest.key if newest else None,
        "age_seconds": age,
        "runs": runs,
    }
    if as_json:
        print(json.dumps(document))
    else:
        _show_status(document)
    if not (all(hosts.values()) and document["control"]):
        raise typer.Exit(Exit.UNAVAILABLE)


def main() -> None:
    """Run the console script."""
    cli()


def _send(task: Any, *args: Any, **kwargs: Any) -> str:
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


def _follow(run_id: str, *, wait: bool, as_json: bool) -> None:
    from tasks.watch import follow, origin

    run = follow(run_id, console=None if as_json else console) if wait else catalog.get_run(run_id)
    document = _run_document(run)
    if as_json:
        print(json.dumps(document))
    elif run.kind is catalog.Kind.PLAN:
        print(origin(run))
        for line in document["outcome"].get("overwrites", []):
            print(line)
    elif run.state is State.COMPLETE:
        console.print(f"[green]complete:[/green] {run.kind} {run.id}, archive {run.archive}", highlight=False)
        if ill := run.outcome.get("ill"):
            console.print(f"[yellow]not asked for their health, being ill before:[/yellow] {', '.join(ill)}")
    elif run.state is State.RUNNING:
        console.print(f"started: {run.kind} {run.id}; see: ai-micro-backup show {run.id}", highlight=False)
    if run.state is State.FAILED:
        cause = escape(str(run.cause))
        console.print(f"[red]failed:[/red] {run.kind} {run.id}: {cause}", highlight=False, soft_wrap=True)
        raise typer.Exit(Exit.FAILED)


def _run_document(run: Run) -> dict[str, Any]:
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


def _show_archive(document: dict[str, Any]) -> None:
    out = Console()
    out.print(f"{document['system_name']} {document['system_version']}, backup of {document['backup_time']}")
    table = Table("part", "host", "stored", "plain", "holds", box=None)
    for part in document["parts"]:
        holds = ", ".join(
            f"{key} {value}" for key, value in part["holds"].items() if isinstance(value, (str, int))
        )
        table.add_row(
            part["name"], part["host"], _size(part["size"]), _size(part["plain_size"]), escape(holds)
        )
    out.print(table)


def _show_status(document: dict[str, Any]) -> None:
    out = Console()
    for name, answers in {"control": document["control"], **document["hosts"]}.items():
        out.print(f"{name}: {'[green]answers[/green]' if answers else '[red]does not answer[/red]'}")
    age = document["age_seconds"]
    newest = (
        f"{document['newest_full_backup']}, {age / 3600:.1f} h old" if age is not None else "[red]none[/red]"
    )
    out.print(f"newest full backup: {newest}")
    table = Table("run", "kind", "job", "state", "cause", box=None)
    for run in document["runs"]:
        table.add_row(run["id"], run["kind"], run["job"], run["state"], escape(run["cause"] or ""))
    out.print(table)


def _size(size: int) -> str:
    return f"{size / MEGABYTE:.1f} MB"


if __name__ == "__main__":
    main()
