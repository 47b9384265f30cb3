"""The Celery application of test_chords.py, ``celery -A chord_tasks``: parts that end in every way, and bodies.

Bodies, error callbacks and what must not be published leave a line in the file that CHORDS names.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, signals

from rhesis_tasks import BaseTask, TenantContext, configure, tenant_scope
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure

app = Celery("chord_tasks")
configure(app)


def note(*words: Any) -> None:
    path = os.environ.get("CHORDS")
    if path:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, (" ".join(map(str, words)) + "\n").encode())
        finally:
            os.close(file)


@signals.before_task_publish.connect(weak=False)
def _published(sender: str, headers: Any, **_: Any) -> None:
    if sender == "celery.chord_unlock":
        note("published", sender)
    if sender == "chord_tasks.fragile" and os.environ.get("CHORDS"):
        path = Path(os.environ["CHORDS"] + ".crashed")
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


# --- parts -------------------------------------------------------------------------------------------------------


@app.task(base=BaseTask)
def echo(value: Any) -> Any:
    return value


@app.task(base=BaseTask, ignore_result=True)
def quiet(value: Any) -> Any:
    return value


@app.task(base=BaseTask)
def add(one: int, other: int) -> int:
    return one + other


@app.task(base=BaseTask, bind=True)
def whose(self: BaseTask, value: Any) -> list[Any]:
    return [self.tenant.organization_id, value]


@app.task(base=BaseTask)
def broken(value: Any) -> None:
    raise ValueError(f"{value} is broken")


@app.task(base=BaseTask, ignore_result=True)
def quietly_broken(value: Any) -> None:
    raise ValueError(f"{value} is broken")


@app.task(base=BaseTask, bind=True, max_retries=2)
def flaky(self: BaseTask, value: Any) -> Any:
    if self.request.retries < 2:
        raise self.retry(countdown=0, exc=ConnectionError("down"))
    return value


@app.task(base=BaseTask, bind=True)
def replaced(self: BaseTask, value: int) -> Any:
    with tenant_scope(TenantContext("intruder")):
        raise self.replace(whose.s(value))


@app.task(base=BaseTask, bind=True)
def replaced_by_chord(self: BaseTask, values: list[int]) -> Any:
    from celery import chord

    raise self.replace(chord([echo.s(value) for value in values], total.s()))


@app.task(base=BaseTask, bind=True)
def adding(self: BaseTask, value: int) -> int:
    with tenant_scope(TenantContext("intruder")):
        self.add_to_chord(whose.s(value + 1))
    return value


@app.task(base=BaseTask, bind=True, reject_on_worker_lost=True)
def dying(self: BaseTask, value: int) -> int:
    note("dying", self.request.id)
    if not self.request.delivery_info["redelivered"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


@app.task(base=BaseTask, bind=True, reject_on_worker_lost=True)
def persistent(self: BaseTask, value: int) -> int:
    """Is delivered again if its process dies; it does not by itself."""
    note("persistent", self.request.id)
    return value


@app.task(base=BaseTask, bind=True)
def until(self: BaseTask, path: str, value: Any) -> Any:
    """Lasts until there is a file."""
    note("started", self.request.id)
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        if self.should_abort():
            return "aborted"
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.02)
    return value


# --- bodies ------------------------------------------------------------------------------------------------------


@app.task(base=BaseTask, bind=True)
def total(self: BaseTask, results: Any) -> Any:
    """The body of most chords: what it got."""
    note("body", self.request.id)
    return results


@app.task(base=BaseTask, bind=True)
def total_and_whose(self: BaseTask, results: Any) -> Any:
    note("body", self.request.id)
    return [self.tenant.organization_id, self.tenant.user_id, results]


@app.task(base=BaseTask, bind=True)
def fragile(self: BaseTask, results: Any) -> Any:
    """The first process that is about to publish it dies."""
    note("body", self.request.id)
    return results


@on_tenant_failure(app, task="chord_tasks.*")
def told(outcome: TaskOutcome) -> None:
    tenant = outcome.tenant.organization_id if outcome.tenant else None
    note("told", outcome.key, tenant, type(outcome.error).__name__, outcome.root_id, outcome.reason)


@app.task(base=BaseTask)
def errback(task_id: str) -> None:
    note("errback", task_id)
