"""The Celery application of the worker whose events nobody hears, in test_unheard_events.py."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from rhesis_tasks import configure

URL = "UNHEARD_TASKS_URL"


def application(url: str | None) -> Celery:
    app = Celery("unheard_tasks", set_as_current=False, broker="memory://" if url is None else url)
    settings: dict[str, Any] = {"task_ignore_result": True, "worker_send_task_events": True}
    configure(app, **settings)

    @app.task(shared=False, name="nothing")
    def nothing() -> None:
        pass

    return app


app = application(os.environ.get(URL))
