"""A running backup system under test: what is done to it, and what its catalogue, its store and its processes show."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from compose.demo.cluster import Cluster
from compose.demo.embedded_daemon import wait_until
from compose.demo.settings import BROKER_PASSWORD
from workers.runtime import MARKER, marker

BOUND = 90
"""Seconds after which a run that has not ended hangs."""


__all__ = ["System", "environment_of", "name_of", "processes_with", "wait_until"]


@dataclass(frozen=True)
class System:
    """A running backup system; what it did is read from its catalogue and its store."""

    cluster: Cluster
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def ensure_workers(self, *names: str) -> None:
        """Start those workers that are not running."""
        for name in names:
            if not self.cluster.runs(name):
                self.start_worker(name)

    def start_worker(self, host: str) -> None:
        """Start (again) the worker of a host, or of ``control``."""
        self.cluster.start_worker(host, host if host == "control" else f"host.{host}")

    def backup(self, *components: str) -> str:
        """Start a backup, by default of the full system, and return the id of its run."""
        return str(self.call("tasks.backup.backup_full_system", list(components) or None))

    def call(self, task: str, *args: Any, **kwargs: Any) -> Any:
        """Let a control worker do a task, as ``task.delay`` would, and return what it returned."""
        with self.client() as app, redis.Redis.from_url(self._broker_url, decode_responses=True) as broker:
            key = f"celery-task-meta-{app.send_task(task, args, kwargs, queue='control').id}"
            assert wait_until(lambda: '"SUCCESS"' in (broker.get(key) or ""), timeout=30), broker.get(key)
            return json.loads(str(broker.get(key)))["result"]

    def client(self) -> Celery:
        """Return a Celery application of this process on the same broker; close it."""
        return Celery("test", broker=self._broker_url, set_as_current=False)

    @property
    def _broker_url(self) -> str:
        password, port = self.cluster.environment[BROKER_PASSWORD], self.cluster.broker.port
        return f"redis://:{password}@127.0.0.1:{port}/0"

    def cli(self, *words: str, status: int = 0) -> Any:
        """Run ``ai-micro-backup`` with ``--json`` and return what it printed."""
        done = self.cluster.run("ai-micro-backup", *words, "--json", timeout=BOUND)
        assert done.returncode == status, done.stderr + done.stdout
        return json.loads(done.stdout)

    def ended(self, run_id: str, *, within: float = BOUND) -> dict[str, Any]:
        """Wait until a run has ended and return how it did, as ``ai-micro-backup show`` says. Fails when it hangs."""
        if not wait_until(
            lambda: self.query("SELECT state FROM run WHERE id = ?", run_id) != [("RUNNING",)], timeout=within
        ):
            pytest.fail(f"run {run_id} has not ended within {within:g} s: {self.cli('show', run_id)}")
        document: dict[str, Any] = self.cli("show", run_id)
        return document

    def complete(self, *components: str) -> dict[str, Any]:
        """Make a backup and return its run, which is complete and whose archive is there."""
        run = self.ended(self.backup(*components))
        assert run["state"] == "complete", run
        assert (self.store / run["archive"]).is_file()
        return run

    def step(self, run_id: str, name: str) -> tuple[str, int]:
        """Return the id and the attempt of the newest task of a step of a run."""
        rows = self.query(
            "SELECT task_id, attempt FROM step WHERE run_id = ? AND name = ? ORDER BY sent DESC", run_id, name
        )
        return rows[0] if rows else ("", 0)

    def query(self, sql: str, *values: Any) -> list[Any]:
        """Ask the catalogue's database."""
        with closing(sqlite3.connect(self.folder / "catalog.sqlite", timeout=30)) as database:
            return database.execute(sql, values).fetchall()

    def children(self, component: str, program: str = "") -> list[int]:
        """Return the processes that run for a component now, of one program or of all."""
        mark = f"{MARKER}={marker(component, self.cluster.config)}"
        return [
            pid
            for pid in processes_with(mark)
            if f"AI_MICRO_BACKUP_CONFIG={self.cluster.config}" in environment_of(pid)
            and (not program or name_of(pid) == program)
        ]

    def wait_for_child(self, component: str, program: str, *, within: float = 30) -> int:
        """Return a running process of a component as soon as there is one."""
        assert wait_until(lambda: bool(self.children(component, program)), timeout=within), program
        return self.children(component, program)[0]

    def unfinished(self, below: str = "") -> dict[Path, int]:
        """Return the files of objects that are not committed, with their sizes so far."""
        return {path: path.stat().st_size for path in (self.store / below).rglob(".incoming-*")}

    def objects(self, below: str = "") -> list[str]:
        """Return the names of all files in the store, those of unfinished objects as well."""
        folder = self.store / below
        return sorted(str(path.relative_to(self.store)) for path in folder.rglob("*") if path.is_file())

    def log(self, name: str) -> str:
        return self.cluster.log(name).read_text(errors="replace")


def processes_with(mark: str) -> list[int]:
    """Return the live processes that carry ``mark`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if mark in environment_of(pid) and state_of(pid) != "Z":
            found.append(pid)
    return found


def environment_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
