"""What differs between two backups of the configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence

from workers import catalog
from workers.component import Part
from workers.errors import ObjectNotFound, Permanent


def show_diff(component: str, names: Sequence[str], *, as_json: bool) -> None:
    """Print what differs in ``component`` from the first named archive to the second, without a value of it."""
    from tasks import archive
    from tasks.components.config_diff import diff, read_versions
    from workers.settings import get_settings
    from workers.storage import open_store

    store = open_store(get_settings().store)
    versions, keys = [], []
    for name in names:
        key = archive.resolve(store, named(component, name))
        parts = [part for part in archive.read_metadata(store, key).parts if part.component == component]
        if len(parts) != 1 or parts[0].kind != "config":
            raise Permanent(f"{key} holds no configuration of the component {component}")
        versions.append(read_versions(archive.read_part(store, key, parts[0])))
        keys.append(key)
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
    newest: str | None = None
    for artifact in catalog.list_artifacts():
        for part in map(Part.model_validate, artifact.details["parts"]):
            if part.component != component or "content_sha256" not in part.holds:
                continue
            digest = part.holds["content_sha256"]
            if name == "latest" or (newest is not None and digest != newest):
                return artifact.key
            newest = newest or digest
    raise ObjectNotFound(
        f"there is no {name} archive of {component}" + (", that differs" if name == "previous" else "")
    )
