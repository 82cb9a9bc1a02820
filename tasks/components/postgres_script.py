r"""Plain SQL that pg_dump or pg_dumpall wrote, read as a stream: statements, rows of COPY, and changes of database.

What is inside of quotes, comments and rows is never taken for anything else, and nothing is held but the statement
that is being read. Of psql's own commands a dump has ``\connect``, ``\restrict`` and ``\unrestrict``; another one
could do anything, so a script with one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tasks.components.psql import unquoted
from workers.errors import IntegrityError

CLUSTER_END = b"-- PostgreSQL database cluster dump complete"
DATABASE_END = b"-- PostgreSQL database dump complete"
CLUSTER_START = b"-- PostgreSQL database cluster dump"
SERVER_VERSION = re.compile(rb"-- Dumped from database version (\d+)")

# Everything here stands within one line.
SPECIAL = re.compile(rb"""--|/\*|;|\\|["']|(?<![\w$\x80-\xff])\$(?:[A-Za-z_\x80-\xff][\w\x80-\xff]*)?\$""")
STRING = re.compile(rb"'")
ESCAPE_STRING = re.compile(rb"\\.|'", re.DOTALL)
NAME = re.compile(rb'"')
COMMENT = re.compile(rb"/\*|\*/")
IDENTIFIER = r'(?:"(?:[^"]|"")*"|[^\s".(]+)'
COPY = re.compile(rf"COPY ({IDENTIFIER}(?:\.{IDENTIFIER})?) .*FROM stdin;", re.DOTALL | re.IGNORECASE)
END_OF_ROWS = b"\\.\n"


@dataclass(frozen=True)
class Connect:
    """From here on, what follows is of this database."""

    database: str


@dataclass(frozen=True)
class Sql:
    """One statement with its semicolon, and the comments before it."""

    text: bytes


@dataclass(frozen=True)
class Rows:
    """Some bytes of the rows of COPY, at last its end, and how many rows end in them."""

    table: str
    """As the script writes it, quoted where SQL needs it."""
    text: bytes
    count: int


@dataclass(frozen=True)
class MadeBy:
    """The major version of the server that the following is of."""

    major: int


Item = Connect | Sql | Rows | MadeBy


def read_script(chunks: Iterable[bytes]) -> Iterator[Item]:
    """Yield what a script holds, in order.

    Raises ``IntegrityError``, at its end at the latest, when it ends in mid-statement or without the words that end
    a dump, and for a command of psql that no dump has.
    """
    return _Reader(chunks).items()


