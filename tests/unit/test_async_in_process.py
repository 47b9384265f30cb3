"""``async def`` tasks without a server: how they are run, called and ended; and nothing of one reaches the next."""

from __future__ import annotations

import asyncio
import functools
import gc
import hashlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from queue import SimpleQueue
from typing import Any

import pytest
from celery import Celery, Task, group
from celery.exceptions import Ignore, SoftTimeLimitExceeded

from rhesis_tasks import (
    BaseTask,
    ContextThreadPoolExecutor,
    RetryPolicy,
    TenantContext,
    configure,
    current_tenant,
    register_context_var,
    runs,
    soft_limits,
    tenant_scope,
    wrap,
)
from rhesis_tasks.errors import (
    ConfigurationError,
    LeftoverError,
    MissingExtraError,
    MissingTenantError,
    NotSupportedError,
    TaskCancelledError,
    TaskDefinitionError,
)
from rhesis_tasks.guard import refuse_async_tasks
from rhesis_tasks.hooks import on_tenant_success
from rhesis_tasks.loops import close_loops

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")
TIMEOUT = 10

label: ContextVar[str] = ContextVar("label")


@pytest.fixture(params=["asyncio", "uvloop"])
def app(request: pytest.FixtureRequest, make_app: Callable[..., Celery]) -> Iterator[Celery]:
    """A configured application on each kind of event loop."""
    app = make_app(configured=False)
    configure(app, event_loop=request.param)
    yield app
    close_loops()


@pytest.fixture
def seen() -> list[Any]:
    """What the bodies of tasks noted."""
    return []


@pytest.fixture
def run(app: Celery, work_off: Any) -> Callable[..., None]:
    """Runs tasks as a worker's one thread would, each for its tenant: ``run((task, tenant, args...), ...)``."""

    def run_all(*launches: Any) -> None:
        for task, tenant, *args in launches:
            with tenant_scope(tenant):
                task.delay(*args)
        work_off(app)

    return run_all


@pytest.fixture
def look(app: Celery, seen: list[Any]) -> Any:
    """A task that notes where it runs, and for whom, now and a little later."""

    @app.task(base=BaseTask, bind=True, name="look")
    async def look(self: BaseTask) -> None:
        await asyncio.sleep(0.02)
        seen.append((asyncio.get_running_loop(), self.tenant.organization_id))

    return look


def organization() -> str | None:
    tenant = current_tenant()
    return tenant and tenant.organization_id


# --- running ---------------------------------------------------------------------------------------------------


def test_the_coroutine_is_awaited_and_its_result_is_the_tasks(app: Celery, seen: list[Any]) -> None:
    @app.task(base=BaseTask)
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    class Triple(BaseTask):
        name = "triple"

        async def run(self, number: int) -> int:
            return 3 * number

    class Plus(Triple):
        name = "plus"

        async def run(self, number: int) -> int:
            return 1 + await super().run(number)

    triple, plus = (app.register_task(each()) for each in (Triple, Plus))

    with tenant_scope(ACME):
        assert [task.apply((4,)).get() for task in (double, triple, plus)] == [8, 12, 13]
    assert all(task.is_async for task in (double, triple, plus))


def test_one_loop_serves_all_tasks_of_a_thread(look: Any, run: Any, seen: list[Any]) -> None:
    run((look, ACME), (look, GLOBEX), (look, ACME))

    assert [organization_id for _, organization_id in seen] == ["acme", "globex", "acme"]
    assert len({loop for loop, _ in seen}) == 1


def test_the_loop_is_of_the_kind_that_was_asked_for(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    run((look, ACME))

    assert type(seen[0][0]).__base__.__module__.partition(".")[0] == app.conf.rhesis_tasks_event_loop


def test_every_way_to_start_a_coroutine_or_thread_has_the_context(app: Celery, run: Any, seen: list[Any]) -> None:
    register_context_var(label)

    def where() -> tuple[Any, ...]:
        return organization(), label.get(None), everything.request.id

    async def part() -> tuple[Any, ...]:
        await asyncio.sleep(0)
        return where()

    @app.task(base=BaseTask, bind=True)
    async def everything(self: BaseTask) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            grouped = tasks.create_task(part())
        called: asyncio.Future[Any] = loop.create_future()
        loop.call_soon(lambda: called.set_result(where()))
        seen.extend(await asyncio.gather(part(), part()))
        seen.append(grouped.result())
        seen.append(await asyncio.create_task(part()))
        seen.append(await asyncio.wait_for(part(), 5))
        seen.append(await called)
        seen.append(await asyncio.to_thread(where))
        seen.append(await loop.run_in_executor(None, where))
        seen.append(await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(part(), loop)))
        seen.append(await asyncio.to_thread(wrap(where)))

    Context().run(lambda: (label.set("of acme"), run((everything, ACME))))
    first = {each[2] for each in seen}
    assert seen == [("acme", "of acme", next(iter(first)))] * 10
    assert first != {None}
    assert len(first) == 1


@pytest.mark.parametrize("how", ["named", "the loop's default"])
def test_an_executor_of_ones_own_carries_the_context_if_it_is_ours_or_the_function_is_wrapped(
    app: Celery, run: Any, seen: list[Any], how: str
) -> None:
    def where() -> tuple[Any, ...]:
        return organization(), job.request.id is not None

    @app.task(base=BaseTask)
    async def job() -> None:
        loop = asyncio.get_running_loop()
        for executor in (ContextThreadPoolExecutor(1), ThreadPoolExecutor(1)):
            named = executor if how == "named" else None
            if named is None:
                loop.set_default_executor(executor)
            seen.append(await loop.run_in_executor(named, where))
            seen.append(await loop.run_in_executor(named, wrap(where)))

    run((job, ACME))

    assert seen == [("acme", True), ("acme", True), (None, False), ("acme", True)]


