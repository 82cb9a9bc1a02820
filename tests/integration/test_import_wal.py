"""Base backups and WAL that lie where the runbook has them: imported, verified, recovered to a moment and compared."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from tasks import archive
from tasks.components.postgres import Component
from tasks.components.postgres_options import RestoreOptions
from tasks.components.postgres_wal import list_systems, list_wal
from tasks.imports import take_in, take_in_wal
from tasks.recover import choose, next_xids
from tasks.recoverable import clusters
from tasks.verify import compare_object
from tests.configured import configured
from tests.postgres_servers import Postgres, postgres_server
from tests.systems import wait_until
from workers import catalog
from workers.component import Restore
from workers.errors import IntegrityError, Permanent
from workers.locks import Lease
from workers.storage.local import LocalStore

ARCHIVING = {
    "archive_mode": "on",
    "archive_command": "test ! -f {archive}/%f && cp %p {archive}/%f",  # the runbook's
    "autovacuum": "off",
}
BASES = ("postgres/tar/base.tar.gz", "postgres/base_backup.tar.gz", "postgres/old/base_backup.tar.gz")
SETTINGS = """
hosts = ["main"]
[system]
name = "ai-micro-service"
[store]
path = "{folder}/backups"
[catalog]
url = "sqlite:///{folder}/catalog.sqlite"
[components.postgres]
kind = "postgres"
host = "main"
"""


class Held:
    """A lease that is held."""

    def check(self) -> None:
        return


HELD = cast("Lease", Held())


@dataclass(frozen=True)
class Cluster:
    """A server that archives as the runbook has it, and what was made of it."""

    server: Postgres
    component: Component
    folder: Path
    """With ``tar``, ``packed`` and ``unlisted`` base backups."""
    moment: datetime
    """After the commit of ``b``, before that of ``c``."""

    def notes(self) -> str:
        return "".join(row[0] for row in self.server.rows("SELECT t FROM notes ORDER BY 1"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # The recovering server runs as the data folder's owner, who may not enter this process's own folders.
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    made = tmp_path_factory.mktemp("made")
    with postgres_server(18, folder, settings=ARCHIVING) as server:
        server.execute("CREATE TABLE notes (t text); INSERT INTO notes VALUES ('a')")
        base = ("pg_basebackup", "--checkpoint=fast")
        server.program(*base, "-D", str(made / "tar"), "-Ft", "-z")  # with manifest and WAL beside it
        server.program(*base, "-D", str(made / "packed"))
        server.program(*base, "-D", str(made / "unlisted"), "--no-manifest", "--wal-method=none")
        server.execute("INSERT INTO notes VALUES ('b')")
        moment = server.rows("SELECT clock_timestamp()")[0][0]
        server.execute("INSERT INTO notes VALUES ('c')")
        last = server.rows("SELECT pg_walfile_name(pg_switch_wal())")[0][0]
        archived = "SELECT last_archived_wal FROM pg_stat_archiver"
        assert wait_until(lambda: server.rows(archived) == [(last,)], timeout=60)
        table = {**server.settings("postgres", "main"), **server.control()}
        yield Cluster(server, Component.model_validate(table), made, moment)
    shutil.rmtree(folder)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    (tmp_path / "backup.toml").write_text(SETTINGS.format(folder=tmp_path))
    with configured(tmp_path / "backup.toml"):
        yield LocalStore(tmp_path / "backups")


def segments(cluster: Cluster) -> dict[str, bytes]:
    """The WAL files that the server had archived before it was recovered, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(cluster.server.archive.iterdir())
        if path.name.startswith("00000001")
    }


def pack(folder: Path, store: LocalStore, key: str) -> None:
    """Pack a data folder as people do, its content at the top."""
    (store.root / key).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-czf", store.root / key, "-C", folder, "."], check=True)


def recover(cluster: Cluster, store: LocalStore, base: str, run: str, **options: Any) -> None:
    """Recover from a base backup, along the timeline that the command chooses."""
    artifacts = catalog.list_artifacts()
    (found,) = clusters(store, "postgres", artifacts)
    if options:
        asked = RestoreOptions.model_validate(options)
        options["timeline"] = choose(found, asked, next_xids("postgres", artifacts)).timeline
    (part,) = archive.read_metadata(store, base).parts
    work = Restore(run, [part], lambda one: archive.read_part(store, base, one), options, store)
    try:
        cluster.component.stage(work)
        cluster.component.swap(work)
    except BaseException:
        cluster.component.revert(work)
        raise
    cluster.component.settle(work)


