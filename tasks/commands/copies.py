"""Commands for the offsite store."""

from __future__ import annotations

from tasks.commands import common
from tasks.commands.common import Json, Wait, translated


def offsite(*, wait: Wait = True, as_json: Json = False) -> None:
    """Copy what the offsite store lacks, and verify the copies."""
    from tasks.offsite import copy_offsite

    with translated():
        common.follow(common.send(copy_offsite), wait=wait, as_json=as_json)
