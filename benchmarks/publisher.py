"""Publishes tasks and writes down how long it took.  Run as a process of its own.

``publisher.py publish COUNT WARM_UP FILE``: tasks as fast as they go, after some that open the connection.
``publisher.py trickle COUNT SEED``: one task every 50 to 150 ms, after one that opens the connection.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from workload import noop, stamp, write


def publish(count: int, warm_up: int, file: Path) -> None:
    """Publish no-op tasks; the seconds that ``count`` of them took go to the file."""
    for _ in range(warm_up):
        noop.delay()
    begin = time.perf_counter()
    for _ in range(count):
        noop.delay()
    write(file, time.perf_counter() - begin)


def trickle(count: int, seed: int) -> None:
    """Publish to an idle worker."""
    pauses = random.Random(seed)  # noqa: S311  # no secret
    for number in range(count + 1):
        stamp.delay(time.time(), number > 0)
        time.sleep(pauses.uniform(0.05, 0.15))


if __name__ == "__main__":
    if sys.argv[1] == "publish":
        publish(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        trickle(int(sys.argv[2]), int(sys.argv[3]))
