"""What ``async def`` costs where a worker runs the task: a message from our broker, a record of it, and an empty body.

A worker that runs one task at a time finds a backlog in which runs of both kinds alternate.  When each ended, by the
server's clock, is in the records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import psycopg
from celery import Celery
from servers import Broker, started

from rhesis_tasks import BaseTask, TenantContext, configure, tenant_scope
from rhesis_tasks.processes import ChildFailedError, child, python, wait_until

__all__ = ["KINDS", "app", "measure"]

KINDS: Final = {"sync": "def", "async": "async def"}
_HERE: Final = Path(__file__).resolve().parent
_TENANT: Final = TenantContext("0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c11", "0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c12")
_WORKER: Final = (
    *("-m", "celery", "-A", "async_worked", "worker", "--pool", "solo", "--loglevel", "WARNING"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)
_QUEUE: Final = "bench"
_WARM_UP: Final = 50
_TIMEOUT: Final = 120.0


def _make(url: str, queue: str) -> Celery:
    app = Celery("worked", broker=url, set_as_current=False)
    app.conf.task_default_queue = queue
    configure(app, url)

    @app.task(name="sync", base=BaseTask, shared=False)
    def sync() -> None: ...

    @app.task(name="async", base=BaseTask, shared=False)
    async def async_() -> None: ...

    return app


app: Final = _make(**json.loads(os.environ["WORKED"])) if "WORKED" in os.environ else None
"""The worker's."""


def measure(rounds: int, tasks: int, folder: Path) -> list[dict[str, float]]:
    """Tasks a second of each kind, for each round.

    Args:
        rounds: how many workers there are, one after the other.
        tasks: how many tasks a run has; there are four of each kind in a round.
        folder: where the server keeps its data.

    Raises:
        ChildFailedError: the server cannot be started, or a worker ended.
    """
    with ExitStack() as stack:
        broker = next(iter(started(["ours"], stack, folder)))
        if not isinstance(broker, Broker):
            raise ChildFailedError(f"PostgreSQL could not be started: {broker[1]}")
        publisher = _make(broker.url, _QUEUE)
        return [_round(publisher, broker.url, tasks) for _ in range(rounds)]


def _round(publisher: Celery, url: str, tasks: int) -> dict[str, float]:
    warm_up = [_published(publisher, name, _WARM_UP) for name in KINDS]
    runs = [(name, _published(publisher, name, tasks)) for name in ("sync", "async", "async", "sync") * 2]
    with psycopg.connect(url, autocommit=True) as connection:
        settings = {"WORKED": json.dumps({"url": url, "queue": _QUEUE})}
        with child("the worker", python(*_WORKER), env=settings, cwd=_HERE) as worker:

            def is_done() -> bool:
                if not worker.running:
                    raise ChildFailedError(f"the worker ended:\n{worker.output[-2000:]}")
                return len(_ends(connection, runs[-1][1])) == tasks

            wait_until("the worker", is_done, _TIMEOUT, interval=0.5)
        seconds = dict.fromkeys(KINDS, 0.0)
        last = max(_ends(connection, warm_up[-1]))
        for name, ids in runs:
            before, last = last, max(_ends(connection, ids))
            seconds[name] += last - before
    return {name: 4 * tasks / took for name, took in seconds.items()}


def _published(publisher: Celery, name: str, count: int) -> list[str]:
    """Ids of tasks that now wait for a worker."""
    with tenant_scope(_TENANT):
        return [publisher.tasks[name].delay().id for _ in range(count)]


def _ends(connection: psycopg.Connection[Any], ids: Sequence[str]) -> list[float]:
    """When those tasks ended that have, in seconds."""
    rows = connection.execute(
        "SELECT extract(epoch FROM finished_at)::float8 FROM rhesis_tasks.task_record "
        "WHERE finished_at IS NOT NULL AND task_id = ANY(%s)",
        (list(ids),),
    )
    return [ended for (ended,) in rows]
