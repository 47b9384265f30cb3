"""FastAPI: the tenant of a request, and a status route that knows it.

Needs the extra ``fastapi``.
"""

# No "from __future__ import annotations" here: FastAPI evaluates annotations of nested functions, and as
# strings it would look for them among the module's globals.

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from .context import CurrentUser, TenantContext, tenant_scope
from .errors import MissingExtraError, NotSupportedError

try:
    from fastapi import APIRouter, Depends, HTTPException, Path, status
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    raise MissingExtraError.of("fastapi", "fastapi") from error

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["TaskError", "TaskStatus", "task_router", "tenant_dependency"]

TenantDependency = Callable[..., AsyncIterator[TenantContext]]


def tenant_dependency(get_current_user: Callable[..., Any]) -> TenantDependency:
    """A dependency that makes the request's user the active tenant while the route runs.

    ::

        get_tenant = tenant_dependency(get_current_user)

        @router.get("/projects")
        def projects(tenant: Annotated[TenantContext, Depends(get_tenant)]) -> list[Project]: ...

    Args:
        get_current_user: a dependency of the application's that returns anything with ``id`` and
            ``organization_id``, and raises its own HTTPException for a request it does not know.
    """

    # An async generator: FastAPI runs a sync one in another context, where what it sets is lost.
    async def get_tenant(
        user: Annotated[CurrentUser, Depends(get_current_user)],
    ) -> AsyncIterator[TenantContext]:
        with tenant_scope(user) as tenant:
            yield tenant

    # FastAPI would take a Protocol for a request body; the dependency alone says where the user comes from.
    get_tenant.__annotations__["user"] = Annotated[Any, Depends(get_current_user)]
    return get_tenant


class TaskError(BaseModel):
    """Why a task failed."""

    type: str = Field(description="The exception's class", examples=["ValueError"])
    message: str = Field(description="The exception's message")


class TaskStatus(BaseModel):
    """Where a task is, as its tenant may see it."""

    model_config = ConfigDict(from_attributes=True)

    task_id: str
    name: str | None = Field(description="The task's name, e.g. app.tasks.evaluation.evaluate_test")
    state: str = Field(description="queued, started, retry, success, failure or revoked")
    result: Any = Field(None, description="What the task returned, once it succeeded")
    error: TaskError | None = Field(None, description="The last failure, of an attempt or final")
    retries: int = Field(description="Attempts after the first")
    organization_id: str
    user_id: str | None
    launched_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


def task_router(app: "Celery", get_tenant: Callable[..., Any]) -> APIRouter:
    """Routes through which a tenant sees its own tasks.

    ``GET /{task_id}``: a :class:`TaskStatus`; a foreign, unknown or expired id is the same 404.

    Args:
        app: a configured Celery application whose result backend is PostgreSQL.
        get_tenant: a dependency that returns the TenantContext, such as :func:`tenant_dependency` makes.

    Raises:
        NotSupportedError: when a route is called, if the result backend keeps no records of tenants.
    """
    router = APIRouter(tags=["tasks"])

    @router.get("/{task_id}", responses={status.HTTP_404_NOT_FOUND: {"description": "No such task of this tenant"}})
    def task_status(
        task_id: Annotated[str, Path(max_length=255)],
        tenant: Annotated[TenantContext, Depends(get_tenant)],
    ) -> TaskStatus:
        """Where a task is."""
        backend: Any = app.backend
        if not hasattr(backend, "get_record"):
            raise NotSupportedError(
                f"the result backend {backend.as_uri()} keeps no records of tenants, so no task can be shown without "
                "showing it to everybody.  Use result_backend='postgresql://...'"
            )
        with tenant_scope(tenant):
            # PostgreSQL cannot store a NUL, so no task has it in its id.
            record = None if "\0" in task_id else backend.get_record(task_id)
        if record is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "no such task")
        error = TaskError(type=record.error_type, message=record.error_message or "") if record.error_type else None
        return TaskStatus(
            **{name: getattr(record, name) for name in TaskStatus.model_fields if name != "error"},
            error=error,
        )

    return router
