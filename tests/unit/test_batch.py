"""Many awaits inside of one task: how many at once, what is said of each, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhesis_tasks import BatchOutcome, RetryPolicy, batch, current_tenant, run_batch, tenant_scope
from rhesis_tasks.context import TenantContext
from rhesis_tasks.errors import ConfigurationError, TaskCancelledError, TaskDefinitionError

pytestmark = pytest.mark.timeout(20)

AT_ONCE = RetryPolicy(max_retries=2, base=0)
NEVER = RetryPolicy(max_retries=1, base=0, cap=10**6, retry_after=lambda _: 10**6)  # in a million seconds


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine; every task that is there at its end but was not before is an error."""

    async def run(*args: Any, **kwargs: Any) -> None:
        before = asyncio.all_tasks()
        await test(*args, **kwargs)
        left = asyncio.all_tasks() - before
        assert not left, f"left behind: {left}"

    @functools.wraps(test)
    def run_on_a_loop(*args: Any, **kwargs: Any) -> None:
        asyncio.run(run(*args, **kwargs))

    return run_on_a_loop


async def settle() -> None:
    """Until nothing moves any more unless somebody does something."""
    for _ in range(100):
        await asyncio.sleep(0)


async def same(item: Any) -> Any:
    return item


async def outcomes(*args: Any, **kwargs: Any) -> list[BatchOutcome[Any, Any]]:
    return [outcome async for outcome in run_batch(*args, **kwargs)]


