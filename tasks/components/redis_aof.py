"""The append-only file of a server as one file, as it was at one moment.

Since 7.0 it lies in a folder as a base and its increments, listed by a manifest (`aof.c`); one after another they are
what 6.2 kept in a single file, and every server since 4.0 reads that, also as the base of a new set. The parts are
pinned by hard links while they are read, so a rewrite may drop them: nothing of the server's settings is touched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tasks.components.redis_server import Layout, RedisServer, databases, pauses
from workers.errors import CommandFailed, IntegrityError, Permanent
from workers.runtime import stream

CHECK_AOF = r"""
program=$(command -v "$1") || { echo "there is no program $1" >&2; exit 1; }
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
tool=$(dirname "$program")/redis-check-aof
if [ ! -x "$tool" ]; then  # the server is the tool, under this name
  tool=$link/redis-check-aof.valkey-check-aof
  ln -s "$program" "$tool"
fi
file=${2:-$link/appendonly.aof}
[ "${2:-}" ] || cat >"$file"  # the tool must know its size
status=0 said=$("$tool" "$file" 2>&1) || status=$?
if [ "$status" != 0 ] || [ ! -s "$file" ]; then
  echo "redis-check-aof ended with status $status" >&2
  printf '%s\n' "$said" | grep -aE "^AOF|Expected|EOF|Unexpected|RDB preamble|format version|CRC" | grep -av "key '" >&2
  exit 1
fi
"""
"""Checks the file ``$2``, or else its input by way of a temporary file. Nothing that may name a key is told."""

MANIFEST = '[ ! -e "$1" ] || cat "$1"'

PIN = r"""
umask 077
pin=$1; shift
rm -rf "$pin"; mkdir "$pin"
number=0
for file; do
  number=$((number + 1))
  ln "$file" "$pin/$number"
  stat -c %s "$pin/$number"
