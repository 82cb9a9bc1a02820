"""A Redis server as a component reaches it: its settings, questions to it, its snapshot.

Facts are from the sources of Redis 6.2 and 7.0 (``server.c``, ``rdb.c``, ``redis-cli.c``) and were tried on both.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from workers.component import BaseComponent
from workers.errors import CommandFailed, ComparisonError, Permanent, RuntimeUnavailable
from workers.runtime import run
from workers.secret import Secret

RDB, AOF = "redis-rdb", "redis-aof"
"""Kinds of parts: a snapshot, and an append-only file."""
USUAL_FOLDERS = (PurePosixPath("/data"), PurePosixPath("/var/lib/redis"))
"""Where a restore finds its staging folder without being told: the images' data folder, and Debian's."""
POLL_SECONDS = (0.1, 1.0)
"""The first and the longest pause between two questions to the server."""
ANSWER_SECONDS = 60
"""How long the server may take to answer one command; a fork of a large one takes a while."""

FileName = Annotated[str, Field(pattern=r"^[^/\n]+$")]


@dataclass(frozen=True)
class Layout:
    """What the server reads when it starts: the dump, or with ``appendonly`` the append-only file."""

    folder: PurePosixPath
    dbfilename: str
    appendonly: bool | None
    appendfilename: str
    appenddirname: str
    aclfile: PurePosixPath | None
    """Where it takes its users from; ``None`` when there is no such file, or nobody says where."""
    version: str

    @property
    def dump(self) -> PurePosixPath:
        return self.folder / self.dbfilename

    @property
    def names(self) -> tuple[str, ...]:
        """Every name in the folder that holds data of the server."""
        return (self.dbfilename, self.appendfilename, self.appenddirname)

    @property
    def form(self) -> str:
        """How the append-only file is laid out: ``none``, ``single`` (to 6.2) or ``multi`` (a folder, from 7.0)."""
        if not self.appendonly:
            return "none"
        return "multi" if int(self.version.split(".")[0]) >= 7 else "single"


class RedisServer(BaseComponent):
    """The settings of a server. ``data_dir`` and the names below it are asked from it where they are not set."""

    username: str | None = None
    password: Secret | None = None
    address: str | None = None
    """Where redis-cli finds it, seen from where it lives; by default this machine or container."""
    port: int = Field(default=6379, ge=1, le=65535)
    socket: str | None = None
    """The path of its Unix socket, instead of address and port."""
    tls: bool = False
    tls_ca: PurePosixPath | None = None
    """Files where redis-cli runs: who signed the server's certificate, by default whom the system trusts,"""
    tls_cert: PurePosixPath | None = None
    tls_key: PurePosixPath | None = None
    """and, for a server that asks for one, a certificate of the client's with its key."""
    method: Literal["file", "network", "aof"] = "file"
    """How it is backed up: ``file`` reads a new dump from the data folder, ``network`` takes one over a replication
    connection, ``aof`` reads the append-only file, without the fork of a dump."""
    cli: str = "redis-cli"
    server: str = "redis-server"
    """The server's program; what it refuses to read is refused before anything is touched."""
    snapshot_timeout: float = Field(default=600, gt=0)
    """Seconds that writing a snapshot may take, and loading one."""
    data_dir: PurePosixPath | None = None
    """The server's ``dir``. A restore needs it unless it is ``/data`` or ``/var/lib/redis``."""
    dbfilename: FileName | None = None
    appendonly: bool | None = None
    """With ``data_dir``, all that a restore must know when the server is down or keeps CONFIG to itself."""
    appendfilename: FileName | None = None
    appenddirname: FileName | None = None
    users: bool = True
    """Whether the users of a server with an ``aclfile`` are backed up and restored with its data."""
    aclfile: PurePosixPath | None = None
    """That file, where the server lives; to be set where the server is down or keeps CONFIG to itself."""

    @model_validator(mode="after")
    def _tls_with_its_files(self) -> RedisServer:
        if not self.tls and (self.tls_ca or self.tls_cert or self.tls_key):
            raise ValueError("tls_ca, tls_cert and tls_key need tls = true")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key need each other")
        return self

    def secrets(self) -> dict[str, Secret]:
        return {"password": self.password} if self.password else {}

    def layout(self, info: dict[str, str]) -> Layout:
        """Return what the settings say, or else the server when it runs, or else its defaults."""
        keys = ("dir", "dbfilename", "appendonly", "appendfilename", "appenddirname", "aclfile")
        asked = self.configured(*keys) if "run_id" in info else {}
        folder = self.data_dir or ("dir" in asked and PurePosixPath(asked["dir"]))
        if not folder:
            raise Permanent(
                f"{self.name}: the server does not tell its folder (CONFIG GET dir); set data_dir"
            )
        appendonly = asked["appendonly"] == "yes" if "appendonly" in asked else None
        aclfile = self.aclfile or asked.get("aclfile")
        return Layout(
            folder,
            self.dbfilename or asked.get("dbfilename", "dump.rdb"),
            appendonly if self.appendonly is None else self.appendonly,
            self.appendfilename or asked.get("appendfilename", "appendonly.aof"),
            self.appenddirname or asked.get("appenddirname", "appendonlydir"),
            folder / aclfile if aclfile else None,  # the server has made `dir` its own folder
            info["redis_version"],
        )

    def configured(self, *keys: str) -> dict[str, str]:
        """Return what CONFIG GET says of each of ``keys``, of those that the server tells."""
        lines = self.ask(chunks=[f"CONFIG GET {key}\n".encode() for key in keys]).splitlines()
        return {key: value for key, value in itertools.pairwise(lines) if key in keys}

    def has_aclfile(self) -> bool:
        """Say whether the server, which runs, is known to take its users from a file."""
        return bool(self.aclfile or self.configured("aclfile").get("aclfile"))

    def layout_to_restore(self) -> tuple[Layout, bool]:
        """Return the server's layout and whether it runs now; raise when a restore could not rely on it."""
        needs = f"{self.name}: set data_dir and appendonly"
        try:
            info = self.info()
        except RuntimeUnavailable as error:
            if self.data_dir is None or self.appendonly is None:
                raise RuntimeUnavailable(
                    f"{error}; start it, or {needs} to restore while it is down"
                ) from error
            said = self.sh('exec "$1" --version', self.server)
            version = re.search(r"v=(\d[\d.]*)", said)
            if version is None:
                raise Permanent(
                    f"{self.name}: {self.server} does not tell its version: {said.strip()}"
                ) from error
            info = {"redis_version": version[1]}
        self.refuse_cluster(info)
        layout = self.layout(info)
        if info.get("role") == "slave":
            raise Permanent(
                f"{self.name} is a replica, which takes its data from its primary: restore that one"
            )
        if layout.appendonly is None:
            raise Permanent(f"the server does not say whether it reads an append-only file; {needs}")
        if self.data_dir is None and layout.folder not in USUAL_FOLDERS:
            raise Permanent(
                f'{self.name}: set data_dir = "{layout.folder}", to be found while the server is down'
            )
        return layout, "run_id" in info or self.service.is_running()

    def source_info(self) -> dict[str, str]:
        """Return what INFO says; raise when what the server holds is not all there is to back up."""
        info = self.info()
        self.refuse_cluster(info)
        if info["role"] == "slave" and info["master_link_status"] != "up":
            raise RuntimeUnavailable(
                f"{self.name} is a replica without a connection to its primary, so what it holds is old"
            )
        return info

    def refuse_cluster(self, info: dict[str, str]) -> None:
        if info.get("cluster_enabled") == "1":
            raise Permanent(
                f"{self.name} is a node of a Redis Cluster, which is not supported: it holds some of the slots only, and "
                "they move"
            )

    def snapshot(self) -> dict[str, str]:
        """Have the server write its dump anew and return what INFO said just after that began."""
        deadline = time.monotonic() + self.snapshot_timeout
        pause = pauses(deadline, f"{self.name}: no snapshot was written within {self.snapshot_timeout:g} s")
        while True:
            before = self.info()
            last = int(before["rdb_last_save_time"])  # LASTSAVE
            if server_time(before) == last:
                time.sleep(1)  # it counts whole seconds: the next save must end in another one
            answer = self.ask("BGSAVE")
            if answer.startswith("Background saving started"):
                began = info = self.info()
                while info["rdb_bgsave_in_progress"] != "0":
                    next(pause)
                    info = self.info()
                if info["run_id"] != before["run_id"]:
                    raise RuntimeUnavailable(f"{self.name}: the server restarted while it wrote its snapshot")
                if info["rdb_last_bgsave_status"] != "ok":
                    raise Permanent(
                        f"{self.name}: the server could not write its snapshot: is the disk full, or its folder not "
                        "writable? Its log says why"
                    )
                if int(info["rdb_last_save_time"]) != last:
                    return {**began, "server_time_usec": before["server_time_usec"]}
                # FLUSHALL ends a save without calling it failed: once more.
            elif not re.search("in progress|child process", answer):
                raise Permanent(f"{self.name}: the server refused BGSAVE: {answer.strip()}")
            next(pause)

    def wait_for_saves(self) -> None:
        """Wait until no snapshot is being written."""
        deadline = time.monotonic() + self.snapshot_timeout
        pause = pauses(
            deadline, f"{self.name}: another snapshot did not end within {self.snapshot_timeout:g} s"
        )
        while self.info()["rdb_bgsave_in_progress"] != "0":
            next(pause)

    def start_service(self) -> None:
        """Start it unless it runs."""
        if not self.service.is_running():
            self.service.start()

    def loaded(self) -> dict[str, str]:
        """Wait until the server has loaded its data and return what INFO says then."""
        deadline = time.monotonic() + self.snapshot_timeout
        pause = pauses(deadline, f"{self.name}: its data was not loaded within {self.snapshot_timeout:g} s")
        while True:
            with contextlib.suppress(RuntimeUnavailable):
                info = self.info()
                if info["loading"] == "0":
                    return info
            if not self.service.is_running():
                raise ComparisonError(
                    f"{self.name}: the server ended while it loaded its data; its log says why"
                )
            next(pause)

    def info(self) -> dict[str, str]:
        """Return what INFO says. Raises ``RuntimeUnavailable`` when the server does not answer."""
        answer = self.ask("INFO")
        if not answer.startswith("#"):
            kind = RuntimeUnavailable if answer.startswith("LOADING") else Permanent
            raise kind(f"{self.name}: the server refused INFO: {answer.strip()[:200]}")
        return dict(line.split(":", 1) for line in answer.splitlines() if ":" in line)

    def modules(self) -> list[str]:
        """Return the names of the modules that the server has loaded; none when it does not tell."""
        lines = self.ask("MODULE", "LIST").splitlines()
        return sorted(value for key, value in itertools.pairwise(lines) if key == "name")

    def ask(self, *words: str, chunks: Sequence[bytes] = ()) -> str:
        """Return the answer to a command, or to those in ``chunks``; also an error, which redis-cli calls success."""
        return self.ask_bytes(*words, chunks=chunks).decode(errors="replace")

    def ask_bytes(self, *words: str, chunks: Sequence[bytes] = ()) -> bytes:
        """Return what `ask` does as it came."""
        argv = ["timeout", f"{ANSWER_SECONDS}", *self.client(), *words]
        try:
            return run(self.runtime, argv, chunks=chunks, env=self.client_environment())
        except CommandFailed as error:
            if error.stderr.startswith("AUTH failed") or error.status in (126, 127):
                raise Permanent(f"{self.name}: {self.cli}: {error.stderr}") from error
            why = f"no answer within {ANSWER_SECONDS} s" if error.status == 124 else error.stderr
            raise RuntimeUnavailable(f"{self.name}: the server does not answer: {why}") from error

    def client(self) -> list[str]:
        """Return redis-cli's command line up to the command; its password is in `client_environment`."""
        where = ["-s", self.socket] if self.socket else ["-p", str(self.port)]
        where += ["-h", self.address] if self.address else []
        where += ["--user", self.username] if self.username else []
        where += ["--tls"] if self.tls else []
        files = {"--cacert": self.tls_ca, "--cert": self.tls_cert, "--key": self.tls_key}
        return [
            self.cli,
            *where,
            *(word for flag, file in files.items() if file for word in (flag, str(file))),
        ]

    def client_environment(self) -> dict[str, str]:
        return {"REDISCLI_AUTH": self.password.resolve()} if self.password else {}

    def has(self, program: str) -> bool:
        """Say whether there is such a program where the server lives."""
        return bool(self.sh('command -v "$1" || :', program).strip())

    def sh(self, script: str, *words: object, chunks: Iterable[bytes] = ()) -> str:
        """Run a fixed script where the server lives, ``words`` being its ``$1``…, and return its stdout."""
        return self.sh_bytes(script, *words, chunks=chunks).decode(errors="replace")

    def sh_bytes(self, script: str, *words: object, chunks: Iterable[bytes] = ()) -> bytes:
        """Return what `sh` does as it came."""
        return run(self.runtime, ["sh", "-euc", script, "sh", *map(str, words)], chunks=chunks)


def databases(info: Mapping[str, str], count: str = "keys") -> dict[str, int]:
    """Return a count of each database, from lines like ``db0:keys=3,expires=1,avg_ttl=0``."""
    lines = {key: value for key, value in info.items() if re.fullmatch(r"db\d+", key)}
    return {key: int(value.partition(f"{count}=")[2].partition(",")[0]) for key, value in lines.items()}


def server_time(info: dict[str, str]) -> int:
    """Return the server's clock when it answered, in seconds as `LASTSAVE` counts them."""
    return int(info["server_time_usec"]) // 1_000_000


def pauses(deadline: float, message: str) -> Iterator[None]:
    """Sleep a little longer each time; raise ``Permanent`` with ``message`` after ``deadline``."""
    seconds, longest = POLL_SECONDS
    while time.monotonic() < deadline:
        time.sleep(seconds)
        seconds = min(2 * seconds, longest)
        yield
    raise Permanent(message)
