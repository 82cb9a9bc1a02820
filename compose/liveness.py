"""What tells the container's health check that a worker lives: ``celery … worker --include compose.liveness``.

The worker's main loop sends a heartbeat every two seconds while it is connected to the broker; each one touches a
file. To ask the worker itself (``celery inspect ping``) would cost a second of CPU each time.
"""

from pathlib import Path
from typing import Any

from celery.signals import heartbeat_sent

ALIVE = Path("/run/worker-alive")


@heartbeat_sent.connect
def touch(**_: Any) -> None:
    """Say that the worker lives."""
    ALIVE.touch()
