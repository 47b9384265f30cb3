"""How an attempt of a task has ended: the value that hooks get, and the line in the log.

The lines take the place of Celery's own about the same things, on Celery's logger, so that what is set up for that one
holds for them.  They name no arguments and no results.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from celery._state import get_current_task
from celery.exceptions import Ignore, Reject, Retry

from .context import TenantContext
from .failures import reason_of, redact_text, redacts, text_of
from .headers import RequestState, state_of
from .propagation import is_installed
from .states import State

if TYPE_CHECKING:
    from celery import Celery, Task
    from celery.app.task import Context

__all__ = [
    "TaskOutcome",
    "install",
    "log_outcome",
    "log_requeued",
    "log_start",
    "log_unknown",
    "named",
    "outcome_of",
    "told_tenant",
    "uninstall",
    "with_traceback",
]

_log: Final = logging.getLogger("celery.app.trace")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """How an attempt of a task has ended.

    Attributes:
        task: the task.
        task_id: its id.
        root_id: that of the task by which its whole run was launched.
        tenant: whose it is; None for work that belongs to no tenant, or was refused, of which only the log hears.
        state: ``State.SUCCESS``, ``State.FAILURE``, or ``State.RETRY`` if there will be another attempt.
        result: what it returned.
        error: what it raised, or Celery says in its place (a lost process, a time limit).
        reason: why there is no other attempt.
        retries: how many attempts there were before this one.
        countdown: seconds until the next attempt.
        duration: seconds that this attempt took, if that is known.
    """

    task: Any
    task_id: str
    root_id: str | None = None
    tenant: TenantContext | None = None
    state: State
    result: Any = None
    error: BaseException | None = None
    reason: str | None = None
    retries: int = 0
    countdown: float | None = None
    duration: float | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.task.name)

    @property
    def key(self) -> str:
        """The same for the same outcome, however often it is told: for whoever must not act on it twice."""
        return f"{self.task_id}:{self.state}" + (f":{self.retries}" if self.state is State.RETRY else "")


def outcome_of(task: Task[Any, Any], request: Context, celery_state: str, value: Any) -> TaskOutcome | None:
    """How the attempt that Celery has just traced has ended; None if that is none here: where a message is rejected
    it is the worker's main process that knows whether it comes back.

    Args:
        celery_state: as ``task_postrun`` tells it.
        value: what came with it: a result, or what was raised.
    """
    known = state_of(request)
    state, error, countdown = State.FAILURE, value, None
    if celery_state == "SUCCESS":
        state, error = State.SUCCESS, None
    elif isinstance(value, Retry):
        state, error = State.RETRY, value.exc
        countdown = value.when if isinstance(value.when, int | float) else None
    elif isinstance(value, Ignore | Reject):
        return None
    return TaskOutcome(
        task=task,
        task_id=request.id or "",
        root_id=request.root_id,
        tenant=told_tenant(known),
        state=state,
        result=value if state is State.SUCCESS else None,
        error=error,
        reason=_reason(known, error) if state is State.FAILURE else None,
        retries=request.retries or 0,
        countdown=countdown,
        duration=None if known is None or known.began_at is None else time.monotonic() - known.began_at,
    )


def told_tenant(known: RequestState | None) -> TenantContext | None:
    """Under which tenant an outcome is told; None for a refused task, though its record may be its launcher's."""
    return None if known is None or known.refusal is not None else known.tenant


def _reason(known: RequestState | None, error: BaseException | None) -> str | None:
    return (known and known.reason) or reason_of(type(error).__name__)


# --- the log -----------------------------------------------------------------------------------------------------


def log_start(task: Task[Any, Any], request: Context) -> None:
    """Say that an attempt begins."""
    if _log.isEnabledFor(logging.INFO):
        attempt = (request.retries or 0) + 1
        _write(logging.INFO, f"Task {task.name}[{request.id}] started: attempt {attempt}", outcome="started")


