"""What a restore of files and configuration promises: for trees of every kind, here and in a container."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tasks.components import config, files
from tests.trees import ACL, attributes_of, backed_up, leftovers, look, restoring
from workers.component import BaseComponent, Part, Restore
from workers.errors import CommandFailed, ComparisonError, IntegrityError, Permanent
from workers.runtime.process import ProcessRuntime


def uploads(path: Path, **more: Any) -> files.Component:
    values = {"name": f"uploads-{os.getpid()}", "kind": "files", "host": "here", "path": str(path), **more}
    return files.Component.model_validate(values)


def configured(root: Path, *paths: str, **more: Any) -> config.Component:
    values = {
        "name": f"config-{os.getpid()}",
        "kind": "config",
        "host": "here",
        "root": str(root),
        "paths": paths,
    }
    return config.Component.model_validate({**values, **more})


def replace(component: BaseComponent, restore: Restore) -> None:
    component.stage(restore)
    component.swap(restore)
    component.settle(restore)


def attributes(root: Path) -> dict[str, dict[str, bytes]]:
    """Return the extended attributes and ACLs of all that is below ``root``."""
    found = {}
    for path in sorted(root.rglob("*")):
        names = os.listxattr(path, follow_symlinks=False)
        found[str(path.relative_to(root))] = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in names
            if name != "security.selinux"
        }
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folders, hard links that cross them, a hole of 50 GB, extended attributes, an ACL, a socket and a FIFO."""
    root = tmp_path / "srv" / "uploads"
    for folder in ("2025", "2026/a b"):
        (root / folder).mkdir(parents=True)
    (root / "2025" / "letter").write_bytes(b"kept" * 100)
    (root / "2026" / "a b" / "same letter").hardlink_to(root / "2025" / "letter")
    (root / "2026" / "same again").hardlink_to(root / "2025" / "letter")
    (root / "2026" / "link").symlink_to("a b")
    with (root / "2026" / "disk").open("wb") as disk:
        disk.truncate(50 << 30)
        disk.seek(30 << 30)
        disk.write(b"in the middle")
    os.setxattr(root / "2026" / "a b", "user.kind", b"new\nline = \0")
    os.setxattr(root / "2025" / "letter", "user.ocr", b"done")
    os.setxattr(root / "2025" / "letter", "system.posix_acl_access", ACL)
    return root


def test_holes_attributes_acls_and_links_come_back(tree: Path) -> None:
    shown, kept = look_without_disk(tree), attributes(tree)
    assert len(kept["2025/letter"]) == 2
    part, plain = backed_up(uploads(tree))
    assert len(plain) < 100_000
    assert part.holds["attributes"] == 2
    shutil.rmtree(tree)
    restore = restoring(part, plain)
    replace(uploads(tree), restore)
    assert look_without_disk(tree) == shown
    assert attributes(tree) == kept
    assert restore.warnings == []
    disk = (tree / "2026" / "disk").stat()
    assert (disk.st_size, disk.st_blocks < 1000) == (50 << 30, True)
    uploads(tree).check(part, iter([plain]))


def look_without_disk(tree: Path) -> dict[bytes, tuple[Any, ...]]:
    """Look at all but the 50 GB, which would take a minute to read."""
    disk, aside = tree / "2026" / "disk", tree.parent / "disk"
    time = disk.parent.stat()
    disk.rename(aside)
    try:
        os.utime(disk.parent, ns=(time.st_atime_ns, time.st_mtime_ns))
        return look(tree)
    finally:
        aside.rename(disk)
        os.utime(disk.parent, ns=(time.st_atime_ns, time.st_mtime_ns))


