"""The Celery application that is measured, the same for every broker; :mod:`notes` says where its settings are.

On our broker it is configured as the applications of our users are, so that each message carries a context, if an empty
one.

Settings of its own: ``gates`` (a worker that has imported everything waits for the file ``start``, and before its
first message for the file ``go``; it says so with files named after its process), ``late`` (acknowledge when a task is
done), ``hold`` (tasks that are held never end in this worker).

Whoever publishes needs :func:`publish_noop`, :func:`publish_stamp` and :func:`publish_held` alone, which the modules
``workload_*`` have as well.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_init, worker_ready
from notes import Notes, settings, wait_for_gate, write

import rhesis_tasks

__all__ = ["app", "publish_held", "publish_noop", "publish_stamp"]

_settings = settings()
_folder = Path(_settings["folder"])
_starts = Notes(_folder / "starts")
_latencies = Notes(_folder / "latencies")
_held = Notes(_folder / "held")
_done = Notes(_folder / "done")

app = Celery("workload", broker=_settings["url"])
if _settings["url"].startswith("postgresql://"):
    rhesis_tasks.configure(app, broker_url=_settings["url"])
app.conf.update(
    broker_transport_options=_settings["options"],
    broker_connection_retry_on_startup=True,
    task_default_queue=_settings["queue"],
    task_ignore_result=True,
    task_acks_late=_settings.get("late", False),
    worker_prefetch_multiplier=_settings.get("prefetch", 8),
)


@app.task(name="noop")
def noop() -> None:
    """Do nothing, and note when."""
    _starts.note(time.perf_counter())


@app.task(name="stamp")
def stamp(sent: float, counts: bool) -> None:
    """Note the seconds since it was sent, unless it is the warm-up."""
    latency = time.time() - sent
    if counts:
        _latencies.note(latency)


@app.task(name="held")
def held(number: int) -> None:
    """Never end in a worker that holds; in others note when it is done."""
    if _settings.get("hold"):
        _held.note(time.time(), number)
        threading.Event().wait()
    _done.note(time.time(), number)


def publish_noop() -> None:
    noop.delay()


def publish_stamp(sent: float, counts: bool) -> None:
    stamp.delay(sent, counts)


def publish_held(number: int) -> None:
    held.delay(number)


if _settings.get("gates"):

    @worker_init.connect(weak=False)
    def _wait_to_start(**_: Any) -> None:
        write(_folder / f"imported-{os.getpid()}", None)
        wait_for_gate(_folder / "start")

    @worker_ready.connect(weak=False)
    def _wait_to_go(**_: Any) -> None:
        write(_folder / f"ready-{os.getpid()}", None)
        wait_for_gate(_folder / "go")
