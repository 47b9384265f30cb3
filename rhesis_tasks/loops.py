"""Where the coroutine of an ``async def`` task runs: one event loop for each thread that runs tasks.

A loop is used again by the thread's next task, which may be another tenant's.  So no coroutine of a run outlives it:
what it has started is cancelled and waited for, and a loop on which something would not end is given up, with its
connections.  (``asyncio.Runner`` would wait for such a thing for ever, and does not clear up between two runs.)
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from enum import IntEnum
from typing import Any, ParamSpec, TypeAlias, TypeVar

from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_shutdown
from typing_extensions import override

from . import soft_limits
from .errors import ConfigurationError, LeftoverError, MissingExtraError, TaskCancelledError
from .postgres.engines import abandon_engines, cut_lent, dispose_engines
from .threads import in_task

__all__ = ["LoopFactory", "close_loops", "loop_factory", "run_coroutine"]

P = ParamSpec("P")
T = TypeVar("T")
LoopFactory: TypeAlias = "Callable[[], _Loop]"

_log = logging.getLogger(__name__)
_run: ContextVar[_Run | None] = ContextVar("rhesis_tasks.run", default=None)
_all_tasks: Any = getattr(asyncio.tasks, "_all_tasks", None)


def loop_factory(name: str) -> LoopFactory:
    """What makes event loops of a kind: ``asyncio`` or ``uvloop``.

    Raises:
        ConfigurationError: there is no such kind.
        MissingExtraError: uvloop is not installed.
    """
    if name == "asyncio":
        return _of_runs(asyncio.SelectorEventLoop)
    if name != "uvloop":
        raise ConfigurationError(f"event_loop= is 'asyncio' or 'uvloop', not {name!r}")
    try:
        import uvloop
    except ImportError as error:
        raise MissingExtraError.of("uvloop", "uvloop") from error
    return _of_runs(uvloop.Loop)


def run_coroutine(coroutine: Coroutine[Any, Any, T], *, name: str, grace: float, factory: LoopFactory) -> T:
    """Run a task's coroutine to its end, on the loop of this thread.

    Where a loop is running already (a task run eagerly by an asynchronous route), in a thread with the same context.

    Args:
        coroutine: the task's body.
        name: the task's, for the log.
        grace: seconds that what is cancelled gets to clean up.
        factory: what makes the loop, if the thread has none: see :func:`loop_factory`.

    Returns:
        What the coroutine returns.

    Raises:
        SoftTimeLimitExceeded: the soft time limit was reached, and the coroutine did not end with something else.
        TaskCancelledError: it was cancelled by something else.
        BaseException: whatever it raises.
    """
    if asyncio._get_running_loop() is None:
        return _loop_of_thread(factory).run(coroutine, name, grace)

    def run_and_close() -> T:
        try:
            return _loop_of_thread(factory).run(coroutine, name, grace)
        finally:
            close_loops()

    with _LoopExecutor(1, name=name) as executor:
        result: T = executor.submit(run_and_close).result()
    return result


# --- one run -----------------------------------------------------------------------------------------------------


class _Phase(IntEnum):
    BEFORE = 0
    RUNNING = 1
    CLEARING = 2  #: the coroutine has ended, and what it has left is ended
    OVER = 3  #: nothing more may start


class _Run:
    """One task's coroutine on a loop, and everything that it starts."""

    phase = _Phase.BEFORE
    is_clear = False  #: nothing is left
    is_interrupted = False  #: the soft time limit was reached
    is_given_up = False  #: ... and it did not end then

    _body: asyncio.Task[Any] | None = None
    _noticed = False  # the loop has heard of the soft time limit
    _giving_up: asyncio.TimerHandle | None = None
    # Made when there is one, since most runs have none.
    _tasks: weakref.WeakSet[asyncio.Task[Any]] | None = None
    _timers: weakref.WeakSet[asyncio.TimerHandle] | None = None

    def __init__(self, loop: _Loop, name: str, grace: float) -> None:
        self.name = name
        self.grace = grace
        self._loop = loop
        # Asynchronous generators that have begun, by their ids, since a weak reference is dead when one is dropped.
        self._generators: dict[int, tuple[weakref.ref[AsyncGenerator[Any, Any]], Context]] = {}
        self._dropped: deque[tuple[AsyncGenerator[Any, Any], Context]] = deque()
        self._closing: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The task that runs the coroutine, with a copy of the running context."""
        context = copy_context()  # not kept: it has the run, and both would wait for the garbage collector
        context.run(_run.set, self)
        # Not by the loop's create_task(): this is none of the tasks that the coroutine starts.
        self._body = body = asyncio.Task(self._through(coroutine), loop=self._loop, context=context)
        body.add_done_callback(self._stop_loop)
        return body

    async def _through(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self.phase = _Phase.RUNNING
        self.watch_generators()
        succeeded = False
        try:
            result = await coroutine
            succeeded = True
            return result
        finally:
            self.phase = _Phase.CLEARING
            if self._giving_up is not None:
                self._giving_up.cancel()
            try:
                if self._tasks or self._generators or self._dropped or self._left():
                    await self._clear(logging.WARNING if succeeded else logging.INFO)
                else:
                    self._finish()
                if cut_lent(self._loop):
                    for _ in range(3):  # their transports close when they are called back
                        await asyncio.sleep(0)
            finally:
                self.phase = _Phase.OVER
                self._spare_turn()

    def _stop_loop(self, _: object = None) -> None:
        if self._loop.current is self:
            self._loop.stop()

    def _spare_turn(self) -> None:
        """In the body's last step: stop the loop now if nothing is to be called any more, and not by a callback."""
        body, ready = self._body, getattr(self._loop, "_ready", ())  # uvloop calls what is ready before it stops
        if body is not None and not ready and len(getattr(body, "_callbacks", ())) == 1:
            body.remove_done_callback(self._stop_loop)
            self._stop_loop()

    def _finish(self) -> None:
        """Nothing is left; and nothing more starts, beginning with what comes in this turn of the loop."""
        self.is_clear = True
        self.phase = _Phase.OVER
        for timer in self._timers or ():
            timer.cancel()

    def forget(self) -> None:
        """Refer to nothing any more."""
        self.phase = _Phase.OVER
        self._body = None  # whose context has the run

    def register(self, task: asyncio.Task[Any]) -> None:
        """Called for each task that is started on the loop."""
        if self._tasks is None:
            self._tasks = weakref.WeakSet()
        self._tasks.add(task)

    def register_timer(self, timer: asyncio.TimerHandle) -> None:
        """Called for each timer that is set on the loop."""
        if self._timers is None:
            self._timers = weakref.WeakSet()
        self._timers.add(timer)

    # --- asynchronous generators -----------------------------------------------------------------------------

    def watch_generators(self) -> None:
        """Until the loop stops.  Its own hooks would close one in whatever context, and thread, it is found in."""
        sys.set_asyncgen_hooks(self._remember, self._close_later)

    def _remember(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Called for each when it begins."""
        self._generators[id(generator)] = weakref.ref(generator), copy_context()

    def _close_later(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Called for each that is dropped before its end, by whatever thread."""
        _, context = self._generators.pop(id(generator), (None, Context()))
        self._dropped.append((generator, context))
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._close_dropped)

    def _close_dropped(self) -> None:
        """Close those that were dropped, each in the context in which it has begun."""
        while self._dropped and self.phase < _Phase.OVER:
            generator, context = self._dropped.popleft()
            closing = self._loop.create_task(generator.aclose(), context=context)
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    # --- what it leaves --------------------------------------------------------------------------------------

    def _left(self) -> list[asyncio.Task[Any]]:
        """The loop's tasks that are not done, but for the body's and the running one."""
        if _all_tasks is not None and len(_all_tasks) == 1:
            return []  # the body's
        tasks = asyncio.all_tasks(self._loop)
        tasks -= {self._body, asyncio.current_task(self._loop)}
        return list(tasks)

    async def _clear(self, level: int) -> None:
        """End what was started, whoever cancels this meanwhile: a timer of the task's that nobody took back may."""
        clearing = asyncio.create_task(self._end_all(level))
        while not clearing.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({clearing})
        clearing.result()

    async def _end_all(self, level: int) -> None:
        """Cancel what was started and is not done, and wait until it is."""
        deadline = self._loop.time() + self.grace
        # First what the body has dropped, which may end by itself what it has started, as a batch does.
        self._close_dropped()
        if self._closing:
            await asyncio.wait(self._closing, timeout=self.grace)
        left = self._left()
        if left:
            _log.log(level, "task %s left %s behind: cancelled", self.name, _named(left))
        while True:
            if not left:  # no task is in the middle of a generator any more
                self._drop_generators()
                self._close_dropped()
                left = list(self._closing)
                if not left:
                    break
            else:
                for task in left:
                    task.cancel()
            _, pending = await asyncio.wait(left, timeout=max(0.0, deadline - self._loop.time()))
            left = self._left()
            # What ends in time may have started others, again and again.
            if pending or ((left or self._generators) and self._loop.time() >= deadline):
                named = _named(pending or left) or "what generators begin"
                _log.error("task %s: %s did not end in %g s", self.name, named, self.grace)
                return
        self._finish()
        self._report_failures()

    def _drop_generators(self) -> None:
        """Those that somebody holds."""
        begun = [(generator(), context) for generator, context in self._generators.values()]
        self._generators.clear()
        self._dropped.extend((generator, context) for generator, context in begun if generator is not None)

    def _report_failures(self) -> None:
        """Say now what asyncio would say when the tasks are collected, in whatever context that is."""
        for task in self._tasks or ():
            if task.done() and getattr(task, "_log_traceback", False):
                error = task.exception()
                _log.error("task %s: %s failed, and nobody looked", self.name, _named([task]), exc_info=error)

    # --- its soft time limit ---------------------------------------------------------------------------------

    @property
    def wants_interruption(self) -> bool:
        return self.phase < _Phase.OVER and not self._noticed

    @property
    def is_in_code(self) -> bool:
        return asyncio.current_task(self._loop) is not None

    def interrupt(self) -> None:
        if not self.is_interrupted:
            self.is_interrupted = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._noticed = True
        if self._body is not None and self.phase < _Phase.CLEARING:
            self._body.cancel()
            self._giving_up = self._loop.call_later(self.grace, self._give_up)

    def _give_up(self) -> None:
        _log.error("task %s did not end within %g s of its soft time limit", self.name, self.grace)
        self.is_given_up = True
        self._loop.stop()


