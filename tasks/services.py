"""Services around a restore: stopped, started, asked for their health, on their own host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Task

from tasks.step import perform
from workers.app import app
from workers.errors import BackupError, ComparisonError, Permanent
from workers.health import wait_until_healthy
from workers.locks import Lease
from workers.runtime import open_service
from workers.sections import ServiceSettings
from workers.settings import Settings, get_settings


@app.task(bind=True, name="tasks.services.control_services")
def control_services(self: Task[Any, Any], run_id: str, names: Sequence[str], action: str) -> dict[str, Any]:
    """``stop``, ``start`` or check the ``health`` of services of one host, in the order given.

    ``look`` asks each once and returns the names of those that are ``ill``.
    """
    settings = get_settings()
    services = {service.name: service for service in settings.services}

    def work(_lease: Lease) -> dict[str, Any]:
        if action == "look":
            return {"ill": [name for name in names if _is_ill(services[name])]}
        for name in names:
            _control(services[name], action, settings)
        return {}

    return perform(self, f"services-{run_id}-{'-'.join(names)}", work)


def _control(service: ServiceSettings, action: str, settings: Settings) -> None:
    try:
        if action == "health":
            if service.health:
                wait_until_healthy(str(service.health), seconds=settings.limits.health)
        elif action == "stop":
            open_service(service).stop()
        else:
            open_service(service).start()
    except BackupError as error:
        kind = ComparisonError if action == "health" else Permanent
        raise kind(f"service {service.name}: {error}") from error


def _is_ill(service: ServiceSettings) -> bool:
    try:
        if service.health:
            wait_until_healthy(str(service.health), seconds=0)
    except ComparisonError:
        return True
    return False
