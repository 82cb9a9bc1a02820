"""What differs between two backups of the configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence

from workers import catalog
from workers.errors import ObjectNotFound


def show_diff(component: str, names: Sequence[str], *, as_json: bool) -> None:
    """Print what differs in ``component`` from the first named archive to the second, without a value of it."""
    from tasks import archive
    from tasks.components.config_diff import diff
    from tasks.config_changes import versions_in
    from workers.settings import get_settings
    from workers.storage import open_store

    store = open_store(get_settings().store)
    keys = [archive.resolve(store, named(component, name)) for name in names]
    versions = [versions_in(store, key, component) for key in keys]
    lines = diff(*versions)
    if as_json:
        print(json.dumps({"component": component, "archives": keys, "differences": lines}))
        return
    print(f"{component}: {keys[0]} → {keys[1]}")
    print("\n".join(lines) or "no difference")


def named(component: str, name: str) -> str:
    """Return the archive that ``latest``, or ``previous`` (the newest that differs from it), means; else ``name``."""
    if name not in ("latest", "previous"):
        return name
    from tasks.config_changes import recorded

    newest: str | None = None
    for artifact in catalog.list_artifacts():
        digest = recorded(artifact, component).get("content_sha256")
        if digest and (name == "latest" or (newest is not None and digest != newest)):
            return artifact.key
        newest = newest or digest
    raise ObjectNotFound(
        f"there is no {name} archive of {component}" + (", that differs" if name == "previous" else "")
    )
