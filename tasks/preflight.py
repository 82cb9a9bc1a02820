"""Looks, on each host, whether what the settings ask for can work. Nothing is changed, and no run is opened."""

from __future__ import annotations

from typing import Any

from workers.app import app
from workers.component import Finding
from workers.errors import BackupError
from workers.settings import get_settings
from workers.storage import preflight


@app.task(name="tasks.preflight.check_component")
def check_component(name: str) -> list[dict[str, Any]]:
    """Return what a component's host finds (`Finding`); an error that it meets is a finding, too."""
    try:
        found = get_settings().components[name].preflight()
    except BackupError as error:
        found = [Finding(what=str(error))]
    return [finding.model_dump(mode="json") for finding in found]


@app.task(name="tasks.preflight.check_store")
def check_store(table: str) -> list[dict[str, Any]]:
    """Return what this worker finds when it tries the store of a table of the settings, ``store`` or ``offsite``."""
    try:
        checks = preflight.check_store(get_settings().store_of(table))
    except BackupError as error:
        return [Finding(what=str(error)).model_dump(mode="json")]
    found = [Finding(what=f"{check.what}: {check.says}") for check in checks if not check.ok]
    return [finding.model_dump(mode="json") for finding in found]
