"""Tasks without a server: refused at the call, run eagerly, called as functions, and run from real messages."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import Context, ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, Task, chain, chord
from celery.concurrency.solo import TaskPool
from celery.exceptions import Ignore, Reject, TimeLimitExceeded
from celery.signals import task_failure, task_prerun, task_revoked
from celery.worker import state as worker_state
from celery.worker.request import create_request_cls

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    TenantContext,
    current_tenant,
    register_context_var,
    tenant_scope,
    unconfigure,
)
from rhesis_tasks.errors import (
    HeaderError,
    InvalidTenantError,
    MissingTenantError,
    NotConfiguredError,
    TaskDefinitionError,
)
from rhesis_tasks.headers import HEADER, Envelope, encode
from rhesis_tasks.request import ContextRequest
from rhesis_tasks.retry import NO_RETRY

ACME = TenantContext("acme", "alice", "project", {"plan": "pro"})
GLOBEX = TenantContext("globex", "gus")
AT_ONCE = RetryPolicy(max_retries=2, base=0, retry_on=(ValueError,))


def nothing() -> None: ...


def header_of(tenant: TenantContext) -> dict[str, Any]:
    return {HEADER: encode(Envelope(tenant))}


@pytest.fixture
def seen() -> list[Any]:
    """What the bodies of tasks noted."""
    return []


@pytest.fixture
def note(app: Celery, seen: list[Any]) -> Any:
    """A task that notes the tenant it works for."""

    @app.task(base=BaseTask, bind=True, name="note")
    def note(self: BaseTask, *_: Any) -> str:
        seen.append(self.tenant)
        return self.tenant.organization_id

    return note


@pytest.fixture
def eager(app: Celery) -> Celery:
    app.conf.task_always_eager = True
    return app


# --- definitions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["false", "true", "", 0, 1, None])
@pytest.mark.parametrize("flag", ["tenant_required", "system", "tenant_in_arguments"])
def test_a_flag_that_is_no_bool_is_refused_when_the_task_is_made(app: Celery, flag: str, value: Any) -> None:
    with pytest.raises(TaskDefinitionError, match=f"^{flag} of task body must be True or False, not {value!r}$"):
        app.task(base=BaseTask, lazy=False, name="body", **{flag: value})(nothing)


@pytest.mark.parametrize("policy", [None, 3, {"max_retries": 3}, RetryPolicy])
def test_a_retry_policy_that_is_none_is_refused_when_the_task_is_made(app: Celery, policy: Any) -> None:
    with pytest.raises(TaskDefinitionError, match="retry_policy of task body must be a RetryPolicy"):
        app.task(base=BaseTask, lazy=False, name="body", retry_policy=policy)(nothing)


# --- refused where it is launched ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(lambda task: task.delay(), id="delay"),
        pytest.param(lambda task: task.apply_async(), id="apply_async"),
        pytest.param(lambda task: task.apply_async((), {}, "the-id"), id="apply_async with positional options"),
        pytest.param(lambda task: task.apply_async(headers={"x": 1}), id="headers without a tenant"),
        pytest.param(lambda task: task.apply_async(headers={"user_id": "alice"}), id="a user without an organization"),
        pytest.param(lambda task: task.apply_async(headers={HEADER: {"v": 1}}), id="a header without a tenant"),
        pytest.param(lambda task: task.s().delay(), id="signature"),
        pytest.param(lambda task: chain(task.si(), task.si()).delay(), id="chain"),
        pytest.param(lambda task: chord([task.si()], task.si()).delay(), id="chord"),
    ],
)
@pytest.mark.parametrize("always_eager", [False, True], ids=["published", "eager"])
def test_a_task_without_a_tenant_is_refused_at_the_call(
    note: Any, seen: list[Any], published: Any, launch: Callable[[Any], Any], always_eager: bool
) -> None:
    note.app.conf.task_always_eager = always_eager

    with pytest.raises(MissingTenantError, match="task note needs a tenant"):
        launch(note)

    assert published(note.app) == []
    assert seen == []


def test_send_task_of_a_task_that_is_registered_here_is_refused_without_a_tenant_too(note: Any, published: Any) -> None:
    with pytest.raises(MissingTenantError, match="task note needs a tenant"):
        note.app.send_task("note")

    assert published(note.app) == []


def test_send_task_of_a_name_that_is_not_registered_here_is_left_to_the_worker(app: Celery, published: Any) -> None:
    app.send_task("elsewhere")

    assert [message.organization for message in published(app)] == [None]


def test_the_refusal_names_the_remedy(note: Any) -> None:
    with pytest.raises(
        MissingTenantError, match=r"launch_with_context\(task, \.\.\., current_user=user\).*tenant_scope"
    ):
        note.delay()


def test_a_header_that_cannot_be_read_is_refused_at_the_call(note: Any, published: Any) -> None:
    with tenant_scope(ACME), pytest.raises(HeaderError):
        note.apply_async(headers={HEADER: "garbage"})

    assert published(note.app) == []


def test_a_task_of_an_application_that_is_not_configured_is_refused_at_the_call(
    make_app: Callable[..., Celery], published: Any
) -> None:
    app = make_app(configured=False)
    task = app.task(base=BaseTask, name="body")(nothing)

    with tenant_scope(ACME), pytest.raises(NotConfiguredError, match=r"Call rhesis_tasks.configure\(app, \.\.\.\)"):
        task.delay()

    assert published(app) == []


def test_a_task_of_an_application_that_is_not_configured_does_not_run_eagerly_either(
    make_app: Callable[..., Celery], seen: list[Any]
) -> None:
    app = make_app(configured=False)

    @app.task(base=BaseTask, name="body")
    def body() -> None:
        seen.append("ran")

    with tenant_scope(ACME):
        result = body.apply()

    assert seen == []
    assert isinstance(result.result, NotConfiguredError)


def test_wrong_arguments_are_a_type_error_at_the_call(app: Celery, published: Any) -> None:
    task = app.task(base=BaseTask, name="body")(nothing)

    with tenant_scope(ACME), pytest.raises(TypeError):
        task.delay("unexpected")

    assert published(app) == []


def test_a_task_that_needs_no_tenant_is_published_without_one(app: Celery, published: Any) -> None:
    task = app.task(base=BaseTask, name="body", tenant_required=False)(nothing)

    task.delay()

    assert [message.organization for message in published(app)] == [None]


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(lambda app: app.tasks["celery.backend_cleanup"].delay(), id="backend_cleanup"),
        pytest.param(lambda app: app.tasks["celery.accumulate"].delay(1), id="accumulate"),
        pytest.param(lambda app: app.send_task("celery.chord_unlock"), id="chord_unlock"),
    ],
)
def test_celerys_own_tasks_are_never_refused_and_carry_the_tenant_if_there_is_one(
    app: Celery, launch: Callable[[Celery], Any], published: Any
) -> None:
    launch(app)
    with tenant_scope(ACME):
        launch(app)

    assert [message.organization for message in published(app)] == [None, "acme"]


def test_a_plain_task_of_the_application_carries_the_tenant_without_insisting(app: Celery, published: Any) -> None:
    task = app.task(name="plain")(nothing)

    task.delay()
    with tenant_scope(ACME):
        task.delay()

    assert [message.organization for message in published(app)] == [None, "acme"]


# --- what is published -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(lambda task: task.delay(), id="delay"),
        pytest.param(lambda task: task.apply_async(), id="apply_async"),
        pytest.param(lambda task: task.apply_async(headers={"x": 1}), id="with headers of the caller"),
        pytest.param(lambda task: task.s().delay(), id="signature"),
        pytest.param(lambda task: task.app.send_task("note"), id="send_task"),
        pytest.param(lambda task: task.app.send_task("unknown.here"), id="send_task of a name unknown here"),
    ],
)
def test_a_published_message_carries_the_whole_tenant(note: Any, published: Any, launch: Callable[[Any], Any]) -> None:
    with tenant_scope(ACME):
        launch(note)

    (message,) = published(note.app)
    assert message.headers[HEADER] == {
        "v": 1,
        "organization_id": "acme",
        "user_id": "alice",
        "project_id": "project",
        "extra": {"plan": "pro"},
    }


def test_headers_of_the_caller_travel_along(note: Any, published: Any) -> None:
    with tenant_scope(ACME):
        note.apply_async(headers={"x": 1, "y": "z"})

    (message,) = published(note.app)
    assert (message.headers["x"], message.headers["y"]) == (1, "z")


def test_a_dict_of_headers_reused_for_two_tenants_mixes_nothing_up(note: Any, published: Any) -> None:
    headers = {"x": 1}

    for tenant in (ACME, GLOBEX):
        with tenant_scope(tenant):
            note.apply_async(headers=headers)
            note.app.send_task("note", headers=headers)

    assert headers == {"x": 1}
    assert [message.organization for message in published(note.app)] == ["acme", "acme", "globex", "globex"]


@pytest.mark.parametrize(
    "headers", [header_of(GLOBEX), {"organization_id": "globex", "user_id": "gus"}], ids=["our header", "flat headers"]
)
def test_a_tenant_in_the_headers_wins_over_the_active_one(note: Any, published: Any, headers: dict[str, Any]) -> None:
    with tenant_scope(ACME):
        note.apply_async(headers=headers)
    note.apply_async(headers=headers)

    assert [message.envelope.tenant for message in published(note.app)] == [GLOBEX, GLOBEX]


def test_a_registered_variable_that_cannot_travel_stops_the_launch(note: Any, published: Any) -> None:
    variable: ContextVar[Any] = ContextVar("variable")
    register_context_var(variable)

    def launch() -> None:
        variable.set(object())
        with tenant_scope(ACME), pytest.raises(InvalidTenantError):
            note.delay()

    Context().run(launch)

    assert published(note.app) == []


# --- what the body sees ----------------------------------------------------------------------------------------


@pytest.fixture(params=["eagerly", "by apply", "from a message"])
def run(request: pytest.FixtureRequest, app: Celery, work_off: Any) -> Callable[..., Any]:
    """Runs a task to its end in one of three ways; returns its result."""
    app.conf.task_always_eager = request.param == "eagerly"

    def run(task: Any, *args: Any, tenant: TenantContext | None = ACME, **options: Any) -> Any:
        with tenant_scope(tenant) if tenant else nullcontext():
            result = task.apply(args, **options) if request.param == "by apply" else task.apply_async(args, **options)
        work_off(app)
        return result

    return run


def test_the_body_sees_the_tenant_on_itself_and_on_its_request(app: Celery, run: Any) -> None:
    @app.task(base=BaseTask, bind=True, name="look")
    def look(self: Any) -> list[Any]:
        return [
            self.tenant == current_tenant() == ACME,
            self.request.organization_id,
            self.request.user_id,
            self.request.id,
        ]

    result = run(look)

    assert result.get() == [True, "acme", "alice", result.id]


def test_the_body_of_a_task_without_a_tenant_sees_none(app: Celery, run: Any) -> None:
    @app.task(base=BaseTask, bind=True, name="look", tenant_required=False)
    def look(self: Any) -> list[Any]:
        with pytest.raises(MissingTenantError):
            _ = self.tenant
        return [current_tenant(), self.request.organization_id, self.request.user_id]

    assert run(look, tenant=None).get() == [None, None, None]


def test_a_plain_task_sees_the_tenant_on_its_request(app: Celery, run: Any) -> None:
    @app.task(bind=True, name="look")
    def look(self: Any) -> list[Any]:
        return [self.request.organization_id, current_tenant() == ACME]

    assert run(look).get() == ["acme", True]


def test_registered_variables_reach_the_body(app: Celery, run: Any) -> None:
    number: ContextVar[int] = ContextVar("number")
    unset: ContextVar[int] = ContextVar("unset")
    register_context_var(number, dump=str, load=int)
    register_context_var(unset)

    @app.task(base=BaseTask, name="look")
    def look() -> list[Any]:
        return [number.get(), unset.get("unset")]

    def launch() -> Any:
        number.set(7)
        return run(look)

    assert Context().run(launch).get() == [7, "unset"]


def test_a_variable_whose_load_raises_stops_the_task_before_its_body(app: Celery, run: Any, seen: list[Any]) -> None:
    number: ContextVar[Any] = ContextVar("number")
    register_context_var(number, load=int)

    @app.task(base=BaseTask, name="look", tenant_required=False)
    def look() -> None:
        seen.append(current_tenant())

    def launch() -> Any:
        number.set("not a number")
        return run(look)

    result = Context().run(launch)

    assert seen == []
    assert result.state == "FAILURE"
    assert isinstance(result.result, HeaderError)


def test_hooks_of_the_task_see_the_tenant_too(app: Celery, run: Any, seen: list[Any]) -> None:
    class Hooked(BaseTask):
        abstract = True

        def before_start(self, *_: Any) -> None:
            seen.append(("before_start", current_tenant()))

        def on_success(self, *_: Any) -> None:
            seen.append(("on_success", current_tenant()))

        def after_return(self, *_: Any) -> None:
            seen.append(("after_return", current_tenant()))

    run(app.task(base=Hooked, name="body")(nothing))

    assert seen == [("before_start", ACME), ("on_success", ACME), ("after_return", ACME)]


def test_what_a_body_launches_belongs_to_its_tenant(app: Celery, note: Any, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, name="outer")
    def outer() -> None:
        note.delay()
        with tenant_scope(GLOBEX):
            note.delay()
        note.apply()
        seen.append(current_tenant())

    run(outer)

    assert sorted(seen, key=str) == sorted([ACME, GLOBEX, ACME, ACME], key=str)


def test_an_eager_call_in_a_body_leaves_the_callers_context_as_it_was(app: Celery, note: Any, seen: list[Any]) -> None:
    locale: ContextVar[str] = ContextVar("locale")
    register_context_var(locale)

    @app.task(base=BaseTask, bind=True, name="outer")
    def outer(self: Any) -> list[Any]:
        locale.set("changed")
        note.apply(headers=header_of(GLOBEX))
        return [locale.get(), self.tenant == ACME, self.request.organization_id, self.request.id]

    def launch() -> Any:
        locale.set("de")
        with tenant_scope(ACME):
            return outer.apply(task_id="the-id").get(), locale.get()

    assert Context().run(launch) == (["changed", True, "acme", "the-id"], "de")
    assert seen == [GLOBEX]


@pytest.mark.parametrize(
    "ending",
    [None, ValueError(), Ignore(), Reject(), Reject(requeue=True)],
    ids=["return", "error", "ignore", "reject", "requeue"],
)
def test_nothing_of_a_task_is_left_however_it_ended(
    app: Celery, ending: Exception | None, work_off: Any, seen: list[Any]
) -> None:
    locale: ContextVar[str] = ContextVar("locale")
    register_context_var(locale)

    @app.task(base=BaseTask, name="end")
    def end() -> None:
        locale.set("left by the body")
        if ending is not None:
            raise ending

    @app.task(base=BaseTask, bind=True, name="after", tenant_required=False)
    def after(self: Any) -> None:
        seen.append((current_tenant(), self.request.organization_id, locale.get("unset")))

    with tenant_scope(ACME):
        end.delay()
    after.delay()
    work_off(app)

    assert seen in ([(None, None, None)], [(None, None, "unset")])


# --- refused in the worker -------------------------------------------------------------------------------------


@pytest.fixture
def stranger(app: Celery, make_app: Callable[..., Celery]) -> Celery:
    """An application that publishes to the same queue and knows nothing of this library."""
    return make_app(configured=False, task_default_queue=app.conf.task_default_queue)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        pytest.param(None, MissingTenantError, id="no headers"),
        pytest.param({"x": 1}, MissingTenantError, id="no header"),
        pytest.param({HEADER: {"v": 1}}, MissingTenantError, id="no tenant"),
        pytest.param({HEADER: "garbage"}, HeaderError, id="garbage"),
        pytest.param({HEADER: {"v": 2, "organization_id": "acme"}}, HeaderError, id="newer"),
        pytest.param({HEADER: {"v": 1, "organization_id": ""}}, HeaderError, id="empty organization"),
        pytest.param({HEADER: {"v": 1, "user_id": "alice"}}, HeaderError, id="user without organization"),
        pytest.param({"organization_id": ["acme"]}, HeaderError, id="flat garbage"),
    ],
)
def test_a_message_without_a_usable_tenant_fails_without_running_its_body_or_a_retry(
    app: Celery,
    stranger: Celery,
    headers: dict[str, Any] | None,
    error: type[Exception],
    work_off: Any,
    seen: list[Any],
) -> None:
    @app.task(base=BaseTask, bind=True, name="body", retry_policy=RetryPolicy(max_retries=5, base=0))
    def body(self: Any) -> None:
        seen.append(current_tenant())

    stranger.send_task("body", headers=headers, task_id="refused")
    ran = work_off(app)

    result = app.AsyncResult("refused")
    assert ran == ["body"]
    assert seen == []
    assert result.state == "FAILURE"
    assert isinstance(result.result, error)


def test_a_header_that_cannot_be_read_stops_a_task_that_needs_no_tenant_too(
    app: Celery, stranger: Celery, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, name="body", tenant_required=False)
    def body() -> None:
        seen.append(current_tenant())

    stranger.send_task("body", headers={HEADER: {"v": 2, "organization_id": "acme"}}, task_id="unreadable")
    work_off(app)

    assert seen == []
    assert app.AsyncResult("unreadable").state == "FAILURE"


def test_flat_headers_of_an_application_without_this_library_are_understood(
    note: Any, stranger: Celery, work_off: Any, seen: list[Any]
) -> None:
    stranger.send_task("note", headers={"organization_id": "globex", "user_id": "gus"})
    work_off(note.app)

    assert seen == [GLOBEX]


def test_an_eager_apply_without_a_tenant_does_not_run_the_body(note: Any, seen: list[Any]) -> None:
    result = note.apply()

    assert seen == []
    assert result.state == "FAILURE"
    assert isinstance(result.result, MissingTenantError)


# --- called as a function --------------------------------------------------------------------------------------


def test_a_task_called_as_a_function_is_one(app: Celery) -> None:
    @app.task(base=BaseTask, bind=True, name="add")
    def add(self: Any, x: int, y: int = 1) -> list[Any]:
        return [x + y, self.tenant.organization_id, self.request.organization_id, self.request.user_id, self.name]

    with tenant_scope(ACME):
        assert add(1, y=2) == [3, "acme", "acme", "alice", "add"]


def test_a_task_called_as_a_function_without_a_tenant_is_refused(note: Any, seen: list[Any]) -> None:
    with pytest.raises(MissingTenantError):
        note()

    assert seen == []


def test_a_task_that_needs_no_tenant_can_be_called_as_a_function_without_one(app: Celery) -> None:
    @app.task(base=BaseTask, bind=True, name="free", tenant_required=False)
    def free(self: Any) -> list[Any]:
        return [current_tenant(), self.request.organization_id]

    assert free() == [None, None]


def test_a_task_called_as_a_function_is_not_retried(app: Celery, seen: list[Any]) -> None:
    @app.task(base=BaseTask, name="fail", retry_policy=AT_ONCE)
    def fail() -> None:
        seen.append("attempt")
        raise ValueError("from the body")

    with tenant_scope(ACME), pytest.raises(ValueError, match="from the body"):
        fail()

    assert seen == ["attempt"]


def test_a_task_called_as_a_function_by_the_body_of_another_is_one_too(app: Celery, run: Any) -> None:
    @app.task(base=BaseTask, bind=True, name="inner", retry_policy=AT_ONCE)
    def inner(self: Any, fail: bool) -> str:
        if fail:
            raise ValueError("from the inner body")
        return str(self.tenant.organization_id)

    @app.task(base=BaseTask, bind=True, name="outer")
    def outer(self: Any) -> list[Any]:
        with pytest.raises(ValueError, match="from the inner body"):
            inner(True)
        return [inner(False), self.request.organization_id, self.request.task]

    assert run(outer).get() == ["acme", "acme", "outer"]


def test_a_task_that_calls_itself_as_a_function_gets_the_functions_exception(app: Celery, run: Any) -> None:
    @app.task(base=BaseTask, bind=True, name="recursive", retry_policy=AT_ONCE)
    def recursive(self: Any, depth: int) -> str:
        if depth == 0:
            raise ValueError("bottom")
        try:
            self(depth - 1)
        except Exception as error:
            return type(error).__name__
        return "nothing raised"

    assert run(recursive, 1).get() == "ValueError"


# --- retries ---------------------------------------------------------------------------------------------------


def test_a_failure_is_tried_again_for_the_same_tenant_as_often_as_the_policy_allows(
    app: Celery, run: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, bind=True, name="fail", retry_policy=AT_ONCE)
    def fail(self: Any) -> None:
        seen.append((self.request.retries, self.tenant, self.request.organization_id, self.request.id))
        raise ValueError("every time")

    result = run(fail, task_id="the-id")

    assert seen == [(retries, ACME, "acme", "the-id") for retries in range(3)]
    assert result.state == "FAILURE"
    assert repr(result.result) == "ValueError('every time')"


def test_a_later_attempt_can_succeed(app: Celery, run: Any) -> None:
    @app.task(base=BaseTask, bind=True, name="flaky", retry_policy=AT_ONCE)
    def flaky(self: Any) -> int:
        if self.request.retries < 2:
            raise ValueError("not yet")
        return int(self.request.retries)

    assert run(flaky).get() == 2


def test_an_error_that_the_policy_does_not_name_is_final(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, name="fail", retry_policy=AT_ONCE)
    def fail() -> None:
        seen.append("attempt")
        raise KeyError("a defect")

    result = run(fail)

    assert seen == ["attempt"]
    assert result.state == "FAILURE"


def test_a_retry_keeps_the_tenant_of_the_message_not_that_of_the_worker(app: Celery, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="fail", retry_policy=AT_ONCE)
    def fail(self: Any) -> None:
        seen.append(self.tenant)
        raise ValueError("every time")

    with tenant_scope(ACME):
        fail.apply(headers=header_of(GLOBEX))

    assert seen == [GLOBEX] * 3


@pytest.mark.parametrize("base", [BaseTask, None], ids=["BaseTask", "plain task"])
@pytest.mark.parametrize("headers", [None, {"organization_id": "acme"}], ids=["no header", "flat headers"])
@pytest.mark.parametrize("again", ["retry", "replace"])
def test_what_is_published_inside_a_scope_for_a_strangers_message_is_not_the_scopes(
    app: Celery, stranger: Celery, base: Any, headers: Any, again: str, work_off: Any, seen: list[Any]
) -> None:
    options = {} if base is None else {"base": base, "tenant_required": False}

    def note(step: str) -> None:
        tenant = current_tenant()
        seen.append((step, tenant and tenant.organization_id))

    @app.task(bind=True, name="body", **options)
    def body(self: Any) -> None:
        note("body")
        with tenant_scope(GLOBEX):
            if again == "retry" and not self.request.retries:
                raise self.retry(countdown=0)
            if again == "replace":
                self.replace(other.si())

    @app.task(name="other", **options)
    def other() -> None:
        note("other")

    @app.task(name="after", **options)
    def after() -> None:
        note("after")

    link = stranger.signature("after", immutable=True)
    stranger.send_task("body", headers=headers, link=[link])
    work_off(app)

    whose = headers and headers["organization_id"]
    second = "body" if again == "retry" else "other"
    assert seen == [("body", whose), (second, whose), ("after", whose)]


def test_a_retry_with_headers_of_its_own_keeps_the_tenant(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="again")
    def again(self: Any) -> None:
        seen.append((self.tenant, (self.request.headers or {}).get("x")))
        if not self.request.retries:
            raise self.retry(countdown=0, headers={"x": 1})

    run(again)

    assert seen == [(ACME, None), (ACME, 1)]


def test_on_a_task_with_celerys_autoretry_no_policy_is_asked(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(
        base=BaseTask,
        bind=True,
        name="fail",
        autoretry_for=(KeyError,),
        default_retry_delay=0,
        max_retries=1,
    )
    def fail(self: Any, error: str) -> None:
        seen.append((error, self.tenant, self.request.retries))
        raise {"KeyError": KeyError, "ConnectionError": ConnectionError}[error]("every time")

    run(fail, "KeyError")
    run(fail, "ConnectionError")

    assert seen == [("KeyError", ACME, 0), ("KeyError", ACME, 1), ("ConnectionError", ACME, 0)]


def test_where_a_retry_by_hand_gives_up_the_policy_is_not_asked(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="poll", retry_policy=RetryPolicy(max_retries=5, base=0))
    def poll(self: Any) -> None:
        seen.append(self.request.retries)
        raise self.retry(exc=ConnectionError("not yet"), countdown=0, max_retries=1)

    run(poll)

    assert seen == [0, 1]


def test_a_retry_is_due_when_the_policy_says(app: Celery, work_off: Any, seen: list[Any]) -> None:
    @app.task(
        base=BaseTask, bind=True, name="fail", retry_policy=RetryPolicy(max_retries=1, base=3600, factor=1, cap=3600)
    )
    def fail(self: Any) -> None:
        seen.append(self.request.eta)
        raise ValueError("every time")

    before = datetime.datetime.now(datetime.UTC)
    with tenant_scope(ACME):
        fail.delay()
    work_off(app)

    first, second = seen
    assert first is None
    assert before <= datetime.datetime.fromisoformat(second) <= before + datetime.timedelta(seconds=3600 + 60)


@pytest.mark.parametrize("run", ["by apply", "from a message"], indirect=True)
def test_a_replaced_task_keeps_the_tenant(app: Celery, note: Any, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="swap")
    def swap(self: Any) -> Any:
        return self.replace(note.si())

    result = run(swap)

    assert result.get() == "acme"
    assert seen == [ACME]


@pytest.mark.parametrize("canvas", ["chain", "link", "link_error", "chord"])
def test_what_follows_a_task_runs_for_the_same_tenant(
    app: Celery, note: Any, canvas: str, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, name="first")
    def first(fail: bool = False) -> None:
        if fail:
            raise KeyError("as asked")

    with tenant_scope(ACME):
        if canvas == "chain":
            chain(first.si(), note.si()).delay()
        elif canvas == "link":
            first.apply_async(link=note.si())
        elif canvas == "link_error":
            first.apply_async((True,), link_error=note.si())
        else:
            chord([first.si(), first.si()], note.si()).delay()
    work_off(app)

    assert seen == [ACME]


@pytest.mark.parametrize("base", [BaseTask, None], ids=["BaseTask", "plain"])
def test_a_scope_that_a_body_left_open_does_not_reach_what_follows(
    app: Celery, note: Any, base: Any, work_off: Any, seen: list[Any]
) -> None:
    @app.task(name="careless", **({"base": base} if base else {}))
    def careless() -> None:
        tenant_scope(GLOBEX).__enter__()

    with tenant_scope(ACME):
        chain(careless.si(), note.si()).delay()
        careless.apply_async(link=note.si())
        chord([careless.si()], note.si()).delay()
    work_off(app)

    assert seen == [ACME] * 3


# --- the rest of a task's tools --------------------------------------------------------------------------------


def test_a_session_needs_a_database(app: Celery) -> None:
    @app.task(base=BaseTask, bind=True, name="query")
    def query(self: Any) -> None:
        self.get_db_session()

    with tenant_scope(ACME), pytest.raises(NotConfiguredError, match="has no tenant sessions"):
        query()


def test_a_task_class_may_have_its_own_policy_and_rules(app: Celery) -> None:
    class Own(BaseTask):
        abstract = True
        tenant_required = False
        retry_policy = NO_RETRY

    task = app.task(base=Own, name="body")(nothing)

    assert (task.tenant_required, task.retry_policy) == (False, NO_RETRY)
    task.delay()


def test_after_unconfiguring_tasks_are_refused_again(note: Any) -> None:
    unconfigure(note.app)

    with tenant_scope(ACME), pytest.raises(NotConfiguredError):
        note.delay()


def test_a_user_of_any_kind_opens_the_scope_for_a_launch(note: Any, eager: Celery) -> None:
    with tenant_scope(SimpleNamespace(id=7, organization_id=8)):
        assert note.delay().get() == "8"


def test_the_task_is_still_one_of_celerys(note: Any) -> None:
    assert isinstance(note, Task)


# --- whatever scope or signal receiver is in the way ------------------------------------------------------------


def test_a_retry_in_the_scope_of_another_tenant_stays_its_own_tenants_also_with_nested_headers(
    app: Celery, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, bind=True, name="again")
    def again(self: Any) -> None:
        seen.append(self.tenant)
        if not self.request.retries:
            with tenant_scope(GLOBEX):
                raise self.retry(countdown=0)

    with tenant_scope(ACME):
        again.apply_async(headers={"headers": {"sentry-trace": "x"}})
        work_off(app)

    assert seen == [ACME, ACME]


def test_a_replacement_in_the_scope_of_another_tenant_stays_its_own_tenants(
    app: Celery, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, bind=True, name="new")
    def new(self: Any) -> None:
        seen.append(self.tenant)

    @app.task(base=BaseTask, bind=True, name="old")
    def old(self: Any) -> None:
        seen.append(self.tenant)
        with tenant_scope(GLOBEX):
            raise self.replace(new.si())

    with tenant_scope(ACME):
        old.delay()
    work_off(app)

    assert seen == [ACME, ACME]


def test_a_body_has_its_own_tenant_whatever_another_receiver_of_prerun_set(
    app: Celery, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, bind=True, name="look_around")
    def look_around(self: Any) -> None:
        seen.append((self.tenant, self.request.organization_id))

    def intrude(**_: Any) -> None:
        tenant_scope(GLOBEX).__enter__()

    with tenant_scope(ACME):
        look_around.delay()
    task_prerun.connect(intrude)
    try:
        Context().run(work_off, app)
    finally:
        task_prerun.disconnect(intrude)

    assert seen == [(ACME, "acme")]


def test_a_body_has_its_own_tenant_also_if_our_receiver_of_prerun_did_not_run(
    app: Celery, work_off: Any, seen: list[Any]
) -> None:
    @app.task(base=BaseTask, bind=True, name="look_around")
    def look_around(self: Any) -> None:
        seen.append((self.tenant, self.request.organization_id))

    with tenant_scope(ACME):
        look_around.delay()
    receivers = task_prerun.receivers
    task_prerun.receivers = []
    try:
        with tenant_scope(GLOBEX):
            work_off(app)
            after = current_tenant()
    finally:
        task_prerun.receivers = receivers

    assert seen == [(ACME, "acme")]
    assert after == GLOBEX


# --- in the main process ---------------------------------------------------------------------------------------


def test_what_the_main_process_does_is_done_in_the_messages_context_also_within_itself(
    app: Celery, note: Any, seen: list[Any]
) -> None:
    class Request(ContextRequest):
        def _announce_revoked(self, *args: Any, **kwargs: Any) -> None:
            super()._announce_revoked(*args, **kwargs)
            seen.append(("after announcing", current_tenant()))

    with tenant_scope(ACME):
        note.apply_async(task_id="revoked")
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue].bind(connection.default_channel)
        request = Request(queue.get(no_ack=True), app=app)
    tenants: list[Any] = []
    receiver = task_revoked.connect(lambda **_: tenants.append(current_tenant()), weak=False)
    worker_state.revoked.add("revoked")
    try:
        assert request.revoked()
    finally:
        task_revoked.disconnect(receiver)
        worker_state.revoked.discard("revoked")

    assert tenants == [ACME]
    assert seen == [("after announcing", ACME)], "the block around it goes on in its context"
    assert current_tenant() is None
    assert app.current_worker_task is None


def test_a_hard_time_limit_that_is_found_twice_is_told_once(app: Celery, seen: list[Any]) -> None:
    class Limited(BaseTask):
        def on_failure(self, *_: Any) -> None:
            seen.append("on_failure")

    @app.task(base=Limited, name="limited", tenant_required=False)
    def limited() -> None: ...

    limited.apply_async(task_id="limited")
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue].bind(connection.default_channel)
        message = queue.get(no_ack=True)
    request = ContextRequest(message, app=app, task=limited, on_ack=lambda *_: seen.append("acknowledged"))
    try:
        raise TimeLimitExceeded(1)
    except TimeLimitExceeded:
        exceeded = ExceptionInfo()
    receiver = task_failure.connect(lambda **_: seen.append("task_failure"), weak=False)
    try:
        for _ in range(2):  # as a pool's two threads may do it, when it stops
            request.on_failure(exceeded)
        for _ in range(2):
            request.on_timeout(soft=False, timeout=1)
    finally:
        task_failure.disconnect(receiver)

    assert sorted(seen) == ["acknowledged", "on_failure", "task_failure"]


class CountsNothing:
    """An observer that is broken."""

    def started(self, request: Any) -> None:
        raise ZeroDivisionError("started")

    def ended(self, request: Any, outcome: str, runtime: float | None) -> None:
        raise ZeroDivisionError(outcome)


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_what_an_observer_raises_is_logged_and_keeps_no_task_from_being_acknowledged(
    app: Celery, note: Any, seen: list[Any], caplog: pytest.LogCaptureFixture, outcome: str
) -> None:
    class Request(ContextRequest):
        observer = CountsNothing()

    with tenant_scope(ACME):
        note.apply_async(task_id="counted")
    with app.connection_for_read() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue].bind(connection.default_channel)
        message = queue.get(no_ack=True)
    in_worker = create_request_cls(Request, note, TaskPool(), "worker", None, app=app)
    request = in_worker(message, app=app, task=note, on_ack=lambda *_: seen.append("acknowledged"))
    try:
        raise ValueError("broken")
    except ValueError:
        failed = ExceptionInfo()

    request.on_accepted(1, time.monotonic())
    request.on_success((False, "done", 0.1) if outcome == "success" else (True, failed, 0.1))

    assert seen == ["acknowledged"]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR" and record.exc_info]
    assert [line for line in lines if "is not counted" in line] == [
        f"the start of task {note.name}[counted] is not counted",
        f"the end of task {note.name}[counted] is not counted",
    ]