def _named(tasks: Iterable[asyncio.Task[Any]]) -> str:
    names = sorted(getattr(task.get_coro(), "__qualname__", type(task.get_coro()).__name__) for task in tasks)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# --- the loop of a thread ----------------------------------------------------------------------------------------


class _Loop(asyncio.AbstractEventLoop):
    """An event loop on which everything belongs to a run, and that starts nothing for one that is over."""

    current: _Run | None = None
    is_changed: bool  #: a setting of it


@functools.cache
def _of_runs(base: type[Any]) -> LoopFactory:
    """Such a loop of a kind."""

    class Loop(base):  # type: ignore[misc]
        current: _Run | None = None
        is_changed = False

        def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
            context = options.get("context")
            run: _Run | None = _run.get() if context is None else context.get(_run)
            if run is not None and run.phase is _Phase.OVER:
                coroutine.close()
                raise LeftoverError(
                    f"{getattr(coroutine, '__qualname__', 'a coroutine')} of task {run.name} was to be started when "
                    "that was over: by a callback, or by a thread.  Await it in the task"
                )
            task: asyncio.Task[Any] = super().create_task(coroutine, **options)
            if self.current is not None:
                self.current.register(task)
            return task

        def set_task_factory(self, factory: Any) -> None:
            self.is_changed = True
            super().set_task_factory(factory)

        def set_exception_handler(self, handler: Any) -> None:
            self.is_changed = True
            super().set_exception_handler(handler)

        def set_default_executor(self, executor: Any) -> None:
            self.is_changed = True
            super().set_default_executor(executor)

        def set_debug(self, enabled: bool) -> None:
            self.is_changed = True
            super().set_debug(enabled)

        def call_later(self, *args: Any, **options: Any) -> asyncio.TimerHandle:
            return self._of_run(super().call_later(*args, **options))

        def call_at(self, *args: Any, **options: Any) -> asyncio.TimerHandle:
            return self._of_run(super().call_at(*args, **options))

        def _of_run(self, timer: asyncio.TimerHandle) -> asyncio.TimerHandle:
            if self.current is not None:
                self.current.register_timer(timer)
            return timer

    return Loop


