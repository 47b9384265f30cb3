"""Hooks of tasks and of applications, in this process: which run, what they get, and that they change nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from contextvars import Context, ContextVar
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    TenantContext,
    configure,
    current_tenant,
    hooks,
    register_context_var,
    tenant_scope,
    unconfigure,
    wrap,
)
from rhesis_tasks.errors import ConfigurationError, MissingTenantError, NotSupportedError, TaskDefinitionError
from rhesis_tasks.headers import HEADER, Envelope, encode
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure, on_tenant_retry, on_tenant_success
from rhesis_tasks.retry import NO_RETRY
from rhesis_tasks.states import State

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")
ONCE_MORE = RetryPolicy(max_retries=1, base=0, retry_on=(ValueError,))
HANDLERS = (on_tenant_success, on_tenant_failure, on_tenant_retry)


@pytest.fixture
def seen() -> list[Any]:
    """What hooks noted."""
    return []


@pytest.fixture(params=["from a message", "eagerly", "by apply"])
def run(request: pytest.FixtureRequest, app: Celery, work_off: Any) -> Callable[..., Any]:
    """Runs a task to its end in one of three ways; returns its result."""
    app.conf.task_always_eager = request.param == "eagerly"

    def run(task: Any, *args: Any, tenant: TenantContext | None = ACME, **options: Any) -> Any:
        with tenant_scope(tenant) if tenant else nullcontext():
            result = task.apply(args, **options) if request.param == "by apply" else task.apply_async(args, **options)
        work_off(app)
        return result

    return run


from_a_message = pytest.mark.parametrize("run", ["from a message"], indirect=True)


@pytest.fixture
def observed(app: Celery, seen: list[Any]) -> Celery:
    """An application that notes every outcome."""
    for register in HANDLERS:
        register(app)(seen.append)
    return app


def nothing() -> None: ...


def seven() -> int:
    return 7


def unstorable() -> object:
    return object()


def ended(outcome: TaskOutcome) -> tuple[str, str]:
    return outcome.name, outcome.state.value


# --- which run -------------------------------------------------------------------------------------------------


class Noting(BaseTask):
    """A task with all hooks, which note what they are called with."""

    abstract = True
    noted: list[Any]

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        self.noted.append(("success", outcome, current_tenant(), self.request.id))

    def on_tenant_failure(self, outcome: TaskOutcome) -> None:
        self.noted.append(("failure", outcome, current_tenant(), self.request.id))

    def on_tenant_retry(self, outcome: TaskOutcome) -> None:
        self.noted.append(("retry", outcome, current_tenant(), self.request.id))


class AsyncNoting(BaseTask):
    """The same with async def."""

    abstract = True
    noted: list[Any]

    async def on_tenant_success(self, outcome: TaskOutcome) -> None:
        await asyncio.sleep(0)
        self.noted.append(("success", outcome, current_tenant(), self.request.id))

    async def on_tenant_failure(self, outcome: TaskOutcome) -> None:
        self.noted.append(("failure", outcome, current_tenant(), self.request.id))

    async def on_tenant_retry(self, outcome: TaskOutcome) -> None:
        self.noted.append(("retry", outcome, current_tenant(), self.request.id))


class Inheriting(Noting):
    """Has its base's."""

    abstract = True


class Replacing(Noting):
    """Has one of its own."""

    abstract = True

    def on_tenant_failure(self, outcome: TaskOutcome) -> None:
        super().on_tenant_failure(outcome)
        self.noted.append("replaced")


@pytest.fixture(params=["def", "async def"])
def is_async(request: pytest.FixtureRequest) -> bool:
    """Whether a task's body is async def."""
    return bool(request.param == "async def")


def failing_once(app: Celery, base: Any, seen: list[Any], is_async: bool) -> Any:
    def body(self: Any, error: str | None) -> int:
        if error == "always" or (error == "once" and not self.request.retries):
            raise ValueError(error)
        return 7

    async def async_body(self: Any, error: str | None) -> int:
        return body(self, error)

    return app.task(base=base, bind=True, name="body", noted=seen, retry_policy=ONCE_MORE)(
        async_body if is_async else body
    )


