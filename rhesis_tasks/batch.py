"""Many awaits inside of one task: so many at once, each tried again by a policy, outcomes as they come.

Knows nothing of Celery; :meth:`rhesis_tasks.BaseTask.batch` adds the task's progress and its abort.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sized
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

    Outcomes come in the order in which items end.  Not more than ``limit`` of them wait to be looked at: whoever looks
    slowly slows down the batch.  An item that waits for its next attempt keeps its place among the ``limit``.
    Leaving the loop cancels what is running.

    Args:
        function: called with one item; what it returns is awaited.
        items: asked for the next one when there is room for it, so it may be a long or lazy one.
        limit: how many items run at once.
        retry_policy: by which a failed item is tried again; what it gives up is an outcome with an error.
        should_stop: asked every second; once it says yes, items that are running are finished, and no others begun.
        on_progress: called after each outcome was looked at, with how many there were and how many there will be (None
            if ``items`` has no length).

    Raises:
        ConfigurationError: ``limit`` is no number of 1 or more, or ``retry_policy`` no RetryPolicy.
        TaskDefinitionError: (while it runs) the function returns nothing that can be awaited.
        Exception: (while it runs) whatever ``items`` raises.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"limit= is how many items run at once, 1 or more, not {limit!r}")
    if not isinstance(retry_policy, RetryPolicy):
        raise ConfigurationError(f"retry_policy= takes a RetryPolicy, not {retry_policy!r}")
    total = len(items) if isinstance(items, Sized) else None
    batch: _Batch[ItemT, ResultT] = _Batch(function, items, retry_policy, limit)
    return _outcomes(batch, limit if total is None else min(limit, total), total, should_stop, on_progress)


async def _outcomes(
    batch: _Batch[ItemT, ResultT],
    lanes: int,
    total: int | None,
    should_stop: Callable[[], Awaitable[bool]] | None,
    on_progress: Callable[[int, int | None], object] | None,
) -> AsyncGenerator[BatchOutcome[ItemT, ResultT], None]:
    running = [asyncio.create_task(batch.run_lane()) for _ in range(lanes)]
    background = [asyncio.create_task(batch.end_after(running))]
    if should_stop is not None:
        background.append(asyncio.create_task(batch.stop_when(should_stop)))
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
        for task in (*running, *background):
            task.cancel()
        await asyncio.gather(*running, *background, return_exceptions=True)
        await batch.close()


class _Batch(Generic[ItemT, ResultT]):
    """The lanes of a batch, in each of which one item is at a time."""

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
        self._items = _numbered(items)
        self._next = asyncio.Lock()
        self._stopping = asyncio.Event()

    async def run_lane(self) -> None:
        while not self._stopping.is_set():
            async with self._next:
                numbered = await anext(self._items, None)
            if numbered is None:
                return
            await self.ended.put(await self._run(*numbered))

    async def end_after(self, lanes: Iterable[asyncio.Task[None]]) -> None:
        """Say that there is nothing more, once all lanes have come to their end or one has failed."""
        try:
            await asyncio.gather(*lanes)
        except Exception as error:
            await self.ended.put(error)
        else:
            await self.ended.put(None)

    async def stop_when(self, should_stop: Callable[[], Awaitable[bool]]) -> None:
        while not await should_stop():  # noqa: ASYNC110 - it is a question to a database
            await asyncio.sleep(ASK_EVERY)
        self._stopping.set()

    async def close(self) -> None:
        """Let ``items`` end, if they are a generator that has not."""
        await self._items.aclose()

    async def _run(self, index: int, item: ItemT) -> BatchOutcome[ItemT, ResultT]:
        attempts = 0
        while True:
            attempts += 1
            try:
                awaitable = self._function(item)
                if not inspect.isawaitable(awaitable):
                    raise _NotAwaitable(self._function)
                # A task of its own, so that what it sets in its context is gone with the item.
                return BatchOutcome(index, item, await asyncio.ensure_future(awaitable), None, attempts)
            except _NotAwaitable:
                raise
            except asyncio.CancelledError as cancelled:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # there is one, this
                    raise
                error: Exception = TaskCancelledError("what the item awaited was cancelled")
                error.__cause__ = cancelled
            except Exception as failure:
                error = failure
            decision = self._policy.decide(error, attempts - 1)
            if not isinstance(decision, RetryLater) or await self._is_stopped_within(decision.countdown):
                return BatchOutcome(index, item, None, error, attempts)

    async def _is_stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False


async def _numbered(items: Items[Any]) -> AsyncGenerator[tuple[int, Any], None]:
    index = 0
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield index, item
            index += 1
        return
    for item in items:
        yield index, item
        index += 1


class _NotAwaitable(TaskDefinitionError):
    def __init__(self, function: object) -> None:
        super().__init__(f"{getattr(function, '__qualname__', function)} returns nothing to await.  Use async def")
