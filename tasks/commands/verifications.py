"""Commands that prove backups."""

from __future__ import annotations

from typing import Annotated

import typer

from tasks.commands import common
from tasks.commands.common import From, Json, Wait, translated
from workers.catalog import LEVELS


def verify(
    archive: Annotated[
        str | None, typer.Argument(help="Name of the archive; by default the newest full one.")
    ] = None,
    *,
    level: Annotated[str, typer.Option(help=f"How deeply: {', '.join(LEVELS)}.")] = "structure",
    store: From = "store",
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Prove that an archive is good: by its size, its bytes, its structure, or by restoring it in a scratch place."""
    from tasks.verify import verify_archive

    if level not in LEVELS:
        raise typer.BadParameter(f"there is no level {level!r}; there are {', '.join(LEVELS)}")
    with translated():
        run_id = common.send(verify_archive, archive, level=level, store=store)
        common.follow(run_id, wait=wait, as_json=as_json)
