"""When beat sends what, built from the settings: ``celery -A beat_schedule beat``."""

from __future__ import annotations

from typing import Any

from tasks.schedule import cron_lines
from workers.app import app, or_exit
from workers.hosts import CONTROL, queue_of
from workers.sections import parse_cron
from workers.settings import Settings, get_settings


def build(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return beat's entries: each scheduled job by its name, and the watchdog."""
    entries: dict[str, dict[str, Any]] = {
        job: {
            "task": "tasks.schedule.start_scheduled",
            "schedule": parse_cron(line),
            "args": (job,),
            "options": {"queue": CONTROL, "shadow": f"scheduled {job}"},
        }
        for job, line in cron_lines(settings).items()
    }
    for name, component in settings.components.items():
        if component.watched:
            entries[f"look at {name}"] = {
                "task": "tasks.schedule.look_at",
                "schedule": settings.schedule.config_watch_seconds,
                "args": (name,),
                "options": {
                    "queue": queue_of(component.host),
                    "expires": settings.schedule.config_watch_seconds,
                    "shadow": f"look at {name}@{component.host}",
                },
            }
    seconds = settings.schedule.watchdog_seconds
    entries["watchdog"] = {
        "task": "tasks.watchdog.watch",
        "schedule": seconds,
        # One that nobody took in time is of no use: the next one looks at the same.
        "options": {"queue": CONTROL, "expires": seconds, "shadow": "watchdog"},
    }
    return entries


with or_exit():
    app.conf.beat_schedule = build(get_settings())
