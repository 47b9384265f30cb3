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
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_shutdown
from typing_extensions import override

from . import soft_limits
from .errors import ConfigurationError, LeftoverError, MissingExtraError, TaskCancelledError
from .postgres.engines import abandon_engines, dispose_engines
from .runs import Phase, Run, RunLoop, run_of_context
from .threads import in_task

__all__ = ["LoopFactory", "close_loops", "loop_factory", "run_coroutine"]

P = ParamSpec("P")
T = TypeVar("T")
LoopFactory: TypeAlias = Callable[[], RunLoop]

TURNS: Final = 10
"""So many turns a loop takes at most for what a task has left to be called back."""

_log = logging.getLogger(__name__)


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


# --- the loop of a thread ----------------------------------------------------------------------------------------


@functools.cache
def _of_runs(base: type[Any]) -> LoopFactory:
    """Such a loop of a kind."""

    class Loop(base):  # type: ignore[misc]
        current: Run | None = None
        is_changed = False

        def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
            context = options.get("context")
            run: Run | None = run_of_context.get() if context is None else context.get(run_of_context)
            if run is None and self.current is not None and self.is_running() and asyncio.current_task(self) is None:
                coroutine.close()
                raise LeftoverError(
                    f"{getattr(coroutine, '__qualname__', 'a coroutine')} was to be started on the event loop of task "
                    f"{self.current.name} by who is not known to be part of that: a thread, or what one has called "
                    "back.  Start threads with wrap(), in the task"
                )
            if run is not None and run.phase is Phase.OVER:
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
    """For what a run calls in threads: all of its context and its request, not only what ``to_thread`` would copy.

    A process ends without waiting for its threads, since one that a task has left may never end.  Those of
    ThreadPoolExecutor, which asyncio insists on, are always waited for; so nothing is left of that but the interface.
    """

    def __init__(self, max_workers: int | None = None, *, name: str = "rhesis-tasks") -> None:
        super().__init__(max_workers, thread_name_prefix=name)
        self._name = name
        self._most = max_workers or min(32, (os.cpu_count() or 1) + 4)  # as ThreadPoolExecutor's
        self._started: list[threading.Thread] = []
        self._calls: set[Future[Any]] = set()
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._submitting = threading.Lock()

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

        called: Future[T] = Future()
        with self._submitting:
            if self._shutdown:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._calls.add(called)
            called.add_done_callback(self._calls.discard)
            self._queue.put((called, call))
            if not self._idle.acquire(blocking=False) and len(self._started) < self._most:
                name = f"{self._name}_{len(self._started)}"
                # Not a method, so that threads do not keep an executor that nobody uses any more.
                thread = threading.Thread(target=_call_all, args=(self._queue, self._idle), name=name, daemon=True)
                thread.start()
                self._started.append(thread)
        return called

    @override
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._submitting:
            self._shutdown = True
            if cancel_futures:
                with suppress(Empty):
                    while True:
                        if (item := self._queue.get_nowait()) is not None:
                            item[0].cancel()
            self._queue.put(None)
        if wait:
            for thread in self._started:
                thread.join()

    def __del__(self) -> None:
        self._queue.put(None)


def _call_all(queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], idle: threading.Semaphore) -> None:
    """What each thread of an executor does."""
    while (item := queue.get()) is not None:
        _call(*item)
        del item  # while it waits it keeps nothing
        idle.release()
    queue.put(None)  # for the next one


def _call(called: Future[Any], call: Callable[[], Any]) -> None:
    if called.set_running_or_notify_cancel():
        try:
            called.set_result(call())
        except BaseException as error:
            called.set_exception(error)
            del called  # which has the error, which has this frame


class _TaskLoop:
    """The event loop of one thread."""

    def __init__(self, factory: LoopFactory) -> None:
        self._factory = factory
        self._loop: RunLoop | None = None
        self._executor: _LoopExecutor
        self._debug: bool
        self._pid = os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T], name: str, grace: float) -> T:
        """The coroutine's result; afterwards nothing of it is left."""
        if self._loop is None or self._loop.is_closed():
            self._loop = self._new()
        loop = self._loop
        run = loop.current = Run(loop, name, grace)
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
                if run.phase is Phase.BEFORE:  # cancelled before its first step
                    coroutine.close()
                    run.is_clear = True
                if not run.is_clear:
                    self._abandon(loop, run)
                else:
                    try:
                        self._call_back(loop, run)
                    finally:
                        if loop.is_changed or not self._executor.is_usable:
                            self._reset(loop)
            finally:
                run.forget()
                loop.current = None
                soft_limits.limited(before)  # last, since a soft time limit must not break into this

    def _new(self) -> RunLoop:
        loop = self._factory()
        _open.add(loop)
        self._debug = loop.get_debug()
        self._executor = _LoopExecutor()
        loop.set_default_executor(self._executor)
        return loop

    def _call_back(self, loop: RunLoop, run: Run) -> None:
        """Let what is to be called back be called, as transports need it that close, and then nothing any more.

        (uvloop does not tell what waits.)
        """
        ready = getattr(loop, "_ready", None)
        if not ready:
            return
        try:
            for _ in range(TURNS):
                loop.call_soon(loop.stop)
                loop.run_forever()
                if not ready:
                    break
        finally:
            while ready:
                ready.popleft().cancel()
            run.cancel_timers()

    def _reset(self, loop: RunLoop) -> None:
        """What a task may have changed."""
        loop.set_task_factory(None)
        loop.set_exception_handler(None)
        loop.set_debug(self._debug)
        if self._executor.is_usable:
            loop.set_default_executor(self._executor)
        else:
            # With what may never end the next task might wait for a thread for ever.  A loop whose executor was shut
            # down by the task does not take another one.
            was_shut = self._executor._shutdown
            self._executor.shutdown(wait=False, cancel_futures=True)
            if was_shut:
                self.close()
            else:
                self._executor = _LoopExecutor()
                loop.set_default_executor(self._executor)
        loop.is_changed = False

    def _abandon(self, loop: RunLoop, run: Run) -> None:
        """Let nothing on a loop go on, whatever it would do."""
        self._loop = None
        left = asyncio.all_tasks(loop)
        try:
            if run.phase is Phase.RUNNING and not run.is_given_up:
                # Something else than the body's end has stopped the loop, which had no time to clean up yet.
                _cancel_all(loop, left, run.grace)
            run.phase = Phase.OVER
            abandon_engines(loop)
            loop.call_soon(loop.stop)
            loop.run_forever()  # for transports, which close when they are called back
        finally:
            self._close(loop)
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
            self._close(loop)

    def _close(self, loop: RunLoop) -> None:
        loop.close()
        self._executor.shutdown(wait=False)  # the loop may have got another one
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
