"""Context into messages, and out of them again.

Publishing: every message of an installed application passes through its ``send_task``, so the header is put
in there.  (``before_task_publish`` does not say which application publishes, and swallows exceptions.)
Running: ``task_prerun`` sets the context, ``task_postrun`` brings back what was there; both in the thread
that runs the body.  Signals only carry: nothing here refuses work.  That is done by
:class:`~rhesis_tasks.BaseTask`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from celery.signals import task_postrun, task_prerun
from kombu.utils.uuid import uuid

from .context import Activation, TenantContext, tenant_scope
from .errors import HeaderError
from .headers import HEADER, Envelope, capture, carried_by, decode, encode, find

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context, Task

__all__ = [
    "carried_header",
    "envelope_of",
    "install",
    "installed_apps",
    "is_installed",
    "outgoing_envelope",
    "renew",
    "require_restored",
    "restore",
    "uninstall",
    "with_context",
]

_apps: weakref.WeakSet[Celery] = weakref.WeakSet()
_UID = "rhesis_tasks.propagation"
# Attributes of a request: what to undo after it, and why its context could not be restored.
_ACTIVATION = "rhesis_tasks_activation"
_REFUSAL = "rhesis_tasks_refusal"


def install(app: Celery) -> None:
    """Let every message of ``app`` carry the context; calling it again changes nothing."""
    if app in _apps:
        return
    send_task = app.send_task

    @functools.wraps(send_task)
    def send_task_with_context(name: str, *args: Any, **options: Any) -> Any:
        headers = options.get("headers")
        if "task_type" not in options:  # with it, a task of ours is publishing itself, and has checked
            check_launch = getattr(app.tasks.get(name), "check_launch", None)
            if check_launch is not None:
                check_launch(headers)
        envelope = outgoing_envelope(headers)
        options["headers"] = with_context(headers, envelope)
        # A message bound to another tenant (a part of a canvas, a retry) is recorded as that tenant's.
        scope = nullcontext() if envelope.tenant is None else tenant_scope(envelope.tenant)
        with scope, _recorded(app, name, options):
            return send_task(name, *args, **options)

    # On the instance, so that other applications in the process are untouched.
    app.send_task = send_task_with_context  # type: ignore[method-assign]
    task_prerun.connect(_enter, weak=False, dispatch_uid=f"{_UID}.enter")
    task_postrun.connect(_leave, weak=False, dispatch_uid=f"{_UID}.leave")
    _apps.add(app)


def uninstall(app: Celery) -> None:
    """Undo :func:`install`."""
    if app in _apps:
        del app.send_task
        _apps.discard(app)
    if not _apps:
        task_prerun.disconnect(dispatch_uid=f"{_UID}.enter")
        task_postrun.disconnect(dispatch_uid=f"{_UID}.leave")


def is_installed(app: Celery) -> bool:
    """Whether messages of this application carry the context."""
    return app in _apps


def installed_apps() -> list[Celery]:
    """The applications whose messages carry the context."""
    return list(_apps)


# --- publishing ----------------------------------------------------------------------------------------------


def outgoing_envelope(headers: Mapping[str, Any] | None) -> Envelope:
    """What a message about to be published will carry: its own header if it has one, else the running context.

    Raises:
        HeaderError: it has a header that cannot be read.
    """
    own = find(headers)
    return capture() if own is None else decode(own)


def with_context(headers: Mapping[str, Any] | None, envelope: Envelope) -> dict[str, Any]:
    """A copy of a message's headers that carries the envelope.

    A copy, since callers reuse their dicts: a mutated one would take one tenant along into the next publish.
    """
    return {**(headers or {}), HEADER: encode(envelope)}


@contextmanager
def _recorded(app: Celery, name: str, options: dict[str, Any]) -> Iterator[None]:
    """A record of the launch, if the result backend keeps such; taken back if the message is not published."""
    backend: Any = app.backend
    # A retry has its record, and writes its own state.
    if options.get("ignore_result") or options.get("retries") or not hasattr(backend, "record_launch"):
        yield
        return
    task_id = options["task_id"] = options.get("task_id") or uuid()
    parent = app.current_worker_task
    is_new = backend.record_launch(
        task_id,
        name,
        root_id=options.get("root_id") or (parent and (parent.request.root_id or parent.request.id)),
        parent_id=options.get("parent_id") or (parent and parent.request.id),
    )
    try:
        yield
    except BaseException:
        if is_new:
            backend.discard_launch(task_id)
        raise


# --- running -------------------------------------------------------------------------------------------------


def envelope_of(request: Context) -> Envelope | None:
    """What the message behind a task request carried; None if it had no header.

    Raises:
        HeaderError: its header cannot be read.
    """
    value = carried_by(request)
    return None if value is None else decode(value)


def carried_header(request: Context) -> dict[str, Any]:
    """The header that a task's message carried, to be published again; empty if it had none."""
    value = carried_by(request)
    return {} if value is None else {HEADER: value}


def require_restored(request: Context) -> None:
    """Check that the context which the message carried is the running one.

    Raises:
        HeaderError: it could not be read, so that nothing may be done in its name.
    """
    refusal = vars(request).get(_REFUSAL)
    if refusal is not None:
        raise refusal


def renew(request: Context) -> None:
    """Set the context as it was when the body began."""
    activation = vars(request).get(_ACTIVATION)
    if activation is not None:
        activation.renew()


def restore(request: Context, tenant: TenantContext | None, envelope: Envelope) -> Activation:
    """Set the context that a request carried, and name the tenant on the request as applications read it."""
    activation = Activation(tenant, envelope.variables)
    vars(request).update(
        organization_id=tenant.organization_id if tenant else None, user_id=tenant.user_id if tenant else None
    )
    return activation


def _enter(sender: Task[Any, Any], **_: Any) -> None:
    """task_prerun: the context of the message becomes the running one."""
    if sender.app not in _apps:
        return
    request = sender.request
    try:
        envelope = envelope_of(request) or Envelope()
        activation = restore(request, envelope.tenant, envelope)
    except HeaderError as error:
        # BaseTask refuses the work; until then nothing of whatever ran here before may show.
        vars(request)[_REFUSAL] = error
        activation = restore(request, None, Envelope())
    vars(request)[_ACTIVATION] = activation


def _leave(sender: Task[Any, Any], **_: Any) -> None:
    """task_postrun: what was there before comes back."""
    activation = vars(sender.request).pop(_ACTIVATION, None)
    if activation is not None:
        activation.undo()
