"""What a worker's main process does with a task, in the context that the task's message carried.

Lost processes, hard time limits, terminations and revocations are dealt with there, where no context is set; and its
error callbacks are published from there.  And where context is signed, messages are looked at there before anything in
them is: what nobody with a key has published becomes a request with a name and an id, to be refused.

``ContextTask.Request`` names :class:`ContextRequest`, which Celery imports in workers only.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback  # type: ignore[attr-defined]  # left out of the stubs
from billiard.exceptions import WorkerLostError
from celery import states
from celery._state import _task_stack  # type: ignore[attr-defined]  # left out of the stubs
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry, TimeLimitExceeded
from celery.signals import task_failure, task_retry
from celery.worker import request as worker_request
from celery.worker import state
from typing_extensions import override

from .context import TenantContext
from .control import stopped
from .disclosure import shown_arguments, shown_fields, shows_arguments
from .errors import ContextError
from .failures import reason_of
from .headers import HEADER, REFUSED, state_of
from .hooks import publish_hooks
from .outcomes import TaskOutcome, log_outcome, log_requeued, told_tenant
from .propagation import outgoing_tenant, records, restored, signer_of
from .states import State

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["ContextRequest", "Observer"]

_log = logging.getLogger(worker_request.__name__)
_security = logging.getLogger("rhesis_tasks.security")
_Request: Any = worker_request.Request  # the stubs leave out most of it


class Observer(Protocol):
    """What wants to know of attempts; it is called in whichever thread, and what it raises is logged."""

    def started(self, request: Any) -> None:
        """The pool has begun with it."""

    def ended(self, request: Any, outcome: str, runtime: float | None) -> None:
        """After so many seconds: ``success``, ``failure``, ``retry``, ``requeued``, ``ignored`` or ``revoked``."""


class ContextRequest(_Request):  # type: ignore[misc]
    """Celery's request for the execution of a task, with the context of the task's message."""

    checks_signatures: ClassVar[bool] = True
    observer: ClassVar[Observer | None] = None  #: what is told how attempts begin and end, in this process

    _is_counted = False  # its end was told to the observer
    _requeued = False
    _timed_out: Any = None  # the exception info, once on_failure was told of a hard time limit
    _limit_is_told = False  # to on_timeout
    _is_told = False  # how it has ended
    _already_cancelled: bool  # Celery's
    _decided: BaseException | None = None  # what is dealt with here

    def __init_subclass__(cls) -> None:
        # Celery makes a class for each task, with an on_success of its own.
        own = vars(cls).get("on_success")
        if own is not None:

            @functools.wraps(own)
            def on_success(self: ContextRequest, failed__retval__runtime: Any, **kwargs: Any) -> Any:
                failed, _, runtime = failed__retval__runtime
                try:
                    return own(self, failed__retval__runtime, **kwargs)
                finally:
                    if not failed:
                        self._count("success", runtime)

            cls.on_success = on_success

    def __init__(self, message: Any, *args: Any, **options: Any) -> None:
        app = options["app"]
        signer = signer_of(app)
        try:
            if signer is not None:
                headers = signer.signed_headers(message)
                if headers is None:
                    headers = _instead_of(options.get("headers") or message.headers, app)
                    options |= {"body": ((), {}, {}), "decoded": True}
                options["headers"] = headers
            super().__init__(message, *args, **options)
            if HEADER not in self._request_dict:  # with it, it is from a Celery of ours
                _check_form(self._request_dict, self._payload)
                self._hide_arguments(app)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise InvalidTaskError(f"{type(error).__name__}: {error}") from error
        if (message.delivery_info or {}).get("is_due"):
            self._eta = None  # the broker has waited for it, by a clock that may not be ours

    def _hide_arguments(self, app: Celery) -> None:
        """Show as little of them as if it came from here."""
        args, kwargs, _ = self._payload
        positional, self._kwargsrepr = shown_arguments(app, self._tenant(), args, kwargs)
        if positional is not None:
            self._argsrepr = positional

    def _tenant(self) -> TenantContext | None:
        try:
            return outgoing_tenant(self._request_dict, self.task, self._payload[1])
        except ContextError:
            return None

    @override
    def info(self, safe: bool = False) -> Any:
        """What ``celery inspect`` is told of it: the arguments themselves only where they are shown."""
        return super().info(safe or not shows_arguments(self._app))

    @override
    def send_event(self, type: str, **fields: Any) -> None:
        """Send an event about it."""
        super().send_event(type, **(shown_fields(self._app, fields) if fields else fields))

    @contextmanager
    def _as_launched(self) -> Iterator[None]:
        """The task's context and request, as if its body was running."""
        request = self._context
        _task_stack.push(self.task)
        self.task.request_stack.push(request)
        try:
            with restored(self.task, request):
                yield
        finally:
            self.task.request_stack.pop()
            _task_stack.pop()

    def _count(self, outcome: str, runtime: float | None = None) -> None:
        """Tell the observer how it has ended, once."""
        if self.observer is not None and not self._is_counted:
            self._is_counted = True
            if runtime is None and self.time_start is not None:
                runtime = max(0.0, time.time() - self.time_start)
            try:
                self.observer.ended(self, outcome, runtime)
            except Exception:  # which would keep Celery from acknowledging, or end a solo worker
                _log.exception("the end of task %s[%s] is not counted", self.name, self.id)

    @override
    def on_accepted(self, pid: int, time_accepted: float) -> None:
        super().on_accepted(pid, time_accepted)
        if self.observer is not None:
            try:
                self.observer.started(self)
            except Exception:  # as above
                _log.exception("the start of task %s[%s] is not counted", self.name, self.id)

    @override
    def revoked(self) -> bool:
        """Whether the task was revoked or has expired; Celery asks for each task, so the context waits until it may."""
        is_stopped = (
            len(stopped) > 0 and not self._already_revoked and any((owner, self.id) in stopped for owner in self.owners)
        )
        if not (
            is_stopped or self._expires or self.stamped_headers or self._already_revoked or self.id in state.revoked
        ):
            return False
        with self._as_launched():
            if is_stopped:
                _log.info("Discarding revoked task: %s[%s]", self.name, self.id)
                self._announce_revoked("revoked", False, None, False)
                return True
            return bool(super().revoked())

    @override
    def maybe_expire(self) -> bool | None:
        """Whether it has expired.

        Celery keeps the id among the revoked ones then, which would stop another tenant's task of the same id.
        """
        was_revoked = self.id in state.revoked
        has_expired: bool | None = super().maybe_expire()
        if has_expired and not was_revoked:
            state.revoked.discard(self.id)
        return has_expired

    @property
    def owners(self) -> list[str | None]:
        """Whose task it is: an organization's id; and None, too, if its message has no header that says so."""
        tenant = self._tenant()
        named: list[str | None] = [] if tenant is None else [tenant.organization_id]
        return named if named and HEADER in self._request_dict else [*named, None]

    @override
    def _announce_revoked(self, *args: Any, **kwargs: Any) -> None:
        self._count("revoked")
        with self._as_launched():
            super()._announce_revoked(*args, **kwargs)

    @override
    def cancel(self, *args: Any, **kwargs: Any) -> None:
        """Stop it, since the worker stops."""
        with suppress(NotImplementedError):  # threads cannot be stopped: the pool waits for them
            super().cancel(*args, **kwargs)

    @override
    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        if self.acknowledged:
            self.leave()  # Celery would announce another attempt, which never comes
            return
        with self._as_launched():
            super()._announce_cancelled(*args, **kwargs)

    def leave(self) -> None:
        """The worker ends and does not wait for it.

        If it was acknowledged as it began, nobody does it again: it has failed, as if its process was lost.
        """
        if not self.acknowledged or self._already_cancelled:
            return
        try:
            raise WorkerLostError("its worker was stopped while it ran")
        except WorkerLostError:
            self.on_failure(ExceptionInfo())
        self._already_cancelled = True

    @override
    def reject(self, requeue: bool = False) -> None:
        self._requeued = requeue
        if requeue and self._decided is not None and not isinstance(self._decided, Reject) and not self._is_told:
            self._is_told = True
            log_requeued(self.task, self._context, reason_of(type(self._decided).__name__))
        super().reject(requeue=requeue)

    @override
    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        error = _bare(exc_info.exception)
        if isinstance(error, TimeLimitExceeded):
            if self._timed_out is not None:
                return None  # a pool that stops looks for it in two threads
            self._timed_out = exc_info
        with self._as_launched(), self._deciding(error):
            result = super().on_failure(exc_info, *args, **kwargs)
            if isinstance(error, Reject) and not getattr(error, "requeue", False) and not self._is_told:
                self._store_rejection(error)
            self._count("requeued" if self._requeued else _OUTCOMES.get(type(error), "failure"))
            return result

    def _store_rejection(self, error: Reject) -> None:
        """A task whose message is rejected for good has failed; Celery 5.6 takes no notice of it."""
        self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)
        self.tell(error)

    def give_up(self, error: BaseException) -> None:
        """Its message will not be delivered any more: it has failed."""
        with self._as_launched(), self._deciding(error):
            self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)
            self.send_event("task-failed", exception=f"{type(error).__name__}()", traceback="")
            self.tell(error)

    @override
    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit was reached.

        Of a hard one the prefork pool tells twice, here after on_failure: Celery 5.7 would store the failure, call the
        error callbacks and send the signal a second time.
        """
        if not soft:
            if self._limit_is_told:
                return  # as above
            self._limit_is_told = True
        with self._as_launched(), self._deciding(None):
            if soft or self._timed_out is None:
                super().on_timeout(soft, timeout)
                if not soft:
                    self._count("requeued" if self._requeued else "failure")
                if not (soft or self._requeued or state.should_terminate):
                    self.tell(TimeLimitExceeded(timeout))  # Celery 5.6 sends no signal
                return
            _log.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
            if not self._requeued and not state.should_terminate:
                self._call_hooks(self._timed_out)

    def _call_hooks(self, exc_info: Any) -> None:
        error = _bare(exc_info.exception)
        self.task.on_failure(error, self.id, self.args, self.kwargs, exc_info)
        self.task.after_return(states.FAILURE, error, self.id, self.args, self.kwargs, exc_info)

    # --- telling how it has ended, where that is decided here ------------------------------------------------

    @contextmanager
    def _deciding(self, error: BaseException | None) -> Iterator[None]:
        """Celery sends ``task_failure`` or ``task_retry`` in here if it decides that the attempt has failed."""
        token = _deciding.set(self)
        self._decided = error
        try:
            yield
        finally:
            self._decided = None
            _deciding.reset(token)

    @property
    def is_told(self) -> bool:
        """Whether one of our lines has said how it has ended."""
        return self._is_told

    def tell(self, error: BaseException, to: State = State.FAILURE, countdown: float | None = None) -> None:
        """Log that it has failed, and let its hooks be run by a task: not here, where they would hold up everything."""
        request, known = self._context, state_of(self._context)
        if self._is_told or (known is not None and known.is_superseded):
            return  # the latter: its record had an end already
        self._is_told = True
        outcome = TaskOutcome(
            task=self.task,
            task_id=self.id,
            root_id=request.root_id,
            tenant=told_tenant(known),
            state=to,
            error=error,
            reason=reason_of(type(error).__name__) if to is State.FAILURE else None,
            retries=request.retries or 0,
            countdown=countdown,
            duration=None if self.time_start is None else max(0.0, time.time() - self.time_start),
        )
        log_outcome(outcome, has_traceback=False)  # it would be that of the pool
        try:
            publish_hooks(outcome, request)
        except Exception:
            _log.exception("the hooks of task %s[%s] cannot be run", self.name, self.id)


_OUTCOMES: Final = {Retry: "retry", Ignore: "ignored"}

_deciding: ContextVar[ContextRequest | None] = ContextVar("rhesis_tasks.deciding", default=None)


@task_failure.connect(weak=False, dispatch_uid="rhesis_tasks.request")
def _failed(task_id: str | None = None, exception: Any = None, **_: Any) -> None:
    request = _deciding.get()
    if request is not None and request.id == task_id:
        request.tell(_bare(exception))


@task_retry.connect(weak=False, dispatch_uid="rhesis_tasks.request")
def _retried(request: Any = None, reason: Any = None, **_: Any) -> None:
    deciding = _deciding.get()
    if deciding is not None and request is not None and deciding.id == request.id:
        deciding.tell(_bare(reason.exc), State.RETRY, reason.when)


_TOLD: Final = frozenset({"Task handler raised error: %r", "Task %s[%s] retry: %s"})


def _is_news(record: logging.LogRecord) -> bool:
    """Leaves out Celery's lines about what ours have told."""
    request = _deciding.get()
    return record.msg not in _TOLD or request is None or not request.is_told


