"""The config component over this host's runtime."""

import hashlib
import os
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tasks.components.config import Component
from tests.integration.test_files import Killer, ended
from tests.trees import backed_up, leftovers, look, restoring
from workers.errors import IntegrityError, Permanent

PATHS = ["api auth/.env", "api auth/docker-compose.yml", "front/.env", "-redis/.env", "gone/.env", "top.conf"]
SECRET = b"PASSWORD='geheim \xc3\xa9'\n"


def component(root: Path, **settings: Any) -> Component:
    values = {
        "name": f"config-{os.getpid()}",
        "kind": "config",
        "host": "here",
        "root": str(root),
        "paths": PATHS,
    }
    return Component.model_validate({**values, **settings})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with all listed files but one, and one that is not listed."""
    root = tmp_path / "my system"
    for path in [*PATHS, "front/unlisted"]:
        if not path.startswith("gone"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(SECRET if path.endswith(".env") else path.encode())
            (root / path).chmod(0o600 if path.endswith(".env") else 0o644)
            os.utime(root / path, (1_700_000_000, 1_700_000_000.5))
    return root


def listed(root: Path) -> dict[bytes, tuple[Any, ...]]:
    return {name: seen for name, seen in look(root).items() if name.decode() in PATHS}


def change(root: Path) -> None:
    (root / "api auth/.env").write_text("changed")
    shutil.rmtree(root / "-redis")
    shutil.rmtree(root / "front")
    (root / "gone").mkdir(exist_ok=True)
    (root / "gone/.env").write_text("appeared after the backup")
    (root / "api auth" / "unlisted").write_text("new")


def test_the_listed_files_come_back_and_nothing_else_moves(root: Path) -> None:
    recorded = listed(root)
    part, plain = backed_up(component(root))
    change(root)
    changed = look(root)
    restore = restoring(part, plain)
    it = component(root)
    it.stage(restore)
    it.swap(restore)
    assert listed(root) == recorded
    assert (root / "api auth" / "unlisted").read_text() == "new"
    assert not (root / "gone/.env").exists()
    it.swap(restore)
    it.revert(restore)
    assert without_folder_times(look(root)) == without_folder_times(changed)
    assert leftovers(root) == []
    it.stage(restore)
    it.swap(restore)
    it.settle(restore)
    assert listed(root) == recorded
    assert leftovers(root) == []


def without_folder_times(seen: dict[bytes, tuple[Any, ...]]) -> dict[bytes, tuple[Any, ...]]:
    return {name: (*it[:3], *it[4:]) if it[0] == 0o040000 else it for name, it in seen.items()}


def test_the_record_holds_each_files_digest_and_mode_and_what_is_missing(root: Path) -> None:
    part, plain = backed_up(component(root))
    existing = [path for path in PATHS if path != "gone/.env"]
    contents = {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in existing}
    assert part.holds["contents"] == contents
    assert part.holds["modes"]["front/.env"] == "0600"
    assert part.holds["missing"] == ["gone/.env"]
    assert part.holds["files"] == 5
    with tarfile.open(fileobj=BytesIO(plain)) as archive:
        assert archive.getnames() == sorted(existing)
    assert "geheim" not in part.model_dump_json()


def test_all_missing_is_a_failure(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="none of the 1 listed files"):
        component(root, paths=["nowhere"]).sources()
    with pytest.raises(Permanent, match="none of the 6 listed files"):
        component(tmp_path / "no root").sources()
    (source,) = component(root, exclude=["*"]).sources()
    with pytest.raises(Permanent, match="empty"):
        list(source.chunks)


def test_the_content_digest_changes_with_contents_modes_and_names_but_not_with_times(root: Path) -> None:
    it = component(root)
    part, _ = backed_up(it)
    first = it.content_digest()
    assert part.holds["content_sha256"] == first
    os.utime(root / "top.conf", (1, 1))
    (root / "front/unlisted").write_text("other")
    assert it.content_digest() == first
    seen = {first}
    (root / "top.conf").chmod(0o600)
    seen.add(it.content_digest())
    (root / "top.conf").write_text("top.CONF")
    seen.add(it.content_digest())
    (root / "gone").mkdir()
    (root / "gone/.env").touch()
    seen.add(it.content_digest())
    (root / "gone/.env").unlink()
    (root / "front/.env").unlink()
    seen.add(it.content_digest())
    (root / "front/.env").symlink_to("../top.conf")
    seen.add(it.content_digest())
    assert len(seen) == 6
    for path in PATHS:
        (root / path).unlink(missing_ok=True)
    assert it.content_digest() not in seen


def test_a_link_is_kept_as_a_link_with_a_warning(root: Path) -> None:
    (root / "top.conf").unlink()
    (root / "top.conf").symlink_to("/run/secrets/conf")
    part, plain = backed_up(component(root))
    assert part.holds["outward_links"] == 1
    assert any(line.startswith("top.conf: a link") for line in part.holds["warnings"])
    (root / "top.conf").unlink()
    restore = restoring(part, plain)
    component(root).stage(restore)
    component(root).swap(restore)
    assert os.readlink(root / "top.conf") == "/run/secrets/conf"  # noqa: PTH115
    component(root).revert(restore)
    forged = part.model_copy(update={"holds": {**part.holds, "outward_links": 0}})
    with pytest.raises(IntegrityError, match=r"top\.conf: a symbolic link out of the tree"):
        component(root).stage(restoring(forged, plain, run_id="run2"))


def test_a_folder_may_be_listed(root: Path) -> None:
    (root / "front" / "node_modules").mkdir()
    (root / "front" / "node_modules" / "x.js").touch()
    part, plain = backed_up(component(root, paths=["front"], exclude=["node_modules"]))
    assert sorted(part.holds["contents"]) == ["front/.env", "front/unlisted"]
    shutil.rmtree(root / "front")
    restore = restoring(part, plain)
    component(root).stage(restore)
    component(root).swap(restore)
    component(root).settle(restore)
    assert (root / "front/.env").read_bytes() == SECRET


def test_a_new_machine_gets_the_folder_and_a_revert_takes_it_away(root: Path, tmp_path: Path) -> None:
    recorded = listed(root)
    part, plain = backed_up(component(root))
    shutil.rmtree(root)
    restore = restoring(part, plain)
    component(root).stage(restore)
    component(root).swap(restore)
    assert listed(root) == recorded
    component(root).revert(restore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("swapped", "killed", "then"),
    [
        (False, "swap", "swap"),
        (False, "swap", "revert"),
        (True, "revert", "revert"),
        (True, "settle", "settle"),
    ],
)
def test_a_step_killed_anywhere_converges(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    swapped: bool,
    killed: str,
    then: str,
) -> None:
    part, plain = backed_up(component(root))
    recorded = listed(root)
    killer = Killer(tmp_path, monkeypatch, "before")
    completed, at = False, 0
    subprocess.run(["cp", "-a", root, tmp_path / "copy"], check=True)
    while not completed:
        at += 1
        assert at < 300, "the step never ended"
        change(root)
        live = look(root)
        it, restore = component(root), restoring(part, plain, run_id=f"run{at}")
        it.stage(restore)
        if swapped:
            it.swap(restore)
        with killer.at(at):
            completed = ended(it, restore, killed)
        getattr(it, then)(restore)
        if then == "swap":
            it.settle(restore)
        if then == "revert":
            assert without_folder_times(look(root)) == without_folder_times(live)
        else:
            assert listed(root) == recorded
            assert (root / "api auth" / "unlisted").read_text() == "new"
        assert leftovers(root) == []
        shutil.rmtree(root)
        subprocess.run(["cp", "-a", tmp_path / "copy", root], check=True)
    assert at > 3


def test_the_plan_names_what_is_removed(root: Path) -> None:
    part, _ = backed_up(component(root))
    change(root)
    lines = component(root).overwrites([part])
    assert "→ 5 files" in lines[0]
    assert lines[1:] == [f"{root}/gone/.env: removed, as it was not there at the backup"]
    shutil.rmtree(root)
    (line,) = component(root).overwrites([part])
    assert "nothing there → 5 files" in line


def test_by_hand_is_followed_to_the_letter(root: Path, tmp_path: Path) -> None:
    recorded = listed(root)
    part, plain = backed_up(component(root))
    (tmp_path / part.name).write_bytes(plain)
    shutil.rmtree(root)
    root.mkdir()
    command = component(root).by_hand([part]).split("```sh\n")[1].split("```")[0]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert listed(root) == recorded


@pytest.mark.parametrize("path", ["/absolute", "../up", "a/../../b", "", ".", "new\nline"])
def test_a_listed_path_must_be_relative_and_plain(root: Path, path: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        component(root, paths=[path])
