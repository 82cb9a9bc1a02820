"""The users of a Redis server with an aclfile: backed up, restored with its data, compared, and taken back."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from compose.demo.docker_images import Images, ensure_engine
from tasks.components.redis import Component
from tasks.components.redis_users import USERS
from tests.redis_servers import PASSWORD, PROGRAMS, ContainedServer, Server, hashed, restore_all, store_all
from workers.component import Restore
from workers.errors import ComparisonError, IntegrityError, Permanent, RuntimeUnavailable

SECRET = "the application's own"
ACCOUNTS = [
    [
        "app",
        "on",
        f">{SECRET}",
        f">{SECRET} 2",
        "~app:*",
        "resetchannels",
        "&news.*",
        "-@all",
        "+@read",
        "+set",
    ],
    ["reader", "on", "nopass", "~*", "+@read", "-get"],
    ["gone", "off"],
]


@pytest.fixture(scope="module", params=list(PROGRAMS.values()), ids=list(PROGRAMS))
def started(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes its users from a file beside its data folder, in a folder of its own."""
    folder = tmp_path_factory.mktemp("redis")
    (folder / "acl").mkdir()
    (folder / "acl/users.acl").write_text(f"user default on #{hashed(PASSWORD)} ~* &* +@all\n")
    shared = Server(folder, request.param, save='""', aclfile=f'"{folder}/acl/users.acl"')
    shared.start()
    yield shared
    assert shared.do("stop")


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)


@pytest.fixture
def server(started: Server) -> Server:
    """The same server for all tests, each with the same users."""
    if not started.do("status"):
        started.start()
    give_accounts(started)
    return started


def give_accounts(server: Server) -> None:
    with server.client() as client:
        client.flushall()
        for user in client.acl_users():
            if user != "default":
                client.execute_command("ACL", "DELUSER", user)
        for account in ACCOUNTS:
            client.execute_command("ACL", "SETUSER", *account)
        if server.version >= (7,):
            client.execute_command("ACL", "SETUSER", "app", "(~other:* +get)")
        client.execute_command("ACL", "SAVE")
        client.set("key", "value")


def users(server: Server) -> list[list[str]]:
    """The words of each user's line, whose order changes with every start of a server."""
    with server.client() as client:
        return sorted(sorted(str(line).split(" ")) for line in client.acl_list())


def change(server: Server) -> None:
    """Change every kind of thing, also of the user that the worker connects with."""
    with server.client() as client:
        client.execute_command("ACL", "DELUSER", "gone")
        client.execute_command("ACL", "SETUSER", "app", "resetpass", ">another")
        client.execute_command("ACL", "SETUSER", "newcomer", "on", ">x", "+@all")
        client.execute_command("ACL", "SETUSER", "default", ">a second password")
        client.execute_command("ACL", "SAVE")
        client.set("key", "another")


