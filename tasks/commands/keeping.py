"""Commands about what is kept: retention, deletion, and the catalogue made anew."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.commands import common
from tasks.commands.common import From, Json, Wait, translated
from workers import catalog


def prune(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would stay or go, and why.")
    ] = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Delete the archives that retention does not keep."""
    from tasks import surveys
    from tasks.prune import prune as prune_stores

    with translated():
        if dry_run:
            _show_plans({table: surveys.survey(table) for table in surveys.tables()}, as_json=as_json)
            return
        run_id = common.send(prune_stores)
        common.follow(run_id, wait=wait, as_json=as_json)
        if not as_json:
            for table, outcome in catalog.get_run(run_id).outcome.items():
                dropped = ", ".join(outcome["dropped"]) or "nothing"
                _say(f"{table}: deleted {dropped}; {outcome['kept']} archives kept", outcome["notes"])


def delete(
    archive: Annotated[str, typer.Argument(help="Name of the archive, as `list` shows it.")],
    *,
    confirm: Annotated[str | None, typer.Option(help="The same name again.")] = None,
    store: From = "store",
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Delete one archive for ever."""
    from tasks.prune import delete as delete_archive

    with translated():
        run_id = common.send(delete_archive, archive, confirm=confirm, store=store)
        common.follow(run_id, wait=wait, as_json=as_json)


def rebuild(
    *,
    drop_gone: Annotated[
        bool, typer.Option("--drop-gone", help="Forget archives that are not in the store any more.")
    ] = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Make the catalogue's list of archives anew from the stores."""
    from tasks.rebuild import rebuild as rebuild_catalog

    with translated():
        run_id = common.send(rebuild_catalog, drop_gone=drop_gone)
        common.follow(run_id, wait=wait, as_json=as_json)
        if not as_json:
            for table, outcome in catalog.get_run(run_id).outcome.items():
                counts = [f"{len(outcome[what])} {what}" for what in ("added", "changed", "gone")]
                _say(f"{table}: {', '.join(counts)}", outcome["notes"])


def import_archives(
    prefix: Annotated[str, typer.Argument(help="Folder in the store; by default all of it.")] = "",
    *,
    component: Annotated[
        list[str] | None, typer.Option(help="Which component is meant, where several could be.")
    ] = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Take archives of the runbook's scripts into the catalogue where they lie in the store."""
    from tasks.imports import import_archives as start

    with translated():
        run_id = common.send(start, prefix, components=component or [])
        common.follow(run_id, wait=wait, as_json=as_json)
        if not as_json:
            for outcome in catalog.get_run(run_id).outcome.values():
                refused = [f"{key}: {reason}" for key, reason in outcome["refused"].items()]
                counts = f"{len(outcome['imported'])} imported, {len(outcome['known'])} known already"
                _say(f"{counts}, {len(refused)} not imported", [*refused, *outcome["notes"]])


def _say(line: str, notes: list[str]) -> None:
    common.console.print(line, highlight=False, soft_wrap=True, markup=False)
    for note in notes:
        common.console.print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)


def _show_plans(surveys: dict[str, Any], *, as_json: bool) -> None:
    rows = [
        {"store": table, "archive": decision.key, "keep": decision.keep, "reason": decision.reason}
        for table, survey in surveys.items()
        for decision in survey.plan.decisions
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("store", "archive", "", "why", box=None)
    for row in rows:
        keep = "keep" if row["keep"] else "[red]delete[/red]"
        table.add_row(str(row["store"]), str(row["archive"]), keep, escape(str(row["reason"])))
    if rows:
        Console().print(table)
    for survey in surveys.values():
        for note in [*([survey.plan.note] if survey.plan.note else []), *survey.notes]:
            _say("", [note])