class Rig:
    """A function whose calls wait until the test lets them end."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.cleaned: list[Any] = []  # those that were cancelled, once they have cleaned up
        self.running = 0
        self.most = 0
        self._gates: dict[Any, asyncio.Future[None]] = {}

    async def __call__(self, item: Any) -> Any:
        self.begun.append(item)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._gates.setdefault(item, asyncio.get_running_loop().create_future())
        except asyncio.CancelledError:
            await settle()
            self.cleaned.append(item)
            raise
        finally:
            self.running -= 1
        return f"result of {item}"

    async def end(self, *items: Any) -> None:
        """Let calls end, one after the other."""
        for item in items:
            self._gates[item].set_result(None)
            await settle()


class Reader:
    """Looks at the outcomes of a batch in the background, as fast as it can."""

    def __init__(self, outcomes: Any) -> None:
        self.seen: list[BatchOutcome[Any, Any]] = []
        self.task = asyncio.create_task(self._read(outcomes))

    async def _read(self, outcomes: Any) -> None:
        async for outcome in outcomes:
            self.seen.append(outcome)

    @property
    def items(self) -> list[Any]:
        return [outcome.item for outcome in self.seen]

    async def cancel(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


# --- how many at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "count", "most"), [(1, 5, 1), (3, 10, 3), (10, 10, 10), (10, 4, 4), (10**9, 5, 5)])
@pytest.mark.parametrize("make", [list, iter], ids=["sized", "unsized"])
@on_a_loop
async def test_as_many_items_run_at_once_as_allowed_and_not_more(
    limit: int, count: int, most: int, make: Callable[[Any], Any]
) -> None:
    rig = Rig()
    reader = Reader(run_batch(rig, make(range(count)), limit=limit))

    for item in range(count):
        await settle()
        assert rig.running == min(limit, count - item)
        await rig.end(item)
    await reader.task

    assert rig.most == most
    assert sorted(reader.items) == list(range(count))


@on_a_loop
async def test_an_item_that_waits_for_its_next_attempt_keeps_its_place() -> None:
    begun = []

    async def fail(item: int) -> None:
        begun.append(item)
        raise ValueError(item)

    reader = Reader(run_batch(fail, range(10), limit=2, retry_policy=NEVER))
    await settle()

    assert begun == [0, 1]
    await reader.cancel()


@on_a_loop
async def test_a_slow_reader_slows_down_the_batch() -> None:
    """It may have as many outcomes before it as items run at once, and those as many more that wait for room."""
    begun = []

    async def note(item: int) -> int:
        begun.append(item)
        return item

    limit = 4
    async with aclosing(run_batch(note, iter(range(1000)), limit=limit)) as results:
        for looked_at in range(1, 20):
            await anext(results)
            await settle()
            assert len(begun) <= looked_at + 2 * limit
        await settle()
        assert len(begun) == looked_at + 2 * limit


# --- outcomes ----------------------------------------------------------------------------------------------------


@on_a_loop
async def test_outcomes_come_in_the_order_in_which_items_end() -> None:
    rig = Rig()
    reader = Reader(run_batch(rig, "abcd", limit=3))
    await settle()

    await rig.end("c", "a", "d", "b")
    await reader.task

    assert reader.seen == [
        BatchOutcome(2, "c", "result of c", None, 1),
        BatchOutcome(0, "a", "result of a", None, 1),
        BatchOutcome(3, "d", "result of d", None, 1),
        BatchOutcome(1, "b", "result of b", None, 1),
    ]


@on_a_loop
async def test_the_value_of_a_success_is_its_result_and_that_of_a_failure_its_error() -> None:
    error = ValueError("bad")

    async def halve(item: int) -> int | None:
        if item % 2:
            raise error
        return item // 2 or None

    nothing, failure, success = await outcomes(halve, range(3), limit=1)

    assert (nothing.value(), success.value()) == (None, 1)
    assert (failure.result, failure.error, failure.attempts) == (None, error, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="bad") as raised:
            failure.value()
        assert raised.value is error


def test_an_outcome_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        BatchOutcome(0, "item", "result", None, 1).result = "another"  # type: ignore[misc]


@pytest.mark.parametrize("awaitable", ["future", "task", "object", "coroutine of a plain function"])
@on_a_loop
async def test_whatever_can_be_awaited_is(awaitable: str) -> None:
    class Later:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return "done"

    def call(item: None) -> Awaitable[str]:
        if awaitable == "future":
            future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, "done")
            return future
        if awaitable == "task":
            return asyncio.create_task(same("done"))
        return Later() if awaitable == "object" else same("done")

    assert [outcome.result for outcome in await outcomes(call, [None], limit=1)] == ["done"]


# --- items -------------------------------------------------------------------------------------------------------


async def asynchronous(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, asynchronous, lambda items: (item for item in items), lambda items: dict.fromkeys(items)],
    ids=["list", "tuple", "iterator", "asynchronous generator", "generator", "dict"],
)
@pytest.mark.parametrize("count", [0, 1, 7])
@on_a_loop
async def test_items_may_come_from_anything_that_can_be_gone_through(make: Callable[[Any], Any], count: int) -> None:
    found = await outcomes(same, make([f"item {number}" for number in range(count)]), limit=3)

    assert sorted((outcome.index, outcome.item, outcome.result) for outcome in found) == [
        (number, f"item {number}", f"item {number}") for number in range(count)
    ]


@pytest.mark.parametrize("is_asynchronous", [False, True])
@on_a_loop
async def test_items_are_not_asked_for_before_there_is_room(is_asynchronous: bool) -> None:
    pulled = []

    def items() -> Iterator[int]:
        for number in range(100):
            pulled.append(number)
            yield number

    rig = Rig()
    reader = Reader(run_batch(rig, asynchronous(items()) if is_asynchronous else items(), limit=3))
    await settle()
    first = len(pulled)
    await rig.end(1)

    assert (first, len(pulled)) == (3, 4)
    await reader.cancel()


def test_nothing_is_asked_for_or_begun_before_the_first_outcome_is() -> None:
    pulled = []
    rig = Rig()

    run_batch(rig, (pulled.append(number) for number in range(3)), limit=3)

    assert (pulled, rig.begun) == ([], [])


@pytest.mark.parametrize("is_asynchronous", [False, True])
@on_a_loop
async def test_what_items_raise_ends_the_batch_and_what_was_running(is_asynchronous: bool) -> None:
    def items() -> Iterator[str]:
        yield from "ab"
        raise ExceptionGroup("no more", [KeyError("x")])

    rig = Rig()
    seen = []

    async def read() -> None:
        source = asynchronous(items()) if is_asynchronous else items()
        async for outcome in run_batch(rig, source, limit=2):
            seen.append(outcome.item)

    reading = asyncio.create_task(read())
    await settle()
    await rig.end("b")

    with pytest.raises(ExceptionGroup, match="no more"):
        await reading
    assert (seen, rig.cleaned) == (["b"], ["a"])


@on_a_loop
async def test_what_items_await_being_cancelled_is_an_error_and_not_an_endless_wait() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lost.cancel()
        await lost

    with pytest.raises(TaskCancelledError, match="items"):
        await outcomes(same, items(), limit=1)


@on_a_loop
async def test_a_generator_of_items_runs_in_one_task_and_one_context() -> None:
    tasks = set()

    async def items() -> AsyncIterator[int]:
        with tenant_scope(TenantContext("of the generator")):
            async with asyncio.timeout(1000):
                for number in range(5):
                    await asyncio.sleep(0)
                    tasks.add(asyncio.current_task())
                    yield number

    async def tenant(_: int) -> TenantContext | None:
        await asyncio.sleep(0)
        return current_tenant()

    found = await outcomes(tenant, items(), limit=2)

    assert [outcome.value() for outcome in found] == [None] * 5
    assert len(tasks) == 1


@pytest.mark.parametrize("is_asynchronous", [False, True])
@on_a_loop
async def test_a_generator_of_items_has_ended_with_the_batch(is_asynchronous: bool) -> None:
    ended = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.append("generator")

    async def asynchronous_items() -> AsyncIterator[int]:
        try:
            for number in range(100):
                yield number
        finally:
            await settle()
            ended.append("generator")

    source = asynchronous_items() if is_asynchronous else items()  # kept, so that nothing but the batch ends it
    async with aclosing(run_batch(same, source, limit=2)) as results:
        await anext(results)

    assert ended == ["generator"]


# --- retries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "attempts", "succeeds"), [(0, 1, True), (1, 2, True), (2, 3, True), (3, 3, False)]
)
@on_a_loop
async def test_a_failed_item_is_tried_again_as_often_as_the_policy_says(
    failures: int, attempts: int, succeeds: bool
) -> None:
    calls = dict.fromkeys(range(3), 0)

    async def flaky(item: int) -> int:
        calls[item] += 1
        if calls[item] <= failures:
            raise ConnectionError(f"{item} is down for the {calls[item]}. time")
        return item

    found = await outcomes(flaky, range(3), limit=2, retry_policy=AT_ONCE)

    assert list(calls.values()) == [outcome.attempts for outcome in found] == [attempts] * 3
    assert [outcome.error is None for outcome in found] == [succeeds] * 3
    assert all(str(outcome.error).endswith(f"{attempts}. time") for outcome in found if not succeeds)


@on_a_loop
async def test_without_a_policy_every_failure_is_final() -> None:
    async def fail(_: int) -> None:
        raise ConnectionError

    assert [outcome.attempts for outcome in await outcomes(fail, [1], limit=1)] == [1]


@on_a_loop
async def test_what_the_policy_gives_up_on_is_not_tried_again() -> None:
    async def fail(item: type[Exception]) -> None:
        raise item

    policy = RetryPolicy(max_retries=2, base=0, retry_on=OSError, give_up_on=FileNotFoundError)
    found = await outcomes(fail, [OSError, FileNotFoundError, ValueError], limit=1, retry_policy=policy)

    assert [(type(outcome.error), outcome.attempts) for outcome in found] == [
        (OSError, 3),
        (FileNotFoundError, 1),
        (ValueError, 1),
    ]


@on_a_loop
async def test_the_age_that_the_policy_is_told_is_that_of_the_item() -> None:
    async def fail_late(item: int) -> None:
        await asyncio.sleep(item * 0.1)
        raise ValueError

    policy = RetryPolicy(max_retries=5, base=0, max_age=0.15)
    late, at_once = await outcomes(fail_late, [1, 0], limit=1, retry_policy=policy)

    assert late.attempts <= 2  # which take 0.2 seconds
    assert at_once.attempts == 6


@on_a_loop
async def test_an_item_waits_for_its_next_attempt_and_others_go_on() -> None:
    begun = []

    async def fail_for_a(item: str) -> str:
        begun.append(item)
        if item == "a":
            raise ValueError
        return item

    reader = Reader(run_batch(fail_for_a, "abcd", limit=2, retry_policy=NEVER))
    await settle()

    assert (begun, reader.items) == (["a", "b", "c", "d"], ["b", "c", "d"])
    assert not reader.task.done()
    await reader.cancel()


# --- what functions do -------------------------------------------------------------------------------------------


@on_a_loop
async def test_a_function_that_returns_nothing_to_await_is_refused_whatever_the_policy() -> None:
    def plain(item: int) -> int:
        calls.append(item)
        return item

    calls: list[int] = []
    with pytest.raises(TaskDefinitionError, match=r"plain returns nothing to await"):
        await outcomes(plain, range(100), limit=1, retry_policy=AT_ONCE)

    assert calls == [0]


@pytest.mark.parametrize("where", ["before it returns something to await", "while it is awaited"])
@on_a_loop
async def test_a_function_that_fails_is_an_outcome(where: str) -> None:
    def fail(item: int) -> Awaitable[None]:
        async def later() -> None:
            raise KeyError(item)

        if where.startswith("before"):
            raise KeyError(item)
        return later()

    found = await outcomes(fail, range(2), limit=1, retry_policy=AT_ONCE)

    assert [(outcome.attempts, str(outcome.error)) for outcome in found] == [(3, "0"), (3, "1")]


@pytest.mark.parametrize("how", ["a future that it awaits", "its own task"])
@on_a_loop
async def test_a_function_that_is_cancelled_from_inside_is_an_outcome_and_may_be_tried_again(how: str) -> None:
    async def cancelled(_: int) -> None:
        if how == "its own task":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    found = await outcomes(cancelled, range(3), limit=2, retry_policy=AT_ONCE)

    assert [(type(outcome.error), outcome.attempts) for outcome in found] == [(TaskCancelledError, 3)] * 3
    assert all(isinstance(outcome.error.__cause__, asyncio.CancelledError) for outcome in found if outcome.error)


variable: ContextVar[str] = ContextVar("variable", default="as it was")


@pytest.mark.parametrize("where", ["before it returns something to await", "while it is awaited"])
@on_a_loop
async def test_what_a_function_sets_in_its_context_is_gone_with_the_attempt(where: str) -> None:
    seen = []

    def leak(item: int) -> Awaitable[None]:
        async def later() -> None:
            seen.append(variable.get())
            await asyncio.sleep(0)
            if where.startswith("while"):
                variable.set(f"leaked by {item}")
            raise ValueError

        if where.startswith("before"):
            seen.append(variable.get())
            variable.set(f"leaked by {item}")
            raise ValueError
        return later()

    await outcomes(leak, range(4), limit=2, retry_policy=AT_ONCE)

    assert seen == ["as it was"] * 12
    assert variable.get() == "as it was"


@on_a_loop
async def test_functions_see_the_context_of_whoever_reads() -> None:
    async def tenant(_: int) -> TenantContext | None:
        return current_tenant()

    acme = TenantContext("acme", "alice")
    with tenant_scope(acme):
        found = await outcomes(tenant, range(3), limit=2)

    assert [outcome.result for outcome in found] == [acme] * 3


class Unusual(BaseException):
    """Neither an Exception nor one of asyncio's."""


