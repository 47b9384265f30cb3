"""The Celery application of test_status.py, ``celery -A status_tasks``; who was started is in the file STATUS names."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery

from rhesis_tasks import BaseTask, configure

app = Celery("status_tasks")
configure(app)


@app.task(base=BaseTask)
def echo(value: Any) -> Any:
    return value


@app.task(base=BaseTask)
def add(one: int, other: int) -> int:
    return one + other


@app.task(base=BaseTask, bind=True)
def until(self: BaseTask, path: str, listens: bool = True) -> str:
    """Lasts until there is a file, or it is asked to stop and listens."""
    with open(os.environ["STATUS"], "a", encoding="utf-8") as file:
        file.write(f"{self.request.id}\n")
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        if listens and self.should_abort():
            return "aborted"
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.02)
    return "done"
