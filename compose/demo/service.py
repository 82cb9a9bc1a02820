"""One service of the demo system: which one, its `ROLE` says (auth, user, admin, front-user, front-admin).

    python -m compose.demo.service run                               serve until SIGTERM, configured by the environment
    python -m compose.demo.service start|stop|status NAME --state-dir DIR   the same as a process of this host (`service_process`)

Environment: ROLE, PORT, HOST (default 127.0.0.1), DATABASE_URL, REDIS_URL, KEYS_DIR, UPLOADS_DIR, API_URLS, TITLE, as far as the
role needs them. `GET /health` answers 200 when the service's data is there, else 503 with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compose.demo import service_process


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; give the exit code (for `status`: 0 running, 3 not)."""
    parser = argparse.ArgumentParser(prog="compose.demo.service", description="A service of the demo system.")
    parser.add_argument("command", choices=["run", "start", "stop", "status"])
    parser.add_argument("name", nargs="?", help="the service, whose environment is DIR/NAME.env")
    parser.add_argument("--state-dir", type=Path, help="folder of NAME.env, NAME.pid and NAME.log")
    given = parser.parse_args(arguments)
    if given.command == "run":
        # Imported here: its libraries take a second to load, which starting and stopping need not wait for.
        from compose.demo.service_http import serve

        serve()
        return 0
    if not given.name or not given.state_dir:
        parser.error("start, stop and status need NAME and --state-dir")
    service = service_process.ServiceProcess(given.name, given.state_dir)
    try:
        if given.command == "start":
            service.start()
        elif given.command == "stop":
            service.stop()
    except (OSError, service_process.ServiceProcessError) as error:
        print(f"{given.name}: {error}", file=sys.stderr)
        return 1
    running = service.pid() is not None
    print(f"{given.name}: {'running' if running else 'stopped'}")
    return 0 if running or given.command == "stop" else 3


if __name__ == "__main__":
    sys.exit(main())
