"""The RDB snapshot of a server, from its data folder or over a replication connection."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from tasks.components.redis_rdb import READ, Passing, begun, checked, without_mark
from tasks.components.redis_server import RedisServer
from workers.errors import CommandFailed, IntegrityError, Permanent, RuntimeUnavailable


def read_file(
    server: RedisServer, file: PurePosixPath, holds: dict[str, Any], *, began: int
) -> Iterator[bytes]:
    """Yield the snapshot, checked before its first byte; it stays the same one whatever is saved meanwhile.

    ``holds`` gets what is in it. Raises ``IntegrityError`` when it is damaged or older than the second ``began``.
    """
    passing = Passing()
    process = server.runtime.spawn(["sh", "-c", READ, "sh", server.server, str(file)])
    try:
        process.close_input()
        output, head = process.output(), b""
        while b"\n\n" not in head and (chunk := next(output, b"")):
            head += chunk
        told, _, chunk = head.partition(b"\n\n")
        said = told.decode(errors="replace")
        if begun(said) < began:
            raise IntegrityError(f"{server.name}: {file} is not the snapshot just taken; is data_dir right?")
        yield from passing.through(itertools.chain([chunk] if chunk else [], output))
        holds.update(passing.report(said, str(file)).holds)
    except CommandFailed as error:
        raise IntegrityError(f"{server.name}: {file} cannot be read: {error.stderr}") from error
    finally:
        process.kill()


def read_network(server: RedisServer, holds: dict[str, Any]) -> Iterator[bytes]:
    """Yield a snapshot that the server sends as to a replica, read by redis-check-rdb in passing where there is one.

    ``holds`` then gets what is in it. Raises ``RuntimeUnavailable`` when the connection ends before the snapshot.
    """
    server.wait_for_saves()  # else it would be the one that began before
    received = without_mark(replicate(server), name=server.name)
    if server.has(server.server):
        report = yield from checked(server.runtime, server.server, received, name=server.name)
        holds.update(report.holds)
    else:
        yield from received


def replicate(server: RedisServer) -> Iterator[bytes]:
    """Yield what redis-cli writes of a replication connection up to the end of its snapshot."""
    process = server.runtime.spawn([*server.client(), "--rdb", "-"], env=server.client_environment())
    try:
        process.close_input()
        yield from process.output()
    except CommandFailed as error:
        refused = re.search("NOAUTH|NOPERM|WRONGPASS|AUTH failed", error.stderr)
        kind = Permanent if refused or error.status in (126, 127) else RuntimeUnavailable
        raise kind(f"{server.name}: no snapshot came over the network: {error.stderr}") from error
    finally:
        process.kill()