def test_the_top_folder_has_its_own_acl_and_attributes_again(tree: Path) -> None:
    def own() -> list[tuple[str, bytes]]:
        return attributes_of(os.fsencode(tree))

    part, plain = backed_up(uploads(tree))
    bare = restoring(part, plain, run_id="bare")
    for name, value in (("access", ACL), ("default", ACL)):
        os.setxattr(tree, f"system.posix_acl_{name}", value)
    os.setxattr(tree, "user.top", b"1")
    marked, mode = own(), tree.stat().st_mode
    assert len(marked) == 3
    part, plain = backed_up(uploads(tree))
    uploads(tree).stage(bare)
    uploads(tree).swap(bare)
    assert [name for name, _ in own()] == ["user.top"]
    uploads(tree).revert(bare)
    assert (own(), tree.stat().st_mode) == (marked, mode)
    shutil.rmtree(tree)
    restore = restoring(part, plain)
    replace(uploads(tree), restore)
    assert (own(), tree.stat().st_mode) == (marked, mode)
    assert restore.warnings == []


def test_a_lost_attribute_is_seen_and_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, plain = backed_up(uploads(tree))
    write_tree = ProcessRuntime.write_tree

    def without_attributes(self: ProcessRuntime, folder: Any, chunks: Iterator[bytes]) -> None:
        write_tree(self, folder, chunks)
        os.removexattr(folder / "uploads/2025/letter", "user.ocr")
        os.removexattr(folder / "uploads/2025/letter", "system.posix_acl_access")
        Path(folder, "uploads/2025/letter").chmod(0o660)

    def with_others(self: ProcessRuntime, folder: Any, chunks: Iterator[bytes]) -> None:
        write_tree(self, folder, chunks)
        os.setxattr(folder / "uploads/2025/letter", "user.ocr", b"never")

    monkeypatch.setattr(ProcessRuntime, "write_tree", without_attributes)
    restore = restoring(part, plain)
    uploads(tree).stage(restore)
    assert restore.warnings == [f"{part.name}: extended attributes or ACLs of 1 entries cannot be kept there"]
    uploads(tree).revert(restore)
    monkeypatch.setattr(ProcessRuntime, "write_tree", with_others)
    with pytest.raises(ComparisonError, match="attributes"):
        uploads(tree).stage(restoring(part, plain, run_id="other"))


def test_one_path_of_many_comes_back_and_the_rest_stays(tree: Path) -> None:
    kept = look_without_disk(tree)
    part, plain = backed_up(uploads(tree))
    shutil.rmtree(tree / "2026")
    (tree / "2026").mkdir()
    (tree / "2026" / "later").touch()
    (tree / "2025" / "letter").write_text("rewritten since")
    (tree / "new").touch()
    restore = restoring(part, plain, path="uploads/2026/")
    assert uploads(tree).overwrites([part], restore.options)[0].startswith(f"{tree}/2026: replaced")
    replace(uploads(tree), restore)
    assert (tree / "2025" / "letter").read_text() == "rewritten since"
    assert (tree / "new").exists()
    found = look_without_disk(tree)
    inside = {name for name in kept if name.startswith(b"2026/")}
    assert inside == {name for name in found if name.startswith(b"2026/")}
    assert (tree / "2026" / "a b" / "same letter").read_bytes() == b"kept" * 100
    assert (tree / "2026" / "a b" / "same letter").samefile(tree / "2026" / "same again")
    assert leftovers(tree) == []
    for wrong in ("2026", "elsewhere/x", "uploads"):
        with pytest.raises(Permanent, match="name what is in it"):
            uploads(tree).stage(restoring(part, plain, path=wrong))
    absent = restoring(part, plain, path="uploads/2027")
    with pytest.raises(Permanent, match="holds no uploads/2027"):
        uploads(tree).stage(absent)
    uploads(tree).revert(absent)
    damaged = bytearray(plain)
    damaged[plain.index(b"keptkept")] ^= 1
    with pytest.raises(IntegrityError):
        uploads(tree).stage(restoring(part, bytes(damaged), path="uploads/2026"))


