"""The Celery application of the chaos, ``celery -A fault_tasks``: configured, with tenants, records and dead letters.

A body leaves a line when it begins and one when it ends, with its process and the time by a clock that all processes
of the machine share.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any, NamedTuple

from broker_tasks import OPTIONS, RUNS, URL, Runs
from celery import Celery

from rhesis_tasks import BaseTask, configure

__all__ = ["Run", "app", "application", "runs_in"]


def application(url: str, options: dict[str, Any] | None = None, *, main: str = "fault_tasks") -> Celery:
    """The application, for those who publish; :func:`rhesis_tasks.unconfigure` ends it."""
    made = Celery(main, set_as_current=False)
    configure(
        made,
        url,
        broker_url=url,
        broker_transport_options=dict(options or {}),
        broker_connection_retry_on_startup=True,
        task_reject_on_worker_lost=True,
    )
    return made


# The workers'.  Those who publish have their own, and this one is configured for nothing there.
app = (
    application(os.environ[URL], json.loads(os.environ[OPTIONS]))
    if URL in os.environ
    else Celery("fault_tasks", set_as_current=False)
)


class Run(NamedTuple):
    """A body that was entered."""

    label: str
    process: int
    began: float
    ended: float | None  #: None if it never came to its end


def runs_in(runs: Runs) -> dict[str, list[Run]]:
    """All runs of each label, in the order in which they began."""
    found: dict[str, dict[tuple[str, str], Run]] = {}
    for line in runs.path.read_text().splitlines():
        event, label, process, began, *ended = line.split(" ")
        if event == "begin":
            found.setdefault(label, {})[process, began] = Run(label, int(process), float(began), None)
        elif event == "end":
            found[label][process, began] = Run(label, int(process), float(began), float(ended[0]))
    return {label: sorted(each.values(), key=lambda run: run.began) for label, each in found.items()}


@app.task(base=BaseTask, name="work", shared=False)
def work(label: str, seconds: float = 0.0) -> None:
    """Last for so many seconds."""
    runs = Runs.at(os.environ[RUNS])
    began = f"{label} {os.getpid()} {time.monotonic():.6f}"
    runs.write("begin", began)
    time.sleep(seconds)
    runs.write("end", f"{began} {time.monotonic():.6f}")


@app.task(base=BaseTask, name="poison", shared=False)
def poison(label: str) -> None:
    """Kill the process that runs it: with threads the worker, with prefork a pool process."""
    Runs.at(os.environ[RUNS]).write("begin", f"{label} {os.getpid()} {time.monotonic():.6f}")
    os.kill(os.getpid(), signal.SIGKILL)
