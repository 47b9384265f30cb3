"""The one database, as API and workers use it: sessions that belong to a tenant."""

from __future__ import annotations

from typing import Final

from app.settings import DatabaseSettings
from rhesis_tasks import TenantSessions

__all__ = ["DATABASE_URL", "sessions"]

DATABASE_URL: Final = DatabaseSettings.from_environment().url

# FastAPI runs up to 40 plain "def" routes at once, each with a connection of its own.
sessions = TenantSessions(DATABASE_URL, pool_size=10, max_overflow=30)
