"""Verifications without a broker: what each level sees, and what the ledger says after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from tasks import archive, proofs, rebuild, sealed, verify
from tasks.commands.proof import proven, restored_in_part
from tasks.prune import remove
from tasks.verify import VerifyWorkflow, compare_object
from tests.configured import configured, write_settings
from workers import catalog
from workers.catalog import Kind, Proof, Run, Step, Verification
from workers.errors import ComparisonError, IntegrityError, ObjectNotFound, Permanent, StoreUnavailable
from workers.progress import Item, Progress
from workers.storage.local import LocalStore

OLD = Path(__file__).parents[1] / "data"
KEY = "full_system/full_backup_20261126_161150.tar.gz"
STARTED = datetime(2026, 11, 26, tzinfo=UTC)


class Seen:
    """Progress that nobody looks at."""

    def add(self, label: str, expected: int | None) -> Item:
        return Item(label, expected)


SEEN = cast("Progress", Seen())


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store with an archive and its record."""
    store = LocalStore(tmp_path / "store")
    for file in OLD.glob("full_backup_*"):
        store.put(f"full_system/{file.name}", [file.read_bytes()])
    return store


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[None]:
    with configured(
        write_settings(tmp_path, more=f'[catalog]\nurl = "sqlite:///{tmp_path / "catalog.sqlite"}"')
    ):
        yield


def change(store: LocalStore, change: Callable[[bytes], bytes]) -> None:
    content = b"".join(store.get(KEY))
    store.delete(KEY)
    store.put(KEY, [change(content)])


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_the_object_is_compared_with_its_record(store: LocalStore) -> None:
    assert compare_object(store, KEY, progress=None) == {"bytes": 154889}
    assert compare_object(store, KEY, progress=SEEN)["sha256"] == archive.read_sidecar(store, KEY).sha256

    change(store, flip)
    compare_object(store, KEY, progress=None)  # nobody looked at its bytes
    with pytest.raises(IntegrityError, match=r"has the SHA-256 .* recorded was"):
        compare_object(store, KEY, progress=SEEN)


@pytest.mark.parametrize("cut", [lambda content: content[:-1], lambda content: content[:999]])
def test_a_size_that_is_not_recorded_is_seen_without_reading(
    store: LocalStore, cut: Callable[[bytes], bytes]
) -> None:
    change(store, cut)
    with pytest.raises(IntegrityError, match="bytes, recorded were 154889"):
        compare_object(store, KEY, progress=None)


def test_an_object_or_a_record_that_is_gone_is_seen(store: LocalStore) -> None:
    store.delete(KEY)
    with pytest.raises(ObjectNotFound):
        compare_object(store, KEY, progress=None)
    store.delete(archive.sidecar_key(KEY))
    with pytest.raises(ObjectNotFound):
        compare_object(store, KEY, progress=None)


def test_errors_that_speak_of_the_archive_are_told_from_those_that_do_not() -> None:
    def fails(error: Exception) -> Any:
        def work(_lease: Any) -> dict[str, Any]:
            raise error

        return verify._judged(work, cast("Any", None))

    assert fails(ComparisonError("3 rows of 4")) == {"bad": "3 rows of 4"}
    with pytest.raises(OSError, match="no"):
        fails(OSError("no"))


def opened(level: str) -> Run:
    run = catalog.open_run(
        Kind.VERIFY, job="manual", components=["keys"], archive=KEY, options={"level": level}
    )
    assert run is not None
    return run


def step(run: Run, phase: str, name: str, **end: Any) -> Step:
    return Step(
        run_id=run.id, phase=phase, name=name, task="t", args=[], queue="control", lease=name, task_id=name,
        sent=STARTED, last_seen=STARTED, **end,
    )  # fmt: skip


def test_levels_follow_each_other_up_to_the_one_asked_for_and_each_is_written_once(ledger: None) -> None:
    run, workflow, seen = opened("structure"), VerifyWorkflow(), []
    phase: str | None = workflow.first
    while phase is not None:
        seen.append((phase, [work.name for work in workflow.work(run, phase)]))
        steps = [step(run, phase, name, result={"found": {"bytes": 7}}) for name in seen[-1][1]]
        workflow.following(run, phase, steps)
        phase = workflow.following(run, phase, steps)

    assert seen == [("exists", ["archive"]), ("checksum", ["archive"]), ("structure", ["archive", "keys"])]
    lines = catalog.list_verifications(KEY)
    assert [(line.level, line.ok, line.run_id) for line in lines] == [
        (name, True, run.id) for name, _ in seen
    ]
    assert catalog.proofs(lines)["store", KEY].level == "structure"


