"""Context into messages, and out of them again.

Publishing: every message of an installed application passes through its ``send_task``, so the header is put
in there.  (``before_task_publish`` does not say which application publishes, and swallows exceptions.)
Running: ``task_prerun`` sets the context, ``task_postrun`` brings back what was there; both in the thread
that runs the body.  Signals only carry, since Celery swallows what they raise; work is refused by the tasks, which ask
here what was carried, and whether it was signed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from celery.signals import task_postrun, task_prerun, worker_init, worker_shutdown
from kombu.utils.uuid import uuid

from . import trust
from .canvas import Carry, bound_options, full_name
from .context import TenantContext, agreed, current_tenant, exactly, same_tenant, tenant_in
from .errors import ContextError, HeaderError, NotConfiguredError, SignatureError, TenantConflictError
from .headers import (
    HEADER,
    Envelope,
    RequestState,
    capture,
    carried_by,
    decode,
    encode,
    find,
    keep_state,
    state_of,
)
from .signing import Signer, is_signed
from .trust import UNLOCK
from .variables import Activation

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context, Task

__all__ = [
    "as_launched",
    "begin",
    "carried_header",
    "carrier",
    "install",
    "installed_apps",
    "is_installed",
    "outgoing_envelope",
    "outgoing_tenant",
    "recorded",
    "renew",
    "require_genuine",
    "restored",
    "uninstall",
    "with_context",
]

_apps: weakref.WeakKeyDictionary[Celery, Signer | None] = weakref.WeakKeyDictionary()
_UID = "rhesis_tasks.propagation"
_NOTHING = nullcontext()
_BOUND = ("link", "link_error", "chain", "chord")  # options of a launch that are signatures


def install(app: Celery, signer: Signer | None = None) -> None:
    """Let every message of ``app`` carry the context, signed if there is a signer; again it changes nothing."""
    if app in _apps:
        return
    # The instance's, if somebody has put one there.  Else the class's, looked up at each call: Sentry wraps that one,
    # maybe later than this.
    own = vars(app).get("send_task")

    @functools.cache
    def require_broker() -> None:
        if not app.conf.broker_url:
            raise NotConfiguredError(
                f"application {app.main!r} has no broker.  Set DATABASE_URL, or call configure(app, database_url) or "
                "configure(app, broker_url=...)"
            )

    @functools.wraps(app.send_task)
    def send_task_with_context(
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: Any = None,
        eta: Any = None,
        task_id: str | None = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        require_broker()
        headers = options.get("headers")
        task = options.get("task_type") or app.tasks.get(name)
        task_id = task_id or uuid()
        if signer is not None:
            require_genuine(app, headers, name, kwargs, task_id)
        envelope = outgoing_envelope(headers, task, kwargs)
        if (check := getattr(task, "check_launch", None)) is not None:
            check(envelope.tenant)
        if any(map(options.get, _BOUND)):
            # What is published after it, by a worker and from whatever context, is the launcher's, too: bound now.
            options |= bound_options(options, _carrier_of_launch(app, headers), app)
        if name == UNLOCK and args and len(args) > 1:  # the chord's body is among its arguments
            args = (args[0], bound_options({"chord": args[1]}, carrier(app, envelope), app)["chord"], *args[2:])
        options["headers"] = with_context(app, headers, envelope, name, kwargs, task_id)
        # A retry has its record, and writes its own state.
        keeps_record = not (options.get("ignore_result") or options.get("retries"))
        send_task = own or functools.partial(type(app).send_task, app)
        # A message bound to another tenant (a part of a canvas, a retry), or to none, is recorded as such.
        with (
            _NOTHING if envelope.tenant is current_tenant() else exactly(envelope.tenant),
            recorded(app, task_id, name, **_lineage(app, options)) if keeps_record and records(app) else _NOTHING,
        ):
            return send_task(name, args, kwargs, countdown, eta, task_id, *more, **options)

    # On the instance, so that other applications in the process are untouched.
    app.send_task = send_task_with_context  # type: ignore[method-assign]
    task_prerun.connect(_enter, weak=False, dispatch_uid=f"{_UID}.enter")
    task_postrun.connect(_leave, weak=False, dispatch_uid=f"{_UID}.leave")
    worker_init.connect(_begin_to_work, weak=False, dispatch_uid=f"{_UID}.begin")
    worker_shutdown.connect(_end_work, weak=False, dispatch_uid=f"{_UID}.end")
    _apps[app] = signer


def uninstall(app: Celery) -> None:
    """Undo :func:`install`."""
    if app in _apps:
        del app.send_task
        del _apps[app]
        trust.end_work(app)
    if not _apps:
        task_prerun.disconnect(dispatch_uid=f"{_UID}.enter")
        task_postrun.disconnect(dispatch_uid=f"{_UID}.leave")
        worker_init.disconnect(dispatch_uid=f"{_UID}.begin")
        worker_shutdown.disconnect(dispatch_uid=f"{_UID}.end")


def is_installed(app: Celery) -> bool:
    """Whether messages of this application carry the context."""
    return app in _apps


def installed_apps() -> list[Celery]:
    """The applications whose messages carry the context."""
    return list(_apps)


# --- publishing ----------------------------------------------------------------------------------------------


def outgoing_envelope(
    headers: Mapping[str, Any] | None, task: object = None, kwargs: Mapping[str, Any] | None = None
) -> Envelope:
    """What a message about to be published will carry: its own header if it has one, else the running context.

    Args:
        headers: those that it is launched with.
        task: the task, if it is known here: one that belongs to no tenant, or takes its tenant from its arguments.
        kwargs: the task's keyword arguments.

    Raises:
        HeaderError: it has a header that cannot be read.
        TenantConflictError: the arguments name another tenant.
        InvalidTenantError: the arguments name something that is no tenant.
    """
    own = find(headers)
    if own is None:
        return _of_task(capture(), "the active tenant", task, kwargs)
    return _of_task(decode(own), "the header", task, kwargs, is_signed=is_signed(own))


def outgoing_tenant(
    headers: Mapping[str, Any] | None, task: object, kwargs: Mapping[str, Any] | None
) -> TenantContext | None:
    """The tenant of :func:`outgoing_envelope`, for less."""
    if find(headers) is None:
        return _of_task(Envelope(current_tenant()), "the active tenant", task, kwargs).tenant
    return outgoing_envelope(headers, task, kwargs).tenant


def _of_task(
    envelope: Envelope, source: str, task: object, kwargs: Mapping[str, Any] | None, *, is_signed: bool = False
) -> Envelope:
    """What is carried, as far as the task wants it.

    Beside a signed header arguments name no tenant, since they are not signed; they may only contradict it.
    """
    if task is None or (is_signed and envelope.tenant is None):
        return envelope
    if getattr(task, "system", False):
        return Envelope(None, envelope.variables)
    if not getattr(task, "tenant_in_arguments", False):
        return envelope
    named = tenant_in(kwargs)
    if named is None:
        return envelope
    carried = [(source, envelope.tenant)] if envelope.tenant else []
    return Envelope(agreed([*carried, ("the tenant in the arguments", named)]), envelope.variables)


def require_genuine(app: Celery, headers: Any, name: str, kwargs: Any, task_id: str) -> None:
    """Check, where context is signed, that what is about to be published and signed may be.

    Raises:
        SignatureError: it came from elsewhere, unsigned.
    """
    signer = _apps.get(app)
    if signer is not None:
        trust.require_genuine(signer, app, headers, full_name(name, kwargs), task_id)


def with_context(
    app: Celery, headers: Mapping[str, Any] | None, envelope: Envelope, name: str, kwargs: Any, task_id: str | None
) -> dict[str, Any]:
    """A copy of a message's headers that carries the envelope; without an id, of a part of a canvas.

    A copy, since callers reuse their dicts: a mutated one would take one tenant along into the next publish.
    """
    header = encode(envelope)
    signer = _apps.get(app)
    if signer is not None:
        header = signer.sign(header, full_name(name, kwargs), task_id)
    return {**(headers or {}), HEADER: header}


def carrier(app: Celery, envelope: Envelope, more: Mapping[str, Any] | None = None) -> Carry:
    """What binds the parts of a canvas to an envelope.  One that is bound already stays so.

    Args:
        more: other headers for all parts.
    """

    def carry(part: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
        name, kwargs = part["task"], part.get("kwargs")
        header = find(own)
        if header is None:
            return with_context(app, {**(more or {}), **own}, envelope, name, kwargs, None)
        if _apps.get(app) is not None and not is_signed(header):
            require_genuine(app, own, name, kwargs, "")
            return with_context(app, {**(more or {}), **own}, decode(header), name, kwargs, None)
        return {**more, **own} if more else own

    return carry


def _carrier_of_launch(app: Celery, headers: Mapping[str, Any] | None) -> Carry:
    """What binds the parts that come with a launch to the launcher: the active tenant, else that of the headers."""
    launcher, named = current_tenant(), outgoing_envelope(headers).tenant
    carry = carrier(app, capture() if launcher else outgoing_envelope(headers))
    if launcher is None or named is None or same_tenant(launcher, named):
        return carry

    def carry_unless_unbound(part: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
        if find(own) is None:
            raise TenantConflictError(
                f"the headers name {named}, but the active tenant, whose {part['task']} after it would be, is "
                f"{launcher}.  To act for another tenant on purpose, open tenant_scope(...) for it",
                first=named,
                second=launcher,
            )
        return carry(part, own)

    return carry_unless_unbound


def records(app: Celery) -> bool:
    """Whether the result backend keeps records of launches."""
    return hasattr(app.backend, "record_launch")


@contextmanager
def recorded(app: Celery, task_id: str, name: str, **lineage: str | None) -> Iterator[None]:
    """A record that the active tenant launched a task, taken back if the block fails.

    Nothing, if the result backend keeps no such records.
    """
    if not records(app):
        yield
        return
    backend: Any = app.backend
    is_new = backend.record_launch(task_id, name, **lineage)
    try:
        yield
    except BaseException:
        if is_new:
            backend.discard_launch(task_id)
        raise


def _lineage(app: Celery, options: Mapping[str, Any]) -> dict[str, str | None]:
    """The root and the parent of a task about to be published, as Celery sees them."""
    parent: Any = app.current_worker_task
    return {
        "root_id": options.get("root_id") or (parent and (parent.request.root_id or parent.request.id)),
        "parent_id": options.get("parent_id") or (parent and parent.request.id),
    }


# --- running -------------------------------------------------------------------------------------------------


def _envelope_of(task: Task[Any, Any], request: Context) -> Envelope:
    """What the message behind a task's request carried, or an older caller's arguments name.

    Raises:
        HeaderError: its header cannot be read, or is not signed where it should be.
        TenantConflictError, InvalidTenantError: its arguments name another tenant, or something that is none.
    """
    signer = _apps.get(task.app)
    if signer is not None:
        trust.require_signed(signer, task, request)
    value = carried_by(request)
    envelope = Envelope() if value is None else decode(value)
    return _of_task(envelope, "the message's header", task, request.kwargs, is_signed=signer is not None)


def carried_header(request: Context) -> dict[str, Any]:
    """The header that a task's message carried, to be published again; empty if it had none."""
    value = carried_by(request)
    state = state_of(request)
    if value is None and state is not None and state.envelope:
        value = encode(state.envelope)  # it came in flat headers, or among the arguments
    return {} if value is None else {HEADER: value}


