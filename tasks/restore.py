"""Restores: of a full archive, or of some of its components, that end with the data in place or with what was there.

    inspect → verify → (look) → (config → recreate) → stage → stop → swap → start → health → settle
                                                  any failure: stop → revert → start → health

A restore of some components ``look``s which services are ill before it: those it does not ask for their health.
What is live is first touched by ``stop``. The data is compared with the record while it is staged, and again by a
component whose server loads it in ``swap``, before the services start and go on changing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from celery import Task

from tasks import archive
from tasks.chain import archives_of, parts_of, reader
from tasks.runs import WORKFLOWS, Work, begin
from tasks.step import perform
from tasks.verify import make_way_for, note_restored
from tasks.wal import require_no_collection
from workers import catalog
from workers.app import app
from workers.catalog import Kind, Run, Step
from workers.component import Restore, check_options
from workers.errors import BackupError, NotConfirmed, Permanent, RuntimeUnavailable
from workers.hosts import CONTROL, queue_of
from workers.locks import Lease
from workers.progress import Progress
from workers.runtime import sweep
from workers.settings import get_settings
from workers.storage import Store, open_store

FOUND = frozenset(("reached", "start"))
"""What components find out when they stage, and a run tells: see `Restore.found`."""


@app.task(name="tasks.restore.restore_full_system")
def restore_full_system(
    name: str, *, confirm: str | None = None, plan: bool = False, store: str = "store"
) -> str:
    """Start the restore of every component of the archive ``name`` and return the id of its run.

    ``store`` is the table of the settings for where it lies: ``store`` or ``offsite``. ``confirm`` must be the system's
    name; ``plan`` only looks, and needs none. Raises ``NotConfirmed`` with what it would overwrite,
    ``ObjectNotFound`` for an unknown archive, ``Permanent`` for one that does not fit.
    """
    expected = get_settings().system.name
    return _start(name, None, confirm=confirm, expected=expected, plan=plan, table=store)


@app.task(name="tasks.restore.restore_component")
def restore_component(
    name: str,
    component: str,
    *,
    options: Mapping[str, Any] | None = None,
    confirm: str | None = None,
    plan: bool = False,
    store: str = "store",
) -> str:
    """Start the restore of one component from the archive ``name``; ``confirm`` must be the component's name.

    ``options`` are the component's own (`BaseComponent.restore_options`); with some of them nothing that is live is
    replaced, and no ``confirm`` is needed. Raises ``SettingsError`` for options that it does not have.
    """
    return _start(
        name, [component], options=options, confirm=confirm, expected=component, plan=plan, table=store
    )


def _start(
    name: str,
    components: list[str] | None,
    *,
    options: Mapping[str, Any] | None = None,
    confirm: str | None,
    expected: str,
    plan: bool,
    table: str,
) -> str:
    settings = get_settings()
    store = open_store(settings.store_of(table))
    key = archive.resolve(store, name)
    metadata = archive.read_metadata(store, key)
    if metadata.system_name != settings.system.name:
        raise Permanent(
            f"{key} is a backup of {metadata.system_name}, but this system is {settings.system.name}"
        )
    held = list(dict.fromkeys(part.component for part in metadata.parts))
    chosen = components or held
    if absent := [component for component in chosen if component not in held]:
        raise Permanent(f"{key} holds no component {', '.join(absent)}; it holds {', '.join(held)}")
    if unknown := [component for component in chosen if component not in settings.components]:
        raise Permanent(
            f"the settings know no component {', '.join(unknown)}, which {key} holds; configure it first"
        )
    if not plan and _overwrites(chosen, options or {}) and confirm != expected:
        raise NotConfirmed(
            f"this would overwrite {', '.join(chosen)} of {settings.system.name} with the backup of "
            f"{metadata.backup_time:%Y-%m-%d %H:%M:%S} UTC; see what exactly with plan=True, then confirm={expected!r}"
        )
    kind = Kind.PLAN if plan else Kind.RESTORE
    run = catalog.open_run(kind, job="manual", components=chosen, archive=key, options=options, store=table)
    if run is None or run.cause:
        raise Permanent(f"the restore was not started: {run.cause if run else 'it exists'}")
    if not plan:
        make_way_for(run)
    begin(run)
    return run.id


@app.task(bind=True, name="tasks.restore.verify_archive")
def verify_archive(self: Task[Any, Any], run_id: str, key: str, table: str) -> dict[str, Any]:
    """Read the archive to its last byte before anything is touched."""

    def work(_lease: Lease) -> dict[str, Any]:
        require_no_collection(catalog.get_run(run_id).components)
        progress = Progress(self, "archive")
        store = _store(table)
        with progress.reporting():
            read = [archive.verify(store, held, progress=progress) for held in archives_of(store, key)]
        return {"parts": sum(len(metadata.parts) for metadata in read)}

    return perform(self, f"run-{run_id}", work)


@app.task(bind=True, name="tasks.restore.inspect_component")
def inspect_component(
    self: Task[Any, Any], key: str, name: str, options: Mapping[str, Any], table: str
) -> dict[str, Any]:
    """Say what a restore of the component would overwrite, and whether where it lives is missing."""
    component = get_settings().components[name]

    def work(_lease: Lease) -> dict[str, Any]:
        try:
            parts = [part for _, part in parts_of(_store(table), key, name)]
            return {"lines": component.overwrites(parts, options), "missing": False}
        except RuntimeUnavailable as error:
            return {"lines": [f"{name}: not there now ({error})"], "missing": True}

    return perform(self, name, work)


@app.task(bind=True, name="tasks.restore.restore_step")
def restore_step(
    self: Task[Any, Any],
    run_id: str,
    key: str,
    name: str,
    actions: Sequence[str],
    options: Mapping[str, Any],
    table: str,
) -> dict[str, Any]:
    """Do the named steps of the component's restore (see `BaseComponent`), one after another."""
    component = get_settings().components[name]
    progress = Progress(self, name)

    def work(lease: Lease) -> dict[str, Any]:
        sweep(component.runtime, name)
        store = _store(table)
        parts = parts_of(store, key, name)
        read = reader(store, parts, progress)
        restore = Restore(run_id, [part for _, part in parts], read, options, store)
        for action in actions:
            with progress.reporting():
                {
                    "stage": component.stage,
                    "swap": component.swap,
                    "revert": component.revert,
                    "settle": component.settle,
                }[action](restore)
            lease.check()
        return restore.found | ({"warnings": restore.warnings} if restore.warnings else {})

    return perform(self, name, work)


