"""FastAPI: the tenant of a request, and routes through which it sees and cancels its tasks.

Needs the extra ``fastapi``.
"""

# No "from __future__ import annotations" here: FastAPI evaluates annotations of nested functions, and as
# strings it would look for them among the module's globals.

import base64
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from datetime import datetime
from typing import Annotated, Any, Final

from celery import Celery
from celery.app.backends import by_url
from celery.local import Proxy
from typing_extensions import override

from .context import CurrentUser, TenantContext, tenant_scope
from .errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    MissingExtraError,
    NotConfiguredError,
    NotSupportedError,
)
from .postgres.records import TaskRecord
from .propagation import is_installed
from .states import TERMINAL, State
from .status import Cancellation, TaskNode, cancel_task, get_task, list_tasks, task_tree
from .streaming import END, Look, task_events

try:
    from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response, status
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import StreamingResponse
    from fastapi.routing import APIRoute
    from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
    from pydantic_core import to_jsonable_python
except ImportError as error:
    raise MissingExtraError.of("fastapi", "fastapi") from error

__all__ = [
    "TaskCancellation",
    "TaskError",
    "TaskPage",
    "TaskProgress",
    "TaskStatus",
    "TaskTree",
    "task_router",
    "tenant_dependency",
]

_log = logging.getLogger(__name__)

MAX_DEPTH_OF_RESULT: Final = 100
"""Levels of a result that are shown; together with those of a tree fewer than pydantic can write (255)."""

RETRY_AFTER: Final = 5
"""Seconds after which a client that is told that the database is away may ask again."""

TenantDependency = Callable[..., AsyncIterator[TenantContext]]


def tenant_dependency(get_current_user: Callable[..., Any]) -> TenantDependency:
    """A dependency that makes the request's user the active tenant while the route runs.

    ::

        get_tenant = tenant_dependency(get_current_user)

        @router.get("/projects")
        def projects(tenant: Annotated[TenantContext, Depends(get_tenant)]) -> list[Project]: ...

    Args:
        get_current_user: a dependency of the application's that returns anything with ``id`` and
            ``organization_id``, and raises its own HTTPException for a request it does not know.  If it returns
            None instead, that is a 401; a user who is in no organization (yet) gets a 403.
    """

    # An async generator: FastAPI runs a sync one in another context, where what it sets is lost.
    async def get_tenant(
        user: Annotated[CurrentUser, Depends(get_current_user)],
    ) -> AsyncIterator[TenantContext]:
        if user is None:
            raise HTTPException(status.HTTP_401_UNAUTHORIZED, "not authenticated")
        if getattr(user, "organization_id", "") is None:
            raise HTTPException(status.HTTP_403_FORBIDDEN, "you belong to no organization")
        with tenant_scope(user) as tenant:
            yield tenant

    # FastAPI would take a Protocol for a request body; the dependency alone says where the user comes from.
    get_tenant.__annotations__["user"] = Annotated[Any, Depends(get_current_user)]
    return get_tenant


class TaskError(BaseModel):
    """Why a task failed."""

    type: str = Field(description="The exception's class", examples=["ValueError"])
    message: str = Field(description="The exception's message")
    reason: str | None = Field(None, description="Why there is no other attempt; null while there is")


class TaskProgress(BaseModel):
    """How far a task says it is."""

    done: int
    total: int | None = Field(description="null if it is not known")
    message: str


