"""Launching work for a user: from a route, a script, or another task."""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from celery import Celery, Task
from celery.app.amqp import AMQP
from celery.canvas import Signature, maybe_signature
from celery.local import Proxy
from kombu import Producer
from kombu.utils.uuid import uuid

from .canvas import COMPOSITES, Part, bound, bound_options, last_task, parts
from .context import CurrentUser, TenantContext, current_tenant, resolve_tenant, same_tenant, tenant_scope
from .errors import NotConfiguredError, NotSupportedError, TaskArgumentsError, TenantConflictError
from .headers import HEADER
from .propagation import carrier, due, installed_apps, is_installed, outgoing_envelope, recorded
from .task import BaseTask

if TYPE_CHECKING:
    from celery.result import AsyncResult

__all__ = [
    "alaunch_with_context",
    "check_arguments",
    "configured_app",
    "ignores_result",
    "launch",
    "launch_with_context",
    "misspelt_option",
]

_OURS: Final = ("current_user", "context", "session", "idempotency_key", "options")
# Of a message, beyond what Celery and kombu have as parameters: AMQP's properties, and what Celery's sender takes.
_PROPERTIES: Final = frozenset({"app_id", "cluster_id", "correlation_id", "message_id", "timestamp", "type", "user_id"})
_OF_SENDER: Final = frozenset({"event_dispatcher", "exchange_type", "queue"})
_NOT_OPTIONS: Final = frozenset({"self", "body", "name", "args", "kwargs", "options", "properties"})
_ALIKE: Final = 0.8  # of difflib's ratio, from 0 up to 1


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
            one of ours; then launch ``task.s(...)``.  Or an option is called almost like one of Celery's.
        NotConfiguredError: the task's application was not configured.
    """
    target = _evaluated(task_or_signature)
    app = configured_app(target)
    if session is not None or idempotency_key is not None:
        raise NotSupportedError(
            "session= and idempotency_key= are reserved: they need a broker that takes part in the database "
            "transaction, which this one does not"
        )
    if options is not None and not isinstance(options, Mapping):
        raise TaskArgumentsError(
            f"options= is a mapping of Celery's options, such as {{'queue': 'slow'}}, not {options!r:.40}"
        )
    if options and (wrong := misspelt_option(options)):
        raise TaskArgumentsError(wrong)
    signature, args, kwargs = _signature_of(target, args, kwargs)
    tenant = resolve_tenant(context=context, current_user=current_user)
    return launch(app, signature, args, kwargs, tenant, options or {})


def launch(
    app: Celery,
    signature: Signature[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tenant: TenantContext | None,
    options: Mapping[str, Any],
) -> AsyncResult[Any]:
    """Launch a signature with further arguments, whatever they are called, for a tenant.

    Raises:
        MissingTenantError, TenantConflictError, TaskArgumentsError: as :func:`launch_with_context`.
    """
    with tenant_scope(tenant) if tenant else nullcontext():
        launch_options = dict(options)
        # The options of the launch replace those of the signature, headers included.
        whole = {**signature, "options": {**(signature.get("options") or {}), **launch_options}}
        _check_parts(app, whole, args, kwargs)
        headers = launch_options.pop("headers", None) or {}
        envelope = outgoing_envelope(headers)
        more = {key: value for key, value in headers.items() if key != HEADER}
        carry = carrier(envelope, more)
        launch_options |= bound_options(launch_options, carry, app)
        with _recorded(app, signature, launch_options):
            return bound(signature, carry, app).apply_async(args, kwargs, **launch_options)


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


def misspelt_option(options: Mapping[str, Any]) -> str | None:
    """What to say about an option that is none of Celery's, and called almost like one; None if there is none.

    Others are left alone: Celery hands what it does not know to routers and brokers, and stamps may have any name.
    """
    known = _celerys_options()
    for name in sorted(set(options) - known - set(options.get("stamped_headers") or ())):
        if alike := difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE):
            return f"Celery has no option {name!r}: did you mean {alike[0]}?"
    return None


@functools.cache
def _celerys_options() -> frozenset[str]:
    """Whatever Celery and kombu take to publish a task."""
    publishing: tuple[Any, ...] = (Task.apply_async, Celery.send_task, AMQP.as_task_v2, Producer.publish)
    names = {name for each in publishing for name in inspect.signature(each).parameters}
    return frozenset(names | _PROPERTIES | _OF_SENDER) - _NOT_OPTIONS


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


def configured_app(target: Any) -> Celery:
    """The application of a task or signature.  One that was stored as JSON does not know its own.

    Raises:
        NotConfiguredError: it was not configured.
    """
    app: Celery = target.app
    if isinstance(app, Proxy):
        app = app._get_current_object()
    if not is_installed(app) and getattr(target, "_app", None) is None:
        configured = installed_apps()
        if len(configured) == 1:
            return configured[0]
    if not is_installed(app):
        raise NotConfiguredError(
            f"application {app.main!r} is not configured.  Call rhesis_tasks.configure(app, ...) right after "
            "Celery(...)"
        )
    return app


def _signature_of(
    target: Task[Any, Any] | Signature[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Signature[Any], tuple[Any, ...], dict[str, Any]]:
    """What is launched as a signature, and the arguments that are still to be given to it."""
    if isinstance(target, Task):
        clash = sorted(set(_OURS) & set(inspect.signature(target.run).parameters))
        if clash:
            raise TaskArgumentsError(
                f"task {target.name} has a parameter named like one of launch_with_context's own: "
                f"{', '.join(clash)}.  Launch a signature instead: launch_with_context(task.s(...), ...)"
            )
        signature = target.signature(args, kwargs)
        _check_arguments(target, Part(signature, 0))
        return signature, (), {}
    if target.get("subtask_type") == "chain" and not target["kwargs"]["tasks"]:
        raise TaskArgumentsError("an empty chain has nothing to launch")
    return target, args, kwargs


def _check_parts(app: Celery, signature: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse the whole, as launched with these further arguments, before any part is published."""
    launcher = current_tenant()
    for part in _parts_as_launched(signature, args, kwargs):
        name = part.signature["task"]
        headers = (part.signature.get("options") or {}).get("headers")
        task = app.tasks.get(name)
        named = outgoing_envelope(headers, task, part.signature.get("kwargs")).tenant
        if launcher is not None and named is not None and not same_tenant(launcher, named):
            raise TenantConflictError(
                f"{name} is bound to {named} by its headers or arguments, but is launched for {launcher}.  Launch what "
                "belongs to different tenants separately",
                first=named,
                second=launcher,
            )
        if isinstance(task, BaseTask):
            task.check_launch(named)
        _check_arguments(task, part)


