"""Many awaits inside of one task: so many at once, each tried again by a policy, outcomes as they come.

Knows nothing of Celery; :meth:`rhesis_tasks.BaseTask.batch` adds the task's progress and its abort.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator, Iterable, Sized
from contextlib import aclosing
from contextvars import Context, copy_context
from typing import Any, Final, Generic, TypeAlias, TypeVar

from .errors import ConfigurationError, TaskCancelledError, TaskDefinitionError
from .retry import NO_RETRY, RetryLater, RetryPolicy

__all__ = ["BatchOutcome", "ItemT", "Items", "ResultT", "run_batch"]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Items: TypeAlias = Iterable[ItemT] | AsyncIterable[ItemT]

ASK_EVERY: Final = 1.0
"""Seconds between two questions whether to stop."""


@dataclasses.dataclass(frozen=True, slots=True)
class BatchOutcome(Generic[ItemT, ResultT]):
    """What became of one item of a batch."""

    index: int  #: the item's place among the items, from 0
    item: ItemT
    result: ResultT | None  #: what the function returned; None if it failed
    error: Exception | None  #: what its last attempt raised; None if it succeeded
    attempts: int
    was_stopped: bool = False  #: the batch stopped before a further attempt that the retry policy wanted

    def value(self) -> ResultT:
        """The result.

        Raises:
            Exception: what the last attempt raised.
        """
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def run_batch(
    function: Callable[[ItemT], Awaitable[ResultT]],
    items: Items[ItemT],
    *,
    limit: int,
    retry_policy: RetryPolicy = NO_RETRY,
    should_stop: Callable[[], Awaitable[bool]] | None = None,
    on_progress: Callable[[int, int | None], object] | None = None,
) -> AsyncGenerator[BatchOutcome[ItemT, ResultT], None]:
    """Await a function for each of many items, so many at once.

    ::

        async for outcome in run_batch(evaluate, prompts, limit=100, retry_policy=DEFAULT):
            ...

    Outcomes come in the order in which items end.  ``limit`` of them may wait to be looked at, and then those that end
    keep their places: whoever looks slowly slows down the batch.  So does an item that waits for its next attempt.

    Leaving the loop cancels what is running.  Python does not wait there for a generator's end; to go on only when
    everything has cleaned up::

        async with contextlib.aclosing(run_batch(...)) as outcomes:
            async for outcome in outcomes:
                ...

    Args:
        function: called with one item; what it returns is awaited.
        items: asked for the next one when there is room for it, so it may be a long or lazy one.  A generator is closed
            when the batch ends.
        limit: how many items run at once.
        retry_policy: by which a failed item is tried again; what it gives up is an outcome with an error.  Its
            ``max_age`` counts from the first attempt of the item.
        should_stop: asked every second; once it says yes, items that are running are finished, and no others begun.
            Those that wait for their next attempt end with ``was_stopped``.
        on_progress: called after each outcome was looked at, with how many there were and how many there will be (None
            if ``items`` has no length).

    Raises:
        ConfigurationError: ``limit`` is no number of 1 or more, or ``retry_policy`` no RetryPolicy.
        TaskDefinitionError: (while it runs) the function returns nothing that can be awaited.
        TaskCancelledError: (while it runs) what ``items`` awaits was cancelled.
        Exception: (while it runs) whatever ``items``, ``should_stop`` or ``on_progress`` raises.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"limit= is how many items run at once, 1 or more, not {limit!r}")
    if not isinstance(retry_policy, RetryPolicy):
        raise ConfigurationError(f"retry_policy= takes a RetryPolicy, not {retry_policy!r}")
    total = len(items) if isinstance(items, Sized) else None
    return _outcomes(_Batch(function, items, retry_policy, limit), total, should_stop, on_progress)


async def _outcomes(
    batch: _Batch[ItemT, ResultT],
    total: int | None,
    should_stop: Callable[[], Awaitable[bool]] | None,
    on_progress: Callable[[int, int | None], object] | None,
) -> AsyncGenerator[BatchOutcome[ItemT, ResultT], None]:
    running = asyncio.create_task(batch.run(should_stop))
    done = 0
    try:
        while (outcome := await batch.ended.get()) is not None:
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    finally:
        running.cancel()
        await _end_of(running)