class _Reader:
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._buffer = b""
        self._statement = bytearray()
        self._inside: re.Pattern[bytes] | bytes | None = None
        """What ends the quotes or comment that the reader is in."""
        self._depth = 0
        self._blank = True
        """Whether the statement so far is nothing but white space and comments."""
        self._begin = 0
        """Where its first word is."""
        self._of_cluster = False
        self._ended = False

    def items(self) -> Iterator[Item]:
        while line := self._line():
            if self._inside is None and self._blank:
                if line.startswith(b"\\"):
                    yield from self._command(line)
                    continue
                if made_by := self._comment(line):
                    yield made_by
            yield from self._sql(line)
        if self._inside is not None or not self._blank:
            raise IntegrityError("the SQL is cut short: it ends in the middle of a statement")
        if not self._ended:
            raise IntegrityError("the SQL is cut short: the words that end a dump are missing")

    def _line(self) -> bytes:
        """Return the next line with its end, at the end of the script what is left."""
        pieces = []
        while (end := self._buffer.find(b"\n")) < 0:
            pieces.append(self._buffer)
            self._buffer = next(self._chunks, b"")
            if not self._buffer:
                return b"".join(pieces)
        line, self._buffer = self._buffer[: end + 1], self._buffer[end + 1 :]
        return b"".join([*pieces, line])

    def _comment(self, line: bytes) -> MadeBy | None:
        words = line.rstrip()
        self._of_cluster |= words == CLUSTER_START
        if words:
            self._ended = words == CLUSTER_END or (
                (words == DATABASE_END and not self._of_cluster) or (self._ended and words.startswith(b"--"))
            )
        match = SERVER_VERSION.match(line)
        return MadeBy(int(match[1])) if match else None

    def _command(self, line: bytes) -> Iterator[Item]:
        command, _, rest = line.decode(errors="surrogateescape").rstrip().partition(" ")
        if command == "\\connect":
            yield Connect(_database(rest))
        elif command not in ("\\restrict", "\\unrestrict"):
            raise IntegrityError(f"the SQL holds psql's command {command}, which no dump does")

    def _sql(self, line: bytes) -> Iterator[Item]:
        start = position = 0
        while position < len(line):
            if self._inside is not None:
                position = self._skip(line, position)
                continue
            match = SPECIAL.search(line, position)
            between = line[position : match.start() if match else len(line)]
            if self._blank and (words := between.lstrip()):
                self._blank = False
                self._begin = len(self._statement) + position + len(between) - len(words) - start
            if match is None:
                break
            position = match.end()
            token = match.group()
            if token == b"--":
                break
            if token == b"\\":
                raise IntegrityError("the SQL holds a command of psql within a statement, which no dump does")
            if token == b";":
                self._statement += line[start:position]
                start = position
                yield from self._statement_ended(line[position:])
            else:
                self._enter(token, line, match.start())
        self._statement += line[start:]

    def _enter(self, token: bytes, line: bytes, at: int) -> None:
        if token == b"/*":
            self._inside, self._depth = COMMENT, 1
            return
        self._blank = False
        if token == b"'":
            escapes = re.search(rb"(?<![\w$\x80-\xff])[eE]$", line[:at])
            self._inside = ESCAPE_STRING if escapes else STRING
        else:
            self._inside = NAME if token == b'"' else token

    def _skip(self, line: bytes, position: int) -> int:
        """Return where to go on in ``line``: after what ends the quotes or comment, if it ends there."""
        if isinstance(self._inside, bytes):
            found = line.find(self._inside, position)
            if found < 0:
                return len(line)
            end, self._inside = found + len(self._inside), None
            return end
        match = self._inside.search(line, position) if self._inside else None
        if match is None:
            return len(line)
        token = match.group()
        if token in (b"/*", b"*/"):
            self._depth += 1 if token == b"/*" else -1
            if self._depth == 0:
                self._inside = None
        elif not token.startswith(b"\\"):  # a doubled quote opens again at once, which comes to the same
            self._inside = None
        return match.end()

    def _statement_ended(self, rest: bytes) -> Iterator[Item]:
        text, self._statement, self._blank = bytes(self._statement), bytearray(), True
        self._ended = False
        yield Sql(text + b"\n")
        words = text[self._begin :].decode(errors="surrogateescape")
        if words.endswith("stdin;") and (copy := COPY.fullmatch(words)):
            if rest.strip():
                raise IntegrityError(f"the SQL has something between COPY {copy[1]} and its rows")
            yield from self._rows(copy[1])

    def _rows(self, table: str) -> Iterator[Item]:
        """Yield the rows up to the line that ends them, in pieces as large as the chunks."""
        started = False
        while True:
            none = not started and self._buffer.startswith(END_OF_ROWS)
            end = 0 if none else self._buffer.find(b"\n" + END_OF_ROWS) + 1
            if none or end:
                end += len(END_OF_ROWS)
                text, self._buffer = self._buffer[:end], self._buffer[end:]
                yield Rows(table, text, text.count(b"\n") - 1)
                return
            if len(self._buffer) > len(END_OF_ROWS):  # what is kept may be the beginning of the end
                text, self._buffer = self._buffer[: -len(END_OF_ROWS)], self._buffer[-len(END_OF_ROWS) :]
                started = True
                yield Rows(table, text, text.count(b"\n"))
            chunk = next(self._chunks, b"")
            if not chunk:
                raise IntegrityError(f"the SQL is cut short: it ends among the rows of {table}")
            self._buffer += chunk


def _database(argument: str) -> str:
    r"""Return the database that the argument of ``\connect`` names: a name, or a connection string in quotes."""
    prefix = "-reuse-previous=on "
    if not argument.startswith(prefix):
        return unquoted(argument)
    match = re.fullmatch(r"dbname='((?:[^'\\]|\\.)*)'", unquoted(argument.removeprefix(prefix)))
    if match is None:
        raise IntegrityError(r"the SQL has a \connect that no dump has")
    return re.sub(r"\\(.)", r"\1", match[1])
