"""Launching work for a user: from a route, a script, or another task."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from celery import Task
from celery.canvas import Signature, maybe_signature
from celery.local import Proxy
from kombu.utils.uuid import uuid

from .context import CurrentUser, TenantContext, current_tenant, resolve_tenant, same_tenant, tenant_scope
from .errors import NotConfiguredError, NotSupportedError, TaskArgumentsError, TenantConflictError
from .headers import HEADER, find
from .propagation import installed_apps, is_installed, outgoing_envelope, with_context
from .task import BaseTask

if TYPE_CHECKING:
    from celery import Celery
    from celery.result import AsyncResult

__all__ = ["alaunch_with_context", "launch_with_context"]

_OURS: Final = ("current_user", "context", "session", "idempotency_key", "options")


def launch_with_context(
    task_or_signature: Task[Any, Any] | Signature[Any],
    /,
    *args: Any,
    current_user: CurrentUser | None = None,
    context: TenantContext | None = None,
    session: Any = None,
    idempotency_key: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> AsyncResult[Any]:
    """Launch a task, a signature or a whole canvas for a tenant.

    The tenant is bound to every part at launch: a chord's body, links and error callbacks run as the launcher,
    whichever task published them.

    Args:
        task_or_signature: a task, or anything made of signatures: chain, group, chord.
        *args: positional arguments of the task; for a signature, prepended to its own as Celery does.
        current_user: who launches it: anything with ``id`` and ``organization_id``.
        context: the tenant itself, if there is no such object.  Without both, the active tenant.
        session: reserved; launching inside a database transaction needs the PostgreSQL broker.
        idempotency_key: reserved.
        options: Celery's own options: ``queue``, ``countdown`` (seconds), ``priority``, ``expires``, ...
        **kwargs: keyword arguments of the task.

    Returns:
        Celery's handle: an AsyncResult, or a GroupResult for a group.

    Raises:
        MissingTenantError: a part needs a tenant, and there is none.  Nothing was launched.
        TenantConflictError: the arguments name another tenant than the active one.
        InvalidTenantError: the user has no usable id or organization.
        TaskArgumentsError: (a TypeError) the arguments do not fit, or the task has a parameter named like
            one of ours; then launch ``task.s(...)``.
        NotConfiguredError: the task's application was not configured.
    """
    target = _evaluated(task_or_signature)
    app = _app_of(target)
    if not is_installed(app):
        raise NotConfiguredError(
            f"application {app.main!r} is not configured.  Call rhesis_tasks.configure(app, ...) right after "
            "Celery(...)"
        )
    if session is not None or idempotency_key is not None:
        raise NotSupportedError(
            "session= and idempotency_key= are reserved: they need a broker that takes part in the database "
            "transaction, which this one does not"
        )
    if isinstance(target, Task):
        _check_arguments(target, args, kwargs)
        signature = target.signature(args, kwargs)
        args, kwargs = (), {}
    else:
        signature = target
    tenant = resolve_tenant(context=context, current_user=current_user)
    with tenant_scope(tenant) if tenant else nullcontext():
        # The options of the launch replace those of the signature, headers included.
        _check_parts(app, {**signature, "options": {**signature["options"], **(options or {})}}, signature)
        launch_options = dict(options or {})
        headers = launch_options.pop("headers", None)
        # Celery would let the launch's headers replace those of the parts.
        headers = with_context(headers, outgoing_envelope(headers))
        bound = _bound(signature, headers, app)
        launch_options |= _bound_links(launch_options, headers, app)
        with _recorded_whole(app, signature, launch_options):
            return bound.apply_async(args, kwargs, **launch_options)


async def alaunch_with_context(
    task_or_signature: Task[Any, Any] | Signature[Any],
    /,
    *args: Any,
    current_user: CurrentUser | None = None,
    context: TenantContext | None = None,
    session: Any = None,
    idempotency_key: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> AsyncResult[Any]:
    """As :func:`launch_with_context`, in a thread, so that the event loop goes on meanwhile."""
    return await asyncio.to_thread(
        launch_with_context,
        task_or_signature,
        *args,
        current_user=current_user,
        context=context,
        session=session,
        idempotency_key=idempotency_key,
        options=options,
        **kwargs,
    )


def _evaluated(target: Any) -> Any:
    if isinstance(target, Proxy):
        target = target._get_current_object()  # @app.task makes a lazy task
    if isinstance(target, Task | Signature):
        return target
    if isinstance(target, Mapping) and "task" in target:
        return maybe_signature(target)
    raise TaskArgumentsError(
        f"launch_with_context takes a task or a signature, not {type(target).__name__}"
        + (".  Is the function decorated with @app.task?" if callable(target) else "")
    )


def _app_of(target: Any) -> Celery:
    """The application of a task or signature.  One that was stored as JSON does not know its own."""
    app: Celery = target.app
    if isinstance(app, Proxy):
        app = app._get_current_object()
    if not is_installed(app) and getattr(target, "_app", None) is None:
        configured = installed_apps()
        if len(configured) == 1:
            return configured[0]
    return app


def _check_arguments(task: Task[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parameters = inspect.signature(task.run).parameters
    clash = sorted(set(_OURS) & set(parameters))
    if clash:
        raise TaskArgumentsError(
            f"task {task.name} has a parameter named like one of launch_with_context's own: {', '.join(clash)}.  "
            "Launch a signature instead: launch_with_context(task.s(...), ...)"
        )
    check = getattr(task, "__header__", None)
    if task.typing and check is not None:
        try:
            check(*args, **kwargs)
        except TypeError as error:
            raise TaskArgumentsError(
                f"{error}; task {task.name} is called as {task.name.rpartition('.')[2]}{_shown(task)}"
            ) from None


def _shown(task: Task[Any, Any]) -> str:
    return str(inspect.signature(task.run))


# --- canvas ----------------------------------------------------------------------------------------------------


def _parts(signature: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A signature and all signatures in it, in the dict form that all of them have."""
    yield signature
    kwargs = signature.get("kwargs") or {}
    options = signature.get("options") or {}
    kind = signature.get("subtask_type")
    nested: list[Any] = []
    if kind in ("chain", "group"):
        nested += kwargs["tasks"]
    elif kind == "chord":
        header = kwargs["header"]
        nested += [header] if isinstance(header, Mapping) else list(header)
        nested.append(kwargs["body"])
    elif signature["task"] in ("celery.map", "celery.starmap", "celery.chunks"):
        nested.append(kwargs["task"])  # called inside Celery's own task
    nested += _links(options)
    for part in nested:
        if part is not None:
            yield from _parts(part)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _links(options: Mapping[str, Any]) -> list[Any]:
    return [*_listed(options.get("link")), *_listed(options.get("link_error"))]


