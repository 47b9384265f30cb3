"""The Celery application of test_outcomes.py, ``celery -A outcome_tasks``: tasks that end in every way there is.

Receivers, hooks, error callbacks and bodies write down what they see: a line of JSON each, to the file that
OUTCOMES names.  So does the log, to a file beside it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from contextvars import ContextVar
from typing import Any

from celery import Celery, current_task, signals
from celery.exceptions import Ignore, Reject
from celery.worker.control import inspect_command
from sqlalchemy import text

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    TenantContext,
    configure,
    current_tenant,
    register_context_var,
    tenant_scope,
)
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure, on_tenant_retry, on_tenant_success

MAIN = os.getpid()  # prefork makes its processes afterwards


def route(*_: Any, **__: Any) -> dict[str, str]:
    """To the worker that is tested right now; from a worker, to itself."""
    return {"queue": os.environ["OUTCOMES_QUEUE"]}


label: ContextVar[str] = ContextVar("label")
register_context_var(label, log=True)

app = Celery("outcome_tasks")


def note(what: str, task_id: str | None, task: Any, **more: Any) -> None:
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
        "pid": os.getpid(),
        **more,
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


def note_hook(whose: str, outcome: TaskOutcome, organization_in_database: str | None = None) -> None:
    """What a tenant hook is told, and what is there for it."""
    note(
        f"{whose} {outcome.state}",
        outcome.task_id,
        outcome.task,
        hook=True,
        run_by=current_task.name,
        in_database=organization_in_database,
        tenant_told=outcome.tenant and outcome.tenant.organization_id,
        error=outcome.error and type(outcome.error).__name__,
        result=outcome.result,
        reason=outcome.reason,
        retries=outcome.retries,
        has_duration=outcome.duration is not None,
        key=outcome.key,
    )


ORGANIZATION = text("SELECT current_setting('app.current_organization', true)")


class LogFile(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        names = ("organization_id", "user_id", "task_id", "task_name", "label", "task_outcome", "task_reason")
        line = {name: getattr(record, name, None) for name in names}
        line |= {"level": record.levelname, "logger": record.name, "text": record.getMessage()}
        line["traceback"] = self.formatException(record.exc_info) if record.exc_info else None
        return json.dumps(line)


@signals.after_setup_logger.connect
def log_to_file(logger: logging.Logger, **_: Any) -> None:
    if "OUTCOMES" in os.environ:
        handler = logging.FileHandler(os.environ["OUTCOMES"] + ".log")
        handler.setFormatter(LogFile())
        for each in (logger, logging.getLogger("multiprocessing")):
            each.addHandler(handler)


class Watched(BaseTask):
    """A task with every hook."""

    abstract = True

    def tell(self, outcome: TaskOutcome) -> None:
        with self.get_db_session() as db:
            note_hook("own", outcome, db.execute(ORGANIZATION).scalar_one())

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        self.tell(outcome)

    def on_tenant_failure(self, outcome: TaskOutcome) -> None:
        self.tell(outcome)

    def on_tenant_retry(self, outcome: TaskOutcome) -> None:
        self.tell(outcome)

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


@on_tenant_success(app, task="*outcome_tasks.*")
@on_tenant_failure(app, task="*outcome_tasks.*")
@on_tenant_retry(app, task="*outcome_tasks.*")
def tell_the_application(outcome: TaskOutcome) -> None:
    note_hook("the application's", outcome)


@on_tenant_success(app, task="another.*")
@on_tenant_failure(app, error=ZeroDivisionError)
@on_tenant_retry(app, error=ZeroDivisionError)
def tell_of_others(outcome: TaskOutcome) -> None:
    note_hook("others'", outcome)


def begin(task: Watched) -> None:
    """What every body does first; it leaves a mess behind."""
    note("body", task.request.id, task)
    label.set("left over")
    tenant_scope(TenantContext("intruder")).__enter__()


def is_first_time(task: Watched) -> bool:
    return not task.request.retries and not task.request.delivery_info["redelivered"]


@app.task(base=Watched, bind=True)
def success(self: Watched, secret: str = "") -> str:
    begin(self)
    return f"result: {secret}"


@app.task(base=Watched, bind=True)
def exception(self: Watched, secret: str = "") -> None:
    begin(self)
    raise ValueError("broken")


@app.task(base=Watched, bind=True, max_retries=1, default_retry_delay=0)
def retry(self: Watched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        raise self.retry()


@app.task(base=Watched, bind=True)
def ignore(self: Watched, secret: str = "") -> None:
    begin(self)
    raise Ignore


@app.task(base=Watched, bind=True)
def reject(self: Watched, secret: str = "") -> None:
    begin(self)
    raise Reject("no use")


@app.task(base=Watched, bind=True)
def requeue(self: Watched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        raise Reject("not now", requeue=True)


@app.task(base=Watched, bind=True, soft_time_limit=0.2)
def soft_limit(self: Watched, secret: str = "") -> None:
    begin(self)
    threading.Event().wait()


@app.task(base=Watched, bind=True, time_limit=0.2)
def hard_limit(self: Watched, secret: str = "") -> None:
    begin(self)
    threading.Event().wait()


# Acknowledged early, since threads and gevent never do it afterwards: the next worker would get it, and so on.
@app.task(base=Watched, bind=True, acks_late=False)
def system_exit(self: Watched, secret: str = "") -> None:
    begin(self)
    raise SystemExit(3)


@app.task(base=Watched, bind=True)
def unencodable(self: Watched, secret: str = "") -> object:
    begin(self)
    return object()


@app.task(base=Watched, bind=True)
def expired(self: Watched, secret: str = "") -> None:
    begin(self)


@app.task(base=Watched, bind=True)
def revoked(self: Watched, secret: str = "") -> None:
    begin(self)


@app.task(base=Watched, bind=True)
def terminated(self: Watched, secret: str = "") -> None:
    begin(self)
    threading.Event().wait()


@app.task(base=Watched, bind=True)
def lost(self: Watched, secret: str = "") -> None:
    begin(self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, bind=True, retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
def lost_and_retried(self: Watched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, bind=True, reject_on_worker_lost=True)
def lost_and_requeued(self: Watched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


# --- the same on every pool, so that they are run on one --------------------------------------------------------


class NeedsTwoArguments(Exception):
    """Cannot be made again from what Celery keeps of an exception."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} for {why}")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Fatal(ConnectionError):
    pass


