"""Small JSON objects that carry a digest of themselves, so that a changed byte in one is never believed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from workers.errors import IntegrityError

SEAL = "record_sha256"
"""Key of a document's digest of all else in it."""


def seal(document: dict[str, Any]) -> bytes:
    """Return the document with its digest, as JSON; the inverse of `unseal`."""
    return json.dumps(document | {SEAL: _digest(document)}, indent=2).encode()


def unseal(text: bytes, key: str, *, unsealed: bool = False) -> dict[str, Any]:
    """Return the document that lies under ``key``. Raises ``IntegrityError`` when it is not what was written.

    One without a digest is taken as it is with ``unsealed``.
    """
    try:
        document = json.loads(text)
        sealed = document.pop(SEAL, None)
    except (ValueError, AttributeError, TypeError) as error:
        raise IntegrityError(f"the record {key} is damaged") from error
    if sealed != _digest(document) and not (unsealed and sealed is None):
        raise IntegrityError(f"the record {key} is damaged: its digest differs")
    return dict(document)


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
