"""Commands about PostgreSQL's WAL: its collection, and what can be recovered."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tasks.commands import common
from tasks.commands.common import Json, Wait, console, translated
from workers import catalog
from workers.catalog import Kind
from workers.errors import BackupError


def collect(
    components: Annotated[
        list[str] | None, typer.Argument(help="PostgreSQL components; by default all with a wal_archive.")
    ] = None,
    *,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Collect the WAL that PostgreSQL servers have archived, and say what it is worth."""
    from tasks.wal import collect_wal

    with translated():
        run_id = common.send(collect_wal, components or None)
        try:
            common.follow(run_id, wait=wait, as_json=as_json)
        finally:
            if wait and not as_json:
                _report(catalog.get_run(run_id).outcome)


def recoverable() -> list[dict[str, Any]]:
    """Return, for each PostgreSQL cluster that has WAL or base backups, what it can be brought back to, its age and its target.

    Archives that are known to be damaged do not count, nor increments that need one of them.
    Beside `Recoverable.document`: ``age_seconds`` (the true RPO), ``target_seconds``, ``late``, and what the newest
    collection found (``collected``, ``troubles``, ``slot``). A component whose WAL cannot be read has an ``error``.
    """
    from tasks.components.postgres import Component
    from tasks.recoverable import clusters
    from workers.settings import get_settings
    from workers.storage import open_store

    settings = get_settings()
    artifacts = catalog.list_sound_artifacts()
    runs = [run for run in catalog.list_runs() if run.kind is Kind.COLLECT]
    documents: list[dict[str, Any]] = []
    for name, component in settings.components.items():
        if not isinstance(component, Component):
            continue
        try:
            found = clusters(open_store(settings.store), name, artifacts)
        except BackupError as error:
            documents.append({"component": name, "error": str(error)})
            continue
        collected: dict[str, Any] = next((run.outcome[name] for run in runs if name in run.outcome), {})
        for one in found[-1:]:
            age = (catalog.now() - one.newest).total_seconds() if one.newest else None
            target = settings.limits.recovery_point
            documents.append(
                {
                    **one.document(),
                    "age_seconds": age,
                    "target_seconds": target,
                    "late": age is None or age > target,
                    "collected": collected.get("collection", {}).get("taken"),
                    "troubles": collected.get("troubles", []),
                    "slot": collected.get("slot"),
                }
            )
    return documents


def show_recoverable(documents: list[dict[str, Any]]) -> None:
    """Print what `recoverable` found."""
    out = Console()
    for one in documents:
        name = one["component"]
        if "error" in one:
            out.print(f"{name}: [red]{escape(one['error'])}[/red]", soft_wrap=True)
            continue
        target = timedelta(seconds=one["target_seconds"])
        if one["newest"] is None:
            out.print(f"{name}: [red]no moment is recoverable from WAL yet[/red] (target: {target})")
        else:
            age = timedelta(seconds=round(one["age_seconds"]))
            color = "red" if one["late"] else "green"
            out.print(
                f"{name}: newest recoverable point {one['newest'][:19]} UTC, [{color}]{age} old[/{color}] (target: {target})"
            )
        for span in one["ranges"]:
            out.print(
                f"  recoverable from {span['start'][:19]} to {span['end'][:19]} UTC "
                f"(LSN {span['start_lsn']} to {span['end_lsn']}, timeline {span['timeline']})",
                soft_wrap=True,
            )
        for line in [gap["text"] for gap in one["gaps"]] + one["troubles"]:
            out.print(f"  [red]{escape(line)}[/red]", soft_wrap=True)
        if slot := one["slot"]:
            out.print(f"  slot {slot['name']}: {common.size_of(slot['lag'])} behind at the last collection")


def _report(outcome: dict[str, Any]) -> None:
    for name, found in outcome.items():
        console.print(
            f"{name}: {found['files']} files, {common.size_of(found['size'])} stored", highlight=False
        )
        for line in [*found["gaps"], *found["troubles"]]:
            console.print(f"  [yellow]{escape(line)}[/yellow]", highlight=False, soft_wrap=True)
        if base := found.get("base_backup"):
            console.print(f"  {escape(base)}", highlight=False)
