"""The users of a Redis server: told by ACL LIST, tried by a scratch server, and put into the server's aclfile.

A server with an ``aclfile`` takes all its users from there when it starts, `default` included, whatever
``requirepass`` and ``user`` lines its configuration has. Without one its users are configuration. The lines hold
hashes of passwords: they appear in no message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tasks.components.redis_scratch import load_users
from tasks.components.redis_server import Layout, RedisServer
from workers.component import Part, Restore
from workers.errors import CommandFailed, ComparisonError, IntegrityError, Permanent, RuntimeUnavailable

USERS = "redis-users"
ALONE = "set users = false to restore the data alone"

LOOK = r"""
file=$(readlink -f "$1" || printf '%s' "$1")
[ -f "$file" ] || file=$(dirname "$file")
[ -e "$file" ] || { echo "its folder does not exist" >&2; exit 1; }
[ -w "$file" ] || { echo "it cannot be written to" >&2; exit 1; }
[ -z "$2" ] || [ "$(stat -c %d "$file")" != "$(stat -c %d /)" ] || { echo "it lies in no volume" >&2; exit 1; }
"""
"""Fails where an aclfile ``$1`` could not be put; ``$2`` says that it is in a container, of which only volumes last."""

READ = '[ ! -e "$1" ] || cat "$1"'

STAGE = 'umask 077; mkdir -p "$1/users"; cat >"$1/users/new"'

PUT = r"""
put() {  # the content of $1 into the file $2, at one stroke where that is no mount of its own
  like=$2; [ -e "$2" ] || like=$(dirname "$2")
  { cp "$1" "$2.new" && chown "$(stat -c %u:%g "$like")" "$2.new" &&
    { [ ! -e "$2" ] || chmod "$(stat -c %a "$2")" "$2.new"; } &&
    { sync "$2.new" || sync; } && mv -f "$2.new" "$2"; } 2>/dev/null || cat "$1" >"$2"
  rm -f "$2.new"
  sync "$2" 2>/dev/null || sync
}
umask 077
file=$(readlink -f "$2" || printf '%s' "$2")
cd "$1/users"
"""

SWAP = (
    PUT
    + r"""
if [ ! -e kept ]; then
  if [ -e "$file" ]; then cp "$file" old.new; mv old.new old; fi
  touch kept
fi
put new "$file"
"""
)

REVERT = (
    PUT
    + r"""
[ -e kept ] || exit 0
if [ -e old ]; then put old "$file"; else rm -f "$file" "$file.new"; fi
"""
)
"""Both may be killed anywhere and run again, as the scripts of `redis_swap`."""


@dataclass(frozen=True)
class Users:
    """Users by name, each with its whole line, as an aclfile has it. Names and lines hold no white space but blanks."""

    lines: Mapping[bytes, bytes]

    @classmethod
    def of(cls, text: bytes) -> Users:
        """Return those of an aclfile's text, or of the answer to ACL LIST."""
        lines = [line.strip() for line in text.split(b"\n") if line.startswith(b"user ")]
        return cls({line.split()[1]: line for line in lines if len(line.split()) > 1})

    @property
    def text(self) -> bytes:
        return b"".join(line + b"\n" for line in self.lines.values())

    @property
    def names(self) -> list[str]:
        return [shown(name) for name in sorted(self.lines)]

    def difference(self, found: Users) -> list[str]:
        """Return the names of the users that ``found`` has not, or has otherwise, or has beside these.

        A server tells the rules of a user in another order each time it has loaded them (7.0).
        """
        rules, others = (
            {name: sorted(line.split()) for name, line in users.lines.items()} for users in (self, found)
        )
        names = sorted(rules.keys() | others.keys())
        return [shown(name) for name in names if rules.get(name) != others.get(name)]


def shown(name: bytes) -> str:
    """Return a user's name for people; it may be any bytes."""
    return name.decode(errors="backslashreplace")


def connecting(server: RedisServer) -> bytes:
    """Return the name of the user that the worker connects with."""
    return (server.username or "default").encode()


def live_users(server: RedisServer) -> Users:
    """Return the users that the server has now. Raises ``Permanent`` when it does not tell."""
    answer = server.ask_bytes("ACL", "LIST")
    if not answer.startswith(b"user "):
        raise Permanent(
            f"{server.name}: the server does not tell its users ({answer.decode(errors='replace').strip()[:200]}); "
            f"let {shown(connecting(server))} run ACL LIST (+acl|list), or set users = false"
        )
    return Users.of(answer)


