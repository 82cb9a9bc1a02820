"""What a Redis server must allow so that it can be backed up and restored, found out without changing anything."""

from __future__ import annotations

from tasks.components.redis_aof import usable
from tasks.components.redis_server import USUAL_FOLDERS, RedisServer
from tasks.components.redis_users import ALONE, LOOK, Users, connecting, live_users, shown
from workers.component import Finding
from workers.errors import BackupError, CommandFailed, Permanent

RIGHTS = {"file": ("bgsave",), "network": ("sync", "replconf"), "aof": ("bgsave", "bgrewriteaof")}
"""Commands that each ``method`` needs beside INFO, MODULE LIST, CONFIG GET and ACL LIST. A restore needs BGSAVE."""
HARMLESS = {
    "info": ("INFO", "server"),
    "module|list": ("MODULE", "LIST"),
    "config|get": ("CONFIG", "GET", "dir"),
    "acl|list": ("ACL", "LIST"),
    "bgsave": ("BGSAVE", "?"),
    "replconf": ("REPLCONF", "?"),
}
"""How to try whether a command is allowed: by a question, or by an argument that it does not have."""


def preflight_server(server: RedisServer) -> list[Finding]:
    """Return what to change for the backups and restores that the settings ask for. Raises as `RedisServer.info`."""
    told = server.ask("INFO")
    found = _rights(server)
    if told.startswith("NOPERM"):
        return found
    info = server.info()
    server.refuse_cluster(info)
    if not server.has(server.server):
        what = f"there is no program {server.server} where the server lives: backups cannot be checked there, nor restored"
        found.append(
            Finding(what=what, change="install it there, or set server", advice=server.method == "network")
        )
    return found + _data(server, info) + _users(server)


def _rights(server: RedisServer) -> list[Finding]:
    name = shown(connecting(server))
    known = server.data_dir and server.appendonly is not None and (server.aclfile or not server.users)
    needed = ["info", "module|list", *RIGHTS[server.method]]
    needed += [] if known else ["config|get"]
    needed += ["acl|list"] if server.users and (server.aclfile or server.has_aclfile()) else []
    allowed = {command: _allowed(server, command, name) for command in needed}
    change = f"ACL SETUSER {name} {' '.join(f'+{command}' for command in needed)}"
    change += "   # then ACL SAVE, or the same in redis.conf"
    if missing := [command for command, may in allowed.items() if may is False]:
        return [Finding(what=f"the user {name} may not run {_listed(missing)}", change=change)]
    if unknown := [command for command, may in allowed.items() if may is None]:
        what = f"whether the user {name} may run {_listed(unknown)} cannot be told without running it"
        return [Finding(what=what, change=change, advice=True)]
    return []


def _allowed(server: RedisServer, command: str, name: str) -> bool | None:
    """Say whether the server lets the user run a command; ``None`` when only running it would tell."""
    if words := HARMLESS.get(command):
        return not server.ask(*words).startswith("NOPERM")
    answer = server.ask("ACL", "DRYRUN", name, command)  # from 7.0 on
    if answer.startswith("OK"):
        return True
    if not answer.startswith(("NOPERM", "ERR")):
        return False
    line = Users.of(server.ask_bytes("ACL", "LIST")).lines.get(name.encode(), b"")
    rules = line.decode(errors="replace").split()
    denied = any(rule.startswith("-") for rule in rules)
    return True if f"+{command}" in rules or ("+@all" in rules and not denied) else None


def _listed(commands: list[str]) -> str:
    return ", ".join(command.upper().replace("|", " ") for command in commands)


def _data(server: RedisServer, info: dict[str, str]) -> list[Finding]:
    network = server.method == "network"
    try:
        layout = server.layout(info)
        if server.method == "aof":
            usable(server)
    except Permanent as error:
        return [Finding(what=str(error), advice=network)]
    if not server.sh('[ ! -r "$1" ] || echo yes', layout.folder):
        what = f"the data folder {layout.folder} cannot be read where the programs run"
        change = 'set data_dir, or method = "network" for backups without it'
        return [Finding(what=what, change=change, advice=network)]
    if server.data_dir is None and layout.folder not in USUAL_FOLDERS:
        what = "a restore could not find the data folder while the server is down"
        return [Finding(what=what, change=f'set data_dir = "{layout.folder}"')]
    return []


def _users(server: RedisServer) -> list[Finding]:
    if not server.users:
        return []
    aclfile = server.aclfile or server.configured("aclfile").get("aclfile")
    if aclfile is None:
        what = "the server does not tell whether it has an aclfile, so its users are not backed up"
        return [Finding(what=what, change="set aclfile, or users = false", advice=True)]
    if not aclfile:
        return _users_of_the_configuration(server)
    try:
        folder = server.data_dir or server.configured("dir").get("dir") or "/"
        server.sh(f'cd "$3"; {LOOK}', aclfile, server.container or "", folder)
    except CommandFailed as error:
        what = f"the users could not be restored to {aclfile}: {error.stderr}"
        return [Finding(what=what, change=f"mount its folder, or {ALONE}")]
    return []


def _users_of_the_configuration(server: RedisServer) -> list[Finding]:
    try:
        names = live_users(server).names
    except BackupError:
        return []
    others = [name for name in names if name != "default"]
    what = f"the users {', '.join(others)} are in the server's configuration, and not backed up with its data"
    change = "list its redis.conf in a config component, or give the server an aclfile"
    return [Finding(what=what, change=change, advice=True)] if others else []
