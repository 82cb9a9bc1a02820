"""WAL of real servers: what a collection stores, refuses and leaves, and how a gap shows."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from pyrage import x25519

from tasks import collecting
from tasks.components.postgres import Component
from tasks.components.postgres_archiving import WalArchive, archive_command
from tasks.components.postgres_segments import Segment, format_lsn, parse_lsn
from tasks.components.postgres_wal import BaseBackup, Wal, list_collections, list_wal, missing, read_wal
from tasks.recoverable import Recoverable, examine
from tests.configured import configured, write_settings
from tests.postgres_servers import Postgres, postgres_server
from tests.storage_faults import FAULT, installed
from tests.systems import wait_until
from workers.errors import BackupError, IntegrityError, LeaseLost, Permanent
from workers.locks import Lease
from workers.progress import Item
from workers.storage import Store
from workers.storage.local import LocalStore

ARCHIVING = {
    "archive_mode": "on",
    "archive_command": archive_command("{archive}"),
    "autovacuum": "off",  # its commits would be new WAL
}
SIZE = 16 << 20


class Held:
    """A lease that is held, or lost."""

    def __init__(self, *, lost: bool = False) -> None:
        self.lost = lost

    def check(self) -> None:
        if self.lost:
            raise LeaseLost("lost")


class Collector:
    """One server, its component, and a store of the test's own."""

    def __init__(self, server: Postgres, store: Path) -> None:
        self.server, self.store = server, cast("Store", LocalStore(store))
        self.runs = 0
        settings = {**server.settings(), "wal_archive": str(server.archive), "wal_timeout": 60}
        self.component = Component.model_validate(settings)
        self.system = str(server.rows("SELECT system_identifier FROM pg_control_system()")[0][0])

    def collect(self, *, lost: bool = False, **changed: Any) -> dict[str, Any]:
        self.runs += 1
        component = self.component.model_copy(update=changed)
        lease = cast("Lease", Held(lost=lost))
        return collecting.collect(f"20261122_02{self.runs:04}", component, lease, Item("WAL"))

    def write(self, *, switch: bool = True) -> int:
        """Commit something and return the position after it."""
        self.server.execute(
            "CREATE TABLE IF NOT EXISTS notes (t text); INSERT INTO notes VALUES (now()::text)"
        )
        lsn = parse_lsn(str(self.server.rows("SELECT pg_current_wal_insert_lsn()")[0][0]))
        if switch:
            self.server.rows("SELECT pg_switch_wal()")
        return lsn

    def archived(self, name: str) -> Path:
        """Wait for a segment in the server's folder."""
        path = self.server.archive / name
        assert wait_until(path.exists, timeout=60), self.server.log()[-2000:]
        return path

    def in_folder(self) -> list[str]:
        return sorted(path.name for path in self.server.archive.iterdir())

    def component_archive(self) -> dict[str, int]:
        """What a collection would take."""
        return WalArchive(self.component.wal_server().runtime, str(self.server.archive)).sizes()

    @property
    def wal(self) -> Wal:
        return list_wal(self.store, "pg", self.system)

    def examine(self, *bases: BaseBackup) -> Recoverable:
        return examine(self.wal, list_collections(self.store, "pg", self.system), bases)

    def base(self, lsn: int) -> BaseBackup:
        """A base backup as if one had been made at ``lsn`` just now."""
        return BaseBackup("base", self.system, 1, lsn, lsn, datetime.now(UTC))


