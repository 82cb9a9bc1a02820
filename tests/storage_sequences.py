"""Random sequences of all that happens to archives in two stores, with what holds of them looked at after each step.

Run as a program with the settings of `AI_MICRO_BACKUP_CONFIG`, whose broker is used; each sequence has settings, stores and a
catalogue of its own. ``AI_MICRO_BACKUP_TEST_PROFILE=long`` runs many more and longer sequences.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, event
from sqlmodel import SQLModel

from tasks import archive, backup, offsite, proofs, prune, rebuild, restore, surveys, verify
from tasks.rebuild import NOT_ARCHIVES
from tasks.retention import Plan
from tests.configured import configured
from tests.storage_world import in_this_process
from workers import catalog
from workers.catalog import LEVELS, Proof, Run, State, database
from workers.settings import CONFIG_VARIABLE
from workers.storage.local import LocalStore

LONG = os.environ.get("AI_MICRO_BACKUP_TEST_PROFILE") == "long"
PROFILE = settings(
    max_examples=150 if LONG else 3,
    stateful_step_count=50 if LONG else 14,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TABLES = ("store", "offsite")
CHOSEN = [["docs"], ["rules"], ["docs", "rules"], ["docs", "rules"]]
SYSTEM = """
hosts = ["main"]
[system]
name = "shop"
[components.docs]
kind = "note"
host = "main"
path = "{folder}/docs"
[components.rules]
kind = "note"
host = "main"
path = "{folder}/rules"
[store]
path = "{folder}/store"
[catalog]
url = "sqlite:///{folder}/catalog.sqlite"
[broker]
port = {port}
password = {{ env = "BROKER_PASSWORD" }}
[limits]
attempts = 1
[retention]
full_system = {{ days = 5 }}
[retention.components]
docs = {{ last = 2 }}
rules = {{ daily = 1, weekly = 1 }}
[offsite]
what = ["full", "components"]
[offsite.store]
path = "{folder}/offsite"
[offsite.retention]
full_system = {{ last = 1 }}
[offsite.retention.components]
docs = {{ last = 3 }}
rules = {{ last = 1 }}
"""


@dataclass(frozen=True)
class Made:
    """What an archive is: its digest, and what the components were when it was made."""

    sha256: str
    contents: dict[str, bytes]


class Sequences(RuleBasedStateMachine):
    """Backups over days, their copies, and all that may happen to both."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="sequences-")))
        port = tomllib.loads(Path(os.environ[CONFIG_VARIABLE]).read_text())["broker"]["port"]
        (self.folder / "backup.toml").write_text(SYSTEM.format(folder=self.folder, port=port))
        self.settings = self.stack.enter_context(configured(self.folder / "backup.toml"))
        self.stores = {table: LocalStore(self.folder / table) for table in TABLES}
        self.clock = datetime(2026, 3, 1, 2, tzinfo=UTC)
        for module in ("workers.catalog.models", "workers.catalog.runs", "workers.catalog", "tasks.backup"):
            self.stack.enter_context(mock.patch(f"{module}.now", self.now))
        self.made: dict[str, Made] = {}
        self.there: dict[str, set[str]] = {table: set() for table in TABLES}
        self.damaged: set[tuple[str, str]] = set()

    def teardown(self) -> None:
        database.engine_of(self.settings.catalog, os.getpid()).dispose()
        database.engine_of.cache_clear()
        self.stack.close()

    def now(self) -> datetime:
        self.clock += timedelta(microseconds=1)
        return self.clock

    def ended(self, run_id: str | None) -> Run:
        assert run_id
        return catalog.get_run(run_id)

    def draw(self, data: st.DataObject, *, sound: bool = False) -> tuple[str, str]:
        """Return a store and an archive in it, if asked a ``sound`` one."""
        choice = [(table, key) for table in TABLES for key in sorted(self.there[table])]
        return data.draw(
            st.sampled_from([place for place in choice if not (sound and place in self.damaged)])
        )

    # -- what happens ----------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        for name in self.settings.components:
            (self.folder / name).write_text(name)

    @rule(name=st.sampled_from(["docs", "rules"]), content=st.binary(min_size=1, max_size=200))
    def change(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content * 50)

    @rule(hours=st.sampled_from([1, 24, 24, 72]))
    def wait(self, hours: int) -> None:
        self.clock += timedelta(hours=hours)

    @rule(days=st.integers(2, 4), chosen=st.sampled_from(CHOSEN))
    def days_pass(self, days: int, chosen: list[str]) -> None:
        """Each day has its backup."""
        for day in range(days):
            self.clock += timedelta(days=1)
            self.change(chosen[0], bytes([day]))
            self.back_up(chosen)

    @rule(chosen=st.sampled_from(CHOSEN))
    def back_up(self, chosen: list[str]) -> None:
        self.clock += timedelta(minutes=1)
        run = self.ended(backup.backup_full_system.run(chosen))
        assert run.state is State.COMPLETE, run.cause
        contents = {name: (self.folder / name).read_bytes() for name in chosen}
        self.made[str(run.archive)] = Made(self.sha256("store", str(run.archive)), contents)
        self.there["store"].add(str(run.archive))
        self.look_at_copies(catalog.list_runs(limit=1)[0])

    @rule()
    def copy(self) -> None:
        self.clock += timedelta(minutes=1)
        known = {line.key for line in catalog.list_verifications() if line.store == "offsite" and not line.ok}
        repaired = known - catalog_proven("offsite") & self.there["store"]
        self.look_at_copies(self.ended(offsite.copy_offsite.run()))
        for key in repaired & self.there["offsite"]:
            if ("store", key) not in self.damaged and key in surveys.keeps(
                "offsite", catalog.list_artifacts()
            ):
                assert ("offsite", key) not in self.damaged, (
                    f"{key} was known to be damaged, and was not copied again"
                )

    def look_at_copies(self, run: Run) -> None:
        """Take in what a run has copied: whole archives of the main store, which a prune would not delete at once."""
        there = {item.key for item in self.stores["offsite"].list("") if archive.is_archive(item.key)}
        new = there - self.there["offsite"]
        assert self.there["offsite"] <= there
        assert new <= self.there["store"]
        assert not new & {decision.key for decision in surveys.survey("offsite").plan.dropped}
        self.there["offsite"] = there
        for key in there:
            if self.sha256("offsite", key) == self.made[key].sha256:
                self.damaged.discard(("offsite", key))
        if run.state is State.FAILED:
            assert any(table == "store" for table, _ in self.damaged), run.cause
        else:
            full = {key for key in self.there["store"] | there if key.startswith("full_system/")}
            assert not full or max(full) in there, (
                "the newest one has a copy, or was deleted from the main store"
            )

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data(), level=st.sampled_from(LEVELS))
    def verify(self, data: st.DataObject, level: str) -> None:
        self.clock += timedelta(minutes=1)
        table, key = self.draw(data)
        run = self.ended(verify.verify_archive.run(key, level=level, store=table))
        bad = (table, key) in self.damaged and level != "exists"
        assert run.state is (State.FAILED if bad else State.COMPLETE), run.cause
        assert catalog.list_verifications(key)[-1].ok != bad

    @rule()
    def prune(self) -> None:
        self.clock += timedelta(minutes=1)
        foreseen = {table: surveys.survey(table) for table in TABLES}
        best = {table: self.best(table) for table in TABLES}
        run = self.ended(prune.prune.run())
        assert run.state is State.COMPLETE, run.cause
        for table in TABLES:
            dropped = run.outcome[table]["dropped"]
            assert dropped == [decision.key for decision in foreseen[table].plan.dropped]
            assert not best[table] & set(dropped), "it was the newest that is good, or that was proven"
            self.gone(table, *dropped)
            assert not surveys.survey(table).plan.dropped

    @rule(days=st.sampled_from([-400, -3, 400]))
    def prune_while_the_clock_is_wrong(self, days: int) -> None:
        newest = {
            table: max((self.created(key) for key in self.there[table]), default=None) for table in TABLES
        }
        before = {table: set(keys) for table, keys in self.there.items()}
        right, self.clock = self.clock, self.clock + timedelta(days=days)
        self.prune()
        for table, moment in newest.items():
            if moment and moment > self.clock + timedelta(minutes=5):
                assert self.there[table] == before[table]
        if days > 0:  # by age, as full ones in the main store, nothing goes when all is suddenly old
            assert {key for key in before["store"] if key.startswith("full_system/")} <= self.there["store"]
        self.clock = right

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.clock += timedelta(minutes=1)
        table, key = self.draw(data)
        run = self.ended(prune.delete.run(key, confirm=key, store=table))
        assert run.state is State.COMPLETE, run.cause
        self.gone(table, key)

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data(), steps=st.integers(0, 2))
    def die_while_deleting(self, data: st.DataObject, steps: int) -> None:
        """A worker dies between two steps of a deletion; the next prune, or the same command, ends it."""
        table, key = self.draw(data)
        calls, real = iter(range(99)), LocalStore.delete

        def delete(store: LocalStore, name: str) -> None:
            if next(calls) >= steps:
                raise KeyboardInterrupt
            real(store, name)

        with (
            mock.patch.object(LocalStore, "delete", delete),
            mock.patch.object(catalog, "drop_artifact", _die),
            suppress(KeyboardInterrupt),
        ):
            prune.remove(self.stores[table], table, key)
        rows = catalog.list_artifacts() if table == "store" else catalog.list_copies()
        assert key not in {row.key for row in rows}, "what is half deleted is no backup"
        if table == "store":
            self.there["store"].discard(key)
            with mock.patch.object(surveys, "decide", return_value=Plan([])):
                assert self.ended(prune.prune.run()).outcome["store"]["dropped"] == [key]
        else:
            prune.remove(self.stores[table], table, key)
        self.gone(table, key)

    @precondition(lambda self: sum(map(len, self.there.values())) > len(self.damaged))
    @rule(data=st.data(), percent=st.integers(20, 90))
    def damage(self, data: st.DataObject, percent: int) -> None:
        table, key = self.draw(data, sound=True)
        path = self.folder / table / key
        content = path.read_bytes()
        place = len(content) * percent // 100
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        self.damaged.add((table, key))

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data())
    def lose_a_record(self, data: st.DataObject) -> None:
        """A rebuild takes in what is whole without it, and says so; of damaged archives it says that, too."""
        table, key = self.draw(data)
        record = b"".join(self.stores[table].get(archive.sidecar_key(key)))
        self.stores[table].delete(archive.sidecar_key(key))
        (found,) = [found for found in rebuild.scan(self.stores[table]) if found.key == key]
        assert "no readable record" in str(found.note)
        if (table, key) not in self.damaged:
            assert found.archive == archive.parse_sidecar(record, key)
        self.stores[table].put(archive.sidecar_key(key), [record])

    @rule(lose=st.booleans())
    def rebuild(self, lose: bool) -> None:
        self.clock += timedelta(minutes=1)
        before, ledger = rows(), standing()
        if lose:
            with catalog.session() as session:
                for table in ("artifact", "copy", "verification"):
                    session.execute(SQLModel.metadata.tables[table].delete())
        run = self.ended(rebuild.rebuild.run())
        assert run.state is State.COMPLETE, run.cause
        assert (rows(), standing()) == (before, ledger)
        assert sorted(run.outcome["store"]["added"]) == (sorted(self.there["store"]) if lose else [])
        assert [run.outcome[table][what] for table in TABLES for what in ("changed", "gone")] == [
            [],
            [],
            [],
            [],
        ]

    @precondition(lambda self: self.there["store"])
    @rule()
    def lose_the_main_store(self) -> None:
        """Nothing is deleted for it, and a rebuild that is asked to forget what is gone does that."""
        shutil.rmtree(self.folder / "store")
        copies = set(self.there["offsite"])
        self.clock += timedelta(minutes=1)
        assert self.ended(prune.prune.run()).outcome["store"]["dropped"] == []
        assert {row.key for row in catalog.list_artifacts()} == self.there["store"]
        run = self.ended(rebuild.rebuild.run(drop_gone=True))
        assert sorted(run.outcome["store"]["gone"]) == sorted(self.there["store"])
        self.gone("store", *self.there["store"])
        self.there["offsite"] = {
            item.key for item in self.stores["offsite"].list("") if archive.is_archive(item.key)
        }
        assert {key for key in copies if key.startswith("full_system/")} & self.there["offsite"] or not any(
            key.startswith("full_system/") for key in copies
        )
        self.gone("offsite", *(copies - self.there["offsite"]))

    @precondition(lambda self: any(self.there.values()))
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        self.clock += timedelta(minutes=1)
        table, key = self.draw(data)
        name = data.draw(st.sampled_from(sorted(self.made[key].contents)))
        before = (self.folder / name).read_bytes()
        run = self.ended(restore.restore_component.run(key, name, confirm=name, store=table))
        bad = (table, key) in self.damaged
        assert run.state is (State.FAILED if bad else State.COMPLETE), run.cause
        assert (self.folder / name).read_bytes() == (before if bad else self.made[key].contents[name])

    # -- what holds after each step --------------------------------------------------------------------------------

    @invariant()
    def the_catalogue_lists_what_is_there(self) -> None:
        listed = rows()
        assert {table: set(found) for table, found in listed.items()} == self.there
        for table, found in listed.items():
            for key, sha256 in found.items():
                assert sha256 == self.made[key].sha256
                assert ((table, key) in self.damaged) == (self.sha256(table, key) != sha256)
        assert not catalog.list_artifacts(deleting=True)

    @invariant()
    def nothing_looks_like_a_backup_that_is_none(self) -> None:
        for table, store in self.stores.items():
            objects = {item.key for item in store.list("") if not item.key.startswith(NOT_ARCHIVES)}
            assert objects == self.there[table] | {archive.sidecar_key(key) for key in self.there[table]}
            for found in rebuild.scan(store):
                assert found.archive
                assert found.archive.sha256 == self.made[found.key].sha256

    @invariant()
    def the_ledger_is_what_the_stores_hold(self) -> None:
        for table, store in self.stores.items():
            lines = [line for line in catalog.list_verifications() if line.store == table]
            assert {line.key for line in lines} <= self.there[table]
            assert sorted(map(proofs.proof_key, lines)) == sorted(proofs.list_proofs(store))

    @invariant()
    def nothing_is_left(self) -> None:
        assert not catalog.list_runs(state=State.RUNNING)
        assert not list(self.stores["store"].list("parts/"))
        assert not [path for path in self.folder.rglob("*") if path.name.startswith(".")]

    # -- helpers ---------------------------------------------------------------------------------------------------

    def sha256(self, table: str, key: str) -> str:
        return hashlib.sha256((self.folder / table / key).read_bytes()).hexdigest()

    def best(self, table: str) -> set[str]:
        """Return the newest archive of each component that is not known to be damaged, and the newest that was proven."""
        proofs_of = {key: standing().get((table, key)) for key in self.there[table]}
        whole = [key for key, proof in proofs_of.items() if proof is None or not proof.damaged]
        proven = [key for key in whole if (proof := proofs_of[key]) and proof.level != "exists"]
        return {
            max(having, key=self.created)
            for keys in (whole, proven)
            for component in self.settings.components
            if (having := [key for key in keys if component in self.made[key].contents])
        }

    def gone(self, table: str, *keys: str) -> None:
        self.there[table] -= set(keys)
        self.damaged -= {(table, key) for key in keys}

    @staticmethod
    def created(key: str) -> datetime:
        return datetime.strptime(archive.bare(key)[-15:] + "+0000", "%Y%m%d_%H%M%S%z")


