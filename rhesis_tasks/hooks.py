"""What an application does when a task has ended: hooks of the task, and hooks for many tasks.

They run where the attempt has ended, under the context that its message carried, after its outcome is stored.  What
they do changes nothing about the task: what they raise is logged, and one that takes too long is not waited for.
Outcomes that a worker's main process decides (a time limit, a lost process) are told by a task instead.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from celery import Celery
from celery import states as celery_states
from celery._state import _task_stack  # type: ignore[attr-defined]  # left out of the stubs
from celery.app.task import Context
from celery.backends.base import Backend
from celery.exceptions import Reject
from celery.signals import task_postrun

from .context import TenantContext, current_tenant
from .errors import ConfigurationError, HookTimeoutError, TaskDefinitionError
from .failures import redact_exception, redact_text, task_cut_off
from .headers import RequestState, capture, keep_state, state_of
from .loops import run_coroutine
from .outcomes import TaskOutcome, log_outcome, log_requeued, named, outcome_of, with_traceback
from .propagation import is_installed, renew
from .retry import ExceptionTypes, exception_types
from .states import State
from .threads import in_task

if TYPE_CHECKING:
    from celery import Task

__all__ = [
    "TaskOutcome",
    "has_async_hooks",
    "install",
    "on_tenant_failure",
    "on_tenant_retry",
    "on_tenant_success",
    "publish_hooks",
    "run_hooks",
    "run_published",
    "uninstall",
]

Hook: TypeAlias = Callable[[TaskOutcome], object]
HookT = TypeVar("HookT", bound=Hook)
MethodT = TypeVar("MethodT", bound=Callable[..., object])

RUN_HOOKS: Final = "rhesis_tasks.run_hooks"
"""The name of the task that tells outcomes which a worker's main process has decided."""

MOST_LEFT: Final = 20
"""So many hooks may still run in a process after their time; then it runs no others."""

_UID: Final = "rhesis_tasks.hooks"
_NAMES: Final[Mapping[State, str]] = {
    State.SUCCESS: "on_tenant_success",
    State.FAILURE: "on_tenant_failure",
    State.RETRY: "on_tenant_retry",
}
_log = logging.getLogger(__name__)


# --- which there are ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Registered:
    state: State
    hook: Hook
    task: str  # a pattern
    error: ExceptionTypes

    def is_for(self, name: str, state: State, error: BaseException | None) -> bool:
        if state is not self.state or not fnmatch.fnmatchcase(name, self.task):
            return False
        # There is none after a success, and after a self.retry() by hand.
        return self.error == (BaseException,) or isinstance(error, self.error)


_registered: weakref.WeakKeyDictionary[Celery, list[_Registered]] = weakref.WeakKeyDictionary()


def on_tenant_success(app: Celery, *, task: str = "*") -> Callable[[HookT], HookT]:
    """Call a function whenever a tenant's task has succeeded.

    ::

        @on_tenant_success(app, task="reports.*")
        def tell(outcome: TaskOutcome) -> None: ...

    It may be ``async def``, and decorated with :func:`~rhesis_tasks.tenant_session`.

    Args:
        app: the application whose tasks are meant.
        task: a task's name, or a pattern of names: ``reports.*``.

    Raises:
        ConfigurationError: ``app`` is no application, what is decorated no function, or ``task`` no str.
    """
    return _registering(app, State.SUCCESS, task, (BaseException,))


def on_tenant_failure(
    app: Celery, *, task: str = "*", error: type[BaseException] | ExceptionTypes = (BaseException,)
) -> Callable[[HookT], HookT]:
    """The same for tasks that have failed for good.

    Args:
        app: the application whose tasks are meant.
        task: a task's name, or a pattern of names: ``reports.*``.
        error: which exceptions are meant.

    Raises:
        ConfigurationError: also if ``error`` is no exception class.
    """
    return _registering(app, State.FAILURE, task, exception_types("error", error))


def on_tenant_retry(
    app: Celery, *, task: str = "*", error: type[BaseException] | ExceptionTypes = (BaseException,)
) -> Callable[[HookT], HookT]:
    """The same for attempts that have failed and are followed by another one."""
    return _registering(app, State.RETRY, task, exception_types("error", error))


def _registering(app: Celery, state: State, task: str, error: ExceptionTypes) -> Callable[[HookT], HookT]:
    if not isinstance(app, Celery):
        raise ConfigurationError(f"{_NAMES[state]} takes the application, as in @{_NAMES[state]}(app), not {app!r}")
    if not isinstance(task, str):
        raise ConfigurationError(f"task must be the name of tasks, such as 'reports.*', not {task!r}")
    if not error:
        raise ConfigurationError("error names no exception class, so nothing would be called.  Leave it out for all")

    def register(hook: HookT) -> HookT:
        if not callable(hook):
            raise ConfigurationError(f"{_NAMES[state]} decorates a function, not {hook!r}")
        _registered.setdefault(app, []).append(_Registered(state, hook, task, error))
        return hook

    return register