def test_base_backups_and_wal_are_imported_verified_and_recovered(
    cluster: Cluster, store: LocalStore
) -> None:
    files = segments(cluster)
    shutil.copytree(cluster.folder / "tar", store.root / "postgres/tar")
    pack(cluster.folder / "packed", store, BASES[1])
    pack(cluster.folder / "unlisted", store, BASES[2])
    for name, content in files.items():
        store.put(f"postgres/wal_archive/{name}", [content])

    wal = take_in_wal(store, "postgres/", [], HELD)
    assert (wal["refused"], wal["notes"]) == ({}, [])
    assert len(wal["imported"] + wal["known"]) == len(files) + 1, "and pg_wal.tar.gz"
    done = take_in(store, "postgres/", [], HELD)

    assert (sorted(done["imported"]), done["refused"]) == (sorted(BASES), {})
    (system,) = list_systems(store, "postgres")
    assert list_wal(store, "postgres", system).files.keys() == files.keys()
    again = take_in_wal(store, "postgres/", [], HELD)
    assert (again["imported"], len(again["known"])) == ([], len(files) + 1)
    parts = {key: archive.read_metadata(store, key).parts[0] for key in BASES}
    assert [part.holds["with_wal"] for part in parts.values()] == [False, True, False]
    for key, part in parts.items():
        compare_object(store, key, progress=None)
        cluster.component.check(part, archive.read_part(store, key, part))
    xids = cluster.server.rows("SELECT min(xmin::text::bigint), max(xmin::text::bigint) FROM notes")[0]
    assert xids[0] < int(parts[BASES[0]].holds["next_xid"]) <= xids[1]
    (found,) = clusters(store, "postgres", catalog.list_artifacts())
    assert [base.archive for span in found.spans for base in span.bases] == list(BASES)

    recover(cluster, store, BASES[2], "20261122_010000", latest=True)
    assert cluster.notes() == "abc"
    recover(cluster, store, BASES[0], "20261122_020000", to_time=cluster.moment.isoformat())
    assert cluster.notes() == "ab"
    recover(cluster, store, BASES[1], "20261122_030000")
    assert cluster.notes() == "a"
    later = datetime.now(UTC).isoformat()  # PostgreSQL says that the WAL ends before it
    with pytest.raises(Permanent, match="recovery ended before configured recovery target was reached"):
        recover(cluster, store, BASES[0], "20261122_040000", to_time=later)
    assert cluster.notes() == "a", "the live server was not touched"

    path = store.root / BASES[1]
    path.write_bytes(
        gzip.compress(gzip.decompress(path.read_bytes()).replace(b"PG_VERSION", b"PG_VERSIOM", 1))
    )
    with pytest.raises(IntegrityError):
        archive.verify(store, BASES[1])


def test_wal_that_is_not_what_it_says_is_refused_and_what_is_missing_is_named(
    cluster: Cluster, store: LocalStore, tmp_path: Path
) -> None:
    files = segments(cluster)
    names = [name for name in files if len(name) == 24]
    (label, *_) = [name for name in files if name.endswith(".backup")]
    assert len(names) >= 4
    whole = files[names[0]]
    other_system = whole[:24] + bytes(8) + whole[32:]
    store.put(f"wal_archive/{names[0]}", [whole])
    store.put(f"wal_archive/{names[1]}.gz", [gzip.compress(files[names[1]])])
    store.put(f"wal_archive/{names[-1]}", [files[names[-1]]])
    store.put(f"wal_archive/{label}", [files[label]])
    bad = {
        f"wal_archive/{names[1]}": (files[names[0]], "holds another part of the log"),
        f"wal_archive/{names[2]}": (files[names[2]][:-1], "a segment of its cluster has 16777216"),
        "wal_archive/000000010000000000000063": (bytes(16 << 20), "no header of a segment"),
        "wal_archive/00000002.history": (b"not a history", "not a line of a timeline history"),
        f"wal_copies/{names[0]}": (whole[:-1] + b"\1", "is stored with another content"),
        f"alone/{label}": (files[label], "nothing says of which cluster"),
        f"foreign/{names[0]}.gz": (gzip.compress(other_system)[:-9], "cut short"),
    }
    for key, (content, _) in bad.items():
        store.put(key, [content])
    store.put(f"foreign/{names[3]}", [files[names[3]][:24] + bytes(8) + files[names[3]][32:]])
    (tmp_path / "wal").mkdir()
    for name, content in {names[3]: files[names[3]], names[2]: whole}.items():
        (tmp_path / "wal" / name).write_bytes(content)
    subprocess.run(["tar", "-czf", store.root / "wal_backup.tar.gz", "wal"], cwd=tmp_path, check=True)

    done = take_in_wal(store, "", [], HELD)

    assert done["refused"].keys() == {*bad, "wal_backup.tar.gz"}
    assert [key for key, (_, reason) in bad.items() if reason not in done["refused"][key]] == []
    assert "holds another part of the log" in done["refused"]["wal_backup.tar.gz"]
    own, foreign = sorted(list_systems(store, "postgres"), reverse=True)
    assert foreign == "0", "another cluster's WAL is kept apart"
    assert list_wal(store, "postgres", foreign).files.keys() == {names[3]}
    assert list_wal(store, "postgres", own).files.keys() == {names[0], names[1], names[-1], label}
    assert len(done["notes"]) == 1
    assert f"(cluster {own}) has a gap: {names[2]}" in done["notes"][0]
