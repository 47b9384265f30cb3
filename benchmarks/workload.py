"""The Celery application that is measured, the same for every broker.

The environment variable BENCHMARK holds JSON: the broker's ``url`` and transport ``options``, the ``queue``, the
``folder`` where a worker writes ``run.json`` and ``latency.json``, and for how many ``messages`` and ``samples`` it
waits until it does.  Until then tasks note times in memory, so that nothing but a list is touched while it counts.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

__all__ = ["app", "noop", "stamp", "write"]


def write(path: Path, value: Any) -> None:
    """Write JSON to a file that is whole as soon as it is there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


class _Notes:
    """Numbers that tasks note, written to a file when all are there."""

    def __init__(self, path: Path, expected: int) -> None:
        self._path = path
        self._expected = expected
        self._values: list[float] = []
        self._count = itertools.count(1)

    def note(self, value: float) -> None:
        self._values.append(value)
        if next(self._count) == self._expected:
            write(self._path, self._values)


_settings = json.loads(os.environ["BENCHMARK"])
_folder = Path(_settings["folder"])
_starts = _Notes(_folder / "run.json", _settings["messages"])
_latencies = _Notes(_folder / "latency.json", _settings["samples"])

if _settings["url"].startswith("postgresql://"):
    import rhesis_tasks  # noqa: F401  # teaches kombu the scheme; nothing else of it is used

app = Celery("workload", broker=_settings["url"])
app.conf.update(
    broker_transport_options=_settings["options"],
    broker_connection_retry_on_startup=True,
    task_default_queue=_settings["queue"],
    task_ignore_result=True,
    worker_prefetch_multiplier=8,
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
