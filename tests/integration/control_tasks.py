"""The Celery application whose workers are controlled in test_broker_control.py: ``celery -A control_tasks``."""

from __future__ import annotations

import time

from celery import Celery

from rhesis_tasks import configure

app = Celery("control_tasks")
configure(app, worker_send_task_events=True, task_send_sent_event=True)


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task
def hold(seconds: float = 60.0) -> str:
    """Keeps a worker busy."""
    time.sleep(seconds)
    return "held"


@app.task(bind=True, max_retries=5)
def stubborn(self, times: int) -> int:  # type: ignore[no-untyped-def]
    """Succeeds after some retries."""
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return int(self.request.retries)