@app.task(bind=True, name="tasks.restore.recreate_component")
def recreate_component(self: Task[Any, Any], name: str) -> dict[str, Any]:
    """Start where the component lives, creating its container when there is none."""

    def work(_lease: Lease) -> dict[str, Any]:
        get_settings().components[name].service.start()
        return {}

    return perform(self, name, work)


def _store(table: str) -> Store:
    return open_store(get_settings().store_of(table))


class PlanWorkflow:
    """Look at what a restore would overwrite, and do nothing."""

    first = "inspect"

    def work(self, run: Run, phase: str) -> list[Work]:
        return [
            Work(
                name,
                "tasks.restore.inspect_component",
                (run.archive, name, run.options, run.store),
                _queue(name),
                name,
            )
            for name in run.components
        ]

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        _note(run, phase, steps)
        found = {step.name: step.result for step in steps if step.result and not step.error}
        catalog.note(
            run.id, outcome={"overwrites": [line for result in found.values() for line in result["lines"]]}
        )
        catalog.note(
            run.id, outcome={"missing": [name for name, result in found.items() if result["missing"]]}
        )
        return None


class RestoreWorkflow:
    """The phases of a restore, and the way back from each of them."""

    first = "inspect"

    def work(self, run: Run, phase: str) -> list[Work]:
        action, _, index = phase.removeprefix("abort-").partition(".")
        match action:
            case "inspect":
                return PlanWorkflow().work(run, phase)
            case "verify":
                return [
                    Work(
                        "archive",
                        "tasks.restore.verify_archive",
                        (run.id, run.archive, run.store),
                        CONTROL,
                        f"run-{run.id}",
                    )
                ]
            case "look":
                # Services that need what is not restored now may have been ill before, and stay so.
                groups = _groups(run) if set(run.components) < set(get_settings().components) else []
            case "config":
                return [self._step(run, name, ["stage", "swap"]) for name in _configs(run)]
            case "recreate":
                missing = [name for name in run.outcome["missing"] if name not in _configs(run)]
                return [
                    Work(name, "tasks.restore.recreate_component", (name,), _queue(name), name)
                    for name in missing
                ]
            case "stage" | "swap":
                done = _configs(run) if run.outcome["missing"] else []
                return [self._step(run, name, [action]) for name in run.components if name not in done]
            case "revert" | "settle":
                return [self._step(run, name, [action]) for name in run.components]
            case "health":
                ill = run.outcome.get("ill", [])
                asked = [(host, [name for name in names if name not in ill]) for host, names in _groups(run)]
                groups = [(host, names) for host, names in asked if names]
            case _:
                groups = [_groups(run)[int(index)]]
                action = "stop" if action == "stop" else "start"
        if action == "start":
            groups = [(host, names[::-1]) for host, names in groups]
        task = "tasks.services.control_services"
        return [
            Work(
                "+".join(names),
                task,
                (run.id, names, action),
                queue_of(host),
                f"services-{run.id}-{'-'.join(names)}",
            )
            for host, names in groups
        ]

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        failed = _note(run, phase, steps)
        if phase == "inspect":
            PlanWorkflow().following(run, phase, steps)
            run = catalog.get_run(run.id)
        if phase == "stage":
            for step in steps:
                catalog.note(
                    run.id,
                    outcome={key: (step.result or {})[key] for key in FOUND & (step.result or {}).keys()},
                )
        if phase == "look":
            catalog.note(
                run.id,
                outcome={"ill": [name for step in steps for name in (step.result or {}).get("ill", [])]},
            )
        groups = range(len(_groups(run)))
        stop, start = [f"stop.{group}" for group in groups], [f"start.{group}" for group in reversed(groups)]
        recreate = ["config", "recreate"] if run.outcome.get("missing") else []
        forward = ["inspect", "verify", "look", *recreate, "stage", *stop, "swap", *start, "health", "settle"]
        back = [f"abort-{name}" for name in [*stop, "revert", *start, "health"]]
        if phase in back:
            path = back
        elif failed and phase != "settle":
            if phase in ("inspect", "verify", "look"):
                return None
            services_ran_on = phase in (*recreate, "stage")
            return "abort-revert" if services_ran_on else back[0]
        else:
            path = forward
        if phase == "settle" and not failed and not run.cause:
            _note_proof(run)
        position = path.index(phase) + 1
        if phase == "abort-revert" and _stopped_nothing(run):
            return None
        return path[position] if position < len(path) else None

    def _step(self, run: Run, name: str, actions: list[str]) -> Work:
        return Work(
            name,
            "tasks.restore.restore_step",
            (run.id, run.archive, name, actions, run.options, run.store),
            _queue(name),
            name,
        )


