"""The archive: opened by public tools, read back whole, refused when anything in it is not as recorded."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, cast

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyrage import x25519

from tasks import archive, sealed
from tests.metadata_schema import metadata_schema
from workers import streams
from workers.catalog import Kind, Run, Step
from workers.component import DECRYPT, NO_OPTIONS, BaseComponent, Part, Restore, Source, plain_command
from workers.errors import IntegrityError, LeaseLost, ObjectExists, ObjectNotFound, Permanent
from workers.locks import Lease
from workers.progress import Item, Progress
from workers.secret import Secret
from workers.sections import EncryptionSettings, LocalStoreSettings, SystemSettings
from workers.settings import Settings
from workers.storage.local import LocalStore

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs/metadata.schema.json"
STARTED = datetime(2026, 11, 22, 2, 0, 0, tzinfo=UTC)
RUN_ID = "20261122_020000"
FULL = f"full_system/full_backup_{RUN_ID}.tar.gz"
PLAIN = {
    "db": [b"dump of authdb " * 2000, b"", bytes(range(256)) * 40],
    "docs": [b"one tree " * 999],
    "rules": ["設定 'ä'".encode()],
}


class Stand(BaseComponent):
    """A component that is only written down in archives here."""

    kind: Literal["stand"] = "stand"
    metadata_key: ClassVar[str] = "files"

    def by_hand(self, parts: Sequence[Part]) -> str:
        return f"Restore {self.name} from {', '.join(part.name for part in parts)}."

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        raise NotImplementedError

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        raise NotImplementedError

    def stage(self, restore: Restore) -> None:
        raise NotImplementedError

    def swap(self, restore: Restore) -> None:
        raise NotImplementedError

    def revert(self, restore: Restore) -> None:
        raise NotImplementedError

    def settle(self, restore: Restore) -> None:
        raise NotImplementedError


class Database(Stand):
    metadata_key: ClassVar[str] = "postgresql"


class Rules(Stand):
    metadata_key: ClassVar[str] = "config"


@dataclass
class Holding:
    """A lease, as far as an archive looks at it."""

    then: Any = lambda: None
    checks: int = 0

    def check(self) -> None:
        self.checks += 1
        self.then()


@dataclass
class Counting:
    """Progress that nobody sees."""

    items: list[Item] = field(default_factory=list)

    def add(self, label: str, expected: int | None) -> Item:
        self.items.append(Item(label, expected))
        return self.items[-1]


class World:
    """A store with the parts of one run, and what is needed to make an archive of them."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder / "store")
        self.settings = Settings(
            system=SystemSettings(name="shop", version="2.1"),
            hosts=("db1", "app1"),
            components={
                "db": Database(name="db", host="db1"),
                "docs": Stand(name="docs", host="app1"),
                "rules": Rules(name="rules", host="app1"),
            },
            store=LocalStoreSettings(path=folder / "store"),
        )
        self.run = Run(
            id=RUN_ID,
            kind=Kind.BACKUP,
            job="full_system",
            components=list(PLAIN),
            started=STARTED,
            outcome={},
        )
        self.steps = [self._step(name, contents) for name, contents in PLAIN.items()]
        self.parts = [
            Part.model_validate(part) for step in self.steps for part in (step.result or {})["parts"]
        ]

    def _step(self, name: str, contents: Sequence[bytes]) -> Step:
        host = self.settings.components[name].host
        parts = []
        for number, content in enumerate(contents):
            recipients = self.settings.encryption.recipients
            codec = "gzip" if name == "rules" else "zstd"  # as plain SQL is
            suffix = {"gzip": ".gz", "zstd": ".zst"}[codec] + (".age" if recipients else "")
            file = f"{name}.{number}%20é.bin{suffix}".replace("é", "%C3%A9")
            record = streams.write(
                self.store,
                f"parts/{self.run.id}/{file}",
                iter([content]),
                level=3,
                recipients=recipients,
                codec=codec,
            )
            began = STARTED + timedelta(seconds=number)
            part = Part(
                name=file, component=name, host=host, kind="stand", codec=codec, started=began,
                encryption="age" if recipients else None,
                finished=began + timedelta(seconds=5), holds={"keys": number, "warnings": ["it grew"] * number},
                **vars(record),
            )  # fmt: skip
            parts.append(part.model_dump(mode="json"))
        return Step(
            run_id=RUN_ID, phase="backup", name=name, task="t", args=[], queue=f"host.{host}", lease=name, task_id=name,
            sent=STARTED, last_seen=STARTED, result={"ok": True, "parts": parts}, attempt=2 if name == "db" else 1,
        )  # fmt: skip

    def write(self, *, lease: Holding | None = None, progress: Counting | None = None) -> archive.Archive:
        return archive.write_archive(
            self.run, self.steps, cast("Lease", lease or Holding()), cast("Progress", progress or Counting())
        )

    def stored(self, key: str = FULL) -> bytes:
        return b"".join(self.store.get(key))

    def replace(self, content: bytes, key: str = FULL) -> None:
        self.store.delete(key)
        self.store.put(key, [content])

    def keys(self) -> list[str]:
        return [item.key for item in self.store.list("") if not item.key.startswith("parts/")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(archive, "get_settings", lambda: world.settings)
    return world


@pytest.fixture
def written(world: World) -> World:
    world.write()
    return world


def unpack(world: World, folder: Path) -> Path:
    """Open the archive as its reader does, and return the one folder in it."""
    folder.mkdir()
    subprocess.run(["tar", "-xzf", world.store.root / FULL], cwd=folder, check=True)
    assert [path.name for path in folder.iterdir()] == [RUN_ID]
    return folder / RUN_ID


def test_tar_opens_it_into_one_folder_with_all_its_parts(written: World, tmp_path: Path) -> None:
    folder = unpack(written, tmp_path / "by hand")

    names = {path.name for path in folder.iterdir()}
    assert names == {"metadata.json", "RESTORE.md", "backup.log", *(part.name for part in written.parts)}
    for part in written.parts:
        assert (folder / part.name).read_bytes() == written.stored(f"parts/{RUN_ID}/{part.name}")
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert path.stat().st_mtime == STARTED.timestamp()


def test_the_check_that_restore_md_tells_to_run_passes_and_sees_damage(
    written: World, tmp_path: Path
) -> None:
    text = (unpack(written, tmp_path / "by hand") / "RESTORE.md").read_text()
    (script,) = re.findall(r"```sh\n(tar .*?)```", text, re.DOTALL)
    script = script.replace("<archive>", str(written.store.root / FULL.removesuffix(".tar.gz")))
    folder = tmp_path / "check"
    folder.mkdir()

    def check(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-ec", script], cwd=folder, capture_output=True, text=True, check=False)

    done = check(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{part.name}: OK" for part in written.parts]

    with (folder / RUN_ID / written.parts[0].name).open("r+b") as file:
        file.write(b"x")
    assert check(script.replace("tar -xzf", "true")).returncode != 0


def test_metadata_keeps_the_runbooks_keys_and_says_all_of_each_part(written: World, tmp_path: Path) -> None:
    found = json.loads((unpack(written, tmp_path / "by hand") / "metadata.json").read_text())

    assert found["backup_time"] == "2026-11-22T02:00:00Z"
    assert found["system_version"] == "2.1"
    assert found["components"] == {"postgresql": "3 files", "files": "1 files", "config": "1 files"}
    assert found["format_version"] == 2
    assert found["run"]["id"] == RUN_ID
    assert found["run"]["finished"] == "2026-11-22T02:00:07Z"
    assert [Part.model_validate(part) for part in found["parts"]] == written.parts
    assert found == json.loads(b"".join(archive_member(written, "metadata.json")))


def archive_member(world: World, wanted: str) -> Iterator[bytes]:
    for name, chunks in archive.read_members(world.store, FULL):
        if name == wanted:
            yield from chunks


def test_the_metadata_of_an_archive_is_as_its_schema_says(written: World) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    found = json.loads(b"".join(archive_member(written, "metadata.json")))

    validator.validate(found)
    for wrong in (
        {key: value for key, value in found.items() if key != "backup_time"},
        {**found, "colour": "red"},
        {**found, "format_version": "one"},
        {**found, "format_version": 3},
        {**found, "components": {"files": 3}},
        {**found, "components": {"files": "many files"}},
        {**found, "parts": [{**found["parts"][0], "size": "3"}]},
        {**found, "parts": [{**found["parts"][0], "sha256": "no digest"}]},
        {**found, "parts": [{key: value for key, value in found["parts"][0].items() if key != "sha256"}]},
    ):
        assert not validator.is_valid(wrong)


def test_the_schema_is_the_models() -> None:
    """Make it anew, after a change, with ``python -m tests.metadata_schema > docs/metadata.schema.json``."""
    assert json.loads(SCHEMA.read_text()) == metadata_schema()


def test_the_handbook_names_every_component_and_where_it_was(written: World) -> None:
    text = b"".join(archive_member(written, "RESTORE.md")).decode()

    assert text.startswith("# Restoring shop from the backup of 2026-11-22 02:00:00 UTC\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Open and check",
        "## db (on db1)",
        "## docs (on app1)",
        "## rules (on app1)",
    ]
    names = ", ".join(part.name for part in written.parts[:3])
    assert f"Restore db from {names}.\n" in text


def test_the_log_says_what_was_done_in_order_of_time(written: World) -> None:
    lines = b"".join(archive_member(written, "backup.log")).decode().splitlines()

    assert lines == sorted(lines, key=lambda line: line[:20])
    assert all(re.match(r"2026-11-22T02:00:0\dZ ", line) for line in lines)
    assert f"run {RUN_ID} of job full_system started: db, docs, rules" in lines[0]
    assert "2026-11-22T02:00:00Z db: sent again, attempt 2" in lines
    assert lines.count("2026-11-22T02:00:07Z db on db1: warning: it grew") == 2
    part = written.parts[0]
    done = f"db on db1: {part.name} done: {part.plain_size} bytes, {part.size} stored, in 5.0 s (0 MB/s), sha256 {part.sha256}"
    assert f"2026-11-22T02:00:05Z {done}" in lines
    assert lines[-1].endswith("all components done; archive follows")


def test_its_record_is_committed_after_it_and_describes_it(written: World) -> None:
    record = archive.read_sidecar(written.store, FULL)
    content = written.stored()

    assert (record.key, record.size, record.sha256) == (
        FULL,
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    assert record.metadata == archive.read_metadata(written.store, FULL)
    assert written.keys() == [f"full_system/full_backup_{RUN_ID}.metadata.json", FULL]
    row = archive.artifact_of(record)
    assert (row.key, row.run_id, row.job, row.created) == (FULL, RUN_ID, "full_system", STARTED)
    assert row.details["parts"][0]["sha256"] == written.parts[0].sha256


def test_it_counts_its_bytes_and_looks_at_its_lease_before_it_commits(world: World) -> None:
    lease, progress = Holding(), Counting()

    world.write(lease=lease, progress=progress)

    assert lease.checks == 1
    (item,) = progress.items
    assert item.finished
    assert item.expected == sum(part.size for part in world.parts) <= item.done


def test_who_lost_the_lease_commits_nothing(world: World) -> None:
    def lost() -> None:
        raise LeaseLost("another has it")

    with pytest.raises(LeaseLost):
        world.write(lease=Holding(lost))
    assert world.keys() == []


@pytest.mark.parametrize(
    "name", [FULL, FULL.removesuffix(".tar.gz"), PurePosixPath(FULL).name, f"full_backup_{RUN_ID}"]
)
def test_it_is_found_by_every_name_it_has(written: World, name: str) -> None:
    assert archive.resolve(written.store, name) == FULL


def test_the_latest_is_the_newest_full_archive(world: World) -> None:
    with pytest.raises(ObjectNotFound, match="there is no archive latest"):
        archive.resolve(world.store, archive.LATEST)
    for key in ("full_system/full_backup_20260101_000000", "components/z_backup_29990101_000000"):
        world.store.put(f"{key}.tar.gz", [b""])
    world.write()
    assert archive.resolve(world.store, archive.LATEST) == FULL
    world.store.put("full_system/full_backup_29980101_000000.tar.gz", [b""])
    assert archive.resolve(world.store, archive.LATEST) == "full_system/full_backup_29980101_000000.tar.gz"


def test_of_an_unknown_name_the_newest_archives_are_told(world: World) -> None:
    with pytest.raises(ObjectNotFound, match="there is no archive x; the newest are: none"):
        archive.resolve(world.store, "x")
    for key in ("full_system/full_backup_20260101_000000", "components/z_backup_20250101_000000"):
        world.store.put(f"{key}.tar.gz", [b""])
    world.write()
    with pytest.raises(ObjectNotFound) as raised:
        archive.resolve(world.store, f"full_backup_{RUN_ID}.metadata.json")
    assert str(raised.value).endswith(
        "the newest are: z_backup_20250101_000000.tar.gz, full_backup_20260101_000000.tar.gz, "
        f"full_backup_{RUN_ID}.tar.gz"
    )


def test_a_backup_of_some_components_is_not_called_a_full_one(world: World) -> None:
    world.run.components, world.steps = ["docs", "rules"], world.steps[1:]

    assert world.write().key == f"components/docs+rules_backup_{RUN_ID}.tar.gz"
    assert archive.resolve(world.store, f"docs+rules_backup_{RUN_ID}")


def contents(world: World) -> list[bytes]:
    return [b"".join(archive.read_part(world.store, FULL, part)) for part in world.parts]


def test_every_part_is_read_back(written: World) -> None:
    assert contents(written) == [content for component in PLAIN.values() for content in component]
    assert archive.verify(written.store, FULL).parts == tuple(written.parts)
    stranger = written.parts[0].model_copy(update={"name": "stranger"})
    with pytest.raises(IntegrityError, match="lacks stranger"):
        list(archive.read_part(written.store, FULL, stranger))


def verified_or_equal(world: World) -> bool:
    """Damage is found by `verify`, or did no harm, and this is true: a part is never another without an error."""
    try:
        archive.verify(world.store, FULL)
    except IntegrityError:
        return False
    assert contents(world) == [content for component in PLAIN.values() for content in component]
    return True


FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=False,
)


@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@FEW
def test_a_changed_byte_is_found_or_harmless(written: World, position: float, mask: int) -> None:
    whole = written.stored()
    damaged = bytearray(whole)
    damaged[int(position * len(whole))] ^= mask
    try:
        written.replace(bytes(damaged))
        if verified_or_equal(written):
            assert archive.read_metadata(written.store, FULL).parts == tuple(written.parts)
    finally:
        written.replace(whole)


@given(length=st.floats(0, 1, exclude_max=True))
@FEW
def test_an_archive_cut_short_is_refused(written: World, length: float) -> None:
    whole = written.stored()
    try:
        written.replace(whole[: int(length * len(whole))])
        with pytest.raises(IntegrityError):
            archive.verify(written.store, FULL)
    finally:
        written.replace(whole)


@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), headers=st.booleans())
@settings(FEW, max_examples=150)
def test_damage_from_before_it_was_packed_is_found_as_well(
    written: World, position: float, mask: int, *, headers: bool
) -> None:
    """Then the checksum of gzip fits, and only the record tells; what the record says beside it nothing protects."""
    whole = written.stored()
    tar = bytearray(gzip.decompress(whole))
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        offsets = [member.offset for member in opened]
    place = position * len(offsets)
    index = offsets[int(place)] + int(place % 1 * 512) if headers else int(position * len(tar))
    tar[index] ^= mask
    try:
        written.replace(gzip.compress(bytes(tar), compresslevel=1))
        verified_or_equal(written)
    finally:
        written.replace(whole)


@given(length=st.floats(0, 1, exclude_max=True))
@FEW
def test_a_tar_cut_short_before_it_was_packed_is_refused(written: World, length: float) -> None:
    whole = written.stored()
    tar = gzip.decompress(whole)
    end = len(tar.rstrip(b"\0"))
    try:
        written.replace(gzip.compress(tar[: int(length * end)], compresslevel=1))
        with pytest.raises(IntegrityError):
            archive.verify(written.store, FULL)
    finally:
        written.replace(whole)


def members(world: World) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(world.stored())) as tar:
        return [(member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar]


def repack(world: World, entries: Sequence[tuple[tarfile.TarInfo, bytes]]) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for member, content in entries:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    world.replace(target.getvalue())


def test_repacked_as_it_is_it_passes(written: World) -> None:
    repack(written, members(written))
    assert verified_or_equal(written)
    assert archive.verify(written.store, FULL).parts == tuple(written.parts)


def test_a_missing_member_is_refused(written: World) -> None:
    entries = members(written)
    for number, (member, _) in enumerate(entries):
        name = PurePosixPath(member.name).name
        if name in ("RESTORE.md", "backup.log"):
            continue  # texts for people
        repack(written, entries[:number] + entries[number + 1 :])
        with pytest.raises(IntegrityError, match=r"which its metadata does not name|lacks"):
            archive.verify(written.store, FULL)


@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("position", [0, -1])
def test_an_extra_member_is_refused(written: World, kind: bytes, position: int) -> None:
    extra = tarfile.TarInfo(f"{RUN_ID}/extra")
    extra.type, extra.linkname = kind, "/etc/passwd"
    entries = members(written)
    entries.insert(position % (len(entries) + 1), (extra, b""))
    repack(written, entries)

    with pytest.raises(IntegrityError, match="extra"):
        archive.verify(written.store, FULL)


def test_a_member_that_is_there_twice_is_refused(written: World) -> None:
    entries = members(written)
    for member, content in entries:
        for place in (1, len(entries)):
            repack(written, [*entries[:place], (member, content), *entries[place:]])
            with pytest.raises(IntegrityError, match=r"twice|does not name"):
                archive.verify(written.store, FULL)


def test_a_member_outside_its_folder_is_refused(written: World) -> None:
    entries = members(written)
    entries[-1][0].name = f"../{PurePosixPath(entries[-1][0].name).name}"
    repack(written, entries)

    with pytest.raises(IntegrityError):
        archive.verify(written.store, FULL)


def test_two_parts_that_changed_places_are_refused(written: World) -> None:
    entries = members(written)
    (first, content), (second, other) = entries[-1], entries[-2]
    repack(written, [*entries[:-2], (first, other), (second, content)])

    with pytest.raises(IntegrityError):
        archive.verify(written.store, FULL)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b'{"format_version": 1}', b"\xff"])
