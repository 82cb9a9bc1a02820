"""One collection of WAL: what the server archived goes into the store, is checked on the way, and then leaves the folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tasks.components.postgres import Component
from tasks.components.postgres_archiving import Archiver, Cluster, WalArchive, close_segment, slot_troubles
from tasks.components.postgres_segments import SEGMENT
from tasks.components.postgres_wal import (
    Collection,
    collection_key,
    list_wal,
    newest_collection,
    read_collection,
    wal_key,
)
from workers import streams
from workers.errors import ObjectExists, ObjectNotFound, Permanent
from workers.locks import Lease
from workers.progress import Item
from workers.runtime import sweep
from workers.settings import get_settings
from workers.storage import Store, open_store

FILES_A_BATCH = 32
PAUSE_SECONDS = 0.3


@dataclass
class Stored:
    """What a collection has put into the store so far, beside what was there."""

    digests: dict[str, str]
    """Of everything that is there, by name."""
    files: int = 0
    size: int = 0


def collect(run_id: str, component: Component, lease: Lease, item: Item) -> dict[str, Any]:
    """Store what is new of a component's WAL, and return the record of the collection and what went wrong on the way.

    ``item`` counts the bytes. An attempt that finished before is not repeated. Files leave the server's folder only after they are committed.
    Raises ``Permanent`` when the server archives nothing, or a file differs from what is stored under its name;
    ``IntegrityError`` for a file that is not what its name says. What came before it is in the store then.
    """
    store = open_store(get_settings().store)
    server = component.wal_server()
    sweep(server.runtime, component.wal_name)
    archive = WalArchive(server.runtime, str(component.wal_archive))
    with server.session(component.maintenance_database) as session:
        cluster = Cluster.of(session)
        key = collection_key(component.name, cluster.system_identifier, run_id)
        previous = newest_collection(store, component.name, cluster.system_identifier)
        files = list_wal(store, component.name, cluster.system_identifier).files
        stored = Stored({name: file.sha256 for name, file in files.items()})
        try:
            record = read_collection(store, key)
        except ObjectNotFound:
            record = close_segment(session, cluster, previous)
            transfer = Transfer(store, component, archive, cluster, stored, lease, item)
            if not transfer.until(record.last, previous):
                why = Archiver.of(session).trouble(None) or "archive_command has not failed; is it set?"
                raise Permanent(
                    f"{component.name}: {record.last} is not in {component.wal_archive} after "
                    f"{component.wal_timeout:g} s: {why}; see: ai-micro-backup preflight {component.name}"
                ) from None
            store.put(key, _record(record, lease))
        trouble = Archiver.of(session).trouble(previous.taken if previous else None)
        troubles = [trouble] if trouble else []
        slot = None
        if component.wal_slot:
            slot, found = slot_troubles(session, component.wal_slot)
            troubles += found
    return {
        "system_identifier": cluster.system_identifier,
        "files": stored.files,
        "size": stored.size,
        "collection": record.model_dump(mode="json"),
        "troubles": troubles,
        "slot": slot,
    }


def _record(record: Collection, lease: Lease) -> Iterator[bytes]:
    """Yield a record's bytes, and raise instead of ending when the lease is lost."""
    yield record.model_dump_json().encode()
    lease.check()


@dataclass(frozen=True)
class Transfer:
    """The way of files from the server's folder into the store."""

    store: Store
    component: Component
    archive: WalArchive
    cluster: Cluster
    stored: Stored
    lease: Lease
    item: Item

    def until(self, last: str, previous: Collection | None) -> bool:
        """Store what there is until ``last`` is in the store; ``False`` when the server has not archived it in time."""
        deadline = time.monotonic() + self.component.wal_timeout
        while True:
            finished = self._all()
            if finished and (last in self.stored.digests or (previous is not None and previous.last == last)):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_SECONDS)

    def _all(self) -> bool:
        """Store what there is, in order; ``False`` when a segment is still being written."""
        sizes = self.archive.sizes()
        whole = list(itertools.takewhile(lambda name: self._is_whole(name, sizes), sizes))
        for start in range(0, len(whole), FILES_A_BATCH):
            self._batch(whole[start : start + FILES_A_BATCH])
        return len(whole) == len(sizes)

    def _is_whole(self, name: str, sizes: Mapping[str, int]) -> bool:
        return not SEGMENT.fullmatch(name) or sizes[name] == self.cluster.segment_size

    def _batch(self, names: Sequence[str]) -> None:
        digests = self.archive.digests(names)
        good = list(
            itertools.takewhile(lambda name: self.stored.digests.get(name) in (None, digests[name]), names)
        )
        new = [name for name in good if name not in self.stored.digests]
        with ThreadPoolExecutor(get_settings().limits.streams, thread_name_prefix="wal") as pool:
            jobs = {name: pool.submit(self._store, name, digests[name]) for name in new}
            try:
                wait(jobs.values())
            except BaseException:
                sweep(self.archive.runtime, self.component.wal_name)  # what the threads read from must end
                raise
        failures = [error for job in jobs.values() if (error := job.exception())]
        self.archive.remove([name for name in good if name not in jobs or not jobs[name].exception()])
        if failures:
            raise failures[0]
        if len(good) < len(names):
            name = names[len(good)]
            raise Permanent(
                f"{self.component.name}: {self.archive.folder}/{name} is not what is stored under this name (SHA-256 "
                f"{digests[name]}, stored is {self.stored.digests[name]}). Nothing was overwritten. Two servers archive "
                "into this folder, or the server was put back without a recovery"
            )

    def _store(self, name: str, sha256: str) -> None:
        settings = get_settings()
        # Histories say how timelines hang together, and no more: gaps are found where no private key is.
        recipients = settings.encryption.recipients if SEGMENT.fullmatch(name) else ()
        place = (self.component.name, self.cluster.system_identifier)
        key = wal_key(*place, name, sha256, encrypted=bool(recipients))
        chunks = self._counted(name, sha256)
        try:
            written = streams.write(
                self.store, key, chunks, level=settings.compression_level, recipients=recipients
            )
            self.stored.size += written.size
        except ObjectExists:
            pass  # its key says that it is the same
        self.stored.digests[name] = sha256
        self.stored.files += 1

    def _counted(self, name: str, sha256: str) -> Iterator[bytes]:
        for chunk in self.archive.read(name, sha256, self.cluster):
            self.item.done += len(chunk)
            yield chunk
        self.lease.check()  # raised before the end of the stream, so that the store does not commit it
