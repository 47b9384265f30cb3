"""Launching single tasks: one that recovers, one that fails, one that takes its time, one that needs no database."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from app.auth import CurrentUser, get_tenant
from app.tasks import broken, flaky, slow, word_count
from rhesis_tasks import launch_with_context

__all__ = ["router"]

router = APIRouter(prefix="/examples", tags=["examples"], dependencies=[Depends(get_tenant)])


class Launched(BaseModel):
    """A task is on its way; ``GET /tasks/{task_id}`` tells how it fares."""

    task_id: str


class Text(BaseModel):
    """A text to work on."""

    text: str = Field(max_length=10_000)


@router.post("/flaky", status_code=202)
def launch_flaky(user: CurrentUser) -> Launched:
    """A task whose first attempt fails."""
    return Launched(task_id=launch_with_context(flaky, current_user=user).id)


@router.post("/broken", status_code=202)
def launch_broken(user: CurrentUser) -> Launched:
    """A task that fails for good."""
    return Launched(task_id=launch_with_context(broken, current_user=user).id)


@router.post("/slow", status_code=202)
def launch_slow(user: CurrentUser, steps: Annotated[int, Query(ge=1, le=1000)] = 10) -> Launched:
    """A task of some seconds, which reports its progress and can be stopped."""
    return Launched(task_id=launch_with_context(slow, steps, current_user=user).id)


@router.post("/word-count", status_code=202)
def launch_word_count(user: CurrentUser, body: Text) -> Launched:
    """A task without a database."""
    return Launched(task_id=launch_with_context(word_count, body.text, current_user=user).id)
