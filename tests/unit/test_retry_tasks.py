"""How a task gets its retry policy: as a value, or from a method that is asked for the tenant."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
from celery import Celery

from rhesis_tasks import BaseTask, RetryPolicy, TenantContext, tenant_scope
from rhesis_tasks.errors import TaskDefinitionError
from rhesis_tasks.retry import DEFAULT, NO_RETRY

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")
ONCE = RetryPolicy(max_retries=1, base=0)
TWICE = RetryPolicy(max_retries=2, base=0)


def nothing() -> None: ...


class Policies:
    """Retries of the tenants, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, TenantContext | None]] = []

    def __call__(self, task: Any, tenant: TenantContext | None) -> RetryPolicy:
        self.asked.append((task.name, tenant))
        return TWICE if tenant == ACME else ONCE


@pytest.fixture
def policies() -> Policies:
    return Policies()


def attempts(
    app: Celery, work_off: Any, tenant: TenantContext | None = ACME, error: type[Exception] = ValueError, **options: Any
) -> int:
    """How often a task runs that fails every time."""
    begun = []

    @app.task(**{"base": BaseTask, "name": "fail", "lazy": False, **options})
    def fail() -> None:
        begun.append(1)
        raise error("every time")

    if tenant is None:
        fail.delay()
    else:
        with tenant_scope(tenant):
            fail.delay()
    work_off(app)
    return len(begun)


def as_function(policies: Policies) -> dict[str, Any]:
    return {"retry_policy": lambda task, tenant: policies(task, tenant)}


def as_object(policies: Policies) -> dict[str, Any]:
    return {"retry_policy": policies}


def as_partial(policies: Policies) -> dict[str, Any]:
    return {"retry_policy": functools.partial(lambda asked, task, tenant: asked(task, tenant), policies)}


def as_inherited_partial(policies: Policies) -> dict[str, Any]:
    return {"base": type("Task", (BaseTask,), {"abstract": True, **as_partial(policies)})}


def as_method_of_another(policies: Policies) -> dict[str, Any]:
    return {"retry_policy": policies.__call__}


def as_method(policies: Policies) -> dict[str, Any]:
    class Task(BaseTask):
        abstract = True

        def retry_policy(self, tenant: TenantContext | None) -> RetryPolicy:
            return policies(self, tenant)

    return {"base": Task}


def as_classmethod(policies: Policies) -> dict[str, Any]:
    class Task(BaseTask):
        abstract = True

        @classmethod
        def retry_policy(cls, tenant: TenantContext | None) -> RetryPolicy:
            return policies(cls, tenant)

    return {"base": Task}


def as_staticmethod(policies: Policies) -> dict[str, Any]:
    class Task(BaseTask):
        abstract = True

        @staticmethod
        def retry_policy(task: Any, tenant: TenantContext | None) -> RetryPolicy:
            return policies(task, tenant)

    return {"base": Task}


@pytest.mark.parametrize(
    "options",
    [
        as_function,
        as_object,
        as_partial,
        as_inherited_partial,
        as_method_of_another,
        as_method,
        as_classmethod,
        as_staticmethod,
    ],
)
def test_a_method_says_the_policy_for_the_tenant(app: Celery, work_off: Any, policies: Policies, options: Any) -> None:
    assert attempts(app, work_off, ACME, **options(policies)) == 3
    assert policies.asked == [("fail", ACME)] * 3


def test_a_method_says_another_policy_for_another_tenant(app: Celery, work_off: Any, policies: Policies) -> None:
    assert attempts(app, work_off, GLOBEX, **as_function(policies)) == 2


def test_a_method_is_asked_for_no_tenant_where_the_task_has_none(
    app: Celery, work_off: Any, policies: Policies
) -> None:
    assert attempts(app, work_off, None, tenant_required=False, **as_function(policies)) == 2
    assert policies.asked == [("fail", None)] * 2


def test_a_method_is_asked_for_the_tasks_tenant_whatever_scope_the_body_left_open(
    app: Celery, work_off: Any, policies: Policies
) -> None:
    @app.task(base=BaseTask, name="leave", **as_function(policies))
    def leave() -> None:
        tenant_scope(GLOBEX).__enter__()
        raise ValueError

    with tenant_scope(ACME):
        leave.delay()
    work_off(app)

    assert policies.asked == [("leave", ACME)] * 3


def test_a_task_without_a_failure_asks_for_no_policy(app: Celery, work_off: Any, policies: Policies) -> None:
    @app.task(base=BaseTask, name="work", **as_function(policies))
    def work() -> None: ...

    with tenant_scope(ACME):
        work.delay()
    work_off(app)

    assert policies.asked == []