def check_arguments(
    signature: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tasks: Mapping[str, Task[Any, Any]],
) -> None:
    """Raise TaskArgumentsError if those of a part do not fit its task.

    Args:
        args: with which the whole is to be launched, besides its own; so ``kwargs``.
        tasks: those that are known; parts of others are left alone.
    """
    for part in _parts_as_launched(signature, args, kwargs):
        _check_arguments(tasks.get(part.signature["task"]), part)


def _parts_as_launched(
    signature: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Part]:
    given: int | None = len(args)
    if kwargs and signature.get("subtask_type") in COMPOSITES:
        given = None  # Celery alone knows which parts get them
    elif kwargs and not signature.get("immutable"):
        signature = {**signature, "kwargs": {**signature["kwargs"], **kwargs}}
    return parts(signature, given)


def _check_arguments(task: Task[Any, Any] | None, part: Part) -> None:
    """Raise TaskArgumentsError if a part's arguments do not fit its task."""
    check = getattr(task, "__header__", None)
    if task is None or not task.typing or check is None:
        return
    if part.given is None or part.signature.get("subtask_type") in COMPOSITES:
        return
    before = () if part.signature.get("immutable") else (None,) * (part.given or 0)
    args, kwargs = part.signature.get("args") or (), part.signature.get("kwargs") or {}
    try:
        check(*before, *args, **kwargs)
    except TypeError as error:
        parameters = inspect.signature(task.run)
        hints = [f"{error}; task {task.name} is called as {task.name.rpartition('.')[2]}{parameters}"]
        if next(iter(parameters.parameters), "") == "self":
            hints.append("a task that takes self needs @app.task(bind=True)")
        if {"user", "tenant"} & set(kwargs):
            hints.append("who launches it is given as current_user= or context=")
        if options := [name for name in kwargs if name not in parameters.parameters and name in _celerys_options()]:
            given = ", ".join(f'"{name}": {_shown(kwargs[name])}' for name in options)
            hints.append(f"what is an option of Celery's is given as options={{{given}}}")
        raise TaskArgumentsError(".  ".join(hints)) from None


def _shown(value: Any) -> str:
    """A number, since other values may be long, or not to be told."""
    return repr(value) if isinstance(value, int | float) else "..."


def _recorded(app: Celery, signature: Mapping[str, Any], options: dict[str, Any]) -> AbstractContextManager[None]:
    """A record of the task whose id the caller gets, which in a chain or chord is published last."""
    last = last_task(signature)
    if last is None or signature.get("subtask_type") not in COMPOSITES:
        return nullcontext()  # there is none, or its record is made when it is published, right away
    task, conf = app.tasks.get(last["task"]), app.conf
    if conf.task_always_eager or options.get("ignore_result") or ignores_result(last, task, conf.task_ignore_result):
        return nullcontext()  # nobody would say how it has ended
    options["task_id"] = options.get("task_id") or uuid()
    whole = {**(signature.get("options") or {}), **options}
    return recorded(app, options["task_id"], last["task"], eta=due(whole.get("countdown"), whole.get("eta")))


def ignores_result(signature: Mapping[str, Any], task: Task[Any, Any] | None, default: bool = False) -> bool:
    """Whether the signature of a task says, or its task does, that no result is stored.

    (With Celery 5.6 a signature cannot say otherwise than its task.)

    Args:
        default: what is meant if the task is not known.
    """
    by_task = default if task is None else task.ignore_result
    return bool((signature.get("options") or {}).get("ignore_result") or by_task)
