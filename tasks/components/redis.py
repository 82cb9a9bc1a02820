"""Redis: a checked RDB snapshot, and its restore in the layout that the server will read.

Everything happens where the server lives, with ``redis-cli`` and the tools of any Linux. Facts about the server are
from the sources of Redis 6.2 and 7.0 (``rdb.c``, ``aof.c``, ``redis-check-rdb.c``) and were tried on both.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from tasks.components.redis_server import USUAL_FOLDERS, RedisServer, databases, server_time
from workers.component import NO_OPTIONS, Part, Restore, Source, part_name
from workers.errors import CommandFailed, ComparisonError, IntegrityError, Permanent, RuntimeUnavailable

RDB = "redis-rdb"
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
  printf '%s\n' "$said" | grep -aE "AUX FIELD ctime|keys read| expires"
  echo "magic $(head -c 9 "$2")"
}
"""
"""The tool lies beside the server in packages and images; wheels have the server alone."""

CHECK_FILE = CHECK + 'check "$1" "$2"'

READ = CHECK + 'set -eu; exec 3<"$2"; check "$1" /proc/self/fd/3; echo; exec cat <&3'
"""One open descriptor: a save in the meantime replaces the file's name, not what is read here."""

SIZE = 'wc -c <"$1"'

WRITE = 'umask 077; cat >"$1.new" && { sync "$1.new" 2>/dev/null || sync; } && mv "$1.new" "$1"'

RECEIVE = 'umask 027; rm -rf "$1"; mkdir -m 0700 "$1"; mkdir "$1/new"; cat >"$2"'

ARRANGE = r"""
umask 027
cd "$1"
case $2 in
  single) cp "$3" "$4" ;;  # a copy: the server appends to the one and not to the other
  multi)
    mkdir "$5"
    ln "$3" "$5/$4.1.base.rdb" 2>/dev/null || cp "$3" "$5/$4.1.base.rdb"
    printf 'file "%s.1.base.rdb" seq 1 type b\n' "$4" >"$5/$4.manifest" ;;
esac
like=../..
[ ! -e "../../$3" ] || like=../../$3
chown -R "$(stat -c %u:%g "$like")" .
find . -type f -exec sync {} + 2>/dev/null || sync
"""
"""Lays out what the server will read (Redis takes an RDB as the beginning of an append-only file since 4.0)."""

BEGIN = 'mkdir -p "$1/old"'

SWAP = r"""
cd "$1"; shift
if [ ! -e kept ]; then
  for name; do
    if [ -e "old/$name" ]; then rm -rf "../$name"; elif [ -e "../$name" ]; then mv "../$name" old/; fi
  done
  sync . .. 2>/dev/null || sync
  touch kept
fi
for name; do [ ! -e "new/$name" ] || { rm -rf "../$name"; mv "new/$name" ../; }; done
sync . .. 2>/dev/null || sync
touch swapped
"""
"""Killed anywhere and run again, it ends alike, even if something started the server in between."""

REVERT = r"""
cd "$1"; shift
if [ -e kept ] && [ ! -e reverting ]; then
  mkdir -p failed
  for name; do [ ! -e "../$name" ] || { rm -rf "failed/$name"; mv "../$name" failed/; }; done
  sync . .. 2>/dev/null || sync
  touch reverting
fi
for name; do [ ! -e "old/$name" ] || { rm -rf "../$name"; mv "old/$name" ../; }; done
sync . .. 2>/dev/null || sync
"""

DROP = 'for staging; do [ ! -d "$staging" ] || mv "$staging" "$staging.gone"; rm -rf "$staging.gone"; done'
"""Renamed first: half a staging folder must not look like a younger one."""


@dataclass(frozen=True)
class Staged:
    """What `Component.stage` remembers for the steps after it, when the server may be down."""

    names: tuple[str, ...]
    appendonly: bool
    running: bool
    keys: int
    expires: int