def does_nothing(method: MethodT) -> MethodT:
    """Marks a task's hook that nobody has replaced."""
    method.does_nothing = True  # type: ignore[attr-defined]
    return method


def check(task: Any) -> None:
    """Look at a task's own hooks, when it is made.

    Raises:
        TaskDefinitionError: one is no function.
    """
    for name in _NAMES.values():
        own = getattr(task, name, does_nothing)
        if not callable(own):
            raise TaskDefinitionError(f"{name} of task {task.name} must be a function of the outcome, not {own!r}")


def _hooks(task: Any, state: State, error: BaseException | None) -> Iterator[Hook]:
    if task.name == RUN_HOOKS:
        return  # or a hook that ends its process would be told of that, and end the next one
    own = getattr(task, _NAMES[state], None)
    if own is not None and not getattr(own, "does_nothing", False):
        yield own
    for each in tuple(_registered.get(task.app, ())):
        if each.is_for(task.name, state, error):
            yield each.hook


def has_async_hooks(task: Any) -> bool:
    """Whether a hook of the task's is ``async def``, its own or one for many."""
    hooks: list[Any] = [getattr(task, name, None) for name in _NAMES.values()]
    hooks += [each.hook for each in _registered.get(task.app, ()) if fnmatch.fnmatchcase(task.name, each.task)]
    return any(_is_async(each) or _is_async(inspect.unwrap(each)) for each in hooks)


def _is_async(hook: Any) -> bool:
    called = hook if inspect.isroutine(hook) else getattr(type(hook), "__call__", hook)  # noqa: B004
    return inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(called)


# --- running them ------------------------------------------------------------------------------------------------

_left: set[threading.Thread] = set()  # of hooks that have taken too long
_lock = threading.Lock()


def run_hooks(outcome: TaskOutcome) -> None:
    """Run all that there are, in the running context; nothing that they do or raise comes out."""
    for hook in _hooks(outcome.task, outcome.state, outcome.error):
        try:
            _run(hook, outcome)
        except Exception as error:
            app = outcome.task.app
            line = f"hook {_name(hook)} of task {outcome.name} failed, which changes nothing"
            line, traced = with_traceback(app, f"{line}: {redact_text(app, named(error))}", error)
            _log.error("%s", line, exc_info=traced)


def _run(hook: Hook, outcome: TaskOutcome) -> None:
    # Calling an async function runs nothing of it yet.
    returned = hook(outcome) if _is_async(hook) else _run_in_thread(hook, outcome)
    if inspect.isawaitable(returned):
        task = outcome.task
        waiting = _within(task.hook_time_limit, returned, _name(hook))
        run_coroutine(waiting, name=task.name, grace=task.cleanup_grace, factory=task._loop_factory)


def _name(hook: Hook) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


async def _within(limit: float, awaitable: Awaitable[object], name: str) -> None:
    """As a task of the loop, which is left alone if it goes on when it is cancelled."""
    contained: Any = _contained(awaitable)
    contained.__qualname__ = name  # for the log
    running = asyncio.create_task(contained)
    await asyncio.wait({running}, timeout=limit)
    if not running.done():
        raise HookTimeoutError(f"it did not end within {limit:g} s")
    running.result()


async def _contained(awaitable: Awaitable[object]) -> object:
    try:
        return await awaitable
    except (Exception, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:  # which would end the loop
        raise RuntimeError(f"it raised {error!r}") from error


def _run_in_thread(hook: Hook, outcome: TaskOutcome) -> object:
    """In a thread of its own, since nothing else can be left alone when it does not end."""
    limit: float = outcome.task.hook_time_limit
    with _lock:
        _left.intersection_update([thread for thread in _left if thread.is_alive()])
        left = len(_left)
    if left >= MOST_LEFT:
        raise HookTimeoutError(f"it was not run: {left} hooks before it have not ended yet")
    context, as_task = copy_context(), in_task()
    returned: list[object] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with as_task():
                returned.append(context.run(hook, outcome))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=f"hook of {outcome.name}", daemon=True)
    thread.start()
    try:
        thread.join(limit)
    finally:
        if thread.is_alive():
            with _lock:
                _left.add(thread)
    for result in returned:
        return result
    for error in failed:
        if isinstance(error, Exception):
            raise error
        raise RuntimeError(f"it raised {error!r}") from error
    raise HookTimeoutError(f"it did not end within {limit:g} s")


def _ended(sender: Task[Any, Any], state: str | None = None, retval: Any = None, **_: Any) -> None:
    """task_postrun, while the task's context is still there."""
    if not is_installed(sender.app):
        return
    request = sender.request
    known = state_of(request)
    if known is not None:
        known.has_ended = True  # whatever the outcome
    if state is None:
        # Raised through, to the caller of an eager task (task_eager_propagates), or out of a worker's process.
        raised = sys.exception() if request.is_eager else None
        if not isinstance(raised, Exception):
            return
        state, retval = celery_states.FAILURE, raised
    if isinstance(retval, Reject) and getattr(retval, "requeue", False):
        log_requeued(sender, request)
    outcome = outcome_of(sender, request, state, retval)
    if outcome is None:
        return
    log_outcome(outcome)
    # A run that comes after the end (its message was delivered again) has been told of.  What was refused has run for
    # nobody, whoever its message names.
    if known is None or outcome.tenant is None or known.is_superseded or known.refusal is not None:
        return
    renew(known)  # whatever other receivers and Celery's own hooks have left
    run_hooks(outcome)