def _note(run: Run, phase: str, steps: Sequence[Step]) -> bool:
    failed = [f"{phase} {step.name}: {step.error}" for step in steps if step.error]
    if warnings := [line for step in steps for line in (step.result or {}).get("warnings", [])]:
        catalog.note(
            run.id, outcome={"warnings": [*catalog.get_run(run.id).outcome.get("warnings", []), *warnings]}
        )
    if failed:
        catalog.note(run.id, cause="; ".join(failed))
        if phase.startswith("abort-"):
            catalog.note(run.id, outcome={"not_reverted": failed})
    return bool(failed)


def _note_proof(run: Run) -> None:
    """Write what a restore proved to the ledger; the data is in place whether that can be written or not."""
    try:
        note_restored(run)
    except BackupError as error:
        warning = f"that it was restored could not be written beside the archive: {error}"
        warnings = catalog.get_run(run.id).outcome.get("warnings", [])
        if warning not in warnings:
            catalog.note(run.id, outcome={"warnings": [*warnings, warning]})


def _stopped_nothing(run: Run) -> bool:
    return not any(step.phase.startswith("stop.") for step in catalog.steps_of(run.id))


def _overwrites(components: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Whether a restore replaces what is live; if not, no service is stopped for it and nothing is to be confirmed."""
    known = get_settings().components
    return any(check_options(known[name].restore_options, options, name).overwrites for name in components)


def _queue(component: str) -> str:
    return queue_of(get_settings().components[component].host)


def _configs(run: Run) -> list[str]:
    components = get_settings().components
    return [name for name in run.components if components[name].metadata_key == "config"]


def _groups(run: Run) -> list[tuple[str, list[str]]]:
    """Return the services to stop, in order, as runs of services on the same host."""
    if not _overwrites(run.components, run.options):
        return []
    using = [
        service
        for service in get_settings().services
        if not service.uses or set(service.uses) & set(run.components)
    ]
    return [
        (host, [service.name for service in group])
        for host, group in groupby(using, lambda service: service.host)
    ]


WORKFLOWS[Kind.PLAN] = PlanWorkflow()
WORKFLOWS[Kind.RESTORE] = RestoreWorkflow()
