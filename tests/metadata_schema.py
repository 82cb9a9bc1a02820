"""The JSON Schema of metadata.json: ``python -m tests.metadata_schema > docs/metadata.schema.json``."""

from __future__ import annotations

import json
from typing import Any

from tasks.archive import FORMAT_VERSION, Metadata


def metadata_schema() -> dict[str, Any]:
    """Return the schema of the models, with what is promised beyond their types."""
    models = Metadata.model_json_schema(mode="serialization")
    models["properties"]["components"]["additionalProperties"]["pattern"] = "^[0-9]+ files$"
    version = models["properties"]["format_version"]
    version.pop("default")
    version["const"] = FORMAT_VERSION
    part = models["$defs"]["Part"]["properties"]
    for name in ("sha256", "plain_sha256"):
        part[name]["pattern"] = "^[0-9a-f]{64}$"
    for name in ("size", "plain_size"):
        part[name]["minimum"] = 0
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **models,
        "title": "metadata.json of an archive",
    }


if __name__ == "__main__":
    print(json.dumps(metadata_schema(), indent=2, ensure_ascii=False))
