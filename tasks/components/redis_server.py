"""A Redis server as a component reaches it: its settings, questions to it, its snapshot.

Facts are from the sources of Redis 6.2 and 7.0 (``server.c``, ``rdb.c``, ``redis-cli.c``) and were tried on both.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import Field

from workers.component import BaseComponent
from workers.errors import CommandFailed, ComparisonError, Permanent, RuntimeUnavailable
from workers.runtime import run
from workers.secret import Secret

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
    version: str

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

    def secrets(self) -> dict[str, Secret]:
        return {"password": self.password} if self.password else {}

    def layout(self, info: dict[str, str]) -> Layout:
        """Return what the settings say, or else the server when it runs, or else its defaults."""
        asked: dict[str, str] = {}
        keys = ("dir", "dbfilename", "appendonly", "appendfilename", "appenddirname")
        if "run_id" in info:
            lines = self.ask(chunks=[f"CONFIG GET {key}\n".encode() for key in keys]).splitlines()
            asked = {key: value for key, value in itertools.pairwise(lines) if key in keys}
        folder = self.data_dir or ("dir" in asked and PurePosixPath(asked["dir"]))
        if not folder:
            raise Permanent(
                f"{self.name}: the server does not tell its folder (CONFIG GET dir); set data_dir"
            )
        appendonly = asked["appendonly"] == "yes" if "appendonly" in asked else None
        return Layout(
            folder,
            self.dbfilename or asked.get("dbfilename", "dump.rdb"),
            appendonly if self.appendonly is None else self.appendonly,
            self.appendfilename or asked.get("appendfilename", "appendonly.aof"),
            self.appenddirname or asked.get("appenddirname", "appendonlydir"),
            info["redis_version"],
        )

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

    def ask(self, *words: str, chunks: Sequence[bytes] = ()) -> str:
        """Return the answer to a command, or to those in ``chunks``; also an error, which redis-cli calls success."""
        where = ["-s", self.socket] if self.socket else ["-p", str(self.port)]
        where += ["-h", self.address] if self.address else []
        where += ["--user", self.username] if self.username else []
        env = {"REDISCLI_AUTH": self.password.resolve()} if self.password else {}
        argv = ["timeout", f"{ANSWER_SECONDS}", self.cli, *where, *words]
        try:
            return run(self.runtime, argv, chunks=chunks, env=env).decode(errors="replace")
        except CommandFailed as error:
            if error.stderr.startswith("AUTH failed") or error.status in (126, 127):
                raise Permanent(f"{self.name}: {self.cli}: {error.stderr}") from error
            why = f"no answer within {ANSWER_SECONDS} s" if error.status == 124 else error.stderr
            raise RuntimeUnavailable(f"{self.name}: the server does not answer: {why}") from error

    def sh(self, script: str, *words: object, chunks: Iterable[bytes] = ()) -> str:
        """Run a fixed script where the server lives, ``words`` being its ``$1``…, and return its stdout."""
        argv = ["sh", "-euc", script, "sh", *map(str, words)]
        return run(self.runtime, argv, chunks=chunks).decode(errors="replace")


def databases(info: dict[str, str]) -> dict[str, int]:
    """Return the number of keys of each database, from lines like ``db0:keys=3,expires=1,avg_ttl=0``."""
    return {key: int(value.split(",")[0][5:]) for key, value in info.items() if re.fullmatch(r"db\d+", key)}


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