def rows() -> dict[str, dict[str, str]]:
    """Return the digests of the archives in each store, as the catalogue has them."""
    return {
        "store": {row.key: row.sha256 for row in catalog.list_artifacts()},
        "offsite": {row.key: row.sha256 for row in catalog.list_copies()},
    }


def standing() -> dict[tuple[str, str], Proof]:
    return catalog.proofs(catalog.list_verifications())


def catalog_proven(table: str) -> set[str]:
    return {key for (where, key), proof in standing().items() if where == table and not proof.damaged}


def _die(_key: str) -> None:
    raise KeyboardInterrupt


class Last:
    """Draws the last that there is to choose from."""

    def __init__(self, table: str) -> None:
        self.table = table

    def draw(self, strategy: Any) -> Any:
        elements = list(strategy.elements)
        if isinstance(elements[0], tuple):
            return [place for place in elements if place[0] == self.table][-1]
        return elements[-1]


def each_thing_once() -> None:
    """Chance may leave something out of a small number of sequences."""
    machine = Sequences()
    main, second = Last("store"), Last("offsite")

    def step(happens: Callable[..., None], *values: Any, **named: Any) -> None:
        happens(*values, **named)
        machine.the_catalogue_lists_what_is_there()
        machine.nothing_looks_like_a_backup_that_is_none()
        machine.the_ledger_is_what_the_stores_hold()
        machine.nothing_is_left()

    try:
        machine.begin()
        step(machine.days_pass, 2, ["docs", "rules"])
        step(machine.verify, main, "restore")
        step(machine.verify, second, "structure")
        proven = max(machine.there["store"])
        step(machine.days_pass, 6, ["docs", "rules"])
        step(machine.prune)
        assert sum(key.startswith("full_system/") for key in machine.there["store"]) > 3
        step(machine.copy)
        assert sum(key.startswith("full_system/") for key in machine.there["offsite"]) == 2, (
            "proven, and newest"
        )
        step(machine.days_pass, 4, ["docs"])
        before = len(machine.there["store"])
        step(machine.prune_while_the_clock_is_wrong, -3)
        assert len(machine.there["store"]) == before
        step(machine.prune)
        assert proven in machine.there["store"]
        assert proven in machine.there["offsite"]
        assert len(machine.there["store"]) < before
        step(machine.rebuild, lose=True)
        for which in (main, second):
            step(machine.lose_a_record, which)
            step(machine.damage, which, 50)
            step(machine.restore, which)
            step(machine.verify, which, "checksum")
            step(machine.rebuild, lose=True)
            step(machine.delete, which)
        step(machine.back_up, ["docs", "rules"])
        step(machine.damage, second, 50)
        step(machine.verify, second, "checksum")
        step(machine.copy)
        assert not [place for place in machine.damaged if place[0] == "offsite"], "it was copied again"
        for steps in range(3):
            for which in (main, second):
                step(machine.back_up, ["rules"])
                step(machine.die_while_deleting, which, steps)
        step(machine.restore, main)
        step(machine.lose_the_main_store)
        step(machine.restore, second)
        step(machine.back_up, ["docs", "rules"])
        step(machine.delete, second)
    finally:
        machine.teardown()


def main() -> None:
    # Durability against a power cut would only slow this down.
    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    with (
        mock.patch.object(os, "fsync"),
        in_this_process(),
        mock.patch.object(offsite.copy_offsite, "delay", offsite.copy_offsite.run),
    ):
        each_thing_once()
        run_state_machine_as_test(Sequences, settings=PROFILE)
    print("sound")


if __name__ == "__main__":
    main()
