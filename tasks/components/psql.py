"""A PostgreSQL server as its own programs show it: sessions of ``psql``, quoting, and SQL read as statements.

Nothing connects but PostgreSQL's own programs of the server's own version, run where the component lives; so the
same code serves a container without published ports and a server of this host.
"""

# ruff: noqa: S608  names and values in SQL are quoted by `identifier` and `literal`
from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from workers.errors import BackupError, CommandFailed, Permanent, RuntimeUnavailable
from workers.runtime import Process, Runtime, run, stream

CONNECT_SECONDS = 10
OPTIONS = "-c default_transaction_read_only=off"
"""A connection's own options outrank what ALTER DATABASE or ALTER ROLE set."""
CONNECTION_LOST = 2
"""psql's exit status when the connection went bad, or never was (psql's manual, "Exit Status")."""
REFUSED = re.compile(
    r"authentication failed|no password supplied|does not exist|permission denied|no pg_hba\.conf entry|not permitted"
)

FIND_PSQL = """
for file in "$(command -v psql)" /usr/lib/postgresql/*/bin/psql /usr/pgsql-*/bin/psql; do
  [ -x "$file" ] && { echo "$file"; exit 0; }
done
echo 'psql is not installed here' >&2
exit 1
"""
FIND_TOOLS = """
for folder in /usr/lib/postgresql/$1/bin /usr/pgsql-$1/bin "$(dirname "$(command -v pg_dump)")"; do
  [ -x "$folder/pg_dump" ] && echo "$folder" && "$folder/pg_dump" --version
done
true
"""

# Whatever a server, database or role sets by default, a session must neither stall nor see less than everything.
SESSION_SETTINGS = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "row_security": "off",
    "search_path": "pg_catalog",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
}
# Not even the server's own log may show the passwords' hashes.
SILENT_SETTINGS = {
    "log_statement": "none",
    "log_min_error_statement": "panic",
    "log_min_duration_statement": "-1",
    "log_min_duration_sample": "-1",
    "log_transaction_sample_rate": "0",
}


def identifier(name: str) -> str:
    """Return ``name`` quoted as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return ``text`` quoted as an SQL string, for sessions with ``standard_conforming_strings`` on."""
    return "'" + text.replace("'", "''") + "'"


def connection_string(database: str) -> str:
    """Return a libpq connection string for ``database``, whatever its name: ``a=b`` alone would be taken for one."""
    return "dbname='" + database.replace("\\", "\\\\").replace("'", "\\'") + "'"


TOKEN = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\*.*?\*/ )
    | (?P<meta>    ^\\[^\n]*$ )
    | (?P<string>  (?<!\w)[eE]'(?:[^'\\]|''|\\.)*' | '(?:[^']|'')*' )
    | (?P<name>    "(?:[^"]|"")*" )
    | (?P<word>    [^\W\d]\w* )
    | (?P<end>     ; )
    | (?P<other>   . )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Statement:
    """One SQL statement: its tokens, of which ``words`` leaves out white space."""

    tokens: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return [token for token in self.tokens if not token.isspace()]

    @property
    def sql(self) -> str:
        return "".join(self.tokens).strip()

    def starts(self, *words: str) -> bool:
        return tuple(self.words[: len(words)]) == words

    def after(self, word: str) -> str | None:
        """Return the token that follows the first key word ``word`` as it stands."""
        words = self.words
        return next((after for before, after in itertools.pairwise(words) if before == word), None)

    def with_database(self, old: str, new: str) -> Statement | None:
        """Return the statement with the token ``old`` after the key word DATABASE made ``new``, or ``None`` without.

        PostgreSQL's programs write key words in capitals, and names in capitals only in quotes.
        """
        tokens, before, found = list(self.tokens), "", False
        for index, token in enumerate(tokens):
            if before == "DATABASE" and token == old:
                tokens[index], found = new, True
            if not token.isspace():
                before = token
        return Statement(tuple(tokens)) if found else None


def statements(sql: str) -> list[Statement]:
    """Split what pg_dumpall or pg_restore wrote; comments and psql's backslash lines are left out."""
    found: list[Statement] = []
    tokens: list[str] = []
    for match in TOKEN.finditer(sql):
        if match.lastgroup == "end":
            found.append(Statement(tuple(tokens)))
            tokens = []
        elif match.lastgroup not in ("comment", "meta"):
            tokens.append(match.group())
    return [statement for statement in found if statement.words]


