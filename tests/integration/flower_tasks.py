"""The Celery application that Flower is started for in test_flower.py: ``celery -A flower_tasks``."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Celery

from rhesis_tasks import BaseTask, RetryPolicy, configure

SETTINGS = "FLOWER_TASKS_SETTINGS"  # what configure() is given, in JSON
REDACTED = "the-text-of-a-failure"
ONCE = RetryPolicy(max_retries=1, retry_on=(ConnectionError,), base=0.1)


def redact(text: str) -> str:
    return text.replace(REDACTED, "***")


def application(url: str | None, **settings: Any) -> Celery:
    """The application, for the workers and for who launches its tasks."""
    app = Celery("flower_tasks", set_as_current=False)
    configure(app, url, worker_send_task_events=True, task_send_sent_event=True, redact=redact, **settings)

    @app.task(base=BaseTask, shared=False, name="echo")
    def echo(*args: Any, **kwargs: Any) -> str:
        return f"{args} {kwargs}"

    @app.task(base=BaseTask, shared=False, name="hold")
    def hold(secret: str, seconds: float = 120.0) -> str:
        time.sleep(seconds)
        return secret

    @app.task(base=BaseTask, shared=False, name="fail")
    def fail(secret: str) -> None:
        raise ValueError(f"it has {secret}")

    @app.task(base=BaseTask, shared=False, name="again", bind=True, retry_policy=ONCE)
    def again(self: BaseTask, secret: str) -> str:
        if not self.request.retries:
            raise ConnectionError(REDACTED)
        return secret

    @app.task(shared=False, name="plain")
    def plain(secret: str) -> str:
        return secret

    @app.task(base=BaseTask, shared=False, name="nightly", system=True)
    def nightly(secret: str) -> str:
        return secret

    return app


if SETTINGS in os.environ:
    app = application(None, **json.loads(os.environ[SETTINGS]))
