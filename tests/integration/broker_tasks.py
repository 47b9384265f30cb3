"""The Celery application of the workers that are killed, ``celery -A broker_tasks``, and what they write down.

A plain application: the broker is ours because rhesis_tasks is imported.  Each run of a task leaves a line when it
starts and a line when it is done, so that runs can be counted whatever became of the worker.  Run as a program it is
a publisher that publishes until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from celery import Celery, signals

import rhesis_tasks  # noqa: F401  # makes postgresql:// a broker

URL = "BROKER_TASKS_URL"
OPTIONS = "BROKER_TASKS_OPTIONS"  # broker_transport_options, in JSON
RUNS = "BROKER_TASKS_RUNS"  # the file of the lines
LINGER = "BROKER_TASKS_LINGER"  # "1": pool processes outlive the worker's main process

SETTINGS: dict[str, Any] = {
    "task_acks_late": True,
    "task_ignore_result": True,
    "broker_connection_retry_on_startup": True,
}


def application(url: str, options: dict[str, Any] | None = None) -> Celery:
    """The application on a broker, for those who publish."""
    return Celery(
        "broker_tasks", set_as_current=False, broker=url, broker_transport_options=dict(options or {}), **SETTINGS
    )


app = application(os.environ.get(URL, "memory://"), json.loads(os.environ.get(OPTIONS, "{}")))


class Runs:
    """What came of tasks, by their labels."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @classmethod
    def at(cls, path: str) -> Runs:
        """Those in a file."""
        return cls(Path(path))

    def write(self, event: str, label: str) -> None:
        """One line, in one piece, whoever else writes."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, f"{event} {label}\n".encode())
        finally:
            os.close(file)

    def of(self, event: str) -> Counter[str]:
        """How often there is a line for each label."""
        lines = (line.split(" ", 1) for line in self.path.read_text().splitlines())
        return Counter(label for of, label in lines if of == event)

    @property
    def started(self) -> Counter[str]:
        """How often each body was entered."""
        return self.of("start")

    @property
    def done(self) -> Counter[str]:
        """How often each body came to its end."""
        return self.of("done")


def _runs() -> Runs:
    return Runs(Path(os.environ[RUNS]))


@app.task(name="run", shared=False)
def run(label: str, gate: str | None = None) -> None:
    """A body that, given a gate, lasts until there is a file of this name."""
    runs = _runs()
    runs.write("start", label)
    _pass(gate)
    runs.write("done", label)


def _pass(gate: str | None) -> None:
    deadline = time.monotonic() + 100
    while gate is not None and not os.path.exists(gate):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.01)


def _lose_child_once(label: str, gate: str | None) -> None:
    runs = _runs()
    runs.write("start", label)
    _pass(gate)
    if runs.started[label] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    runs.write("done", label)


@app.task(name="lose_child", shared=False, reject_on_worker_lost=False)
def lose_child(label: str, gate: str | None = None) -> None:
    """Kills the pool process that it runs in, the first time."""
    _lose_child_once(label, gate)


@app.task(name="lose_child_and_reject", shared=False, reject_on_worker_lost=True)
def lose_child_and_reject(label: str, gate: str | None = None) -> None:
    """The same, and is to be run again then."""
    _lose_child_once(label, gate)


@app.task(name="die_before_ack", shared=False)
def die_before_ack(label: str) -> None:
    """Kills the worker when the body is through, before it is acknowledged, the first time (solo pool)."""
    runs = _runs()
    runs.write("start", label)
    runs.write("done", label)


@signals.task_postrun.connect(weak=False)
def _die(task: Any = None, args: Any = (), **_: Any) -> None:
    if task is not None and task.name == "die_before_ack" and _runs().done[args[0]] == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@signals.worker_process_init.connect(weak=False)
def _linger(**_: Any) -> None:
    """Undo what Celery asks of Linux: to kill pool processes with the main process.  Elsewhere nothing does."""
    if os.environ.get(LINGER) == "1":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, 0)


def publish_for_ever(name: str) -> None:
    """Write down what is about to be published, and what is known to have been."""
    runs = _runs()
    number = 0
    while True:
        number += 1
        label = f"{name}-{number}"
        runs.write("publish", label)
        app.send_task("run", [label], task_id=label)
        runs.write("published", label)


if __name__ == "__main__":
    publish_for_ever(sys.argv[1])
