"""The archive: a tar.gz of the parts with their metadata.json, backup.log and RESTORE.md; and reading it back."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from celery import Task

from tasks import handbook, sealed
from tasks.step import perform
from tasks.tar_members import tar_members
from workers import catalog, streams
from workers.app import app
from workers.catalog import Artifact, Run, Step
from workers.component import Part
from workers.encryption import SUFFIX as ENCRYPTED
from workers.encryption import decrypt, encrypt
from workers.errors import IntegrityError, ObjectExists, ObjectNotFound
from workers.locks import Lease
from workers.progress import Progress
from workers.secret import Strict
from workers.settings import Settings, get_settings
from workers.storage import Store, open_store
from workers.streams import Digest

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Of version 1 are archives without encryption."""
SUFFIX = ".tar.gz"
SIDECAR_SUFFIX = ".metadata.json"
SMALLEST = 1000
"""Bytes that an archive has at least, as the runbook demands."""
FOLDERS = ("full_system/", "components/")
LATEST = "latest"
"""Means the newest full archive of a store."""
"""Prefixes of the keys of the archives that this system makes."""


class RunRecord(Strict):
    """The run in metadata.json; times are UTC."""

    id: str
    job: str
    started: datetime
    finished: datetime


class Metadata(Strict):
    """An archive's metadata.json. The first three keys are the runbook's; docs/metadata.schema.json describes all."""

    backup_time: datetime
    system_version: str
    components: dict[str, str]
    """``"N files"`` for each of the runbook's component names."""
    format_version: int = FORMAT_VERSION
    system_name: str
    run: RunRecord
    parts: tuple[Part, ...]


class Archive(Strict):
    """What the store holds beside an archive, committed after it: its metadata, size and digest.

    It stays readable where the archive is encrypted: it names and counts what is in it.
    """

    key: str
    size: int
    sha256: str
    metadata: Metadata


@app.task(bind=True, name="tasks.archive.assemble")
def assemble(self: Task[Any, Any], run_id: str) -> dict[str, Any]:
    """Put the parts of a run into its archive, commit that and its metadata, and return the artifact's record."""
    from tasks.config_changes import record_changes

    def work(lease: Lease) -> dict[str, Any]:
        progress, steps = Progress(self, "archive"), catalog.steps_of(run_id, "backup")
        record_changes(run_id, steps)
        with progress.reporting():
            archive = write_archive(catalog.get_run(run_id), steps, lease, progress)
        return {"artifact": artifact_of(archive).model_dump(mode="json")}

    return perform(self, f"run-{run_id}", work)


def artifact_of(archive: Archive) -> Artifact:
    """Return the catalogue's row for an archive; the stores alone suffice to make it."""
    metadata = archive.metadata
    return Artifact(
        key=archive.key,
        run_id=metadata.run.id,
        job=metadata.run.job,
        created=metadata.backup_time,
        size=archive.size,
        sha256=archive.sha256,
        details=metadata.model_dump(mode="json"),
    )


def write_archive(run: Run, steps: Sequence[Step], lease: Lease, progress: Progress) -> Archive:
    """Stream a run's parts into its archive and commit it, then its metadata; an archive already there is taken in.

    Raises ``IntegrityError`` when a part is not what its component recorded.
    """
    settings = get_settings()
    store = open_store(settings.store)
    recipients = settings.encryption.recipients
    key = archive_key(run, settings)
    try:
        return read_sidecar(store, key)
    except ObjectNotFound:
        pass  # the usual case: no earlier attempt came this far
    parts = [Part.model_validate(part) for step in steps for part in (step.result or {})["parts"]]
    metadata = _metadata(run, parts, settings)
    item = progress.add(PurePosixPath(key).name, sum(part.size for part in parts))
    digest = Digest()

    def chunks() -> Iterator[bytes]:
        yield from _tar(run.id, _members(store, run, steps, metadata, settings))
        lease.check()

    try:
        compressed = streams.compress_gzip(item.through(chunks()))
        store.put(key, digest.through(encrypt(compressed, recipients) if recipients else compressed))
    except ObjectExists:  # an earlier attempt ended between the archive and its metadata
        digest = Digest()  # what this attempt was about to store has passed the other one, or a piece of it
        for _ in digest.through(store.get(key)):
            pass
        if not recipients or settings.encryption.private_keys():
            metadata = verify(store, key)
    archive = Archive(key=key, size=digest.size, sha256=digest.sha256, metadata=metadata)
    try:
        write_sidecar(store, archive)
    except ObjectExists:  # written by somebody else in the meantime
        return read_sidecar(store, key)
    return archive


def archive_key(run: Run, settings: Settings) -> str:
    """Return the store key of a run's archive; its file name is a promise to users."""
    suffix = SUFFIX + (ENCRYPTED if settings.encryption.recipients else "")
    if set(run.components) == set(settings.components) and not run.options:
        return f"full_system/full_backup_{run.id}{suffix}"
    return f"components/{'+'.join(run.components)}_backup_{run.id}{suffix}"


