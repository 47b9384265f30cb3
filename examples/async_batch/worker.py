"""The Celery application: what workers run, and what launchers launch with."""

from __future__ import annotations

import logging
from typing import Final

from celery import Celery

from async_batch.settings import Settings
from rhesis_tasks import configure

__all__ = ["SETTINGS", "celery_app"]

SETTINGS: Final = Settings.from_environment()

# PostgreSQL is broker, result backend and database.  A message is acknowledged when its task is done, which
# configure() sees to; so it comes back by itself when a worker dies.
celery_app = Celery("async_batch", include=["async_batch.tasks"])
# A process takes no second long task while it runs one: somebody else may be free.
configure(celery_app, SETTINGS.database_url, worker_prefetch_multiplier=1)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for each request
