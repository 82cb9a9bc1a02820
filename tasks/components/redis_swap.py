"""The scripts of a restore, which put files beside those of a Redis server, in their place, and back.

They run where the server lives, in any shell. Each may be killed anywhere and run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.components.redis_server import databases

PREPARE = 'umask 027; rm -rf "$1"; mkdir -m 0700 "$1"; mkdir "$1/new"'

RECEIVE = 'umask 027; cat >"$1"'

ARRANGE = r"""
umask 027
cd "$1"
quoted=$(printf '%s' "$4" | sed 's/[\\"]/\\&/g')
case $2 in
  dump-none) ;;
  dump-single) cp "$3" "$4" ;;  # a copy: the server appends to the one and not to the other
  dump-multi)
    mkdir "$5"
    ln "$3" "$5/$4.1.base.rdb" 2>/dev/null || cp "$3" "$5/$4.1.base.rdb"
    printf 'file "%s.1.base.rdb" seq 1 type b\n' "$quoted" >"$5/$4.manifest" ;;
  aof-single) mv "$3" "$4" ;;
  aof-multi)
    mkdir "$5"
    mv "$3" "$5/$4.1.base.aof"
    printf 'file "%s.1.base.aof" seq 1 type b\n' "$quoted" >"$5/$4.manifest" ;;
  *) exit 1 ;;
esac
like=../..
[ ! -e "../../$3" ] || like=../../$3
chown -R "$(stat -c %u:%g "$like")" .
find . -type f -exec sync {} + 2>/dev/null || sync
"""
"""Lays out what the server will read (Redis takes an RDB as the beginning of an append-only file since 4.0)."""

WRITE = 'umask 077; cat >"$1.new" && { sync "$1.new" 2>/dev/null || sync; } && mv "$1.new" "$1"'

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
    """What `Component.stage` remembers for the steps after it, when the server may be down.

    ``databases`` and ``expiring`` are empty where the data tells no counts by database. ``exact`` says that the server
    counts every key that it loads, which it does of an RDB file alone, since 7.0.
    """

    names: tuple[str, ...]
    appendonly: bool
    running: bool
    exact: bool
    keys: int
    expires: int
    databases: dict[str, int]
    expiring: dict[str, int]
    aclfile: str = ""
    """Where the users go; empty when none are restored."""

    def difference(self, info: Mapping[str, str], *, just_restored: bool) -> str:
        """Say how what the server loaded differs from what was staged; nothing when it does not.

        Keys that expired meanwhile are none: the server drops them while it loads, and tells how many since 7.0.
        """
        held = databases(info)
        low, high = self.keys - self.expires, self.keys
        loaded = sum(held.values())
        if self.exact and "rdb_last_load_keys_loaded" in info:
            loaded = int(info["rdb_last_load_keys_loaded"]) + int(info["rdb_last_load_keys_expired"])
            low = low if not just_restored else high
        if not low <= loaded <= high:
            return f"{loaded} keys, expected {low} to {high}"
        for name in self.databases.keys() | held.keys() if self.databases else ():
            high = self.databases.get(name, 0)
            low = high - self.expiring.get(name, 0)
            if not low <= held.get(name, 0) <= high:
                return f"{held.get(name, 0)} keys into {name}, expected {low} to {high}"
        return ""