def require_size(key: str, size: int) -> None:
    """Raise ``IntegrityError`` for an object of fewer bytes than an archive has at least."""
    if size < SMALLEST:
        raise IntegrityError(f"{key} has {size} bytes, an archive has at least {SMALLEST}")


def is_archive(key: str) -> bool:
    """Say whether a store key is that of an archive, by its name."""
    return key.removesuffix(ENCRYPTED).endswith(SUFFIX)


def is_ours(key: str) -> bool:
    """Say whether a store key is where this system puts an archive; what others left in a folder further down is none."""
    return key.startswith(FOLDERS) and key.count("/") == 1 and is_archive(key)


def is_full(key: str) -> bool:
    """Say whether a store key is that of an archive of the whole system, by its name."""
    return is_ours(key) and key.startswith(FOLDERS[0])


def bare(name: str) -> str:
    """Return the key or file name of an archive without what its form adds to it."""
    return name.removesuffix(ENCRYPTED).removesuffix(SUFFIX)


def means(name: str, key: str) -> bool:
    """Say whether ``name`` is that of the archive ``key``: the key, its file name, or either without its suffix."""
    return bare(name) in (bare(key), PurePosixPath(bare(key)).name)


def sidecar_key(key: str) -> str:
    """Return the key of the metadata that is committed after the archive ``key``."""
    return bare(key) + SIDECAR_SUFFIX


def read_sidecar(store: Store, key: str) -> Archive:
    """Return the record of a committed archive.

    Raises ``ObjectNotFound`` when it has none, ``IntegrityError`` when it is not what was written.
    """
    return parse_sidecar(b"".join(store.get(sidecar_key(key))), sidecar_key(key))


def parse_sidecar(text: bytes, key: str) -> Archive:
    """Return the record that lies under ``key``. Raises ``IntegrityError`` when it is not what was written."""
    document = sealed.unseal(text, key, unsealed=True)  # the first version sealed nothing
    try:
        return Archive.model_validate_json(json.dumps(document))
    except ValueError as error:
        raise IntegrityError(f"the record {key} is damaged") from error


def write_sidecar(store: Store, archive: Archive) -> None:
    """Write the record of an archive beside it. Raises ``ObjectExists`` when it has one."""
    store.put(sidecar_key(archive.key), [sealed.seal(archive.model_dump(mode="json"))])


def resolve(store: Store, name: str) -> str:
    """Return the key of the archive that ``name`` means: a key, a file name, either without its suffix, or `LATEST`.

    Raises ``ObjectNotFound`` naming the newest archives there are.
    """
    keys = [item.key for prefix in FOLDERS for item in store.list(prefix) if is_ours(item.key)]
    keys.sort(key=lambda key: bare(key)[-15:])
    for key in reversed(keys):
        if means(name, key) or (name == LATEST and is_full(key)):
            return key
    with suppress(ObjectNotFound, IntegrityError, ValueError):
        return read_sidecar(store, name).key  # one of the runbook's, which lies anywhere
    newest = ", ".join(PurePosixPath(key).name for key in keys[-3:]) or "none"
    raise ObjectNotFound(f"there is no archive {name}; the newest are: {newest}")


