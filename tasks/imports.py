"""Takes the runbook's own archives and loose files into the catalogue where they lie, each read to its end first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from celery import Task

from tasks import archive, foreign
from tasks.rebuild import NOT_ARCHIVES
from tasks.runs import WORKFLOWS, OnePhase, Work, begin
from tasks.step import perform
from workers import catalog
from workers.app import app
from workers.catalog import Kind, Run
from workers.errors import IntegrityError, Permanent
from workers.hosts import CONTROL
from workers.locks import Lease
from workers.settings import get_settings
from workers.storage import Store, open_store


@app.task(name="tasks.imports.import_archives")
def import_archives(prefix: str = "", *, components: Sequence[str] = ()) -> str:
    """Start the import of what lies in the store below ``prefix`` and return the run's id.

    ``components`` says which ones are meant where several of the settings could be. Raises ``Permanent`` for one that
    does not exist.
    """
    known = get_settings().components
    if unknown := [name for name in components if name not in known]:
        raise Permanent(f"there is no component {', '.join(unknown)}; there are {', '.join(known)}")
    run = catalog.open_run(Kind.IMPORT, job="manual", components=list(components), options={"prefix": prefix})
    if run is None:
        raise Permanent("the import was not started")
    begin(run)
    return run.id


@app.task(bind=True, name="tasks.imports.import_below")
def import_below(self: Task[Any, Any], prefix: str, components: Sequence[str]) -> dict[str, Any]:
    """Recognise, read, record; what cannot be imported is named, with the reason."""

    def work(lease: Lease) -> dict[str, Any]:
        return take_in(open_store(get_settings().store), prefix, components, lease)

    return perform(self, "import", work)


def take_in(store: Store, prefix: str, components: Sequence[str], lease: Lease) -> dict[str, Any]:
    """Import what lies below ``prefix``; return the keys imported, those that were already, and the others with reasons.

    The record is written after the archive was read to its end, then the catalogue's row. Of a file that could not be
    imported nothing is written, and the next import tries it again.
    """
    outcome: dict[str, Any] = {"imported": [], "known": [], "refused": {}}
    rows = {row.key for row in catalog.list_artifacts()}
    deleting = {row.key for row in catalog.list_artifacts(deleting=True)}
    items = {item.key for item in store.list(prefix) if not item.key.startswith(NOT_ARCHIVES)}
    for key in sorted(items):
        if key.endswith(archive.SIDECAR_SUFFIX):
            continue
        if key in deleting:
            outcome["refused"][key] = "its deletion was begun; prune ends it"
        elif archive.sidecar_key(key) in items:
            if key not in rows and (
                record := foreign.record_of(store, key)
            ):  # of an import that ended before its row
                catalog.add_artifact(archive.artifact_of(record))
            outcome["known"].append(key)
        elif not foreign.looks_foreign(key):
            outcome["refused"][key] = f"{PurePosixPath(key).name} is no name that the runbook's scripts give"
        else:
            try:
                found = foreign.recognise(store, key, components)
            except (IntegrityError, Permanent) as error:
                outcome["refused"][key] = str(error)
                continue
            lease.check()
            archive.write_sidecar(store, found)
            catalog.add_artifact(archive.artifact_of(found))
            outcome["imported"].append(key)
    return outcome


def _work(run: Run) -> list[Work]:
    args = (run.options["prefix"], run.components)
    return [Work("store", "tasks.imports.import_below", args, CONTROL, "import")]


WORKFLOWS[Kind.IMPORT] = OnePhase(_work)