# --- what a worker's main process decides ------------------------------------------------------------------------


def publish_hooks(outcome: TaskOutcome, request: Context) -> None:
    """Let a worker of the task's queue run the hooks, at least once; nothing if there are none."""
    _publish(outcome, _destination(request.delivery_info or {}))


def _publish(outcome: TaskOutcome, destination: Mapping[str, Any]) -> None:
    task = outcome.task
    if outcome.tenant is None or next(_hooks(task, outcome.state, outcome.error), None) is None:
        return
    error: Any = outcome.error
    told = {
        "task": outcome.name,
        "task_id": outcome.task_id,
        "root_id": outcome.root_id,
        "state": outcome.state.value,
        # As the base class does it, since not all result backends redact; the message lies in the broker.
        "error": redact_exception(task.app, Backend.prepare_exception(task.backend, error, "json")),
        "reason": outcome.reason,
        "retries": outcome.retries,
        "countdown": outcome.countdown,
        "duration": outcome.duration,
    }
    task.app.tasks[RUN_HOOKS].apply_async((told,), **destination)


def _destination(delivery: Mapping[str, Any]) -> dict[str, Any]:
    """To where a message came from.  Celery takes no exchange for the default queue's."""
    exchange, routing_key = delivery.get("exchange"), delivery.get("routing_key")
    if not exchange:
        return {"queue": routing_key} if routing_key else {}
    return {"exchange": exchange, "routing_key": routing_key}


def _cut_off(
    sender: Celery,
    signature: Mapping[str, Any],
    error: BaseException,
    reason: str | None,
    root_id: str | None,
    **_: Any,
) -> None:
    """task_cut_off, in the context of the task that never begins: wherever that is found out."""
    task = sender.tasks.get(signature["task"]) if is_installed(sender) else None
    if task is None:
        return
    outcome = TaskOutcome(
        task=task,
        task_id=signature["options"]["task_id"],
        root_id=root_id,
        tenant=current_tenant(),
        state=State.FAILURE,
        error=error,
        reason=reason,
    )
    with _as_ended(outcome):
        log_outcome(outcome, has_traceback=False)
        try:
            _publish(outcome, _route(task, signature))
        except Exception:
            _log.exception("the hooks of task %s[%s] cannot be run", outcome.name, outcome.task_id)


def _route(task: Any, signature: Mapping[str, Any]) -> dict[str, Any]:
    """To where the message of a task would have gone."""
    options = signature.get("options") or {}
    names = ("queue", "exchange", "routing_key")
    asked = {name: options.get(name) or getattr(task, name, None) for name in names}
    asked = {name: value for name, value in asked.items() if value is not None}
    route = task.app.amqp.router.route(asked, task.name, signature.get("args"), signature.get("kwargs"), task)
    return {name: route[name] for name in names if route.get(name) is not None}


def run_published(app: Celery, told: Mapping[str, Any], tenant: TenantContext) -> None:
    """Run the hooks for what :func:`publish_hooks` has published, with a request as the ended task had one.

    Raises:
        KeyError: the application has no such task.
    """
    outcome = TaskOutcome(
        task=app.tasks[told["task"]],
        task_id=told["task_id"],
        root_id=told["root_id"],
        tenant=tenant,
        state=State(told["state"]),
        error=app.backend.exception_to_python(told["error"]),
        reason=told["reason"],
        retries=told["retries"],
        countdown=told.get("countdown"),
        duration=told["duration"],
    )
    with _as_ended(outcome):
        run_hooks(outcome)


@contextmanager
def _as_ended(outcome: TaskOutcome) -> Iterator[None]:
    """In the running context, with a request as the task would have had when it ended."""
    task, tenant = outcome.task, outcome.tenant
    request = Context(
        id=outcome.task_id,
        task=outcome.name,
        root_id=outcome.root_id,
        retries=outcome.retries,
        called_directly=False,
        delivery_info={},
        organization_id=tenant and tenant.organization_id,
        user_id=tenant and tenant.user_id,
    )
    state = RequestState(task=task, activation=None, envelope=capture(), tenant=tenant, is_running=True, has_ended=True)
    keep_state(request, state)
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        yield
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def install() -> None:
    """Run hooks from now on; again it changes nothing."""
    task_postrun.connect(_ended, weak=False, dispatch_uid=_UID)
    task_cut_off.connect(_cut_off, weak=False, dispatch_uid=_UID)


def uninstall() -> None:
    """Undo :func:`install`."""
    task_postrun.disconnect(dispatch_uid=_UID)
    task_cut_off.disconnect(dispatch_uid=_UID)