class _LoopExecutor(ThreadPoolExecutor):
    """For what a run calls in threads: all of its context and its request, not only what ``to_thread`` would copy."""

    def __init__(self, max_workers: int | None = None, *, name: str = "rhesis-tasks") -> None:
        super().__init__(max_workers, thread_name_prefix=name)
        self._calls: set[Future[Any]] = set()

    @property
    def is_usable(self) -> bool:
        """Whether the next task finds all threads free, and may use them."""
        return not (self._calls or self._shutdown)

    @override
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        context, as_task = copy_context(), in_task()

        def call() -> T:
            with as_task():
                return context.run(fn, *args, **kwargs)

        called = super().submit(call)
        self._calls.add(called)
        called.add_done_callback(self._calls.discard)
        return called


class _TaskLoop:
    """The event loop of one thread."""

    def __init__(self, factory: LoopFactory) -> None:
        self._factory = factory
        self._loop: _Loop | None = None
        self._executor: _LoopExecutor
        self._debug: bool
        self._pid = os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T], name: str, grace: float) -> T:
        """The coroutine's result; afterwards nothing of it is left."""
        if self._loop is None or self._loop.is_closed():
            self._loop = self._new()
        loop = self._loop
        run = loop.current = _Run(loop, name, grace)
        before = soft_limits.limited(run)
        try:
            body = run.start(coroutine)
            loop.run_forever()
            while not (body.done() or run.is_given_up):
                # Somebody has stopped the loop, maybe a callback that an earlier task has left: no end of this.
                loop.call_soon(run.watch_generators)
                loop.run_forever()
            if body.done():
                return body.result()
            raise SoftTimeLimitExceeded
        except asyncio.CancelledError:
            if run.is_interrupted:
                raise SoftTimeLimitExceeded from None
            raise TaskCancelledError(
                f"the coroutine of task {name} was cancelled, or awaited something that was"
            ) from None
        finally:
            try:
                if run.phase is _Phase.BEFORE:  # cancelled before its first step
                    coroutine.close()
                    run.is_clear = True
                if run.is_clear:
                    self._reset(loop)
                else:
                    self._abandon(loop, run)
            finally:
                run.forget()
                loop.current = None
                soft_limits.limited(before)  # last, since a soft time limit must not break into this

    def _new(self) -> _Loop:
        loop = self._factory()
        _open.add(loop)
        self._debug = loop.get_debug()
        self._executor = _LoopExecutor()
        loop.set_default_executor(self._executor)
        return loop

    def _reset(self, loop: _Loop) -> None:
        """What a task may have changed."""
        if loop.is_changed:
            loop.set_task_factory(None)
            loop.set_exception_handler(None)
            loop.set_debug(self._debug)
            loop.set_default_executor(self._executor)
            loop.is_changed = False
        if not self._executor.is_usable:
            # With what may never end the next task might wait for a thread for ever.  A loop whose executor was shut
            # down by the task does not take another one.
            was_shut = self._executor._shutdown
            self._executor.shutdown(wait=False, cancel_futures=True)
            if was_shut:
                self.close()
            else:
                self._executor = _LoopExecutor()
                loop.set_default_executor(self._executor)

    def _abandon(self, loop: _Loop, run: _Run) -> None:
        """Let nothing on a loop go on, whatever it would do."""
        self._loop = None
        left = asyncio.all_tasks(loop)
        try:
            if run.phase is _Phase.RUNNING and not run.is_given_up:
                # Something else than the body's end has stopped the loop, which had no time to clean up yet.
                _cancel_all(loop, left, run.grace)
            run.phase = _Phase.OVER
            abandon_engines(loop)
            loop.call_soon(loop.stop)
            loop.run_forever()  # for transports, which close when they are called back
        finally:
            loop.close()
            _open.discard(loop)
            for task in left:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is in the log already
                    _end(task.get_coro())

    def close(self) -> None:
        """Close the loop, and its pooled connections."""
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed() or loop.is_running() or os.getpid() != self._pid:
            return
        try:
            loop.run_until_complete(asyncio.wait_for(dispose_engines(), 5))
        except Exception as error:
            _log.debug("connections were not closed: %s", error)
        finally:
            loop.close()
            _open.discard(loop)

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