async def _end_of(task: asyncio.Task[None]) -> None:
    """Wait for the end of a task that is cancelled, also if that wait is cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class _Batch(Generic[ItemT, ResultT]):
    """The items that run, each in a task, and the task that takes them."""

    def __init__(
        self,
        function: Callable[[ItemT], Awaitable[ResultT]],
        items: Items[ItemT],
        policy: RetryPolicy,
        limit: int,
    ) -> None:
        #: what has ended; an exception ends the batch, and so does None
        self.ended: asyncio.Queue[BatchOutcome[ItemT, ResultT] | BaseException | None] = asyncio.Queue(limit)
        self._function = function
        self._policy = policy
        self._items = items
        self._room = asyncio.Semaphore(limit)
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def run(self, should_stop: Callable[[], Awaitable[bool]] | None) -> None:
        """Run all items, and say that there is nothing more, or what has failed: nothing may, but for items."""
        end: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                taking = group.create_task(self._take(group, copy_context()))
                asking = group.create_task(self._stop_when(should_stop, taking)) if should_stop else None
                await asyncio.wait([taking])
                if taking.cancelled() and not self._stopping.is_set():
                    raise TaskCancelledError("what the items awaited was cancelled")
                if self._running:
                    await asyncio.wait(self._running)
                if asking is not None:
                    asking.cancel()
        except BaseExceptionGroup as errors:
            if _is_cancelled():
                raise
            end = errors.exceptions[0]
        except (KeyboardInterrupt, SystemExit) as error:
            if _is_cancelled():
                return  # the event loop has raised it already
            end = error
        await self.ended.put(end)

    async def _take(self, group: asyncio.TaskGroup, context: Context) -> None:
        """Begin an item whenever there is room.

        In one task, since a generator may hold what belongs to a task or its context: a timeout, a tenant's scope.
        """
        async with aclosing(_each(self._items)) as items:
            for index in itertools.count():
                await self._room.acquire()
                item = await anext(items, _NOTHING)
                if item is _NOTHING or _is_cancelled():
                    return
                task = group.create_task(self._run(index, item), context=context.copy())
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _stop_when(self, should_stop: Callable[[], Awaitable[bool]], taking: asyncio.Task[None]) -> None:
        while not await should_stop():  # noqa: ASYNC110 - it is a question to a database
            await asyncio.sleep(ASK_EVERY)
        self._stopping.set()
        taking.cancel()

    async def _run(self, index: int, item: ItemT) -> None:
        await self.ended.put(await self._outcome(index, item))
        self._room.release()

    async def _outcome(self, index: int, item: ItemT) -> BatchOutcome[ItemT, ResultT]:
        attempts = 0
        now = asyncio.get_running_loop().time
        begun = now()
        while True:
            attempts += 1
            result: ResultT | None = None
            error: Exception | None = None
            # A task of its own, so that what it sets in its context is gone with the attempt.
            attempt = asyncio.create_task(self._attempt(item))
            try:
                result = await attempt
            except _NotAwaitable:
                raise
            except asyncio.CancelledError as cancelled:
                error = TaskCancelledError("what the item awaited was cancelled")
                error.__cause__ = cancelled
            except Exception as failure:
                error = failure
            if _is_cancelled():
                raise asyncio.CancelledError  # whatever the function has made of it
            if error is not None:
                decision = self._policy.decide(error, attempts - 1, elapsed=now() - begun)
                if isinstance(decision, RetryLater):
                    if not await self._is_stopped_within(decision.countdown):
                        continue
                    return BatchOutcome(index, item, None, error, attempts, was_stopped=True)
            return BatchOutcome(index, item, result, error, attempts)

    async def _attempt(self, item: ItemT) -> ResultT:
        awaitable = self._function(item)
        if not inspect.isawaitable(awaitable):
            raise _NotAwaitable(self._function)
        return await awaitable

    async def _is_stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False


_NOTHING: Final[Any] = object()


async def _each(items: Items[Any]) -> AsyncGenerator[Any, None]:
    """The items, one after the other; a generator ends with it."""
    try:
        if isinstance(items, AsyncIterable):
            async for item in items:
                yield item
        else:
            for item in items:
                yield item
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
        elif isinstance(items, Generator):
            items.close()


def _is_cancelled() -> bool:
    """Whether the running task is, and not only what it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _NotAwaitable(TaskDefinitionError):
    def __init__(self, function: object) -> None:
        super().__init__(f"{getattr(function, '__qualname__', function)} returns nothing to await.  Use async def")
