"""Puts one fault into one call of a store, at every position of a backup, an offsite copy and a restore, in turn.

Run as a program with the settings of `AI_MICRO_BACKUP_CONFIG`: prints a JSON line for each position. All but the
way of the messages is real: the tasks, the runs' phases, leases and results in Redis, the catalogue, local stores.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from unittest import mock

from celery.app.task import Context
from sqlalchemy import delete, insert, select
from sqlmodel import SQLModel

from workers.component import NO_OPTIONS, BaseComponent, Part, Restore, Source
from workers.errors import StoreUnavailable
from workers.storage import local
from workers.storage.local import LocalStore


class Component(BaseComponent):
    """A file of this host that needs no program to be read and written."""

    kind: Literal["note"] = "note"
    metadata_key: ClassVar[str] = "files"
    path: Path

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        return [Source(self.name, f"{self.name}.txt", "note", iter([self.path.read_bytes()]))]

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        return [str(self.path)]

    def by_hand(self, parts: Sequence[Part]) -> str:
        return "cp"

    def stage(self, restore: Restore) -> None:
        content = b"".join(chunk for part in restore.parts for chunk in restore.read(part))
        self._beside("staged").write_bytes(content)

    def swap(self, restore: Restore) -> None:
        if not self._beside("before").exists():
            shutil.copyfile(self.path, self._beside("before"))
        self._beside("staged").replace(self.path)

    def revert(self, restore: Restore) -> None:
        self._beside("staged").unlink(missing_ok=True)
        if self._beside("before").exists():
            self._beside("before").replace(self.path)

    def settle(self, restore: Restore) -> None:
        self._beside("before").unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{name}")


module = types.ModuleType("tasks.components.note")
module.Component = Component  # type: ignore[attr-defined]
sys.modules[module.__name__] = module

from tasks import archive, backup, offsite, restore, runs  # noqa: E402 - after the component that the settings name
from tasks.rebuild import NOT_ARCHIVES  # noqa: E402
from workers import catalog  # noqa: E402
from workers.app import app  # noqa: E402
from workers.catalog import Run, State, Step  # noqa: E402
from workers.settings import get_settings  # noqa: E402

NEW, OLD = b"as backed up " * 5000, b"as it was before the restore"
WAL = {"wal/note/7/000000010000000000000001-aa.zst": b"segment", "wal/note/7/collections/1.json": b"{}" * 99}
FAULTS = {
    "put": ("before", "after", "full"),
    "get": ("before", "short", "broken"),
    "list": ("before", "short", "broken"),
    "stat": ("before",),
    "delete": ("before", "after"),
}
REAL: dict[str, Any] = {name: getattr(LocalStore, name) for name in FAULTS}


@dataclass
class Fault:
    """The one fault of a turn: at which call, and of which kind; and the calls that were made."""

    position: int = -1
    kind: str = ""
    calls: list[str] = field(default_factory=list)
    watching: bool = False
    """Whether calls count now: those of a stage do, those of the checks after it do not."""

    def due(self, call: str) -> str:
        if not self.watching:
            return ""
        self.calls.append(call)
        return self.kind if len(self.calls) - 1 == self.position else ""


FAULT = Fault()


def put(self: LocalStore, key: str, chunks: Any, **how: Any) -> Any:
    kind = FAULT.due(f"put {key}")
    if kind == "before":
        raise StoreUnavailable("injected before")
    if kind == "full":
        with full_disk():
            return REAL["put"](self, key, chunks, **how)
    done = REAL["put"](self, key, chunks, **how)
    if kind == "after":
        raise StoreUnavailable("injected after")
    return done


def delete_(self: LocalStore, key: str) -> None:
    kind = FAULT.due(f"delete {key}")
    if kind == "before":
        raise StoreUnavailable("injected before")
    REAL["delete"](self, key)
    if kind == "after":
        raise StoreUnavailable("injected after")


def stat(self: LocalStore, key: str) -> Any:
    if FAULT.due(f"stat {key}"):
        raise StoreUnavailable("injected before")
    return REAL["stat"](self, key)


def reading(name: str) -> Callable[..., Iterator[Any]]:
    def read(self: LocalStore, key: str, **how: Any) -> Iterator[Any]:
        kind = FAULT.due(f"{name} {key}")
        if kind == "before":
            raise StoreUnavailable("injected before")
        found = REAL[name](self, key, **how)
        if kind:
            items = list(found)
            yield from (
                (item[: len(item) // 2] for item in items[:1]) if name == "get" else items[: len(items) // 2]
            )
            if kind == "broken":
                raise StoreUnavailable("injected in the middle")
            return
        yield from found

    return read


@contextmanager
def full_disk() -> Iterator[None]:
    def write(descriptor: int, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(local, "_write_all", write):
        yield


def perform_here(run_id: str, phase: str, steps: Sequence[Step]) -> None:
    """Do the steps in this process, as workers would, and let the run go on, as the chord's body or the watchdog would."""
    for step in steps:
        done = app.tasks[step.task].apply(tuple(step.args), task_id=step.task_id)
        app.backend.forget(step.task_id)  # of a run of the turn before that had the same id
        app.backend.store_result(step.task_id, done.result, done.state)
    with suppress(StoreUnavailable):
        runs.collect.run(run_id, phase)
        return
    runs.collect.run(run_id, phase)


