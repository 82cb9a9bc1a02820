"""Commands that recover PostgreSQL to a point in time."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from tasks.commands import common
from tasks.commands.common import Json, Wait, translated
from workers.errors import SettingsError


def recover(
    component: Annotated[str, typer.Argument(help="A PostgreSQL component whose WAL is collected.")],
    *,
    to_time: Annotated[
        str | None, typer.Option(help="To a time with its zone: 2026-11-22T02:00:00+00:00.")
    ] = None,
    to_lsn: Annotated[str | None, typer.Option(help="To a position in the WAL: 16/B374D848.")] = None,
    to_xid: Annotated[int | None, typer.Option(help="To a transaction id.")] = None,
    to_name: Annotated[str | None, typer.Option(help="To a restore point that was named.")] = None,
    latest: Annotated[bool, typer.Option("--latest", help="To the end of the WAL.")] = False,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Stop just before the target, not just after it.")
    ] = False,
    timeline: Annotated[
        int | None, typer.Option(help="By default the one that was live at the target.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The archive of the base backup; by default chosen by the target.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(help="Recover into this folder, where the server is; the live one is left alone."),
    ] = None,
    onto_new_cluster: Annotated[
        bool,
        typer.Option("--onto-new-cluster", help="The server was set up anew in the place of a lost one."),
    ] = False,
    confirm: Annotated[str | None, typer.Option(help="Name of the component to be overwritten.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be overwritten.")] = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Recover a PostgreSQL server to a point in time, and show the point that was reached."""
    from tasks.recover import recover_component

    with translated():
        asked = {
            "to_time": _zoned(to_time) if to_time else None,
            "to_lsn": to_lsn,
            "to_xid": to_xid,
            "to_name": to_name,
            "latest": latest or None,
            "exclusive": exclusive or None,
            "timeline": timeline,
            "folder": into,
            "new_cluster": onto_new_cluster or None,
        }
        options = {name: value for name, value in asked.items() if value is not None}
        run_id = common.send(
            recover_component, component, options=options, archive=base, confirm=confirm, plan=plan
        )
        common.follow(run_id, wait=wait or plan, as_json=as_json)


def _zoned(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(
            "--to-time", [f"not a time: {text!r}; one looks like 2026-11-22T02:00:00+09:00"]
        ) from error
    if moment.tzinfo is None:
        raise SettingsError("--to-time", [f"{text} has no zone; add one, +09:00 for example, or Z"])
    return moment.isoformat()