def test_metadata_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(IntegrityError):
        archive.parse_metadata(text, FULL)


def test_metadata_of_a_later_format_is_said_to_be(written: World) -> None:
    text = b"".join(archive_member(written, "metadata.json")).replace(
        b'"format_version": 2', b'"format_version": 3'
    )

    with pytest.raises(IntegrityError, match="has format version 3; this version reads 1, 2"):
        archive.parse_metadata(text, FULL)


@pytest.fixture
def encrypted(world: World, tmp_path: Path) -> World:
    """The archive of a run whose hosts hold public keys alone; a private one lies in the folder."""
    identity = x25519.Identity.generate()
    (tmp_path / "key.txt").write_text(f"{identity}\n")
    sealing = EncryptionSettings(
        recipients=(str(identity.to_public()),), identities=(Secret(file=tmp_path / "key.txt"),)
    )
    world.settings = world.settings.model_copy(update={"encryption": sealing})
    world.steps = [world._step(name, contents) for name, contents in PLAIN.items()]
    world.parts = [Part.model_validate(part) for step in world.steps for part in (step.result or {})["parts"]]
    world.write()
    return world


def test_encrypted_it_opens_with_age_and_tar_and_so_do_its_parts(encrypted: World, tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    (tmp_path / "opened").mkdir()
    script = f"{DECRYPT} {encrypted.store.root / FULL}.age | tar -xz".replace(
        "<file of the private key>", str(key)
    )
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path / "opened", check=True)
    folder = tmp_path / "opened" / RUN_ID

    assert DECRYPT in (folder / "RESTORE.md").read_text()
    contents = [content for several in PLAIN.values() for content in several]
    for part, content in zip(encrypted.parts, contents, strict=True):
        command = plain_command(part).replace("<file of the private key>", str(key))
        assert subprocess.check_output(["sh", "-ec", command], cwd=folder) == content