def test_what_the_body_sets_is_gone_for_the_next_task(app: Celery, run: Any, seen: list[Any]) -> None:
    register_context_var(label)
    unregistered: ContextVar[str] = ContextVar("unregistered")

    @app.task(base=BaseTask)
    async def mess() -> None:
        seen.append((organization(), label.get(None), unregistered.get(None)))
        label.set("left over")
        unregistered.set("left over")
        tenant_scope(TenantContext("intruder")).__enter__()

    run((mess, ACME), (mess, GLOBEX), (mess, ACME))

    assert seen == [("acme", None, None), ("globex", None, None), ("acme", None, None)]


def test_the_tasks_of_one_batch_do_not_share_variables(app: Celery, run: Any, seen: list[Any]) -> None:
    async def item(number: int) -> None:
        seen.append((number, label.get(None), organization()))
        label.set(f"set by {number}")

    @app.task(base=BaseTask, bind=True)
    async def batch(self: BaseTask) -> None:
        async for _ in self.batch(item, range(4), limit=2):
            pass

    run((batch, ACME))

    assert sorted(seen) == [(number, None, "acme") for number in range(4)]


# --- failing, retrying ------------------------------------------------------------------------------------------


def test_an_exception_is_the_tasks_failure(app: Celery) -> None:
    @app.task(base=BaseTask)
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with tenant_scope(ACME):
        result = fail.apply()

    assert result.state == "FAILURE"
    assert repr(result.result) == "ValueError('broken')"


@pytest.mark.parametrize("by", ["policy", "autoretry_for", "hand"])
def test_retries_are_as_for_other_tasks(app: Celery, run: Any, seen: list[Any], by: str) -> None:
    options: dict[str, Any] = {
        "policy": {"retry_policy": RetryPolicy(max_retries=2, base=0, retry_on=(ValueError,))},
        "autoretry_for": {"autoretry_for": (ValueError,), "default_retry_delay": 0, "max_retries": 2},
        "hand": {"max_retries": 2},
    }[by]

    @app.task(base=BaseTask, bind=True, **options)
    async def flaky(self: BaseTask) -> None:
        await asyncio.sleep(0)
        seen.append((self.tenant.organization_id, self.request.retries))
        if by == "hand":
            raise self.retry(exc=ValueError("again"), countdown=0)
        raise ValueError("again")

    run((flaky, ACME))

    assert seen == [("acme", 0), ("acme", 1), ("acme", 2)]


def test_ignore_and_hooks_are_as_for_other_tasks(app: Celery, run: Any, seen: list[Any]) -> None:
    class Hooked(BaseTask):
        abstract = True

        def on_success(self, *_: Any) -> None:
            seen.append(("success", organization()))

        def on_failure(self, *_: Any) -> None:
            seen.append(("failure", organization()))

    @app.task(base=Hooked)
    async def end(error: str | None) -> None:
        await asyncio.sleep(0)
        if error:
            raise {"Ignore": Ignore, "ValueError": ValueError}[error]

    run((end, ACME, None), (end, GLOBEX, "Ignore"), (end, GLOBEX, "ValueError"))

    assert seen == [("success", "acme"), ("failure", "globex")]


def test_a_task_without_a_tenant_is_refused_before_its_coroutine_is_made(
    app: Celery, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, name="body")
    async def body() -> None:
        seen.append("ran")

    with pytest.raises(MissingTenantError):
        body.delay()
    app.send_task("body", headers={"someone": "else"}, task_type=Task())  # as by who knows nothing of the task
    work_off(app)
    assert seen == []


def test_a_coroutine_that_was_cancelled_from_inside_is_a_failure_and_not_the_workers_end(app: Celery) -> None:
    @app.task(base=BaseTask)
    async def cancel_itself() -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await asyncio.sleep(1)

    @app.task(base=BaseTask)
    async def await_what_is_cancelled() -> None:
        child = asyncio.create_task(asyncio.sleep(1))
        child.cancel()
        await child

    with tenant_scope(ACME):
        for task in (cancel_itself, await_what_is_cancelled):
            with pytest.raises(TaskCancelledError, match="was cancelled, or awaited something that was"):
                task.apply().get()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where whoever has started this process ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_what_ends_a_worker_comes_through_and_the_rest_is_cleaned_up(app: Celery, look: Any, run: Any) -> None:
    cleaned: list[str] = []

    async def part() -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await asyncio.sleep(0)
            cleaned.append("part")

    @app.task(base=BaseTask)
    async def interrupted() -> None:
        child = asyncio.create_task(part())
        try:
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            await child
        finally:
            cleaned.append("body")

    with tenant_scope(ACME), pytest.raises(KeyboardInterrupt):
        interrupted.apply(throw=True)

    assert sorted(cleaned) == ["body", "part"]
    run((look, GLOBEX))


# --- nothing is left --------------------------------------------------------------------------------------------


