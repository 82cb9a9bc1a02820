"""Health checks: an address is asked until it answers 200, or until the time is up."""

from __future__ import annotations

import urllib.error
import urllib.request

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from workers.errors import ComparisonError, RuntimeUnavailable

POLL_SECONDS = 0.5
REQUEST_SECONDS = 5
BODY_SHOWN = 200


def wait_until_healthy(url: str, *, seconds: float) -> None:
    """Return when ``url`` answers 200. Raises ``ComparisonError``, with its last answer, after ``seconds``."""
    attempts = Retrying(
        retry=retry_if_exception_type(RuntimeUnavailable),
        stop=stop_after_delay(seconds),
        wait=wait_fixed(POLL_SECONDS),
        reraise=True,
    )
    try:
        attempts(_ask, url)
    except RuntimeUnavailable as error:
        raise ComparisonError(f"not healthy within {seconds:g} s: {error}") from error


def _ask(url: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=REQUEST_SECONDS) as answer:  # noqa: S310  an HttpUrl of the settings
            if answer.status == 200:
                return
            raise RuntimeUnavailable(f"{url} answered {answer.status}")
    except urllib.error.HTTPError as error:
        body = error.read(BODY_SHOWN).decode(errors="replace")
        raise RuntimeUnavailable(f"{url} answered {error.code}: {body}") from error
    except OSError as error:
        raise RuntimeUnavailable(f"{url} does not answer: {getattr(error, 'reason', error)}") from error
