"""Takes the runbook's own archives and loose files into the catalogue where they lie, each read to its end first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from celery import Task

from tasks import archive, foreign
from tasks.foreign_forms import belongs_to_another, looks_foreign, why_not
from tasks.foreign_wal import WalImport, is_wal
from tasks.rebuild import NOT_ARCHIVES
from tasks.runs import WORKFLOWS, Work, begin
from tasks.step import perform
from workers import catalog
from workers.app import app
from workers.catalog import Kind, Run, Step
from workers.errors import IntegrityError, Permanent
from workers.hosts import CONTROL
from workers.locks import Lease
from workers.settings import get_settings
from workers.storage import Store, StoredObject, open_store

IMPORT = "import"
"""Name of the lease under which archives are imported."""
NOTHING: Mapping[str, str] = MappingProxyType({})


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


@app.task(bind=True, name="tasks.imports.import_wal")
def import_wal(self: Task[Any, Any], prefix: str, components: Sequence[str], lease: str) -> dict[str, Any]:
    """Check WAL and store it with the WAL of its cluster, while no collection does."""

    def work(held: Lease) -> dict[str, Any]:
        return take_in_wal(open_store(get_settings().store), prefix, components, held)

    return perform(self, lease, work)


@app.task(bind=True, name="tasks.imports.import_below")
def import_below(self: Task[Any, Any], prefix: str, components: Sequence[str]) -> dict[str, Any]:
    """Recognise, read, record; what cannot be imported is named, with the reason."""

    def work(lease: Lease) -> dict[str, Any]:
        return take_in(open_store(get_settings().store), prefix, components, lease)

    return perform(self, IMPORT, work)


def take_in_wal(store: Store, prefix: str, components: Sequence[str], lease: Lease) -> dict[str, Any]:
    """Take the WAL below ``prefix`` into the store's WAL of its cluster; return what `take_in` does, and its gaps as notes."""
    keys = sorted(item.key for item in _below(store, prefix) if is_wal(item.key))
    if not keys:
        return _outcome()
    try:
        component = foreign.only_component(get_settings(), "postgres", components, "WAL")
    except Permanent as error:
        return _outcome(refused=dict.fromkeys(keys, str(error)))
    work = WalImport(store, component.name, lease)
    work.take_in(keys)
    return _outcome(work.imported, work.known, work.refused, work.gaps())


def take_in(store: Store, prefix: str, components: Sequence[str], lease: Lease) -> dict[str, Any]:
    """Import the archives below ``prefix``; return the keys imported, those that were already, and the others with reasons.

    The record is written after the archive was read to its end, then the catalogue's row. Of a file that could not be
    imported nothing is written, and the next import tries it again.
    """
    imported, known, refused = list[str](), list[str](), dict[str, str]()
    rows = {row.key for row in catalog.list_artifacts()}
    deleting = {row.key for row in catalog.list_artifacts(deleting=True)}
    items = {item.key: item for item in _below(store, prefix)}
    for key, item in items.items():
        if key.endswith(archive.SIDECAR_SUFFIX) or is_wal(key) or belongs_to_another(key, items):
            continue
        if key in deleting:
            refused[key] = "its deletion was begun; prune ends it"
        elif archive.sidecar_key(key) in items:
            if key not in rows and (record := foreign.record_of(store, key)):
                catalog.add_artifact(archive.artifact_of(record))  # of an import that ended before its row
            known.append(key)
        elif not looks_foreign(key):
            place, reason = why_not(key)
            refused[place] = reason
        else:
            try:
                found = foreign.recognise(store, item, components)
            except (IntegrityError, Permanent) as error:
                refused[key] = str(error)
                continue
            lease.check()
            archive.write_sidecar(store, found)
            catalog.add_artifact(archive.artifact_of(found))
            imported.append(key)
    return _outcome(imported, known, refused)


def _below(store: Store, prefix: str) -> Iterator[StoredObject]:
    return (item for item in store.list(prefix) if not item.key.startswith(NOT_ARCHIVES))


def _outcome(
    imported: Sequence[str] = (),
    known: Sequence[str] = (),
    refused: Mapping[str, str] = NOTHING,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "imported": list(imported),
        "known": list(known),
        "refused": dict(refused),
        "notes": list(notes),
    }


class ImportWorkflow:
    """WAL first, since a base backup may need it to say where it ends; then archives."""

    first = "wal"

    def work(self, run: Run, phase: str) -> list[Work]:
        args = (run.options["prefix"], run.components)
        if phase == "archives":
            return [Work("store", "tasks.imports.import_below", args, CONTROL, IMPORT)]
        found = foreign.candidates(get_settings(), "postgres", run.components)
        lease = f"{found[0].name}.wal" if len(found) == 1 else IMPORT
        return [Work("wal", "tasks.imports.import_wal", (*args, lease), CONTROL, lease)]

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        failed = [f"{step.name}: {step.error}" for step in steps if step.error]
        results = {step.name: step.result for step in steps if step.result and not step.error}
        catalog.note(run.id, cause="; ".join(failed) or None, outcome=results)
        return "archives" if phase == "wal" and not failed else None


WORKFLOWS[Kind.IMPORT] = ImportWorkflow()
