"""The same tasks for pgqueuer, outside Celery: published by ``enqueue()``, run by its own worker.

Run as a process of its own it is the worker: it takes 32 jobs at once and runs them on one event loop, woken by
LISTEN; how many run at once is not limited, since its limit would be asked of the database.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from functools import cache
from pathlib import Path

import psycopg
from notes import Notes, settings
from pgqueuer import PgQueuer
from pgqueuer.db import SyncPsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries, SyncQueries

__all__ = ["install", "publish_noop", "publish_stamp"]


def install(url: str) -> None:
    """Make its tables."""

    async def make() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await Queries.from_psycopg_connection(connection).install()

    asyncio.run(make())


@cache
def _queries() -> SyncQueries:
    return SyncQueries(SyncPsycopgDriver(psycopg.connect(settings()["url"], autocommit=True)))


def _entrypoint(task: str) -> str:
    return f"{settings()['queue']}.{task}"


def publish_noop() -> None:
    _queries().enqueue(_entrypoint("noop"), None)


def publish_stamp(sent: float, counts: bool) -> None:
    _queries().enqueue(_entrypoint("stamp"), json.dumps([sent, counts]).encode())


async def _work() -> None:
    folder = Path(settings()["folder"])
    starts, latencies = Notes(folder / "starts"), Notes(folder / "latencies")
    worker = PgQueuer.from_psycopg_connection(await psycopg.AsyncConnection.connect(settings()["url"], autocommit=True))

    @worker.entrypoint(_entrypoint("noop"))
    async def noop(job: Job) -> None:  # noqa: ARG001  # it is called with one
        starts.note(time.perf_counter())

    @worker.entrypoint(_entrypoint("stamp"))
    async def stamp(job: Job) -> None:
        sent, counts = json.loads(job.payload or b"")
        latency = time.time() - sent
        if counts:
            latencies.note(latency)

    await worker.run(batch_size=32)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_work())