class World:
    """Stores, catalogue and live data, and the stages that change them."""

    def __init__(self) -> None:
        self.settings = get_settings()
        note: Any = self.settings.components["note"]
        self.live: Path = note.path
        assert self.settings.offsite
        self.stores = {name: LocalStore(self.settings.store_of(name).path) for name in ("store", "offsite")}  # type: ignore[union-attr]

    def backup(self) -> str:
        self.live.write_bytes(NEW)
        return str(backup.backup_full_system())

    def copy(self) -> str:
        return str(offsite.copy_offsite())

    def restore(self) -> str:
        self.live.write_bytes(OLD)
        return self._restore("store")

    def restore_from_offsite(self) -> str:
        self.live.write_bytes(OLD)
        return self._restore("offsite")

    def _restore(self, table: str) -> str:
        newest = catalog.list_artifacts()[0].key
        return str(restore.restore_full_system(newest, confirm=self.settings.system.name, store=table))

    def save(self) -> Any:
        with catalog.session() as session:
            rows = {
                table.name: [dict(row._mapping) for row in session.execute(select(table))]
                for table in SQLModel.metadata.sorted_tables
            }
        return rows, {name: self._files(name) for name in self.stores}

    def load(self, saved: Any) -> None:
        rows, files = saved
        with catalog.session() as session:
            for table in reversed(SQLModel.metadata.sorted_tables):
                session.execute(delete(table))
            for table in SQLModel.metadata.sorted_tables:
                if rows[table.name]:
                    session.execute(insert(table), rows[table.name])
        for name, store in self.stores.items():
            shutil.rmtree(store.root, ignore_errors=True)
            for path, content in files[name].items():
                (store.root / path).parent.mkdir(parents=True, exist_ok=True)
                (store.root / path).write_bytes(content)

    def _files(self, name: str) -> dict[str, bytes]:
        root = self.stores[name].root
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def faults(self) -> list[str]:
        """Return what contradicts an invariant now."""
        return [*self._wrong_objects(), *self._wrong_rows(), *self._wrong_data()]

    def _wrong_objects(self) -> Iterator[str]:
        for item in self.stores["offsite"].list("wal/"):
            if b"".join(self.stores["offsite"].get(item.key)) != WAL[item.key]:
                yield f"the offsite {item.key} is another than the main store's"
        for name, store in self.stores.items():
            keys = [item.key for item in store.list("") if not item.key.startswith(NOT_ARCHIVES)]
            for key in keys:
                try:
                    if key.endswith(archive.SIDECAR_SUFFIX):
                        record = archive.parse_sidecar(b"".join(store.get(key)), key)
                        if offsite._sha256(store, record.key) != record.sha256:
                            yield f"{name}: {key} describes another archive"
                    else:
                        archive.verify(store, key)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with it
                    yield f"{name}: {key} looks like a backup and is none: {error!r}"
            # A copy that broke off is gone on with, until it is there.
            copied = {copy.sha256 for copy in catalog.list_copies()}
            goes_on = (
                {row.sha256 for row in catalog.list_artifacts()} - copied if name == "offsite" else set()
            )
            left = [path.partition(".incoming-") for path in self._files(name) if ".incoming-" in path]
            yield from (f"{name}: {''.join(path)} was left" for path in left if path[2] not in goes_on)

    def _wrong_rows(self) -> Iterator[str]:
        rows: dict[str, Any] = {"store": catalog.list_artifacts(), "offsite": catalog.list_copies()}
        for name, named in rows.items():
            for row in named:
                try:
                    if offsite._sha256(self.stores[name], row.key) != row.sha256:
                        yield f"the catalogue names {row.key}, which is another in {name}"
                    archive.read_sidecar(self.stores[name], row.key)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with it
                    yield f"the catalogue names {row.key}, but in {name}: {error!r}"

    def _wrong_data(self) -> Iterator[str]:
        if self.live.read_bytes() not in (OLD, NEW):
            yield "the live data is neither what it was nor what was backed up"
        left = [path.name for path in self.live.parent.glob(f".{self.live.name}.*")]
        newest = catalog.list_runs(limit=1)
        if left and not (newest and str(newest[0].cause).startswith("settle ")):
            yield f"a restore left {', '.join(left)}"

    def unmet(self, stage: str, run: Run) -> list[str]:
        """Return what a run that says it is complete has not done."""
        newest = catalog.list_artifacts()[:1]
        if stage == "backup":
            return [] if newest and newest[0].run_id == run.id else ["there is no artifact of the run"]
        if stage == "copy":
            copies = [copy.key for copy in catalog.list_copies()]
            wal = {item.key for item in self.stores["offsite"].list("wal/")}
            missing = [artifact.key for artifact in newest if artifact.key not in copies]
            return [f"{key} has no copy" for key in [*missing, *(WAL.keys() - wal)]]
        return [] if self.live.read_bytes() == NEW else ["the data is not restored"]


