"""The Celery application of test_operations.py, test_operation_commands.py and test_runbook.py."""

from __future__ import annotations

import json
import os
import signal
import time

from celery import Celery

from rhesis_tasks import BaseTask, configure

app = Celery("operation_tasks")
configure(app, broker_transport_options=json.loads(os.environ.get("OPERATION_OPTIONS", "{}")))


@app.task(base=BaseTask, shared=False)
def add(first: int, second: int) -> int:
    return first + second


@app.task(base=BaseTask, shared=False)
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(base=BaseTask, bind=True, shared=False)
def runs_until_asked(self: BaseTask) -> str:
    while not self.should_abort():
        time.sleep(0.05)
    return "asked"


@app.task(base=BaseTask, shared=False)
def never_ends() -> None:
    time.sleep(600)


@app.task(base=BaseTask, shared=False)
def poison(file: str) -> str:
    """Ends its worker, until there is a file."""
    if not os.path.exists(file):
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"
