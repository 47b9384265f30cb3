"""What the environment says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

__all__ = ["Settings", "SettingsError"]


class SettingsError(Exception):
    """An environment variable is missing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What launchers and workers need."""

    database_url: str = dataclasses.field(repr=False)  # it holds a password
    provider_url: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Reads DATABASE_URL and PROVIDER_URL.

        Raises:
            SettingsError: one of them is not set.
        """
        return cls(_required(environ, "DATABASE_URL"), _required(environ, "PROVIDER_URL"))


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise SettingsError(f"the environment variable {name} is not set; see the README")
    return value
