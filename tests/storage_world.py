"""A small system whose runs are done in this process: two local stores, a component, and all that may happen to them.

All but the way of the messages is real: the tasks, the runs' phases, leases and results in Redis, the catalogue.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal
from unittest import mock

from celery.app.task import Context
from sqlalchemy import delete, insert, select
from sqlmodel import SQLModel

from workers import streams
from workers.component import NO_OPTIONS, BaseComponent, Part, Restore, Source
from workers.errors import IntegrityError, StoreUnavailable
from workers.storage import StoredObject
from workers.storage.local import LocalStore
from workers.streams import Digest


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

    def rehearse(self, restore: Restore) -> dict[str, Any]:
        return {"bytes": sum(len(chunk) for part in restore.parts for chunk in restore.read(part))}

    def settle(self, restore: Restore) -> None:
        self._beside("before").unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{name}")


module = types.ModuleType("tasks.components.note")
module.Component = Component  # type: ignore[attr-defined]
sys.modules[module.__name__] = module

from tasks import (  # noqa: E402 - after the component that the settings name
    archive,
    backup,
    foreign,
    imports,
    offsite,
    prune,
    rebuild,
    restore,
    runs,
    verify,
)
from tasks.components.postgres_segments import HEADER, LONG_HEADER  # noqa: E402
from tasks.components.postgres_wal import Collection, collection_key, wal_key  # noqa: E402
from workers import catalog  # noqa: E402
from workers.app import app  # noqa: E402
from workers.catalog import Kind, Step  # noqa: E402
from workers.settings import get_settings  # noqa: E402

NEW, OLD = b"as backed up " * 5000, b"as it was before the restore"
STARTED = datetime(2026, 11, 22, 2, tzinfo=UTC)
SEGMENTS = ["000000010000000000000001", "000000010000000000000002"]
COLLECTIONS = [
    Collection(
        taken=STARTED,
        lsn=f"0/{number}000000",
        timeline=1,
        last=name,
        marked=STARTED,
        segment_size=16 << 20,
        snapshot="1:1:",
    )
    for number, name in enumerate(SEGMENTS, 2)
]
PAGE = HEADER.pack(0xD118, LONG_HEADER, 1, 0, 0, 7, 16 << 20, 8192)
WAL = {
    wal_key("note", "7", name, hashlib.sha256(PAGE).hexdigest()): b"".join(streams.compress([PAGE], level=1))
    for name in SEGMENTS
} | {collection_key("note", "7", record.last): record.model_dump_json().encode() for record in COLLECTIONS}
FOREIGN = "files/files_backup_20250930_020000.tar.gz"
KEPT_BY_HAND = 2
"""Archives of the system that are left of its three when one was deleted."""


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


@contextmanager
def in_this_process() -> Iterator[None]:
    """Let runs be done here, and foreign archives be recognised without a look at what they hold."""
    with (
        mock.patch.object(runs, "_send", perform_here),
        mock.patch.object(foreign, "recognise", recognise),
        # What a message brings with it.
        mock.patch.object(Context, "argsrepr", "", create=True),
        mock.patch.object(Context, "kwargsrepr", "", create=True),
    ):
        yield


def recognise(store: LocalStore, item: StoredObject, _components: Sequence[str]) -> archive.Archive:
    """Read a foreign archive to its end; of what it holds, which `tests/integration/test_imports.py` tests, say nothing."""
    digest, key = Digest(), item.key
    for _ in digest.through(store.get(key)):
        pass
    run = archive.RunRecord(id="20250930_020000", job=foreign.JOB, started=STARTED, finished=STARTED)
    metadata = archive.Metadata(
        backup_time=STARTED, system_version="1", components={}, system_name="shop", run=run, parts=()
    )
    if digest.size != len(NEW):
        raise IntegrityError("it was cut short")
    return archive.Archive(key=key, size=digest.size, sha256=digest.sha256, metadata=metadata)


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

    def verify(self) -> str:
        return str(verify.verify_archive(self._newest(), level="restore"))

    def rebuild(self) -> str:
        """Rebuild a catalogue that was lost, but for its runs."""
        for artifact in catalog.list_artifacts():
            catalog.drop_artifact(artifact.key)
            catalog.drop_verifications(artifact.key, "store")
            catalog.drop_verifications(artifact.key, "offsite")
            catalog.drop_copy(artifact.key)
        return str(rebuild.rebuild())

    def take_in(self) -> str:
        return str(imports.import_archives("files/"))

    def delete(self) -> str:
        """Delete the oldest archive; when that is done already, say so."""
        begun = catalog.list_artifacts(deleting=True)
        there = [row for row in catalog.list_artifacts() if row.job != "import"]
        if len(there) == KEPT_BY_HAND and not begun:
            return next(run.id for run in catalog.list_runs(kind=Kind.PRUNE))
        name = (begun or there)[-1].key
        return str(prune.delete(name, confirm=name))

    def prune(self) -> str:
        return str(prune.prune())

    def _newest(self) -> str:
        return next(row.key for row in catalog.list_artifacts() if row.job != "import")

    def _restore(self, table: str) -> str:
        return str(
            restore.restore_full_system(self._newest(), confirm=self.settings.system.name, store=table)
        )

    def save(self) -> Any:
        with catalog.session() as session:
            rows = {
                table.name: [dict(row._mapping) for row in session.execute(select(table))]
                for table in SQLModel.metadata.sorted_tables
            }
        return rows, {name: self.files(name) for name in self.stores}

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

    def files(self, name: str) -> dict[str, bytes]:
        root = self.stores[name].root
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
