"""Publishes tasks and writes down how long it took.  Run as a process of its own.

``publisher.py publish COUNT WARM_UP FILE``: tasks as fast as they go, after some that open the connection.
``publisher.py many COUNT PROCESSES FILE``: the same from many processes at once, so many tasks in total.
``publisher.py trickle COUNT SEED``: one task every 50 to 150 ms, after one that opens the connection.
``publisher.py held COUNT``: tasks that a worker which holds never ends, numbered.
"""

from __future__ import annotations

import importlib
import multiprocessing
import random
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from notes import settings, write

_TIMEOUT = 120.0  # seconds for many processes to connect, and to publish

workload: Any = importlib.import_module(settings().get("workload", "workload"))


def publish(count: int, warm_up: int, file: Path) -> None:
    """Publish no-op tasks; the seconds that ``count`` of them took go to the file."""
    for _ in range(warm_up):
        workload.publish_noop()
    begin = time.perf_counter()
    for _ in range(count):
        workload.publish_noop()
    write(file, time.perf_counter() - begin)


def many(count: int, processes: int, file: Path) -> None:
    """Publish from many processes; the seconds from the first one's begin to the last one's end go to the file.

    They are forked before anything is connected, so that each has a connection of its own, and begin together.  Each
    publishes one task before, the first one before the others, so that the queue is made once.
    """
    fork = multiprocessing.get_context("fork")
    together, times = fork.Barrier(processes), fork.SimpleQueue()
    shares = [count // processes + (number < count % processes) for number in range(processes)]
    children = [
        fork.Process(target=_one_of_many, args=(share, number == 0, together, times), daemon=True)
        for number, share in enumerate(shares)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(_TIMEOUT)
        if child.exitcode != 0:
            sys.exit(f"one of {processes} publishers ended with {child.exitcode}")
    begins, ends = zip(*(times.get() for _ in children), strict=True)
    write(file, max(ends) - min(begins))


def _one_of_many(count: int, is_first: bool, together: Barrier, times: Any) -> None:
    if is_first:
        workload.publish_noop()
    together.wait(_TIMEOUT)
    if not is_first:
        workload.publish_noop()
    together.wait(_TIMEOUT)
    begin = time.perf_counter()
    for _ in range(count):
        workload.publish_noop()
    times.put((begin, time.perf_counter()))


def trickle(count: int, seed: int) -> None:
    """Publish to an idle worker."""
    pauses = random.Random(seed)  # noqa: S311  # no secret
    for number in range(count + 1):
        workload.publish_stamp(time.time(), number > 0)
        time.sleep(pauses.uniform(0.05, 0.15))


def held(count: int) -> None:
    """Publish tasks that do not end."""
    for number in range(count):
        workload.publish_held(number)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "publish":
        publish(int(rest[0]), int(rest[1]), Path(rest[2]))
    elif what == "many":
        many(int(rest[0]), int(rest[1]), Path(rest[2]))
    elif what == "trickle":
        trickle(int(rest[0]), int(rest[1]))
    else:
        held(int(rest[0]))
