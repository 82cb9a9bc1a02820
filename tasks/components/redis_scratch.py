"""A Redis server of its own that loads a backup, of data or of users, says what it holds, and is gone again.

It loads as a replica of nobody: a replica drops no key that has expired, so what it counts is what was backed up,
however old that is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tasks.components.redis_server import RedisServer, databases
from workers.errors import CommandFailed, IntegrityError, Permanent
from workers.runtime import marker, run

DATABASES = 16384
"""As many as an RDB file or an append-only file may be expected to use; an empty one takes a few hundred bytes."""
ABSENT = 3
"""Exit status of `LOAD` when the program is missing."""
LOAD = r"""
umask 077
server=$(command -v "$1") || { echo "there is no program $1" >&2; exit 3; }
case $2 in */*) cli=$2 ;; *) cli=$(command -v "$2") || { echo "there is no program $2" >&2; exit 3; } ;; esac
file=$3 child=
scratch=${TMPDIR:-/tmp}/ai-micro-backup-scratch-$4
unset REDISCLI_AUTH
rm -rf "$scratch"
mkdir "$scratch"
trap '[ -z "$child" ] || kill -9 "$child" 2>/dev/null || :' EXIT
trap 'exit 1' HUP INT TERM PIPE
cd "$scratch"
cat >"$file"
appendonly=no users= as=
case $file in
  *.aof) appendonly=yes ;;
  *.acl)
    users="--aclfile ./$file" as="--user scratch-$4"
    export REDISCLI_AUTH=any
    printf '\nuser scratch-%s on nopass +info +acl|list\n' "$4" >>"$file" ;;
esac
(
  echo 1000 >/proc/self/oom_score_adj || :  # short of memory, this one ends, and not the live server
  exec nice "$server" --port 0 --unixsocket ./socket --unixsocketperm 700 --dir . --save '' --logfile ./log \
    --appendonly "$appendonly" --appendfilename appendonly.aof --dbfilename dump.rdb --aof-load-truncated no \
    --auto-aof-rewrite-percentage 0 --replicaof 127.0.0.1 1 --databases "$5" $users
) </dev/null >/dev/null 2>&1 &
child=$!
until said=$("$cli" -s ./socket $as INFO 2>/dev/null) && printf '%s\n' "$said" | grep -q "^loading:0"; do
  if ! kill -0 "$child" 2>/dev/null; then  # lines that name a key are left out: it may be secret
    status=0; wait "$child" || status=$?; child=
    echo "the scratch server ended with status $status while it loaded it" >&2
    reasons="ACL errors|module|[Vv]ersion|checksum|CRC|OOM|Bad file|Unexpected|EOF|more than [0-9]+ databases|xpected"
    grep -a ' # ' log 2>/dev/null | grep -aE "$reasons" | grep -av "key '" |
      sed "s/^.* # //; s/ WARNING: ACL.*//; s|$PWD/||g; s|\./$file|$file|g; s/operation '[^-+][^']*'/an operation/g" | tail -n 4 >&2 || :
    exit 1
  fi
  sleep 0.1
done
if [ -n "$6" ]; then
  "$cli" -s ./socket SAVE >/dev/null
  cp dump.rdb "$6"
fi
[ -z "$as" ] || said=$("$cli" -s ./socket $as ACL LIST)
printf '%s\n' "$said"
"""
"""Its socket lies in a folder that nobody else may enter, hence no password; it listens on no port."""


CLEAR = 'rm -rf "${TMPDIR:-/tmp}/ai-micro-backup-scratch-$1"'


@dataclass(frozen=True)
class Loaded:
    """What a scratch server held: keys, and those that expire, by ``db<number>``."""

    databases: dict[str, int]
    expiring: dict[str, int]
    server_version: str

    @property
    def holds(self) -> dict[str, Any]:
        """The same as a part's record has it."""
        return {
            "keys": sum(self.databases.values()),
            "expires": sum(self.expiring.values()),
            "databases": self.databases,
            "expiring": self.expiring,
        }


def load(
    server: RedisServer, chunks: Iterable[bytes], *, form: str, dump: PurePosixPath | None = None
) -> Loaded:
    """Load ``chunks``, a file of the ``form`` ``rdb`` or ``aof``, where the server lives, and say what it holds.

    With ``dump``, save it there as an RDB file.

    It needs the memory that the data takes, and disk for the file below ``$TMPDIR``. Nothing is left; a worker that
    is killed leaves its folder to the next load. Raises ``IntegrityError`` when the server cannot load it.
    """
    file = {"rdb": "dump.rdb", "aof": "appendonly.aof"}[form]
    said = _loaded(server, chunks, file, dump).decode(errors="replace")
    info = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    return Loaded(
        databases=databases(info),
        expiring=databases(info, "expires"),
        server_version=info.get("valkey_version") or info["redis_version"],
    )


def load_users(server: RedisServer, chunks: Iterable[bytes]) -> bytes:
    """Load ``chunks``, the lines of an aclfile, as `load` does, and return them as ACL LIST then tells them."""
    own = f"user scratch-{_own(server, 'users.acl')} ".encode()
    lines = _loaded(server, chunks, "users.acl").split(b"\n")
    return b"\n".join(line for line in lines if not line.startswith(own))


def _loaded(
    server: RedisServer, chunks: Iterable[bytes], file: str, dump: PurePosixPath | None = None
) -> bytes:
    own = _own(server, file)
    argv = ["sh", "-euc", LOAD, "sh", server.server, server.cli, file, own, str(DATABASES), str(dump or "")]
    try:
        return run(server.runtime, argv, chunks=chunks)
    except CommandFailed as error:
        kind = Permanent if error.status == ABSENT else IntegrityError
        raise kind(f"{server.name}: {error.stderr}") from error
    finally:
        run(server.runtime, ["sh", "-c", CLEAR, "sh", own])


def _own(server: RedisServer, file: str) -> str:
    """Return what the name of the scratch folder ends with, for a component and what it loads."""
    return hashlib.sha256(f"{marker(server.name)} {file}".encode()).hexdigest()[:16]
