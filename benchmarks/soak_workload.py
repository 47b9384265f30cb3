"""The Celery application of ``soak.py``, and the process that publishes to it: ``soak_workload.py RATE``.

The environment variable BENCHMARK holds JSON with the database's ``url``, and whether workers ``collect`` garbage by
themselves, each few seconds.  Results expire after the shortest time that there is, a minute.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import sys
import threading
import time
from collections import deque
from typing import Any, Final

from celery import Celery, chord
from celery.signals import worker_process_init, worker_ready
from sqlalchemy import text

from rhesis_tasks import BaseTask, RetryPolicy, TenantContext, configure, launch_with_context, tenant_scope

__all__ = ["app", "publish"]

TENANTS: Final = [TenantContext(f"tenant-{number}", f"user-{number}") for number in range(20)]
_CLEANUP_EVERY: Final = 10.0  # seconds; beat does it once a day, for results that expire after one
_READ_AFTER: Final = 30.0  # seconds after its launch a result is read, if it is one that is read

_COLLECT_EVERY: Final = 5.0  # seconds

_settings = json.loads(os.environ["BENCHMARK"])
app: Final = Celery("soak_workload")
configure(
    app,
    _settings["url"],
    result_expires=60,
    task_default_queue="soak",
    task_reject_on_worker_lost=True,
)


@app.task(base=BaseTask, name="plain")
def plain(number: int) -> int:
    """Return at once."""
    return number


@app.task(base=BaseTask, name="coroutine")
async def coroutine(number: int) -> int:
    """Wait a little."""
    await asyncio.sleep(0.005)
    return number


@app.task(base=BaseTask, name="reading", bind=True)
def reading(self: BaseTask, number: int) -> int:
    """Ask the database, as the tenant."""
    with self.get_db_session() as session:
        found: int = session.scalar(text("SELECT CAST(:number AS integer)"), {"number": number})
        return found


@app.task(base=BaseTask, name="flaky", bind=True, retry_policy=RetryPolicy(max_retries=3, base=0.5))
def flaky(self: BaseTask, number: int) -> int:
    """Fail once."""
    if self.request.retries == 0:
        raise ConnectionError(f"number {number} is not there yet")
    return number


@app.task(base=BaseTask, name="failing")
def failing(number: int) -> None:
    """Fail."""
    raise ValueError(f"number {number} is wrong")


@app.task(base=BaseTask, name="total")
def total(numbers: list[int]) -> int:
    """The sum of what the parts of a chord have returned."""
    return sum(numbers)


def publish(rate: float) -> None:
    """Launch so many a second (a chord counts as one), and read some of the results, until it is killed."""
    began, cleanup_at = time.monotonic(), 0.0
    read: deque[tuple[float, TenantContext, Any]] = deque()
    for number in itertools.count():
        now = time.monotonic()
        if (pause := began + number / rate - now) > 0:
            time.sleep(pause)
        else:
            began += min(-pause, 1 / rate)  # what was missed is not made up for by a burst
        tenant = TENANTS[number % len(TENANTS)]
        result = _launch(number, tenant)
        if number % 20 == 1:
            read.append((now, tenant, result))
        while read and read[0][0] < now - _READ_AFTER:
            _, owner, old = read.popleft()
            with tenant_scope(owner):
                old.get(timeout=60)
        if now >= cleanup_at:
            cleanup_at = now + _CLEANUP_EVERY
            app.tasks["celery.backend_cleanup"].delay()


def _launch(number: int, tenant: TenantContext) -> Any:
    """Of twenty: ten plain, three coroutines, two that read, two delayed, a flaky, a failing, a chord of three."""
    kind = number % 20
    if kind == 0:
        whole = chord([plain.s(number) for _ in range(3)], total.s())
        return launch_with_context(whole, context=tenant)
    options = {"countdown": 3} if kind in (2, 3) else None
    by_kind = {4: flaky, 5: failing, 6: coroutine, 7: coroutine, 8: coroutine, 9: reading, 10: reading}
    return launch_with_context(by_kind.get(kind, plain), number, context=tenant, options=options)


def _collect(**_: Any) -> None:
    def collect() -> None:
        while True:
            time.sleep(_COLLECT_EVERY)
            gc.collect()

    threading.Thread(target=collect, name="collector", daemon=True).start()


if _settings["collect"]:
    worker_ready.connect(_collect, weak=False)
    worker_process_init.connect(_collect, weak=False)


if __name__ == "__main__":
    publish(float(sys.argv[1]))