def segment_of(lsn: int) -> str:
    return Segment(1, lsn // SIZE).name(SIZE)


@pytest.fixture(scope="module", params=[15, 17, 18])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres_server(request.param, tmp_path_factory.mktemp("pg"), settings=ARCHIVING) as started:
        yield started


@pytest.fixture
def collector(server: Postgres, tmp_path: Path) -> Iterator[Collector]:
    with configured(write_settings(tmp_path)):
        yield Collector(server, tmp_path / "store")


def test_collection_holds_every_commit_and_empties_the_folder(collector: Collector) -> None:
    written = collector.write()
    done = collector.collect()
    record = list_collections(collector.store, "pg", collector.system)[-1]
    assert done["files"] >= 2
    assert done["troubles"] == []
    assert record.end >= written
    assert collector.in_folder() == []
    assert missing(collector.wal, 1, written, record.end) == []
    file = collector.wal.files[record.last]
    plain = b"".join(read_wal(collector.store, file.key))
    assert (len(plain), hashlib.sha256(plain).hexdigest()) == (SIZE, file.sha256)
    archived = collector.server.archive / record.last
    archived.write_bytes(plain)
    start = format_lsn(Segment.parse(record.last, SIZE).number * SIZE)
    options = ("--rmgr=Transaction", f"--start={start}", f"--end={record.lsn}", f"--path={archived.parent}")
    assert b"COMMIT" in collector.server.program("pg_waldump", *options), "our own transaction marks the time"
    archived.unlink()


def test_server_that_archives_has_nothing_to_change(collector: Collector) -> None:
    collector.write()
    collector.collect()
    found = [finding for finding in collector.component.preflight() if not finding.advice]
    assert found == []


def test_idle_server_closes_no_segments_and_its_newest_point_goes_on(collector: Collector) -> None:
    collector.write()
    collector.collect()
    # A checkpoint and the notes of running transactions may follow what was committed.
    assert any(collector.collect()["files"] == 0 for _ in range(6))
    last, newest = list_collections(collector.store, "pg", collector.system)[-2:]
    assert (newest.lsn, newest.last, newest.marked) == (last.lsn, last.last, last.marked)
    assert newest.taken > last.taken >= last.marked
    assert collector.examine(collector.base(0)).newest is not None
    collector.server.rows("SELECT pg_create_restore_point('before the upgrade')")
    assert collector.collect()["files"] == 1, "a restore point is worth a segment"


def test_removed_segment_is_named_and_the_times_are_those_of_the_collections(collector: Collector) -> None:
    before = collector.write()
    collector.collect()
    base = collector.base(before)
    assert collector.examine(base).needs_base is False
    lost = segment_of(collector.write())
    collector.write()
    collector.archived(lost).unlink()
    collector.collect()

    found = collector.examine(base)
    records = list_collections(collector.store, "pg", collector.system)
    assert [gap.missing for gap in found.gaps] == [(lost,)]
    assert found.needs_base
    assert found.gaps[0].end is None
    assert str(found.gaps[0]).startswith("not recoverable from ")
    assert lost in str(found.gaps[0])
    after = replace(collector.base(records[-1].end), finished=datetime.now(UTC) + timedelta(hours=1))
    healed = collector.examine(base, after)
    assert (healed.gaps[0].missing, healed.gaps[0].end) == ((lost,), after.finished)
    assert healed.needs_base is False
    assert healed.newest == after.finished


def test_other_content_under_a_stored_name_is_refused(collector: Collector) -> None:
    name = segment_of(collector.write())
    collector.collect()
    stored = collector.wal.files[name]
    twin = b"".join(read_wal(collector.store, stored.key))
    path = collector.server.archive / name
    path.write_bytes(twin)
    collector.collect()
    assert not path.exists(), "a twin is no trouble"

    path.write_bytes(twin[:-1] + b"x")
    with pytest.raises(Permanent, match=rf"{name} is not what is stored under this name"):
        collector.collect()
    assert path.exists()
    path.unlink()
    assert collector.wal.files[name] == stored
    collector.collect()


def test_segment_that_is_not_what_its_name_says_is_refused(collector: Collector) -> None:
    number = collector.write() // SIZE
    name, wrong = Segment(1, number).name(SIZE), Segment(1, number + 1000).name(SIZE)
    plain = collector.archived(name).read_bytes()
    path = collector.server.archive / wrong
    at = (number + 1000) * SIZE
    moved = plain[:8] + at.to_bytes(8, "little") + plain[16:]
    foreign = moved[:24] + (7).to_bytes(8, "little") + moved[32:]
    older = b"\x13\xd1" + moved[2:] if not moved.startswith(b"\x13\xd1") else b"\x16\xd1" + moved[2:]
    for content, fault in (
        (plain, "another part of the log"),
        (foreign, "is of the system 7,"),
        (older, f"not written by PostgreSQL {collector.server.major}"),
        (moved[:4] + (2).to_bytes(4, "little") + moved[8:], "is of timeline 2"),
        (bytes(SIZE), "is not what its name says"),
    ):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=fault):
            collector.collect()
        assert path.exists()
        assert wrong not in collector.wal.files
        assert name in collector.wal.files, "what comes before it is stored"
    path.write_bytes(moved[:100])
    with pytest.raises(Permanent, match="is not in"):
        collector.collect(wal_timeout=0.1)
    path.unlink()


def test_lost_lease_commits_nothing_and_removes_nothing(collector: Collector) -> None:
    name = segment_of(collector.write())
    path = collector.archived(name)
    with pytest.raises(LeaseLost):
        collector.collect(lost=True)
    assert path.exists()
    assert list(collector.store.list("")) == []
    collector.collect()
    assert name in collector.wal.files
    assert not path.exists()


