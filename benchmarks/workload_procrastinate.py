"""The same tasks for procrastinate, outside Celery: published by ``defer()``, run by its own worker.

Run as a process of its own it is the worker: four jobs at once, on one event loop, woken by LISTEN; jobs that are done
are deleted, as the others' are.  It fetches them one by one, and has no prefetch to set.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from pathlib import Path

import procrastinate
from notes import Notes, settings

__all__ = ["install", "publish_noop", "publish_stamp"]


def install(url: str) -> None:
    """Make its tables."""
    with procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=url)).open() as app:
        app.schema_manager.apply_schema()


def _app(connector: procrastinate.BaseConnector) -> procrastinate.App:
    app = procrastinate.App(connector=connector)
    folder = Path(settings()["folder"])
    starts, latencies = Notes(folder / "starts"), Notes(folder / "latencies")

    @app.task(name="noop", queue=settings()["queue"])
    async def noop() -> None:
        starts.note(time.perf_counter())

    @app.task(name="stamp", queue=settings()["queue"])
    async def stamp(sent: float, counts: bool) -> None:
        latency = time.time() - sent
        if counts:
            latencies.note(latency)

    return app


@cache
def _opened() -> procrastinate.App:
    app = _app(procrastinate.SyncPsycopgConnector(conninfo=settings()["url"], min_size=1, max_size=1))
    app.open()
    return app


def publish_noop() -> None:
    _opened().tasks["noop"].defer()


def publish_stamp(sent: float, counts: bool) -> None:
    _opened().tasks["stamp"].defer(sent=sent, counts=counts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    _app(procrastinate.PsycopgConnector(conninfo=settings()["url"])).run_worker(
        queues=[settings()["queue"]], concurrency=4, delete_jobs="always"
    )
