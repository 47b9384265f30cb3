"""The tasks of outcome_tasks.py again, as ``async def``: each ends in the same way, and is to be dealt with alike.

In a module of their own, since a gevent worker refuses to start with them.
"""

from __future__ import annotations

import asyncio
import os
import signal

import outcome_tasks
from celery.exceptions import Ignore, Reject
from outcome_tasks import *  # noqa: F403 - the other tasks, for the test
from outcome_tasks import Watched, app, is_first_time


def begin(task: Watched) -> None:
    """As in the other bodies, and leaves a coroutine behind."""
    outcome_tasks.begin(task)
    task.left = asyncio.create_task(asyncio.sleep(3600))  # type: ignore[attr-defined]


@app.task(base=Watched, bind=True)
async def async_success(self: Watched) -> None:
    begin(self)


@app.task(base=Watched, bind=True)
async def async_exception(self: Watched) -> None:
    begin(self)
    raise ValueError("broken")


@app.task(base=Watched, bind=True, max_retries=1, default_retry_delay=0)
async def async_retry(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        raise self.retry()


@app.task(base=Watched, bind=True)
async def async_ignore(self: Watched) -> None:
    begin(self)
    raise Ignore


@app.task(base=Watched, bind=True)
async def async_reject(self: Watched) -> None:
    begin(self)
    raise Reject("no use")


@app.task(base=Watched, bind=True)
async def async_requeue(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        raise Reject("not now", requeue=True)


@app.task(base=Watched, bind=True, soft_time_limit=0.2)
async def async_soft_limit(self: Watched) -> None:
    begin(self)
    await asyncio.Event().wait()


@app.task(base=Watched, bind=True, time_limit=0.2)
async def async_hard_limit(self: Watched) -> None:
    begin(self)
    await asyncio.Event().wait()


@app.task(base=Watched, bind=True, acks_late=False)
async def async_system_exit(self: Watched) -> None:
    begin(self)
    raise SystemExit(3)


@app.task(base=Watched, bind=True)
async def async_unencodable(self: Watched) -> object:
    begin(self)
    return object()


@app.task(base=Watched, bind=True)
async def async_expired(self: Watched) -> None:
    begin(self)


@app.task(base=Watched, bind=True)
async def async_revoked(self: Watched) -> None:
    begin(self)


@app.task(base=Watched, bind=True)
async def async_terminated(self: Watched) -> None:
    begin(self)
    await asyncio.Event().wait()


@app.task(base=Watched, bind=True)
async def async_lost(self: Watched) -> None:
    begin(self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, bind=True, retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
async def async_lost_and_retried(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, bind=True, reject_on_worker_lost=True)
async def async_lost_and_requeued(self: Watched) -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)
