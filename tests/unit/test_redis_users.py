"""The lines of an aclfile, and the scripts that put one in place and back, interrupted anywhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.components.redis_users import REVERT, SWAP, Users
from tests.redis_servers import killed_at

CHANGERS = ("cp", "mv", "rm", "chown", "chmod", "sync", "touch", "cat")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("killed", ["swap", "revert"])
def test_killed_anywhere_the_file_converges(tmp_path: Path, killed: str, there: bool) -> None:
    """Its script dies before each of its programs once; run again it ends well, and so does the way back."""
    staging, aclfile = tmp_path / "staging", tmp_path / "acl/users.acl"

    def run(script: str) -> bool:
        argv = ["sh", "-euc", script, "sh", str(staging), str(aclfile)]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    kills, ended = 0, False
    for fatal in range(1, 30):
        for end in [SWAP, REVERT] if killed == "swap" else [REVERT]:
            subprocess.run(["rm", "-rf", str(staging), str(aclfile.parent)], check=True)
            (staging / "users").mkdir(parents=True)
            aclfile.parent.mkdir()
            (staging / "users/new").write_text("new\n")
            if there:
                aclfile.write_text("old\n")
            assert killed == "swap" or run(SWAP)
            with killed_at(tmp_path, fatal, *CHANGERS) as count:
                ended = run(SWAP if killed == "swap" else REVERT)
                assert ended == (int(count.read_text()) < fatal)
            kills += not ended
            assert run(end)
            expected = "new\n" if end is SWAP else "old\n" if there else None
            assert (aclfile.read_text() if aclfile.exists() else None) == expected, (fatal, end)
            assert list(aclfile.parent.iterdir()) == ([aclfile] if expected else [])
        if ended:
            break
    assert kills >= (1 if killed == "revert" and not there else 4)


def test_a_file_that_is_a_mount_of_its_own_is_written_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one file of a container may be: nothing can be renamed over it."""
    aclfile, programs = tmp_path / "users.acl", tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "users").mkdir()
    (tmp_path / "users/new").write_text("new\n")
    aclfile.write_text("old\n")
    (programs / "mv").write_text(f'#!/bin/sh\ncase $* in *{aclfile}) exit 1 ;; esac\nexec /bin/mv "$@"\n')
    (programs / "mv").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    for script, content in ((SWAP, "new\n"), (REVERT, "old\n")):
        argv = ["sh", "-euc", script, "sh", str(tmp_path), str(aclfile)]
        subprocess.run(argv, check=True)
        assert aclfile.read_text() == content
        assert not aclfile.with_name("users.acl.new").exists()


def test_lines_are_read_as_redis_reads_them() -> None:
    text = b"user a on nopass\nuser \xff\x00 off\n\n  \nuser b  on  \n"
    found = Users.of(text)
    assert found.names == ["a", "b", "\\xff\x00"]
    assert found.lines[b"b"] == b"user b  on"
    assert found.difference(Users.of(b"user a nopass on\nuser c on\nuser b off")) == ["b", "c", "\\xff\x00"]
    assert Users.of(found.text) == found
