"""Puts one fault into one call of a store, at every position of each kind of run, in turn.

Run as a program with the settings of `AI_MICRO_BACKUP_CONFIG`: prints a JSON line for each position.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from sqlalchemy import Engine, event

from tests.storage_invariants import UNMET, unmet, wrong
from tests.storage_world import FOREIGN, NEW, WAL, World, in_this_process
from workers import catalog
from workers.catalog import State
from workers.errors import StoreUnavailable
from workers.storage import local
from workers.storage.local import LocalStore

FAULTS = {
    "put": ("before", "after", "full"),
    "get": ("broken", "short"),
    "list": ("broken", "short"),
    "stat": ("before",),
    "delete": ("before", "after"),
}
REAL: dict[str, Any] = {name: getattr(LocalStore, name) for name in FAULTS}


@dataclass
class Fault:
    """The one fault of a turn: at which call, and of which kind; and the calls that were made."""

    position: int = -1
    kind: str = ""
    """One of those that the call can have; by default it follows from the position."""
    calls: list[str] = field(default_factory=list)
    watching: bool = False
    """Whether calls count now: those of a stage do, those of the checks after it do not."""
    within: list[str] = field(default_factory=list)
    """Keys that a put or a list is at: a stat of them is its own."""

    def due(self, call: str) -> str:
        if not self.watching:
            return ""
        self.calls.append(call)
        if len(self.calls) - 1 != self.position:
            return ""
        kinds = FAULTS[call.split(maxsplit=1)[0]]
        self.kind = self.kind or kinds[self.position % len(kinds)]
        return self.kind


FAULT = Fault()


def put(self: LocalStore, key: str, chunks: Any, **how: Any) -> Any:
    kind = FAULT.due(f"put {key}")
    if kind == "before":
        raise StoreUnavailable("injected before")
    if kind == "full":
        with full_disk():
            return REAL["put"](self, key, chunks, **how)
    FAULT.within.append(key)
    try:
        done = REAL["put"](self, key, chunks, **how)
    finally:
        FAULT.within.remove(key)
    if kind == "after":
        raise StoreUnavailable("injected after")
    return done


def delete_(self: LocalStore, key: str) -> None:
    kind = FAULT.due(f"delete {key}")
    if kind == "before":
        raise StoreUnavailable("injected before")
    REAL["delete"](self, key)
    if kind == "after":
        raise StoreUnavailable("injected after")


def stat(self: LocalStore, key: str) -> Any:
    if key not in FAULT.within and FAULT.due(f"stat {key}"):
        raise StoreUnavailable("injected before")
    return REAL["stat"](self, key)


def reading(name: str) -> Callable[..., Iterator[Any]]:
    def read(self: LocalStore, key: str, **how: Any) -> Iterator[Any]:
        kind = FAULT.due(f"{name} {key}")
        found = _looked_up(REAL[name](self, key, **how))
        if kind:
            items = list(found)
            yield from (
                (item[: len(item) // 2] for item in items[:1]) if name == "get" else items[: len(items) // 2]
            )
            if kind == "broken":
                raise StoreUnavailable("injected in the middle")
            return
        yield from found

    return read


def _looked_up(items: Iterator[Any]) -> Iterator[Any]:
    """Yield what a store reads, and count none of the calls that it makes of itself for that."""
    while True:
        watching, FAULT.watching = FAULT.watching, False
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            FAULT.watching = watching
        yield item


@contextmanager
def full_disk() -> Iterator[None]:
    def write(descriptor: int, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(local, "_write_all", write):
        yield


def attempt(world: World, stage: str) -> tuple[str, list[str]]:
    """Do a stage; return how it ended (``complete``, or what somebody was told) and what contradicts that."""
    FAULT.watching = True
    try:
        run = catalog.get_run(getattr(world, stage)())
    except Exception as error:  # noqa: BLE001 - whatever its caller would see
        FAULT.watching = False
        return f"raised {error!r}", wrong(world)
    finally:
        FAULT.watching = False
    if run.state is State.RUNNING:
        return "hangs", ["the run has not ended"]
    if run.state is State.FAILED:
        return f"failed: {run.cause}", wrong(world) + ([] if run.cause else ["failed without a cause"])
    # Nobody can tell that a list was cut short; then less may be done, but nothing wrong.
    cut = FAULT.position >= 0 and FAULT.kind == "short" and FAULT.calls[FAULT.position].startswith("list ")
    # What could not be read is named there, and the run goes on with the rest.
    said = [line for step in run.outcome.values() if isinstance(step, dict) for line in _said(step)]
    excused = FAULT.position >= 0 and (cut or said)
    return "complete", wrong(world, cut=cut) + ([] if excused else unmet(world, stage, run))


def _said(outcome: dict[str, Any]) -> list[str]:
    return [*outcome.get("notes", ()), *outcome.get("refused", {}).values()]


SEEN: Counter[str] = Counter()
"""How often each kind of call, whatever its archive and run, had its turn."""


def kinds_of(calls: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield, for each call, the faults to try there: all at the first of its kind in any stage, then one after the other."""
    for call in calls:
        alike, kinds = re.sub(r"[0-9A-F]*[0-9][0-9A-Fa-f]*", "#", call), FAULTS[call.split()[0]]
        yield [kinds[(SEEN[alike] - 1) % len(kinds)]] if SEEN[alike] else kinds
        SEEN[alike] += 1


def sweep(world: World, stage: str) -> Iterator[dict[str, Any]]:
    """Yield what came of each fault of a stage that begins as the world is now; it ends as after the stage."""
    saved = world.save()
    FAULT.calls = []
    outcome, faults = attempt(world, stage)
    yield {"stage": stage, "call": "", "kind": "none", "outcome": outcome, "wrong": faults}
    done, calls = world.save(), list(FAULT.calls)
    for position, kinds in enumerate(kinds_of(calls)):
        call = calls[position]
        for kind in kinds:
            world.load(saved)
            FAULT.position, FAULT.kind, FAULT.calls = position, kind, []
            outcome, faults = attempt(world, stage)
            FAULT.position = -1
            again, still = attempt(world, stage)
            if again != "complete":
                still.append(f"the next run: {again}")
            yield {
                "stage": stage,
                "call": call,
                "kind": kind,
                "outcome": outcome,
                "wrong": [*faults, *(f"after the next run: {line}" for line in still)],
            }
    world.load(done)


@contextmanager
def installed() -> Iterator[None]:
    """Let all local stores of this process count their calls, and have the fault."""
    doubles = {"put": put, "delete": delete_, "stat": stat, "get": reading("get"), "list": reading("list")}
    with pytest.MonkeyPatch.context() as patch:
        for name, double in doubles.items():
            patch.setattr(LocalStore, name, double)
        yield


def main() -> None:
    # Durability against a power cut would only slow this down.
    event.listen(Engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    with mock.patch.object(os, "fsync"), in_this_process(), installed():
        world = World()
        world.backup()
        world.backup()
        world.copy()
        for key, content in WAL.items():
            world.stores["store"].put(key, [content])
        for stage in UNMET:
            if stage == "take_in":
                world.stores["store"].put(FOREIGN, [NEW])
            for line in sweep(world, stage):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