class TaskStatus(BaseModel):
    """Where a task is, as its tenant may see it."""

    model_config = ConfigDict(from_attributes=True)

    task_id: str
    name: str | None = Field(description="The task's name, e.g. app.tasks.evaluation.evaluate_test")
    state: State
    result: Any = Field(None, description="What the task returned, once it succeeded, as far as JSON can say it")
    error: TaskError | None = Field(None, description="The last failure, of an attempt or final")
    progress: TaskProgress | None = Field(None, description="As the task reports it")
    retries: int = Field(description="Attempts after the first")
    organization_id: str
    user_id: str | None
    root_id: str | None = Field(description="The task that all of its run were launched by")
    parent_id: str | None = Field(description="The task that has launched it")
    abort_requested_at: datetime | None = Field(description="When somebody has cancelled it, or asked it to stop")
    abort_requested_by: str | None = Field(description="The user who did")
    eta: datetime | None = Field(description="Not to be run before")
    launched_at: datetime
    started_at: datetime | None = Field(description="When its first attempt was")
    last_started_at: datetime | None = Field(description="When its last attempt was")
    finished_at: datetime | None


class TaskPage(BaseModel):
    """Some tasks, the latest launch first."""

    items: list[TaskStatus]
    next: str | None = Field(description="The cursor of the next page; null on the last one")


class TaskTree(BaseModel):
    """A task and those that it has launched."""

    task: TaskStatus
    children: list["TaskTree"]


class TaskCancellation(BaseModel):
    """What cancelling a task has done."""

    outcome: Cancellation = Field(
        description="cancelled: it had not started, and never will.  asked: it runs, and was asked to stop.  "
        "terminated: besides, its worker was told to end it.  ended: it had ended before"
    )


Redact = Callable[[str], str]