def test_they_come_back_with_the_data(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    before = users(server)
    component = server.component()
    parts, data = store_all(component)
    assert [part.kind for part in parts] == ["redis-rdb", USERS]
    assert parts[1].holds == {"users": ["app", "default", "gone", "reader"]}
    change(server)
    other = users(server)
    [_, plan] = component.overwrites(parts)
    assert "replaced by app, default, gone, reader; gone will be newcomer; default stays as it is" in plan
    component.check(parts[1], iter([data[parts[1].name]]))
    assert component.rehearse(restore_all(parts, data))["users"] == parts[1].holds["users"]

    aclfile = server.folder / "acl/users.acl"
    aclfile.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(aclfile, 12345, 23456)
    owner = (aclfile.stat().st_uid, aclfile.stat().st_gid, aclfile.stat().st_mode)
    for step in ("stage", "swap", "swap", "revert", "revert"):
        getattr(component, step)(restore_all(parts, data))
    assert users(server) == other
    for step in ("stage", "stage", "swap", "swap", "settle"):
        getattr(component, step)(restore_all(parts, data))
    # The user that connects is as it is now; all others are as they were.
    wanted = [words for words in before if "default" not in words]
    wanted += [words for words in other if "default" in words]
    assert sorted(users(server)) == sorted(wanted)
    assert (aclfile.stat().st_uid, aclfile.stat().st_gid, aclfile.stat().st_mode) == owner
    assert [path.name for path in aclfile.parent.iterdir()] == ["users.acl"]
    with server.client() as client:
        assert client.get("key") == b"value"
        client.execute_command("ACL", "SETUSER", "default", "<a second password")
        client.execute_command("ACL", "SAVE")
    told = caplog.text + "".join(part.model_dump_json() for part in parts) + plan + component.by_hand(parts)
    for secret in (SECRET, PASSWORD, "nopass"):
        assert secret not in told
        assert hashed(secret) not in told


def test_a_user_of_its_own_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's account was made after the backup, and the restore takes every account away that was."""
    parts, data = store_all(server.component())
    monkeypatch.setenv("TEST_REDIS_PASSWORD", "worker")
    component = server.component(username="backup")
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "backup", "on", ">worker", "+config|get")
        [lacks] = component.preflight()
        assert "may not run INFO, MODULE LIST, BGSAVE, ACL LIST" in lacks.what
        client.execute_command(*lacks.change.partition("   #")[0].split())
        client.execute_command("ACL", "SAVE")
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore_all(parts, data))
    with server.client() as client:
        assert sorted(client.acl_users()) == ["app", "backup", "default", "gone", "reader"]
    assert component.preflight() == []


def test_by_hand_is_followed_to_the_letter(server: Server, tmp_path: Path) -> None:
    before = users(server)
    parts, data = store_all(server.component())
    change(server)
    for part in parts:
        (tmp_path / part.name).write_bytes(data[part.name])
    text = server.component(aclfile=server.folder / "acl/users.acl").by_hand(parts)
    assert server.do("stop")
    subprocess.run(["sh", "-ec", text.split("```sh\n")[1].split("```")[0]], cwd=tmp_path, check=True)
    server.start()
    assert users(server) == before
    with server.client() as client:
        assert client.get("key") == b"value"
    contained = Component(name="cache", kind="redis", host="db1", container="redis")
    text = contained.by_hand(parts)
    assert "docker cp users.acl 'redis:<what CONFIG GET aclfile says>'" in text


def test_what_they_cannot_be_restored_to_says_why(server: Server, tmp_path: Path) -> None:
    parts, data = store_all(server.component())
    before = users(server)
    alone = "set users = false to restore the data alone"
    with pytest.raises(Permanent, match=f"does not exist; {alone}"):
        server.component(aclfile=tmp_path / "no/users.acl").stage(restore_all(parts, data))
    plain = Server(tmp_path / "plain", server.program, save='""')
    plain.start()
    try:
        assert len(store_all(plain.component())[0]) == 1
        wanted = restore_all(parts, data)
        assert "its users stay as they are, for it has no aclfile" in plain.component().overwrites(parts)[1]
        plain.component().stage(wanted)
        assert (
            "users app, default, gone, reader of the backup were not restored: the server has no aclfile"
            in str(wanted.warnings)
        )
        plain.component().swap(wanted)
        plain.component().revert(wanted)
    finally:
        assert plain.do("stop")
    for step in ("stage", "swap", "settle"):
        getattr(server.component(users=False), step)(restore_all(parts, data))
    assert users(server) == before


