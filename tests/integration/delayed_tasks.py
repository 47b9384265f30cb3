"""The Celery application of test_delayed_tasks.py, ``celery -A delayed_tasks``; DELAYED names the file of its runs."""

from __future__ import annotations

import os
import time

from celery import Celery

from rhesis_tasks import BaseTask, RetryPolicy, configure, require_tenant

app = Celery("delayed_tasks")
configure(app)


def _write(line: str) -> None:
    file = os.open(os.environ["DELAYED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


@app.task(base=BaseTask, bind=True, shared=False)
def note(self: BaseTask, label: str) -> None:
    """Writes down whose it is, when it ran, and its ETA."""
    _write(f"{label} {require_tenant().organization_id} {time.time()} {self.request.eta}")


@app.task(
    base=BaseTask, bind=True, retry_policy=RetryPolicy(1, backoff="constant", base=3.0, jitter="none"), shared=False
)
def fail_once(self: BaseTask, label: str) -> None:
    """Fails the first time, and is tried again after three seconds."""
    _write(f"{label} {require_tenant().organization_id} {time.time()} {self.request.retries}")
    if not self.request.retries:
        raise ConnectionError("down")