def task_router(
    app: Celery,
    get_tenant: Callable[..., Any],
    *,
    redact: Redact | None = None,
    allow_terminate: bool = False,
) -> APIRouter:
    """Routes through which a tenant sees its own tasks, and cancels them.

    ======================  ============================================================================
    ``GET /``               a :class:`TaskPage`, filtered by state, name, root and time of launch
    ``GET /{id}``           a :class:`TaskStatus`
    ``GET /{id}/events``    the same each time it changes, as server-sent events, until the task has ended
    ``GET /{id}/tree``      the run that it belongs to, from its root: a :class:`TaskTree`
    ``POST /{id}/cancel``   a :class:`TaskCancellation`
    ======================  ============================================================================

    A foreign, unknown or expired id is the same 404.  While the database cannot be reached each of them is a 503, with
    a ``Retry-After``.

    Args:
        app: a configured Celery application whose result backend is PostgreSQL.
        get_tenant: a dependency that returns the TenantContext, such as :func:`tenant_dependency` makes.
        redact: what makes the text of an error fit to be seen by users; if it fails, they see none.
        allow_terminate: whether ``?terminate=true`` may have a worker end a task that runs.

    Raises:
        ConfigurationError: ``app`` is no Celery application.
        NotConfiguredError: it was not configured.
        NotSupportedError: its result backend keeps no records of tenants.  If it has none yet, when a route is called.
    """
    _require_records(app)
    router = APIRouter(tags=["tasks"], route_class=_Route, responses=_AWAY)
    Tenant = Annotated[TenantContext, Depends(get_tenant)]
    TaskId = Annotated[str, Path(max_length=255, description="As it was launched by")]
    unknown: dict[int | str, dict[str, Any]] = {
        status.HTTP_404_NOT_FOUND: {"description": "No such task of this tenant", "model": _Detail}
    }
    bad_cursor: dict[int | str, dict[str, Any]] = {
        status.HTTP_400_BAD_REQUEST: {"description": "No cursor of this list's", "model": _Detail}
    }
    forbidden: dict[int | str, dict[str, Any]] = {
        status.HTTP_403_FORBIDDEN: {"description": "Tasks cannot be terminated here", "model": _Detail}
    }

    def found(anything: Any) -> Any:
        if anything is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "no such task")
        return anything

    @router.get("/", responses=bad_cursor)
    def list_of_tasks(
        tenant: Tenant,
        state: Annotated[list[State] | None, Query(description="In one of these states")] = None,
        name: Annotated[str | None, Query(max_length=255, description="With this name")] = None,
        root_id: Annotated[str | None, Query(max_length=255, description="Of this run")] = None,
        launched_from: Annotated[AwareDatetime | None, Query(description="Launched then or later")] = None,
        launched_before: Annotated[AwareDatetime | None, Query(description="Launched before")] = None,
        limit: Annotated[int, Query(ge=1, le=200, description="Not more than this many")] = 50,
        cursor: Annotated[str | None, Query(description="next of the page before")] = None,
    ) -> TaskPage:
        """Tasks of the tenant, the latest launch first."""
        after = None
        if cursor is not None:
            try:
                after = _position(cursor)
            except ValueError:
                raise HTTPException(status.HTTP_400_BAD_REQUEST, "no cursor of this list") from None
        with tenant_scope(tenant):
            records = list_tasks(
                app,
                states=state,
                name=name,
                root_id=root_id,
                launched_from=launched_from,
                launched_before=launched_before,
                limit=limit + 1,
                after=after,
            )
        shown = records[:limit]
        return TaskPage(
            items=[_status(record, redact) for record in shown],
            next=_cursor(shown[-1]) if len(records) > limit else None,
        )

    @router.get("/{task_id}", responses=unknown)
    def task_status(task_id: TaskId, tenant: Tenant) -> TaskStatus:
        """Where a task is."""
        with tenant_scope(tenant):
            return _status(found(get_task(app, task_id)), redact)

    @router.get("/{task_id}/events", response_class=_EventStream, responses=_EVENTS)
    def events_of_task(
        request: Request,
        task_id: TaskId,
        tenant: Tenant,
        last_event_id: Annotated[str | None, Header(description="As an EventSource sends it")] = None,
    ) -> Response:
        """Where a task is, now and each time that changes, until it has ended: server-sent events.

        The data of each is a TaskStatus.  The last one is called `end`, the others `status`.
        """

        # The scope is for the look alone: one that is open while the stream waits would be lost between two steps.
        def look() -> Look | None:
            with tenant_scope(tenant):
                record = get_task(app, task_id)
            if record is None:
                return None
            return Look(_status(record, redact).model_dump_json(), record.state in TERMINAL)

        first: Look = found(look())
        if first.has_ended and last_event_id == END:
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        events = task_events(first, lambda: run_in_threadpool(look), request.is_disconnected)
        return _EventStream(events, headers=_AT_ONCE)

    @router.get("/{task_id}/tree", responses=unknown)
    def tree_of_task(task_id: TaskId, tenant: Tenant) -> TaskTree:
        """The run that a task belongs to: what was launched by what, and where it is."""
        with tenant_scope(tenant):
            return _tree(found(task_tree(app, task_id)), redact)

    @router.post("/{task_id}/cancel", responses={**unknown, **forbidden})
    def cancel(
        task_id: TaskId,
        tenant: Tenant,
        terminate: Annotated[bool, Query(description="Have the worker end it, if it runs")] = False,
    ) -> TaskCancellation:
        """Cancel a task that waits, or ask one that runs to stop."""
        if terminate and not allow_terminate:
            raise HTTPException(status.HTTP_403_FORBIDDEN, "tasks cannot be terminated here")
        with tenant_scope(tenant):
            return TaskCancellation(outcome=found(cancel_task(app, task_id, terminate=terminate)))

    return router


def _require_records(app: Celery) -> None:
    """Refuse an application that all routes would fail with, as far as that is known without its database."""
    if isinstance(app, Proxy):
        app = app._get_current_object()
    if not isinstance(app, Celery):
        raise ConfigurationError(
            f"task_router takes the Celery application, not {type(app).__name__}.  Call task_router(app, get_tenant)"
        )
    if not is_installed(app):
        raise NotConfiguredError(
            f"application {app.main!r} is not configured.  Call configure(app, ...) before task_router(app, ...)"
        )
    named: Any = app.backend_cls or app.conf.result_backend
    if not named:
        return
    found: Any = by_url(named, app.loader)  # a class and its URL, though the stubs know the class only
    backend = found[0]
    if not hasattr(backend, "get_record"):
        raise NotSupportedError(
            f"the result backend {backend.__name__} keeps no records of tenants, so no task can be shown or cancelled "
            "for one of them only.  Use result_backend='postgresql://...'"
        )