@pytest.mark.parametrize("base", [Noting, AsyncNoting, Inheriting])
@pytest.mark.parametrize(
    ("error", "states"), [(None, ["success"]), ("once", ["retry", "success"]), ("always", ["retry", "failure"])]
)
def test_a_tasks_own_hooks_are_called_with_its_tenant_and_request(
    app: Celery, run: Any, seen: list[Any], base: Any, error: str | None, states: list[str], is_async: bool
) -> None:
    task = failing_once(app, base, seen, is_async)

    result = run(task, error)

    assert [state for state, *_ in seen] == states
    for state, outcome, tenant, request_id in seen:
        assert outcome.state is State(state)
        assert (tenant, outcome.tenant) == (ACME, ACME)
        assert (request_id, outcome.task_id, outcome.name) == (result.id, result.id, "body")


def test_a_hook_replaced_in_a_subclass_is_called_instead(app: Celery, run: Any, seen: list[Any]) -> None:
    task = failing_once(app, Replacing, seen, is_async=False)

    run(task, "always")

    assert [each if isinstance(each, str) else each[0] for each in seen] == ["retry", "failure", "replaced"]


def test_a_hook_can_be_given_as_an_option_of_the_task(app: Celery, run: Any, seen: list[Any]) -> None:
    def tell(self: Any, outcome: TaskOutcome) -> None:
        seen.append((self.name, outcome.result))

    run(app.task(base=BaseTask, name="body", on_tenant_success=tell)(seven))

    assert seen == [("body", 7)]


def test_hooks_of_the_application_are_called_after_the_tasks_own_in_order(
    app: Celery, run: Any, seen: list[Any]
) -> None:
    class Own(BaseTask):
        abstract = True

        def on_tenant_success(self, outcome: TaskOutcome) -> None:
            seen.append("own")

    for number in range(3):
        on_tenant_success(app)(lambda _, number=number: seen.append(number))

    run(app.task(base=Own, name="body")(nothing))

    assert seen == ["own", 0, 1, 2]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["reports.daily", "reports.weekly", "mail"]),
        ("reports.*", ["reports.daily", "reports.weekly"]),
        ("mail", ["mail"]),
        ("Mail", []),
        ("reports", []),
    ],
)
def test_a_pattern_says_for_which_tasks_a_hook_is(app: Celery, seen: list[Any], pattern: str, names: list[str]) -> None:
    on_tenant_success(app, task=pattern)(lambda outcome: seen.append(outcome.name))

    with tenant_scope(ACME):
        for name in ("reports.daily", "reports.weekly", "mail"):
            app.task(base=BaseTask, name=name)(nothing).apply()

    assert seen == names


@pytest.mark.parametrize(
    ("error", "is_told"),
    [(ValueError, True), (Exception, True), ((KeyError, ValueError), True), (KeyError, False)],
)
def test_a_filter_says_for_which_exceptions_a_hook_is(
    app: Celery, run: Any, seen: list[Any], error: Any, is_told: bool
) -> None:
    on_tenant_failure(app, error=error)(lambda _: seen.append("failure"))
    on_tenant_retry(app, error=error)(lambda _: seen.append("retry"))

    run(failing_once(app, BaseTask, seen, is_async=False), "always")

    assert seen == (["retry", "failure"] if is_told else [])


def test_a_retry_without_an_exception_passes_no_filter(app: Celery, run: Any, seen: list[Any]) -> None:
    on_tenant_retry(app, error=Exception)(lambda _: seen.append("filtered"))
    on_tenant_retry(app)(lambda outcome: seen.append(outcome.error))

    @app.task(base=BaseTask, bind=True, name="poll")
    def poll(self: Any) -> None:
        if not self.request.retries:
            raise self.retry(countdown=0)

    run(poll)

    assert seen == [None]


def test_plain_tasks_have_the_hooks_of_the_application(observed: Celery, run: Any, seen: list[Any]) -> None:
    on_tenant_success(observed)(_noting_async(seen))

    run(observed.task(name="plain")(seven))

    first, second = seen
    assert (ended(first), second) == (("plain", "success"), "async")