def test_a_composed_policy_may_allow_more_retries_than_its_last_part(app: Celery, work_off: Any) -> None:
    policy = RetryPolicy(max_retries=5, base=0, retry_on=ValueError) | RetryPolicy(max_retries=1, retry_on=OSError)

    assert attempts(app, work_off, retry_policy=policy) == 6


def test_celerys_own_number_of_retries_does_not_count(app: Celery, work_off: Any) -> None:
    assert attempts(app, work_off, retry_policy=RetryPolicy(max_retries=5, base=0), max_retries=1) == 6


def broken(task: Any, tenant: Any) -> RetryPolicy:
    raise KeyError("plan")


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (broken, "retry_policy of task fail failed, and DEFAULT counts"),
        (lambda task, tenant: None, "retry_policy of task fail returned a NoneType and no RetryPolicy"),
        (lambda task, tenant: 3, "retry_policy of task fail returned a int and no RetryPolicy"),
    ],
)
def test_where_a_method_says_no_policy_the_default_counts_and_that_is_logged(
    app: Celery,
    work_off: Any,
    caplog: pytest.LogCaptureFixture,
    policy: Any,
    text: str,
) -> None:
    with caplog.at_level(logging.ERROR, logger="rhesis_tasks.retrying"):
        assert attempts(app, work_off, error=ConnectionError, retry_policy=policy) == 1 + DEFAULT.max_retries

    logged = [record for record in caplog.records if record.name == "rhesis_tasks.retrying"]
    assert [text in record.getMessage() for record in logged] == [True] * 4
    assert [record.exc_info is not None for record in logged] == [policy is broken] * 4


# --- definitions -----------------------------------------------------------------------------------------------


class Autoretried(BaseTask):
    """Celery's rules, set in a base class."""

    abstract = True
    autoretry_for = (KeyError,)


class Payment(BaseTask):
    """A policy, set in a base class."""

    abstract = True
    retry_policy = NO_RETRY


async def later(task: Any, tenant: Any) -> RetryPolicy:
    return DEFAULT


MIXED = "task body has a retry_policy and Celery's autoretry_for, beside which it is not asked"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({"autoretry_for": (KeyError,), "retry_policy": ONCE}, MIXED, id="both"),
        pytest.param({"autoretry_for": (KeyError,), "retry_policy": lambda *_: ONCE}, MIXED, id="both, by method"),
        pytest.param({"autoretry_for": (KeyError,), "base": Payment}, MIXED, id="the policy inherited"),
        pytest.param({"base": Autoretried, "retry_policy": ONCE}, MIXED, id="Celery's rules inherited"),
        pytest.param({"retry_policy": later}, "must not be async def", id="async"),
        pytest.param({"retry_policy": lambda: ONCE}, r"must take \(task, tenant\)", id="no arguments"),
        pytest.param({"retry_policy": lambda a, b, c: ONCE}, r"must take \(task, tenant\)", id="too many"),
        pytest.param({"retry_policy": RetryPolicy}, "must be a RetryPolicy, or a method", id="a class"),
        pytest.param({"retry_policy": "http"}, "must be a RetryPolicy, or a method", id="a name"),
        pytest.param({"retry_policy": property(lambda self: ONCE)}, "must be a RetryPolicy, or a", id="a property"),
    ],
)
def test_a_definition_that_cannot_work_is_refused(app: Celery, options: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        app.task(**{"base": BaseTask, "lazy": False, "name": "body", **options})(nothing)


def test_a_classmethod_that_takes_too_much_is_refused(app: Celery) -> None:
    class Task(BaseTask):
        abstract = True

        @classmethod
        def retry_policy(cls, task: Any, tenant: Any) -> RetryPolicy:
            return ONCE

    with pytest.raises(TaskDefinitionError, match=r"must take \(task, tenant\)"):
        app.task(base=Task, lazy=False, name="body")(nothing)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"base": Autoretried}, id="alone"),
        pytest.param({"base": Payment, "autoretry_for": (KeyError,), "retry_policy": DEFAULT}, id="the policy undone"),
        pytest.param({"base": Autoretried, "autoretry_for": (), "retry_policy": ONCE}, id="Celery's rules undone"),
    ],
)
def test_one_of_both_is_enough(app: Celery, options: dict[str, Any]) -> None:
    app.task(**{"base": BaseTask, "lazy": False, "name": "body", **options})(nothing)
