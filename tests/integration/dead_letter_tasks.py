"""The Celery application of test_dead_letters.py, ``celery -A dead_letter_tasks``; TOLD names the file of its lines."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from rhesis_tasks import BaseTask, configure, require_tenant
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure

app = Celery("dead_letter_tasks")
configure(
    app,
    signing_keys=list(filter(None, [os.environ.get("SIGNING_KEY")])) or (),
    accept_content=os.environ.get("ACCEPT_CONTENT", "json").split(),
)


def _tell(*words: object) -> None:
    file = os.open(os.environ["TOLD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (" ".join(map(str, (require_tenant().organization_id, *words))) + "\n").encode())
    os.close(file)


@on_tenant_failure(app=app)
def hook(outcome: TaskOutcome) -> None:
    _tell("hook", outcome.task_id, type(outcome.error).__name__)


@app.task(base=BaseTask, shared=False)
def work(value: Any) -> Any:
    _tell("ran", value)
    return value


@app.task(base=BaseTask, shared=False)
def failed(task_id: str) -> None:
    _tell("callback", task_id)