def begin(task: Task[Any, Any], request: Context) -> RequestState:
    """Make sure that the running context is the one that the message carried, right before the body.

    It is already, unless somebody else's ``task_prerun`` changed it, or ours did not come to its end.
    """
    state = state_of(request)
    if state is None:
        return _restore(task, request)
    renew(state)
    return state


def renew(state: RequestState) -> None:
    """Set the context as it was when the body began."""
    if state.activation is not None:
        state.activation.renew()


@contextmanager
def as_launched(request: Context) -> Iterator[None]:
    """The context that the message carried, whatever scope the body is in at the moment."""
    state = state_of(request)
    if state is None:  # called as a function
        yield
        return
    activation = Activation(state.envelope.tenant, state.envelope.variables)
    try:
        yield
    finally:
        activation.undo()


@contextmanager
def restored(task: Task[Any, Any], request: Context) -> Iterator[None]:
    """The context that a request carried, for a block outside of the task's body; blocks may be nested."""
    before = state_of(request)
    state = _restore(task, request)
    try:
        yield
    finally:
        _undo(state)
        if before is not None:
            keep_state(request, before)


def _restore(task: Task[Any, Any], request: Context) -> RequestState:
    """Set the context that a request carried, and name the tenant on it as applications read it."""
    refusal: ContextError | None = None
    try:
        envelope = _envelope_of(task, request)
        activation = Activation(envelope.tenant, envelope.variables)
        owner = envelope.tenant
    except ContextError as error:
        # The work is refused; until then nothing of whatever ran here before may show.
        refusal, envelope, activation = error, Envelope(), Activation(None, {})
        if isinstance(error, SignatureError):
            # Nor may anything be published for it.
            vars(request).update(callbacks=None, errbacks=None, chain=None, chord=None)
        owner = None if isinstance(error, HeaderError) else _named_by_header(request)
    state = RequestState(activation=activation, envelope=envelope, tenant=owner, refusal=refusal)
    keep_state(request, state)
    tenant = envelope.tenant
    attributes = vars(request)
    attributes["organization_id"] = tenant.organization_id if tenant else None
    attributes["user_id"] = tenant.user_id if tenant else None
    return state


