"""Users of a Redis server by commands and real workers: encrypted, proven, planned, restored, and told by no record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path

import pytest
from pyrage import x25519

from tests.redis_servers import NEWEST, PASSWORD, PROGRAMS, Server, cli, hashed
from tests.systems import System

SECRET = "what only the application knows"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("redis")
    (folder / "users.acl").write_text(
        f"user default on #{hashed(PASSWORD)} ~* &* +@all\nuser app on #{hashed(SECRET)} ~app:* -@all +get\n"
    )
    server = Server(folder, PROGRAMS[NEWEST], save='""', aclfile=f'"{folder}/users.acl"')
    server.start()
    yield server
    assert server.do("stop")


@pytest.fixture(scope="module")
def system(cluster_factory: Callable[..., System], server: Server) -> System:
    identity, key = x25519.Identity.generate(), server.folder / "key"
    key.write_text(f"{identity}\n")
    key.chmod(0o600)
    commands = "".join(f"{name} = {dumps(command)}\n" for name, command in server.commands.items())
    settings = f"""\
[components.cache]
kind = "redis"
host = "db1"
port = {server.port}
password = {{ env = "TEST_REDIS_PASSWORD" }}
server = {dumps(str(server.program))}
cli = {dumps(cli(server.program))}
data_dir = {dumps(str(server.data))}
{commands}
[encryption]
recipients = ["{identity.to_public()}"]
identities = [{{ file = "{key}" }}]
"""
    environment = {"TEST_REDIS_PASSWORD": PASSWORD}
    return cluster_factory(settings, environment=environment, workers=("control", "db1"), beat=False)


def test_lost_users_come_back(system: System, server: Server) -> None:
    with server.client() as client:
        client.set("app:key", "value")
    assert system.cli("preflight", "cache") == {"cache": []}
    archive = Path(system.complete()["archive"]).name
    run = system.cli("verify", archive, "--level", "restore")
    assert run["state"] == "complete", run
    with server.client() as client:
        client.flushall()
        client.execute_command("ACL", "DELUSER", "app")
        client.execute_command("ACL", "SAVE")
    plan = system.cli("restore", archive, "--plan")
    assert "its users will be replaced by app, default" in dumps(plan)
    run = system.cli("restore", archive, "--component", "cache", "--confirm", "cache")
    assert run["state"] == "complete", run
    with server.client() as client:
        assert sorted(client.acl_users()) == ["app", "default"]
        assert client.acl_getuser("app")["passwords"] == [hashed(SECRET)]
        assert client.get("app:key") == b"value"
    kept = [path for path in system.folder.rglob("*") if path.is_file()]
    assert [path for path in kept if archive in path.name]
    assert not [path for path in kept if hashed(SECRET).encode() in path.read_bytes()]
    assert not list(server.folder.rglob(".ai-micro-backup*"))
