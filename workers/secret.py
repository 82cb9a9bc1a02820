"""Where a secret comes from. Secrets are never in the settings, only the names of their sources."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from workers.errors import SettingsError


class Strict(BaseModel):
    """Settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Secret(Strict):
    """Where a secret comes from: an environment variable or a file (a Docker secret). It is never in the settings."""

    env: str | None = None
    file: Path | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError('give either { env = "NAME" } or { file = "/run/secrets/name" }')
        return self

    def resolve(self) -> str:
        """Return the secret's value, for use on this host only. Raises ``SettingsError`` when it is missing."""
        if self.env is not None:
            if value := os.environ.get(self.env):
                return value
            raise SettingsError("secret", [f"the environment variable {self.env} is not set"])
        try:
            return Path(str(self.file)).read_text().rstrip("\n")
        except OSError as error:
            raise SettingsError("secret", [f"{self.file} cannot be read: {error.strerror}"]) from error
