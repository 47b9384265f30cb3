"""Which of Celery's own lines give way to ours."""

from __future__ import annotations

import logging

import pytest
from celery import Celery
from celery.app import trace

from rhesis_tasks import BaseTask, TenantContext, tenant_scope


@pytest.mark.parametrize("is_internal", [False, True])
def test_celerys_line_about_a_failure_gives_way_unless_it_is_celerys_own(
    app: Celery, caplog: pytest.LogCaptureFixture, is_internal: bool
) -> None:
    said = {"name": "work", "id": "1", "description": "by Celery", "exc": "broken", "internal": is_internal}

    @app.task(base=BaseTask, lazy=False, name="work")
    def work() -> None:
        logging.getLogger(trace.__name__).error(trace.LOG_FAILURE, said)

    with tenant_scope(TenantContext("acme")):
        work.apply()

    assert ("Task work[1] by Celery: broken" in caplog.text) == is_internal


def test_a_line_about_no_task_stays(caplog: pytest.LogCaptureFixture, app: Celery) -> None:
    said = {"name": "work", "id": "1", "description": "by Celery", "exc": "broken", "internal": False}

    logging.getLogger(trace.__name__).error(trace.LOG_FAILURE, said)

    assert "by Celery" in caplog.text