def test_folders_that_one_path_needs_are_made_as_they_were(tree: Path) -> None:
    owner = 1234 if os.geteuid() == 0 else os.geteuid()
    for folder, mode in ((tree / "2026" / "a b", 0o2750), (tree / "2026", 0o711)):
        os.chown(folder, owner, owner if os.geteuid() == 0 else -1)
        folder.chmod(mode)
    part, plain = backed_up(uploads(tree))
    shutil.rmtree(tree / "2026")
    (tree / "2025").chmod(0o700)
    restore = restoring(part, plain, path="uploads/2026/a b/same letter")
    uploads(tree).stage(restore)
    uploads(tree).swap(restore)
    for folder, mode in ((tree / "2026" / "a b", 0o2750), (tree / "2026", 0o711)):
        found = folder.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, owner)
    assert [path.name for path in (tree / "2026").rglob("*")] == ["a b", "same letter"]
    assert (tree / "2026/a b/same letter").read_bytes() == b"kept" * 100
    assert stat.S_IMODE((tree / "2025").stat().st_mode) == 0o700, "what is there stays"
    uploads(tree).revert(restore)
    assert not (tree / "2026").exists()


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: a disk takes its time for many small files."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_many_small_files_come_back(fast_folder: Path) -> None:
    root = fast_folder / "many"
    for number in range(200):
        (root / f"{number:03}").mkdir(parents=True)
        for file in range(100):
            (root / f"{number:03}" / f"{file:02}").write_bytes(b"%d" % file)
    part, plain = backed_up(uploads(root))
    assert (part.holds["files"], part.holds["entries"]) == (20_000, 20_201)
    shutil.rmtree(root)
    replace(uploads(root), restoring(part, plain, chunk=1 << 18))
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*/*")}
    assert found == {f"{number:03}/{file:02}": b"%d" % file for number in range(200) for file in range(100)}


def test_a_look_beside_touches_nothing_that_is_live(tree: Path, tmp_path: Path) -> None:
    part, plain = backed_up(uploads(tree))
    recorded = look_without_disk(tree)
    (tree / "2025" / "letter").write_text("live")
    live = look_without_disk(tree)
    beside = tmp_path / "a look"
    it, restore = uploads(tree), restoring(part, plain, into=str(beside))
    options = it.restore_options.model_validate(dict(restore.options))
    assert not options.overwrites
    assert it.overwrites([part], restore.options) == [f"nothing: uploads is put into {beside}"]
    replace(it, restore)
    assert look_without_disk(beside / "uploads") == recorded
    assert look_without_disk(tree) == live
    with pytest.raises(CommandFailed, match="is not empty"):
        it.stage(restoring(part, plain, run_id="again", into=str(beside)))
    other = restoring(part, plain, run_id="third", into=str(tmp_path / "x" / "y"), path="uploads/2025")
    it.stage(other)
    it.swap(other)
    assert (tmp_path / "x" / "y" / "uploads" / "2025" / "letter").read_bytes() == b"kept" * 100
    it.revert(other)
    assert not (tmp_path / "x").exists()


def test_a_rehearsal_compares_and_leaves_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    part, plain = backed_up(uploads(tree))
    live = look_without_disk(tree)
    assert uploads(tree).rehearse(restoring(part, plain))["entries"] == part.holds["entries"]
    damaged = plain.replace(b"keptkept", b"keptkepT")
    with pytest.raises(IntegrityError):
        uploads(tree).rehearse(restoring(part, damaged))
    with pytest.raises(IntegrityError):
        uploads(tree).check(part, iter([damaged]))
    huge = part.model_copy(update={"plain_size": 1 << 60})
    with pytest.raises(Permanent, match="has room for"):
        uploads(tree).rehearse(restoring(huge, plain))
    assert list(scratch.iterdir()) == []
    assert look_without_disk(tree) == live


def test_what_is_no_data_is_left_out_by_name(tree: Path) -> None:
    kept = look_without_disk(tree)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tree / "new\nline.sock"))
    os.mkfifo(tree / "2025" / "fifo")
    (tree / "2025" / "same fifo").hardlink_to(tree / "2025" / "fifo")
    names = ["2025/fifo: a FIFO", "2025/same fifo: a FIFO", "new\\nline.sock: a socket"]
    if os.geteuid() == 0:
        os.mknod(tree / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        names.append("null: a device node")
    os.mkfifo(tree / "excluded")
    part, plain = backed_up(uploads(tree, exclude=("excluded",)))
    assert part.holds["skipped"] == [f"uploads/{name}" for name in names]
    assert part.remarks == [f"left out: uploads/{name}" for name in names]
    assert uploads(tree).overwrites([part])[1:] == [f"not in the backup: uploads/{name}" for name in names]
    os.utime(tree / "2025", (0, kept[b"2025"][3]))
    replace(uploads(tree), restoring(part, plain))
    assert {name: it for name, it in look_without_disk(tree).items() if name not in (b".", b"2025")} == {
        name: it for name, it in kept.items() if name not in (b".", b"2025")
    }
    assert not (tree / "2025" / "fifo").exists()
    assert not (tree / "null").exists()
    for number in range(150):
        os.mkfifo(tree / f"{number:03}")
    skipped = backed_up(uploads(tree))[0].holds["skipped"]
    assert (len(skipped), skipped[-1]) == (101, "and 50 more")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_what_is_mounted_inside_is_refused_by_name_before_anything_moves(tree: Path) -> None:
    part, plain = backed_up(uploads(tree))
    mounted = tree / "2026" / "a b"
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
    try:
        (mounted / "cached").touch()
        live = look_without_disk(tree)
        (named,) = backed_up(uploads(tree))[0].holds["warnings"]
        assert named.startswith("uploads/2026/a b: mounted there, and in the backup")
        assert backed_up(uploads(tree, exclude=("a b",)))[0].holds["warnings"] == []
        restore = restoring(part, plain)
        with pytest.raises(CommandFailed, match="2026/a b is mounted inside what would be replaced"):
            uploads(tree).stage(restore)
        uploads(tree).revert(restore)
        assert look_without_disk(tree) == live
        replace(uploads(tree), restoring(part, plain, path="uploads/2025"))
        assert (mounted / "cached").exists()
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_the_runbooks_archives_go_where_they_belong(tmp_path: Path) -> None:
    day, live = tmp_path / "20251001", tmp_path / "app"
    for name in ("uploads/2025", "auth-keys"):
        (day / name).mkdir(parents=True)
    (day / "uploads/2025/letter").write_text("letter")
    (day / "auth-keys/private.pem").write_text("key")
    plain = subprocess.run(["tar", "-C", tmp_path, "-c", "20251001"], check=True, capture_output=True).stdout
    for name, found in (("uploads", "2025/letter"), ("keys", "private.pem")):
        (live / name).mkdir(parents=True)
        (live / name / "stale").touch()
        it = uploads(live / name)
        part = bare_part(it, "files", plain)
        replace(it, restoring(part, plain))
        assert [
            str(path.relative_to(live / name)) for path in (live / name).rglob("*") if path.is_file()
        ] == [found]
        it.check(part, iter([plain]))
        it.rehearse(restoring(part, plain))
    it = uploads(live / "other")
    with pytest.raises(Permanent, match="one folder for 'other'"):
        it.stage(restoring(bare_part(it, "files", plain), plain))
    root = tmp_path / "system"
    (root / "api").mkdir(parents=True)
    (root / "api/.env").write_text("A=1")
    (root / "unlisted").touch()
    plain = subprocess.run(["tar", "-C", root, "-c", "api/.env"], check=True, capture_output=True).stdout
    (root / "api/.env").write_text("changed")
    settings_of = configured(root, "api/.env", "api/docker-compose.yml")
    replace(settings_of, restoring(bare_part(settings_of, "config", plain), plain))
    assert (root / "api/.env").read_text() == "A=1"
    assert (root / "unlisted").exists()


def bare_part(component: BaseComponent, kind: str, plain: bytes) -> Part:
    part, _ = backed_up(uploads(Path(__file__)))
    return part.model_copy(
        update={"component": component.name, "kind": kind, "holds": {}, "plain_size": len(plain)}
    )