@on_a_loop
async def test_what_is_no_exception_ends_the_batch() -> None:
    rig = Rig()

    async def fail_for_b(item: str) -> None:
        if item == "b":
            raise Unusual
        await rig(item)

    with pytest.raises(Unusual):
        await outcomes(fail_for_b, "abc", limit=3, retry_policy=AT_ONCE)

    assert sorted(rig.cleaned) == ["a", "c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_loop_and_items_are_cancelled(error: type[BaseException]) -> None:
    ended = []

    async def interrupted(item: str) -> None:
        try:
            await settle()
            if item == "b":
                raise error
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    with pytest.raises(error):
        asyncio.run(outcomes(interrupted, "abc", limit=3, retry_policy=AT_ONCE))

    assert sorted(ended) == ["a", "b", "c"]


# --- leaving the loop --------------------------------------------------------------------------------------------


async def leave(how: str, results: Any) -> None:
    """Go through outcomes, and stop at the first."""
    try:
        async for _ in results:
            if how == "break":
                break
            if how == "exception":
                raise LookupError
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            if how == "cancelled in the loop's body":
                await asyncio.sleep(0)
    except (LookupError, asyncio.CancelledError):
        pass


WAYS = pytest.mark.parametrize("how", ["break", "exception", "cancelled in the loop's body", "cancelled at the next"])


@WAYS
@on_a_loop
async def test_leaving_the_loop_cancels_what_is_running_and_waits_for_its_cleanup(how: str) -> None:
    rig = Rig()

    async def all_but_a(item: str) -> None:
        if item != "a":
            await rig(item)

    async def consume() -> list[str]:
        results = run_batch(all_but_a, "abcdef", limit=3)
        async with aclosing(results):
            await leave(how, results)
        return sorted(rig.cleaned)

    cleaned = await asyncio.create_task(consume())

    assert cleaned == sorted(rig.begun)
    assert cleaned[:2] == ["b", "c"]


@WAYS
@on_a_loop
async def test_leaving_a_loop_that_nobody_closes_cancels_what_is_running_soon(how: str) -> None:
    rig = Rig()

    async def all_but_a(item: str) -> None:
        if item != "a":
            await rig(item)

    await asyncio.create_task(leave(how, run_batch(all_but_a, "abcdef", limit=3)))
    gc.collect()
    for _ in range(5):
        await settle()

    assert sorted(rig.cleaned) == sorted(rig.begun)
    assert rig.begun[:2] == ["b", "c"]


@pytest.mark.parametrize("instead", ["returns", "raises", "awaits more"])
@on_a_loop
async def test_an_item_that_makes_something_else_of_its_cancellation_holds_nobody_up(instead: str) -> None:
    begun = []

    async def stubborn(item: int) -> int:
        begun.append(item)
        if not item:
            return item
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if instead == "raises":
                raise ConnectionError from None
            if instead == "awaits more":
                await settle()
        return item

    async with aclosing(run_batch(stubborn, range(1000), limit=3, retry_policy=AT_ONCE)) as results:
        await anext(results)
        await settle()

    assert begun == [0, 1, 2, 3]


@on_a_loop
async def test_a_second_cancellation_does_not_leave_items_behind() -> None:
    rig = Rig()
    reader = Reader(run_batch(rig, "abc", limit=3))
    await settle()

    reader.task.cancel()
    await asyncio.sleep(0)
    reader.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader.task

    assert sorted(rig.cleaned) == ["a", "b", "c"]


@on_a_loop
async def test_outcomes_that_nobody_looks_at_do_not_keep_a_batch_from_being_left() -> None:
    async with aclosing(run_batch(same, iter(range(1000)), limit=5)) as results:
        await anext(results)
        await settle()


# --- stopping ----------------------------------------------------------------------------------------------------


@on_a_loop
async def test_once_it_shall_stop_running_items_are_finished_and_no_others_begun() -> None:
    rig, stop = Rig(), asyncio.Event()
    reader = Reader(run_batch(rig, iter("abcdefgh"), limit=3, should_stop=stop.wait))
    await settle()
    await rig.end("a")

    stop.set()
    await settle()
    assert not reader.task.done()
    await rig.end("b", "c", "d")
    await reader.task

    assert rig.begun == ["a", "b", "c", "d"]
    assert [(outcome.item, outcome.error) for outcome in reader.seen] == [(item, None) for item in "abcd"]


@on_a_loop
async def test_once_it_shall_stop_an_item_that_waits_for_its_next_attempt_ends_as_it_failed() -> None:
    async def fail(_: int) -> None:
        raise ConnectionError

    stop = asyncio.Event()
    reader = Reader(run_batch(fail, range(5), limit=2, retry_policy=NEVER, should_stop=stop.wait))
    await settle()

    stop.set()
    await reader.task

    assert [(outcome.index, type(outcome.error), outcome.attempts) for outcome in reader.seen] == [
        (0, ConnectionError, 1),
        (1, ConnectionError, 1),
    ]


@on_a_loop
async def test_once_it_shall_stop_a_retry_is_not_begun_either() -> None:
    rig, stop = Rig(), asyncio.Event()

    async def fail(item: str) -> None:
        await rig(item)
        raise ConnectionError

    reader = Reader(run_batch(fail, "a", limit=1, retry_policy=NEVER, should_stop=stop.wait))
    await settle()
    stop.set()
    await rig.end("a")
    await reader.task

    assert [outcome.attempts for outcome in reader.seen] == [1]


@on_a_loop
async def test_once_it_shall_stop_items_that_do_not_come_are_not_waited_for() -> None:
    ended = []

    async def items() -> AsyncIterator[str]:
        yield "a"
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("generator")
        yield "b"

    stop = asyncio.Event()
    reader = Reader(run_batch(same, items(), limit=2, should_stop=stop.wait))
    await settle()

    stop.set()
    await reader.task

    assert (reader.items, ended) == (["a"], ["generator"])


@on_a_loop
async def test_once_it_shall_stop_an_item_that_comes_all_the_same_is_not_begun() -> None:
    async def items() -> AsyncIterator[str]:
        yield "a"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield "b"

    stop = asyncio.Event()
    reader = Reader(run_batch(same, items(), limit=2, should_stop=stop.wait))
    await settle()
    stop.set()
    await reader.task

    assert reader.items == ["a"]


@on_a_loop
async def test_it_is_asked_again_whether_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "ASK_EVERY", 0)
    answers = iter([False, False, True])
    rig = Rig()

    async def should_stop() -> bool:
        return next(answers)

    reader = Reader(run_batch(rig, "ab", limit=1, should_stop=should_stop))
    await settle()
    await rig.end("a")
    await reader.task

    assert rig.begun == ["a"]
    assert next(answers, None) is None