@pytest.mark.parametrize("server", [18], indirect=True)
def test_one_fault_at_any_storage_call_is_loud_and_the_next_collection_has_every_commit(
    collector: Collector,
) -> None:
    collector.collect()
    looked_at: set[str] = set()
    with installed():
        for position in range(50):
            written, said = collector.write(), None
            FAULT.position, FAULT.kind, FAULT.calls, FAULT.watching = position, "", [], True
            try:
                collector.collect()
            except BackupError as error:
                said = error
            FAULT.watching = False
            if len(FAULT.calls) <= position:
                break
            assert said or FAULT.kind == "short", FAULT.calls[position]
            records = list_collections(collector.store, "pg", collector.system)
            assert {record.last for record in records} <= collector.wal.files.keys()
            for file in collector.wal.files.keys() - looked_at:
                plain = b"".join(read_wal(collector.store, collector.wal.files[file].key))
                assert hashlib.sha256(plain).hexdigest() == collector.wal.files[file].sha256
                looked_at.add(file)

            collector.collect()
            newest = list_collections(collector.store, "pg", collector.system)[-1]
            assert missing(collector.wal, 1, written, newest.end) == []
            assert collector.in_folder() == []
    assert 5 < position < 50
    assert {call.split()[0] for call in FAULT.calls} == {"list", "get", "put"}


def test_failing_archive_command_is_the_cause_and_then_a_warning(collector: Collector) -> None:
    collector.write()
    collector.collect()
    server = collector.server
    name = segment_of(collector.write(switch=False))
    mode = server.archive.stat().st_mode
    server.archive.chmod(0o555)
    try:
        server.rows("SELECT pg_switch_wal()")
        assert wait_until(
            lambda: server.rows("SELECT last_failed_wal FROM pg_stat_archiver") == [(name,)], timeout=60
        )
        with pytest.raises(
            Permanent, match=rf"archive_command failed, last for {name} .* has not succeeded since"
        ):
            collector.collect(wal_timeout=0.01)
    finally:
        server.archive.chmod(mode)
    done = collector.collect()
    assert f"archive_command failed, last for {name}" in done["troubles"][0]
    assert "has succeeded since" in done["troubles"][0]
    assert collector.collect()["troubles"] == []


def test_segments_are_encrypted_and_gaps_are_found_without_a_private_key(
    server: Postgres, tmp_path: Path
) -> None:
    identity = x25519.Identity.generate()
    private = tmp_path / "identity"
    private.write_text(str(identity))
    table = f'[encryption]\nrecipients = ["{identity.to_public()}"]'
    with configured(write_settings(tmp_path, more=table)):
        collector = Collector(server, tmp_path / "store")
        before = collector.write()
        collector.collect()
        stored = collector.wal.files[segment_of(before)]
        assert stored.key.endswith(".zst.age")
        assert collector.examine(collector.base(before)).needs_base is False
        with pytest.raises(Permanent, match="private key"):
            list(read_wal(collector.store, stored.key))
    with configured(write_settings(tmp_path, more=f'{table}\nidentities = [{{ file = "{private}" }}]')):
        plain = b"".join(read_wal(collector.store, stored.key))
    assert hashlib.sha256(plain).hexdigest() == stored.sha256


def test_receiver_delivers_what_was_committed_and_is_missed_when_it_is_gone(tmp_path: Path) -> None:
    settings = {"max_slot_wal_keep_size": "1GB", "autovacuum": "off"}
    with (
        postgres_server(18, tmp_path, settings=settings) as server,
        configured(write_settings(tmp_path)),
    ):
        collector = Collector(server, tmp_path / "store")
        collector.component = collector.component.model_copy(update={"wal_slot": "receiver"})
        login = {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": server.user}
        environment = {**os.environ, **login, "PGPASSWORD": server.password}
        command = [f"{server.bin_dir}/pg_receivewal", "--slot=receiver"]
        subprocess.run([*command, "--create-slot", "--if-not-exists"], check=True, env=environment)
        receiver = subprocess.Popen([*command, f"--directory={server.archive}"], env=environment)
        try:
            assert wait_until(
                lambda: server.rows("SELECT active FROM pg_replication_slots") == [(True,)], timeout=30
            )
            assert [finding.what for finding in collector.component.preflight() if not finding.advice] == []
            written = collector.write(switch=False)
            done = collector.collect()
            assert done["troubles"] == []
            assert done["slot"]["lag"] < 2 * SIZE
            assert segment_of(written) in collector.wal.files
            assert collector.in_folder() == []
            newest = segment_of(collector.write(switch=False))
            assert wait_until(lambda: collector.in_folder() == [f"{newest}.partial"], timeout=30)
            assert newest not in collector.component_archive(), "what is still being received is left"
        finally:
            receiver.terminate()
            receiver.wait()
        assert wait_until(
            lambda: server.rows("SELECT active FROM pg_replication_slots") == [(False,)], timeout=30
        )
        collector.write()
        with pytest.raises(Permanent, match=r"is not in .* preflight pg"):
            collector.collect(wal_timeout=0.5)
        assert (
            "nobody receives WAL"
            in next(one for one in collector.component.preflight() if not one.advice).what
        )