def test_encrypted_it_is_verified_and_read_with_a_key_only(encrypted: World) -> None:
    key = f"{FULL}.age"
    assert archive.resolve(encrypted.store, f"full_backup_{RUN_ID}") == key
    assert archive.verify(encrypted.store, key) == archive.read_sidecar(encrypted.store, key).metadata
    for part, content in zip(encrypted.parts[-2:], [*PLAIN["docs"], *PLAIN["rules"]], strict=True):
        assert b"".join(archive.read_part(encrypted.store, key, part)) == content
    for item in encrypted.store.list(""):
        if item.key.endswith(".age"):
            assert b"tree" not in encrypted.stored(item.key)
            assert b"RESTORE" not in encrypted.stored(item.key)

    encrypted.settings = encrypted.settings.model_copy(
        update={"encryption": EncryptionSettings(recipients=encrypted.settings.encryption.recipients)}
    )
    assert archive.read_metadata(encrypted.store, key).run.id == RUN_ID
    with pytest.raises(Permanent, match=r"no private key here; name one in encryption\.identities"):
        archive.verify(encrypted.store, key)


def test_after_a_change_of_keys_each_archive_opens_with_those_it_was_made_for(
    world: World, tmp_path: Path
) -> None:
    """The way of docs/architecture.md: the new key beside the old one first, then the new one alone."""
    keys = {name: x25519.Identity.generate() for name in ("old", "new")}
    for name, identity in keys.items():
        (tmp_path / name).write_text(f"{identity}\n")
    (tmp_path / "both").write_text(f"{keys['old']}\n{keys['new']}\n")

    def settle(recipients: Sequence[str], *files: str) -> None:
        sealing = EncryptionSettings(
            recipients=tuple(str(keys[name].to_public()) for name in recipients),
            identities=tuple(Secret(file=tmp_path / file) for file in files),
        )
        world.settings = world.settings.model_copy(update={"encryption": sealing})

    archives, parts = {}, {}
    for minute, recipients in enumerate((("old",), ("new", "old"), ("new",))):
        settle(recipients)  # no host needs a private key for a backup
        world.run.id = f"20261122_02{minute:02}00"
        world.steps = [world._step(name, contents) for name, contents in PLAIN.items()]
        archives[recipients] = world.write().key
        parts[recipients] = Part.model_validate((world.steps[1].result or {})["parts"][0])

    def opens(recipients: Sequence[str], *files: str) -> bool:
        settle(("new",), *files)
        key, part = archives[tuple(recipients)], parts[tuple(recipients)]
        try:
            archive.verify(world.store, key)
            return b"".join(archive.read_part(world.store, key, part)) == PLAIN["docs"][0]
        except Permanent as error:
            if "is encrypted for other keys than those of encryption.identities" not in str(error):
                raise
            return False

    opened = {files: [opens(made, *files) for made in archives] for files in (("old",), ("new",))}
    assert opened == {("old",): [True, True, False], ("new",): [False, True, True]}
    for files in (("both",), ("old", "new"), ("new", "old", "absent")):
        assert all(opens(made, *files) for made in archives)


