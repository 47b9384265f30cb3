"""The Celery application whose worker's log is read: ``celery -A log_tasks``.

``LOG_TASKS_FORMAT`` is text, or the recipe of docs/logging.md that the worker uses.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import Ignore, Reject
from celery.utils.log import get_task_logger

from rhesis_tasks import BaseTask, RetryPolicy, configure, register_context_var
from rhesis_tasks.retry import NO_RETRY

LOGGING = Path(__file__).resolve().parents[2] / "docs" / "logging.md"
TEXT = (
    "LINE %(levelname)s|%(name)s|%(organization_id)s|%(user_id)s|%(task_id)s|%(task_name)s|%(root_id)s|%(request_id)s|"
    "%(message)s"
)

request_id: ContextVar[str] = ContextVar("request_id")
register_context_var(request_id, log=True)


def recipe(about: str) -> str:
    """The code block of docs/logging.md that has a word in it."""
    blocks = LOGGING.read_text().split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if about in block)


app = Celery("log_tasks")
configure(app)
FORMAT = os.environ.get("LOG_TASKS_FORMAT")
if FORMAT == "text":
    app.conf.update(worker_log_format=TEXT, worker_task_log_format=TEXT)
if FORMAT in ("json", "structlog"):
    exec(recipe("JsonFormatter"))  # noqa: S102 - our own
if FORMAT == "structlog":
    exec(recipe("structlog.configure"))  # noqa: S102


@app.task(base=BaseTask, bind=True)
def speak(self: BaseTask, secret: str, *, more: str = "") -> None:
    self.log.info("from the task")
    get_task_logger("shop").info("from a task logger")
    logging.getLogger("third.party").warning("from another library")
    print("printed")
    warnings.warn(f"a warning in {self.request.id}", stacklevel=1)  # each text is shown once only


@app.task(base=BaseTask, bind=True)
def speak_structured(self: BaseTask, secret: str) -> None:
    import structlog

    structlog.get_logger("shop").info("counted", words=3)


@app.task(base=BaseTask, bind=True)
def follow(self: BaseTask, before: Any, secret: str) -> None:
    self.log.info("from the next task")


@app.task(base=BaseTask, bind=True, retry_policy=NO_RETRY)
def fail(self: BaseTask, secret: str) -> None:
    raise ValueError("it failed")


@app.task(base=BaseTask, bind=True, retry_policy=NO_RETRY, throws=(KeyError,))
def fail_as_expected(self: BaseTask, secret: str) -> None:
    raise KeyError("nothing")


@app.task(base=BaseTask, bind=True, retry_policy=RetryPolicy(max_retries=1, base=0.01, retry_on=(OSError,)))
def retry(self: BaseTask, secret: str) -> None:
    if not self.request.retries:
        raise ConnectionError("down")


@app.task(base=BaseTask, bind=True)
def ignore(self: BaseTask, secret: str) -> None:
    raise Ignore("not now")


@app.task(base=BaseTask, bind=True)
def reject(self: BaseTask, secret: str) -> None:
    raise Reject("not here", requeue=False)


@app.task(base=BaseTask, bind=True)
def hang(self: BaseTask, secret: str) -> None:
    threading.Event().wait()


@app.task(base=BaseTask, bind=True)
def die(self: BaseTask, secret: str) -> None:
    os._exit(1)
