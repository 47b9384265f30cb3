"""Where the coroutine of an ``async def`` task runs: one event loop for each thread that runs tasks.

A loop is used again by the thread's next task, which may be another tenant's.  So nothing of a run outlives it: what it
has started is cancelled and waited for, and a loop on which something would not end is given up, with its connections.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import functools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_shutdown
from typing_extensions import override

from .errors import ConfigurationError, LeftoverError, MissingExtraError, TaskCancelledError
from .postgres.engines import abandon_engines, dispose_engines
from .threads import ContextThreadPoolExecutor

__all__ = ["LoopFactory", "close_loops", "loop_factory", "run_coroutine"]

P = ParamSpec("P")
T = TypeVar("T")
LoopFactory: TypeAlias = Callable[[], asyncio.AbstractEventLoop]

BLOCKED_AFTER: Final = 1.0
"""Seconds that a loop has to notice a soft time limit, before the code that blocks it is interrupted."""

_log = logging.getLogger(__name__)
_run: ContextVar[_Run | None] = ContextVar("rhesis_tasks.run", default=None)


def loop_factory(name: str) -> LoopFactory:
    """What makes event loops of a kind: ``asyncio`` or ``uvloop``.

    Raises:
        ConfigurationError: there is no such kind.
        MissingExtraError: uvloop is not installed.
    """
    if name == "asyncio":
        return asyncio.new_event_loop
    if name != "uvloop":
        raise ConfigurationError(f"event_loop= is 'asyncio' or 'uvloop', not {name!r}")
    try:
        import uvloop
    except ImportError as error:
        raise MissingExtraError.of("uvloop", "uvloop") from error
    factory: LoopFactory = uvloop.new_event_loop
    return factory


def run_coroutine(
    coroutine: Coroutine[Any, Any, T], *, name: str, grace: float, factory: LoopFactory = asyncio.new_event_loop
) -> T:
    """Run a task's coroutine to its end, on the loop of this thread.

    Where a loop is running already (a task run eagerly by an asynchronous route), in a thread with the same context.

    Args:
        coroutine: the task's body.
        name: the task's, for the log.
        grace: seconds that what is cancelled gets to clean up.
        factory: what makes the loop, if the thread has none.

    Returns:
        What the coroutine returns.

    Raises:
        SoftTimeLimitExceeded: the soft time limit was reached, and the coroutine did not end with something else.
        TaskCancelledError: it was cancelled by something else.
        BaseException: whatever it raises.
    """
    if asyncio._get_running_loop() is None:
        return _loop_of_thread(factory).run(_Run(name, grace), coroutine)

    def run_and_close() -> T:
        try:
            return _loop_of_thread(factory).run(_Run(name, grace), coroutine)
        finally:
            close_loops()

    with _LoopExecutor(1, thread_name_prefix=name) as executor:
        result: T = executor.submit(run_and_close).result()
    return result


# --- one run -----------------------------------------------------------------------------------------------------


class _Run:
    """One task's coroutine on a loop, and everything that it starts."""

    def __init__(self, name: str, grace: float) -> None:
        self.name = name
        self.grace = grace
        self.body: asyncio.Task[Any] | None = None
        self.has_ended = False  #: the task's coroutine has, and what it left is being cleared away
        self.is_over = False  #: that is done, too; nothing more may start
        self.is_clear = False  #: nothing is left
        self.is_interrupted = False  #: the soft time limit was reached
        self.noticed = False  #: ... and the loop has heard of it
        self._loop: asyncio.AbstractEventLoop
        self._giving_up: asyncio.TimerHandle | None = None
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] | None = None  # made when there is one: most runs have none
        # Asynchronous generators that have begun, by their ids, since a weak reference is dead when one is dropped.
        self._generators: dict[int, tuple[weakref.ref[AsyncGenerator[Any, Any]], Context]] = {}
        self._dropped: deque[tuple[AsyncGenerator[Any, Any], Context]] = deque()

    def start(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The task that runs the coroutine, with a copy of the running context."""
        self._loop = loop
        context = copy_context()  # not kept: it has the run, and both would wait for the garbage collector
        context.run(_run.set, self)
        # Not by the loop's factory: this is none of the tasks that the coroutine starts.
        self.body = body = asyncio.Task(self._through(coroutine), loop=loop, context=context)
        return body

    async def _through(self, coroutine: Coroutine[Any, Any, T]) -> T:
        # Those of the loop would close a generator in whatever context, even of whatever thread, it is found in.
        sys.set_asyncgen_hooks(self._remember, self._close_later)  # until the loop stops
        succeeded = False
        try:
            result = await coroutine
            succeeded = True
            return result
        finally:
            self.has_ended = True
            if self._giving_up is not None:
                self._giving_up.cancel()
            try:
                left = self._left()
                if left or self._tasks or self._generators or self._dropped:
                    await self._clear(left, logging.WARNING if succeeded else logging.INFO)
                else:
                    self.is_clear = True
            finally:
                self.is_over = True  # before what is left in this turn of the loop

    def _remember(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Called for each asynchronous generator when it begins."""
        self._generators[id(generator)] = weakref.ref(generator), copy_context()

    def _close_later(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Called for each that is dropped before its end, by whatever thread."""
        _, context = self._generators.pop(id(generator), (None, Context()))
        self._dropped.append((generator, context))
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._close_dropped)

    def _close_dropped(self) -> list[asyncio.Task[None]]:
        """Close those that were dropped, each in the context in which it has begun."""
        closing = []
        while self._dropped and not self.is_over:
            generator, context = self._dropped.popleft()
            closing.append(self._loop.create_task(generator.aclose(), context=context))
        return closing

    def register(self, task: asyncio.Task[Any]) -> None:
        """Called for each task that is started in this run's context."""
        if self._tasks is None:
            self._tasks = weakref.WeakSet()
        self._tasks.add(task)

    # --- what it leaves --------------------------------------------------------------------------------------

    def _left(self) -> list[asyncio.Task[Any]]:
        """The loop's tasks that are not done, but for the running one."""
        tasks = asyncio.all_tasks(self._loop)
        tasks.discard(asyncio.current_task(self._loop))
        return list(tasks)

    async def _clear(self, left: list[asyncio.Task[Any]], level: int) -> None:
        """Cancel what was started and is not done, and wait until it is."""
        if left:
            _log.log(level, "task %s left %s behind: cancelled", self.name, _named(left))
        deadline = self._loop.time() + self.grace
        while left or self._generators or self._dropped:
            for task in left:
                task.cancel()
            begun = [(generator(), context) for generator, context in self._generators.values()]
            self._generators.clear()
            self._dropped.extend((generator, context) for generator, context in begun if generator is not None)
            left += self._close_dropped()
            if not left:
                break
            _, pending = await asyncio.wait(left, timeout=max(0.0, deadline - self._loop.time()))
            if pending:
                _log.error("task %s: %s did not end in %g s", self.name, _named(pending), self.grace)
                return
            left = self._left()
        self._report_failures()
        self.is_clear = True

    def _report_failures(self) -> None:
        """Say now what asyncio would say when the tasks are collected, in whatever context that is."""
        for task in self._tasks or ():
            if task.done() and getattr(task, "_log_traceback", False):
                error = task.exception()
                _log.error("task %s: %s failed, and nobody looked", self.name, _named([task]), exc_info=error)

    # --- soft time limits ------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Cancel the coroutine; called by a signal, between any two instructions of the loop's thread."""
        if self.has_ended or self.is_interrupted:
            return
        self.is_interrupted = True
        self._loop.call_soon_threadsafe(self._cancel)
        # By the low-level module, since the signal may have interrupted what holds a lock of threading's.
        _thread.start_new_thread(self._insist, (threading.get_ident(),))

    def _cancel(self) -> None:
        self.noticed = True
        if self.body is not None and not self.has_ended:
            self.body.cancel()
            self._giving_up = self._loop.call_later(self.grace, self._give_up)

    def _give_up(self) -> None:
        _log.error("task %s did not end within %g s of its soft time limit", self.name, self.grace)
        self._loop.stop()

    def _insist(self, thread_id: int) -> None:
        time.sleep(BLOCKED_AFTER)
        while not (self.noticed or self.has_ended):
            _insisting.append(self)
            signal.pthread_kill(thread_id, signal.SIGUSR1)
            time.sleep(BLOCKED_AFTER)

    def break_in(self) -> None:
        """Interrupt code that does not await, as in a synchronous task; called by a signal, too."""
        if not (self.noticed or self.has_ended) and asyncio.current_task(self._loop) is not None:
            raise SoftTimeLimitExceeded


_insisting: deque[_Run] = deque()  # those for which the next signal was sent from here


def _named(tasks: Iterable[asyncio.Task[Any]]) -> str:
    names = sorted(getattr(task.get_coro(), "__qualname__", type(task.get_coro()).__name__) for task in tasks)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _start(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """The factory of a loop's tasks, that starts none for a run that is over."""
    context = options.get("context")
    run: _Run | None = _run.get() if context is None else context.get(_run)
    if run is not None and (run.is_over or run is not getattr(_local, "run", None)):
        coroutine.close()
        raise LeftoverError(
            f"{getattr(coroutine, '__qualname__', 'a coroutine')} of task {run.name} was to be started when that was "
            "over: by a callback, or by a thread.  Await it in the task"
        )
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    if run is not None:
        run.register(task)
    return task


# --- the loop of a thread ----------------------------------------------------------------------------------------


class _LoopExecutor(ContextThreadPoolExecutor):
    """For what a run calls in threads: all of its context, not only what ``asyncio.to_thread`` would copy."""

    @override
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return super().submit(functools.partial(copy_context().run, fn, *args, **kwargs))


class _TaskLoop:
    """The event loop of one thread."""

    def __init__(self, factory: LoopFactory) -> None:
        self._factory = factory
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, run: _Run, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; afterwards nothing of it is left."""
        loop = self._loop = self._loop or self._new()
        _watch_soft_limit()
        _local.run = run
        body = run.start(loop, coroutine)
        try:
            return loop.run_until_complete(body)
        except asyncio.CancelledError:
            if run.is_interrupted:
                raise SoftTimeLimitExceeded from None
            raise TaskCancelledError(
                f"the coroutine of task {run.name} was cancelled, or awaited something that was"
            ) from None
        except RuntimeError:
            if run.is_interrupted and not run.has_ended:  # given up
                raise SoftTimeLimitExceeded from None
            raise
        finally:
            _local.run = None
            if run.is_clear:
                self._reset(loop)
            else:
                self._abandon(loop, run)
            run.body = None  # whose context has the run

    def _new(self) -> asyncio.AbstractEventLoop:
        loop = self._factory()
        loop.set_default_executor(_LoopExecutor(thread_name_prefix="rhesis-tasks"))
        self._reset(loop)
        return loop

    def _reset(self, loop: asyncio.AbstractEventLoop) -> None:
        """What a task may have changed."""
        loop.set_task_factory(_start)
        loop.set_exception_handler(None)

    def _abandon(self, loop: asyncio.AbstractEventLoop, run: _Run) -> None:
        """Let nothing on a loop go on, whatever it would do."""
        self._loop = None
        left = asyncio.all_tasks(loop)
        loop.set_task_factory(None)
        try:
            if not (run.has_ended or run.is_interrupted):
                # Something else than the body's end has stopped the loop, which had no time to clean up yet.
                _cancel_all(loop, left, run.grace)
            abandon_engines(loop)
            loop.call_soon(loop.stop)
            loop.run_forever()  # for transports, which close when they are called back
        finally:
            loop.close()
            for task in left:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is in the log already
                    with suppress(Exception):
                        task.get_coro().close()

    def close(self) -> None:
        """Close the loop, and its pooled connections."""
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed() or loop.is_running():
            return
        loop.set_task_factory(None)
        try:
            loop.run_until_complete(asyncio.wait_for(dispose_engines(), 5))
        except Exception as error:
            _log.debug("connections were not closed: %s", error)
        finally:
            loop.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


def _cancel_all(loop: asyncio.AbstractEventLoop, tasks: Iterable[asyncio.Task[Any]], grace: float) -> None:
    """Cancel a stopped loop's tasks and run it until they are done, or so many seconds."""

    def stop_if_done(_: object) -> None:
        if not asyncio.all_tasks(loop):
            loop.stop()

    for task in tasks:
        task.cancel()
        task.add_done_callback(stop_if_done)
    loop.call_later(grace, loop.stop)
    loop.run_forever()


def _watch_soft_limit() -> None:
    """Let the soft time limit of a prefork pool's process cancel coroutines, instead of breaking into their loop."""
    pool = sys.modules.get("billiard.pool")  # as it is in such a process
    if pool is None or threading.get_ident() != threading.main_thread().ident:
        return
    if signal.getsignal(signal.SIGUSR1) is pool.soft_timeout_sighandler:
        signal.signal(signal.SIGUSR1, _on_soft_limit)


def _on_soft_limit(*_: Any) -> None:
    run = getattr(_local, "run", None)
    if _insisting:
        _insisting.popleft().break_in()
    elif run is not None:
        run.interrupt()
    else:
        raise SoftTimeLimitExceeded  # as the pool's own handler does


_local = threading.local()  # loops: those of the thread by what makes them; run: what runs on one of them


def _loop_of_thread(factory: LoopFactory) -> _TaskLoop:
    loops: dict[LoopFactory, _TaskLoop] = vars(_local).setdefault("loops", {})
    found = loops.get(factory)
    if found is None:
        found = loops[factory] = _TaskLoop(factory)
    return found


def close_loops(**_: Any) -> None:
    """Close the loops of this thread; its next task makes another one."""
    for loop in vars(_local).pop("loops", {}).values():
        loop.close()


_inherited: list[Any] = []  # kept, since closing a loop of the parent's would change what the parent waits for


def _forget_loops() -> None:
    global _local
    _inherited.append(vars(_local).copy())
    _local = threading.local()


os.register_at_fork(after_in_child=_forget_loops)
atexit.register(close_loops)
worker_process_shutdown.connect(close_loops, weak=False, dispatch_uid="rhesis_tasks.loops.close")