def read_users(server: RedisServer, holds: dict[str, Any]) -> Iterator[bytes]:
    """Yield the users as the lines of an aclfile, and note their names in ``holds``."""
    users = live_users(server)
    yield users.text
    holds["users"] = users.names


def check_users(server: RedisServer, part: Part, chunks: Iterator[bytes]) -> Users:
    """Return the users of a part as a scratch server of this version has them when it has loaded them.

    Raises ``IntegrityError`` when it cannot, ``ComparisonError`` when they are not those recorded.
    """
    found = Users.of(load_users(server, chunks))
    if "users" in part.holds and part.holds["users"] != found.names:
        raise ComparisonError(
            f"{server.name}: the users {', '.join(found.names)} found, {', '.join(part.holds['users'])} recorded"
        )
    return found


def stage_users(
    server: RedisServer,
    part: Part,
    restore: Restore,
    layout: Layout,
    staging: PurePosixPath,
    *,
    running: bool,
) -> PurePosixPath | None:
    """Put the users beside the data, tried, and return the aclfile that they are for; ``None`` when there is none.

    The user that the worker connects with stays as the server has it now, else it might lock the worker out. Raises
    ``Permanent`` when the users cannot be put in place, or would lock it out.
    """
    if layout.aclfile is None:
        if not running:
            raise RuntimeUnavailable(
                f"{server.name}: the backup has users, and the server, which is down, cannot tell its aclfile: start it, set "
                f"aclfile, or {ALONE}"
            )
        restore.warnings.append(
            f"{server.name}: the users {', '.join(part.holds.get('users', []))} of the backup were not restored: the server "
            "has no aclfile, so its users are those of its redis.conf"
        )
        return None
    try:
        server.sh(LOOK, layout.aclfile, server.container or "")
    except CommandFailed as error:
        raise Permanent(
            f"{server.name}: the users cannot be restored to {layout.aclfile}: {error.stderr}; {ALONE}"
        ) from error
    archived = check_version(server, part, restore, layout)
    now = live_users(server) if running else Users.of(server.sh_bytes(READ, layout.aclfile))
    name = connecting(server)
    if name in now.lines:
        wanted = Users.of(load_users(server, [Users({**archived.lines, name: now.lines[name]}).text]))
    else:
        wanted = archived
        require_access(server, wanted.lines.get(name, b""))
    server.sh(STAGE, staging, chunks=[wanted.text])
    return layout.aclfile


def check_version(server: RedisServer, part: Part, restore: Restore, layout: Layout) -> Users:
    """Do what `check_users` does for a restore: what this server cannot load, another may have written."""
    try:
        return check_users(server, part, restore.read(part))
    except IntegrityError as error:
        raise ComparisonError(
            f"{server.name}: its server (Redis {layout.version}) cannot load the users of the backup: {error}; {ALONE}"
        ) from error


def require_access(server: RedisServer, line: bytes) -> None:
    """Raise ``Permanent`` when the password of the settings does not open the user of this line."""
    rules = line.split()
    password = server.password.resolve() if server.password else ""
    hashed = b"#" + hashlib.sha256(password.encode()).hexdigest().encode()
    if b"on" not in rules or not {b"nopass", hashed} & set(rules):
        raise Permanent(
            f"{server.name}: the password of the settings does not open the user {shown(connecting(server))} as it is in the "
            f"backup, so the worker could not connect after the restore; correct it, or {ALONE}"
        )


def compare_users(server: RedisServer, staging: PurePosixPath) -> None:
    """Compare the users that the server has loaded with those staged. Raises ``ComparisonError``."""
    wanted = Users.of(server.sh_bytes('cat "$1"', staging / "users" / "new"))
    if names := wanted.difference(live_users(server)):
        raise ComparisonError(
            f"{server.name}: the server has not loaded the users {', '.join(names)} as restored"
        )


def plan_users(server: RedisServer, part: Part) -> str:
    """Say what a restore would do to the users of the server."""
    stays = f"{shown(connecting(server))} stays as it is, for the worker connects with it"
    recorded = part.holds.get("users", [])
    try:
        if not server.has_aclfile():
            return f"Redis {server.name}: its users stay as they are, for it has no aclfile; the backup has {', '.join(recorded)}"
        now = live_users(server).names
    except RuntimeUnavailable:
        return f"Redis {server.name}: its users will be replaced by {', '.join(recorded)}"
    gone = [name for name in now if name not in recorded and name != shown(connecting(server))]
    goes = f"; gone will be {', '.join(gone)}" if gone else ""
    return f"Redis {server.name}: its users will be replaced by {', '.join(recorded)}{goes}; {stays}"
