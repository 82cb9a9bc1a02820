"""Where a Redis backup comes from beside the data folder, and how it is checked: on one server a version, shared."""

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compose.demo.embedded import free_port
from tests.redis_servers import PASSWORD, PROGRAMS, Server, back_up, cli, fill, restore, same
from workers.component import Part, Restore
from workers.errors import ComparisonError, IntegrityError, Permanent, RuntimeUnavailable


@pytest.fixture(scope="module", params=list(PROGRAMS.values()), ids=list(PROGRAMS))
def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose data every test leaves as it was."""
    settings = {"appendonly": "yes", "save": '""', "repl_diskless_sync_delay": "0"}
    shared = Server(tmp_path_factory.mktemp("redis"), request.param, **settings)
    shared.start()
    fill(shared)
    yield shared
    assert shared.do("stop")


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; nothing may be left there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.parametrize("diskless", ["no", "yes"])
def test_over_the_network_alone(server: Server, diskless: str, scratch: Path) -> None:
    """Of the server, only its port is used; diskless, a mark follows the snapshot, which is no part of it."""
    with server.client() as client:
        client.config_set("repl-diskless-sync", diskless)
    before = server.fingerprint()
    there = {"method": "network", "data_dir": "/nowhere"}
    part, data = back_up(server.component(**there))
    assert (
        sum(part.holds["databases"].values()) == part.holds["keys"] == len(before) - ("functions" in before)
    )
    without, bare = back_up(server.component(**there, server="no-such-program"))
    assert set(without.holds) == {"server_version"}
    assert len(bare) == len(data)
    assert bare[-9] == 255
    component = server.component()
    component.check(part, iter([data]))
    assert component.rehearse(restore(part, data))["databases"] == part.holds["databases"]
    for step in ("stage", "swap", "settle"):
        getattr(component, step)(restore(without, bare))
    assert same(server.fingerprint(), before)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("checker", ["redis-server", "no-such-program"])
def test_a_stream_that_is_cut_is_an_error(server: Server, checker: str) -> None:
    """The connection ends when 100 kB of the snapshot have passed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    threading.Thread(target=serve, args=(near,), daemon=True).start()

        def serve(near: socket.socket) -> None:
            with (
                near,
                socket.create_connection(("127.0.0.1", server.port)) as far,
                contextlib.suppress(OSError),
            ):
                threading.Thread(target=forward, args=(near, far), daemon=True).start()
                left = 100_000
                while left > 0 and (data := far.recv(min(left, 4096))):
                    near.sendall(data)
                    left -= len(data)
                near.shutdown(socket.SHUT_RDWR)

        def forward(near: socket.socket, far: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := near.recv(4096):
                    far.sendall(data)
                far.shutdown(socket.SHUT_WR)

        threading.Thread(target=relay, daemon=True).start()
        port = listener.getsockname()[1]
        [source] = server.component(method="network", port=port, server=checker).sources()
        with pytest.raises(RuntimeUnavailable, match="over the network"):
            list(source.chunks)
        listener.shutdown(socket.SHUT_RDWR)


def test_a_refused_stream_says_why(server: Server) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", f">{PASSWORD}", "~*", "+info", "+ping")
    [source] = server.component(method="network", username="reader").sources()
    with pytest.raises(Permanent, match="NOPERM") as caught:
        list(source.chunks)
    assert PASSWORD not in str(caught.value)
    with server.client() as client:
        client.execute_command("ACL", "DELUSER", "reader")


@pytest.mark.parametrize("method", ["file", "network", "aof"])
def test_the_least_rights(server: Server, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`preflight` changes nothing and names what a user lacks; with exactly what it says to type, backups work."""
    monkeypatch.setenv("TEST_REDIS_PASSWORD", "least")
    component = server.component(method=method, username="backup")
    counters = ("rdb_last_save_time", "aof_rewrites", "sync_full", "total_forks")
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "backup", "on", ">least", "+info")
        before = [client.info("all").get(counter) for counter in counters]
        found = component.preflight()
        [lacks] = [finding for finding in found if not finding.advice]
        commands = {"file": "BGSAVE", "network": "REPLCONF", "aof": "BGSAVE"}[method]
        assert f"the user backup may not run MODULE LIST, {commands}, CONFIG GET" in lacks.what
        client.execute_command(*lacks.change.partition("   #")[0].split())
        assert [finding.what for finding in component.preflight() if not finding.advice] == []
        assert [client.info("all").get(counter) for counter in counters] == before
    part, data = back_up(component)
    component.check(part, iter([data]))
    with server.client() as client:
        client.execute_command("ACL", "DELUSER", "backup")


def test_preflight_looks_at_all_that_a_restore_needs(server: Server, tmp_path: Path) -> None:
    assert server.component().preflight() == []
    found = {
        "no program": server.component(server="no-such-program"),
        "could not find the data folder while the server is down": server.component(data_dir=None),
        "cannot be read": server.component(data_dir=tmp_path / "nowhere"),
        "could not be restored to /nowhere/users.acl: its folder does not exist": server.component(
            aclfile="/nowhere/users.acl"
        ),
    }
    for what, component in found.items():
        [finding] = component.preflight()
        assert what in finding.what
        assert finding.change
        assert not finding.advice
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "app", "on", "nopass")
        [finding] = server.component().preflight()
        client.execute_command("ACL", "DELUSER", "app")
    assert "the users app are in the server's configuration" in finding.what
    assert finding.advice


def test_a_replica(server: Server, tmp_path: Path) -> None:
    """It is backed up while it follows its primary, by both methods, and not when it has lost it."""
    replica = Server(
        tmp_path, server.program, replicaof=f"127.0.0.1 {server.port}", masterauth=f'"{server.quoted}"'
    )
    replica.start()
    try:
        assert replica.becomes("master_link_status", "up")
        whole = back_up(server.component(method="network"))[0].holds["databases"]
        for method in ("file", "network"):
            part, data = back_up(replica.component(method=method))
            assert part.holds["databases"] == whole
            server.component().check(part, iter([data]))
        with server.client() as primary:
            primary.config_set("requirepass", "another")
            primary.execute_command("CLIENT", "KILL", "TYPE", "replica")
            assert replica.becomes("master_link_status", "down")
            try:
                with pytest.raises(RuntimeUnavailable, match="without a connection to its primary"):
                    replica.component().sources()
            finally:
                primary.config_set("requirepass", PASSWORD)
    finally:
        assert replica.do("stop")


def test_a_node_of_a_cluster_is_refused(server: Server, tmp_path: Path) -> None:
    # The nodes of a cluster talk to each other on the port 10,000 above.
    low = next(port for port in iter(free_port, None) if port < 55_000)
    node = Server(tmp_path, server.program, port=str(low), cluster_enabled="yes", save='""')
    node.port = low
    node.start()
    try:
        part, data = back_up(server.component())
        for refused in (node.component().sources, lambda: node.component().stage(restore(part, data))):
            with pytest.raises(Permanent, match="Redis Cluster, which is not supported"):
                refused()
    finally:
        assert node.do("stop")


def test_checks_find_any_damage(server: Server, scratch: Path) -> None:
    part, data = back_up(server.component())
    component = server.component()
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 4
    for damaged in (bytes(flipped), data[:-1], data[: len(data) // 2], b"", data + b"x"):
        with pytest.raises(IntegrityError) as caught:
            component.check(part, iter([damaged[:50_000], damaged[50_000:]]))
        assert "session:" not in str(caught.value)
    for damaged in (bytes(flipped), data[: len(data) // 2]):
        with pytest.raises(IntegrityError, match="while it loaded it") as caught:
            component.rehearse(restore(part, damaged))
        assert "session:" not in str(caught.value)
    assert not list(scratch.iterdir())


def test_a_rehearsal_compares_each_database(server: Server, scratch: Path) -> None:
    part, data = back_up(server.component())
    before = server.fingerprint()
    component = server.component()
    assert component.rehearse(restore(part, data)) == {
        "loaded_by": f"redis-server {part.holds['server_version']}",
        "databases": part.holds["databases"],
    }
    counts = part.holds["databases"]
    moved = {**counts, "db0": counts["db0"] - 1, "db3": counts["db3"] + 1}
    for count, wrong in (("databases", moved), ("expiring", {**part.holds["expiring"], "db0": 5})):
        other = part.model_copy(update={"holds": {**part.holds, count: wrong}})
        with pytest.raises(ComparisonError, match=f"{count} loaded, .* recorded"):
            component.rehearse(restore(other, data))
        with pytest.raises(ComparisonError, match=f"{count} found, .* recorded"):
            component.check(other, iter([data]))

    def read(_: Part) -> Iterator[bytes]:
        yield data
        raise IntegrityError("not as recorded")

    with pytest.raises(IntegrityError, match="not as recorded"):
        component.rehearse(Restore("run", [part], read))
    with pytest.raises(Permanent, match="no program"):
        server.component(server="no-such-program").rehearse(restore(part, data))
    assert same(server.fingerprint(), before)
    assert not list(scratch.iterdir())


def test_a_rehearsal_counts_what_has_expired(server: Server) -> None:
    with server.client(7) as client:
        client.mset({f"lasting {i}": i for i in range(3)})
        client.set("short", 1, px=3000)
        part, data = back_up(server.component())
        while client.exists("short"):
            time.sleep(0.1)
        client.flushdb()
    assert (part.holds["databases"]["db7"], part.holds["expiring"]["db7"]) == (4, 1)
    assert server.component().rehearse(restore(part, data))["databases"]["db7"] == 4


def test_tls(program_with_tls: Path, tmp_path: Path) -> None:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)

    openssl(
        "req",
        "-x509",
        "-newkey",
        "ed25519",
        "-nodes",
        "-keyout",
        "key",
        "-out",
        "cert",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-days",
        "2",
    )
    server = Server(tmp_path / "server", program_with_tls, save='""')
    files = {name: tmp_path / name for name in ("cert", "key")}
    settings = {
        "tls-port": server.port,
        "port": 0,
        "tls-cert-file": files["cert"],
        "tls-key-file": files["key"],
        "tls-ca-cert-file": files["cert"],
    }
    server.conf.write_text(
        server.conf.read_text() + "".join(f"{key} {value}\n" for key, value in settings.items())
    )
    assert server.do("start")
    trusted = {
        "tls": True,
        "tls_ca": str(files["cert"]),
        "tls_cert": str(files["cert"]),
        "tls_key": str(files["key"]),
    }
    try:
        component = server.component(**trusted)
        component.loaded()
        component.ask("SET", "key", "value")
        over_network, _ = back_up(server.component(**trusted, method="network"))
        part, data = back_up(component)
        assert part.holds["databases"] == over_network.holds["databases"] == {"db0": 1}
        component.ask("FLUSHALL")
        for step in ("stage", "swap", "settle"):
            getattr(component, step)(restore(part, data))
        assert component.ask("GET", "key").strip() == "value"
        with pytest.raises(RuntimeUnavailable, match="certificate"):
            server.component(**{**trusted, "tls_ca": None}).sources()
    finally:
        assert server.do("stop")


@pytest.fixture(scope="module")
def program_with_tls() -> Path:
    """A server whose redis-cli knows TLS; Debian's does."""
    found = [
        program
        for program in PROGRAMS.values()
        if "--tls"
        in subprocess.run([cli(program), "--help"], capture_output=True, text=True, check=False).stdout
    ]
    if not found or not shutil.which("openssl"):
        pytest.skip("needs a redis-server with TLS, for example Debian's, and openssl")
    return found[0]
