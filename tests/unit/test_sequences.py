"""Random sequences of what happens to backups, on a real store, catalogue and components; invariants after each step."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tasks import archive, proofs
from tasks.archive import artifact_of
from tasks.backup import store_component
from tasks.prune import backup_of, prune_archives, remove, survey
from tasks.rebuild import scan, take_in, take_in_proofs
from tests.configured import configured
from workers import catalog
from workers.catalog import Artifact, Kind, State, Step, Verification, database
from workers.component import Restore
from workers.errors import BackupError
from workers.locks import Lease
from workers.progress import Item, Progress
from workers.settings import Settings
from workers.storage import open_store

# ``AI_MICRO_BACKUP_TEST_PROFILE=long`` runs many more and longer sequences.
LONG = os.environ.get("AI_MICRO_BACKUP_TEST_PROFILE") == "long"
PROFILE = settings(
    max_examples=400 if LONG else 10,
    stateful_step_count=60 if LONG else 22,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TABLES = """
hosts = ["app1"]
[system]
name = "shop"
[components.docs]
kind = "files"
host = "app1"
path = "{folder}/docs"
[components.rules]
kind = "files"
host = "app1"
path = "{folder}/rules"
[store]
path = "{folder}/store"
[catalog]
url = "sqlite:///{folder}/catalog.sqlite"
[retention]
full_system = {{ days = 5 }}
[retention.components]
docs = {{ last = 2 }}
rules = {{ daily = 1, weekly = 1 }}
"""


class Held:
    """A lease that is held."""

    def check(self) -> None:
        return


class Unseen(Progress):
    """Progress that nobody sees."""

    def __init__(self) -> None:
        self._items: list[Item] = []

    def add(self, label: str, expected: int | None) -> Item:
        return Item(label, expected)

    def reporting(self) -> Any:
        return ExitStack()


HELD = cast("Lease", Held())


class Sequences(RuleBasedStateMachine):
    """Backups of two folders over days, and all that may happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="sequences-")))
        path = self.folder / "backup.toml"
        path.write_text(TABLES.format(folder=self.folder))
        self.settings: Settings = self.stack.enter_context(configured(path))
        self.patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        self.store = open_store(self.settings.store)
        self.clock = datetime(2026, 3, 1, 2, tzinfo=catalog.now().tzinfo)
        for module in ("workers.catalog.models", "workers.catalog.runs", "workers.catalog", "tasks.backup"):
            self.patch.setattr(f"{module}.now", lambda: self.clock)
        self.backed_up: dict[str, dict[str, str]] = {}
        """What each archive was made from."""
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        database.engine_of(self.settings.catalog, os.getpid()).dispose()
        database.engine_of.cache_clear()
        self.stack.close()

    # -- what happens ----------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        for name in self.settings.components:
            (self.folder / name).mkdir()
            (self.folder / name / "first").write_text(name)

    @rule(days=st.integers(3, 9), chosen=st.sampled_from([["docs"], ["rules"], ["docs", "rules"]]))
    def days_pass(self, days: int, chosen: list[str]) -> None:
        """Each day has its backup."""
        for day in range(days):
            self.clock += timedelta(days=1)
            self.change(chosen[0], "a", bytes([day]))
            self.back_up(chosen)

    @rule(name=st.sampled_from(["docs", "rules"]), file=st.sampled_from("abc"), text=st.binary(max_size=200))
    def change(self, name: str, file: str, text: bytes) -> None:
        (self.folder / name / file).write_bytes(text)

    @rule(hours=st.sampled_from([1, 24, 24, 24, 72]))
    def wait(self, hours: int) -> None:
        self.clock += timedelta(hours=hours)

    @rule(days=st.sampled_from([-400, -3, 400]))
    def prune_while_the_clock_is_wrong(self, days: int) -> None:
        newest = max((row.created for row in catalog.list_artifacts()), default=None)
        right, self.clock = self.clock, self.clock + timedelta(days=days)
        before = {row.key for row in catalog.list_artifacts()}
        self.prune()
        after = {row.key for row in catalog.list_artifacts()}
        if newest and newest > self.clock + timedelta(minutes=5):
            assert after == before
        assert {key for key in before if key.startswith("full_system/")} <= after
        self.clock = right

    @rule(chosen=st.sampled_from([["docs"], ["rules"], ["docs", "rules"], ["docs", "rules"]]))
    def back_up(self, chosen: list[str]) -> None:
        self.clock += timedelta(minutes=1)
        run = catalog.open_run(Kind.BACKUP, job="manual", components=chosen)
        assert run
        steps = [self._step(run.id, name) for name in chosen]
        made = archive.write_archive(run, steps, HELD, Unseen())
        catalog.add_artifact(artifact_of(made))
        catalog.finish_run(run.id, archive=made.key)
        for item in list(self.store.list(f"parts/{run.id}/")):
            self.store.delete(item.key)
        self.backed_up[made.key] = {name: digest_of(self.folder / name) for name in chosen}

    def _step(self, run_id: str, name: str) -> Step:
        parts = store_component(run_id, self.settings.components[name], {}, HELD, Unseen())
        now = self.clock
        result = {"parts": [part.model_dump(mode="json") for part in parts]}
        return Step(
            run_id=run_id, phase="backup", name=name, task="t", args=[], queue="q", lease=name, task_id=name,
            sent=now, last_seen=now, finished=now, result=result,
        )  # fmt: skip

    @precondition(lambda self: self.backed_up)
    @rule(data=st.data(), level=st.sampled_from(["checksum", "restore"]))
    def verify(self, data: st.DataObject, level: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.backed_up)))
        try:
            archive.verify(self.store, key)
            ok = True
        except BackupError:
            ok = False
        assert ok == (key not in self.damaged)
        self.clock += timedelta(seconds=1)
        run_id = f"{self.clock:{catalog.RUN_ID_FORMAT}}"
        entry = Verification(
            key=key, store="store", level=level, ok=ok, taken=self.clock, run_id=run_id, details={}
        )
        proofs.write_proof(self.store, entry)
        catalog.add_verification(entry)

    @rule()
    def prune(self) -> None:
        foreseen = survey("store")
        proven = {row.key for row in newest_proven(catalog.list_artifacts())}
        done = prune_archives("store", HELD)
        assert done["dropped"] == [decision.key for decision in foreseen.plan.dropped]
        for key in done["dropped"]:
            del self.backed_up[key]
            self.damaged.discard(key)
        assert proven <= {row.key for row in catalog.list_artifacts()}
        assert not survey("store").plan.dropped

    @precondition(lambda self: self.backed_up)
    @rule(data=st.data(), steps=st.integers(0, 2))
    def die_while_deleting(self, data: st.DataObject, steps: int) -> None:
        """A worker dies between two of the three steps of a deletion; the next one ends it."""
        key = data.draw(st.sampled_from(sorted(self.backed_up)))
        calls = iter(range(9))
        real = self.store.delete
        with pytest.MonkeyPatch.context() as patch:

            def delete(_self: object, name: str) -> None:
                if next(calls) >= steps:
                    raise KeyboardInterrupt
                real(name)

            patch.setattr("workers.storage.local.LocalStore.delete", delete)
            patch.setattr("workers.catalog.drop_artifact", self._die)
            with pytest.raises(KeyboardInterrupt):
                remove(self.store, "store", key)
        self.nothing_looks_like_a_backup_that_is_none(deleting=key)
        self._forget(key)

    def _die(self, _key: str) -> None:
        raise KeyboardInterrupt

    def _forget(self, key: str) -> None:
        remove(self.store, "store", key)
        remove(self.store, "store", key)
        del self.backed_up[key]
        self.damaged.discard(key)

    @precondition(lambda self: self.backed_up)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self._forget(data.draw(st.sampled_from(sorted(self.backed_up))))

    @precondition(lambda self: self.backed_up.keys() - self.damaged)
    @rule(data=st.data(), percent=st.integers(20, 90))
    def damage(self, data: st.DataObject, percent: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.backed_up.keys() - self.damaged)))
        path = self.folder / "store" / key
        content = path.read_bytes()
        place = len(content) * percent // 100
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with pytest.raises(BackupError):
            archive.verify(self.store, key)
        self.damaged.add(key)

    @precondition(lambda self: self.backed_up.keys() - self.damaged)
    @rule(data=st.data())
    def lose_a_record(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.backed_up.keys() - self.damaged)))
        record = b"".join(self.store.get(archive.sidecar_key(key)))
        self.store.delete(archive.sidecar_key(key))
        (found,) = [found for found in scan(self.store) if found.key == key]
        assert found.archive == archive.parse_sidecar(record, key)
        assert "no readable record" in str(found.note)
        self.store.put(archive.sidecar_key(key), [record])

    @rule(lose=st.booleans())
    def rebuild(self, lose: bool) -> None:
        before, ledger = rows(), lines()
        if lose:
            for key in before:
                catalog.drop_artifact(key)
                catalog.drop_verifications(key, "store")
        done = take_in(self.store, drop_gone=False)
        assert take_in_proofs(self.store, "store") == (len(ledger) if lose else 0, [])
        assert (rows(), lines()) == (before, ledger)
        assert sorted(done["added"]) == (sorted(before) if lose else [])
        assert (done["changed"], done["gone"]) == ([], [])

    @precondition(lambda self: self.backed_up)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.backed_up)))
        name = data.draw(st.sampled_from(sorted(self.backed_up[key])))
        if key in self.damaged:
            with pytest.raises(BackupError):
                archive.verify(self.store, key)
            return
        component = self.settings.components[name]
        metadata = archive.verify(self.store, key)
        parts = [part for part in metadata.parts if part.component == name]
        restore = Restore("r", parts, lambda part: archive.read_part(self.store, key, part))
        component.stage(restore)
        component.swap(restore)
        component.settle(restore)
        assert digest_of(self.folder / name) == self.backed_up[key][name]

    # -- what holds after each step --------------------------------------------------------------------------------

    @invariant()
    def the_catalogue_lists_what_is_there(self) -> None:
        listed = rows()
        assert listed.keys() == self.backed_up.keys()
        for key, row in listed.items():
            if key not in self.damaged:
                content = (self.folder / "store" / key).read_bytes()
                assert (len(content), hashlib.sha256(content).hexdigest()) == (row["size"], row["sha256"])

    @invariant()
    def nothing_looks_like_a_backup_that_is_none(self, deleting: str | None = None) -> None:
        for item in self.store.list(""):
            if item.key.startswith(proofs.FOLDER):
                continue
            assert archive.is_archive(item.key) or item.key.endswith(archive.SIDECAR_SUFFIX), item
        found = {found.key for found in scan(self.store) if found.archive}
        assert found - {deleting} == self.backed_up.keys() - {deleting}
        assert not [found for found in scan(self.store) if not found.archive and found.key != deleting]

    @invariant()
    def the_ledger_is_that_of_the_store(self) -> None:
        there = {proofs.proof_key(line) for line in catalog.list_verifications()}
        assert set(proofs.list_proofs(self.store)) == there
        assert not proofs.list_orphans(self.store)

    @invariant()
    def no_run_is_left(self) -> None:
        assert not catalog.list_runs(state=State.RUNNING)


