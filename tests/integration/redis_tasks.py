"""The Celery application of the tests on Redis: broker and result backend are there, no database."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

from celery import Celery

from rhesis_tasks import BaseTask, RetryPolicy, configure, current_tenant, register_context_var

mark: ContextVar[str] = ContextVar("mark")
register_context_var(mark)

app = Celery("redis_tasks")
configure(app)

QUICK = RetryPolicy(max_retries=2, base=0.05, factor=1.0, retry_on=(ConnectionError,))


def seen() -> list[Any]:
    tenant = current_tenant()
    return [tenant and tenant.organization_id, mark.get(None)]


@app.task(base=BaseTask)
def look(seconds: float = 0) -> Any:
    time.sleep(seconds)
    found = seen()
    mark.set("left behind")
    return found


@app.task(base=BaseTask)
def look_back(before: Any) -> Any:
    return [seen(), before]


@app.task(base=BaseTask, bind=True, retry_policy=QUICK)
def flaky(self: BaseTask) -> Any:
    if self.request.retries < 2:
        mark.set("left behind")
        raise ConnectionError("down")
    return seen()


@app.task(base=BaseTask)
def broken(_: Any = None) -> None:
    raise ValueError("broken")


@app.task(base=BaseTask)
def note_failure(key: str, _id: Any = None) -> None:
    """An error callback: leaves what it saw under a key of its own."""
    app.backend.client.rpush(key, "/".join(map(str, seen())))
