"""How a step of a run is performed: under a lease, tried again when that can help, always ending in a record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_exponential

from workers import locks
from workers.errors import BackupError, LeaseUnavailable, Transient
from workers.locks import Lease
from workers.settings import get_settings

log = logging.getLogger(__name__)


def perform(task: Task[Any, Any], lease: str, work: Callable[[Lease], dict[str, Any]]) -> dict[str, Any]:
    """Do ``work`` under ``lease`` and return its record with ``ok: true``, or ``ok: false`` with the ``error``.

    A failure is returned, not raised, so that the chord's body always runs and reports every failure. What can pass
    is tried again here; a lease that somebody else holds is waited for.
    """
    limits = get_settings().limits
    pause = wait_exponential(multiplier=0.5, max=10)
    for_lease = Retrying(
        retry=retry_if_exception_type(LeaseUnavailable),
        stop=stop_after_delay(limits.lease_wait),
        wait=pause,
        reraise=True,
    )
    for_work = Retrying(
        retry=retry_if_exception_type(Transient),
        stop=stop_after_attempt(limits.attempts),
        wait=pause,
        reraise=True,
    )

    def once() -> dict[str, Any]:
        with locks.hold(get_settings(), lease, holder=str(task.request.id)) as held:
            return for_work(work, held)

    try:
        return {"ok": True, **for_lease(once)}
    except SoftTimeLimitExceeded:
        error = f"it took longer than {limits.component:g} s (limits.component)"
    except BackupError as failure:
        error = str(failure)
    except Exception as failure:
        # The text of an error that is not ours may hold anything, so only its type goes into the record.
        log.exception("step %s failed", task.request.id)
        error = f"unexpected {type(failure).__name__}; the worker's log has the details"
    log.error("step %s failed: %s", task.request.id, error)
    return {"ok": False, "error": error}
