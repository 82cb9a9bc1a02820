"""WAL and recoveries by real workers, with PostgreSQL 15, 17 and 18 side by side: what is lost is named, a new base backup
follows by itself, and a server comes back to a moment.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import pytest

from tasks.components.postgres_archiving import archive_command
from tasks.components.postgres_incremental import MAJOR
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import System, wait_until

ARCHIVING = {"archive_mode": "on", "archive_command": archive_command("{archive}"), "autovacuum": "off"}
MAJORS = (15, 17, 18)

HELD = """
if [ -e "$0/hold" ]; then
  : >"$0/reached.$$"
  while [ -e "$0/reached.$$" ]; do sleep 0.05; done
  exit 1
fi
exec "$@"
"""

Servers = Mapping[str, Postgres]


@dataclass(frozen=True)
class Gate:
    """Holds the command that starts a server, and then lets it fail."""

    folder: Path

    def command(self, start: list[str]) -> list[str]:
        return ["sh", "-c", HELD, str(self.folder), *start]

    def close(self) -> None:
        (self.folder / "hold").touch()

    def open(self) -> None:
        (self.folder / "hold").unlink()

    def held(self) -> bool:
        return any(self.folder.glob("reached.*"))

    def fail(self) -> None:
        """Let what is held end without a start."""
        (held,) = self.folder.glob("reached.*")
        held.unlink()


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """The servers by the names of their components."""
    # The recovering server runs as the data folder's owner, who may not enter this process's own folders.
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        yield {
            f"db{major}": stack.enter_context(
                postgres_server(
                    major,
                    folder / str(major),
                    settings=ARCHIVING | ({"summarize_wal": "on"} if major >= MAJOR else {}),
                )
            )
            for major in MAJORS
        }
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """In front of the start of ``db18``."""
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], servers: Servers, gate: Gate) -> System:
    components = ""
    for name, server in servers.items():
        table = {**server.settings(), **server.control(), "wal_archive": str(server.archive)}
        if name == "db18":
            table["start"] = gate.command(table["start"])
        password = dumps(table.pop("password")["file"])
        lines = "".join(f"{key} = {dumps(value)}\n" for key, value in table.items() if key != "name")
        components += f"[components.{name}]\n{lines}password = {{ file = {password} }}\n"
    return cluster_factory(components, workers=("control", "db1"), beat=False)


def collect(system: System, *, status: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = system.cli("collect", status=status)
    return document


def write(servers: Servers) -> dict[str, str]:
    """Commit something on each server, close the segment and return its name."""
    names = {}
    for name, server in servers.items():
        server.execute(
            "CREATE TABLE IF NOT EXISTS written (t text); INSERT INTO written VALUES (now()::text)"
        )
        names[name] = str(
            server.rows("SELECT pg_walfile_name(pg_current_wal_insert_lsn()), pg_switch_wal()")[0][0]
        )
    return names


def recoverable(system: System) -> dict[str, dict[str, Any]]:
    return {one["component"]: one for one in system.cli("status", status=5)["recoverable"]}


def base_backups(system: System, count: int) -> None:
    """Wait until so many base backups of each server are complete and none is running."""

    def states() -> list[Any]:
        return system.query("SELECT state, options FROM run WHERE kind = 'BACKUP' ORDER BY id")

    expected = [("COMPLETE", '{"base": "full"}')] * count * len(MAJORS)
    assert wait_until(lambda: states() == expected, timeout=120), states()


def test_removed_segment_is_named_and_a_new_base_backup_follows(system: System, servers: Servers) -> None:
    for found in system.cli("preflight", *servers).values():
        assert [finding for finding in found if not finding["advice"]] == []
    write(servers)
    assert all(one["files"] >= 2 for one in collect(system)["outcome"].values())
    base_backups(system, 1)  # the first WAL chain had none
    write(servers)
    assert not any("base_backup" in one for one in collect(system)["outcome"].values())
    before = recoverable(system)
    assert list(before) == list(servers)
    for one in before.values():
        assert one["gaps"] == []
        assert one["late"] is False
        assert one["target_seconds"] == 6 * 3600

    lost = write(servers)
    for name, server in servers.items():
        archived = server.archive / lost[name]
        assert wait_until(archived.exists, timeout=60)
        archived.unlink()
    write(servers)
    found = collect(system, status=1)
    assert found["state"] == "failed"
    for name, segment in lost.items():
        assert f"{name}: not recoverable from " in found["cause"]
        assert f"{segment} is missing" in found["cause"]
    base_backups(system, 2)

    write(servers)
    healed = collect(system)["outcome"]
    base_backups(system, 2)  # one is enough
    after = recoverable(system)
    said = system.cluster.run("ai-micro-backup", "status", timeout=60).stdout
    for name, segment in lost.items():
        assert f"{segment} is missing" in healed[name]["gaps"][0], "the gap stays one"
        (gap,) = after[name]["gaps"]
        assert (gap["missing"], gap["start"]) == ([segment], before[name]["newest"])
        assert [one["start"] for one in after[name]["ranges"]][-1] == gap["end"]
        assert after[name]["newest"] == healed[name]["collection"]["taken"].replace("Z", "+00:00")
        assert f"{segment} is missing" in said
    assert "newest recoverable point" in said


def test_killed_workers_leave_the_server_as_it_was(system: System, servers: Servers, gate: Gate) -> None:
    server = servers["db18"]
    before = server.rows("SELECT t FROM written ORDER BY 1")

    def watched(condition: Callable[[], bool]) -> None:
        """Wait until something is so, with a watchdog that looks all the time."""

        def look() -> bool:
            with system.client() as app:
                app.send_task("tasks.watchdog.watch", queue="control")
            return wait_until(condition, timeout=1)

        assert wait_until(look, timeout=90), system.cli("show", run_id)

    def kill_worker() -> None:
        system.cluster.kill("db1")
        if gate.held():
            gate.fail()  # it ends with its worker
        system.start_worker("db1")

    run_id = system.call("tasks.recover.recover_component", "db18", options={"latest": True}, confirm="db18")
    system.wait_for_child("db18", "postgres")  # the one that recovers
    kill_worker()
    gate.close()
    watched(gate.held)
    assert not (server.data_dir / "postmaster.pid").exists(), "the swap has stopped the server"
    kill_worker()
    watched(gate.held)
    gate.fail()  # so that all has to be put back
    watched(lambda: system.query("SELECT phase FROM run WHERE id = ?", run_id) == [("abort-revert",)])
    watched(gate.held)
    kill_worker()
    gate.open()
    watched(lambda: system.query("SELECT state FROM run WHERE id = ?", run_id) == [("FAILED",)])

    assert server.rows("SELECT t FROM written ORDER BY 1") == before
    assert server.rows("SELECT timeline_id FROM pg_control_checkpoint()") == [(1,)]
    assert not list(server.data_dir.glob(".ai-micro-backup*"))
    steps = system.cli("show", run_id)["steps"]
    attempts = {step["phase"]: step["attempt"] for step in steps if step["name"] == "db18"}
    assert (attempts["stage"], attempts["swap"], attempts["abort-revert"]) == (2, 2, 2)


def test_recover_brings_back_the_moment_and_says_so(system: System, servers: Servers) -> None:
    server = servers["db18"]
    server.execute("CREATE TABLE notes AS SELECT 'kept' AS t")
    moment = server.rows("SELECT clock_timestamp()")[0][0].isoformat()
    server.execute("INSERT INTO notes VALUES ('too late')")
    system.cli("collect", "db18")

    refused = system.cluster.run("ai-micro-backup", "recover", "db18", "--to-time", moment, timeout=60)
    assert refused.returncode == 3, "it is not confirmed"
    for words, said in {
        ("--to-time", moment.replace("+00:00", "").partition("+")[0]): "has no zone",
        ("--to-time", "2020-01-01T00:00:00Z"): "possible is 20",
        ("--to-lsn", "FF/0"): "possible is 20",
    }.items():
        refused = system.cluster.run("ai-micro-backup", "recover", "db18", *words, timeout=60)
        assert refused.returncode != 0
        assert said in " ".join(refused.stderr.split()), refused.stderr
    (line,) = system.cli("recover", "db18", "--to-time", moment, "--plan")["outcome"]["overwrites"]
    assert f"in {server.data_dir}, would be replaced" in line
    assert len(server.rows("SELECT t FROM notes")) == 2

    run = system.cli("recover", "db18", "--to-time", moment, "--confirm", "db18")
    assert run["state"] == "complete"
    assert server.rows("SELECT t FROM notes ORDER BY 1") == [("kept",)]
    reached = run["outcome"]["reached"]
    assert reached["timeline"] == 2
    assert reached["stopped"].startswith("recovery stopping before commit of transaction")

    server.execute("INSERT INTO notes VALUES ('on the new timeline')")
    scratch = server.data_dir.parent / "scratch"
    system.cli("collect", "db18")
    run = system.cli("recover", "db18", "--latest", "--into", str(scratch))
    assert str(scratch) in run["outcome"]["start"]
    assert (scratch / "PG_VERSION").exists()
    assert "archive_mode = off" in (scratch / "postgresql.auto.conf").read_text()
    assert len(server.rows("SELECT t FROM notes")) == 2


def test_an_increment_is_rehearsed_and_restored_with_what_it_needs(system: System, servers: Servers) -> None:
    server = servers["db18"]
    full = system.cli("backup", "db18", "--base", "full")["archive"]
    server.execute("INSERT INTO notes VALUES ('in the increment')")
    child = system.cli("backup", "db18", "--base", "incremental")["archive"]
    (part,) = system.cli("show", child)["parts"]
    assert (part["holds"]["base"], part["holds"]["needs"]) == ("incremental", [full])
    held = server.rows("SELECT t FROM notes ORDER BY 1")

    proven = system.cli("verify", child, "--level", "restore")["outcome"]["restore"]["db18"]
    assert proven["base_backups"] == 2
    assert system.cli("show", child)["proof"]["level"] == "restore"
    assert server.rows("SELECT t FROM notes ORDER BY 1") == held
    assert not list(server.data_dir.glob(".ai-micro-backup*"))

    refused = system.cluster.run("ai-micro-backup", "delete", full, "--confirm", full, timeout=60)
    assert refused.returncode != 0
    assert f"is needed by {child}" in " ".join(refused.stderr.split())
    stored = system.store / full
    away = stored.rename(f"{stored}.away")
    lacking = system.cli("verify", child, "--level", "exists", status=1)
    assert f"cannot be restored without {full}" in lacking["cause"]
    lacking = system.cli("restore", child, "--component", "db18", "--confirm", "db18", status=1)
    assert f"cannot be restored without {full}" in lacking["cause"]
    away.rename(stored)

    server.execute("DROP TABLE notes")
    run = system.cli("restore", child, "--component", "db18", "--confirm", "db18")
    assert run["state"] == "complete"
    assert server.rows("SELECT t FROM notes ORDER BY 1") == held
