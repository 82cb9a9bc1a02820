"""The embedded default: a real PostgreSQL and a real Redis as processes of this machine, on 127.0.0.1, without Docker.

`python -m compose.demo.embedded start|stop|status postgres|redis --data-dir FOLDER --port PORT`

does what `PostgresServer` and `RedisServer` do, for the start and stop commands of the backup system's settings. A password is read
from POSTGRES_PASSWORD or REDIS_PASSWORD and needed for the very first start only. Exit status: 0 done, or running; 1 failed;
2 wrong usage; 3 not running.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from compose.demo.embedded_daemon import Daemon, ServerError, free_port
from compose.demo.embedded_postgres import PostgresServer, postgres_bin_dir
from compose.demo.embedded_redis import RedisServer, redis_program

__all__ = [
    "Daemon",
    "PostgresServer",
    "RedisServer",
    "ServerError",
    "free_port",
    "main",
    "postgres_bin_dir",
    "redis_program",
]

NOT_RUNNING = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m compose.demo.embedded", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("kind", choices=["postgres", "redis"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds to wait for it to answer, or to end"
    )
    parser.add_argument(
        "--appendonly", choices=["yes", "no"], help="redis: override the setting for this start"
    )
    chosen = parser.parse_args(arguments)

    server: Daemon
    if chosen.kind == "postgres":
        server = PostgresServer(chosen.data_dir, chosen.port, os.environ.get("POSTGRES_PASSWORD"))
    else:
        appendonly = None if chosen.appendonly is None else chosen.appendonly == "yes"
        server = RedisServer(
            chosen.data_dir, chosen.port, os.environ.get("REDIS_PASSWORD"), appendonly=appendonly
        )
    try:
        if chosen.action == "start":
            server.start(timeout=chosen.timeout)
        elif chosen.action == "stop":
            server.stop(timeout=chosen.timeout)
        elif not server.is_running():
            return NOT_RUNNING
    except ServerError as error:
        print(f"embedded: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
