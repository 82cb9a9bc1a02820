"""Settings of a test's own: a file, the environment variable that names it, and the process-wide copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers.settings import CONFIG_VARIABLE, Settings, get_settings

MINIMAL = """
hosts = ["db1", "app1"]

[system]
name = "shop"

[components.keys]
kind = "files"
host = "app1"
path = "/srv/keys"

[components.settings]
kind = "config"
host = "app1"
root = "/srv"
paths = ["app.toml"]
"""
"""Right, but for the store's folder. Tables may be appended."""


def write_settings(folder: Path, *, more: str = "", store: Path | None = None) -> Path:
    """Write ``folder``/backup.toml: the minimal settings with a store below ``folder``, and what ``more`` says."""
    path = folder / "backup.toml"
    path.write_text(f'{MINIMAL}\n[store]\npath = "{store or folder / "store"}"\n{more}')
    return path


@contextmanager
def configured(path: Path) -> Iterator[Settings]:
    """Let this process have the settings at ``path`` for the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CONFIG_VARIABLE, str(path))
        get_settings.cache_clear()
        try:
            yield get_settings()
        finally:
            get_settings.cache_clear()