def _end(coroutine: Any) -> None:
    """Let nothing of a coroutine go on, now or when it is collected, not even where it awaits while it is closed."""
    for _ in range(100):
        try:
            coroutine.close()
        except RuntimeError:  # it has awaited
            continue
        except BaseException as error:
            _log.debug("closing %r: %r", coroutine, error)
        return


class _Local(threading.local):
    def __init__(self) -> None:
        self.loops: dict[LoopFactory, _TaskLoop] = {}  #: those of the thread, by what makes them


_local = _Local()

# All that are open, of all threads: a forked child must not even collect its parent's, since closing one changes what
# the parent's waits for.
_open: set[asyncio.AbstractEventLoop] = set()


def _loop_of_thread(factory: LoopFactory) -> _TaskLoop:
    found = _local.loops.get(factory)
    if found is None:
        found = _local.loops[factory] = _TaskLoop(factory)
    return found


def close_loops(**_: Any) -> None:
    """Close the loops of this thread; its next task makes another one."""
    loops, _local.loops = _local.loops, {}
    for loop in loops.values():
        loop.close()


def _forget_loops() -> None:
    global _local
    _local = _Local()


os.register_at_fork(after_in_child=_forget_loops)
atexit.register(close_loops)
worker_process_shutdown.connect(close_loops, weak=False, dispatch_uid="rhesis_tasks.loops.close")