class _Route(APIRoute):
    """Answers that the database is away, where it is, instead of failing."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except DatabaseUnavailableError as error:
                _log.warning("%s %s cannot be answered: %s", request.method, self.path, error)
                raise HTTPException(
                    status.HTTP_503_SERVICE_UNAVAILABLE,
                    "the database cannot be reached",
                    headers={"Retry-After": str(RETRY_AFTER)},
                ) from error

        return answer


class _Detail(BaseModel):
    detail: str


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"


# nginx would collect events before it passes them on.
_AT_ONCE: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/_Detail"}}}

_AWAY: Final[dict[int | str, dict[str, Any]]] = {
    status.HTTP_503_SERVICE_UNAVAILABLE: {
        "description": "The database cannot be reached",
        "headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}},
        "content": _ERROR,
    }
}

# Of another media type than its errors, so FastAPI cannot make it from models.
_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    status.HTTP_200_OK: {
        "description": "A status now and for each change",
        "content": {
            _EventStream.media_type: {
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "event": {"type": "string", "enum": ["status", END]},
                        "id": {"type": "string"},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"$ref": "#/components/schemas/TaskStatus"},
                        },
                    },
                    "required": ["event", "data"],
                }
            }
        },
    },
    status.HTTP_204_NO_CONTENT: {"description": "Nothing comes after the last event, whose id was sent"},
    status.HTTP_404_NOT_FOUND: {
        "description": "No such task of this tenant",
        "content": _ERROR,
    },
}


def _status(record: TaskRecord, redact: Redact | None) -> TaskStatus:
    values = {name: getattr(record, name) for name in TaskStatus.model_fields if hasattr(record, name)}
    values["result"] = _shown(record.result)
    if record.error_type:
        values["error"] = TaskError(
            type=record.error_type,
            message=_redacted(record.error_message or "", redact),
            reason=record.failure_reason,
        )
    if record.progress_done is not None:
        values["progress"] = TaskProgress(
            done=record.progress_done, total=record.progress_total, message=record.progress_message or ""
        )
    return TaskStatus(**values)


def _redacted(text: str, redact: Redact | None) -> str:
    if redact is None:
        return text
    try:
        shown = redact(text)
        if not isinstance(shown, str):
            raise TypeError(f"redact= returned {type(shown).__name__}, not str")
    except Exception:
        _log.exception("redact= failed; the error's text is left out")
        return ""
    return _encodable(shown)


def _shown(value: Any, depth: int = 0) -> Any:
    """A result as JSON and UTF-8 can say it: one that they cannot must not take the others of its list along."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth == MAX_DEPTH_OF_RESULT:
        return "..."
    if isinstance(value, Mapping):
        return {_encodable(str(key)): _shown(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(each, depth + 1) for each in value]
    return _shown(to_jsonable_python(value, bytes_mode="base64", serialize_unknown=True), depth + 1)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are written out


def _tree(node: TaskNode, redact: Redact | None) -> TaskTree:
    return TaskTree(task=_status(node.record, redact), children=[_tree(child, redact) for child in node.children])


def _cursor(record: TaskRecord) -> str:
    place = f"{record.launched_at.isoformat()} {record.task_id}"
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def _position(cursor: str) -> tuple[datetime, str]:
    """The place that a cursor stands for.

    Raises:
        ValueError: it stands for none.
    """
    place = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    launched_at, _, task_id = place.partition(" ")
    position = datetime.fromisoformat(launched_at)
    if not task_id or "\0" in task_id or position.tzinfo is None:
        raise ValueError(cursor)
    return position, task_id
