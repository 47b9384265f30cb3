"""The context in threads: what was wrapped runs as the code that wrapped it, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
from celery import Celery

from rhesis_tasks import (
    BaseTask,
    ContextThreadPoolExecutor,
    TenantContext,
    context_headers,
    current_tenant,
    register_context_var,
    tenant_scope,
    wrap,
)
from rhesis_tasks.errors import InvalidTenantError, TaskDefinitionError
from rhesis_tasks.logs import fields

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")


class Opaque:
    """A value that does not travel in a message as it is."""


@pytest.fixture
def locale() -> ContextVar[Any]:
    var: ContextVar[Any] = ContextVar("locale")
    register_context_var(var, dump=lambda _: "dumped", load=lambda _: pytest.fail("nothing travels here"))
    return var


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    """One thread that stays."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def look(locale: ContextVar[Any]) -> tuple[TenantContext | None, Any]:
    return current_tenant(), locale.get("unset")


def test_what_is_wrapped_has_the_context_of_the_code_that_wraps_it(
    locale: ContextVar[Any], worker: ThreadPoolExecutor
) -> None:
    value = Opaque()
    token = locale.set(value)
    with tenant_scope(ACME):
        wrapped = wrap(look)
    locale.reset(token)

    with tenant_scope(GLOBEX):
        assert worker.submit(wrapped, locale).result(10) == (ACME, value)
        assert wrapped(locale) == (ACME, value)
        assert current_tenant() == GLOBEX


def test_a_thread_has_its_own_context_again_afterwards(locale: ContextVar[Any], worker: ThreadPoolExecutor) -> None:
    def leave(error: Exception | None) -> None:
        locale.set("left")
        tenant_scope(GLOBEX).__enter__()
        if error:
            raise error

    with tenant_scope(ACME):
        worker.submit(wrap(leave), None).result(10)
        with pytest.raises(KeyError):
            worker.submit(wrap(leave), KeyError()).result(10)

    assert worker.submit(look, locale).result(10)[0] is None
    assert worker.submit(look, locale).result(10)[1] in ("unset", None)


def test_what_nobody_has_set_hides_what_the_thread_has(locale: ContextVar[Any], worker: ThreadPoolExecutor) -> None:
    worker.submit(lambda: (locale.set("the thread's"), tenant_scope(GLOBEX).__enter__())).result(10)

    assert worker.submit(wrap(look), locale).result(10) == (None, None)
    assert worker.submit(look, locale).result(10) == (GLOBEX, "the thread's")


def test_an_executor_submits_and_maps_with_the_context(locale: ContextVar[Any]) -> None:
    with ContextThreadPoolExecutor(2) as executor:
        for tenant in (ACME, GLOBEX):
            with tenant_scope(tenant):
                assert executor.submit(look, locale).result(10)[0] == tenant
                assert list(executor.map(lambda _: current_tenant(), range(5))) == [tenant] * 5
        assert executor.submit(look, locale).result(10)[0] is None


def test_a_thread_of_a_task_knows_the_task(app: Celery, work_off: Callable[[Celery], Any]) -> None:
    seen: list[Any] = []

    @app.task(base=BaseTask, bind=True, name="child")
    def child(self: BaseTask) -> None:
        seen.append(("child", self.tenant, self.request.parent_id))

    @app.task(base=BaseTask, bind=True, name="parent")
    def parent(self: BaseTask) -> None:
        def work() -> None:
            seen.append((self.request.id, fields()["task_name"], self.tenant))
            child.delay()

        thread = threading.Thread(target=wrap(work))
        thread.start()
        thread.join(10)

    with tenant_scope(ACME):
        parent.apply_async(task_id="the parent")
    work_off(app)

    assert seen == [("the parent", "parent", ACME), ("child", ACME, "the parent")]


def test_a_task_that_runs_asyncio_has_its_context_in_every_part_of_it(
    app: Celery, work_off: Callable[[Celery], Any]
) -> None:
    seen: list[Any] = []

    async def part() -> None:
        await asyncio.sleep(0)
        seen.append(current_tenant())

    async def everything() -> None:
        await asyncio.gather(part(), asyncio.create_task(part()))
        seen.append(await asyncio.to_thread(current_tenant))

    @app.task(base=BaseTask, name="loop")
    def loop() -> None:
        asyncio.run(everything())

    for tenant in (ACME, GLOBEX):
        with tenant_scope(tenant):
            loop.delay()
    work_off(app)

    assert seen == [ACME] * 3 + [GLOBEX] * 3


async def coroutine() -> None: ...


def generator() -> Iterator[None]:
    yield


async def async_generator() -> Any:
    yield


class Coroutine:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize("thing", [coroutine, generator, async_generator, Coroutine(), "text", None])
def test_only_plain_functions_are_wrapped(thing: Any) -> None:
    with pytest.raises(TaskDefinitionError, match=r"wrap\(\) takes a"):
        wrap(thing)


def test_a_wrapped_function_is_still_itself() -> None:
    def export(number: int) -> int:
        """Export."""
        return number + 1

    assert wrap(export)(1) == 2
    assert (wrap(export).__name__, wrap(export).__doc__) == ("export", "Export.")


def test_the_headers_of_a_context_launch_for_it(app: Celery, work_off: Callable[[Celery], Any]) -> None:
    seen: list[Any] = []

    @app.task(base=BaseTask, bind=True, name="digest")
    def digest(self: BaseTask) -> None:
        seen.append(self.tenant)

    app.send_task("digest", headers=context_headers(ACME))
    digest.apply_async(headers=context_headers(type("User", (), {"id": "gus", "organization_id": "globex"})()))
    work_off(app)

    assert seen == [ACME, GLOBEX]
    with pytest.raises(InvalidTenantError):
        context_headers("acme")  # type: ignore[arg-type]


def test_a_function_that_returns_what_runs_later_is_refused_when_it_is_called() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[None]:
        yield

    pending = coroutine()
    for returned in (pending, generator()):
        with pytest.raises(TaskDefinitionError, match="returned what runs later"):
            wrap(lambda returned=returned: returned)()
    pending.close()
