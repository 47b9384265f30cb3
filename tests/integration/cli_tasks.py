"""The Celery application of test_cli_tasks.py."""

from __future__ import annotations

import time

from celery import Celery

from rhesis_tasks import BaseTask, configure

app = Celery("cli_tasks")
configure(app)


@app.task(base=BaseTask)
def add(first: int, second: int) -> int:
    return first + second


@app.task(base=BaseTask, bind=True)
def counts(self: BaseTask, up_to: int) -> int:
    for number in range(up_to):
        self.report_progress(number + 1, up_to)
        time.sleep(0.2)
    return up_to


@app.task(base=BaseTask)
def fails() -> None:
    raise ValueError("broken")


@app.task(base=BaseTask, bind=True)
def runs_until_asked(self: BaseTask) -> None:
    while not self.should_abort():
        time.sleep(0.1)