_log.addFilter(_is_news)


# What else a message may bring along would replace what Celery has set on the request.
_EMBEDDED: Final = frozenset({"callbacks", "chain", "chord", "errbacks"})
_TEXTS: Final = ("root_id", "parent_id", "group", "shadow")
_LIST: Final = (list, tuple)
_NUMBER: Final = (int, float)


def _check_form(request: Mapping[str, Any], body: Any) -> None:
    """Raise TypeError or ValueError for what no Celery publishes, and at which a worker would end or hang."""
    args, kwargs, embedded = body
    get = request.get
    if not isinstance(args, _LIST) or not isinstance(kwargs, dict):
        raise TypeError("the arguments are no list and mapping")
    retries, limits, stamped = get("retries"), get("timelimit"), get("stamped_headers")
    _check_id(request["id"])
    if retries is not None and not isinstance(retries, int):
        raise TypeError("the number of retries is no number")
    if stamped is not None and not isinstance(stamped, _LIST):
        raise TypeError("the stamped headers are no list")
    for name in _TEXTS:
        text = get(name)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__}")
    for limit in limits or ():
        if limit is not None and not isinstance(limit, _NUMBER):
            raise TypeError(f"a time limit is a {type(limit).__name__}")
    if "get" in request:
        raise ValueError("it has a header named 'get', which would hide the method")
    if embedded is not None:
        _check_embedded(embedded)


