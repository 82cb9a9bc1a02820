"""How to restore a Redis server with public tools alone, for the RESTORE.md of an archive."""

from __future__ import annotations

import shlex

from tasks.components.redis_server import AOF, RedisServer
from workers.component import Part, plain_command


def instructions(server: RedisServer, data: Part, users: Part | None) -> str:
    """Return them as Markdown, for the part with the data and the one with the users, if there is one."""
    file, note = server.dbfilename or "dump.rdb", _note_of_snapshot(data)
    if data.kind == AOF:
        file, note = server.appendfilename or "appendonly.aof", _note_of_log(server, data)
    folder = f"{server.data_dir or '/data'}" if server.container else "<data folder of Redis>"
    unpack = f"{plain_command(data)} >"
    aclfile = f"{server.aclfile or '<what CONFIG GET aclfile says>'}"
    if users:
        note += f"\n\nThe users are the lines of its aclfile, which it reads when it starts: {aclfile}."
    if server.container:
        container, name = shlex.quote(server.container), shlex.quote(file)
        lines = [
            f"{unpack}{name}",
            f"docker stop {container}",
            f"docker cp {name} {shlex.quote(f'{server.container}:{folder}/{file}')}",
        ]
        if users:
            lines[1:1] = [f"{plain_command(users)} >users.acl"]
            lines += [f"docker cp users.acl {shlex.quote(f'{server.container}:{aclfile}')}"]
        lines += [f"docker start {container}"]
        return _block(note, "", lines, "")
    folder = shlex.quote(str(server.data_dir)) if server.data_dir else folder
    place = f"{folder}/{shlex.quote(file)}"
    lines = [f"{unpack}{place}", f"chown --reference={folder} {place}"]
    lines += [f"{plain_command(users)} >{shlex.quote(aclfile)}"] if users else []
    return _block(note, "Stop the server, then:\n\n", lines, "\nStart the server.\n")


def _block(note: str, before: str, lines: list[str], after: str) -> str:
    return f"{note}\n\n{before}```sh\n" + "\n".join(lines) + f"\n```\n{after}"


def _note_of_snapshot(data: Part) -> str:
    return (
        f"The snapshot holds {_keys(data)}. A server with `appendonly yes` does not read it: start it with `appendonly no`, "
        "then turn it on again with `CONFIG SET appendonly yes`."
    )


def _note_of_log(server: RedisServer, data: Part) -> str:
    return (
        f"The append-only file holds {_keys(data)}. A server with `appendonly no` does not read it: start it with "
        f"`appendonly yes`. From 7.0 on, remove the folder `{server.appenddirname or 'appendonlydir'}` beside it first: the "
        "server makes it anew."
    )


def _keys(data: Part) -> str:
    return f"{data.holds.get('keys', 'an unknown number of')} keys"