def _noting_async(seen: list[Any]) -> Any:
    async def tell(outcome: TaskOutcome) -> None:
        seen.append("async")

    return tell


@pytest.mark.parametrize(
    "options",
    [{"base": BaseTask, "tenant_required": False}, {"base": BaseTask, "system": True}, {}],
    ids=["not required", "system", "plain"],
)
def test_work_without_a_tenant_has_no_hooks(
    observed: Celery, run: Any, seen: list[Any], options: dict[str, Any]
) -> None:
    body = observed.task(name="body", **options)(nothing)

    run(body, tenant=ACME if options.get("system") else None)

    assert seen == []


@pytest.mark.parametrize("ending", [Ignore(), Reject(), Reject(requeue=True)], ids=["ignore", "reject", "requeue"])
@pytest.mark.parametrize("run", ["by apply"], indirect=True)
def test_what_is_ignored_or_rejected_has_no_hooks_here(
    observed: Celery, run: Any, seen: list[Any], ending: Exception
) -> None:
    def body() -> None:
        raise ending

    run(observed.task(base=BaseTask, name="body")(body))

    assert seen == []


def test_a_message_that_is_refused_has_no_hooks(observed: Celery, work_off: Any, seen: list[Any]) -> None:
    observed.task(base=BaseTask, name="body")(nothing)
    stranger = {HEADER: encode(Envelope(ACME)), "organization_id": "globex"}

    with observed.connection_for_write() as connection:
        producer = connection.Producer()
        message = observed.amqp.create_task_message("the-id", "body", (), {}, headers=stranger)
        observed.amqp.send_task_message(producer, "body", message)
    work_off(observed)

    assert observed.AsyncResult("the-id").state == "FAILURE"
    assert seen == []


def test_two_applications_do_not_hear_of_each_others_tasks(
    make_app: Callable[..., Celery], seen: list[Any], work_off: Any
) -> None:
    one, other = make_app(), make_app()
    on_tenant_success(one)(lambda _: seen.append("one"))
    on_tenant_success(other)(lambda _: seen.append("other"))

    with tenant_scope(ACME):
        one.task(base=BaseTask, name="body")(nothing).delay()
        other.task(base=BaseTask, name="body")(nothing).apply()
    work_off(one)

    assert seen == ["other", "one"]


def test_after_unconfiguring_no_hook_is_called(observed: Celery, seen: list[Any]) -> None:
    task = observed.task(name="plain")(nothing)
    unconfigure(observed)

    def apply() -> None:
        with tenant_scope(ACME):
            task.apply()

    Context().run(apply)

    assert seen == []


# --- what they get ---------------------------------------------------------------------------------------------


@from_a_message
def test_the_outcome_tells_of_a_success(observed: Celery, run: Any, seen: list[Any]) -> None:
    result = run(failing_once(observed, BaseTask, seen, is_async=False), None)

    (outcome,) = seen
    assert (outcome.task_id, outcome.root_id, outcome.result) == (result.id, result.id, 7)
    assert (outcome.error, outcome.reason, outcome.retries, outcome.countdown) == (None, None, 0, None)
    assert 0 <= outcome.duration < 60
    assert outcome.key == f"{result.id}:success"


@from_a_message
def test_the_outcome_tells_of_a_retry_and_of_the_failure_after_it(observed: Celery, run: Any, seen: list[Any]) -> None:
    result = run(failing_once(observed, BaseTask, seen, is_async=False), "always")

    retry, failure = seen
    assert (retry.state, repr(retry.error), retry.reason) == (State.RETRY, "ValueError('always')", None)
    assert (retry.retries, retry.countdown, retry.result) == (0, 0, None)
    assert (failure.state, repr(failure.error)) == (State.FAILURE, "ValueError('always')")
    assert (failure.retries, failure.reason) == (1, "all 1 retries are used up")
    assert [retry.key, failure.key] == [f"{result.id}:retry:0", f"{result.id}:failure"]


