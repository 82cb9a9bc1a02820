"""A small demo system with a backup system beside it and one full backup: what the tests of restores share."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg

from compose.demo.cluster import Cluster
from compose.demo.embedded_system import EmbeddedSystem
from compose.demo.fingerprint import Fingerprint, diff
from compose.demo.settings import POSTGRES_PASSWORD, REDIS_PASSWORD, embedded_components
from tests.systems import BOUND, System, wait_until

SIZE = 3
HELD_PROGRAM = """\
#!/bin/sh
if [ -e {hold} ]; then
  case "$*" in
    *"$(cat {hold})"*)
      : >{reached}.$$
      while [ -e {hold} ]; do sleep 0.05; done
      ;;
  esac
fi
exec /bin/mv "$@"
"""


class Gate:
    """One more service of the system, stopped last: its health is what the test says.

    While `holding` is armed, its stop command makes the workers' ``mv`` wait when its arguments hold a given text.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.healthy = threading.Event()
        self.healthy.set()
        self._running, self._armed, self._hold = folder / "running", folder / "armed", folder / "hold"
        self._reached = folder / "reached"
        self._running.touch()
        self.programs = folder / "bin"
        self.programs.mkdir()
        move = self.programs / "mv"
        move.write_text(HELD_PROGRAM.format(hold=self._hold, reached=self._reached))
        move.chmod(0o755)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Health, self.healthy))
        threading.Thread(target=self._server.serve_forever, name="gate", daemon=True).start()

    @property
    def toml(self) -> str:
        stop = f"rm -f {self._running}; [ ! -e {self._armed} ] || mv {self._armed} {self._hold}"
        return f"""
[[services]]
name = "gate"
host = "app1"
health = "http://127.0.0.1:{self._server.server_port}/health"
start = ["touch", {json.dumps(str(self._running))}]
stop = ["sh", "-c", {json.dumps(stop)}]
status = ["test", "-e", {json.dumps(str(self._running))}]
"""

    @contextmanager
    def holding(self, text: str) -> Iterator[None]:
        self.release()
        self._armed.write_text(text)
        try:
            yield
        finally:
            self.release()

    def reached(self, *, within: float = 30) -> bool:
        """Whether something waits, soon."""
        return wait_until(lambda: any(self._reached.parent.glob("reached.*")), timeout=within)

    def release(self) -> None:
        for path in (self._armed, self._hold, *self._reached.parent.glob("reached.*")):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Health(BaseHTTPRequestHandler):
    def __init__(self, healthy: threading.Event, *request: Any) -> None:
        self._healthy = healthy
        super().__init__(*request)

    def do_GET(self) -> None:
        self.send_response(200 if self._healthy.is_set() else 503)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@dataclass
class Rehearsal:
    """The demo system, the backup system, and the archive of the first as it was."""

    demo: EmbeddedSystem
    system: System
    gate: Gate
    archive: str
    """Its file name."""
    before: Fingerprint

    @property
    def cluster(self) -> Cluster:
        return self.system.cluster

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.run("ai-micro-backup", *words, timeout=BOUND)

    def restore(self, *words: str, archive: str = "", status: int = 0) -> dict[str, Any]:
        """Restore, wait for the end, and return the run."""
        words = words or ("--confirm", "ai-micro-service")
        document: dict[str, Any] = self.system.cli("restore", archive or self.archive, *words, status=status)
        return document

    def start_restore(self) -> str:
        """Queue a full restore and return its run's id at once."""
        return str(self.restore("--confirm", "ai-micro-service", "--no-wait")["id"])

    def differences(self) -> list[str]:
        """What differs now from what the archive was made of."""
        return diff(self.before, self.demo.fingerprint())

    def pids(self) -> dict[str, int | None]:
        return {name: service.pid() for name, service in self.demo.services.items()}

    def phase(self, run_id: str) -> str:
        return str(self.system.query("SELECT phase FROM run WHERE id = ?", run_id)[0][0])

    def leftovers(self) -> list[str]:
        """What a restore keeps while it runs: folders beside the data, databases beside the live ones."""
        found = [str(path) for path in self.demo.root.rglob(".ai-micro-backup-*")]
        with psycopg.connect(self.demo.admin_dsn, autocommit=True) as connection:
            names = [row[0] for row in connection.execute("SELECT datname FROM pg_database")]
        return found + [name for name in names if "__restore_" in name or "__before_" in name]

    def kill_hosts(self) -> None:
        for host in ("db1", "app1"):
            self.cluster.kill(host)

    def start_hosts(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.system.start_worker, ("db1", "app1")))


@contextmanager
def rehearsal(factory: Callable[..., System], folder: Path, *, absent_host: float = 8) -> Iterator[Rehearsal]:
    """A seeded system and its full backup; ``absent_host`` is the limit of that name."""
    demo, gate = EmbeddedSystem(folder / "demo"), Gate(folder / "gate")
    environment = {
        POSTGRES_PASSWORD: demo.passwords.postgres_password,
        REDIS_PASSWORD: demo.passwords.redis_password,
    }
    try:
        demo.up()
        demo.seed(SIZE)
        demo.wait_healthy()
        system = factory(
            embedded_components(demo) + gate.toml,
            environment=environment,
            limits={"health": 12, "absent_host": absent_host},
            schedule="config_watch_seconds = 3600",
            workers=("control",),
        )
        paths = system.cluster.environment
        paths["PATH"] = f"{gate.programs}:{paths['PATH']}"
        found = Rehearsal(demo, system, gate, "", demo.fingerprint())
        found.start_hosts()
        found.archive = Path(system.complete()["archive"]).name
        yield found
    finally:
        demo.down()
        gate.close()
