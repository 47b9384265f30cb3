"""Who is calling: bearer tokens, and the tenant that follows from them.

Replace :func:`get_current_user` by your own login; all that the rest needs is an ``id`` and an
``organization_id``.
"""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.settings import ApiSettings, User
from rhesis_tasks.fastapi import tenant_dependency

__all__ = ["CurrentUser", "get_current_user", "get_tenant"]

_users = ApiSettings.from_environment().users
_bearer = HTTPBearer(auto_error=False)


def get_current_user(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> User:
    """The user whose token the request carries; 401 if there is none."""
    given = credentials.credentials.encode() if credentials else b""
    found: User | None = None
    # All tokens are compared, each in constant time: how long it takes tells nothing about any of them.
    for token, user in _users.items():
        if hmac.compare_digest(token.encode(), given):
            found = user
    if found is None:
        raise HTTPException(401, "a valid bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
    return found


CurrentUser = Annotated[User, Depends(get_current_user)]

get_tenant = tenant_dependency(get_current_user)
