"""What the environment says.  Each process reads only the part that it needs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any
from uuid import UUID

__all__ = ["ApiSettings", "DatabaseSettings", "SettingsError", "User"]


class SettingsError(Exception):
    """An environment variable is missing or cannot be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class User:
    """Who calls the API.  rhesis-tasks takes anything with these two attributes for a user."""

    id: str
    organization_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """What the API, the workers and the loader need."""

    url: str = dataclasses.field(repr=False)  # it holds a password

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> DatabaseSettings:
        """Reads DATABASE_URL.

        Raises:
            SettingsError: it is not set.
        """
        return cls(_required(environ, "DATABASE_URL"))


@dataclasses.dataclass(frozen=True, slots=True)
class ApiSettings:
    """What only the API needs."""

    users: Mapping[str, User] = dataclasses.field(repr=False)  # by token

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> ApiSettings:
        """Reads API_TOKENS, a JSON object: ``{token: {"user_id": ..., "organization_id": ...}}``.

        Raises:
            SettingsError: it is not set, or not such an object.
        """
        try:
            tokens = json.loads(_required(environ, "API_TOKENS"))
        except ValueError as error:
            raise SettingsError(f"API_TOKENS is not JSON: {error}") from None
        if not isinstance(tokens, dict) or not tokens or "" in tokens:
            raise SettingsError("API_TOKENS must be a JSON object with at least one token, none of them empty")
        return cls({token: _user(number, owner) for number, (token, owner) in enumerate(tokens.items(), 1)})


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise SettingsError(f"the environment variable {name} is not set; see .env.example")
    return value


def _user(number: int, owner: Any) -> User:
    token = f"token {number} in API_TOKENS"  # tokens are secrets, so that errors count them
    match owner:
        case {"user_id": str(user_id), "organization_id": str(organization_id)} if user_id:
            try:
                return User(user_id, str(UUID(organization_id)))
            except ValueError:
                raise SettingsError(f"the organization_id of {token} is not a UUID") from None
    raise SettingsError(f'{token} needs {{"user_id": "...", "organization_id": "<uuid>"}}')