def read_members(store: Store, key: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the file name and the bytes of each member of an archive, in order; read each before the next.

    Raises ``IntegrityError`` for an archive that is damaged or cut short, or that holds anything but files of
    different names in one folder.
    """
    plain = streams.decompress(_opened(store.get(key), key), codec="gzip", name=key)
    with closing(plain):
        yield from tar_members(plain, key)


def read_metadata(store: Store, key: str) -> Metadata:
    """Return the metadata of an archive: by its record, or where that is lost or damaged the metadata.json inside."""
    try:
        return read_sidecar(store, key).metadata
    except (ObjectNotFound, IntegrityError):
        return _read_metadata_inside(store, key)


def _read_metadata_inside(store: Store, key: str) -> Metadata:
    for name, chunks in read_members(store, key):
        if name == "metadata.json":
            return parse_metadata(b"".join(chunks), key)
    raise IntegrityError(f"{key} holds no metadata.json")


def parse_metadata(text: bytes, key: str) -> Metadata:
    """Return the metadata. Raises ``IntegrityError`` when it is of a later format, or is not metadata."""
    try:
        version = json.loads(text).get("format_version")
        if version not in READABLE_VERSIONS:
            raise IntegrityError(
                f"{key} has format version {version}; this version reads {', '.join(map(str, READABLE_VERSIONS))}"
            )
        return Metadata.model_validate_json(text)
    except (ValueError, AttributeError) as error:
        raise IntegrityError(f"the metadata.json of {key} is damaged") from error


def read_part(store: Store, key: str, part: Part) -> Iterator[bytes]:
    """Yield the plain bytes of one part of an archive.

    Raises ``IntegrityError``, after the last byte at the latest, when they are not what was recorded.
    """
    for _, chunks in read_parts(store, key, [part]):
        yield from chunks


def read_parts(store: Store, key: str, parts: Sequence[Part]) -> Iterator[tuple[Part, Iterator[bytes]]]:
    """Yield parts of an archive, each with its plain bytes, in the order in which they lie there; read each before the next.

    Raises ``IntegrityError`` like `read_part`, and in the end when one of ``parts`` is not there.
    """
    from tasks import foreign

    if foreign.record_of(store, key):
        yield from foreign.read_parts(store, key, parts)
        return
    wanted = {part.name: part for part in parts}
    for name, chunks in read_members(store, key):
        if part := wanted.pop(name, None):
            yield part, plain_chunks(part, chunks, key)
        if not wanted:
            return
    raise IntegrityError(f"{key} lacks {', '.join(wanted)}")


def plain_chunks(part: Part, chunks: Iterable[bytes], key: str) -> Iterator[bytes]:
    """Yield the plain bytes of a part whose stored ``chunks`` are read from the archive ``key``; see `streams.read`."""
    yield from streams.read(
        chunks,
        codec=part.codec,
        written=part.written,
        name=f"{part.name} in {key}",
        encrypted=part.encryption is not None,
        private_keys=get_settings().encryption.private_keys() if part.encryption else (),
    )


def _opened(chunks: Iterable[bytes], key: str) -> Iterable[bytes]:
    if not key.endswith(ENCRYPTED):
        return chunks
    return decrypt(chunks, get_settings().encryption.private_keys(), name=key)


def verify(store: Store, key: str, *, progress: Progress | None = None) -> Metadata:
    """Read an archive to its last byte and return its metadata.

    Every part that the metadata names must be there once, with the recorded size and digest on both sides, and
    nothing else; the record beside the archive, where there is one, must say the same. Raises ``IntegrityError``
    otherwise, ``Permanent`` where it is encrypted and no private key is here.
    """
    from tasks import foreign

    if record := foreign.record_of(store, key):
        return foreign.verify(store, record)
    metadata: Metadata | None = None
    missing: dict[str, Part] = {}
    item = progress.add(PurePosixPath(key).name, store.stat(key).size) if progress else None
    for name, chunks in read_members(store, key):
        if name == "metadata.json":
            metadata = parse_metadata(b"".join(chunks), key)
            missing = {part.name: part for part in metadata.parts}
        elif part := missing.pop(name, None):
            stored = item.through(chunks) if item else chunks
            for _ in plain_chunks(part, stored, key):
                pass
        elif name not in (handbook.FILE_NAME, "backup.log"):
            raise IntegrityError(f"{key} holds {name}, which its metadata does not name")
    if metadata is None:
        raise IntegrityError(f"{key} holds no metadata.json")
    if missing:
        raise IntegrityError(f"{key} lacks {', '.join(missing)}")
    with suppress(ObjectNotFound):
        if read_sidecar(store, key).metadata != metadata:
            raise IntegrityError(f"the record of {key} does not describe what the archive holds")
    return metadata


def _members(
    store: Store, run: Run, steps: Sequence[Step], metadata: Metadata, settings: Settings
) -> Iterator[tuple[str, int, Iterable[bytes]]]:
    """Yield the name, size and bytes of each member, the small ones first so that they are quick to reach."""
    texts = {
        "metadata.json": metadata.model_dump_json(indent=2),
        handbook.FILE_NAME: handbook.restore_by_hand(metadata, settings),
        "backup.log": handbook.backup_log(run, steps, metadata),
    }
    for name, text in texts.items():
        yield name, len(text.encode()), [text.encode()]
    for part in metadata.parts:
        yield part.name, part.size, _checked(store.get(f"parts/{run.id}/{part.name}"), part)


def _checked(chunks: Iterable[bytes], part: Part) -> Iterator[bytes]:
    digest = Digest()
    yield from digest.through(chunks)
    if (digest.size, digest.sha256) != (part.size, part.sha256):
        raise IntegrityError(
            f"the stored part {part.name} is not what {part.component} recorded when it wrote it"
        )


def _tar(folder: str, members: Iterable[tuple[str, int, Iterable[bytes]]]) -> Iterator[bytes]:
    for name, size, chunks in members:
        header = tarfile.TarInfo(f"{folder}/{name}")
        header.size, header.mode = size, 0o600
        header.mtime = int(datetime.strptime(f"{folder}+0000", f"{catalog.RUN_ID_FORMAT}%z").timestamp())
        yield header.tobuf(tarfile.PAX_FORMAT)
        yield from chunks
        yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _metadata(run: Run, parts: Sequence[Part], settings: Settings) -> Metadata:
    counts = {component.metadata_key: 0 for component in settings.components.values()}
    for part in parts:
        counts[settings.components[part.component].metadata_key] += 1
    return Metadata(
        backup_time=run.started,
        system_version=settings.system.version,
        components={key: f"{count} files" for key, count in counts.items()},
        system_name=settings.system.name,
        run=RunRecord(
            id=run.id, job=run.job, started=run.started, finished=max(part.finished for part in parts)
        ),
        parts=tuple(parts),
    )