def test_a_coroutine_that_is_left_behind_is_cancelled_before_the_next_task(
    app: Celery, look: Any, run: Any, seen: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def linger() -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await asyncio.sleep(0)
            seen.append(("cleaned up", organization()))

    @app.task(base=BaseTask, name="leave")
    async def leave(fail: bool) -> None:
        asyncio.create_task(linger())  # noqa: RUF006 - is what the test is about
        await asyncio.sleep(0)
        if fail:
            raise ValueError

    run((leave, ACME, False), (look, GLOBEX), (leave, ACME, True), (look, GLOBEX))

    assert [each[-1] for each in seen] == ["acme", "globex", "acme", "globex"]
    assert [each[0] for each in seen[::2]] == ["cleaned up"] * 2
    assert seen[1][0] is seen[3][0]
    logged = [(each.levelno, each.getMessage()) for each in caplog.records if each.name == "rhesis_tasks.runs"]
    assert logged[0] == (
        logging.WARNING,
        "task leave left test_a_coroutine_that_is_left_behind_is_cancelled_before_the_next_task.<locals>.linger "
        "behind: cancelled",
    )
    assert len(logged) == 1, "after a failure that is usual"


def test_a_task_that_the_loop_has_not_made_is_cancelled_too(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    async def linger() -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            seen.append(("cleaned up", organization()))

    @app.task(base=BaseTask)
    async def leave() -> None:
        asyncio.Task(linger(), loop=asyncio.get_running_loop())
        await asyncio.sleep(0)

    run((leave, ACME), (look, GLOBEX))

    assert [each[1] for each in seen] == ["acme", "globex"]


def test_what_the_body_leaves_to_be_called_back_is_before_the_next_task(
    app: Celery, look: Any, run: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask)
    async def leave(how: str) -> None:
        if how == "a callback":
            asyncio.get_running_loop().call_soon(lambda: seen.append((how, organization())))
        else:
            body: Any = asyncio.current_task()
            body.add_done_callback(lambda _: seen.append((how, organization())))

    run((leave, ACME, "a callback"))
    assert seen == [("a callback", "acme")]
    run((leave, ACME, "of the body"))
    assert seen[1:] == [("of the body", "acme")]


@pytest.mark.parametrize("app", ["asyncio"], indirect=True)  # uvloop does not tell what waits
@pytest.mark.parametrize("how", ["call_soon", "call_later"])
def test_what_is_called_back_again_and_again_ends_before_the_next_task(
    app: Celery, look: Any, run: Any, seen: list[Any], how: str
) -> None:
    @app.task(base=BaseTask)
    async def leave() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            seen.append((loop, "again"))
            loop.call_soon(again) if how == "call_soon" else loop.call_later(0.001, again)

        loop.call_soon(loop.call_soon, loop.call_soon, again)

    run((leave, ACME))
    called = len(seen)
    run((look, GLOBEX), (look, ACME))

    assert called
    assert [each[1] for each in seen[called:]] == ["globex", "acme"]
    assert len({loop for loop, _ in seen}) == 1


def test_a_body_that_is_cancelled_before_it_begins_ends(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask)
    async def cancelled() -> None:
        seen.append((None, "ran"))

    def cancel_all() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    run((look, ACME))
    loop, _ = seen.pop()
    loop.call_soon_threadsafe(cancel_all)  # as a thread may between two tasks
    with tenant_scope(GLOBEX), pytest.raises(TaskCancelledError):
        cancelled.apply(throw=True)
    run((look, GLOBEX))

    assert [each[1] for each in seen] == ["globex"]


def test_what_would_not_end_never_runs_again(
    app: Celery, look: Any, run: Any, seen: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(0.005)
                seen.append(("still there", organization()))
            except asyncio.CancelledError:
                seen.append(("swallowed", organization()))

    @app.task(base=BaseTask, cleanup_grace=0.05)
    async def leave() -> None:
        seen.append((asyncio.get_running_loop(), None))
        asyncio.create_task(stubborn())  # noqa: RUF006
        await asyncio.sleep(0.001)

    run((leave, ACME), (look, GLOBEX), (look, GLOBEX))

    at = seen.index(next(each for each in seen if each[1] == "globex"))
    assert {each[1] for each in seen[:at]} <= {None, "acme"}
    assert ("swallowed", "acme") in seen[:at]
    assert [each[1] for each in seen[at:]] == ["globex"] * 2, "another loop, on which there is nothing else"
    assert seen[0][0].is_closed()
    assert "stubborn did not end in 0.05 s" in caplog.text


def test_coroutines_that_cleaning_up_starts_are_waited_for_too(
    app: Celery, look: Any, run: Any, seen: list[Any]
) -> None:
    async def last() -> None:
        await asyncio.sleep(0.005)
        seen.append(("last", organization()))

    async def linger() -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            await last()
            asyncio.create_task(last())  # noqa: RUF006

    @app.task(base=BaseTask)
    async def leave() -> None:
        asyncio.create_task(linger())  # noqa: RUF006
        await asyncio.sleep(0)

    run((leave, ACME), (look, GLOBEX))

    assert [each[1] for each in seen][-1] == "globex"
    assert ("last", "acme") in seen


@pytest.mark.parametrize("how", ["a callback", "its cleanup", "a generator"])
def test_what_starts_itself_again_and_again_is_given_up(
    app: Celery, look: Any, run: Any, seen: list[Any], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    until = time.monotonic() + 3  # or this test would never end where it fails

    def again(_: object = None) -> None:
        if time.monotonic() < until:
            started = asyncio.get_running_loop().create_task(linger())
            started.add_done_callback(again if how == "a callback" else lambda _: None)

    async def linger() -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            if how == "its cleanup":
                again()
                await asyncio.sleep(0)

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            if time.monotonic() < until:
                await anext(numbers())

    @app.task(base=BaseTask, cleanup_grace=0.05)
    async def leave() -> None:
        seen.append((asyncio.get_running_loop(), organization()))
        if how == "a generator":
            await anext(numbers())
        again()
        await asyncio.sleep(0.001)

    run((leave, ACME), (look, GLOBEX))

    assert time.monotonic() < until
    assert [each[1] for each in seen] == ["acme", "globex"]
    assert "did not end in 0.05 s" in caplog.text or LeftoverError.__name__ in caplog.text


@pytest.mark.parametrize("who", ["the body", "what it leaves"])
def test_a_cancellation_of_a_body_that_has_ended_does_not_keep_the_rest_from_cleaning_up(
    app: Celery, look: Any, run: Any, seen: list[Any], who: str
) -> None:
    async def linger(body: Any) -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            if who == "what it leaves":
                body.cancel()
            await asyncio.sleep(0.005)
            seen.append((asyncio.get_running_loop(), organization()))

    @app.task(base=BaseTask)
    async def leave() -> None:
        body: Any = asyncio.current_task()
        asyncio.create_task(linger(body))  # noqa: RUF006
        await asyncio.sleep(0)
        if who == "the body":
            body.cancel()

    run((leave, ACME), (look, GLOBEX))

    assert [each[1] for each in seen] == ["acme", "globex"]
    assert seen[0][0] is seen[1][0]


def test_generators_that_were_not_exhausted_are_closed_for_their_tenant(
    app: Celery, look: Any, run: Any, seen: list[Any]
) -> None:
    kept: list[Any] = []

    async def numbers() -> Any:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            seen.append(("closed", organization()))

    @app.task(base=BaseTask)
    async def leave(how: str) -> None:
        generator = numbers()
        await anext(generator)
        if how == "kept":
            kept.append(generator)
        elif how == "in a circle":
            circle = [generator]
            circle.append(circle)
        await asyncio.sleep(0)

    run((leave, ACME, "kept"), (look, GLOBEX), (leave, ACME, "in a circle"), (look, GLOBEX), (leave, ACME, "dropped"))
    gc.collect()
    run((look, GLOBEX))

    assert [each[1] for each in seen] == ["acme", "globex", "acme", "globex", "acme", "globex"]


def test_a_generator_that_another_thread_collects_is_closed_for_its_own_tenant(
    app: Celery, run: Any, seen: list[Any]
) -> None:
    async def numbers() -> Any:
        try:
            yield 1
        finally:
            seen.append((organization(), threading.get_ident()))

    def collect() -> None:
        with tenant_scope(GLOBEX):
            gc.collect()

    @app.task(base=BaseTask)
    async def leave() -> None:
        circle: list[Any] = [numbers()]
        await anext(circle[0])
        circle.append(circle)
        del circle
        thread = threading.Thread(target=collect)
        thread.start()
        thread.join(TIMEOUT)
        await asyncio.sleep(0.01)

    run((leave, ACME))

    assert seen == [("acme", threading.get_ident())]


def test_a_callback_of_an_earlier_task_starts_no_coroutine(
    app: Celery, look: Any, run: Any, seen: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def late() -> None:
        seen.append(("late", organization()))

    @app.task(base=BaseTask, name="leave")
    async def leave() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.create_task(late()))
        loop.call_soon(lambda: asyncio.ensure_future(late()))

    run((leave, ACME), (look, GLOBEX))

    assert [each[1] for each in seen] == ["globex"]
    assert caplog.text.count("late of task leave was to be started when that was over") == 2
    assert LeftoverError.__name__ in caplog.text


def test_a_thread_of_an_earlier_task_starts_no_coroutine(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    go, done = threading.Event(), threading.Event()

    async def late() -> None:
        seen.append(("late", organization()))

    def wait_and_start(loop: Any) -> None:
        go.wait(TIMEOUT)
        asyncio.run_coroutine_threadsafe(late(), loop)
        done.set()

    @app.task(base=BaseTask, name="leave")
    async def leave() -> None:
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, wait_and_start, loop)

    @app.task(base=BaseTask, name="wait")
    async def wait() -> None:
        go.set()
        await asyncio.to_thread(done.wait, TIMEOUT)
        await asyncio.sleep(0.01)

    run((leave, ACME), (wait, GLOBEX), (look, GLOBEX))

    assert [each[1] for each in seen] == ["globex"]


@pytest.mark.parametrize("how", ["wrapped", "plain"])
def test_no_thread_of_an_earlier_task_starts_a_coroutine_beside_a_later_one(
    app: Celery, run: Any, seen: list[Any], how: str
) -> None:
    go = threading.Event()
    failed: list[Any] = []

    async def late() -> None:
        seen.append(("late", organization()))

    def start_late(loop: Any) -> None:
        go.wait(TIMEOUT)
        failed.append(asyncio.run_coroutine_threadsafe(late(), loop).exception(TIMEOUT))

    @app.task(base=BaseTask)
    async def leave() -> None:
        target = wrap(start_late) if how == "wrapped" else start_late
        threads.append(threading.Thread(target=target, args=(asyncio.get_running_loop(),)))
        threads[0].start()

    @app.task(base=BaseTask)
    async def wait() -> None:
        go.set()
        await asyncio.to_thread(threads[0].join, TIMEOUT)

    threads: list[threading.Thread] = []
    run((leave, ACME), (wait, GLOBEX))

    assert seen == []
    assert [type(each) for each in failed] == [LeftoverError]
    assert ("when that was over" if how == "wrapped" else "wrap()") in str(failed[0])


@pytest.mark.parametrize("context", ["its own", "none"])
@pytest.mark.parametrize("how", ["call_soon_threadsafe", "add_reader"])
def test_what_an_earlier_task_has_left_to_be_called_back_does_nothing_to_a_later_one(
    app: Celery, run: Any, seen: list[Any], how: str, context: str
) -> None:
    go, called = threading.Event(), threading.Event()
    near, far = socket.socketpair()
    near.setblocking(False)
    noted: dict[str, Any] = {}

    @app.task(base=BaseTask, bind=True, name="child")
    def child(self: BaseTask) -> None:
        seen.append(("child", self.tenant.organization_id, self.request.parent_id))

    @app.task(base=BaseTask, bind=True, name="job")
    async def job(self: BaseTask, whose: str) -> None:
        loop = asyncio.get_running_loop()
        seen.append((whose, organization(), self.request.args, self.request.retries))
        if whose == "of globex":
            go.set()
            far.send(b"x")
            await asyncio.to_thread(called.wait, TIMEOUT)
            await self.aborted()
            return

        def call_back() -> None:
            if how == "add_reader":
                loop.remove_reader(near)
            calls: dict[str, Callable[[], Any]] = {
                "retry": lambda: self.retry(throw=False, countdown=0),
                "replace": lambda: self.replace(child.si()),
                "add_to_chord": lambda: self.add_to_chord(child.si()),
                "report_progress": lambda: self.report_progress(1),
                "should_abort": self.should_abort,
                "aborted": lambda: self.aborted().send(None),
                "batch": lambda: self.batch(asyncio.sleep, [0], limit=1),
            }
            for name, call in calls.items():
                try:
                    call()
                except Exception as error:
                    noted[name] = type(error), "wrap()" in str(error)
            noted["request"] = self.request.id, self.request.args
            with tenant_scope(ACME):
                child.delay()
            called.set()

        where = copy_context() if context == "its own" else Context()
        if how == "add_reader":
            where.run(loop.add_reader, near, call_back)
        else:

            def wait() -> None:
                go.wait(TIMEOUT)
                loop.call_soon_threadsafe(call_back)

            threading.Thread(target=where.run, args=(wait,)).start()

    with near, far:
        run((job, ACME, "of acme"), (job, GLOBEX, "of globex"))

    assert noted.pop("request") == (None, None)
    assert set(noted.values()) == {(NotSupportedError, True)}
    assert len(noted) == 7
    assert seen == [
        ("of acme", "acme", ["of acme"], 0),
        ("of globex", "globex", ["of globex"], 0),
        ("child", "acme", None),
    ]


def test_a_callback_of_others_acts_for_the_task_if_it_is_wrapped(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True)
    async def job(self: BaseTask) -> None:
        called = asyncio.get_running_loop().create_future()

        def call_back() -> None:
            seen.append((self.should_abort(), self.request.id, organization()))
            called.set_result(None)

        Context().run(asyncio.get_running_loop().call_soon, wrap(call_back))
        await called
        seen.append((False, self.request.id, organization()))

    run((job, ACME))

    assert seen[0] == seen[1] != (False, None, "acme")


def test_a_thread_of_the_running_task_starts_coroutines_if_it_is_wrapped(
    app: Celery, run: Any, seen: list[Any]
) -> None:
    async def part() -> None:
        seen.append((organization(), together.request.id is not None))

    def start_part(loop: Any) -> None:
        asyncio.run_coroutine_threadsafe(part(), loop).result(TIMEOUT)

    @app.task(base=BaseTask)
    async def together() -> None:
        thread = threading.Thread(target=wrap(start_part), args=(asyncio.get_running_loop(),))
        thread.start()
        await asyncio.to_thread(thread.join, TIMEOUT)

    run((together, ACME))

    assert seen == [("acme", True)]


def test_a_librarys_thread_that_knows_no_task_gives_its_answer(app: Celery, run: Any, seen: list[Any]) -> None:
    asked: SimpleQueue[Any] = SimpleQueue()

    def answer() -> None:  # as aiosqlite does, for whoever asks
        while (future := asked.get()) is not None:
            future.get_loop().call_soon_threadsafe(future.set_result, "the answer")

    @app.task(base=BaseTask)
    async def ask() -> None:
        if not thread.ident:
            thread.start()
        future = asyncio.get_running_loop().create_future()
        asked.put(future)
        async with asyncio.timeout(TIMEOUT):
            seen.append((await future, organization()))

    thread = threading.Thread(target=answer, daemon=True)
    run((ask, ACME), (ask, GLOBEX))
    asked.put(None)

    assert seen == [("the answer", "acme"), ("the answer", "globex")]


def test_the_failure_of_a_coroutine_that_nobody_awaited_is_logged_for_its_own_tenant(
    app: Celery, look: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ValueError("nobody looked at this")

    @app.task(base=BaseTask, name="leave")
    async def leave() -> None:
        child = asyncio.create_task(fail())
        circle: list[Any] = [child]
        circle.append(circle)  # so that it is only collected later
        await asyncio.sleep(0)

    run((leave, ACME), (look, GLOBEX))
    gc.collect()

    (record,) = [each for each in caplog.records if each.exc_info and "nobody looked" in str(each.exc_info[1])]
    assert (record.organization_id, record.task_name) == ("acme", "leave")


def test_what_a_task_does_to_the_loop_is_undone(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask)
    async def meddle() -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(made)
        loop.set_exception_handler(lambda *_: seen.append(("handled", organization())))

    def made(loop: Any, coroutine: Any, **options: Any) -> Any:
        seen.append(("made", organization()))
        return asyncio.Task(coroutine, loop=loop, **options)

    @app.task(base=BaseTask)
    async def fail_in_callback() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await asyncio.create_task(asyncio.sleep(0.001))

    run((meddle, ACME), (fail_in_callback, GLOBEX), (look, GLOBEX))

    assert [each[1] for each in seen] == ["globex"]


@pytest.mark.parametrize("how", ["replaced", "shut down", "busy for ever"])
def test_the_next_task_has_threads_whatever_a_task_does_to_them(
    app: Celery, run: Any, seen: list[Any], how: str
) -> None:
    end = threading.Event()

    @app.task(base=BaseTask)
    async def meddle() -> None:
        loop = asyncio.get_running_loop()
        if how == "replaced":
            loop.set_default_executor(ThreadPoolExecutor())
        elif how == "shut down":
            await loop.shutdown_default_executor()
        else:
            for _ in range(50):
                loop.run_in_executor(None, end.wait, TIMEOUT)

    @app.task(base=BaseTask)
    async def use_thread() -> None:
        async with asyncio.timeout(TIMEOUT / 2):
            seen.append(await asyncio.get_running_loop().run_in_executor(None, organization))

    try:
        run((meddle, ACME), (use_thread, GLOBEX), (use_thread, ACME))
    finally:
        end.set()

    assert seen == ["globex", "acme"]


def test_debugging_a_loop_ends_with_the_task(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask)
    async def debug() -> None:
        seen.append(asyncio.get_running_loop().get_debug())
        asyncio.get_running_loop().set_debug(True)

    run((debug, ACME), (debug, GLOBEX))

    assert seen[0] == seen[1]


def test_a_failure_in_a_context_of_its_own_is_logged_for_the_task(
    app: Celery, look: Any, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ValueError("nobody looked at this")

    @app.task(base=BaseTask, name="leave")
    async def leave() -> None:
        circle: list[Any] = [asyncio.get_running_loop().create_task(fail(), context=Context())]
        circle.append(circle)
        await asyncio.sleep(0)

    run((leave, ACME), (look, GLOBEX))
    gc.collect()

    (record,) = [each for each in caplog.records if each.exc_info and "nobody looked" in str(each.exc_info[1])]
    assert (record.organization_id, record.task_name) == ("acme", "leave")


def test_what_a_coroutine_raises_that_is_given_up_does_not_end_the_worker(
    app: Celery, look: Any, run: Any, seen: list[Any]
) -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(TIMEOUT)
            except asyncio.CancelledError:
                pass
            except GeneratorExit:
                raise asyncio.CancelledError from None

    @app.task(base=BaseTask, cleanup_grace=0.01)
    async def leave() -> None:
        asyncio.create_task(stubborn())  # noqa: RUF006
        await asyncio.sleep(0)

    run((leave, ACME), (look, GLOBEX))

    assert [each[1] for each in seen] == ["globex"]


@pytest.mark.parametrize("how", ["the body", "a body that returns", "a callback", "a timer"])
def test_stopping_the_loop_ends_no_task(app: Celery, look: Any, run: Any, seen: list[Any], how: str) -> None:
    @app.task(base=BaseTask)
    async def stop() -> None:
        loop = asyncio.get_running_loop()
        if how == "a timer":
            loop.call_later(0.01, loop.stop)
        elif how == "a callback":
            loop.call_soon(loop.call_soon, loop.call_soon, loop.call_soon, loop.stop)
        else:
            loop.stop()
            await asyncio.sleep(0 if how == "a body that returns" else 0.01)
        seen.append((loop, organization()))

    run((stop, ACME), (look, GLOBEX), (look, ACME))

    assert [each[1] for each in seen] == ["acme", "globex", "acme"]
    assert len({loop for loop, _ in seen}) == 1


def test_timers_end_with_the_task(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    async def late() -> None:
        seen.append((None, "late"))

    @app.task(base=BaseTask)
    async def leave() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            seen.append((None, "again"))
            loop.call_at(loop.time() + 0.001, again)

        again()
        loop.call_later(0.001, lambda: asyncio.Task(late(), loop=loop))

    run((leave, ACME), (look, GLOBEX))

    assert [each[1] for each in seen] == ["again", "globex"]


def test_a_loop_that_somebody_has_closed_is_replaced(app: Celery, look: Any, run: Any, seen: list[Any]) -> None:
    run((look, ACME))
    seen[0][0].close()
    run((look, GLOBEX), (look, GLOBEX))

    assert [each[1] for each in seen] == ["acme", "globex", "globex"]
    assert seen[1][0] is seen[2][0]


# --- soft time limits ---------------------------------------------------------------------------------------------


@pytest.fixture
def soft_limit_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Sends this process what a prefork pool sends at the soft time limit, after so many seconds."""
    monkeypatch.setattr(soft_limits, "BLOCKED_AFTER", 0.05)
    before = signal.signal(signal.SIGUSR1, soft_limits._on_limit)
    timers = []

    def after(seconds: float) -> None:
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)))
        timers[-1].start()

    yield after
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGUSR1, before)


def test_the_soft_limit_ends_what_blocks_while_the_rest_is_cleared_away(
    app: Celery, look: Any, run: Any, seen: list[Any], soft_limit_after: Any
) -> None:
    async def linger() -> None:
        try:
            await asyncio.sleep(TIMEOUT)
        finally:
            time.sleep(TIMEOUT / 2)  # noqa: ASYNC251 - is what the test is about

    @app.task(base=BaseTask)
    async def leave() -> str:
        asyncio.create_task(linger())  # noqa: RUF006
        await asyncio.sleep(0)
        soft_limit_after(0.05)
        return "done"

    started = time.monotonic()
    with tenant_scope(ACME):
        assert leave.apply().get() == "done"
    assert time.monotonic() - started < TIMEOUT / 4
    run((look, GLOBEX))


@pytest.mark.usefixtures("interruptible")
def test_the_soft_limit_does_not_break_into_the_clearing_of_a_loop_that_is_given_up(
    app: Celery, look: Any, run: Any, seen: list[Any], soft_limit_after: Any
) -> None:
    @app.task(base=BaseTask)
    async def interrupted() -> None:
        try:
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            await asyncio.sleep(TIMEOUT)
        finally:
            soft_limit_after(0.05)
            try:
                await asyncio.sleep(0.5)
            finally:
                seen.append(("cleaned up", organization()))

    with tenant_scope(ACME), pytest.raises(KeyboardInterrupt):
        interrupted.apply(throw=True)
    run((look, GLOBEX))

    assert [each[1] for each in seen] == ["acme", "globex"]


def test_a_soft_limit_before_the_first_step_is_one(
    app: Celery, look: Any, run: Any, seen: list[Any], soft_limit_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_start(self: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return start(self, *args)

    start = runs.Run.start
    monkeypatch.setattr(runs.Run, "start", interrupted_start)
    with tenant_scope(ACME), pytest.raises(SoftTimeLimitExceeded):
        look.apply(throw=True)
    monkeypatch.undo()
    run((look, GLOBEX))

    assert [each[1] for each in seen] == ["globex"]


def test_code_in_c_that_takes_its_time_hides_no_later_limit(app: Celery, soft_limit_after: Any) -> None:
    """Signals that arrive meanwhile are one."""
    started = time.process_time()
    hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 100_000)
    a_second = int(100_000 / (time.process_time() - started))

    @app.task(base=BaseTask)
    async def blocks() -> None:
        soft_limit_after(0.01)
        for _ in range(3):
            hashlib.pbkdf2_hmac("sha256", b"password", b"salt", a_second // 2)
        await asyncio.sleep(TIMEOUT)

    @app.task(base=BaseTask)
    async def sleeps() -> None:
        soft_limit_after(0.01)
        await asyncio.sleep(TIMEOUT)

    with tenant_scope(ACME):
        for task in (blocks, sleeps, sleeps, sleeps):
            with pytest.raises(SoftTimeLimitExceeded):
                task.apply(throw=True)


def test_a_fork_leaves_the_loops_of_other_threads_alone(app: Celery) -> None:
    go, ready = threading.Event(), threading.Event()
    results: list[str] = []

    @app.task(base=BaseTask)
    async def in_thread() -> str:
        return await asyncio.to_thread(str, "done")

    def two_tasks() -> None:
        with tenant_scope(ACME):
            results.append(in_thread.apply(throw=True).get())
            ready.set()
            go.wait(TIMEOUT)
            results.append(in_thread.apply(throw=True).get())
        close_loops()

    thread = threading.Thread(target=two_tasks, daemon=True)
    thread.start()
    ready.wait(TIMEOUT)
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    go.set()
    thread.join(TIMEOUT)

    assert results == ["done", "done"], "the child has taken something out of what the loop waits for"


def test_a_coroutine_that_was_given_up_does_not_go_on_when_it_is_collected(
    app: Celery, look: Any, run: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, cleanup_grace=0.02)
    async def leave() -> None:
        async def stubborn() -> None:
            try:
                while True:
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(TIMEOUT)
            finally:
                try:
                    await asyncio.sleep(0)
                finally:
                    seen.append(("cleaned up", organization()))

        task = asyncio.create_task(stubborn())
        task.circle = task  # type: ignore[attr-defined]  # so that it is collected later
        await asyncio.sleep(0)

    run((leave, ACME))
    with tenant_scope(GLOBEX):
        gc.collect()

    assert seen == [("cleaned up", "acme")] or seen == [("cleaned up", None)]


def test_a_forked_child_has_a_loop_of_its_own(app: Celery, look: Any, seen: list[Any]) -> None:
    with tenant_scope(ACME):
        look.apply(throw=True)
        before = seen[-1][0]
        child = os.fork()
        if not child:
            look.apply(throw=True)
            os._exit(0 if seen[-1][0] is not before and not before.is_closed() else 1)
        deadline = time.monotonic() + TIMEOUT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, "the child does not end"
            time.sleep(0.01)
        look.apply(throw=True)

    assert ended[1] == 0
    assert seen[-1][0] is before


# --- eagerly, and as functions ------------------------------------------------------------------------------------


def test_an_eager_task_runs_beside_a_running_loop_with_its_context(app: Celery, seen: list[Any]) -> None:
    register_context_var(label)
    app.conf.task_always_eager = True

    @app.task(base=BaseTask, bind=True)
    async def inner(self: BaseTask) -> list[Any]:
        await asyncio.sleep(0)
        return [self.tenant.organization_id, label.get(None), self.request.id]

    async def route() -> None:
        label.set("of the route")
        with tenant_scope(ACME):
            result = inner.delay()
            seen.append((result.get(), result.id))
            seen.append((group(inner.s(), inner.s()).delay().get(), None))
        assert current_tenant() is None

    Context().run(asyncio.run, route())

    (alone, task_id), (together, _) = seen
    assert alone == ["acme", "of the route", task_id]
    assert [each[:2] for each in together] == [["acme", "of the route"]] * 2
    assert [each for each in threading.enumerate() if each.name.startswith(inner.name)] == []


def test_an_eager_failure_beside_a_running_loop_is_the_results(app: Celery) -> None:
    @app.task(base=BaseTask, retry_policy=RetryPolicy(max_retries=1, base=0, retry_on=(ValueError,)))
    async def fail() -> None:
        raise ValueError("broken")

    async def route() -> Any:
        with tenant_scope(ACME):
            return fail.apply()

    assert repr(asyncio.run(route()).result) == "ValueError('broken')"


def test_called_as_a_function_it_is_awaited_by_the_caller(app: Celery) -> None:
    @app.task(base=BaseTask, bind=True)
    async def inner(self: BaseTask, name: str) -> list[Any]:
        seen_before = [self.tenant.organization_id, self.request.organization_id, self.request.args]
        await asyncio.sleep(0.001 * (3 - len(name)))
        assert [self.tenant.organization_id, self.request.organization_id, self.request.args] == seen_before
        return [*seen_before]

    async def for_tenant(tenant: TenantContext, name: str) -> Any:
        with tenant_scope(tenant):
            return await inner(name)

    async def main() -> Any:
        return await asyncio.gather(for_tenant(ACME, "a"), for_tenant(GLOBEX, "bb"), for_tenant(ACME, "ccc"))

    assert asyncio.run(main()) == [
        ["acme", "acme", ("a",)],
        ["globex", "globex", ("bb",)],
        ["acme", "acme", ("ccc",)],
    ]
    with tenant_scope(ACME):
        waiting = inner("a")
    assert asyncio.run(waiting)[0] == "acme", "of the tenant that called it"
    with pytest.raises(MissingTenantError):
        inner("a")
    with tenant_scope(ACME), pytest.raises(TypeError):
        inner()


def test_called_as_a_function_it_may_be_cancelled_and_fail(app: Celery, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True)
    async def inner(self: BaseTask, error: bool) -> None:
        try:
            if error:
                raise ValueError("broken")
            await asyncio.sleep(TIMEOUT)
        finally:
            seen.append(self.request.organization_id)

    async def main() -> None:
        with tenant_scope(ACME):
            with pytest.raises(ValueError, match="broken"):
                await inner(True)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(inner(False), 0.01)

    asyncio.run(main())

    assert seen == ["acme", "acme"]
    assert inner.request.args is None


def test_a_task_that_calls_it_as_a_function_gets_a_coroutine_and_celerys_map_the_result(app: Celery) -> None:
    @app.task(base=BaseTask)
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    @app.task(base=BaseTask)
    def outer() -> int:
        return int(asyncio.run(double(1))) + int(asyncio.run(double(2)))

    @app.task(base=BaseTask)
    async def outer_async() -> int:
        return int(await double(1)) + int(await double(2))

    with tenant_scope(ACME):
        assert outer.apply().get() == 6
        assert outer_async.apply().get() == 6
        assert double.map([1, 2, 3]).apply().get() == [2, 4, 6]
        assert double.starmap([(1,), (2,)]).apply().get() == [2, 4]


# --- definitions --------------------------------------------------------------------------------------------------


def test_tasks_that_are_based_on_nothing_of_ours_are_run_too(app: Celery) -> None:
    @app.task
    async def plain() -> str | None:
        await asyncio.sleep(0)
        return organization()

    assert plain.apply().get() is None
    with tenant_scope(ACME):
        assert plain.apply().get() == "acme"


def test_an_asynchronous_generator_is_no_body(app: Celery) -> None:
    async def body() -> Any:
        yield 1

    with pytest.raises(TaskDefinitionError, match="is an asynchronous generator"):
        app.task(base=BaseTask, lazy=False, name="body")(body)


@pytest.mark.parametrize("grace", [-1, True, None, "5", float("inf"), float("nan")])
def test_a_grace_that_is_no_time_is_refused(app: Celery, grace: Any) -> None:
    async def body() -> None: ...

    with pytest.raises(TaskDefinitionError, match="cleanup_grace of task body must be seconds"):
        app.task(base=BaseTask, lazy=False, name="body", cleanup_grace=grace)(body)


def test_a_gevent_worker_does_not_start_with_async_tasks(app: Celery, look: Any) -> None:
    for pool in ("prefork", "threads", "solo"):
        refuse_async_tasks(app, pool)
    for pool in ("gevent", "eventlet"):
        with pytest.raises(SystemExit, match=f"async def tasks, which a {pool} worker cannot run: look"):
            refuse_async_tasks(app, pool)


@pytest.mark.parametrize("is_registered", [False, True])
def test_a_gevent_worker_does_not_start_with_async_hooks(app: Celery, is_registered: bool) -> None:
    async def hook(*_: Any) -> None: ...

    options: dict[str, Any] = {} if is_registered else {"on_tenant_failure": hook}

    @app.task(base=BaseTask, lazy=False, name="work", **options)
    def work() -> None: ...

    if is_registered:
        on_tenant_success(app, task="wo*")(hook)

    refuse_async_tasks(app, "prefork")
    with pytest.raises(SystemExit, match="async def hooks of tasks, which a gevent worker cannot run: work"):
        refuse_async_tasks(app, "gevent")


def test_an_unknown_kind_of_loop_is_refused(make_app: Callable[..., Celery]) -> None:
    with pytest.raises(ConfigurationError, match="event_loop= is 'asyncio' or 'uvloop', not 'trio'"):
        configure(make_app(configured=False), event_loop="trio")


def test_uvloop_has_to_be_installed(make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)

    with pytest.raises(MissingExtraError, match=r"rhesis-tasks\[uvloop\]"):
        configure(make_app(configured=False), event_loop="uvloop")


def test_a_decorator_that_runs_the_coroutine_itself_is_let_be(app: Celery) -> None:
    def run_it(function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            return asyncio.run(function(*args))

        return run

    @app.task(base=BaseTask)
    @run_it
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    with tenant_scope(ACME):
        assert double.apply((2,)).get() == 4
        assert double(3) == 6


@pytest.mark.parametrize("called", ["as a function", "by run", "of the same class"])
def test_a_decorator_that_calls_another_async_task_before_the_body_gets_a_coroutine(
    app: Celery, run: Any, seen: list[Any], called: str
) -> None:
    class Prepare(BaseTask):
        name = "prepare"

        async def run(self) -> None:
            seen.append("prepare")

    class Check(Prepare):
        name = "check"

    prepare: Any = app.register_task(Prepare())
    check: Any = app.register_task(Check())

    def after_preparing(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            preparing = {"as a function": prepare, "by run": prepare.run, "of the same class": check}[called]()
            returned = function(*args)

            async def both() -> Any:
                await preparing
                return await returned

            return both()

        return call

    @app.task(base=BaseTask, name="job")
    @after_preparing
    async def job(number: int) -> None:
        seen.append(number)

    run((job, ACME, 7), (check, ACME))

    assert seen == ["prepare", 7, "prepare"]


def test_a_subclass_may_have_a_body_that_is_not_async(app: Celery) -> None:
    class Slow(BaseTask):
        name = "slow"

        async def run(self) -> str:
            return "slow"

    class Quick(Slow):
        name = "quick"

        def run(self) -> str:  # type: ignore[override]
            return "quick"

    slow, quick = (app.register_task(each()) for each in (Slow, Quick))

    with tenant_scope(ACME):
        assert [task.apply().get() for task in (slow, quick)] == ["slow", "quick"]
    assert (slow.is_async, quick.is_async) == (True, False)


def test_sync_bodies_are_none(app: Celery) -> None:
    @app.task(base=BaseTask)
    def body() -> None: ...

    assert body.is_async is False