def test_what_is_wrong_ends_the_run_loudly_and_stands_in_the_ledger(ledger: None) -> None:
    run, workflow = opened("restore"), VerifyWorkflow()

    steps = [
        step(run, "structure", "keys", result={"bad": "a byte differs"}),
        step(run, "structure", "archive", result={"found": {}}),
    ]
    assert workflow.following(run, "structure", steps) is None
    assert catalog.finish_run(run.id)
    assert catalog.get_run(run.id).state is catalog.State.FAILED
    assert catalog.get_run(run.id).cause == "structure: keys: a byte differs"
    (line,) = catalog.list_verifications()
    assert (line.ok, line.details) == (False, {"wrong": ["keys: a byte differs"]})


def test_beside_a_restore_it_goes_on_in_the_store_alone(
    ledger: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr("tasks.watchdog.locks.end_holder", lambda _settings, holder: ended.append(holder))
    monkeypatch.setattr("tasks.watchdog.app.control.revoke", lambda *_names, **_how: None)
    deep, shallow, workflow = opened("restore"), opened("checksum"), VerifyWorkflow()
    for run, phase, steps in (
        (deep, "structure", [step(deep, "structure", "keys")]),
        (shallow, "checksum", [step(shallow, "checksum", "archive")]),
    ):
        assert catalog.enter_phase(run.id, leaving="", entering=phase, steps=steps)
    restore = catalog.open_run(Kind.RESTORE, job="manual", components=["keys"], archive=KEY)
    assert restore

    verify.make_way_for(restore)

    assert ended == ["keys"], "the task that worked on the host"
    assert (
        catalog.get_run(deep.id).cause == f"structure was not ended: it gave way to the restore {restore.id}"
    )
    assert catalog.get_run(shallow.id).state is catalog.State.RUNNING

    later = opened("structure")
    found = {phase: [step(later, phase, "archive", result={"found": {}})] for phase in ("exists", "checksum")}
    assert workflow.following(later, "exists", found["exists"]) == "checksum"
    assert workflow.following(later, "checksum", found["checksum"]) is None
    cause = f"structure was not looked at: it gave way to the restore {restore.id}"
    assert catalog.get_run(later.id).cause == cause
    assert [line.level for line in catalog.list_verifications()] == ["exists", "checksum"]
    catalog.finish_run(restore.id)
    assert workflow.following(opened("structure"), "checksum", found["checksum"]) == "structure"


def test_what_could_not_be_verified_is_no_verdict(ledger: None) -> None:
    run = opened("restore")

    assert (
        VerifyWorkflow().following(run, "restore", [step(run, "restore", "keys", error="no worker on app1")])
        is None
    )
    assert catalog.get_run(run.id).cause == "it could not be verified: restore keys: no worker on app1"
    assert catalog.list_verifications() == []


def test_how_an_archive_stands_follows_from_all_that_was_said_of_it() -> None:
    def line(minute: int, level: str, *, ok: bool = True, store: str = "store") -> Verification:
        details = {} if ok else {"wrong": ["it is short"]}
        taken = STARTED + timedelta(minutes=minute)
        return Verification(
            key=KEY, store=store, level=level, ok=ok, taken=taken, run_id=f"{minute}", details=details
        )

    def stands(*lines: Verification) -> Proof:
        return catalog.proofs(lines)["store", KEY]

    deep, shallow = line(1, "restore"), line(2, "checksum")
    assert stands(deep, shallow) == Proof("restore", deep.taken)
    assert stands(shallow, line(3, "structure")).level == "structure"
    wrong = line(4, "exists", ok=False)
    assert stands(deep, wrong) == Proof(None, wrong.taken, damaged=True, wrong=("it is short",))
    assert stands(deep, wrong, line(5, "checksum")) == Proof("checksum", STARTED + timedelta(minutes=5))
    assert catalog.proofs([line(1, "restore", store="offsite")]).keys() == {("offsite", KEY)}


def restored(components: list[str], **options: Any) -> None:
    run = catalog.open_run(
        Kind.RESTORE, job="manual", components=components, archive=KEY, options=options or None
    )
    assert run is not None
    verify.note_restored(run)
    catalog.finish_run(run.id)


def test_a_restore_of_some_is_written_as_partial_and_only_one_of_all_is_proof(
    store: LocalStore, tmp_path: Path
) -> None:
    held = list(dict.fromkeys(part.component for part in archive.read_metadata(store, KEY).parts))
    with configured(every_component(tmp_path, held)):
        restored(held[:2])
        lines = catalog.list_verifications()
        assert [(line.level, line.ok) for line in lines] == [("restore", True)]
        assert restored_in_part(lines)[0]["components"] == held[:2]
        assert catalog.proofs(lines) == {}
        restored(held, path="some/file")
        assert catalog.proofs(catalog.list_verifications()) == {}
        restored(held, into="/elsewhere")
        lines = catalog.list_verifications()
        assert [len(restored_in_part(lines)), len(lines)] == [2, 3]
        assert catalog.proofs(lines)["store", KEY].level == "restore"
        assert dump(lines) == dump(stored(store)), "the store holds the same"


def every_component(tmp_path: Path, names: list[str]) -> Path:
    """Settings that know each of ``names`` as a tree, and the catalogue."""
    tables = "".join(
        f'[components.{name}]\nkind = "files"\nhost = "app1"\npath = "/app/{name}"\n' for name in names
    )
    catalog_url = f'[catalog]\nurl = "sqlite:///{tmp_path / "catalog.sqlite"}"\n'
    path = tmp_path / "backup.toml"
    path.write_text(
        f'hosts = ["app1"]\n[system]\nname = "shop"\n[store]\npath = "{tmp_path}/store"\n{catalog_url}{tables}'
    )
    return path


def stored(store: LocalStore) -> list[Verification]:
    """What the store holds of the ledger, the oldest first."""
    lines = [proofs.read_proof(store, key) for key in proofs.list_proofs(store)]
    return sorted(lines, key=lambda line: line.taken)


def dump(lines: Sequence[Verification]) -> list[dict[str, Any]]:
    return [line.model_dump(exclude={"id"}) for line in lines]


def proven_to(level: str, store: LocalStore) -> Run:
    """Do the levels of a verification up to one, all of them good."""
    run, workflow = opened(level), VerifyWorkflow()
    phase: str | None = workflow.first
    while phase is not None:
        steps = [
            step(run, phase, work.name, result={"found": {"n": 1}}) for work in workflow.work(run, phase)
        ]
        phase = workflow.following(run, phase, steps)
    catalog.finish_run(run.id)
    return catalog.get_run(run.id)


def test_a_lost_ledger_is_made_anew_from_the_store_line_by_line(store: LocalStore, ledger: None) -> None:
    rebuild.take_in(store, drop_gone=False)
    proven_to("structure", store)
    bad = opened("exists")
    VerifyWorkflow().following(bad, "exists", [step(bad, "exists", "archive", result={"bad": "short"})])
    catalog.finish_run(bad.id)
    before = catalog.list_verifications()
    assert [(line.level, line.ok) for line in before] == [
        ("exists", True), ("checksum", True), ("structure", True), ("exists", False),
    ]  # fmt: skip
    catalog.drop_artifact(KEY)
    catalog.drop_verifications(KEY, "store")

    assert rebuild.take_in(store, drop_gone=False)["added"] == [KEY]
    assert rebuild.take_in_proofs(store, "store") == (4, [])
    assert dump(catalog.list_verifications()) == dump(before)
    assert rebuild.take_in_proofs(store, "store") == (0, []), "a second rebuild changes nothing"
    assert (proven()["damaged"], [found.key for found in rebuild.scan(store)]) != ([], []), (
        "and it is damaged"
    )
    assert [found.key for found in rebuild.scan(store)] == [KEY], "no proof is taken for an archive"


def test_a_damaged_proof_is_named_and_not_believed(store: LocalStore, ledger: None) -> None:
    proven_to("checksum", store)
    deep, shallow = sorted(proofs.list_proofs(store))
    text = b"".join(store.get(deep))
    for damage in (text.replace(b"true", b"false"), text[:-9], b"[]", sealed.seal({"key": KEY})):
        store.delete(deep)
        store.put(deep, [damage])
        catalog.drop_verifications(KEY, "store")
        added, notes = rebuild.take_in_proofs(store, "store")
        assert (added, len(notes)) == (1, 1), damage
        assert deep in notes[0]
    store.delete(shallow)
    store.put(shallow, [text])
    assert "is the proof of something else" in rebuild.take_in_proofs(store, "store")[1][1]


def test_proofs_go_with_their_archive_and_never_another_ones(store: LocalStore, ledger: None) -> None:
    run = proven_to("exists", store)
    other = Verification(
        key=KEY.replace(".tar.gz", "/other.tar.gz"), store="store", level="exists", ok=True, taken=STARTED,
        run_id=run.id, details={},
    )  # fmt: skip
    store.put(other.key, [b"another archive"])
    proofs.write_proof(store, other)
    assert proofs.list_orphans(store) == []

    remove(store, "store", KEY)

    assert list(proofs.list_proofs(store)) == [proofs.proof_key(other)]
    assert catalog.list_verifications() == []
    store.delete(other.key)  # by somebody's hand
    assert proofs.list_orphans(store) == [proofs.proof_key(other)]
    assert rebuild.take_in_proofs(store, "store")[0] == 0
    assert catalog.list_verifications() == []


@pytest.mark.parametrize("bad", [False, True])
def test_a_proof_that_cannot_be_written_is_loud(
    store: LocalStore, ledger: None, monkeypatch: pytest.MonkeyPatch, bad: bool
) -> None:
    def full(*_: object) -> None:
        raise StoreUnavailable("no space left")

    monkeypatch.setattr(LocalStore, "put", full)
    run = opened("structure")
    result = {"bad": "it is short"} if bad else {"found": "it"}
    assert VerifyWorkflow().following(run, "exists", [step(run, "exists", "archive", result=result)]) is None
    cause = str(catalog.get_run(run.id).cause)
    assert "could not be written beside the archive: no space left" in cause
    assert ("it is short" in cause) == bad
    assert [line.ok for line in catalog.list_verifications()] == ([False] if bad else []), "bad news stays"


@pytest.fixture
def begun(ledger: None, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were begun; nobody works on them."""
    runs: list[Run] = []
    monkeypatch.setattr(verify, "begin", runs.append)
    return runs


def first_level(store: LocalStore, run: Run) -> str:
    """Do the first level of a run as its step does, and return the cause that the run has after it."""
    workflow = VerifyWorkflow()
    (work,) = workflow.work(run, workflow.first)
    result = verify._judged(lambda _lease: compare_object(store, KEY, progress=None), cast("Any", None))
    assert (
        workflow.following(run, workflow.first, [step(run, workflow.first, work.name, result=result)]) is None
    )
    return str(catalog.get_run(run.id).cause)


@pytest.mark.parametrize("named", [True, False])
def test_an_archive_that_the_store_has_lost_is_a_run_that_fails_and_stands_in_the_ledger(
    store: LocalStore, begun: list[Run], named: bool
) -> None:
    catalog.add_artifact(archive.artifact_of(archive.read_sidecar(store, KEY)))
    store.delete(KEY)

    run_id = verify.verify_archive("full_backup_20261126_161150" if named else None, level="checksum")

    assert [(run.id, run.archive) for run in begun] == [(run_id, KEY)]
    assert KEY in first_level(store, begun[0])
    assert [(line.level, line.ok) for line in catalog.list_verifications(KEY)] == [("exists", False)]
    with pytest.raises(ObjectNotFound, match="there is no archive"):
        verify.verify_archive("full_backup_20200101_000000", level="checksum")


def test_a_damaged_record_is_a_run_that_fails_whatever_else_is_damaged(
    store: LocalStore, begun: list[Run]
) -> None:
    change(store, lambda content: b"rubbish" + content)
    store.delete(archive.sidecar_key(KEY))
    store.put(archive.sidecar_key(KEY), [b"{"])

    verify.verify_archive(KEY, level="restore")

    assert "the record" in first_level(store, begun[0])
    assert [line.ok for line in catalog.list_verifications(KEY)] == [False]


def test_components_that_the_settings_do_not_know_are_asked_for_by_the_deeper_levels_only(
    store: LocalStore, begun: list[Run]
) -> None:
    for level in ("structure", "restore"):
        with pytest.raises(
            Permanent, match=r"the settings know no component postgres, .*auth-keys.*, which full_"
        ):
            verify.verify_archive(KEY, level=level)
    assert begun == []
    verify.verify_archive(KEY, level="checksum")
    assert len(begun) == 1


def test_an_archive_too_small_to_be_one_is_refused_whatever_was_recorded(store: LocalStore) -> None:
    record = archive.read_sidecar(store, KEY)
    change(store, lambda content: content[:999])
    store.delete(archive.sidecar_key(KEY))
    store.put(archive.sidecar_key(KEY), [record.model_copy(update={"size": 999}).model_dump_json().encode()])
    with pytest.raises(IntegrityError, match="has 999 bytes, an archive has at least 1000"):
        compare_object(store, KEY, progress=None)


def test_the_status_names_the_newest_proven_and_every_damaged_one_wherever_it_lies(
    store: LocalStore, ledger: None
) -> None:
    catalog.add_artifact(archive.artifact_of(archive.read_sidecar(store, KEY)))
    assert proven() == {"restored": None, "proven": None, "damaged": []}
    for name, level, ok in (("store", "restore", True), ("offsite", "checksum", False)):
        details = {} if ok else {"wrong": ["a byte differs"]}
        catalog.add_verification(
            Verification(
                key=KEY, store=name, level=level, ok=ok, taken=catalog.now(), run_id=name, details=details
            )
        )

    found = proven()
    assert (found["restored"]["archive"], found["proven"]["level"]) == (KEY, "restore")
    assert [(line["store"], line["wrong"]) for line in found["damaged"]] == [("offsite", ["a byte differs"])]
