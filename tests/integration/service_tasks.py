"""The Celery application of test_worker_command.py and test_health.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, signals

from rhesis_tasks import BaseTask, configure

app = Celery("service_tasks")
configure(app, broker_transport_options={"grace": float(os.environ.get("SERVICE_TASKS_GRACE", "5"))})
app.conf.task_default_queue = "services"
if "SERVICE_TASKS_PREFETCH" in os.environ:
    app.conf.worker_prefetch_multiplier = int(os.environ["SERVICE_TASKS_PREFETCH"])


@app.task(base=BaseTask, bind=True, name="add", tenant_required=False)
def add(self: BaseTask, first: Any, second: Any) -> Any:
    self.log.info("adding")
    print("printed")
    return first + second


@app.task(base=BaseTask, name="prüfen", tenant_required=False)
def check() -> None:
    """Has a name that not every output can print."""


@app.task(base=BaseTask, name="fail", tenant_required=False)
def fail() -> None:
    raise ValueError("broken")


@app.task(name="plain")
def plain() -> None:
    """Is no BaseTask, so that nobody asks whose it is."""


@app.task(base=BaseTask, bind=True, name="retry_once", tenant_required=False)
def retry_once(self: BaseTask) -> None:
    if self.request.retries == 0:
        raise self.retry(countdown=0)


def _wait_for(started: str, gate: str, seconds: float = 100) -> None:
    """Lasts until there is a file named like the gate."""
    with Path(started).open("a") as file:
        file.write("started\n")
    deadline = time.monotonic() + seconds
    while not Path(gate).exists() and time.monotonic() < deadline:
        time.sleep(0.05)


wait_for = app.task(_wait_for, base=BaseTask, name="wait_for", tenant_required=False)
wait_for_too = app.task(_wait_for, base=BaseTask, name="wait_for_too", tenant_required=False)
wait_for_early = app.task(_wait_for, base=BaseTask, name="wait_for_early", tenant_required=False, acks_late=False)


def _note(path: str) -> None:
    with Path(path).open("a") as file:
        file.write("done\n")


note_early = app.task(_note, base=BaseTask, name="note_early", tenant_required=False, acks_late=False)
note_late = app.task(_note, base=BaseTask, name="note_late", tenant_required=False, acks_late=True)


def _wedge(gate: Path, consumer: object) -> None:
    """Hold up the consumer's loop while there is a file named like the gate."""
    while gate.exists():
        time.sleep(0.05)


@signals.worker_ready.connect
def _obey(sender: object, **_: object) -> None:
    """Let a test hold up the loop: from inside it, as a handler of Celery's would."""
    gate = os.environ.get("SERVICE_TASKS_WEDGE")
    if gate is None:
        return
    consumer = sender
    if getattr(consumer, "hub", None) is not None:
        consumer.timer.call_repeatedly(0.2, _wedge, (Path(gate), consumer))  # type: ignore[attr-defined]
        return
    connection = consumer.connection  # type: ignore[attr-defined]
    drain = connection.drain_events

    def drain_slowly(**options: Any) -> Any:
        _wedge(Path(gate), consumer)
        return drain(**options)

    connection.drain_events = drain_slowly