@app.task(base=Watched, bind=True)
def unpicklable(self: Watched, secret: str = "") -> None:
    begin(self)
    raise NeedsTwoArguments("nothing", "anything")


@app.task(base=Watched, bind=True)
def unencodable_error(self: Watched, secret: str = "") -> None:
    begin(self)
    raise ValueError("broken", threading.Lock())


@app.task(base=Watched, bind=True)
def unprintable(self: Watched, secret: str = "") -> None:
    begin(self)
    raise Unprintable


@app.task(base=Watched, bind=True, throws=(KeyError,))
def expected(self: Watched, secret: str = "") -> None:
    begin(self)
    raise KeyError("nothing")


@app.task(base=Watched, bind=True, retry_policy=RetryPolicy(max_retries=1, base=0))
def used_up(self: Watched, secret: str = "") -> None:
    begin(self)
    raise ConnectionError("down")


@app.task(base=Watched, bind=True, retry_policy=RetryPolicy(give_up_on=(Fatal,)))
def given_up(self: Watched, secret: str = "") -> None:
    begin(self)
    raise Fatal("down for good")


@app.task(base=Watched, bind=True, retry_policy=RetryPolicy(max_age=0.05, base=0))
def too_old(self: Watched, secret: str = "") -> None:
    begin(self)
    time.sleep(0.1)
    raise ConnectionError("down")


@app.task(base=Watched, bind=True, retry_policy=RetryPolicy(max_retries=1, base=0))
def by_hand(self: Watched, secret: str = "") -> None:
    begin(self)
    try:
        raise ConnectionError("down")
    except ConnectionError as error:
        raise self.retry(exc=error) from error


@app.task(base=Watched, bind=True, retry_policy=RetryPolicy(max_retries=0))
def by_hand_without_error(self: Watched, secret: str = "") -> None:
    begin(self)
    raise self.retry()


class FailsToTell(Watched):
    abstract = True

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        self.tell(outcome)
        raise ValueError("the hook is broken")


@app.task(base=FailsToTell, bind=True)
def hook_raises(self: Watched, secret: str = "") -> None:
    begin(self)


class TakesLongToTell(Watched):
    abstract = True
    hook_time_limit = 0.2

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        self.tell(outcome)
        time.sleep(1)


@app.task(base=TakesLongToTell, bind=True)
def hook_hangs(self: Watched, secret: str = "") -> None:
    begin(self)


class KilledWhileItTells(Watched):
    abstract = True

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        self.tell(outcome)
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=KilledWhileItTells, bind=True)
def lost_in_hook(self: Watched, secret: str = "") -> None:
    begin(self)


@app.task(base=Watched, bind=True)
def delivered_twice(self: Watched, secret: str = "") -> None:
    begin(self)


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
