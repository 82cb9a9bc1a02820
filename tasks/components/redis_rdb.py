"""RDB files: what redis-check-rdb finds in them, and how many keys each of their databases holds.

The format is `rdb.c`'s. Before the keys of each database stand SELECTDB with its number and RESIZEDB with how many
keys follow and how many of them expire: a snapshot is written by a fork, in which nothing changes, so these are exact.
redis-check-rdb counts all keys together and tells where each database begins; what stands there is noted in passing.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import CommandFailed, IntegrityError
from workers.runtime import Runtime

MARK = 40
"""Bytes of the mark that ends a diskless replication stream; redis-cli leaves it there when it writes to stdout."""
CHECK = r"""
check() {  # what redis-check-rdb says of the file $2; key names are left out, they may be secret
  program=$(command -v "$1") || { echo "there is no program $1" >&2; return 1; }
  tool=$(dirname "$program")/redis-check-rdb link=
  if [ ! -x "$tool" ]; then  # the server is the tool, under this name
    link=$(mktemp -d) tool=$link/redis-check-rdb.valkey-check-rdb
    ln -s "$program" "$tool"
  fi
  status=0 said=$("$tool" "$2" 2>&1) || status=$?
  [ -z "$link" ] || rm -r "$link"
  if [ "$status" != 0 ]; then
    echo "redis-check-rdb ended with status $status" >&2
    printf '%s\n' "$said" | sed -n '/ERROR/,$ { /^\[offset/p }' >&2
    return 1
  fi
  printf '%s\n' "$said" | grep -aE "AUX FIELD ctime|Selecting DB|looks OK|keys read| expires"
}
"""
"""The tool lies beside the server in packages and images; wheels have the server alone."""

CHECK_FILE = CHECK + 'check "$1" "$2"'

CHECK_INPUT = CHECK + 'check "$1" /proc/self/fd/0'

READ = CHECK + 'set -eu; exec 3<"$2"; check "$1" /proc/self/fd/3; echo; exec cat <&3'
"""One open descriptor: a save in the meantime replaces the file's name, not what is read here."""

DATABASE = re.compile(rb"\xfe(?:[\x00-\x3f]|[\x40-\x7f].)(\xfb)", re.DOTALL)
"""SELECTDB, a number below 16384 and RESIZEDB."""
LONGEST = 4 + 2 * 9
"""Bytes of these with the two counts behind them."""


@dataclass(frozen=True)
class Report:
    """What an RDB file holds. ``databases`` and ``expiring`` count keys by ``db<number>``; empty when it tells none."""

    keys: int
    expires: int
    rdb_version: int
    databases: Mapping[str, int]
    expiring: Mapping[str, int]

    @property
    def holds(self) -> dict[str, Any]:
        """What a part's record says of it."""
        found: dict[str, Any] = {
            "keys": self.keys,
            "expires": self.expires,
            "rdb_version": self.rdb_version,
        }
        if self.databases or not self.keys:
            found |= {"databases": dict(self.databases), "expiring": dict(self.expiring)}
        return found


