"""Which applications ``task_router`` takes; what its routes answer is among the integration tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.local import Proxy

from rhesis_tasks import TenantContext, configure
from rhesis_tasks.errors import ConfigurationError, NotConfiguredError, NotSupportedError
from rhesis_tasks.fastapi import task_router

DATABASE = "postgresql://app:s3cret@nowhere/shop"


def get_tenant() -> TenantContext:
    return TenantContext("acme")


@pytest.mark.parametrize("thing", ["shop", None, get_tenant])
def test_what_is_no_celery_application_is_refused(thing: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"takes the Celery application, not {type(thing).__name__}"):
        task_router(thing, get_tenant)


def test_an_application_that_is_not_configured_is_refused(make_app: Callable[..., Celery]) -> None:
    with pytest.raises(NotConfiguredError, match=r"Call configure\(app, \.\.\.\) before task_router"):
        task_router(make_app(configured=False, backend=DATABASE), get_tenant)


@pytest.mark.parametrize("backend", ["cache+memory://", "redis://:s3cret@nowhere", "rpc://", "db+sqlite://"])
def test_a_result_backend_that_keeps_no_records_is_refused_without_showing_its_url(
    make_app: Callable[..., Celery], backend: str
) -> None:
    with pytest.raises(NotSupportedError, match=r"Backend keeps no records of tenants.*result_backend='post") as caught:
        task_router(make_app(backend=backend), get_tenant)

    assert "s3cret" not in str(caught.value)


def test_nothing_is_asked_of_a_database_and_no_task_is_made(make_app: Callable[..., Celery]) -> None:
    app = make_app(configured=False, backend=None)
    configure(app, DATABASE)

    task_router(app, get_tenant)
    task_router(Proxy(lambda: app), get_tenant)

    assert not app.finalized


def test_a_result_backend_may_be_named_later(make_app: Callable[..., Celery]) -> None:
    app = make_app(backend=None)

    task_router(app, get_tenant)
    app.conf.result_backend = DATABASE

    assert hasattr(app.backend, "get_record")
