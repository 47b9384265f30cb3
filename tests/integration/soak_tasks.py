"""The Celery application of the soak: tasks that write down what they saw, and leave things behind on purpose."""

from __future__ import annotations

import os
import signal
from contextvars import ContextVar
from typing import Any

from celery import Celery
from celery.canvas import Signature

from rhesis_tasks import BaseTask, RetryPolicy, TenantContext, configure, current_tenant, register_context_var
from rhesis_tasks.context import tenant_var

mark: ContextVar[str] = ContextVar("mark")
register_context_var(mark)

app = Celery("soak_tasks")
configure(app, task_reject_on_worker_lost=True, task_default_queue=os.environ.get("SOAK_QUEUE", "soak"))

QUICK = RetryPolicy(max_retries=3, base=0.01, factor=1.0, retry_on=(ConnectionError,))
SEEN = os.environ.get("SOAK_FILE", os.devnull)


def note(label: str) -> None:
    """Write down for whom a body ran; one write of less than a page is whole, whoever else writes."""
    tenant = current_tenant()
    who = (tenant.organization_id, tenant.user_id) if tenant else (None, None)
    line = " ".join((label, *map(str, who), str(mark.get(None)))) + "\n"
    file = os.open(SEEN, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def litter() -> None:
    """What a careless body leaves behind: variables that nobody resets, for somebody who was never here."""
    tenant_var.set(TenantContext("intruder", "intruder"))
    mark.set("intruder")


@app.task(base=BaseTask)
def step(label: str) -> None:
    note(label)


@app.task(base=BaseTask)
def careless(label: str) -> None:
    note(label)
    litter()


@app.task(base=BaseTask, tenant_required=False)
def nobodys(label: str) -> None:
    note(label)
    litter()


@app.task(base=BaseTask, bind=True, retry_policy=QUICK)
def flaky(self: BaseTask, label: str) -> None:
    note(label)
    litter()
    if self.request.retries < 2:
        raise ConnectionError("down")


@app.task(base=BaseTask, bind=True)
def stubborn(self: BaseTask, label: str) -> None:
    note(label)
    litter()
    if self.request.retries < 1:
        raise self.retry(countdown=0, headers={"x": "1"})


@app.task(base=BaseTask)
def broken(label: str) -> None:
    note(label)
    litter()
    raise ValueError("broken")


@app.task(base=BaseTask, bind=True)
def nested(self: BaseTask, label: str, inner: str) -> None:
    note(label)
    careless.delay(inner)


@app.task(base=BaseTask, bind=True)
def replaced(self: BaseTask, label: str, by: dict[str, Any]) -> Any:
    note(label)
    litter()
    raise self.replace(Signature.from_dict(by, app=app))


@app.task(base=BaseTask, bind=True)
def dies(self: BaseTask, label: str) -> None:
    """Takes its process along the first time."""
    note(label)
    litter()
    try:
        os.close(os.open(f"{SEEN}.{label}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
