"""The API."""

from __future__ import annotations

from fastapi import FastAPI

from app.auth import get_tenant
from app.routes import examples, runs
from app.worker import celery_app
from rhesis_tasks.fastapi import task_router

__all__ = ["app"]

app = FastAPI(title="A test bench for chat bots")
app.include_router(runs.router)
app.include_router(examples.router)
app.include_router(task_router(celery_app, get_tenant), prefix="/tasks")


@app.get("/health")
async def health() -> dict[str, str]:
    """The process answers.  It asks no database, so that a slow one does not get the API restarted."""
    return {"status": "ok"}