def test_a_changed_byte_in_a_record_is_noticed(written: World) -> None:
    sidecar = archive.sidecar_key(FULL)
    text = written.stored(sidecar)
    for damaged in (text.replace(b'"shop"', b'"shoq"'), text[:-9], text.replace(b'"keys": 2', b'"keys": 3')):
        assert damaged != text
        written.replace(damaged, sidecar)
        with pytest.raises(IntegrityError, match=r"the record .* is damaged"):
            archive.read_sidecar(written.store, FULL)
        with pytest.raises(IntegrityError, match=r"the record .* is damaged"):
            archive.verify(written.store, FULL)
        assert archive.read_metadata(written.store, FULL).system_name == "shop"


def test_a_record_that_describes_another_archive_is_noticed(written: World) -> None:
    sidecar = archive.sidecar_key(FULL)
    record = archive.read_sidecar(written.store, FULL)
    other = record.metadata.model_copy(update={"system_version": "9"})
    written.replace(
        sealed.seal(record.model_copy(update={"metadata": other}).model_dump(mode="json")), sidecar
    )

    with pytest.raises(IntegrityError, match="does not describe what the archive holds"):
        archive.verify(written.store, FULL)


def test_an_attempt_after_one_that_died_between_the_archive_and_its_record_ends_alike(written: World) -> None:
    record, content = archive.read_sidecar(written.store, FULL), written.stored()
    written.store.delete(archive.sidecar_key(FULL))

    assert written.write() == record
    assert archive.read_sidecar(written.store, FULL) == record
    assert written.stored() == content