@on_a_loop
async def test_a_batch_ends_though_it_never_shall_stop() -> None:
    async def should_stop() -> bool:
        return False

    assert len(await outcomes(same, range(3), limit=2, should_stop=should_stop)) == 3


@on_a_loop
async def test_an_error_of_the_question_whether_to_stop_ends_the_batch() -> None:
    async def should_stop() -> bool:
        await settle()
        raise PermissionError

    rig = Rig()
    with pytest.raises(PermissionError):
        await outcomes(rig, "ab", limit=2, should_stop=should_stop)

    assert sorted(rig.cleaned) == ["a", "b"]


# --- progress ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "total"), [(list(range(3)), 3), (iter(range(3)), None)], ids=["sized", "unsized"])
@on_a_loop
async def test_progress_counts_what_was_looked_at(items: Any, total: int | None) -> None:
    said: list[tuple[int, int | None]] = []
    before = []

    async for _ in run_batch(same, items, limit=3, on_progress=lambda *progress: said.append(progress)):
        await settle()
        before.append(len(said))

    assert before == [0, 1, 2]
    assert said == [(1, total), (2, total), (3, total)]


@on_a_loop
async def test_failures_are_progress_too() -> None:
    async def fail(_: int) -> None:
        raise ConnectionError

    said: list[tuple[int, int | None]] = []
    await outcomes(fail, range(2), limit=1, retry_policy=AT_ONCE, on_progress=lambda *progress: said.append(progress))

    assert said == [(1, 2), (2, 2)]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -1, True, False, 1.0, "1", None])
