"""Other context variables that travel: what is registered, what is sent, what the body sees, what is left."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from celery import Celery, chain, chord
from contextvars_extras import ContextVarsRegistry

from rhesis_tasks import BaseTask, TenantContext, current_tenant, register_context_var, tenant_scope
from rhesis_tasks.errors import HeaderError, InvalidTenantError
from rhesis_tasks.headers import capture
from rhesis_tasks.variables import Activation, registered_vars, unregister_context_var

ACME = TenantContext("acme", "alice")
UNSET = "<unset>"


def alone(function: Callable[[], Any]) -> Any:
    """Run a function in a context in which no variable is set."""
    return Context().run(function)


@pytest.fixture
def locale() -> ContextVar[Any]:
    return ContextVar("locale")


# --- registering -----------------------------------------------------------------------------------------------


def test_only_registered_variables_travel(locale: ContextVar[Any]) -> None:
    private: ContextVar[str] = ContextVar("private")
    register_context_var(locale)

    def body() -> Mapping[str, Any]:
        locale.set("de")
        private.set("secret")
        return capture().variables

    assert alone(body) == {"locale": "de"}


def test_a_variable_travels_under_its_own_name_or_the_one_given(locale: ContextVar[Any]) -> None:
    register_context_var(locale)
    register_context_var(ContextVar("x"), name="request.zone")

    assert set(registered_vars()) == {"locale", "request.zone"}


def test_all_variables_of_a_registry_class_travel_also_those_without_a_default() -> None:
    class Request(ContextVarsRegistry):
        locale: str
        zone: str = "UTC"

    register_context_var(Request)

    def body() -> Mapping[str, Any]:
        current = Request()
        current.locale, current.zone = "de", "CET"
        return capture().variables

    assert alone(body) == {"Request.locale": "de", "Request.zone": "CET"}


def test_registering_a_registry_class_does_not_depend_on_what_is_set_at_the_time() -> None:
    class Request(ContextVarsRegistry):
        locale: str

    def body() -> set[str]:
        Request().locale = "de"
        register_context_var(Request)
        registered = set(registered_vars())
        unregister_context_var(Request)
        return registered

    assert alone(body) == {"Request.locale"}
    assert not registered_vars()


def test_a_deleted_variable_of_a_registry_is_unset() -> None:
    class Request(ContextVarsRegistry):
        zone: str = "UTC"

    register_context_var(Request)

    def body() -> Mapping[str, Any]:
        current = Request()
        current.zone = "CET"
        del current.zone
        return capture().variables

    assert alone(body) == {}


def test_a_name_can_belong_to_one_variable_only(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    with pytest.raises(InvalidTenantError, match="another context variable is registered as 'locale'") as caught:
        register_context_var(ContextVar("locale"))

    assert caught.value.field == "name"
    assert registered_vars()["locale"].var is locale


def test_registering_a_variable_again_changes_how_it_travels(locale: ContextVar[Any]) -> None:
    register_context_var(locale)
    register_context_var(locale, log=True)

    assert registered_vars()["locale"].log


@pytest.mark.parametrize("thing", [None, "locale", 7, object, dict, lambda: None])
def test_what_is_no_context_variable_cannot_be_registered(thing: Any) -> None:
    with pytest.raises(InvalidTenantError, match="takes a ContextVar or a ContextVarsRegistry class"):
        register_context_var(thing)


def test_a_registry_class_keeps_the_names_of_its_variables() -> None:
    class Request(ContextVarsRegistry):
        zone: str = "UTC"

    with pytest.raises(InvalidTenantError, match="name= does not go with a registry class"):
        register_context_var(Request, name="request")


def test_the_table_of_registered_variables_cannot_be_changed_from_outside(locale: ContextVar[Any]) -> None:
    with pytest.raises(TypeError):
        registered_vars()["locale"] = locale  # type: ignore[index]


def test_an_unregistered_variable_no_longer_travels(locale: ContextVar[Any]) -> None:
    register_context_var(locale)
    unregister_context_var(locale)
    unregister_context_var(locale)  # unknown by now, which is no error

    assert not registered_vars()


# --- sending ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["de", "", True, False, 0, -7, None])
def test_plain_values_travel_as_they_are(locale: ContextVar[Any], value: Any) -> None:
    register_context_var(locale)

    def body() -> Any:
        locale.set(value)
        return capture().variables["locale"]

    assert alone(body) is value


@pytest.mark.parametrize("value", [1.5, b"de", ["de"], {"a": 1}, uuid.UUID(int=1), object()])
def test_other_values_are_refused_at_the_launch_with_the_remedy(locale: ContextVar[Any], value: Any) -> None:
    register_context_var(locale)

    def body() -> None:
        locale.set(value)
        capture()

    with pytest.raises(InvalidTenantError, match="Register it with dump= and load=") as caught:
        alone(body)

    assert caught.value.field == "locale"
    assert caught.value.value is value


@pytest.mark.parametrize("log", ["false", 1, None])
def test_a_flag_that_is_no_bool_is_refused(locale: ContextVar[Any], log: Any) -> None:
    with pytest.raises(InvalidTenantError, match=f"log= is True or False, not {log!r}"):
        register_context_var(locale, log=log)

    assert not registered_vars()


def test_dump_must_return_a_plain_value(locale: ContextVar[Any]) -> None:
    register_context_var(locale, dump=lambda value: [value])  # type: ignore[arg-type,return-value]

    def body() -> None:
        locale.set("de")
        capture()

    with pytest.raises(InvalidTenantError, match="'locale' holds a list"):
        alone(body)


def test_an_unset_variable_does_not_travel_and_none_does(locale: ContextVar[Any]) -> None:
    register_context_var(locale)
    register_context_var(ContextVar("zone", default="UTC"))

    assert alone(lambda: capture().variables) == {}
    assert alone(lambda: locale.set(None) and capture().variables) == {"locale": None}


class Plan(StrEnum):
    PRO = "pro"


class Level(IntEnum):
    TOP = 3


class Shouted(str):
    def __str__(self) -> str:
        return self.upper()


@pytest.mark.parametrize(
    ("value", "travels"), [(Plan.PRO, "pro"), (Level.TOP, 3), (Shouted("pro"), "pro"), (True, True), (3, 3)]
)
@pytest.mark.parametrize("eagerly", [True, False], ids=["eagerly", "as a message"])
@pytest.mark.parametrize("dump", [None, lambda value: value], ids=["as it is", "dumped"])
def test_a_value_of_a_class_below_a_plain_one_arrives_as_the_plain_one(
    app: Celery, work_off: Any, locale: ContextVar[Any], value: Any, travels: Any, eagerly: bool, dump: Any
) -> None:
    register_context_var(locale, dump=dump)
    arrived: list[Any] = []

    @app.task(base=BaseTask, name="work")
    def work() -> None:
        arrived.append(locale.get())

    def launch() -> None:
        locale.set(value)
        with tenant_scope(ACME):
            if eagerly:
                work.apply()
            else:
                work.delay()

    alone(launch)
    work_off(app)

    assert [(each, type(each)) for each in arrived] == [(travels, type(travels))]


def test_an_error_of_dump_names_the_variable(locale: ContextVar[Any]) -> None:
    register_context_var(locale, dump=datetime.date.isoformat)

    def launch() -> None:
        locale.set(7)
        capture()

    with pytest.raises(InvalidTenantError, match="dump= of context variable 'locale' refused 7: ") as caught:
        alone(launch)

    assert caught.value.field == "locale"
    assert isinstance(caught.value.__cause__, TypeError)


def test_what_dump_made_of_a_value_load_makes_a_value_again() -> None:
    day: ContextVar[datetime.date] = ContextVar("day")
    register_context_var(day, dump=datetime.date.isoformat, load=datetime.date.fromisoformat)

    sent = alone(lambda: day.set(datetime.date(2026, 1, 2)) and capture().variables)

    def body() -> datetime.date:
        Activation(ACME, sent)
        return day.get()

    assert sent == {"day": "2026-01-02"}
    assert alone(body) == datetime.date(2026, 1, 2)


# --- receiving -------------------------------------------------------------------------------------------------


def seen_by_body(var: ContextVar[Any], variables: Mapping[str, Any], *, before: Any = UNSET) -> Any:
    """What the body reads from a variable, in a worker whose own context holds ``before``."""

    def worker() -> Any:
        if before is not UNSET:
            var.set(before)
        activation = Activation(ACME, variables)
        seen = var.get(UNSET)
        activation.undo()
        return seen

    return alone(worker)


def test_the_body_sees_what_the_launcher_had_not_what_the_worker_had(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    assert seen_by_body(locale, {"locale": "de"}, before="fr") == "de"
    assert seen_by_body(locale, {"locale": None}, before="fr") is None


def test_what_neither_had_is_unset_in_the_body_too(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    assert seen_by_body(locale, {}) == UNSET


def test_what_only_the_worker_had_is_hidden_from_the_body() -> None:
    plain: ContextVar[Any] = ContextVar("plain")
    with_own_default: ContextVar[Any] = ContextVar("with_own_default", default="own")
    with_default: ContextVar[Any] = ContextVar("with_default", default="own")
    register_context_var(plain)
    register_context_var(with_own_default)
    register_context_var(with_default, default="registered")

    assert seen_by_body(plain, {}, before="worker's") is None
    assert seen_by_body(with_own_default, {}, before="worker's") == "own"
    assert seen_by_body(with_default, {}, before="worker's") == "registered"


def test_names_that_are_not_registered_here_are_passed_over(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    assert seen_by_body(locale, {"locale": "de", "unknown": 1}) == "de"


def test_undo_brings_back_what_the_worker_had_whatever_the_body_set(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    def worker() -> None:
        locale.set("worker's")
        activation = Activation(ACME, {"locale": "de"})
        locale.set("left by the body")
        activation.undo()
        assert locale.get() == "worker's"
        assert current_tenant() is None

    alone(worker)


def test_undo_takes_away_what_the_body_set_where_nobody_had_a_value(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    def worker() -> None:
        activation = Activation(ACME, {})
        locale.set("left by the body")
        activation.undo()
        assert locale.get() is None

    alone(worker)


def test_undo_leaves_a_variable_of_a_registry_as_it_found_it() -> None:
    class Request(ContextVarsRegistry):
        zone: str = "UTC"

    register_context_var(Request)

    def worker() -> None:
        current = Request()
        activation = Activation(ACME, {"Request.zone": "CET"})
        assert current.zone == "CET"
        current.zone = "left by the body"
        activation.undo()
        assert current.zone == "UTC"

    alone(worker)


def test_undoing_twice_changes_nothing_the_second_time(locale: ContextVar[Any]) -> None:
    register_context_var(locale)
    register_context_var(ContextVar("zone"))

    def worker() -> None:
        activation = Activation(ACME, {"locale": "de"})
        activation.undo()
        locale.set("later")
        with tenant_scope(ACME):
            activation.undo()
            assert current_tenant() is ACME
        assert locale.get() == "later"

    alone(worker)


def test_activations_nest(locale: ContextVar[Any]) -> None:
    register_context_var(locale)

    def worker() -> None:
        outer = Activation(ACME, {"locale": "de"})
        inner = Activation(TenantContext("globex"), {})
        assert locale.get() is None
        inner.undo()
        assert (current_tenant(), locale.get()) == (ACME, "de")
        outer.undo()
        assert (current_tenant(), locale.get(UNSET)) == (None, UNSET)

    alone(worker)


def test_a_load_that_raises_leaves_nothing_set() -> None:
    first: ContextVar[Any] = ContextVar("first")
    broken: ContextVar[Any] = ContextVar("broken")
    register_context_var(first)
    register_context_var(broken, load=uuid.UUID)

    def worker() -> None:
        first.set("worker's")
        with pytest.raises(HeaderError, match="load= of context variable 'broken' refused 'no uuid'"):
            Activation(ACME, {"first": "launcher's", "broken": "no uuid"})
        assert current_tenant() is None
        assert first.get() == "worker's"
        assert broken.get(UNSET) == UNSET

    alone(worker)


# --- through Celery --------------------------------------------------------------------------------------------


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture
def spoiling_app(app: Celery, locale: ContextVar[Any], seen: list[Any]) -> Celery:
    """Tasks that note the variable they find; ``spoil`` then sets it and leaves it so."""
    register_context_var(locale)

    @app.task(base=BaseTask, name="look")
    def look(*_: Any) -> None:
        seen.append(locale.get(UNSET))

    @app.task(base=BaseTask, name="spoil", bind=True, max_retries=1)
    def spoil(self: BaseTask, how: str = "return") -> None:
        seen.append(locale.get(UNSET))
        locale.set("left by the body")
        if how == "raise":
            raise ValueError("as asked")
        if how == "retry":
            raise self.retry(countdown=0, exc=ValueError("as asked"))
        if how == "retry with headers":
            raise self.retry(countdown=0, exc=ValueError("as asked"), headers={"x": 1})

    return app


def launch(launching: Callable[[], Any], var: ContextVar[Any] | None = None, value: Any = None) -> None:
    """Publish as a web process does, where the variable is set or not."""

    def web_process() -> None:
        if var is not None:
            var.set(value)
        with tenant_scope(ACME):
            launching()

    alone(web_process)


@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_value_left_by_one_task_is_not_seen_by_the_next(
    spoiling_app: Celery, locale: ContextVar[Any], seen: list[Any], work_off: Any, how: str
) -> None:
    spoil, look = spoiling_app.tasks["spoil"], spoiling_app.tasks["look"]
    launch(lambda: spoil.delay(how), locale, "de")
    launch(look.delay, locale, "fr")
    launch(lambda: spoil.delay(how))
    launch(look.delay)

    work_off(spoiling_app)

    assert seen == ["de", "fr", UNSET, None]


@pytest.mark.parametrize("how", ["retry", "retry with headers"])
def test_a_retry_sees_what_the_launcher_had_not_what_the_attempt_left(
    spoiling_app: Celery, locale: ContextVar[Any], seen: list[Any], work_off: Any, how: str
) -> None:
    launch(lambda: spoiling_app.tasks["spoil"].delay(how), locale, "de")

    work_off(spoiling_app)

    assert seen == ["de", "de"]


@pytest.mark.parametrize("canvas", ["chain", "link", "chord"])
def test_what_follows_a_task_sees_what_the_launcher_had_not_what_the_task_left(
    spoiling_app: Celery, locale: ContextVar[Any], seen: list[Any], work_off: Any, canvas: str
) -> None:
    spoil, look = spoiling_app.tasks["spoil"].si(), spoiling_app.tasks["look"].si()
    launching: dict[str, Callable[[], Any]] = {
        "chain": chain(spoil, look).delay,
        "link": lambda: spoil.apply_async(link=look),
        "chord": lambda: chord([spoil], look).delay(),
    }
    launch(launching[canvas], locale, "de")

    work_off(spoiling_app)

    assert seen == ["de", "de"]
