"""One run of an ``async def`` task's coroutine on an event loop, and all that it starts there.

Nothing of it outlives it: what was started and not awaited is cancelled, and waited for, before the run is over.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sized
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from enum import IntEnum
from typing import Any, Final, TypeVar

from .postgres.engines import cut_lent

__all__ = ["Phase", "Run", "RunLoop", "run_of_context"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


def _tasks_of_all_loops() -> Sized | None:
    """What all_tasks() walks through, by whatever name; None where that is unknown, or quick (since Python 3.14)."""
    if sys.version_info >= (3, 14):
        return None
    name = "_all_tasks" if sys.version_info < (3, 12) else "_scheduled_tasks"
    found: Sized | None = getattr(asyncio.tasks, name, None)
    return found


_known_tasks: Final = _tasks_of_all_loops()


class RunLoop(asyncio.AbstractEventLoop):
    """An event loop on which everything belongs to a run, and that starts nothing for one that is over."""

    current: Run | None = None
    is_changed = False  #: any setting that a task can change


class Phase(IntEnum):
    BEFORE = 0
    RUNNING = 1
    CLEARING = 2  #: the coroutine has ended, and what it has left is ended
    OVER = 3  #: nothing more may start


run_of_context: Final[ContextVar[Run | None]] = ContextVar("rhesis_tasks.run", default=None)
"""The run that code is part of; callbacks and threads keep it when that is over."""


class Run:
    """One task's coroutine on a loop, and everything that it starts."""

    phase = Phase.BEFORE
    is_clear = False  #: nothing is left
    is_interrupted = False  #: the soft time limit was reached
    is_given_up = False  #: ... and it did not end then

    _body: asyncio.Task[Any] | None = None
    _noticed = False  # the loop has heard of the soft time limit
    _giving_up: asyncio.TimerHandle | None = None
    # Made when there is one, since most runs have none.
    _tasks: weakref.WeakSet[asyncio.Task[Any]] | None = None
    _timers: weakref.WeakSet[asyncio.TimerHandle] | None = None
    _generators: _Generators | None = None

    def __init__(self, loop: RunLoop, name: str, grace: float) -> None:
        self.name = name
        self.grace = grace
        self._loop = loop

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The task that runs the coroutine, with a copy of the running context."""
        context = copy_context()  # not kept: it has the run, and both would wait for the garbage collector
        context.run(run_of_context.set, self)
        # Not by the loop's create_task(): this is none of the tasks that the coroutine starts.
        self._body = body = asyncio.Task(self._through(coroutine), loop=self._loop, context=context)
        body.add_done_callback(self._stop_loop)
        return body

    async def _through(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self.phase = Phase.RUNNING
        self.watch_generators()
        succeeded = False
        try:
            result = await coroutine
            succeeded = True
            return result
        finally:
            self.phase = Phase.CLEARING
            if self._giving_up is not None:
                self._giving_up.cancel()
            try:
                if self._tasks or self._generators or self._left():
                    await self._clear(logging.WARNING if succeeded else logging.INFO)
                else:
                    self._finish()
                if cut_lent(self._loop):
                    for _ in range(3):  # their transports close when they are called back
                        await asyncio.sleep(0)
            finally:
                self.phase = Phase.OVER
                self._spare_turn()

    def _stop_loop(self, _: object) -> None:
        if self._loop.current is self:
            self._loop.stop()

    def _spare_turn(self) -> None:
        """Stop the loop in the body's last step, since the callback that would do it takes another turn of the loop.

        Not if others wait for that turn, such as the one by which a transport closes.  (uvloop does not tell what
        waits, and takes that turn before it stops.)
        """
        body = self._body
        if body is None or getattr(self._loop, "_ready", None):
            return
        if len(getattr(body, "_callbacks", None) or ()) == 1:
            body.remove_done_callback(self._stop_loop)
            self._loop.stop()

    def _finish(self) -> None:
        """Nothing is left; and nothing more starts, beginning with what comes in this turn of the loop."""
        self.is_clear = True
        self.phase = Phase.OVER
        self.cancel_timers()

    def cancel_timers(self) -> None:
        """All that were set on the loop."""
        for timer in self._timers or ():
            timer.cancel()

    def forget(self) -> None:
        """Refer to nothing any more."""
        self.phase = Phase.OVER
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
        """Called for each asynchronous generator when it begins."""
        if self._generators is None:
            self._generators = _Generators(self._loop)
        self._generators.remember(generator)

    def _close_later(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Called for each that is dropped before its end, by whatever thread."""
        if self._generators is not None:
            self._generators.drop(generator)
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._close_dropped)

    def _close_dropped(self) -> None:
        if self._generators is not None and self.phase < Phase.OVER:
            self._generators.close_dropped()

    # --- what it leaves --------------------------------------------------------------------------------------

    def _left(self) -> list[asyncio.Task[Any]]:
        """The loop's tasks that are not done, but for the body's and the running one."""
        if _known_tasks is not None and len(_known_tasks) == 1:
            return []  # that is the body's
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
        closing = self._generators.close_dropped() if self._generators is not None else None
        if closing:
            await asyncio.wait(closing, timeout=self.grace)
        left = self._left()
        if left:
            _log.log(level, "task %s left %s behind: cancelled", self.name, _named(left))
        while True:
            if not left:  # no task is in the middle of a generator any more
                left = list(self._generators.close_all()) if self._generators is not None else []
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

    def _report_failures(self) -> None:
        """Say now what asyncio would say when the tasks are collected, in whatever context that is."""
        for task in self._tasks or ():
            if task.done() and getattr(task, "_log_traceback", False):
                error = task.exception()
                _log.error("task %s: %s failed, and nobody looked", self.name, _named([task]), exc_info=error)

    # --- its soft time limit ---------------------------------------------------------------------------------

    @property
    def wants_interruption(self) -> bool:
        return self.phase < Phase.OVER and not self._noticed

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
        if self._body is not None and self.phase < Phase.CLEARING:
            self._body.cancel()
            self._giving_up = self._loop.call_later(self.grace, self._give_up)

    def _give_up(self) -> None:
        _log.error("task %s did not end within %g s of its soft time limit", self.name, self.grace)
        self.is_given_up = True
        self._loop.stop()


