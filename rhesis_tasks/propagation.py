"""Context into messages, and out of them again.

Publishing: every message of an installed application passes through its ``send_task``, so the header is put
in there.  (``before_task_publish`` does not say which application publishes, and swallows exceptions.)
Running: ``task_prerun`` sets the context, ``task_postrun`` brings back what was there; both in the thread
that runs the body.  Signals only carry, since Celery swallows what they raise; work is refused by the tasks, which ask
here what was carried.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from celery.signals import task_postrun, task_prerun, worker_init
from kombu.utils.uuid import uuid

from .canvas import CALLING, COMPOSITES, Carry, bound_options, parts
from .context import TenantContext, agreed, current_tenant, exactly, same_tenant, tenant_in
from .disclosure import SHOWN, shown_arguments
from .errors import ContextError, HeaderError, NotConfiguredError, TenantConflictError
from .headers import (
    HEADER,
    SENT_AT,
    Envelope,
    RequestState,
    capture,
    carried_by,
    decode,
    encode,
    find,
    keep_state,
    running,
    state_of,
)
from .retry import policy_name
from .signing import Signer, SigningProducer
from .variables import Activation

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Context, Task

__all__ = [
    "as_launched",
    "begin",
    "carried_header",
    "carrier",
    "due",
    "for_launch",
    "install",
    "installed_apps",
    "is_installed",
    "outgoing_envelope",
    "outgoing_tenant",
    "recorded",
    "records",
    "records_launches",
    "renew",
    "restored",
    "running_state",
    "signer_of",
    "uninstall",
    "with_context",
]

_apps: weakref.WeakKeyDictionary[Celery, Signer | None] = weakref.WeakKeyDictionary()
_unrecorded: weakref.WeakSet[Celery] = weakref.WeakSet()  # whose launches are not
_log = logging.getLogger(__name__)
_UID = "rhesis_tasks.propagation"
_NOTHING = nullcontext()
_UNLOCK = "celery.chord_unlock"  # Celery's own, which polls for a chord
_BOUND = ("link", "link_error", "chain", "chord")  # options of a launch that are signatures


def install(app: Celery, signer: Signer | None = None, *, launch_records: bool = True) -> None:
    """Let every message of ``app`` carry the context, signed if there is a signer; again it changes nothing.

    Args:
        app: the application.
        signer: what signs its messages.
        launch_records: whether a task has a record from its launch on, or from its start, where the result backend
            keeps records.
    """
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
        producer: Any = None,
        connection: Any = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        require_broker()
        headers = options.get("headers")
        task = options.get("task_type") or app.tasks.get(name)
        task_id = str(task_id or uuid())
        envelope = for_launch(outgoing_envelope(headers, task, kwargs), options)
        if (check := getattr(task, "check_launch", None)) is not None:
            check(envelope.tenant)
        if name in CALLING:
            _check_called(name, kwargs, envelope.tenant)
        if any(map(options.get, _BOUND)):
            # What is published after it, by a worker and from whatever context, is the launcher's, too: bound now.
            for key in _BOUND:
                later = bound_options({key: options.get(key)}, _carrier_of_launch(headers, key), app)
                for part in _signatures(later.get(key)):
                    _check_launch(app, part, None)
                options |= later
        if name == _UNLOCK and args and len(args) > 1:  # the chord's body is among its arguments
            args = (args[0], bound_options({"chord": args[1]}, carrier(envelope), app)["chord"], *args[2:])
        options["headers"] = {**with_context(headers, envelope), SENT_AT: round(time.time(), 3)}
        for shown, text in zip(SHOWN, shown_arguments(app, envelope.tenant, args, kwargs), strict=True):
            if options.get(shown) is None:
                options[shown] = text
        # A retry has its record, and writes its own state.
        keeps_record = not (options.get("ignore_result") or options.get("retries")) and records_launches(app)
        send_task = own or functools.partial(type(app).send_task, app)
        if signer is None and not keeps_record and envelope.tenant is current_tenant():
            return send_task(name, args, kwargs, countdown, eta, task_id, producer, connection, *more, **options)
        # A message bound to another tenant (a part of a canvas, a retry), or to none, is recorded as such.
        with (
            _NOTHING if signer is None else _signing(app, signer, producer, connection) as signing,
            _NOTHING if envelope.tenant is current_tenant() else exactly(envelope.tenant),
            _launching(app, task_id, name, due(countdown, eta), options, producer, connection)
            if keeps_record
            else _NOTHING,
        ):
            if signing is not None:
                producer, connection = signing, None  # with a connection, Celery would make another producer
            return send_task(name, args, kwargs, countdown, eta, task_id, producer, connection, *more, **options)

    send_task_with_context.own = own  # type: ignore[attr-defined]  # to be put back
    # On the instance, so that other applications in the process are untouched.
    app.send_task = send_task_with_context  # type: ignore[method-assign]
    task_prerun.connect(_enter, weak=False, dispatch_uid=f"{_UID}.enter")
    task_postrun.connect(_leave, weak=False, dispatch_uid=f"{_UID}.leave")
    worker_init.connect(_begin_to_work, weak=False, dispatch_uid=f"{_UID}.begin")
    _apps[app] = signer
    if not launch_records:
        _unrecorded.add(app)


def uninstall(app: Celery) -> None:
    """Undo :func:`install`."""
    if app in _apps:
        del _apps[app]
        _unrecorded.discard(app)
        own = getattr(app.send_task, "own", None)
        if own is not None:
            app.send_task = own  # type: ignore[method-assign]
        else:
            del app.send_task
    if not _apps:
        task_prerun.disconnect(dispatch_uid=f"{_UID}.enter")
        task_postrun.disconnect(dispatch_uid=f"{_UID}.leave")
        worker_init.disconnect(dispatch_uid=f"{_UID}.begin")


def is_installed(app: Celery) -> bool:
    """Whether messages of this application carry the context."""
    return app in _apps


def signer_of(app: Celery) -> Signer | None:
    """What signs the messages of this application; None if they are not."""
    return _apps.get(app)


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
    return _of_task(decode(own), "the header", task, kwargs)


def for_launch(envelope: Envelope, options: dict[str, Any]) -> Envelope:
    """With the retry policy that is asked for, which is taken out of the options, or that of the attempts before."""
    if options.get("retries"):
        return envelope
    # What Celery calls so, a dict, is about publishing.
    asked_for = options.get("retry_policy")
    name = None
    if asked_for is not None and not isinstance(asked_for, dict):
        name = policy_name(options.pop("retry_policy"))
    if name is None and envelope.retry_policy is None and envelope.first_at is None:
        return envelope
    return dataclasses.replace(envelope, retry_policy=name, first_at=None)


def outgoing_tenant(
    headers: Mapping[str, Any] | None, task: object, kwargs: Mapping[str, Any] | None
) -> TenantContext | None:
    """The tenant of :func:`outgoing_envelope`, for less."""
    if find(headers) is None:
        return _of_task(Envelope(current_tenant()), "the active tenant", task, kwargs).tenant
    return outgoing_envelope(headers, task, kwargs).tenant


def _of_task(envelope: Envelope, source: str, task: object, kwargs: Mapping[str, Any] | None) -> Envelope:
    """What is carried, as far as the task wants it."""
    if task is None:
        return envelope
    if getattr(task, "system", False):
        return dataclasses.replace(envelope, tenant=None)
    if not getattr(task, "tenant_in_arguments", False):
        return envelope
    named = tenant_in(kwargs)
    if named is None:
        return envelope
    carried = [(source, envelope.tenant)] if envelope.tenant else []
    return dataclasses.replace(envelope, tenant=agreed([*carried, ("the tenant in the arguments", named)]))


def with_context(headers: Mapping[str, Any] | None, envelope: Envelope) -> dict[str, Any]:
    """A copy of a message's headers that carries the envelope.

    A copy, since callers reuse their dicts: a mutated one would take one tenant along into the next publish.
    """
    return {**(headers or {}), HEADER: encode(envelope)}


@contextmanager
def _signing(app: Celery, signer: Signer, producer: Any, connection: Any) -> Iterator[SigningProducer]:
    """A producer that signs, in place of the one that Celery would publish by."""
    given = app.amqp.Producer(connection, auto_declare=False) if connection else producer
    with app.producer_or_acquire(given) as found:
        yield SigningProducer(found, signer)


def carrier(envelope: Envelope, more: Mapping[str, Any] | None = None) -> Carry:
    """What binds the parts of a canvas to an envelope.  One that is bound already stays so.

    Args:
        more: other headers for all parts.
    """

    def carry(_: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
        if find(own) is None:
            return with_context({**(more or {}), **own}, envelope)
        return {**more, **own} if more else own

    return carry


def _carrier_of_launch(headers: Mapping[str, Any] | None, option: str) -> Carry:
    """What binds the parts that come with a launch to the launcher: the active tenant, else that of the headers.

    Where these differ, only the body of a chord is the launcher's, one of whose tasks is launched with such headers.
    """
    launcher, named = current_tenant(), outgoing_envelope(headers).tenant
    carry = carrier(capture() if launcher else outgoing_envelope(headers))
    if option == "chord" or launcher is None or named is None or same_tenant(launcher, named):
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


def _signatures(option: Any) -> Iterator[Mapping[str, Any]]:
    """The tasks in an option of a launch that is one signature, or several."""
    for whole in [option] if isinstance(option, Mapping) else option or ():
        yield from (part for part, _ in parts(whole) if part.get("subtask_type") not in COMPOSITES)


def _check_launch(app: Celery, part: Mapping[str, Any], launcher: TenantContext | None) -> None:
    """Raise MissingTenantError if a part would be refused when its turn comes to be published.

    Args:
        launcher: whose it will be, if it is not bound.
    """
    task = app.tasks.get(part["task"])
    check = getattr(task, "check_launch", None)
    if check is not None:
        headers = (part.get("options") or {}).get("headers")
        with exactly(launcher):
            check(outgoing_tenant(headers, task, part.get("kwargs")))


def _check_called(name: str, kwargs: Any, launcher: TenantContext | None) -> None:
    """Raise TenantConflictError if ``map`` would call a task for another tenant than it is bound to."""
    called = (kwargs or {}).get("task") or {}
    headers = (called.get("options") or {}).get("headers")
    if find(headers) is None:
        return
    bound_to = outgoing_envelope(headers).tenant
    if bound_to is not None and (launcher is None or not same_tenant(bound_to, launcher)):
        raise TenantConflictError(
            f"{name} calls {called.get('task')} in its own context, which is {launcher or 'no tenant'}; but that is "
            f"bound to {bound_to}.  Launch a group of its signatures, or open tenant_scope(...) for that tenant",
            first=bound_to,
            second=launcher,
        )


def records(app: Celery) -> bool:
    """Whether the result backend keeps records of tasks."""
    return hasattr(app.backend, "record_launch")


def records_launches(app: Celery) -> bool:
    """Whether a task has a record from its launch on."""
    return app not in _unrecorded and records(app)


@contextmanager
def recorded(
    app: Celery, task_id: str, name: str, *, eta: datetime | None = None, **lineage: str | None
) -> Iterator[None]:
    """A record that the active tenant launched a task, taken back if the block fails.

    Nothing, if there are no such records.
    """
    if not records_launches(app):
        yield
        return
    backend: Any = app.backend
    is_new = backend.record_launch(task_id, name, **lineage, eta=eta)
    try:
        yield
    except BaseException:
        if is_new:
            backend.discard_launch(task_id)
        raise


def _launching(
    app: Celery,
    task_id: str,
    name: str,
    eta: datetime | None,
    options: Mapping[str, Any],
    producer: Any,
    connection: Any,
) -> AbstractContextManager[None]:
    """The same for a task that is published in the block, by this producer if there is one."""
    backend: Any = app.backend
    if connection is not None:
        return recorded(app, task_id, name, eta=eta, **_lineage(app, options))
    found: AbstractContextManager[None] = backend.launching(task_id, name, producer, **_lineage(app, options), eta=eta)
    return found


def due(countdown: Any, eta: Any) -> datetime | None:
    """When a task is due, if that is later: as Celery's workers see it, who take a time without a zone for UTC."""
    now = datetime.now(UTC)
    if countdown:
        eta = now + timedelta(seconds=float(countdown))
    elif isinstance(eta, str):
        eta = datetime.fromisoformat(eta)
    if not isinstance(eta, datetime):
        return None
    if eta.tzinfo is None:
        eta = eta.replace(tzinfo=UTC)
    return eta if eta > now else None


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
        HeaderError: its header cannot be read.
        SignatureError: it is not signed where it should be.
        TenantConflictError, InvalidTenantError: its arguments name another tenant, or something that is none.
    """
    value = carried_by(request)
    envelope = Envelope() if value is None else decode(value)
    return _of_task(envelope, "the message's header", task, request.kwargs)


def carried_header(request: Context) -> dict[str, Any]:
    """The header that a task's message carried, to be published again; empty if no message is known.

    One that had none gets one that says so, lest what is published takes over the scope that the body is in.
    """
    value = carried_by(request)
    state = state_of(request)
    if value is None and state is not None:
        value = encode(state.envelope)  # it came among the arguments, or there was none
    if not isinstance(value, Mapping):
        return {} if value is None else {HEADER: value}
    if state is not None and state.first_at is not None:
        value = {**value, "first_at": state.first_at}
    return {HEADER: value}


def begin(task: Task[Any, Any], request: Context) -> RequestState:
    """Make sure that the running context is the one that the message carried, right before the body.

    It is already, unless somebody else's ``task_prerun`` changed it, or ours did not come to its end.
    """
    state = state_of(request)
    if state is None:
        return _restore(task, request)
    renew(state)
    return state


def running_state(task: object) -> RequestState | None:
    """As :func:`begin`, without the request, if it is this task's body that is about to begin here."""
    state = running.get()
    if state is None or state.task is not task or state.is_running:
        return None
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
    with Activation(state.envelope.tenant, state.envelope.variables):
        yield


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
    except Exception as error:  # whatever a message brings along
        # The work is refused; until then nothing of whatever ran here before may show.
        refusal = error if isinstance(error, ContextError) else HeaderError(f"{type(error).__name__}: {error}")
        envelope, activation = Envelope(), Activation(None, {})
        owner = None if isinstance(error, HeaderError) else _named_by_header(request)
    state = RequestState(task=task, activation=activation, envelope=envelope, tenant=owner, refusal=refusal)
    keep_state(request, state)
    tenant = envelope.tenant
    attributes = vars(request)
    if attributes.get("errbacks"):
        attributes["errbacks"] = _launchable(task, attributes["errbacks"])
    attributes["organization_id"] = tenant.organization_id if tenant else None
    attributes["user_id"] = tenant.user_id if tenant else None
    return state


