"""The context in threads that a task, or any other code, starts.

asyncio carries context variables to its tasks and to ``asyncio.to_thread`` by itself; threads begin without any.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

from celery._state import _task_stack, get_current_task  # type: ignore[attr-defined]  # left out of the stubs

from .context import current_tenant
from .errors import TaskDefinitionError
from .headers import running
from .runs import run_of_context
from .variables import MISSING, Activation, registered_vars

__all__ = ["ContextThreadPoolExecutor", "in_task", "wrap"]

_LATER = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)

P = ParamSpec("P")
R = TypeVar("R")


def wrap(function: Callable[P, R], /) -> Callable[P, R]:
    """A function that runs with the context of the code that wraps it, in whatever thread.

    Tenant and registered variables are those of the moment when it is wrapped; the running task, if there is one, is
    known there as well, to log records and to what is launched.  Afterwards the thread's own context is back.

    ::

        threading.Thread(target=wrap(export), args=(1,)).start()

    Raises:
        TaskDefinitionError: (a TypeError) the function is no plain one: what ``async def`` and generator functions
            return runs later, and asyncio carries the context by itself.
    """
    called = function if inspect.isroutine(function) else getattr(type(function), "__call__", function)  # noqa: B004
    if any(is_later(each) for is_later in _LATER for each in (function, called)):
        raise TaskDefinitionError(f"wrap() takes a plain function; {function!r} would run after the call")
    if not callable(function):
        raise TaskDefinitionError(f"wrap() takes a function, not {type(function).__name__}")
    tenant = current_tenant()
    values = {name: registered.value() for name, registered in registered_vars().items()}
    variables = {name: value for name, value in values.items() if value is not MISSING}
    as_task = in_task()

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with Activation(tenant, variables, are_loaded=True):
            with as_task():
                returned = function(*args, **kwargs)
            if inspect.isgenerator(returned) or inspect.iscoroutine(returned) or inspect.isasyncgen(returned):
                raise TaskDefinitionError(f"wrap() takes a plain function; {function!r} returned what runs later")
            return returned

    return run


def in_task() -> Callable[[], AbstractContextManager[None]]:
    """What makes the running task known in another thread, where there is one: ``with as_task(): ...``.

    With its run on an event loop, so that a thread that goes on after the task starts nothing more there.
    """
    task: Any = get_current_task()
    request: Any = None if task is None else task.request_stack.top
    state, run = running.get(), run_of_context.get()

    @contextmanager
    def as_task() -> Iterator[None]:
        of_state, of_run = running.set(state), run_of_context.set(run)
        if request is not None:
            _task_stack.push(task)
            task.request_stack.push(request)
        try:
            yield
        finally:
            if request is not None:
                task.request_stack.pop()
                _task_stack.pop()
            run_of_context.reset(of_run)
            running.reset(of_state)

    return as_task


class ContextThreadPoolExecutor(ThreadPoolExecutor):
    """A ThreadPoolExecutor whose calls have the context of the code that submits them."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """As ThreadPoolExecutor's; ``map`` goes through it, too."""
        return super().submit(wrap(fn), *args, **kwargs)
