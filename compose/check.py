"""Checks the settings and the secrets of hosts before anything starts: ``python -m compose.check HOST…``.

Prints every error with its path, and ends with status 2 when there is one.
"""

import sys
from collections.abc import Sequence

from workers.errors import SettingsError
from workers.settings import get_settings


def main(hosts: Sequence[str]) -> int:
    """Check what a worker on each of ``hosts`` would check when it starts; return the exit status."""
    try:
        settings = get_settings()
        lines = [f"hosts: there is no host {host!r}" for host in hosts if host not in settings.hosts]
        if lines := lines + settings.missing_secrets(hosts):
            raise SettingsError("settings", lines)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