class _Generators:
    """The asynchronous generators of a run: each is closed in the context in which it has begun."""

    def __init__(self, loop: RunLoop) -> None:
        self._loop = loop
        # Those that have begun, by their ids, since a weak reference is dead when one is dropped.
        self._begun: dict[int, tuple[weakref.ref[AsyncGenerator[Any, Any]], Context]] = {}
        self._dropped: deque[tuple[AsyncGenerator[Any, Any], Context]] = deque()
        self._closing: set[asyncio.Task[None]] = set()

    def __bool__(self) -> bool:
        """Whether any is not at its end."""
        return bool(self._begun or self._dropped)

    def remember(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._begun[id(generator)] = weakref.ref(generator), copy_context()

    def drop(self, generator: AsyncGenerator[Any, Any]) -> None:
        """By whatever thread."""
        _, context = self._begun.pop(id(generator), (None, Context()))
        self._dropped.append((generator, context))

    def close_dropped(self) -> set[asyncio.Task[None]]:
        """Begin to close those that were dropped; the tasks that close any."""
        while self._dropped:
            generator, context = self._dropped.popleft()
            closing = self._loop.create_task(generator.aclose(), context=context)
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        return self._closing

    def close_all(self) -> set[asyncio.Task[None]]:
        """The same also for those that somebody holds."""
        begun = [(generator(), context) for generator, context in self._begun.values()]
        self._begun.clear()
        self._dropped.extend((generator, context) for generator, context in begun if generator is not None)
        return self.close_dropped()


def _named(tasks: Iterable[asyncio.Task[Any]]) -> str:
    names = sorted(getattr(task.get_coro(), "__qualname__", type(task.get_coro()).__name__) for task in tasks)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
