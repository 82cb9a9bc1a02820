"""What a service says of its health, asked over HTTP."""

from __future__ import annotations

import urllib.error
import urllib.request


def probe(url: str, *, timeout: float = 10.0) -> tuple[int, str]:
    """Give the status and the body that `url` answers with; status 0 and the reason when it cannot be reached."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310 - an address from our own settings
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