def attempt(world: World, stage: str) -> tuple[str, list[str]]:
    """Do a stage; return how it ended (``complete``, or what somebody was told) and what contradicts that."""
    FAULT.watching = True
    try:
        run = catalog.get_run(getattr(world, stage)())
    except Exception as error:  # noqa: BLE001 - whatever its caller would see
        FAULT.watching = False
        return f"raised {error!r}", world.faults()
    finally:
        FAULT.watching = False
    if run.state is State.RUNNING:
        return "hangs", ["the run has not ended"]
    if run.state is State.FAILED:
        return f"failed: {run.cause}", world.faults() + ([] if run.cause else ["failed without a cause"])
    # Nobody can tell that a list was cut short; then less may be done, but nothing wrong.
    cut = FAULT.position >= 0 and FAULT.kind == "short" and FAULT.calls[FAULT.position].startswith("list ")
    return "complete", world.faults() + ([] if cut else world.unmet(stage, run))


def sweep(world: World, stage: str) -> Iterator[dict[str, Any]]:
    """Yield what came of each fault of a stage that begins as the world is now; it ends as after the stage."""
    saved = world.save()
    FAULT.calls = []
    outcome, wrong = attempt(world, stage)
    yield {"stage": stage, "call": "", "kind": "none", "outcome": outcome, "wrong": wrong}
    done, calls = world.save(), list(FAULT.calls)
    for position, call in enumerate(calls):
        for kind in FAULTS[call.split()[0]]:
            world.load(saved)
            FAULT.position, FAULT.kind, FAULT.calls = position, kind, []
            outcome, wrong = attempt(world, stage)
            FAULT.position = -1
            again, still_wrong = attempt(world, stage)
            if again != "complete":
                still_wrong.append(f"the next run: {again}")
            yield {
                "stage": stage,
                "call": call,
                "kind": kind,
                "outcome": outcome,
                "wrong": [*wrong, *(f"after the next run: {line}" for line in still_wrong)],
            }
    world.load(done)


def main() -> None:
    for name, double in {"put": put, "delete": delete_, "stat": stat}.items():
        setattr(LocalStore, name, double)
    for name in ("get", "list"):
        setattr(LocalStore, name, reading(name))
    with (
        mock.patch.object(os, "fsync"),  # durability against a power cut would only slow this down
        mock.patch.object(runs, "_send", perform_here),
        # What a message brings with it.
        mock.patch.object(Context, "argsrepr", "", create=True),
        mock.patch.object(Context, "kwargsrepr", "", create=True),
    ):
        world = World()
        world.backup()
        world.copy()
        for key, content in WAL.items():
            world.stores["store"].put(key, [content])
        for stage in ("backup", "copy", "restore", "restore_from_offsite"):
            for line in sweep(world, stage):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