def _check_id(task_id: Any) -> None:
    """Raise TypeError or ValueError for an id that cannot be stored."""
    if not isinstance(task_id, str) or "\0" in task_id:
        raise TypeError(f"the id cannot be stored: {task_id!r:.80}")
    task_id.encode()  # raises ValueError for a lone surrogate


def _check_embedded(embedded: dict[str, Any]) -> None:
    if not embedded.keys() <= _EMBEDDED:
        raise ValueError(f"its body has {', '.join(map(repr, embedded.keys() - _EMBEDDED))}")
    for name, value in embedded.items():
        if value and not all(isinstance(part, dict) for part in ([value] if name == "chord" else value)):
            raise TypeError(f"{name} holds what is no signature")


def _instead_of(headers: Mapping[str, Any], app: Celery) -> dict[str, Any]:
    """The headers of a request for a message that nobody has signed: its task's name and its id, to be refused."""
    name, task_id = headers["task"], headers["id"]
    _security.warning(
        "the message of task %.200r (%.200r) is not signed, or not by us, or not as it was then: it is refused",
        name,
        task_id,
        extra={"refused_task_name": name, "refused_task_id": task_id},
    )
    _check_id(task_id)
    if not records(app) and _has_result(app, task_id):
        raise InvalidTaskError("it is not signed, and its failure would take the place of a result")
    return {"task": name, "id": task_id, "lang": "py", HEADER: dict(REFUSED)}


def _has_result(app: Celery, task_id: str) -> bool:
    try:
        return bool(app.backend.get_state(task_id) != states.PENDING)
    except Exception:  # unknown, then
        return True


def _bare(error: Any) -> Any:
    """The exception itself, where the pool has wrapped it to carry its traceback along."""
    return error.exc if isinstance(error, ExceptionWithTraceback) else error
