"""The files component over this host's runtime, against an independent look at the trees."""

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from tasks.components.files import Component
from tests.trees import TREES, backed_up, leftovers, look, make, restoring
from workers.component import Part, Restore
from workers.errors import CommandFailed, ComparisonError, IntegrityError, Permanent
from workers.runtime.process import ProcessRuntime
from workers.tar import TreeDigest

TOOLS = (
    "mv",
    "rm",
    "mkdir",
    "rmdir",
    "chmod",
    "chown",
    "touch",
    "stat",
    "find",
    "cat",
    "sync",
    "dirname",
    "head",
)
KILLER = """#!/bin/sh
count=$(($(cat "$KILLER/count") + 1))
echo $count >"$KILLER/count"
if [ "$KILLER_WHEN" = before ] && [ $count -ge "$KILLER_AT" ]; then kill -9 0; fi
REAL "$@"
status=$?
if [ "$KILLER_WHEN" = after ] && [ $count -ge "$KILLER_AT" ]; then kill -9 0; fi
exit $status
"""


def component(path: Path, **settings_: Any) -> Component:
    return Component.model_validate(
        {"name": f"uploads-{os.getpid()}", "kind": "files", "host": "here", "path": str(path), **settings_}
    )


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """A small tree of everything."""
    root = tmp_path / "srv" / "my uploads"
    (root / "2026" / "a b").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o700)
    (root / "zero").touch()
    (root / ".hidden").write_text("dot")
    (root / "-rf").write_text("dash")
    (root / "new\nline").write_text("newline")
    (root / "2026" / "a b" / "写真 'é\".jpg").write_bytes(os.urandom(70_000))
    (root / "2026" / "link").symlink_to("a b")
    (root / "dangling").symlink_to("/nowhere/at all")
    (root / "hard").hardlink_to(root / "2026" / "a b" / "写真 'é\".jpg")
    os.utime(root / "zero", (1, 1_700_000_000.75))
    os.utime(root, (1_600_000_000, 1_600_000_000))
    return root


def change(root: Path) -> None:
    """Make the live tree another than the one backed up."""
    shutil.rmtree(root / "2026")
    (root / "zero").write_text("not zero")
    (root / "2026").write_text("a file now")
    (root / "later").mkdir(mode=0o750)
    (root / "later" / "extra").write_text("extra")
    (root / "..later").write_text("extra")
    root.chmod(0o711)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES)
@example(("folder", {}, 0o755, 0, os.geteuid()))
@example(
    ("folder", {b"f": ("file", b"", 0o600, 1_700_000_000_999_999_999, os.geteuid())}, 0o700, 1, os.geteuid())
)
def test_what_is_restored_is_what_was_backed_up(
    tmp_path_factory: pytest.TempPathFactory, tree: tuple[Any, ...]
) -> None:
    root = tmp_path_factory.mktemp("tree") / "root of it"
    make(os.fsencode(root), tree)
    before = look(root)
    part, plain = backed_up(component(root))
    subprocess.run(["rm", "-rf", root], check=True)
    make(
        os.fsencode(root),
        ("folder", {b"other": ("file", b"x", 0o600, 0, os.geteuid())}, 0o700, 0, os.geteuid()),
    )
    restore = restoring(part, plain)
    component(root).stage(restore)
    component(root).swap(restore)
    component(root).settle(restore)
    assert look(root) == before
    assert leftovers(root) == []
    shutil.rmtree(root.parent)


def test_the_record_says_what_it_holds(uploads: Path) -> None:
    part, plain = backed_up(component(uploads))
    assert {key: part.holds[key] for key in ("path", "type", "base", "files", "bytes", "entries", "warnings")} == {
        "path": str(uploads), "type": "folder", "base": "my uploads", "files": 5, "bytes": 70_014, "entries": 12,
        "warnings": [],
    }  # fmt: skip
    with tarfile.open(fileobj=BytesIO(plain)) as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {"my uploads"}
    (source,) = component(uploads).sources()
    assert source.expected is not None
    assert source.expected == pytest.approx(len(plain), rel=0.5)
    assert b"".join(source.chunks) == plain