def test_a_server_that_is_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its aclfile, as in an empty volume, it does not even start; a restore brings both."""
    before = users(server)
    parts, data = store_all(server.component())
    assert server.do("stop")
    with pytest.raises(RuntimeUnavailable, match=r"set aclfile"):
        server.component(appendonly=False).stage(restore_all(parts, data))
    aclfile = server.folder / "acl/users.acl"
    component = server.component(appendonly=False, aclfile=aclfile)
    text = aclfile.read_text()
    aclfile.unlink()
    monkeypatch.setenv("TEST_REDIS_PASSWORD", "changed since")
    with pytest.raises(Permanent, match="does not open the user default as it is in the backup"):
        component.stage(restore_all(parts, data))
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    component.stage(restore_all(parts, data))
    component.swap(restore_all(parts, data))
    assert users(server) == before
    component.revert(restore_all(parts, data))
    assert not aclfile.exists()
    aclfile.write_text(text)


def test_what_no_server_can_load_is_refused(server: Server) -> None:
    parts, data = store_all(server.component())
    name = parts[1].name
    before, digest = users(server), hashed(SECRET)
    for damaged in (
        data[name].replace(b"+@read", b"+@raed"),
        data[name].replace(digest.encode(), digest[:-1].encode()),
        data[name][:30],
    ):
        with pytest.raises((IntegrityError, ComparisonError)) as caught:
            server.component().check(parts[1], iter([damaged]))
        assert digest[:20] not in str(caught.value)
        with pytest.raises(ComparisonError):
            server.component().stage(restore_all(parts, {**data, name: damaged}))
    server.component().revert(restore_all(parts, data))
    assert users(server) == before


def test_an_older_server_refuses_what_it_does_not_know(server: Server) -> None:
    parts, data = store_all(server.component())
    newer = data[parts[1].name].replace(b"user gone off", b"user gone off +@a-category-of-tomorrow")
    with pytest.raises(
        ComparisonError, match=rf"Redis {'.'.join(map(str, server.version))}\) cannot load the users"
    ):
        server.component().stage(restore_all(parts, {**data, parts[1].name: newer}))
    server.component().revert(restore_all(parts, data))


def test_users_that_were_not_loaded_are_an_error(server: Server) -> None:
    parts, data = store_all(server.component())
    component = server.component()
    change(server)
    other = users(server)
    component.stage(restore_all(parts, data))
    [staged] = server.data.glob(".ai-micro-backup-*/users/new")
    component.swap(restore_all(parts, data))
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "+get")
    with pytest.raises(ComparisonError, match="has not loaded the users reader as restored"):
        component.swap(restore_all(parts, data))
    assert staged.stat().st_mode & 0o077 == 0
    component.revert(restore_all(parts, data))
    assert users(server) == other


def test_restores_are_typed(server: Server) -> None:
    parts, data = store_all(server.component())
    with pytest.raises(Permanent, match="expected one redis-rdb or redis-aof, got redis-users"):
        server.component().stage(Restore("run", [parts[1]], restore_all(parts, data).read))
    assert hashlib.sha256(data[parts[0].name]).hexdigest() == parts[0].plain_sha256


@pytest.mark.docker
def test_in_a_container(docker_client: docker.DockerClient) -> None:
    """Redis 8.0: only what lies in a volume outlasts the container, and can be put there while it is stopped."""
    ensure_engine()
    Images().build()
    server = ContainedServer(docker_client, aclfile="/data/users.acl")
    try:
        server.component().loaded()
        give_accounts(server)
        before = users(server)
        parts, data = store_all(server.component())
        change(server)
        other = users(server)
        with pytest.raises(Permanent, match="it lies in no volume; set users = false"):
            server.component(aclfile="/etc/users.acl").stage(restore_all(parts, data))
        for step in ("stage", "swap", "revert"):
            getattr(server.component(), step)(restore_all(parts, data))
        assert users(server) == other
        for step in ("stage", "swap", "settle"):
            getattr(server.component(), step)(restore_all(parts, data))
        kept = [words for words in users(server) if "default" not in words]
        assert kept == [words for words in before if "default" not in words]
        with server.client() as client:  # the file is the server's own still
            assert client.execute_command("ACL", "SAVE") == b"OK"
            assert client.get("key") == b"value"
    finally:
        server.remove()
