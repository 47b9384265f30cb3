"""What retries keep, by which policy they go, and the bounds of those that a body asks for by itself."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.exceptions import MaxRetriesExceededError, SoftTimeLimitExceeded
from kombu.utils import json as kombu_json

from rhesis_tasks import BaseTask, RetryPolicy, TenantContext, launch_with_context, tenant_scope
from rhesis_tasks import retry as retry_module
from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.headers import state_of
from rhesis_tasks.retry import NO_RETRY, register_retry_policy

ACME = TenantContext("acme", "alice")
ONCE = RetryPolicy(max_retries=1, base=0)
TWICE = RetryPolicy(max_retries=2, base=0)


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, RetryPolicy], None]:
    """Registers policies for the time of a test."""
    monkeypatch.setattr(retry_module, "_named", dict(retry_module._named))
    return register_retry_policy


@dataclasses.dataclass
class Run:
    """What was seen of a task that fails every time."""

    begun: list[Any] = dataclasses.field(default_factory=list)
    reasons: list[str | None] = dataclasses.field(default_factory=list)
    task: Any = None


@pytest.fixture
def failing(app: Celery) -> Callable[..., Run]:
    """Makes a task that fails every time, and notes what its request says; ``body`` is called first."""

    def make(error: Any = None, body: Any = None, **options: Any) -> Run:
        run = Run()

        class Noting(BaseTask):
            abstract = True

            def on_failure(self, *_: Any) -> None:
                state = state_of(self.request)
                assert state is not None
                run.reasons.append(state.reason)

        @app.task(base=Noting, bind=True, **{"name": "fail", "lazy": False, **options})
        def fail(self: Any, *_: Any) -> None:
            run.begun.append(state_of(self.request).first_at)
            if body is not None:
                body(self)
            raise error or ValueError("every time")

        run.task = fail
        return run

    return make


def launch(task: Any, *args: Any, **options: Any) -> None:
    with tenant_scope(ACME):
        task.apply_async(args, **options)


# --- the first attempt ------------------------------------------------------------------------------------------


def test_every_attempt_knows_when_the_first_one_began(
    app: Celery, work_off: Any, failing: Callable[..., Run], clock: Clock
) -> None:
    run = failing(body=lambda _: setattr(clock, "now", clock.now + 10), retry_policy=TWICE)

    launch(run.task)
    work_off(app)

    assert run.begun == [1_800_000_000_000] * 3


def test_nothing_begins_after_the_greatest_age(
    app: Celery, work_off: Any, failing: Callable[..., Run], clock: Clock
) -> None:
    policy = RetryPolicy(max_retries=99, base=0, max_age=25)
    run = failing(body=lambda _: setattr(clock, "now", clock.now + 10), retry_policy=policy)

    launch(run.task)
    work_off(app)

    assert (len(run.begun), run.reasons) == (3, ["it is older than 25 s"])


def test_what_a_task_launches_has_a_first_attempt_of_its_own(
    app: Celery, work_off: Any, failing: Callable[..., Run], clock: Clock, register: Any
) -> None:
    """Also where it hands its own headers on."""
    register("twice", TWICE)
    child = failing(name="child", retry_policy=NO_RETRY)

    def pass_on(task: Any) -> None:
        clock.now += 10
        child.task.delay()
        child.task.apply_async(headers=dict(task.request.headers))

    run = failing(body=pass_on, retry_policy=NO_RETRY)
    launch(run.task, retry_policy="twice")
    work_off(app)

    assert run.begun == [1_800_000_000_000] * 3
    assert sorted(child.begun) == [1_800_000_000_000 + 10_000 * n for n in (1, 1, 2, 2, 3, 3)]


# --- a policy for one launch ------------------------------------------------------------------------------------


@pytest.fixture(params=["name", "value"])
def twice(request: pytest.FixtureRequest, register: Any) -> Any:
    register("twice", TWICE)
    return "twice" if request.param == "name" else TWICE


@pytest.mark.parametrize(
    "publish",
    [
        lambda task, policy: launch(task, retry_policy=policy),
        lambda task, policy: launch_with_context(task, context=ACME, options={"retry_policy": policy}),
        lambda task, policy: launch_with_context(task.s().set(retry_policy=policy), context=ACME),
        lambda task, policy: launch_with_context(group(task.s().set(retry_policy=policy)), context=ACME),
    ],
    ids=["apply_async", "launch_with_context", "signature", "group"],
)
def test_a_launch_may_name_its_policy(
    app: Celery, work_off: Any, failing: Callable[..., Run], publish: Any, twice: Any
) -> None:
    run = failing(retry_policy=NO_RETRY)

    publish(run.task, twice)
    work_off(app)

    assert (len(run.begun), run.reasons) == (3, ["all 2 retries are used up"])


def test_a_later_part_of_a_chain_may_name_its_policy(
    app: Celery, work_off: Any, failing: Callable[..., Run], twice: Any
) -> None:
    run = failing(retry_policy=NO_RETRY)

    @app.task(base=BaseTask, name="first", lazy=False)
    def first() -> None: ...

    launch_with_context(chain(first.si(), run.task.si().set(retry_policy=twice)), context=ACME)
    work_off(app)

    assert len(run.begun) == 3


def test_a_launch_may_name_its_policy_in_eager_mode(app: Celery, failing: Callable[..., Run], twice: Any) -> None:
    run = failing(retry_policy=NO_RETRY)
    app.conf.task_always_eager = True

    launch(run.task, retry_policy=twice)
    with tenant_scope(ACME):
        run.task.apply(retry_policy=twice)

    assert len(run.begun) == 6


def test_what_celery_calls_a_retry_policy_stays_about_publishing(
    app: Celery, published: Any, failing: Callable[..., Run]
) -> None:
    run = failing()

    launch(run.task, retry=True, retry_policy={"max_retries": 1})

    (message,) = published(app)
    assert message.envelope.retry_policy is None


@pytest.mark.parametrize(
    ("policy", "text"),
    [("unheard", "no retry policy is registered as 'unheard'"), (RetryPolicy(max_retries=77), "this one has none")],
)
def test_a_policy_without_a_name_is_refused_at_the_launch(
    app: Celery, published: Any, failing: Callable[..., Run], policy: Any, text: str
) -> None:
    run = failing()

    with pytest.raises(ConfigurationError, match=text):
        launch(run.task, retry_policy=policy)

    assert published(app) == []


def test_a_worker_that_does_not_know_the_name_goes_by_the_tasks_own(
    app: Celery,
    work_off: Any,
    failing: Callable[..., Run],
    register: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    register("twice", TWICE)
    run = failing(retry_policy=ONCE)
    launch(run.task, retry_policy="twice")
    monkeypatch.setattr(retry_module, "_named", {})

    work_off(app)

    assert len(run.begun) == 2
    assert "launched with a retry policy that this worker does not know" in caplog.text


def test_a_policy_is_its_name_in_json(register: Any) -> None:
    register("twice", TWICE)

    assert json.loads(kombu_json.dumps({"retry_policy": TWICE})) == {"retry_policy": "twice"}


# --- self.retry() by hand ---------------------------------------------------------------------------------------


def again(**options: Any) -> Callable[[Any], None]:
    def body(task: Any) -> None:
        raise task.retry(**options)

    return body


@pytest.mark.parametrize(
    ("policy", "options", "retry", "attempts"),
    [
        pytest.param(TWICE, {}, {"countdown": 0}, 3, id="the policy's number"),
        pytest.param(NO_RETRY, {}, {"countdown": 0}, 1, id="none"),
        pytest.param(ONCE | TWICE | ONCE, {}, {"countdown": 0}, 3, id="the largest of its parts"),
        pytest.param(TWICE, {}, {"countdown": 0, "max_retries": 4}, 5, id="the call's"),
        pytest.param(TWICE, {"max_retries": 1}, {"countdown": 0}, 2, id="the task's"),
        pytest.param(TWICE, {}, {}, 3, id="waits as the policy says"),
        pytest.param(TWICE, {"default_retry_delay": 0}, {}, 3, id="waits as the task says"),
    ],
)
def test_a_retry_by_hand_keeps_to_the_policys_number(
    app: Celery,
    work_off: Any,
    failing: Callable[..., Run],
    policy: RetryPolicy,
    options: dict[str, Any],
    retry: dict[str, Any],
    attempts: int,
) -> None:
    run = failing(body=again(**retry), retry_policy=policy, **options)

    launch(run.task)
    work_off(app)

    assert (len(run.begun), run.reasons) == (attempts, [f"all {attempts - 1} retries are used up"])


def test_a_retry_by_hand_waits_as_the_policy_says(app: Celery, published: Any, failing: Callable[..., Run]) -> None:
    waits = []

    class Asked(RetryPolicy):
        __slots__ = ()

        def wait(self, retries: int, **options: Any) -> float:
            waits.append(retries)
            return 5.0

    run = failing(body=again(), retry_policy=Asked())
    with tenant_scope(ACME):
        run.task.apply()

    assert waits == [0, 1, 2, 3]


@pytest.mark.parametrize("by", ["countdown", "eta"])
def test_a_retry_by_hand_keeps_to_the_policys_age(
    app: Celery, work_off: Any, failing: Callable[..., Run], by: str
) -> None:
    when = {
        "countdown": {"countdown": 60},
        "eta": {"eta": datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)},
    }[by]
    run = failing(body=again(**when), retry_policy=RetryPolicy(max_retries=99, max_age=30))

    launch(run.task)
    work_off(app)

    assert (len(run.begun), run.reasons) == (1, ["it would be older than 30 s at its next attempt"])


def test_an_age_counts_only_if_every_part_has_one(app: Celery, failing: Callable[..., Run]) -> None:
    policy = RetryPolicy(max_retries=2, max_age=30) | RetryPolicy(max_retries=2)
    run = failing(body=again(countdown=60), retry_policy=policy)

    with tenant_scope(ACME):
        run.task.apply()

    assert len(run.begun) == 3


def test_where_it_gives_up_the_body_gets_what_it_has_named(app: Celery, failing: Callable[..., Run]) -> None:
    caught: list[BaseException] = []

    def body(task: Any) -> None:
        try:
            task.retry(exc=KeyError("mine"), countdown=0)
        except KeyError as error:
            caught.append(error)
        try:
            task.retry(countdown=0)
        except MaxRetriesExceededError as error:
            caught.append(error)

    run = failing(body=body, retry_policy=NO_RETRY)
    with tenant_scope(ACME):
        run.task.apply(("the-secret-argument",))

    assert repr(caught[0]) == "KeyError('mine')"
    assert "all 0 retries are used up" in str(caught[1])
    assert "the-secret-argument" not in str(caught[1])


# --- Celery's own means -----------------------------------------------------------------------------------------


def test_the_soft_time_limit_is_final_unless_the_policy_names_it(
    app: Celery, work_off: Any, failing: Callable[..., Run]
) -> None:
    final = failing(SoftTimeLimitExceeded(), retry_policy=TWICE)
    named = failing(
        SoftTimeLimitExceeded(),
        name="named",
        retry_policy=TWICE | RetryPolicy(max_retries=1, base=0, retry_on=(SoftTimeLimitExceeded,)),
    )

    launch(final.task)
    launch(named.task)
    work_off(app)

    assert (len(final.begun), final.reasons) == (1, ["its soft time limit was reached"])
    assert len(named.begun) > 1


def test_the_soft_time_limit_is_final_in_an_exception_group_too(
    app: Celery, work_off: Any, failing: Callable[..., Run]
) -> None:
    run = failing(ExceptionGroup("several", [KeyError(), SoftTimeLimitExceeded()]), retry_policy=TWICE)

    launch(run.task)
    work_off(app)

    assert (len(run.begun), run.reasons) == (1, ["its soft time limit was reached"])


def test_what_a_task_group_raises_is_tried_again_by_what_is_in_it(app: Celery, work_off: Any) -> None:
    begun = []

    async def fetch() -> None:
        raise ConnectionError

    @app.task(
        base=BaseTask, bind=True, name="gather", retry_policy=dataclasses.replace(TWICE, retry_on=ConnectionError)
    )
    async def gather(self: BaseTask) -> None:
        begun.append(self.request.retries)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fetch())
            tasks.create_task(fetch())

    launch(gather)
    work_off(app)

    assert begun == [0, 1, 2]


def test_autoretry_for_says_why_it_gives_up(app: Celery, work_off: Any, failing: Callable[..., Run]) -> None:
    options: dict[str, Any] = {"autoretry_for": (KeyError,), "max_retries": 1, "default_retry_delay": 0}
    named = failing(KeyError(), name="named", **options)
    other = failing(ValueError(), name="other", **options)

    launch(named.task)
    launch(other.task)
    work_off(app)

    assert (len(named.begun), named.reasons) == (2, ["all 1 retries are used up"])
    assert (len(other.begun), other.reasons) == (1, ["ValueError is not listed in autoretry_for"])