def _launchable(task: Task[Any, Any], errbacks: list[Any]) -> list[Any]:
    """Those of a task's error callbacks that will not be refused.

    A refusal would come while Celery deals with the failure, which is the end of a worker that runs tasks in its main
    process, and so of the next one that gets the message.
    """
    kept = []
    for errback in errbacks:
        try:
            for part in _signatures(errback):
                _check_launch(task.app, part, current_tenant())
            kept.append(errback)
        except Exception as error:  # whatever a message brings along
            _log.error("an error callback of task %s is left out: %s", task.name, error)
    return kept


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
        before = running.get()
        state = _restore(sender, request)
        state.before = before
        running.set(state)


def _leave(sender: Task[Any, Any], **_: Any) -> None:
    """task_postrun: what was there before comes back."""
    state = running.get()
    if state is not None and state.task is sender:
        running.set(state.before)
        _undo(state)
    else:  # somebody has changed it
        _undo(state_of(sender.request))


def _begin_to_work(**_: Any) -> None:
    """worker_init, when the application's modules have been imported."""
    # After all other receivers, so that they see the tenant, too.
    task_postrun.disconnect(dispatch_uid=f"{_UID}.leave")
    task_postrun.connect(_leave, weak=False, dispatch_uid=f"{_UID}.leave")