def unquoted(token: str) -> str:
    """Return the name that an identifier token, quoted or not, stands for."""
    return token[1:-1].replace('""', '"') if token.startswith('"') else token


def major_of(version: str) -> int:
    """Return the major version in what ``server_version`` says."""
    return int(re.split(r"\D", version)[0] or 0)


class ProcessGroup:
    """A runtime for programs alone, which end together, whichever threads wait for them."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._processes: list[Process] = []
        self._killed = False

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        with self._lock:
            if self._killed:
                raise RuntimeUnavailable(f"{argv[0]} was not started: what it belongs to was ended")
            self._processes.append(process := self._runtime.spawn(argv, env=env))
        return process

    def kill(self) -> None:
        """End what runs; nothing starts any more."""
        with self._lock:
            self._killed = True
            for process in self._processes:
                process.kill()


class Session:
    """One connection, kept open by a psql that reads statements from its stdin.

    A statement that fails ends the session; whatever transaction was open is rolled back by the server.
    Threads may share it; their statements take turns.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._output = process.output()
        self._lock = threading.Lock()

    def execute(self, sql: str) -> str:
        """Run the statements in ``sql`` and return what psql prints for them."""
        marker = secrets.token_hex(16)
        end = f"{marker}\n".encode()
        received = bytearray()
        with self._lock:
            with contextlib.suppress(BrokenPipeError):  # it ended; why, its output says
                self._process.write(f"{sql}\n;\nSELECT '{marker}';\n".encode(errors="surrogateescape"))
            try:
                while not received.endswith(end):
                    received += next(self._output)
            except StopIteration:
                raise RuntimeUnavailable("psql ended before it had answered") from None
            except CommandFailed as error:
                raise translated(error) from error
        return received[: -len(end)].decode(errors="backslashreplace")

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of one query (without a semicolon), each as a dict of its columns."""
        text = self.execute(f"SELECT coalesce(json_agg(r), '[]') FROM (\n{query}\n) AS r")
        rows: list[dict[str, Any]] = json.loads(text)
        return rows

    def value(self, expression: str) -> Any:
        """Return the value of one SQL expression."""
        return self.rows(f"SELECT {expression} AS value")[0]["value"]

    def set(self, settings: Mapping[str, str]) -> None:
        """Set those of ``settings`` that this server knows."""
        values = ", ".join(f"({literal(name)}, {literal(value)})" for name, value in settings.items())
        self.execute(
            "SELECT pg_catalog.set_config(s.name, v.value, false) FROM pg_catalog.pg_settings s "
            f"JOIN (VALUES {values}) AS v (name, value) USING (name)"
        )

    def close(self) -> None:
        """End psql, and with it the connection, whatever it is doing."""
        self._process.kill()
        with self._lock:
            close = getattr(self._output, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._process.close_input()
            with contextlib.suppress(CommandFailed), self._lock:  # all that was asked has been answered
                for _ in self._output:
                    pass
        self.close()


def translated(error: CommandFailed) -> BackupError:
    """Return ``error`` without what a message may quote, as ``RuntimeUnavailable`` when no connection could be had.

    PostgreSQL's messages continue with DETAIL, CONTEXT and the failed statement, which can hold rows and secrets.
    """
    lines = [
        line for line in error.stderr.splitlines() if re.search(r"\b(error|ERROR|FATAL|PANIC|fatal)\b:", line)
    ]
    message = "\n".join(lines) or error.stderr.partition("\n")[0]
    short = CommandFailed(error.program, error.status, message)
    if error.status == CONNECTION_LOST and not REFUSED.search(message):
        return RuntimeUnavailable(str(short))
    return short


def installed(runtime: Runtime, bin_dir: str | None, major: int) -> list[tuple[str, int, str]]:
    """Return folders of PostgreSQL's programs, their major version, and what they say of it.

    They are ``bin_dir``, or those that are there, those for ``major`` first.
    """
    if bin_dir:
        found = f"{bin_dir}\n" + run(runtime, [f"{bin_dir}/pg_dump", "--version"]).decode()
    else:
        found = run(runtime, ["sh", "-c", FIND_TOOLS, "sh", str(major)]).decode()
    lines = found.splitlines()
    return [
        (folder, int(match[1]), described)
        for folder, described in zip(lines[::2], lines[1::2], strict=False)
        if (match := re.search(r"\) (\d+)", described))
    ]


@dataclass(frozen=True)
class Server:
    """A server that answered, and the programs of its own major version."""

    runtime: Runtime
    env: Mapping[str, str]
    """The login, for every program's environment; the password is there and nowhere else."""
    psql: str
    tools: str
    version: str
    """As ``server_version`` says: ``15.13 (Debian 15.13-0+deb12u1)``."""
    major: int
    lock_timeout: float = 60
    """Seconds that a session's statement waits for a lock before it fails."""

    @classmethod
    def find(
        cls,
        runtime: Runtime,
        env: Mapping[str, str],
        *,
        database: str,
        bin_dir: str | None,
        lock_timeout: float,
    ) -> Server:
        """Connect to ``database`` once and find the programs of the server's version: in ``bin_dir`` if given.

        Raises ``RuntimeUnavailable`` when the server does not answer, ``Permanent`` when there are no such programs.
        """
        env = {
            "PGCONNECT_TIMEOUT": str(CONNECT_SECONDS),
            "PGAPPNAME": "ai-micro-backup",
            "LC_ALL": "C",
            **env,
        }
        env["PGOPTIONS"] = OPTIONS
        psql = f"{bin_dir}/psql" if bin_dir else run(runtime, ["sh", "-c", FIND_PSQL]).decode().strip()
        with cls(runtime, env, psql, "", "", 0, lock_timeout).session(database) as session:
            version = str(session.value("current_setting('server_version')"))
            major = int(session.value("current_setting('server_version_num')::int / 10000"))
        programs = installed(runtime, bin_dir, major)
        for folder, of, _ in programs:
            if of == major:
                return cls(runtime, env, psql, folder, version, major, lock_timeout)
        there = ", ".join(described for _, _, described in programs) or "none"
        raise Permanent(
            f"the server is PostgreSQL {version} and needs pg_dump of {major}; found {there}; set bin_dir"
        )

    def session(self, database: str, *, silent: bool = False) -> Session:
        """Open a session; ``silent`` keeps its statements out of the server's log. Close it in any case."""
        session = Session(
            self.runtime.spawn(self._psql_argv(database), env={**self.env, "PGCLIENTENCODING": "UTF8"})
        )
        try:
            locks = {"lock_timeout": str(round(self.lock_timeout * 1000))}
            session.set({**SESSION_SETTINGS, **locks, **(SILENT_SETTINGS if silent else {})})
        except BaseException:
            session.close()
            raise
        return session

    def script_argv(self, database: str) -> list[str]:
        """Return the command line of a psql that reads a script, prints no results, and ends at the first error."""
        return [*self._psql_argv(database), "--output=/dev/null"]

    def _psql_argv(self, database: str) -> list[str]:
        options = ["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--no-password"]
        variables = ["--set=ON_ERROR_STOP=1", "--set=VERBOSITY=terse", "--set=SHOW_CONTEXT=never"]
        return [self.psql, *options, *variables, f"--dbname={connection_string(database)}"]

    @property
    def patience(self) -> str:
        """The option that bounds pg_dump's and pg_dumpall's wait for locks."""
        return f"--lock-wait-timeout={round(self.lock_timeout * 1000)}"

    def argv(self, tool: str, database: str, *options: str) -> list[str]:
        """Return the command line of ``tool`` connecting to ``database``."""
        return [f"{self.tools}/{tool}", f"--dbname={connection_string(database)}", "--no-password", *options]

    def stream(
        self, argv: list[str], *, env: Mapping[str, str] | None = None, sent: bytes = b""
    ) -> Iterator[bytes]:
        """Yield the stdout of a program that is logged in by its environment; see `workers.runtime.stream`."""
        try:
            yield from stream(self.runtime, argv, env={**self.env, **(env or {})}, sent=sent)
        except CommandFailed as error:
            raise translated(error) from error

    def run(self, argv: list[str], *, chunks: Iterable[bytes] = (), reads_all: bool = True) -> bytes:
        """Run a program that is logged in by its environment; see `workers.runtime.run`."""
        try:
            return run(self.runtime, argv, chunks=chunks, env=self.env, reads_all=reads_all)
        except CommandFailed as error:
            raise translated(error) from error
