"""The Celery application of test_outcomes.py, ``celery -A outcome_tasks``: tasks that end in every way there is.

Receivers, hooks, error callbacks and bodies write down what they see: a line of JSON each, to the file that
OUTCOMES names.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from contextvars import ContextVar
from typing import Any

from celery import Celery, current_task, signals
from celery.exceptions import Ignore, Reject
from celery.worker.control import inspect_command

from rhesis_tasks import BaseTask, TenantContext, configure, current_tenant, register_context_var, tenant_scope

MAIN = os.getpid()  # prefork makes its processes afterwards


def route(*_: Any, **__: Any) -> dict[str, str]:
    """To the worker that is tested right now; from a worker, to itself."""
    return {"queue": os.environ["OUTCOMES_QUEUE"]}


label: ContextVar[str] = ContextVar("label")
register_context_var(label)

app = Celery("outcome_tasks")


def note(what: str, task_id: str | None, task: Any) -> None:
    path = os.environ.get("OUTCOMES")
    if not path:
        return  # not in a worker
    tenant = current_tenant()
    line = {
        "what": what,
        "org": tenant and tenant.organization_id,
        "label": label.get(None),
        "task_id": task_id,
        "request_id": task.request.id,
        "main": os.getpid() == MAIN,
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def listen(name: str, what: str | None = None) -> None:
    """Connect a receiver that writes down what it sees."""

    def receive(sender: Any, task_id: str | None = None, request: Any = None, **_: Any) -> None:
        if isinstance(sender, Watched):
            note(what or name, task_id or request.id, sender)

    getattr(signals, name).connect(receive, weak=False)


# Before configure() and after the worker's start, so that they come before and after everything of the library's: all
# around a run.
listen("task_prerun", "around_before")
configure(app, task_routes=(route,))
signals.worker_init.connect(lambda **_: listen("task_postrun", "around_after"), weak=False)
for name in ("task_prerun", "task_postrun", "task_failure", "task_revoked", "task_retry", "task_internal_error"):
    listen(name)


class Watched(BaseTask):
    """A task with every hook."""

    abstract = True

    def before_start(self, task_id: str, *_: Any) -> None:
        note("before_start", task_id, self)

    def on_success(self, _: Any, task_id: str, *more: Any) -> None:
        note("on_success", task_id, self)

    def on_failure(self, _: Any, task_id: str, *more: Any) -> None:
        note("on_failure", task_id, self)

    def on_retry(self, _: Any, task_id: str, *more: Any) -> None:
        note("on_retry", task_id, self)

    def after_return(self, _: Any, __: Any, task_id: str, *more: Any) -> None:
        note("after_return", task_id, self)


def begin(task: Watched) -> None:
    """What every body does first; it leaves a mess behind."""
    note("body", task.request.id, task)
    label.set("left over")
    tenant_scope(TenantContext("intruder")).__enter__()


def is_first_time(task: Watched) -> bool:
    return not task.request.retries and not task.request.delivery_info["redelivered"]


@app.task(base=Watched, bind=True)
def success(self: Watched) -> None:
    begin(self)


@app.task(base=Watched, bind=True)
def exception(self: Watched) -> None:
    begin(self)
    raise ValueError("broken")


@app.task(base=Watched, bind=True, max_retries=1, default_retry_delay=0)
def retry(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        raise self.retry()


@app.task(base=Watched, bind=True)
def ignore(self: Watched) -> None:
    begin(self)
    raise Ignore


@app.task(base=Watched, bind=True)
def reject(self: Watched) -> None:
    begin(self)
    raise Reject("no use")


@app.task(base=Watched, bind=True)
def requeue(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        raise Reject("not now", requeue=True)


@app.task(base=Watched, bind=True, soft_time_limit=0.2)
def soft_limit(self: Watched) -> None:
    begin(self)
    threading.Event().wait()


@app.task(base=Watched, bind=True, time_limit=0.2)
def hard_limit(self: Watched) -> None:
    begin(self)
    threading.Event().wait()


# Acknowledged early, since threads and gevent never do it afterwards: the next worker would get it, and so on.
@app.task(base=Watched, bind=True, acks_late=False)
def system_exit(self: Watched) -> None:
    begin(self)
    raise SystemExit(3)


@app.task(base=Watched, bind=True)
def unencodable(self: Watched) -> object:
    begin(self)
    return object()


@app.task(base=Watched, bind=True)
def expired(self: Watched) -> None:
    begin(self)


@app.task(base=Watched, bind=True)
def revoked(self: Watched) -> None:
    begin(self)


@app.task(base=Watched, bind=True)
def terminated(self: Watched) -> None:
    begin(self)
    threading.Event().wait()


@app.task(base=Watched, bind=True)
def lost(self: Watched) -> None:
    begin(self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, bind=True, retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
def lost_and_retried(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, bind=True, reject_on_worker_lost=True)
def lost_and_requeued(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


# --- error callbacks -------------------------------------------------------------------------------------------


@app.task(base=BaseTask)
def errback1(task_id: str) -> None:
    """Takes one argument, so that Celery publishes it as a message."""
    note("errback1", task_id, current_task)


@app.task(base=BaseTask)
def errback3(request: Any, exc: Any, traceback: Any) -> None:
    """Takes three, so that Celery calls it where the failure is dealt with."""
    note("errback3", request.id, current_task)


# --- what runs next --------------------------------------------------------------------------------------------


def seen() -> list[str | None]:
    tenant = current_tenant()
    return [tenant and tenant.organization_id, label.get(None)]


@app.task(base=BaseTask, tenant_required=False)
def plain() -> list[str | None]:
    """Needs no tenant."""
    return seen()


@inspect_command()
def seen_in_main(state: Any) -> list[str | None]:
    """What a control command finds in the worker's main process."""
    return seen()


@app.task(base=Watched, bind=True)
def collect(self: Watched, results: Any) -> None:
    """The body of a chord."""
    begin(self)