class Component(RedisServer):
    """A Redis server. ``data_dir`` and the names below it are asked from the server where they are not set."""

    metadata_key: ClassVar[str] = "redis"

    kind: Literal["redis"]

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Take a snapshot and open it.

        ``holds`` has the exact number of ``keys`` and how many of them expire (``expires``), as redis-check-rdb
        counted them; ``databases`` has the keys of each, counted just after the snapshot began, hence approximate.
        """
        layout = self.layout(self.info())
        info = self.snapshot()
        version = info.get("valkey_version") or info["redis_version"]
        holds: dict[str, Any] = {"databases": databases(info), "server_version": version}
        file = layout.folder / layout.dbfilename
        size = self.sh(SIZE, file)
        chunks = self._read(file, holds, began=server_time(info))
        return [Source(self.name, f"{self.name}.rdb", RDB, chunks, expected=int(size), holds=holds)]

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        try:
            held = databases(self.info())
        except RuntimeUnavailable:
            self.sh("true")  # raises when it is the container that is not there: a restore creates it first
            now = "whatever the server holds, which does not answer,"
        else:
            each = ", ".join(f"{database} {keys}" for database, keys in held.items())
            now = f"{sum(held.values())} keys" + (f" ({each})" if each else "")
        part = self._part(parts)
        age = datetime.now(UTC) - part.started
        recorded = part.holds.get("keys", "an unrecorded number of")
        old = f"{age.days} d {age.seconds // 3600} h {age.seconds // 60 % 60} min old"
        taken = f"{part.started:%Y-%m-%d %H:%M} UTC, {old}"
        return [f"Redis {self.name}: {now} will be replaced by {recorded} keys of {taken}"]

    def by_hand(self, parts: Sequence[Part]) -> str:
        part = self._part(parts)
        reader = {"zstd": "zstd -dc", "gzip": "gzip -dc", "none": "cat"}[part.codec]
        file = self.dbfilename or "dump.rdb"
        unpack = f"{reader} {shlex.quote(part.name)} >"
        if self.container:
            place = shlex.quote(f"{self.container}:{self.data_dir or '/data'}/{file}")
            container = shlex.quote(self.container)
            lines = [f"{unpack}dump.rdb", f"docker stop {container}", f"docker cp dump.rdb {place}"]
            lines += [f"docker start {container}"]
            before = after = ""
        else:
            folder = shlex.quote(str(self.data_dir)) if self.data_dir else "<data folder of Redis>"
            place = f"{folder}/{shlex.quote(file)}"
            lines = [f"{unpack}{place}", f"chown --reference={folder} {place}"]
            before, after = "Stop the server, then:\n\n", "\nStart the server.\n"
        return (
            f"The snapshot holds {part.holds.get('keys', 'an unknown number of')} keys. A server with `appendonly yes` does not "
            "read it: start it with `appendonly no`, then turn it on again with `CONFIG SET appendonly yes`.\n\n"
            f"{before}```sh\n" + "\n".join(lines) + f"\n```\n{after}"
        )

    def stage(self, restore: Restore) -> None:
        part = self._part(restore.parts)
        if self.container is None and not (self.start and self.stop and self.status):
            raise Permanent(f"{self.name}: a restore needs the commands start, stop and status")
        layout, running = self.layout_to_restore()
        staging = self._staging(layout.folder, restore)
        if "old" in self._state(staging):
            return  # its swap has begun, so it was staged
        file = staging / "new" / layout.dbfilename
        self.sh(RECEIVE, staging, file, chunks=restore.read(part))
        try:
            found = _report(self.sh(CHECK_FILE, self.server, file))
        except CommandFailed as error:
            raise ComparisonError(
                f"{self.name}: its server (Redis {layout.version}) cannot read the snapshot, "
                f"which Redis {part.holds.get('server_version', 'of an unknown version')} wrote: {error.stderr}"
            ) from error
        for key in ("keys", "expires"):
            if part.holds.get(key, found[key]) != found[key]:
                raise ComparisonError(f"{self.name}: {found[key]} {key} staged, {part.holds[key]} recorded")
        self.sh(ARRANGE, staging / "new", layout.form, *layout.names)
        staged = Staged(layout.names, bool(layout.appendonly), running, found["keys"], found["expires"])
        self.sh(WRITE, staging / "staged.json", chunks=[json.dumps(asdict(staged)).encode()])

    def swap(self, restore: Restore) -> None:
        staging = self._find(restore)
        state = self._state(staging) if staging else set()
        if staging is None or "staged.json" not in state:
            raise Permanent(f"{self.name}: nothing is staged for {restore.run_id}")
        staged = self._staged(staging)
        if "swapped" not in state:
            if not staged.appendonly and self.service.is_running():
                self.snapshot()  # a server without save points would take what it holds with it
            self.sh(BEGIN, staging)
            self.service.stop()
            self.sh(SWAP, staging, *staged.names)
        self.start_service()
        info = self.loaded()
        low, high = staged.keys - staged.expires, staged.keys
        loaded = sum(databases(info).values())
        if "rdb_last_load_keys_loaded" in info:  # from 7.0: exact when just restored
            loaded = int(info["rdb_last_load_keys_loaded"]) + int(info["rdb_last_load_keys_expired"])
            low = low if "swapped" in state else high
        if not low <= loaded <= high:
            raise ComparisonError(f"{self.name}: the server loaded {loaded} keys, expected {low} to {high}")

    def revert(self, restore: Restore) -> None:
        staging = self._find(restore)
        if staging is not None and "old" in self._state(staging):
            staged = self._staged(staging)
            self.service.stop()
            self.sh(REVERT, staging, *staged.names)
            if staged.running:
                self.start_service()
                self.loaded()
        self.settle(restore)

    def settle(self, restore: Restore) -> None:
        self.sh(DROP, *self._candidates(restore))

    def _read(self, file: PurePosixPath, holds: dict[str, Any], *, began: int) -> Iterator[bytes]:
        """Yield the snapshot, checked before its first byte; it stays the same one whatever is saved meanwhile."""
        process = self.runtime.spawn(["sh", "-c", READ, "sh", self.server, str(file)])
        try:
            process.close_input()
            output, head = process.output(), b""
            while b"\n\n" not in head and (chunk := next(output, b"")):
                head += chunk
            report, _, chunk = head.partition(b"\n\n")
            found = _report(report.decode(errors="replace"))
            if found.pop("ctime", 0) < began:
                raise IntegrityError(
                    f"{self.name}: {file} is not the snapshot just taken; is data_dir right?"
                )
            holds.update(found)
            if chunk:
                yield chunk
            yield from output
        except CommandFailed as error:
            raise IntegrityError(f"{self.name}: {file} cannot be read: {error.stderr}") from error
        finally:
            process.kill()

    def _part(self, parts: Sequence[Part]) -> Part:
        if [part.kind for part in parts] != [RDB]:
            kinds = ", ".join(part.kind for part in parts) or "nothing"
            raise Permanent(f"{self.name}: expected one {RDB}, got {kinds}")
        return parts[0]

    def _staging(self, folder: PurePosixPath, restore: Restore) -> PurePosixPath:
        return folder / f".ai-micro-backup-{part_name(restore.run_id)}"

    def _candidates(self, restore: Restore) -> list[PurePosixPath]:
        folders = USUAL_FOLDERS if self.data_dir is None else (self.data_dir,)
        return [self._staging(folder, restore) for folder in folders]

    def _find(self, restore: Restore) -> PurePosixPath | None:
        return next((staging for staging in self._candidates(restore) if self._state(staging)), None)

    def _state(self, staging: PurePosixPath) -> set[str]:
        return set(self.sh('[ ! -d "$1" ] || ls -A "$1"', staging).splitlines())

    def _staged(self, staging: PurePosixPath) -> Staged:
        return Staged(**json.loads(self.sh('cat "$1"', staging / "staged.json")))


def _report(text: str) -> dict[str, int]:
    """Return what `CHECK` found: ``keys``, ``expires``, ``rdb_version`` and ``ctime``, the second it was begun."""
    patterns = {
        "keys": r"(\d+) keys read",
        "expires": r" (\d+) expires",
        "rdb_version": r"magic [A-Z]+(\d+)",
        "ctime": r"AUX FIELD ctime = '(\d+)'",
    }
    found = {key: re.search(pattern, text) for key, pattern in patterns.items()}
    return {key: int(match[1]) for key, match in found.items() if match}