def test_a_result_that_cannot_be_stored_is_a_failure(observed: Celery, work_off: Any, seen: list[Any]) -> None:
    with tenant_scope(ACME):
        observed.task(base=BaseTask, name="body")(unstorable).delay()
    work_off(observed)

    (outcome,) = seen
    assert (outcome.state, outcome.reason) == (State.FAILURE, "its result cannot be stored")


def test_the_result_is_stored_before_its_hook_is_called(app: Celery, work_off: Any, seen: list[Any]) -> None:
    on_tenant_success(app)(lambda outcome: seen.append(app.AsyncResult(outcome.task_id).state))

    with tenant_scope(ACME):
        app.task(base=BaseTask, name="body")(nothing).delay()
    work_off(app)

    assert seen == ["SUCCESS"]


@pytest.mark.parametrize("error", [ValueError("broken"), Retry("again")])
def test_a_failure_that_an_eager_task_raises_to_its_caller_is_told_too(
    observed: Celery, seen: list[Any], error: Exception
) -> None:
    observed.conf.update(task_always_eager=True, task_eager_propagates=True)

    @observed.task(base=BaseTask, name="body", retry_policy=NO_RETRY)
    def body() -> None:
        raise error

    with tenant_scope(ACME), pytest.raises(type(error)):
        body.delay()

    (outcome,) = seen
    assert outcome.state is (State.RETRY if isinstance(error, Retry) else State.FAILURE)


def test_what_a_process_is_ended_by_is_left_to_the_main_process(
    observed: Celery, work_off: Any, seen: list[Any]
) -> None:
    @observed.task(base=BaseTask, name="body")
    def body() -> None:
        raise SystemExit(3)

    with tenant_scope(ACME):
        body.delay()
    with suppress(SystemExit):
        work_off(observed)

    assert seen == []


# --- they change nothing ---------------------------------------------------------------------------------------


def raising(error: BaseException) -> Any:
    def hook(_: TaskOutcome) -> None:
        raise error

    return hook


def raising_async(error: BaseException) -> Any:
    async def hook(_: TaskOutcome) -> None:
        await asyncio.sleep(0)
        raise error

    return hook


class Stop(BaseException):
    """Neither an Exception nor known to asyncio."""


ERRORS = [
    (ValueError("from the hook"), "ValueError: from the hook"),
    (SystemExit(3), "RuntimeError: it raised SystemExit(3)"),
    (KeyboardInterrupt(), "RuntimeError: it raised KeyboardInterrupt()"),
    (Stop(), "RuntimeError: it raised Stop()"),
    (Retry("later"), "Retry: later"),
    (Ignore("it"), "Ignore: it"),
    (Reject("it", requeue=True), "Reject: it"),
    (TimeoutError("of its own"), "TimeoutError: of its own"),
]


