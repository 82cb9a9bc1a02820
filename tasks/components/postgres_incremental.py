"""Incremental base backups (PostgreSQL 17 and later): only the blocks that changed since another base backup, the parent.

To make one, the server wants the parent's manifest, but a host cannot read an archive that is encrypted. So the names and sizes of
each base backup's files, without their digests, lie with the cluster's WAL as a manifest that PostgreSQL takes:

::

    wal/<component>/<system identifier>/manifests/<sha256 of the whole manifest>.json.zst
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tasks.components.postgres_wal import folder
from workers import streams
from workers.catalog import Artifact
from workers.errors import IntegrityError, ObjectExists, ObjectNotFound, Permanent
from workers.secret import Strict
from workers.storage import Store

MAJOR = 17
"""The first version of PostgreSQL that makes incremental base backups."""
LONGEST_CHAIN = 30
"""Base backups that a recovery reads one after another at the most; the next one is a full one."""
KEPT = ("Path", "Encoded-Path", "Size", "Last-Modified")
"""What is kept of each file of a manifest. The server compares names and sizes ("UPLOAD_MANIFEST" in its manual)."""


class Parent(Strict):
    """The base backup that an incremental one is based on."""

    needs: tuple[str, ...]
    """Keys of the archives that a recovery reads before the new one: a full base backup, then increments, the parent last."""
    system_identifier: str
    timeline: int
    manifest_sha256: str


def newest_parent(component: str, kind: str, artifacts: Iterable[Artifact]) -> Parent | None:
    """Return the newest base backup of a component that an incremental one can be based on, ``None`` when there is none.

    ``kind`` is that of the parts that are base backups. All the archives that the parent needs must be among ``artifacts``.
    """
    artifacts = list(artifacts)
    there = {artifact.key for artifact in artifacts}
    found = [
        (part["holds"], artifact.key)
        for artifact in artifacts
        for part in artifact.details["parts"]
        if part["component"] == component and part["kind"] == kind and "manifest_sha256" in part["holds"]
    ]
    for holds, key in sorted(found, key=lambda item: str(item[0]["finished"]), reverse=True):
        needs = (*holds.get("needs", ()), key)
        if there.issuperset(needs) and len(needs) < LONGEST_CHAIN:
            return Parent(
                needs=needs,
                system_identifier=str(holds["system_identifier"]),
                timeline=int(holds["timeline"]),
                manifest_sha256=holds["manifest_sha256"],
            )
    return None


def require_incremental(place: str, major: int, facts: Mapping[str, Any]) -> None:
    """Raise ``Permanent`` when a server cannot make incremental base backups, with what to change."""
    if major < MAJOR:
        raise Permanent(
            f"{place}: incremental base backups need PostgreSQL {MAJOR} or later, and this is {major}; ask for base full"
        )
    if facts["summarize_wal"] != "on":
        raise Permanent(
            f"{place}: incremental base backups need summarize_wal, which is off; see what preflight says"
        )


def manifest_of(
    parent: Parent | None, component: str, facts: Mapping[str, Any], store: Store
) -> tuple[bytes, str]:
    """Return the parent's manifest, and as the second an empty text; without a manifest, why a full base backup is due."""
    if parent is None:
        return b"", "there is no base backup that it could be based on"
    if parent.system_identifier != facts["system_identifier"]:
        return b"", "the newest base backup is of another cluster"
    if parent.timeline != facts["timeline_id"]:
        return b"", f"the newest base backup is of timeline {parent.timeline}"
    try:
        return read_manifest(store, component, parent.system_identifier, parent.manifest_sha256), ""
    except (ObjectNotFound, IntegrityError) as error:
        return b"", f"the manifest of the newest base backup is of no use: {error}"


def manifest_key(component: str, system_identifier: str, sha256: str) -> str:
    """Return the key of what is kept of the manifest with this digest."""
    return f"{manifests(component, system_identifier)}{sha256}.json.zst"


def manifests(component: str, system_identifier: str) -> str:
    """Return the prefix of the keys of a cluster's manifests."""
    return f"{folder(component, system_identifier)}manifests/"


def keep_manifest(store: Store, component: str, system_identifier: str, text: bytes) -> None:
    """Store what an incremental base backup will need of a manifest, unless it is there."""
    key = manifest_key(component, system_identifier, hashlib.sha256(text).hexdigest())
    try:
        streams.write(store, key, iter([names_and_sizes(text)]), level=3)
    except ObjectExists:
        return


def read_manifest(store: Store, component: str, system_identifier: str, sha256: str) -> bytes:
    """Return what is kept of a manifest. Raises ``ObjectNotFound``, or ``IntegrityError`` when it is damaged."""
    key = manifest_key(component, system_identifier, sha256)
    text = b"".join(streams.decompress(store.get(key), codec="zstd", name=key))
    body, _, rest = text.rpartition(CHECKSUM)
    if rest != hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise IntegrityError(f"{key} does not have the digest that it says")
    return text


CHECKSUM = b'"Manifest-Checksum": "'


def names_and_sizes(text: bytes) -> bytes:
    """Return a manifest, with its own checksum at the end of it, that says of each file only its name, size and time."""
    manifest = json.loads(text)
    manifest.pop("Manifest-Checksum")
    manifest["Files"] = [{key: file[key] for key in KEPT if key in file} for file in manifest["Files"]]
    body = json.dumps(manifest)[:-1].encode() + b",\n"
    return body + CHECKSUM + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unneeded_manifests(
    store: Store, component: str, system_identifier: str, kept: Iterable[str]
) -> Iterator[str]:
    """Yield the keys of the manifests of a cluster but those with a digest in ``kept``."""
    wanted = {manifest_key(component, system_identifier, sha256) for sha256 in kept}
    for item in store.list(manifests(component, system_identifier)):
        if item.key not in wanted:
            yield item.key