class Passing:
    """Notes what an RDB file says of itself while it passes ``through``: its version and its databases' sizes.

    What looks like the beginning of a database is kept, some 30 bytes each, until redis-check-rdb has told which are
    (`report`); in random data, one in about 260,000 bytes does.
    """

    def __init__(self) -> None:
        self.size = 0
        self._magic = b""
        self._sizes: dict[int, tuple[int, int]] = {}

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        tail = b""
        for chunk in chunks:
            window = tail + chunk
            for match in DATABASE.finditer(window):
                keys, position = _length(window, match.end())
                expires, _ = _length(window, position)
                if keys is not None and expires is not None:
                    self._sizes[self.size - len(tail) + match.start(1)] = keys, expires
            tail = window[-LONGEST:]
            self._magic = (self._magic + chunk)[:9] if len(self._magic) < 9 else self._magic
            self.size += len(chunk)
            yield chunk

    def report(self, said: str, name: str) -> Report:
        """Return what the file holds, ``said`` being what `CHECK` printed of the bytes that passed.

        Raises ``IntegrityError`` when the file has another end than those bytes.
        """
        end = _number(r"\[offset (\d+)\] \\o/ RDB looks OK", said)
        if end != self.size:
            raise IntegrityError(f"{name}: the RDB ends after {end} bytes, and {self.size} were read")
        keys, expires = _number(r"(\d+) keys read", said), _number(r" (\d+) expires", said)
        begins = re.findall(r"\[offset (\d+)\] Selecting DB ID (\d+)", said)
        sizes = {f"db{number}": self._sizes.get(int(offset), (0, 0)) for offset, number in begins}
        told = sum(size for size, _ in sizes.values()) == keys  # Redis before 3.2 wrote no sizes
        return Report(
            keys=keys,
            expires=expires,
            rdb_version=int(b"0" + re.sub(rb"\D", b"", self._magic)),
            databases={database: size for database, (size, _) in sizes.items()} if told else {},
            expiring={database: size for database, (_, size) in sizes.items()} if told else {},
        )


def begun(said: str) -> int:
    """Return the second in which the server began to write the file of which `CHECK` printed this."""
    return _number(r"AUX FIELD ctime = '(\d+)'", said)


def read_through(reading: Generator[bytes, None, Report]) -> Report:
    """Read what `checked` yields to its end and return what it found."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            report: Report = end.value
            return report


def checked(
    runtime: Runtime, server: str, chunks: Iterable[bytes], *, name: str
) -> Generator[bytes, None, Report]:
    """Yield ``chunks``, an RDB file, while redis-check-rdb reads them, too; return what it found.

    Raises ``IntegrityError`` when they are no whole RDB file.
    """
    passing = Passing()
    process = runtime.spawn(["sh", "-euc", CHECK_INPUT, "sh", server])
    try:
        try:
            for chunk in passing.through(chunks):
                process.write(chunk)
                yield chunk
            process.close_input()
        except BrokenPipeError:
            pass  # it has read enough, or found a fault: its report tells
        said = b"".join(process.output()).decode(errors="replace")
    except CommandFailed as error:
        raise IntegrityError(f"{name}: {error.stderr}") from error
    finally:
        process.kill()
    return passing.report(said, name)


def without_mark(chunks: Iterable[bytes], *, name: str) -> Iterator[bytes]:
    """Yield what ``redis-cli --rdb -`` writes without the mark that may follow the RDB file.

    Raises ``IntegrityError`` for what does not end like an RDB file: the byte 255 and eight of a checksum.
    """
    held = b""
    for chunk in chunks:
        held += chunk
        if ready := held[: -MARK - 9]:
            yield ready
            held = held[-MARK - 9 :]
    # The mark is hexadecimal digits, so its last nine bytes never begin with 255.
    if held[-9:-8] != b"\xff":
        if held[-MARK - 9 : -MARK - 8] != b"\xff" or not re.fullmatch(rb"[0-9a-f]+", held[-MARK:]):
            raise IntegrityError(f"{name}: the replication stream was cut short")
        held = held[:-MARK]
    yield held


def _length(data: bytes, position: int) -> tuple[int | None, int]:
    """Return the length encoded at ``position`` and where it ends; ``None`` when there is no whole one."""
    first = data[position : position + 1]
    if not first:
        return None, position
    match first[0] >> 6, first[0]:
        case 0, size:
            return size, position + 1
        case 1, high:
            start, end, size = position + 1, position + 2, (high & 0x3F) << 8
        case _, 0x80:
            start, end, size = position + 1, position + 5, 0
        case _, 0x81:
            start, end, size = position + 1, position + 9, 0
        case _:
            return None, position
    if len(data) < end:
        return None, position
    return size + int.from_bytes(data[start:end], "big"), end


def _number(pattern: str, said: str) -> int:
    match = re.search(pattern, said)
    return int(match[1]) if match else 0