def rows() -> dict[str, dict[str, Any]]:
    return {row.key: row.model_dump() for row in catalog.list_artifacts()}


def lines() -> list[dict[str, Any]]:
    return [line.model_dump(exclude={"id"}) for line in catalog.list_verifications()]


def newest_proven(artifacts: Any) -> Iterator[Artifact]:
    """Yield, for each component, its newest archive that was proven and not found damaged since."""
    standing = catalog.proofs(catalog.list_verifications())
    for component in ("docs", "rules"):
        for row in artifacts:
            backup = backup_of(row, standing.get(("store", row.key)))
            if backup.proven and not backup.damaged and component in {name for name, _ in backup.holds}:
                yield row
                break


def digest_of(folder: Path) -> str:
    files = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()


Sequences.TestCase.settings = PROFILE


TestSequences = Sequences.TestCase


class Last:
    """Draws the last that there is to choose from, so the newest archive."""

    def draw(self, strategy: Any) -> Any:
        return strategy.elements[-1]


def test_each_thing_happens_at_least_once() -> None:
    """Chance may leave something out of a small number of sequences."""
    machine, last = Sequences(), cast("st.DataObject", Last())

    def step(happens: Callable[..., None], *values: Any, **named: Any) -> None:
        happens(*values, **named)
        machine.the_catalogue_lists_what_is_there()
        machine.nothing_looks_like_a_backup_that_is_none()

    try:
        machine.begin()
        step(machine.days_pass, 2, ["docs", "rules"])
        step(machine.verify, last, "restore")
        proven = max(machine.backed_up)
        step(machine.days_pass, 8, ["docs", "rules"])
        step(machine.days_pass, 4, ["docs"])
        before = len(machine.backed_up)
        step(machine.prune_while_the_clock_is_wrong, -3)
        assert len(machine.backed_up) == before
        step(machine.prune)
        assert len(machine.backed_up) == 1 + 1 + 2, "a young full one, the proven one, the last two of docs"
        assert proven in machine.backed_up
        step(machine.rebuild, lose=True)
        step(machine.lose_a_record, last)
        step(machine.damage, last, 50)
        step(machine.verify, last, "checksum")
        step(machine.rebuild, lose=True)
        for steps in range(3):
            step(machine.back_up, ["rules"])
            step(machine.die_while_deleting, last, steps)
        step(machine.restore, last)
        step(machine.delete, last)
    finally:
        machine.teardown()
