"""The Celery application: what workers run, and what the API launches tasks with."""

from __future__ import annotations

from celery import Celery

from app.database import DATABASE_URL, sessions
from rhesis_tasks import configure

__all__ = ["celery_app"]

celery_app = Celery("fastapi_app")
configure(celery_app, DATABASE_URL, sessions=sessions)
celery_app.autodiscover_tasks(["app"])  # imports app.tasks when a worker starts
