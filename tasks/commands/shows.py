"""Commands that show what there is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.commands import common
from tasks.commands.common import Exit, From, Json, translated
from tasks.commands.proof import DAY, proof_document, proven, restored_in_part, show_proven, unencrypted
from tasks.commands.wal import recoverable, show_recoverable
from workers import catalog
from workers.catalog import Artifact
from workers.component import Part
from workers.errors import CatalogError


def list_archives(*, store: From = "store", as_json: Json = False) -> None:
    """List the archives, the newest first; those of another store than the main one as that store itself has them."""
    with translated():
        artifacts = catalog.list_artifacts() if store == "store" else _artifacts_in(store)
        rows = [
            {
                "archive": row.key,
                "created": f"{row.created:%Y-%m-%d %H:%M:%S}",
                "size": row.size,
                "sha256": row.sha256,
            }
            for row in artifacts
        ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("archive", "created (UTC)", "size", box=None)
    for row in rows:
        table.add_row(str(row["archive"]), str(row["created"]), common.size_of(int(str(row["size"]))))
    Console().print(table if rows else "no archive yet; make one with: ai-micro-backup backup")


def _artifacts_in(table: str) -> list[Artifact]:
    """Return the archives of a store that are whole: those with a record. The catalogue is not asked."""
    from tasks import archive
    from workers.settings import get_settings
    from workers.storage import open_store

    store = open_store(get_settings().store_of(table))
    records = [
        item.key
        for prefix in ("full_system/", "components/")
        for item in store.list(prefix)
        if item.key.endswith(archive.SIDECAR_SUFFIX)
    ]
    found = [archive.artifact_of(archive.parse_sidecar(b"".join(store.get(key)), key)) for key in records]
    return sorted(found, key=lambda artifact: artifact.created, reverse=True)


def show(
    name: Annotated[str, typer.Argument(help="An archive or a run; with --diff, a component.")],
    *,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(help="What differs between two archives, `latest` or `previous`; no value is shown."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an archive holds, how a run went, or what changed in the configuration."""
    from tasks.commands.diffs import show_diff

    if diff is not None:
        with translated():
            show_diff(name, diff, as_json=as_json)
        return
    from tasks import archive as archives
    from workers.settings import get_settings
    from workers.storage import open_store

    with translated():
        try:
            document = common.run_document(catalog.get_run(name))
        except CatalogError:
            store = open_store(get_settings().store)
            key = archives.resolve(store, name)
            document = archives.read_metadata(store, key).model_dump(mode="json")
            lines = catalog.list_verifications(key)
            standing = catalog.proofs(lines).get(("store", key))
            document["proof"] = proof_document(standing, catalog.now())
            document["restored_in_part"] = restored_in_part(lines)
    if as_json:
        print(json.dumps(document))
    elif "parts" in document:
        _show_archive(document)
    else:
        Console().print_json(data=document)


def status(*, as_json: Json = False) -> None:
    """Show which hosts answer, what runs, the newest backup with its age, and what PostgreSQL can be brought back to."""
    from tasks.archive import is_full
    from workers.app import app
    from workers.hosts import CONTROL, answering_queues, queue_of
    from workers.settings import get_settings

    with translated():
        settings = get_settings()
        answering = answering_queues(app)
        hosts = {host: queue_of(host) in answering for host in settings.hosts}
        runs = [common.run_document(run) for run in catalog.list_runs(limit=10)]
        newest = next((row for row in catalog.list_artifacts() if is_full(row.key)), None)
        points = recoverable()
        proofs = proven()
        warnings = unencrypted(settings, list(catalog.list_artifacts()))
    age = (catalog.now() - newest.created).total_seconds() if newest else None
    document = {
        "system": settings.system.name,
        "control": CONTROL in answering,
        "hosts": hosts,
        "newest_full_backup": newest.key if newest else None,
        "age_seconds": age,
        "proven": proofs,
        "warnings": warnings,
        "recoverable": points,
        "runs": runs,
    }
    if as_json:
        print(json.dumps(document))
    else:
        _show_status(document)
    if not (all(hosts.values()) and document["control"]):
        raise typer.Exit(Exit.UNAVAILABLE)


def _show_archive(document: dict[str, Any]) -> None:
    out = Console()
    out.print(f"{document['system_name']} {document['system_version']}, backup of {document['backup_time']}")
    proof = document["proof"]
    if proof is None:
        out.print("never verified; prove it with: ai-micro-backup verify")
    elif proof["damaged"]:
        out.print(f"[red]damaged:[/red] {escape('; '.join(proof['wrong']))}")
    else:
        out.print(f"proven by {proof['level']}, {proof['age_seconds'] / DAY:.1f} d ago")
    for partial in document["restored_in_part"]:
        what = ", ".join([*partial["components"], *(f"{k} {v}" for k, v in partial["options"].items())])
        out.print(f"restored in part at {partial['taken']}: {escape(what)}", highlight=False)
    table = Table("part", "host", "stored", "plain", "holds", box=None)
    for part in document["parts"]:
        holds = ", ".join(
            f"{key} {value}" for key, value in part["holds"].items() if isinstance(value, (str, int))
        )
        table.add_row(
            part["name"],
            part["host"],
            common.size_of(part["size"]),
            common.size_of(part["plain_size"]),
            escape(holds),
        )
    out.print(table)
    for part in map(Part.model_validate, document["parts"]):
        for line in part.remarks:
            out.print(f"{part.name}: {line}", markup=False, highlight=False, soft_wrap=True)


def _show_status(document: dict[str, Any]) -> None:
    out = Console()
    for name, answers in {"control": document["control"], **document["hosts"]}.items():
        out.print(f"{name}: {'[green]answers[/green]' if answers else '[red]does not answer[/red]'}")
    age = document["age_seconds"]
    newest = (
        f"{document['newest_full_backup']}, {age / 3600:.1f} h old" if age is not None else "[red]none[/red]"
    )
    out.print(f"newest full backup: {newest}")
    show_proven(document["proven"], out)
    for warning in document["warnings"]:
        out.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
    show_recoverable(document["recoverable"])
    table = Table("run", "kind", "job", "state", "cause", box=None)
    for run in document["runs"]:
        table.add_row(run["id"], run["kind"], run["job"], run["state"], escape(run["cause"] or ""))
    out.print(table)
