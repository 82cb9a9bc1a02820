"""Commands that restore."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.commands import common
from tasks.commands.common import From, Json, Wait, translated


def restore(
    archive: Annotated[str, typer.Argument(help="Name of the archive, as `list` shows it, or `latest`.")],
    *,
    component: Annotated[str | None, typer.Option(help="Restore only this component.")] = None,
    confirm: Annotated[
        str | None, typer.Option(help="Name of the system or component to be overwritten.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be overwritten.")] = False,
    path: Annotated[
        str | None, typer.Option(help="Of files: only this path of the backup, `uploads/2026`.")
    ] = None,
    database: Annotated[
        list[str] | None, typer.Option(help="Of PostgreSQL: only this database; may be repeated.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="Beside what is live: of files into this empty folder, of PostgreSQL one database under this new name."
        ),
    ] = None,
    onto_new_cluster: Annotated[
        bool,
        typer.Option(
            "--onto-new-cluster", help="Of PostgreSQL: the server was set up anew; that it differs is right."
        ),
    ] = False,
    store: From = "store",
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Restore a full archive, or one component of it, and show that it is in place."""
    from tasks.restore import restore_component, restore_full_system

    options = common.given(path=path, databases=database, into=into, new_cluster=onto_new_cluster)
    if options and not component:
        raise typer.BadParameter(
            "what to restore and where to is for one component: name it with --component"
        )
    with translated():
        if component:
            run_id = common.send(
                restore_component,
                archive,
                component,
                confirm=confirm,
                plan=plan,
                store=store,
                **options,
            )
        else:
            run_id = common.send(restore_full_system, archive, confirm=confirm, plan=plan, store=store)
        common.follow(run_id, wait=wait or plan, as_json=as_json)


def plan(
    archive: str,
    *,
    component: Annotated[str | None, typer.Option()] = None,
    store: From = "store",
    as_json: Json = False,
) -> None:
    """Show what a restore would overwrite, from what, how old, and do nothing."""
    restore(archive, component=component, plan=True, store=store, as_json=as_json)