def test_a_swap_takes_away_what_the_backup_does_not_hold_and_a_revert_brings_it_back(uploads: Path) -> None:
    recorded = look(uploads)
    part, plain = backed_up(component(uploads))
    change(uploads)
    changed = look(uploads)
    uploads_component, restore = component(uploads), restoring(part, plain)
    uploads_component.stage(restore)
    assert without_root_time(look(uploads)) == without_root_time(changed)
    assert (uploads / leftovers(uploads)[0]).stat().st_mode & 0o777 == 0o700
    uploads_component.stage(restore)
    uploads_component.swap(restore)
    assert look(uploads) == recorded
    uploads_component.swap(restore)
    uploads_component.stage(restore)
    assert look(uploads) == recorded
    (uploads / "written by the service after the swap").touch()
    uploads_component.revert(restore)
    assert look(uploads) == changed
    assert leftovers(uploads) == []
    uploads_component.revert(restore)
    uploads_component.settle(restore)
    assert look(uploads) == changed


def without_root_time(seen: dict[bytes, tuple[Any, ...]]) -> dict[bytes, tuple[Any, ...]]:
    kind, mode, owner, _, *rest = seen[b"."]
    return {**seen, b".": (kind, mode, owner, *rest)}


def test_a_damaged_part_leaves_what_is_live_alone(uploads: Path) -> None:
    part, plain = backed_up(component(uploads))
    live = look(uploads)
    for position in (600, len(plain) // 2):
        damaged = bytearray(plain)
        damaged[position] ^= 1
        restore = restoring(part, bytes(damaged))
        with pytest.raises(IntegrityError):
            component(uploads).stage(restore)
        with pytest.raises(CommandFailed, match="nothing is staged"):
            component(uploads).swap(restore)
        component(uploads).revert(restore)
        assert look(uploads) == live
        assert leftovers(uploads) == []
    with pytest.raises(IntegrityError, match="cut short"):
        component(uploads).stage(restoring(part, plain[: len(plain) // 2]))


def test_what_was_written_is_read_back_and_compared(uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, plain = backed_up(component(uploads))
    live = look(uploads)
    write_tree = ProcessRuntime.write_tree

    def forgetful(self: ProcessRuntime, folder: Any, chunks: Iterator[bytes]) -> None:
        write_tree(self, folder, chunks)
        Path(folder, "my uploads", "zero").chmod(0o777)

    monkeypatch.setattr(ProcessRuntime, "write_tree", forgetful)
    restore = restoring(part, plain)
    with pytest.raises(ComparisonError, match="modes"):
        component(uploads).stage(restore)
    component(uploads).revert(restore)
    assert look(uploads) == live


@pytest.mark.parametrize(
    ("tools", "when", "single"),
    [
        ("host", "before", False),
        ("host", "after", False),
        ("host", "before", True),
        ("host", "after", True),
        *([("busybox", "before", False)] if shutil.which("busybox") else []),
    ],
)
@pytest.mark.parametrize(
    ("steps", "killed", "then"),
    [
        (["stage"], "swap", "swap"),
        (["stage"], "swap", "revert"),
        (["stage", "swap"], "revert", "revert"),
        (["stage", "swap"], "settle", "settle"),
        (["stage"], "revert", "revert"),
        ([], "prepare", "stage"),
        ([], "prepare", "revert"),
    ],
)
def test_a_step_killed_anywhere_converges(
    uploads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: str, when: str, single: bool,
    steps: list[str], killed: str, then: str,
) -> None:  # fmt: skip
    path = uploads / "zero" if single else uploads
    if tools == "busybox":
        _use_busybox(tmp_path, monkeypatch)
    part, plain = backed_up(component(path))
    _, whole = backed_up(component(uploads))
    recorded = look(uploads)
    killer = Killer(tmp_path, monkeypatch, when)
    completed, at = False, 0
    while not completed:
        at += 1
        assert at < 200, "the step never ended"
        change(uploads)
        live = look(uploads)
        it, restore = component(path), restoring(part, plain, run_id=f"run{at}")
        for step in steps:
            getattr(it, step)(restore)
        with killer.at(at):
            completed = ended(it, restore, killed)
        for step in (
            ["stage", "swap", "settle"] if then == "stage" else [then, "settle"] if then == "swap" else [then]
        ):
            getattr(it, step)(restore)
        replaced = {**live, b"zero": recorded[b"zero"]} if single else recorded
        expected = live if then == "revert" else replaced
        # The folder's own time is lost when the run died while it made or removed its folder there; and a single
        # file's folder is not restored.
        compare = without_root_time if single or not completed else dict
        assert compare(look(uploads)) == compare(expected)
        assert leftovers(uploads) == []
        shutil.rmtree(uploads)
        with tarfile.open(fileobj=BytesIO(whole)) as archive:
            archive.extractall(uploads.parent, filter="fully_trusted")
    assert at > 3


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("then", ["swap", "revert"])
def test_what_a_service_writes_while_a_swap_is_down_does_not_count(
    uploads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool, then: str
) -> None:
    path = uploads / "zero" if single else uploads
    part, plain = backed_up(component(path))
    recorded, it, wrote = look(uploads), component(path), 0
    killer = Killer(tmp_path, monkeypatch, "after")
    completed, at = False, 0
    while not completed:
        at += 1
        restore = restoring(part, plain, run_id=f"run{at}")
        it.stage(restore)
        moving = it._tree(restore).staging(restore) / "moving" / "zero"
        with killer.at(at):
            completed = ended(it, restore, "swap")
        if not (uploads / "zero").exists():
            wrote += 1
            (uploads / "zero").write_text("written too early")
            if not single:
                (uploads / "2026").mkdir()
                (uploads / "2026" / "written too early").touch()
            if os.path.lexists(moving):
                with pytest.raises(CommandFailed, match="as well"):
                    getattr(it, then)(restore)
                (uploads / "zero").unlink()
                if not single:
                    shutil.rmtree(uploads / "2026")
        getattr(it, then)(restore)
        if then == "swap":
            it.settle(restore)
        assert without_root_time(look(uploads)) == without_root_time(recorded)
    assert wrote > 2


@pytest.mark.parametrize("step", ["settle", "revert"])
def test_a_removal_that_is_cut_short_is_finished(
    uploads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    part, plain = backed_up(component(uploads))
    recorded = look(uploads)
    change(uploads)
    live = look(uploads)
    it, restore = component(uploads), restoring(part, plain)
    it.stage(restore)
    it.swap(restore)
    staging = it._tree(restore).staging(restore)
    tools = tmp_path / "tools"
    tools.mkdir()
    script = """#!/bin/sh
    for last; do :; done
    case $last in "$STAGING" | "$STAGING.gone") [ ! -e "$last" ] || { REAL -rf "$last/cleared" "$last/placed" "$last/old"; kill -9 0; } ;; esac
    exec REAL "$@"
    """
    (tools / "rm").write_text(script.replace("REAL", str(shutil.which("rm"))))
    (tools / "rm").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("STAGING", str(staging))
        patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        assert not ended(it, restore, step)
    getattr(it, step)(restore)
    assert look(uploads) == (recorded if step == "settle" else live)
    assert leftovers(uploads) == []


def ended(it: Any, restore: Restore, step: str) -> bool:
    """Say whether a step ended; if not, that it was killed."""
    try:
        it._tree(restore).prepare(restore) if step == "prepare" else getattr(it, step)(restore)
    except CommandFailed as error:
        if error.status != -9:
            raise
        return False
    return True


class Killer:
    """Puts tools on the path that kill the script which calls the nth of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        self.folder, self.monkeypatch = folder / "killer", monkeypatch
        self.folder.mkdir()
        for tool in TOOLS:
            real = shutil.which(tool)
            assert real
            script = KILLER.replace("$(cat ", f"$({shutil.which('cat')} ").replace("REAL", real)
            (self.folder / tool).write_text(script)
            (self.folder / tool).chmod(0o755)
        monkeypatch.setenv("KILLER", str(self.folder))
        monkeypatch.setenv("KILLER_WHEN", when)

    @contextlib.contextmanager
    def at(self, count: int) -> Iterator[None]:
        with self.monkeypatch.context() as patch:
            (self.folder / "count").write_text("0")
            patch.setenv("KILLER_AT", str(count))
            patch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
            yield


def _use_busybox(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = folder / "busybox"
    tools.mkdir()
    for tool in (*TOOLS, "sh", "readlink", "du", "timeout", "awk", "tr", "wc", "id"):
        (tools / tool).symlink_to(str(shutil.which("busybox")))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def test_files_that_change_while_they_are_read_are_warnings(tmp_path: Path) -> None:
    root = tmp_path / "busy"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).write_bytes(bytes(2_000_000))
    for number in range(5000):
        (root / f"c{number:04}").touch()
    (root / "z growing").write_bytes(b"x" * 30_000_000)
    (source,) = component(root).sources()
    chunks = [next(source.chunks)]
    with (root / "z growing").open("ab") as file:
        file.write(b"y" * 1000)
    (root / "z growing").write_bytes(b"short")
    for number in range(5000):
        (root / f"c{number:04}").unlink()
    stop = threading.Event()

    def grow() -> None:
        with (root / "z growing").open("ab") as file:
            while not stop.is_set():
                file.write(b"more")
                file.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    chunks += source.chunks
    stop.set()
    writer.join()
    warnings = source.holds["warnings"]
    assert any("removed before we read it" in line for line in warnings), warnings
    assert 2 <= len(warnings) <= 21
    with tarfile.open(fileobj=BytesIO(b"".join(chunks))) as archive:
        assert "busy/a" in archive.getnames()


def test_a_changing_file_still_restores(tmp_path: Path) -> None:
    root = tmp_path / "busy"
    root.mkdir()
    (root / "log").write_bytes(b"x" * 50_000_000)
    (source,) = component(root).sources()
    chunks = [next(source.chunks)]
    (root / "log").write_bytes(b"short")
    chunks += source.chunks
    assert any("log" in line for line in source.holds["warnings"])
    part, _ = backed_up(component(root))
    part = part.model_copy(update={"holds": source.holds})
    restore = restoring(part, b"".join(chunks))
    component(root).stage(restore)
    component(root).swap(restore)
    assert (root / "log").stat().st_size == 50_000_000


def test_an_error_of_tar_is_fatal(tmp_path: Path) -> None:
    root = tmp_path / "gone"
    root.mkdir()
    (root / "file").touch()
    (source,) = component(root).sources()
    shutil.rmtree(root)
    with pytest.raises(CommandFailed, match="status 2"):
        list(source.chunks)
    assert "tree_sha256" not in source.holds


def test_what_is_not_there_or_empty_by_its_excludes_fails_loudly(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="does not exist"):
        component(tmp_path / "missing").sources()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Permanent, match="neither"):
        component(tmp_path / "fifo").sources()
    (tmp_path / "kept").mkdir()
    (source,) = component(tmp_path / "kept", exclude=["k*"]).sources()
    with pytest.raises(Permanent, match="empty"):
        list(source.chunks)


def test_excludes_and_our_own_folders_are_left_out(uploads: Path) -> None:
    (uploads / ".ai-micro-backup-other-run").mkdir()
    (uploads / ".ai-micro-backup-other-run" / "old").touch()
    part, plain = backed_up(component(uploads, exclude=["*.jpg", "empty"]))
    with tarfile.open(fileobj=BytesIO(plain)) as archive:
        names = archive.getnames()
    assert not [name for name in names if name.endswith((".jpg", "/empty")) or "ai-micro-backup" in name]
    assert part.holds["entries"] == 10
    restore = restoring(part, plain)
    component(uploads).stage(restore)
    component(uploads).swap(restore)
    component(uploads).settle(restore)
    assert (uploads / ".ai-micro-backup-other-run" / "old").exists()
    assert any("*.jpg" in line for line in component(uploads, exclude=["*.jpg"]).overwrites([part]))


def test_a_missing_folder_is_made_and_a_revert_removes_it(uploads: Path, tmp_path: Path) -> None:
    recorded = look(uploads)
    part, plain = backed_up(component(uploads))
    shutil.rmtree(tmp_path / "srv")
    restore = restoring(part, plain)
    component(uploads).stage(restore)
    component(uploads).swap(restore)
    assert look(uploads) == recorded
    component(uploads).revert(restore)
    assert not (tmp_path / "srv").exists()
    component(uploads).stage(restore)
    component(uploads).swap(restore)
    component(uploads).settle(restore)
    assert look(uploads) == recorded


def test_a_single_file_leaves_its_neighbours_alone(uploads: Path) -> None:
    key = uploads / ".hidden"
    key.chmod(0o600)
    part, plain = backed_up(component(key))
    recorded = look(uploads)
    key.unlink()
    (uploads / "zero").write_text("newer")
    newer = look(uploads)
    restore = restoring(part, plain)
    component(key).stage(restore)
    component(key).swap(restore)
    assert look(uploads)[b".hidden"] == recorded[b".hidden"]
    assert (uploads / "zero").read_text() == "newer"
    component(key).revert(restore)
    assert look(uploads) == newer


def test_configured_modes_and_owner_win_over_those_recorded(uploads: Path) -> None:
    it = component(uploads, file_mode="600", folder_mode="750", owner=f"{os.geteuid()}:{os.getegid()}")
    part, plain = backed_up(it)
    restore = restoring(part, plain)
    it.stage(restore)
    it.swap(restore)
    it.settle(restore)
    modes = {mode for kind, mode, *_ in look(uploads).values() if kind == 0o100000}
    folder_modes = {mode for kind, mode, *_ in look(uploads).values() if kind == 0o040000}
    assert (modes, folder_modes) == ({0o600}, {0o750})
    assert (uploads / "dangling").is_symlink()


def test_a_path_behind_a_symbolic_link_is_the_tree_it_leads_to(uploads: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(uploads)
    recorded = look(uploads)
    part, plain = backed_up(component(tmp_path / "current"))
    assert part.holds["files"] == 5
    change(uploads)
    restore = restoring(part, plain)
    component(tmp_path / "current").stage(restore)
    component(tmp_path / "current").swap(restore)
    component(tmp_path / "current").settle(restore)
    assert look(uploads) == recorded
    assert (tmp_path / "current").is_symlink()


def test_the_plan_compares_what_is_there_with_the_record(uploads: Path) -> None:
    part, _ = backed_up(component(uploads))
    (line,) = component(uploads).overwrites([part])
    assert line.startswith(f"{uploads}: 8 entries, ")
    assert "→ 5 files, 70,014 bytes of 20" in line
    shutil.rmtree(uploads)
    (line,) = component(uploads).overwrites([part])
    assert "nothing there → 5 files" in line


def test_by_hand_is_followed_to_the_letter(uploads: Path, tmp_path: Path) -> None:
    recorded = look(uploads)
    part, plain = backed_up(component(uploads))
    (tmp_path / part.name).write_bytes(plain)
    shutil.rmtree(uploads)
    command = component(uploads).by_hand([part]).split("```sh\n")[1].split("```")[0]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert look(uploads) == recorded


def test_a_malicious_archive_writes_nothing_outside(uploads: Path, tmp_path: Path) -> None:
    part, _ = backed_up(component(uploads))
    live = look(uploads)
    target = tmp_path / "victim"
    evil = BytesIO()
    with tarfile.open(fileobj=evil, mode="w") as archive:
        link = tarfile.TarInfo("my uploads/out")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("my uploads/out/victim"))
    restore = restoring(part, evil.getvalue())
    with pytest.raises(IntegrityError, match=r"my uploads/out/victim: .*symbolic link"):
        component(uploads).stage(restore)
    component(uploads).revert(restore)
    assert not target.exists()
    assert look(uploads) == live


def test_without_root_others_files_come_back_as_ones_own(uploads: Path, tmp_path: Path) -> None:
    part, plain = backed_up(component(uploads))
    others = BytesIO()
    with tarfile.open(fileobj=BytesIO(plain)) as old, tarfile.open(fileobj=others, mode="w") as new:
        for member in old:
            member.uid = member.gid = 12345
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    digest = TreeDigest()
    plain = b"".join(digest.through([others.getvalue()]))
    part = part.model_copy(update={"holds": {**part.holds, "tree_sha256": digest.sha256}})
    (tmp_path / "part.json").write_text(part.model_dump_json())
    (tmp_path / "plain").write_bytes(plain)
    home = tmp_path / "home"
    home.mkdir()
    drop = []
    if os.geteuid() == 0:
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(home, 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    script = (
        "import sys; from pathlib import Path; from tests.trees import restoring\n"
        "from workers.component import Part; from tasks.components.files import Component\n"
        "home, given = map(Path, sys.argv[1:])\n"
        "it = Component(name='u', kind='files', host='h', path=str(home / 'tree'))\n"
        "restore = restoring(Part.model_validate_json((given / 'part.json').read_text()), (given / 'plain').read_bytes())\n"
        "it.stage(restore); it.swap(restore); it.settle(restore)\n"
    )
    subprocess.run(
        [*drop, sys.executable, "-c", script, str(home), str(tmp_path)], check=True, cwd=Path.cwd()
    )
    assert look(home / "tree", owners=False) == look(uploads, owners=False)
    assert (home / "tree" / "zero").stat().st_uid == home.stat().st_uid


def test_a_sparse_gigabyte_passes_in_flat_memory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with (root / "disk").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(600_000_000)
        file.write(b"in the middle")
    (root / "dense").write_bytes(b"x" * 100_000_000)
    script = (
        "import resource, sys; from tasks.components.files import Component\n"
        "(source,) = Component(name='u', kind='files', host='h', path=sys.argv[1]).sources()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "size = sum(map(len, source.chunks))\n"
        "print(size, source.holds['bytes'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(root)], check=True, capture_output=True, cwd=Path.cwd()
    )
    size, held, grown = map(int, output.stdout.split())
    assert held == (1 << 30) + 100_000_000
    assert size < 110_000_000
    assert grown < 20_000, "kilobytes"
    part, plain = backed_up(component(root))
    restore = restoring(part, plain, chunk=1 << 18)
    (root / "disk").unlink()
    component(root).stage(restore)
    component(root).swap(restore)
    component(root).settle(restore)
    restored = (root / "disk").stat()
    assert restored.st_size == 1 << 30
    assert restored.st_blocks * 512 < 1_000_000
    with (root / "disk").open("rb") as file:
        file.seek(600_000_000)
        assert file.read(13) == b"in the middle"


def test_a_tree_comes_from_exactly_one_part(uploads: Path) -> None:
    part, plain = backed_up(component(uploads))
    restore = Restore("run", [part, part], restoring(part, plain).read)
    with pytest.raises(Permanent, match="one part"):
        component(uploads).stage(restore)
    assert isinstance(part, Part)


@pytest.mark.parametrize("path", ["relative", "/", "/a/../b", "//"])
def test_a_path_must_be_absolute(path: str) -> None:
    with pytest.raises(ValueError, match="absolute"):
        Component.model_validate({"name": "u", "kind": "files", "host": "h", "path": path})