def _named_by_header(request: Context) -> TenantContext | None:
    """Whose record the failure of a refused message is: the launcher's, if its header can be read."""
    try:
        header = carried_by(request)
        return None if header is None else decode(header).tenant
    except ContextError:
        return None


def _undo(state: RequestState | None) -> None:
    if state is not None and state.activation is not None:
        state.activation.undo()
        state.activation = None


def _enter(sender: Task[Any, Any], task_id: str | None = None, **_: Any) -> None:
    """task_prerun: the context of the message becomes the running one."""
    if sender.app in _apps:
        request = sender.request
        if request.id != task_id:
            # What a message brings along may say anything, and is merged into the request.
            request.id = task_id
        _restore(sender, request)


def _leave(sender: Task[Any, Any], **_: Any) -> None:
    """task_postrun: what was there before comes back."""
    _undo(state_of(sender.request))


def _begin_to_work(sender: Any, **_: Any) -> None:
    """worker_init, when the application's modules have been imported."""
    # After all other receivers, so that they see the tenant, too.
    task_postrun.disconnect(dispatch_uid=f"{_UID}.leave")
    task_postrun.connect(_leave, weak=False, dispatch_uid=f"{_UID}.leave")
    signer = _apps.get(sender.app)
    if signer is not None:
        trust.begin_to_work(sender.app)


def _end_work(sender: Any, **_: Any) -> None:
    """worker_shutdown."""
    trust.end_work(sender.app)