done
"""

READ_PINNED = 'cd "$1"; shift; number=0; for size; do number=$((number + 1)); head -c "$size" "$number"; done'

UNPIN = 'rm -rf "$1"'


@dataclass(frozen=True)
class Pinned:
    """The parts of an append-only file as they are read: ``sizes`` bytes of each of the links ``1``, ``2``, ….

    ``info`` is what INFO said at their moment: whatever was acknowledged before it is in them, and nothing after.
    """

    info: Mapping[str, str]
    sizes: Sequence[int]


def read_aof(server: RedisServer, layout: Layout, holds: dict[str, Any]) -> Iterator[bytes]:
    """Yield the append-only file as one, and note in ``holds`` the keys of each database at its moment.

    Raises ``Permanent`` when it cannot be had, ``IntegrityError`` when it is cut short.
    """
    folder = pin_folder(server, layout)
    try:
        pinned = pin(server, layout)
        keys, expiring = databases(pinned.info), databases(pinned.info, "expires")
        read = 0
        for chunk in stream(
            server.runtime, ["sh", "-euc", READ_PINNED, "sh", str(folder), *map(str, pinned.sizes)]
        ):
            read += len(chunk)
            yield chunk
        if read != sum(pinned.sizes):
            raise IntegrityError(
                f"{server.name}: {read} bytes of the append-only file were read, not {sum(pinned.sizes)}"
            )
        holds.update(
            keys=sum(keys.values()), expires=sum(expiring.values()), databases=keys, expiring=expiring
        )
    finally:
        server.sh(UNPIN, folder)


def pin(server: RedisServer, layout: Layout) -> Pinned:
    """Link the parts of the append-only file beside it and tell how much of them was written at one moment."""
    limit = server.snapshot_timeout
    pause = pauses(
        time.monotonic() + limit, f"{server.name}: its append-only file was rewritten all of {limit:g} s"
    )
    while (pinned := try_to_pin(server, layout, pause)) is None:
        next(pause)
    return pinned


def try_to_pin(server: RedisServer, layout: Layout, pause: Iterator[None]) -> Pinned | None:
    """Do what `pin` does; ``None`` when a rewrite came in between.

    INFO tells of one moment how many keys there are and how long the file will be when all is written. A server from
    7.0 on miscounts the length after it dropped a torn tail while loading, until the next rewrite: it is asked for one
    when none has been and the count cannot be seen to be right.
    """
    info = now = usable(server)
    end = length(info)
    while (
        same_file(info, now) and int(now["aof_current_size"]) < end
    ):  # what is held back is written within 2 s
        next(pause)
        now = usable(server)
    files = parts(server, layout)
    try:
        sizes = [int(size) for size in server.sh(PIN, pin_folder(server, layout), *files).split()]
    except CommandFailed as error:
        if files == parts(server, layout):
            raise Permanent(
                f"{server.name}: the append-only file cannot be linked: {error.stderr}"
            ) from error
        return None
    now = usable(server)
    if not same_file(info, now) or files != parts(server, layout):
        return None
    if not sum(sizes) == end == length(now):
        if info.get("aof_rewrites") == "0":
            answer = server.ask("BGREWRITEAOF")
            if answer.startswith("NOPERM"):
                raise Permanent(f"{server.name}: the server refused BGREWRITEAOF: {answer.strip()}")
            return None
        if sum(sizes) < end:
            raise IntegrityError(
                f"{server.name}: the append-only file in {layout.folder} has {sum(sizes)} bytes, and the server wrote "
                f"{end}; is data_dir right?"
            )
    return Pinned(info, cut(sizes, end))


def usable(server: RedisServer) -> dict[str, str]:
    """Return what INFO says. Raises ``Permanent`` when the server writes no append-only file, or fails to."""
    info = server.info()
    if info["aof_enabled"] != "1":
        raise Permanent(
            f'{server.name}: its append-only file is off (appendonly no); back it up by method = "file"'
        )
    if info["aof_last_write_status"] != "ok":
        raise Permanent(
            f"{server.name}: the server cannot write its append-only file: is the disk full? Its log says why"
        )
    return info


def parts(server: RedisServer, layout: Layout) -> list[PurePosixPath]:
    """Return the files that one after another are the append-only file."""
    if layout.form == "single":
        return [layout.folder / layout.appendfilename]
    folder = layout.folder / layout.appenddirname
    lines = server.sh(MANIFEST, folder / f"{layout.appendfilename}.manifest").splitlines()
    entries = [re.fullmatch(r'file (?:"(.*)"|(\S+)) seq \d+ type ([bi])(?: .*)?', line) for line in lines]
    names = [unquoted(entry[1]) if entry[1] is not None else entry[2] for entry in entries if entry]
    if not names:
        raise Permanent(f"{server.name}: there is no append-only file in {folder}; is data_dir right?")
    return [folder / name for name in names]


def unquoted(text: str) -> str:
    """Return a name as `sdscatrepr` put it between quotes."""
    plain = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b"}

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else plain.get(match[2], match[2])

    return re.sub(r"\\(?:x([0-9a-f]{2})|(.))", character, text).encode("latin-1").decode(errors="replace")


def cut(sizes: Sequence[int], end: int) -> list[int]:
    """Return ``sizes`` shortened so that their sum is ``end``."""
    kept = []
    for size in sizes:
        kept.append(min(size, end))
        end -= kept[-1]
    return kept


def length(info: Mapping[str, str]) -> int:
    """Return how long the file will be when all that happened so far is written."""
    return int(info["aof_current_size"]) + int(info["aof_buffer_length"])


def same_file(info: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Say whether no rewrite ended since ``info``, and none runs."""
    still = now["aof_rewrite_in_progress"] == now["aof_rewrite_scheduled"] == "0"
    return still and all(info[key] == now[key] for key in ("run_id", "aof_base_size"))


def pin_folder(server: RedisServer, layout: Layout) -> PurePosixPath:
    """Return where the parts are linked to while they are read; one that is left there is removed by the next."""
    return layout.folder / f".ai-micro-backup-pinned-{server.name}"
