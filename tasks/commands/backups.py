"""Commands that back up."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.commands import common
from tasks.commands.common import Json, Wait, translated


def backup(
    components: Annotated[
        list[str] | None, typer.Argument(help="Components; by default the full system.")
    ] = None,
    *,
    base: Annotated[
        str | None,
        typer.Option(
            help="full: a base backup of one PostgreSQL server, for point-in-time recovery; incremental: of what "
            "changed since the newest one."
        ),
    ] = None,
    database: Annotated[
        list[str] | None, typer.Option(help="Only this database of a PostgreSQL component; may be repeated.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="dumpall: all databases as one file of plain SQL, by pg_dumpall."),
    ] = None,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Back up the full system, or the components named."""
    from tasks.backup import backup_full_system

    with translated():
        asked = common.given(base=base, databases=database, format=form)
        run_id = common.send(backup_full_system, components or None, **asked)
        common.follow(run_id, wait=wait, as_json=as_json)
