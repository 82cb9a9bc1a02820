"""The Celery application: broker, queues, limits and events.

Every setting that is not Celery's default has its reason beside it; they were found by killing workers and brokers
in mid-task (docs/architecture.md).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.signals import celeryd_init
from kombu import Queue

from workers.errors import SettingsError
from workers.hosts import CONTROL, all_queues, hosts_of
from workers.settings import get_settings

WEEK = 7 * 86400
TASK_MODULES = (
    "tasks.backup",
    "tasks.archive",
    "tasks.imports",
    "tasks.offsite",
    "tasks.prune",
    "tasks.rebuild",
    "tasks.recover",
    "tasks.restore",
    "tasks.runs",
    "tasks.schedule",
    "tasks.services",
    "tasks.wal",
    "tasks.preflight",
    "tasks.verify",
    "tasks.watchdog",
)


def _configuration() -> dict[str, Any]:
    settings = get_settings()
    return {
        "broker_url": settings.broker.url,
        "result_backend": settings.broker.url,
        "broker_connection_retry_on_startup": True,
        # A message that is not acknowledged would be run a second time after this.
        "broker_transport_options": {"visibility_timeout": WEEK},
        "result_backend_transport_options": {"visibility_timeout": WEEK},
        # Acknowledge early and take one message at a time; the watchdog mends what dies.
        "task_acks_late": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        # A task that ends while the broker is away keeps its result and stores it later.
        "result_backend_always_retry": True,
        "result_expires": WEEK,
        "result_chord_expires": WEEK,
        "result_extended": False,
        "accept_content": ["json"],
        "task_track_started": True,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        # A wrong queue name is an error where it is used, not a message that waits for ever.
        "task_queues": [Queue(name) for name in all_queues(settings)],
        "task_create_missing_queues": False,
        "task_default_queue": CONTROL,
        "beat_sync_every": 1,
        "beat_schedule_filename": "beat-schedule",
        "timezone": "UTC",
        "worker_hijack_root_logger": True,
        "worker_redirect_stdouts": False,
    }


app = Celery("ai-micro-backup", include=TASK_MODULES)
app.add_defaults(_configuration)


@contextmanager
def or_exit() -> Iterator[None]:
    """Turn wrong settings into their text on stderr and exit status 2, for what the ``celery`` program loads."""
    try:
        yield
    except SettingsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


def app_of_program() -> Celery:
    """Return the application for the ``celery`` program, which reads it long before a worker starts.

    Wrong settings, or a missing secret of the broker, end the program with exit status 2; so do then those of the
    hosts whose queues its command line names.
    """
    with or_exit():
        settings = get_settings()
        if settings.missing_secrets(()):
            words = re.split(r"[,=\s]", " ".join(sys.argv))
            raise SettingsError("settings", settings.missing_secrets(hosts_of(words)))
    return app


@celeryd_init.connect
def check_before_start(options: dict[str, Any], **_: Any) -> None:
    """Refuse to start, with exit status 2, a worker whose settings or secrets are not right."""
    queues = options.get("queues") or []
    names = queues.split(",") if isinstance(queues, str) else list(queues)
    with or_exit():
        settings = get_settings()
        lines = settings.missing_secrets(hosts_of(names))
        lines += [f"hosts: there is no queue {name!r}" for name in names if name not in all_queues(settings)]
        if lines:
            raise SettingsError("settings", lines)
