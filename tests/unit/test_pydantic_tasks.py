"""Celery's ``pydantic=True`` on ``async def`` tasks: arguments and results are those of plain tasks."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from datetime import date
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator

from rhesis_tasks import BaseTask, TenantContext, TenantSessions, configure, tenant_scope, tenant_session
from rhesis_tasks.loops import close_loops

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    class Unknown(BaseModel):
        """A model that is there for type checkers only."""


class Order(BaseModel):
    number: int
    day: date = Field(date(2026, 1, 2), serialization_alias="on")
    discount: int | None = None

    @field_validator("number")
    @classmethod
    def add(cls, number: int, info: ValidationInfo) -> int:
        return number + ((info.context or {}).get("add") or 0)


class Special(Order):
    reason: str = "birthday"


class Other(BaseModel):
    total: int


SENT = {"number": 1, "day": "2026-01-02", "discount": None}


@pytest.fixture(autouse=True)
def tenant() -> Iterator[None]:
    with tenant_scope(TenantContext("acme", "alice")):
        yield
    close_loops()


Results = Callable[..., list[Any]]


@pytest.fixture
def results(app: Celery, work_off: Any) -> Results:
    """What becomes of a function as a task: on a worker, eagerly, and called."""

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        task = app.task(base=BaseTask, pydantic=True, name=f"{function.__name__}_{len(app.tasks)}", **options)(function)
        launched = task.delay(*args)
        work_off(app)
        returned = task(*args)
        called = asyncio.run(returned) if asyncio.iscoroutine(returned) else returned
        return [launched.get(), task.apply(args).get(), called]

    return run


def of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same as ``async def``."""

    @functools.wraps(function)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args, **kwargs)

    coroutine.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    del coroutine.__wrapped__
    return coroutine


# --- results ---------------------------------------------------------------------------------------------------


def same(order: Order) -> Order:
    assert isinstance(order, Order)
    return order


def optional(order: Order | None) -> Order | None:
    return order


def special(order: Order) -> Order:
    return Special(**order.model_dump())


def value(value: Order) -> Other:
    return Other(total=value.number)


def nothing(order: Order | None) -> None: ...


def plain(order: Order) -> int:
    return order.number


@pytest.mark.parametrize("function", [same, optional, special, value, nothing, plain])
def test_the_result_of_a_coroutine_is_dumped_as_that_of_a_plain_function(
    function: Callable[..., Any], results: Results
) -> None:
    assert results(of(function), {"number": 1}) == results(function, {"number": 1})


def test_a_dumped_result_is_of_the_model_that_was_returned(results: Results) -> None:
    async def order(order: Order) -> Order:
        assert order == Order(number=1)
        return Special(number=2)

    assert results(order, {"number": 1}) == [{**SENT, "number": 2, "reason": "birthday"}] * 3
    assert results(of(optional), None) == [None] * 3


def hidden(order: Unknown) -> Unknown:
    return order


def untold(order: Order):  # type: ignore[no-untyped-def]
    return order


def another(order: Order) -> Other:
    return order  # type: ignore[return-value]


@pytest.mark.parametrize("function", [untold, another])
def test_what_a_function_does_not_say_that_it_returns_is_left_as_it_is(
    function: Callable[..., Any], app: Celery
) -> None:
    for each in (function, of(function)):
        task = app.task(base=BaseTask, pydantic=True, name=f"{each.__name__}_{len(app.tasks)}")(each)

        assert task.apply(({"number": 1},)).get() == Order(number=1)


def test_annotations_that_cannot_be_resolved_are_left_alone(results: Results) -> None:
    assert results(of(hidden), {"number": 1}) == results(hidden, {"number": 1}) == [{"number": 1}] * 3


# --- options ---------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"pydantic_dump_kwargs": {"by_alias": True}}, {"number": 1, "on": "2026-01-02", "discount": None}),
    ({"pydantic_dump_kwargs": {"exclude_none": True, "exclude": {"day"}}}, {"number": 1}),
    ({"pydantic_context": {"add": 4}}, {**SENT, "number": 5}),
    ({"pydantic_strict": True}, SENT),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=str)
def test_the_options_hold_for_coroutines_too(
    options: dict[str, Any], expected: dict[str, Any], results: Results
) -> None:
    assert results(of(same), {"number": 1}, **options) == results(same, {"number": 1}, **options) == [expected] * 3


def test_what_is_not_valid_is_an_error_before_the_body_runs(app: Celery) -> None:
    for strict, wrong in ((False, "one"), (True, "1")):
        task = app.task(base=BaseTask, pydantic=True, pydantic_strict=strict, name=f"strict_{strict}")(of(same))

        with pytest.raises(ValidationError):
            task.apply(({"number": wrong},), throw=True)


# --- with the rest of a task -----------------------------------------------------------------------------------


def test_self_and_a_session_are_there_as_well(make_app: Callable[..., Celery]) -> None:
    app = make_app(configured=False)
    configure(app, sessions=TenantSessions("postgresql://nowhere/shop"))

    @app.task(base=BaseTask, bind=True, pydantic=True)
    @tenant_session
    async def order(self: BaseTask, db: AsyncSession, order: Order) -> Order:
        return Order(number=order.number + len(self.tenant.organization_id))

    assert order.apply(({"number": 1},)).get() == {**SENT, "number": 5}


def test_a_decorator_that_is_no_coroutine_function_itself_changes_nothing(results: Results) -> None:
    async def order(order: Order) -> Order:
        return order

    @functools.wraps(order)
    def decorated(*args: Any) -> Any:
        return order(*args)

    @functools.wraps(order)
    def running(*args: Any) -> Any:
        return asyncio.run(order(*args))

    assert results(decorated, {"number": 1}) == results(running, {"number": 1}) == [SENT] * 3


def test_an_attempt_after_an_error_is_dumped_too(app: Celery) -> None:
    attempts: list[int] = []

    @app.task(base=BaseTask, pydantic=True, autoretry_for=(OSError,), default_retry_delay=0)
    async def order(order: Order) -> Order:
        attempts.append(order.number)
        if len(attempts) == 1:
            raise OSError
        return order

    assert order.apply(({"number": 1},)).get() == SENT
    assert attempts == [1, 1]


def test_a_task_without_the_option_returns_what_its_body_does(app: Celery) -> None:
    class Partial(BaseTask):
        name = "partial"
        run = staticmethod(functools.partial(of(same)))

    for task in (app.task(base=BaseTask)(of(same)), app.register_task(Partial())):
        assert task.apply((Order(number=1),)).get() == Order(number=1)