def test_an_attempt_after_one_that_died_does_not_vouch_for_a_damaged_archive(written: World) -> None:
    written.store.delete(archive.sidecar_key(FULL))
    written.replace(written.stored()[:-20])

    with pytest.raises(IntegrityError):
        written.write()
    assert written.keys() == [FULL], "no record of it"


def test_a_second_call_changes_nothing_and_needs_no_parts(written: World) -> None:
    record = archive.read_sidecar(written.store, FULL)
    for part in written.parts:
        written.store.delete(f"parts/{RUN_ID}/{part.name}")

    assert written.write() == record


def test_two_that_assemble_at_the_same_time_end_alike(world: World) -> None:
    """The other one commits while this one is about to."""
    other: list[archive.Archive] = []

    def commit() -> None:
        other.append(world.write())
        world.store.delete(archive.sidecar_key(FULL))

    record = world.write(lease=Holding(commit))

    assert [record] == other
    content = world.stored()
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "swap", "gone"])
def test_a_part_that_changed_since_it_was_recorded_is_refused_and_nothing_is_committed(
    world: World, change: str
) -> None:
    key = f"parts/{RUN_ID}/{world.parts[2].name}"
    content = bytearray(world.stored(key))
    match change:
        case "flip":
            content[len(content) // 2] ^= 1
        case "cut":
            del content[-1]
        case "grow":
            content += b"x"
        case "swap":
            content = bytearray(world.stored(f"parts/{RUN_ID}/{world.parts[0].name}"))
    world.store.delete(key)
    if change != "gone":
        world.store.put(key, [bytes(content)])

    with pytest.raises(ObjectNotFound if change == "gone" else IntegrityError, match=world.parts[2].name):
        world.write()
    assert world.keys() == []


def test_a_taken_key_is_no_archive_of_ours(world: World) -> None:
    world.store.put(FULL, [b"something else"])

    with pytest.raises((IntegrityError, ObjectExists)):
        world.write()
    assert world.stored() == b"something else"
    assert world.keys() == [FULL]