def log_requeued(task: Task[Any, Any], request: Context, reason: str | None = None) -> None:
    """Say that the message of an attempt goes back to its queue."""
    because = f": {reason}" if reason else ""
    _write(logging.WARNING, f"Task {task.name}[{request.id}] was put back into its queue{because}", outcome="requeued")


def log_unknown(name: str, task_id: object) -> None:
    """Say that a message is for a task that the worker does not have."""
    reason = reason_of("NotRegistered")
    # As text of one line, since anybody may have sent it.
    name, its_id = (repr(str(each))[1:-1][:200] for each in (name, task_id))
    line = f"Task {name}[{its_id}] failed: NotRegistered ({reason})"
    _write(logging.ERROR, line, outcome="failure", reason=reason, id=its_id, name=name)


def log_outcome(outcome: TaskOutcome, *, has_traceback: bool = True) -> None:
    """Say how it has ended, in one line; that of an unexpected failure has its traceback."""
    error, task = outcome.error, outcome.task
    attempt = outcome.retries + 1
    took = "" if outcome.duration is None else f" in {outcome.duration:.3f} s"
    head = f"Task {outcome.name}[{outcome.task_id}]"
    more: dict[str, Any] = {"attempt": attempt, "duration": outcome.duration}
    if outcome.state is State.SUCCESS:
        if _log.isEnabledFor(logging.INFO):
            _write(logging.INFO, f"{head} succeeded{took} (attempt {attempt})", outcome="success", **more)
        return
    told = "" if error is None else redact_text(task.app, f": {named(error)}")
    if outcome.state is State.RETRY:
        due = "" if outcome.countdown is None else f" in {outcome.countdown:.3g} s"
        line = f"{head} is tried again{due}{told} (attempt {attempt} ended{took})"
        _write(logging.WARNING, line, outcome="retry", countdown=outcome.countdown, **more)
        return
    is_expected = isinstance(error, task.throws or ())
    because = f": {outcome.reason}" if outcome.reason else ""
    line = f"{head} failed{took}{told} (attempt {attempt}{because})"
    shown = None if is_expected or not has_traceback else error
    line, traced = with_traceback(task.app, line, shown)
    level = logging.INFO if is_expected else logging.ERROR
    _write(level, line, traced=traced, outcome="failure", reason=outcome.reason, **more)


def named(error: BaseException) -> str:
    """An exception's type and message."""
    name, message = type(error).__name__, text_of(error)
    if isinstance(error, Reject):
        reason: object = getattr(error, "reason", None)  # the stubs leave it out
        message = "" if reason is None else text_of(reason)
    elif message == f"{name}{error.args}":  # as time limits put it
        message = " ".join(map(text_of, error.args))
    return f"{name}: {message}".rstrip(": ")


def with_traceback(app: Celery, line: str, error: BaseException | None) -> tuple[str, BaseException | None]:
    """A line, and the exception whose traceback goes below it; where texts are redacted, the line has it already."""
    if error is None or error.__traceback__ is None:
        return line, None
    if not redacts(app):
        return line, error
    return f"{line}\n{redact_text(app, ''.join(traceback.format_exception(error)))}", None


def _write(level: int, line: str, traced: BaseException | None = None, **more: Any) -> None:
    _log.log(level, "%s", line, exc_info=traced, extra={f"task_{key}": more[key] for key in more})


class _TellsMore(logging.Filter):
    """Leaves out Celery's own lines about what ours tell, too."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg not in _told_here() or (isinstance(record.args, dict) and record.args.get("internal")):
            return True
        task = get_current_task()
        return task is None or not is_installed(task.app)


@functools.cache
def _told_here() -> frozenset[str]:
    from celery.app import trace  # which imports the worker

    return frozenset({trace.LOG_SUCCESS, trace.LOG_FAILURE, trace.LOG_RETRY, trace.LOG_REJECTED})


_filter: Final = _TellsMore()


def install() -> None:
    """Let our lines take the place of Celery's; again it changes nothing."""
    _log.addFilter(_filter)


def uninstall() -> None:
    """Undo :func:`install`."""
    _log.removeFilter(_filter)