@pytest.mark.parametrize(("error", "told"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
@pytest.mark.parametrize("make", [raising, raising_async], ids=["def", "async def"])
def test_what_a_hook_raises_is_logged_and_changes_nothing(
    app: Celery,
    work_off: Any,
    seen: list[Any],
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    told: str,
    make: Any,
) -> None:
    on_tenant_success(app)(make(error))
    on_tenant_success(app)(seen.append)

    with tenant_scope(ACME):
        result = app.task(base=BaseTask, name="body")(seven).delay()
    ran = work_off(app)

    assert (ran, result.get(), len(seen)) == (["body"], 7, 1)
    (record,) = [record for record in caplog.records if record.name == "rhesis_tasks.hooks"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        f"hook {make.__name__}.<locals>.hook of task body failed, which changes nothing: {told}"
    )
    assert record.exc_info


class Unprintable(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_exception_that_cannot_be_printed_stops_no_hook(
    observed: Celery, run: Any, seen: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    on_tenant_failure(observed)(raising(Unprintable()))
    on_tenant_failure(observed)(lambda _: seen.append("after it"))

    @observed.task(base=BaseTask, name="body", retry_policy=NO_RETRY)
    def body() -> None:
        raise Unprintable

    with suppress(RuntimeError):  # Celery's own, where it stores it
        run(body)

    assert [each if isinstance(each, str) else each.state for each in seen] == [State.FAILURE, "after it"]


def hook_of(kind: str, seen: list[Any]) -> Any:
    async def tell(seen: list[Any], outcome: TaskOutcome) -> None:
        await asyncio.sleep(0)
        seen.append((ended(outcome), current_tenant()))

    class Teller:
        async def __call__(self, outcome: TaskOutcome) -> None:
            await tell(seen, outcome)

    @functools.wraps(tell)
    def wrapped(outcome: TaskOutcome) -> Any:
        return tell(seen, outcome)

    return {
        "partial": functools.partial(tell, seen),
        "callable object": Teller(),
        "lambda": lambda outcome: tell(seen, outcome),
        "wrapper": wrapped,
    }[kind]


@pytest.mark.parametrize("kind", ["partial", "callable object", "lambda", "wrapper"])
def test_what_returns_a_coroutine_is_awaited(app: Celery, run: Any, seen: list[Any], kind: str) -> None:
    on_tenant_success(app)(hook_of(kind, seen))

    run(app.task(base=BaseTask, name="body")(nothing))

    assert seen == [(("body", "success"), ACME)]


def test_a_wrapper_that_runs_the_coroutine_itself_is_not_awaited(app: Celery, run: Any, seen: list[Any]) -> None:
    async def tell(outcome: TaskOutcome) -> None:
        seen.append(current_tenant())

    @functools.wraps(tell)
    def wrapped(outcome: TaskOutcome) -> None:
        asyncio.run(tell(outcome))

    on_tenant_success(app)(wrapped)

    run(app.task(base=BaseTask, name="body")(nothing))

    assert seen == [ACME]


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hooks wait for that take too long; set after the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("kind", ["def", "async def", "async def that is not cancelled"])
def test_a_hook_that_takes_too_long_is_not_waited_for(
    app: Celery, work_off: Any, seen: list[Any], caplog: pytest.LogCaptureFixture, released: threading.Event, kind: str
) -> None:
    def slow(_: TaskOutcome) -> None:
        released.wait(30)

    async def slow_async(_: TaskOutcome) -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError) if "not" in kind else nullcontext():
                await asyncio.sleep(30)

    on_tenant_success(app)(slow if kind == "def" else slow_async)
    on_tenant_success(app)(seen.append)
    task = app.task(base=BaseTask, name="body", hook_time_limit=0.1, cleanup_grace=0.1)(seven)

    with tenant_scope(ACME):
        results = [task.delay(), task.delay()]
    before = time.monotonic()
    work_off(app)

    assert time.monotonic() - before < 10
    assert [result.get() for result in results] == [7, 7]
    assert len(seen) == 2
    assert caplog.text.count("failed, which changes nothing: HookTimeoutError: it did not end within 0.1 s") == 2


def test_where_too_many_hooks_have_not_ended_no_others_are_run(
    app: Celery,
    seen: list[Any],
    caplog: pytest.LogCaptureFixture,
    released: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "MOST_LEFT", 3)
    on_tenant_success(app, task="slow")(lambda _: released.wait(30))
    on_tenant_success(app, task="quick")(seen.append)
    slow = app.task(base=BaseTask, name="slow", hook_time_limit=0.05)(nothing)
    quick = app.task(base=BaseTask, name="quick")(nothing)

    with tenant_scope(ACME):
        for _ in range(2):
            slow.apply()
        quick.apply()
        slow.apply()
        quick.apply()
    assert len(seen) == 1
    assert "HookTimeoutError: it was not run: 3 hooks before it have not ended yet" in caplog.text

    released.set()
    for thread in tuple(hooks._left):
        thread.join(10)
    with tenant_scope(ACME):
        quick.apply()
    assert len(seen) == 2


@from_a_message
def test_what_a_hook_launches_belongs_to_the_tenant_and_to_the_run(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="follow")
    def follow(self: Any) -> None:
        seen.append((self.tenant, self.request.root_id, self.request.parent_id))

    async def follow_async(_: TaskOutcome) -> None:
        follow.delay()

    on_tenant_success(app, task="body")(lambda _: follow.delay())
    on_tenant_success(app, task="body")(follow_async)

    result = run(app.task(base=BaseTask, name="body")(nothing))

    assert seen == [(ACME, result.id, result.id)] * 2


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_a_hook_opens_and_sets_and_leaves_reaches_nothing_else(
    app: Celery, run: Any, seen: list[Any], kind: str
) -> None:
    locale: ContextVar[str] = ContextVar("locale")
    register_context_var(locale)

    def spoil(_: TaskOutcome) -> None:
        locale.set("left by a hook")
        tenant_scope(GLOBEX).__enter__()

    async def spoil_async(outcome: TaskOutcome) -> None:
        spoil(outcome)

    def look(outcome: TaskOutcome) -> None:
        seen.append((outcome.name, current_tenant(), locale.get("unset")))

    on_tenant_success(app, task="first")(spoil if kind == "def" else spoil_async)
    on_tenant_success(app)(look)
    first = app.task(base=BaseTask, name="first")(nothing)
    second = app.task(base=BaseTask, name="second")(nothing)

    run(first)
    run(second, tenant=GLOBEX)

    assert seen == [("first", ACME, "unset"), ("second", GLOBEX, "unset")]


def test_a_scope_that_celerys_own_hook_has_left_is_gone_in_ours(app: Celery, run: Any, seen: list[Any]) -> None:
    class Careless(BaseTask):
        abstract = True

        def on_success(self, *_: Any) -> None:
            tenant_scope(GLOBEX).__enter__()

        def on_tenant_success(self, outcome: TaskOutcome) -> None:
            seen.append(current_tenant())

    run(app.task(base=Careless, name="body")(nothing))

    assert seen == [ACME]


@pytest.mark.parametrize("what", ["retry", "replace", "add_to_chord"])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_hook_cannot_have_the_task_run_again(
    app: Celery, work_off: Any, seen: list[Any], caplog: pytest.LogCaptureFixture, what: str, kind: str
) -> None:
    other = app.task(base=BaseTask, name="other")(nothing)

    def again(task: Any) -> None:
        if what == "retry":
            raise task.retry(countdown=0)
        getattr(task, what)(other.si())

    async def again_async(task: Any) -> None:
        again(task)

    class Insisting(BaseTask):
        abstract = True

        def on_tenant_success(self, outcome: TaskOutcome) -> Any:
            return again(self) if kind == "def" else again_async(self)

    with tenant_scope(ACME):
        result = app.task(base=Insisting, name="body")(seven).delay()
    ran = work_off(app)

    assert (ran, result.get()) == (["body"], 7)
    assert f"NotSupportedError: {what}() of task body[{result.id}] is called when that has ended" in caplog.text


@pytest.mark.parametrize("what", ["retry", "replace", "add_to_chord"])
@pytest.mark.parametrize("ends", ["without a tenant", "by replace", "by Ignore", "by Reject", "based on nothing"])
def test_nothing_that_a_task_leaves_has_it_run_again_however_it_has_ended(
    app: Celery, work_off: Any, seen: list[Any], what: str, ends: str
) -> None:
    other = app.task(base=BaseTask, name="other")(nothing)
    go = threading.Event()
    threads: list[threading.Thread] = []
    raised: list[Exception] = []

    def again(task: Any) -> None:
        go.wait(10)
        try:
            task.retry(throw=False, countdown=0) if what == "retry" else getattr(task, what)(other.si())
        except Exception as error:
            raised.append(error)

    is_system = ends == "without a tenant"
    base: Any = {} if ends == "based on nothing" else {"base": BaseTask, "system": is_system}

    @app.task(bind=True, name="body", **base)
    def body(self: Any) -> None:
        seen.append(self.request.retries)
        threads.append(threading.Thread(target=wrap(again), args=(self,)))
        threads[-1].start()
        if ends == "by replace":
            raise self.replace(other.si())
        if ends in ("by Ignore", "by Reject"):
            raise {"by Ignore": Ignore, "by Reject": Reject}[ends]()

    @app.task(base=BaseTask, name="after", tenant_required=False)
    def after() -> None:
        go.set()
        threads[0].join(10)

    with nullcontext() if is_system else tenant_scope(ACME):
        body.delay()
        after.delay()
    ran = work_off(app)

    assert seen == [0]
    assert sorted(ran) == sorted(["body", "after", *(["other"] if ends == "by replace" else [])])
    assert [type(each) for each in raised] == [NotSupportedError]
    assert "is called when that has ended" in str(raised[0])


def test_a_task_may_still_retry_that_a_hook_runs_eagerly(app: Celery, run: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="inner")
    def inner(self: Any) -> int:
        if not self.request.retries:
            raise self.retry(countdown=0)
        return 1

    on_tenant_success(app, task="outer")(lambda _: seen.append(inner.apply().result))

    run(app.task(base=BaseTask, name="outer")(nothing))

    assert seen == [1]


# --- what the main process decides -----------------------------------------------------------------------------


def lost(task: Any, error: Exception) -> Any:
    """Let the hooks for a failure be published, as the main process does."""
    with tenant_scope(ACME):
        outcome = TaskOutcome(
            task=task,
            task_id="the-id",
            root_id="the-root",
            tenant=ACME,
            state=State.FAILURE,
            error=error,
            reason="it was lost",
            retries=2,
            duration=1.5,
        )
        request = type(
            "Request", (), {"delivery_info": {"exchange": "", "routing_key": task.app.conf.task_default_queue}}
        )
        hooks.publish_hooks(outcome, request())  # type: ignore[arg-type]
        return outcome


def test_what_the_main_process_decides_is_told_by_a_task(app: Celery, work_off: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, bind=True, name="follow")
    def follow(self: Any) -> None:
        seen.append(("follow", self.request.root_id, self.request.parent_id))

    class Own(Noting):
        abstract = True

        def on_tenant_failure(self, outcome: TaskOutcome) -> None:
            super().on_tenant_failure(outcome)
            seen.append((self.request.retries, self.request.organization_id, self.request.user_id))
            follow.delay()

    outcome = lost(app.task(base=Own, name="body", noted=seen)(nothing), KeyError("why"))
    ran = work_off(app)

    assert ran == [hooks.RUN_HOOKS, "follow"]
    (_, told, tenant, request_id), request, followed = seen
    for name in ("task_id", "root_id", "tenant", "state", "reason", "retries", "duration", "key", "name"):
        assert getattr(told, name) == getattr(outcome, name)
    assert repr(told.error) == "KeyError('why')"
    assert (tenant, request_id) == (ACME, "the-id")
    assert request == (2, "acme", "alice")
    assert followed == ("follow", "the-root", "the-id")


def test_nothing_is_published_where_no_hook_wants_it(app: Celery, published: Any) -> None:
    on_tenant_success(app)(lambda _: None)
    on_tenant_failure(app, task="other")(lambda _: None)
    on_tenant_failure(app, error=ValueError)(lambda _: None)

    lost(app.task(base=BaseTask, name="body")(nothing), KeyError("why"))

    assert published(app) == []


@pytest.mark.parametrize("what", ["retry", "replace"])
def test_what_the_main_process_decided_is_not_run_again_either(
    app: Celery, work_off: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    class Insisting(BaseTask):
        abstract = True

        def on_tenant_failure(self, outcome: TaskOutcome) -> None:
            raise self.retry() if what == "retry" else self.replace(self.si())

    lost(app.task(base=Insisting, name="body")(nothing), KeyError("why"))

    assert work_off(app) == [hooks.RUN_HOOKS]
    assert f"NotSupportedError: {what}() of task body[the-id]" in caplog.text


def test_the_task_that_tells_is_told_of_to_nobody(
    observed: Celery, work_off: Any, published: Any, seen: list[Any]
) -> None:
    lost(observed.task(base=BaseTask, name="body")(nothing), KeyError("why"))
    work_off(observed)
    lost(observed.tasks[hooks.RUN_HOOKS], KeyError("its process"))

    assert [ended(outcome) for outcome in seen] == [("body", "failure")]
    assert published(observed) == []


# --- definitions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -1, True, None, "10", float("inf"), float("nan"), 1e12])
@pytest.mark.parametrize("base", [BaseTask, None], ids=["BaseTask", "plain"])
def test_a_time_limit_of_hooks_that_is_none_is_refused_when_the_task_is_made(
    app: Celery, limit: Any, base: Any
) -> None:
    with pytest.raises(TaskDefinitionError) as caught:
        app.task(lazy=False, name="body", hook_time_limit=limit, **({"base": base} if base else {}))(nothing)

    assert str(caught.value) == f"hook_time_limit of task body must be seconds, not {limit!r}"


def test_a_grace_that_is_none_is_refused_of_a_plain_body_too(app: Celery) -> None:
    with pytest.raises(TaskDefinitionError, match="cleanup_grace of task body must be seconds, not -1"):
        app.task(base=BaseTask, lazy=False, name="body", cleanup_grace=-1)(nothing)


@pytest.mark.parametrize("name", ["on_tenant_success", "on_tenant_failure", "on_tenant_retry"])
@pytest.mark.parametrize("hook", [3, "notify", None])
def test_a_hook_that_is_no_function_is_refused_when_the_task_is_made(app: Celery, name: str, hook: Any) -> None:
    with pytest.raises(TaskDefinitionError) as caught:
        app.task(base=BaseTask, lazy=False, name="body", **{name: hook})(nothing)

    assert str(caught.value) == f"{name} of task body must be a function of the outcome, not {hook!r}"


@pytest.mark.parametrize("register", HANDLERS)
def test_a_hook_of_an_application_is_checked_where_it_is_registered(app: Celery, register: Any) -> None:
    name = register.__name__

    def hook(_: TaskOutcome) -> None: ...

    with pytest.raises(ConfigurationError) as without_app:
        register(hook)
    with pytest.raises(ConfigurationError) as no_pattern:
        register(app, task=("a", "b"))
    with pytest.raises(ConfigurationError) as no_function:
        register(app)("notify")

    assert str(without_app.value) == f"{name} takes the application, as in @{name}(app), not {hook!r}"
    assert str(no_pattern.value) == "task must be the name of tasks, such as 'reports.*', not ('a', 'b')"
    assert str(no_function.value) == f"{name} decorates a function, not 'notify'"
    assert register(app)(hook) is hook


@pytest.mark.parametrize("register", [on_tenant_failure, on_tenant_retry])
@pytest.mark.parametrize("error", ["ValueError", int, ValueError(), (ValueError, "KeyError"), None, [], ()])
def test_a_filter_that_is_no_exception_is_refused_where_it_is_registered(
    app: Celery, register: Any, error: Any
) -> None:
    with pytest.raises(ConfigurationError, match="error"):
        register(app, error=error)


def test_hooks_may_be_registered_before_the_application_is_configured(
    make_app: Callable[..., Celery], seen: list[Any]
) -> None:
    app = make_app(configured=False)
    on_tenant_success(app)(seen.append)
    configure(app)

    with tenant_scope(ACME):
        app.task(base=BaseTask, name="body")(nothing).apply()

    assert len(seen) == 1


def test_an_eager_task_that_is_refused_has_no_hooks(observed: Celery, seen: list[Any]) -> None:
    result = observed.task(base=BaseTask, name="body")(nothing).apply()

    assert isinstance(result.result, MissingTenantError)
    assert seen == []


@pytest.mark.parametrize(
    ("delivery", "destination"),
    [
        ({"exchange": "", "routing_key": "custom"}, {"queue": "custom"}),
        ({"exchange": "jobs", "routing_key": "a.b"}, {"exchange": "jobs", "routing_key": "a.b"}),
        ({}, {}),
    ],
)
def test_the_task_that_tells_goes_to_where_the_message_came_from(
    delivery: dict[str, str], destination: dict[str, str]
) -> None:
    assert hooks._destination(delivery) == destination
