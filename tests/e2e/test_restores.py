"""Restores of an embedded system, the good and the bad: all is as it was at the backup, or nothing changed."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis

from compose.demo.fingerprint import diff
from tests.rehearsal import Rehearsal, rehearsal
from tests.systems import System, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(
    cluster_factory: Callable[..., System], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rehearsal]:
    with rehearsal(cluster_factory, tmp_path_factory.mktemp("restores")) as found:
        yield found


@pytest.fixture(autouse=True)
def _orderly(scene: Rehearsal) -> Iterator[None]:
    """Whatever a test does, services run after it, and nothing is left of a restore."""
    yield
    assert None not in scene.pids().values()
    assert scene.leftovers() == []


@pytest.fixture
def untouched(scene: Rehearsal) -> Iterator[None]:
    """The test changes no data and restarts no service."""
    before, pids = scene.demo.fingerprint(), scene.pids()
    yield
    assert diff(before, scene.demo.fingerprint()) == []
    assert scene.pids() == pids


def members(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(archive) as tar:
        return [(member, file.read()) for member in tar if (file := tar.extractfile(member))]


def write(archive: Path, content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for member, data in content:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def flip_a_byte(archive: Path) -> None:
    """Change one byte in the middle of the largest part; the gzip around it is whole."""
    content = members(archive)
    member, data = max(content, key=lambda item: len(item[1]))
    middle = len(data) // 2
    damaged = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    write(archive, [(m, damaged if m is member else d) for m, d in content])


def flip_a_stored_byte(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)


def cut_short(archive: Path) -> None:
    with archive.open("r+b") as file:
        file.truncate(archive.stat().st_size * 2 // 3)


def drop_a_member(archive: Path) -> None:
    write(archive, [item for item in members(archive) if ".apidb." not in item[0].name])


def rename_system(archive: Path) -> None:
    (first, text), *others = members(archive)
    assert first.name.endswith("/metadata.json")
    write(
        archive, [(first, json.dumps(json.loads(text) | {"system_name": "somebody-else"}).encode()), *others]
    )


def copied(scene: Rehearsal, change: Callable[[Path], None]) -> str:
    """Put a changed copy of the archive into the store, under a name of its own, and return that."""
    folder = scene.system.store / "full_system"
    name = "full_backup_20200101_000000.tar.gz"
    shutil.copyfile(folder / scene.archive, folder / name)
    change(folder / name)
    return name


def disturb(scene: Rehearsal) -> None:
    """Change something of every kind, with which services stay healthy: rows, rights, settings, keys, files, modes."""
    demo = scene.demo
    with psycopg.connect(demo.admin_dsn, dbname="apidb", autocommit=True) as connection:
        connection.execute("DELETE FROM profiles WHERE id % 2 = 0")
        connection.execute("CREATE TABLE IF NOT EXISTS added (id int); INSERT INTO added VALUES (1)")
        connection.execute("REVOKE SELECT ON profiles FROM readonly")
        connection.execute("ALTER DATABASE apidb SET timezone = 'UTC'")
        connection.execute("ALTER ROLE app CONNECTION LIMIT 7")
    with redis.Redis.from_url(demo.redis_url) as client:
        client.delete("counter")
        client.set("added", "value")
        client.persist(next(client.scan_iter("session:*")))
    documents(scene)[0].chmod(0o604)
    added = demo.uploads / "added with a space" / "файл"
    added.parent.mkdir(exist_ok=True)
    added.write_text("added")
    (demo.keys / "private.pem").chmod(0o644)
    (demo.config_root / "ai-micro-redis" / ".env").unlink(missing_ok=True)
    (demo.config_root / "ai-micro-postgres" / "docker-compose.yml").write_text("changed: true\n")
    assert len(scene.differences()) > 10


def documents(scene: Rehearsal) -> list[Path]:
    with psycopg.connect(scene.demo.admin_dsn, dbname="admindb") as connection:
        rows = connection.execute("SELECT path FROM documents ORDER BY id").fetchall()
    return [scene.demo.uploads / row[0] for row in rows]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "is damaged"),
        (flip_a_stored_byte, "is damaged"),
        (cut_short, "is damaged"),
        (drop_a_member, "lacks postgres.apidb.dump.zst"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_damaged_archive_touches_nothing(
    scene: Rehearsal, damage: Callable[[Path], None], said: str
) -> None:
    run = scene.restore(archive=copied(scene, damage), status=1)
    assert run["state"] == "failed"
    assert run["cause"].startswith("verify archive: ")
    assert said in run["cause"]
    assert {step["phase"] for step in run["steps"]} == {"inspect", "verify"}


def test_services_that_stay_ill_bring_back_what_stood_before(scene: Rehearsal) -> None:
    disturb(scene)
    disturbed = scene.demo.fingerprint()
    scene.gate.healthy.clear()
    try:
        run_id = scene.start_restore()
        assert wait_until(lambda: scene.phase(run_id) == "health", timeout=60)
        assert wait_until(lambda: scene.phase(run_id) != "health", timeout=60)
    finally:
        scene.gate.healthy.set()
    run = scene.system.ended(run_id)
    assert run["state"] == "failed"
    assert "service gate: not healthy within 12 s" in run["cause"]
    assert "answered 503" in run["cause"]
    assert diff(disturbed, scene.demo.fingerprint()) == []


def test_a_changed_system_is_as_it_was_and_so_it_is_when_restored_again(scene: Rehearsal) -> None:
    disturb(scene)
    changed, lost, *_ = documents(scene)
    changed.write_bytes(b"changed")
    lost.unlink(missing_ok=True)
    assert scene.restore()["state"] == "complete"
    assert scene.differences() == []
    assert scene.restore()["state"] == "complete"
    assert scene.differences() == []


@pytest.mark.parametrize(
    ("component", "restored"),
    [("uploads", ("files uploads:",)), ("postgres", ("postgres:",))],
)
def test_one_component_leaves_the_others_as_they_are(
    scene: Rehearsal, component: str, restored: tuple[str, ...]
) -> None:
    disturb(scene)
    others = [line for line in scene.differences() if not line.startswith(restored)]
    run = scene.restore("--component", component, "--confirm", component)
    assert run["state"] == "complete"
    assert run["components"] == [component]
    assert scene.differences() == others


def test_a_lost_system_comes_back_component_by_component(scene: Rehearsal) -> None:
    """Until the last one, services are ill for want of what is not restored yet: that must not undo what is."""
    scene.demo.destroy_data()
    for component in ("uploads", "auth-keys", "config", "redis", "postgres"):
        run = scene.restore("--component", component, "--confirm", component)
        assert run["state"] == "complete"
        assert set(run["outcome"]["ill"]) >= {"auth-service", "user-api", "admin-api"}
    assert scene.differences() == []
    scene.demo.wait_healthy()


@pytest.mark.usefixtures("untouched")
def test_a_plan_says_what_would_be_overwritten_and_does_nothing(scene: Rehearsal) -> None:
    now = scene.demo.fingerprint()
    done = scene.cli("plan", scene.archive)
    assert done.returncode == 0, done.stderr
    for said in (
        scene.archive,
        "min old",
        "database authdb on postgres",
        "database apidb on postgres",
        "database admindb on postgres",
        "memberships of 4 would be set",
        f"{len(now['redis'])} keys",
        f"{len(scene.before['redis'])} keys",
        f"{scene.demo.uploads}: ",
        f"{scene.demo.keys}: ",
        "files, ",
        str(scene.demo.config_root),
    ):
        assert said in done.stdout


@pytest.mark.parametrize(
    "words", [[], ["--confirm", "ai-micro"], ["--component", "redis", "--confirm", "ai-micro-service"]]
)
@pytest.mark.usefixtures("untouched")
def test_without_the_right_confirmation_nothing_happens(scene: Rehearsal, words: list[str]) -> None:
    runs = scene.system.query("SELECT count(*) FROM run")
    done = scene.cli("restore", scene.archive, *words)
    assert done.returncode == 3
    assert "this would overwrite" in done.stderr
    assert "plan=True" in done.stderr
    assert scene.system.query("SELECT count(*) FROM run") == runs


@pytest.mark.usefixtures("untouched")
def test_the_archive_of_another_system_is_refused(scene: Rehearsal) -> None:
    done = scene.cli("restore", copied(scene, rename_system), "--confirm", "ai-micro-service")
    assert done.returncode == 1
    assert "a backup of somebody-else" in " ".join(done.stderr.split())


def test_a_backup_during_a_restore_is_refused_with_the_cause(scene: Rehearsal) -> None:
    scene.gate.healthy.clear()
    try:
        run_id = scene.start_restore()
        # At the same time: services may be ill for a bounded time only.
        with ThreadPoolExecutor() as pool:
            asked = [("backup",), ("restore", scene.archive, "--confirm", "ai-micro-service")]
            done, again = pool.map(lambda words: scene.cli(*words), asked)
    finally:
        scene.gate.healthy.set()
    for refused in (done, again):
        assert refused.returncode == 1
        assert f"the restore {run_id} was running" in " ".join(refused.stderr.split())
    assert scene.system.ended(run_id)["state"] == "complete"