def _check_parts(app: Celery, *signatures: Mapping[str, Any]) -> None:
    """Refuse the whole before any part is published."""
    launcher = current_tenant()
    for part in chain.from_iterable(map(_parts, signatures)):
        headers = (part.get("options") or {}).get("headers")
        bound = outgoing_envelope(headers).tenant
        if launcher is not None and bound is not None and not same_tenant(launcher, bound):
            raise TenantConflictError(
                f"{part['task']} is bound to {bound} by its headers, but is launched for {launcher}.  Launch what "
                "belongs to different tenants separately",
                first=bound,
                second=launcher,
            )
        task = app.tasks.get(part["task"])
        if isinstance(task, BaseTask):
            task.check_launch(headers)


def _bound(signature: Mapping[str, Any], headers: dict[str, Any], app: Celery) -> Signature[Any]:
    """A copy of a signature, every part of which carries the headers.  The caller's own is left as it is."""
    options = dict(signature.get("options") or {})
    options |= _bound_links(options, headers, app)
    kwargs = dict(signature.get("kwargs") or {})
    kind = signature.get("subtask_type")
    if kind in ("chain", "group"):
        kwargs["tasks"] = [_bound(part, headers, app) for part in kwargs["tasks"]]
    elif kind == "chord":
        parts = kwargs["header"]
        kwargs["header"] = (
            _bound(parts, headers, app)
            if isinstance(parts, Mapping)
            else [_bound(part, headers, app) for part in parts]
        )
        kwargs["body"] = _bound(kwargs["body"], headers, app) if kwargs["body"] is not None else None
    else:
        # Only tasks, since Celery lets the headers of a whole replace those of its parts.  One that is bound
        # already stays so.
        own = options.get("headers") or {}
        carried = headers if find(own) is None else {key: value for key, value in headers.items() if key != HEADER}
        options["headers"] = {**carried, **own}
    kind_of_signature = type(signature) if isinstance(signature, Signature) else Signature
    return kind_of_signature.from_dict({**signature, "kwargs": kwargs, "options": options}, app=app)


def _bound_links(options: Mapping[str, Any], headers: dict[str, Any], app: Celery) -> dict[str, Any]:
    """The links among a launch's or a signature's options, carrying the headers."""
    return {
        key: [_bound(part, headers, app) for part in _listed(options[key])]
        for key in ("link", "link_error")
        if options.get(key)
    }


@contextmanager
def _recorded_whole(app: Celery, signature: Mapping[str, Any], options: dict[str, Any]) -> Iterator[None]:
    """A record of the task whose id the caller gets, which in a chain or chord is published last.

    Taken back if the launch fails.
    """
    backend: Any = app.backend
    if signature.get("subtask_type") not in ("chain", "chord") or not hasattr(backend, "record_launch"):
        yield
        return
    last: Any = signature
    while last is not None and last.get("subtask_type") in ("chain", "chord"):
        last = last["kwargs"]["body"] if last["subtask_type"] == "chord" else last["kwargs"]["tasks"][-1]
    task_id = options["task_id"] = options.get("task_id") or uuid()
    is_new = backend.record_launch(task_id, last and last["task"])
    try:
        yield
    except BaseException:
        if is_new:
            backend.discard_launch(task_id)
        raise
