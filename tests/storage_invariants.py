"""What holds of two stores, their catalogue and the live data whenever no run is running, and after each that is complete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks import archive, offsite, proofs
from tasks.components.postgres_wal import collection_key
from tasks.rebuild import NOT_ARCHIVES
from tests.storage_world import COLLECTIONS, FOREIGN, KEPT_BY_HAND, NEW, OLD, WAL, World
from workers import catalog
from workers.catalog import LEVELS, Run
from workers.storage.local import LocalStore

VERIFIED: set[str] = set()
"""Digests of archives that were read and found whole."""


def wrong(world: World, *, cut: bool = False) -> list[str]:
    """Return what contradicts an invariant now; of a list that was ``cut`` short, no run can know what it lacks."""
    found = [*_wrong_rows(world), *_wrong_data(world)]
    for name, store in world.stores.items():
        found += [
            f"{name}: {line}"
            for line in (*_wrong_archives(store), *(() if cut else _wrong_wal(store)), *_left(world, name))
        ]
        for proof in proofs.list_proofs(store):
            proofs.read_proof(store, proof, table=name)
    return found


def _wrong_archives(store: LocalStore) -> Iterator[str]:
    for key in [item.key for item in store.list("") if not item.key.startswith(NOT_ARCHIVES)]:
        try:
            if key.endswith(archive.SIDECAR_SUFFIX):
                record = archive.parse_sidecar(b"".join(store.get(key)), key)
                if offsite._sha256(store, record.key) != record.sha256:
                    yield f"{key} describes another archive"
            elif key != FOREIGN and (digest := offsite._sha256(store, key)) not in VERIFIED:
                archive.verify(store, key)
                VERIFIED.add(digest)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it
            yield f"{key} looks like a backup and is none: {error!r}"


def _wrong_wal(store: LocalStore) -> Iterator[str]:
    there = {item.key for item in store.list("wal/")}
    yield from (f"{key} is not what was collected" for key in there if b"".join(store.get(key)) != WAL[key])
    for record in COLLECTIONS:
        segments = [key for key in there if record.last in key and "/collections/" not in key]
        if collection_key("note", "7", record.last) in there and not segments:
            yield f"the collection up to {record.last} speaks of WAL that is gone"


def _left(world: World, name: str) -> Iterator[str]:
    """Yield what is unfinished, but for a copy that broke off: that is gone on with, until it is there."""
    copied = {copy.sha256 for copy in catalog.list_copies()}
    goes_on = {row.sha256 for row in catalog.list_artifacts()} - copied if name == "offsite" else set()
    left = [path.partition(".incoming-") for path in world.files(name) if ".incoming-" in path]
    yield from (f"{''.join(path)} was left" for path in left if path[2] not in goes_on)


def _wrong_rows(world: World) -> Iterator[str]:
    rows: dict[str, Any] = {"store": catalog.list_artifacts(), "offsite": catalog.list_copies()}
    for name, named in rows.items():
        for row in named:
            try:
                if offsite._sha256(world.stores[name], row.key) != row.sha256:
                    yield f"the catalogue names {row.key}, which is another in {name}"
                archive.read_sidecar(world.stores[name], row.key)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it
                yield f"the catalogue names {row.key}, but in {name}: {error!r}"


def _wrong_data(world: World) -> Iterator[str]:
    if world.live.read_bytes() not in (OLD, NEW):
        yield "the live data is neither what it was nor what was backed up"
    left = [path.name for path in world.live.parent.glob(f".{world.live.name}.*")]
    newest = catalog.list_runs(limit=1)
    if left and not (newest and str(newest[0].cause).startswith("settle ")):
        yield f"a restore left {', '.join(left)}"


def unmet(world: World, stage: str, run: Run) -> list[str]:
    """Return what a run of a stage that says it is complete has not done."""
    return list(UNMET[stage](world, run))


def _backup(_world: World, run: Run) -> Iterator[str]:
    if not any(row.run_id == run.id for row in catalog.list_artifacts()):
        yield "there is no artifact of the run"


def _copy(world: World, _run: Run) -> Iterator[str]:
    copies = {copy.key for copy in catalog.list_copies()}
    yield from (f"{row.key} has no copy" for row in catalog.list_artifacts()[:1] if row.key not in copies)
    yield from (
        f"{key} has no copy"
        for key in WAL.keys() - {item.key for item in world.stores["offsite"].list("wal/")}
    )


def _restore(world: World, _run: Run) -> Iterator[str]:
    if world.live.read_bytes() != NEW:
        yield "the data is not restored"


def _verify(world: World, run: Run) -> Iterator[str]:
    proof = catalog.proofs(catalog.list_verifications())[run.store, str(run.archive)]
    if proof.level is None or LEVELS.index(proof.level) < LEVELS.index(run.options["level"]):
        yield f"it has proven {proof}"
    written = [key for key in proofs.list_proofs(world.stores[run.store]) if run.id in key]
    if len(written) != LEVELS.index(run.options["level"]) + 1:
        yield f"the store has the proofs {written}"


def _rebuild(world: World, _run: Run) -> Iterator[str]:
    rows = {row.key for row in catalog.list_artifacts()}
    if rows != _archives(world, "store") or {copy.key for copy in catalog.list_copies()} != _archives(
        world, "offsite"
    ):
        yield "the catalogue is not what the stores are"
    held = [proof for store in world.stores.values() for proof in proofs.list_proofs(store)]
    if len(catalog.list_verifications()) != len(held):
        yield "the ledger is not what the stores hold"


def _take_in(_world: World, _run: Run) -> Iterator[str]:
    if FOREIGN not in {row.key for row in catalog.list_artifacts()}:
        yield "the archive was not imported"


def _delete(world: World, _run: Run) -> Iterator[str]:
    yield from _kept(world, "store", KEPT_BY_HAND + 1)


def _prune(world: World, _run: Run) -> Iterator[str]:
    yield from _kept(world, "store", 2)
    yield from _kept(world, "offsite", 1)
    if any(world.stores["store"].list("wal/")):
        yield "WAL that nothing needs is left"


def _kept(world: World, name: str, count: int) -> Iterator[str]:
    """Yield what contradicts that a store holds so many archives, and that nobody speaks of more."""
    there = _archives(world, name)
    rows = {row.key for row in (catalog.list_artifacts() if name == "store" else catalog.list_copies())}
    if len(there) != count or rows != there or catalog.list_artifacts(deleting=True):
        yield f"{name} has {sorted(there)}, the catalogue {sorted(rows)}"
    gone = {line.key for line in catalog.list_verifications() if line.store == name} - there
    yield from (f"{name}: the ledger speaks of {key}, which is gone" for key in gone)
    yield from (f"{name}: {key} is the proof of nothing" for key in proofs.list_orphans(world.stores[name]))


def _archives(world: World, name: str) -> set[str]:
    return {item.key for item in world.stores[name].list("") if archive.is_archive(item.key)}


UNMET = {
    "backup": _backup,
    "copy": _copy,
    "restore": _restore,
    "restore_from_offsite": _restore,
    "verify": _verify,
    "rebuild": _rebuild,
    "take_in": _take_in,
    "delete": _delete,
    "prune": _prune,
}