def test_a_limit_that_makes_no_sense_is_refused_at_the_call(limit: Any) -> None:
    with pytest.raises(ConfigurationError, match="limit= is how many items run at once, 1 or more, not"):
        run_batch(same, [], limit=limit)


@pytest.mark.parametrize("policy", [None, 3, RetryPolicy])
def test_a_retry_policy_that_is_none_is_refused_at_the_call(policy: Any) -> None:
    with pytest.raises(ConfigurationError, match="retry_policy= takes a RetryPolicy, not"):
        run_batch(same, [], limit=1, retry_policy=policy)


# --- properties --------------------------------------------------------------------------------------------------


fates = st.tuples(
    st.integers(0, 4),  # how often it gives way before it ends
    st.integers(0, 4),  # how often it fails before it succeeds
    st.sampled_from([ConnectionError, ValueError, asyncio.CancelledError]),
)


@given(
    items=st.lists(fates, max_size=25),
    limit=st.integers(1, 8),
    pause=st.integers(0, 3),
    stop_after=st.none() | st.integers(0, 30),
    source=st.sampled_from([list, iter, asynchronous]),
)
def test_whatever_happens_each_item_ends_exactly_once(
    items: list[Any], limit: int, pause: int, stop_after: int | None, source: Callable[[Any], Any]
) -> None:
    policy = RetryPolicy(max_retries=2, base=0, give_up_on=ValueError)
    calls = [0] * len(items)
    running: list[int] = []
    most: list[int] = []

    async def call(numbered: tuple[int, Any]) -> int:
        number, (turns, failures, error) = numbered
        calls[number] += 1
        running.append(number)
        most.append(len(running))
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            if calls[number] <= failures:
                raise error
        finally:
            running.remove(number)
        return number

    async def main() -> list[BatchOutcome[Any, Any]]:
        stop = asyncio.Event()
        found = []
        async for outcome in run_batch(
            call, source(list(enumerate(items))), limit=limit, retry_policy=policy, should_stop=stop.wait
        ):
            found.append(outcome)
            for _ in range(pause):
                await asyncio.sleep(0)
            if len(found) == stop_after:
                stop.set()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return found

    found = asyncio.run(main())

    # Items are begun in their order, and each that was begun has ended.
    assert sorted(outcome.index for outcome in found) == [number for number, count in enumerate(calls) if count]
    assert sorted(outcome.index for outcome in found) == list(range(len(found)))
    has_stopped = stop_after is not None and len(found) > stop_after
    assert len(found) == len(items) or has_stopped or len(found) == stop_after
    assert max(most, default=0) <= limit
    for outcome in found:
        _, failures, error = items[outcome.index]
        allowed = 1 if error is ValueError else 3
        assert outcome.item == (outcome.index, items[outcome.index])
        assert outcome.attempts == calls[outcome.index] <= min(failures + 1, allowed)
        assert (outcome.error is None) == (outcome.attempts > failures)
        if outcome.error is None:
            assert outcome.value() == outcome.index
        else:
            assert isinstance(outcome.error, TaskCancelledError if error is asyncio.CancelledError else error)


PATIENT = RetryPolicy(max_retries=1, base=3600.0, cap=3600.0, retry_on=(ConnectionError,), retry_after=lambda _: 3600.0)


@pytest.mark.parametrize(
    ("error", "policy", "was_stopped"),
    [
        (ConnectionError(), PATIENT, True),
        (ValueError(), PATIENT, False),
        (ConnectionError(), RetryPolicy(max_retries=0), False),
    ],
    ids=["waits for its next attempt", "is not tried again", "has used up its attempts"],
)
def test_an_item_says_whether_it_failed_for_good_or_was_only_stopped(
    error: Exception, policy: RetryPolicy, was_stopped: bool
) -> None:
    async def fail(_item: int) -> None:
        raise error

    async def stop() -> bool:
        await asyncio.sleep(0.01)
        return True

    async def outcomes() -> list[BatchOutcome[int, None]]:
        return [each async for each in run_batch(fail, [1], limit=1, retry_policy=policy, should_stop=stop)]

    (outcome,) = asyncio.run(asyncio.wait_for(outcomes(), 10))

    assert (outcome.error, outcome.attempts, outcome.was_stopped) == (error, 1, was_stopped)
