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
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from celery.exceptions import Reject
from celery.signals import task_postrun

from .errors import ConfigurationError, HookTimeoutError, TaskDefinitionError
from .failures import text_of
from .headers import state_of
from .loops import run_coroutine
from .outcomes import TaskOutcome, log_outcome, log_requeued, outcome_of
from .propagation import is_installed
from .retry import ExceptionTypes, exception_types
from .states import State
from .threads import in_task

if TYPE_CHECKING:
    from celery import Celery, Task
    from celery.app.task import Context

__all__ = [
    "TaskOutcome",
    "has_async_hooks",
    "install",
    "on_tenant_failure",
    "on_tenant_retry",
    "on_tenant_success",
    "publish_hooks",
    "run_hooks",
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
        # An attempt may be followed by another without an error: self.retry() by hand.
        return isinstance(error, self.error) or (error is None and BaseException in self.error)


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
        ConfigurationError: what is decorated is no function, or ``task`` no str.
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
    if not isinstance(task, str):
        raise ConfigurationError(f"task must be the name of tasks, such as 'reports.*', not {task!r}")

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
    own = getattr(task, _NAMES[state], None)
    if own is not None and not getattr(own, "does_nothing", False):
        yield own
    for each in _registered.get(task.app, ()):
        if each.is_for(task.name, state, error):
            yield each.hook


def has_async_hooks(task: Any) -> bool:
    """Whether a hook of the task's is ``async def``, its own or one for many."""
    hooks = [getattr(task, name, None) for name in _NAMES.values()]
    hooks += [each.hook for each in _registered.get(task.app, ()) if fnmatch.fnmatchcase(task.name, each.task)]
    return any(map(_is_async, hooks))


def _is_async(hook: Any) -> bool:
    return inspect.iscoroutinefunction(inspect.unwrap(hook))


# --- running them ------------------------------------------------------------------------------------------------

_left: list[threading.Thread] = []  # of hooks that have taken too long


def run_hooks(outcome: TaskOutcome) -> None:
    """Run all that there are, in the running context; nothing that they do or raise comes out."""
    for hook in _hooks(outcome.task, outcome.state, outcome.error):
        try:
            _run(hook, outcome)
        except Exception as error:
            _log.error(
                "hook %s of task %s failed, which changes nothing: %s: %s",
                getattr(hook, "__qualname__", hook),
                outcome.name,
                type(error).__name__,
                text_of(error),
                exc_info=error,
            )


def _run(hook: Hook, outcome: TaskOutcome) -> None:
    task = outcome.task
    limit: float = task.hook_time_limit
    if _is_async(hook):
        run_coroutine(
            _within(limit, hook, outcome), name=task.name, grace=task.cleanup_grace, factory=task._loop_factory
        )
    else:
        _run_in_thread(limit, hook, outcome)


async def _within(limit: float, hook: Callable[[TaskOutcome], Any], outcome: TaskOutcome) -> None:
    try:
        async with asyncio.timeout(limit) as timeout:
            await hook(outcome)
    except TimeoutError:
        if timeout.expired():
            raise HookTimeoutError(f"it did not end within {limit:g} s") from None
        raise


def _run_in_thread(limit: float, hook: Hook, outcome: TaskOutcome) -> None:
    """In a thread of its own, since nothing else can be left alone when it does not end."""
    _left[:] = [thread for thread in _left if thread.is_alive()]
    if len(_left) >= MOST_LEFT:
        raise HookTimeoutError(f"it was not run: {len(_left)} hooks before it have not ended yet")
    context, as_task, failed = copy_context(), in_task(), []

    def run() -> None:
        try:
            with as_task():
                context.run(hook, outcome)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=f"hook of {outcome.name}", daemon=True)
    thread.start()
    try:
        thread.join(limit)
    finally:
        if thread.is_alive():
            _left.append(thread)
    if thread.is_alive():
        raise HookTimeoutError(f"it did not end within {limit:g} s")
    for error in failed:
        raise error if isinstance(error, Exception) else RuntimeError(f"it raised {error!r}")


def _ended(sender: Task[Any, Any], state: str | None = None, retval: Any = None, **_: Any) -> None:
    """task_postrun, while the task's context is still there."""
    if not is_installed(sender.app) or state is None:
        return
    request = sender.request
    known = state_of(request)
    if isinstance(retval, Reject) and getattr(retval, "requeue", False):
        log_requeued(sender, request)
    outcome = outcome_of(sender, request, state, retval)
    if outcome is None:
        return
    log_outcome(outcome)
    # A run that comes after the end (its message was delivered again) has been told of.
    if outcome.tenant is not None and not (known and known.is_superseded):
        run_hooks(outcome)


# --- what a worker's main process decides ------------------------------------------------------------------------


def publish_hooks(outcome: TaskOutcome, request: Context) -> None:
    """Let a worker of the task's queue run the hooks, at least once; nothing if there are none."""
    task = outcome.task
    if outcome.tenant is None or next(_hooks(task, outcome.state, outcome.error), None) is None:
        return
    delivery: Mapping[str, Any] = request.delivery_info or {}
    told = {
        "task": outcome.name,
        "task_id": outcome.task_id,
        "root_id": outcome.root_id,
        "state": outcome.state.value,
        "error": task.backend.prepare_exception(outcome.error, serializer="json"),
        "reason": outcome.reason,
        "retries": outcome.retries,
        "countdown": outcome.countdown,
        "duration": outcome.duration,
    }
    destination = {key: delivery[key] for key in ("exchange", "routing_key") if delivery.get(key) is not None}
    task.app.tasks[RUN_HOOKS].apply_async((told,), **destination)


def told_outcome(app: Celery, told: Mapping[str, Any], tenant: Any) -> TaskOutcome:
    """What :func:`publish_hooks` has published.

    Raises:
        KeyError: the application has no such task.
    """
    return TaskOutcome(
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


def install() -> None:
    """Run hooks from now on; again it changes nothing."""
    task_postrun.connect(_ended, weak=False, dispatch_uid=_UID)


def uninstall() -> None:
    """Undo :func:`install`."""
    task_postrun.disconnect(dispatch_uid=_UID)
