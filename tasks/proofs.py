"""The ledger as the stores hold it: each line of it is a small object in the store that it speaks of.

::

    proofs/<key of the archive, without its suffix>/<run id>-<level>.json

So the catalogue's ledger can be made anew from the stores alone, and an archive takes its proofs along when it goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from tasks import archive, sealed
from workers import catalog
from workers.catalog import Run, Verification
from workers.errors import IntegrityError, ObjectExists
from workers.settings import get_settings
from workers.storage import Store, open_store

FOLDER = "proofs/"


def enter(run: Run, *, level: str, ok: bool, details: dict[str, Any]) -> None:
    """Write a line of the ledger, about the archive that ``run`` read, to that store and to the catalogue.

    A second one of the same run and level changes nothing. Raises what the store raises: then the catalogue has the line
    only when it is bad news.
    """
    line = Verification(
        key=str(run.archive),
        store=run.store,
        level=level,
        ok=ok,
        taken=catalog.now(),
        run_id=run.id,
        details=details,
    )
    if not ok:
        catalog.add_verification(line.model_copy())
    store = open_store(get_settings().store_of(run.store))
    try:
        write_proof(store, line)
    except ObjectExists:  # by an earlier attempt: that one's time counts
        line = read_proof(store, proof_key(line), table=run.store)
    catalog.add_verification(line)


def proof_key(line: Verification) -> str:
    """Return the key of the object that holds a line of the ledger."""
    return f"{_folder(line.key)}{line.run_id}-{line.level}.json"


def write_proof(store: Store, line: Verification) -> None:
    """Write a line of the ledger to the store that it speaks of. Raises ``ObjectExists`` when it is there."""
    store.put(proof_key(line), [sealed.seal(line.model_dump(mode="json", exclude={"id", "store"}))])


def read_proof(store: Store, key: str, *, table: str = "store") -> Verification:
    """Return a line of the ledger. Raises ``IntegrityError`` when it is not what was written, ``ObjectNotFound``."""
    document = sealed.unseal(b"".join(store.get(key)), key)
    try:
        line = Verification.model_validate({**document, "store": table})
    except ValidationError as error:
        raise IntegrityError(f"the record {key} is damaged") from error
    if proof_key(line) != key:
        raise IntegrityError(f"{key} is the proof of something else: {proof_key(line)}")
    return line


def list_proofs(store: Store, key: str | None = None) -> Iterator[str]:
    """Yield the keys of the proofs of an archive, or of all."""
    prefix = FOLDER if key is None else _folder(key)
    for item in store.list(prefix):
        if key is None or "/" not in item.key.removeprefix(prefix):
            yield item.key


def drop_proofs(store: Store, key: str) -> None:
    """Delete the proofs of an archive."""
    for proof in list(list_proofs(store, key)):
        store.delete(proof)


def list_orphans(store: Store) -> list[str]:
    """Return the keys of the proofs whose archives are not in the store any more."""
    found = list(list_proofs(store))  # before the archives: what is proven meanwhile was there then
    folders = {_folder(item.key) for item in store.list("")}
    return [proof for proof in found if f"{proof.rpartition('/')[0]}/" not in folders]


def _folder(key: str) -> str:
    return f"{FOLDER}{archive.bare(key)}/"
