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
from outcome_tasks import ORGANIZATION, Watched, app, is_first_time, note_hook

from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure, on_tenant_retry, on_tenant_success


class AsyncWatched(Watched):
    """The same, with tenant hooks that are ``async def``, too."""

    abstract = True

    async def tell(self, outcome: TaskOutcome) -> None:  # type: ignore[override]
        async with self.get_async_db_session() as db:
            note_hook("own", outcome, (await db.execute(ORGANIZATION)).scalar_one())

    async def on_tenant_success(self, outcome: TaskOutcome) -> None:  # type: ignore[override]
        await self.tell(outcome)

    async def on_tenant_failure(self, outcome: TaskOutcome) -> None:  # type: ignore[override]
        await self.tell(outcome)

    async def on_tenant_retry(self, outcome: TaskOutcome) -> None:  # type: ignore[override]
        await self.tell(outcome)


@on_tenant_success(app, task="*outcome_tasks.*")
@on_tenant_failure(app, task="*outcome_tasks.*")
@on_tenant_retry(app, task="*outcome_tasks.*")
async def tell_the_application(outcome: TaskOutcome) -> None:
    await asyncio.sleep(0)
    note_hook("the application's async", outcome)


def begin(task: Watched) -> None:
    """As in the other bodies, and leaves a coroutine behind."""
    outcome_tasks.begin(task)
    task.left = asyncio.create_task(asyncio.sleep(3600))  # type: ignore[attr-defined]


@app.task(base=AsyncWatched, bind=True)
async def async_success(self: AsyncWatched, secret: str = "") -> str:
    begin(self)
    return f"result: {secret}"


@app.task(base=AsyncWatched, bind=True)
async def async_exception(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    raise ValueError("broken")


@app.task(base=AsyncWatched, bind=True, max_retries=1, default_retry_delay=0)
async def async_retry(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        raise self.retry()


@app.task(base=AsyncWatched, bind=True)
async def async_ignore(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    raise Ignore


@app.task(base=AsyncWatched, bind=True)
async def async_reject(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    raise Reject("no use")


@app.task(base=AsyncWatched, bind=True)
async def async_requeue(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        raise Reject("not now", requeue=True)


@app.task(base=AsyncWatched, bind=True, soft_time_limit=0.2)
async def async_soft_limit(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    await asyncio.Event().wait()


@app.task(base=AsyncWatched, bind=True, time_limit=0.2)
async def async_hard_limit(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    await asyncio.Event().wait()


@app.task(base=AsyncWatched, bind=True, acks_late=False)
async def async_system_exit(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    raise SystemExit(3)


@app.task(base=AsyncWatched, bind=True)
async def async_unencodable(self: AsyncWatched, secret: str = "") -> object:
    begin(self)
    return object()


@app.task(base=AsyncWatched, bind=True)
async def async_expired(self: AsyncWatched, secret: str = "") -> None:
    begin(self)


@app.task(base=AsyncWatched, bind=True)
async def async_revoked(self: AsyncWatched, secret: str = "") -> None:
    begin(self)


@app.task(base=AsyncWatched, bind=True)
async def async_terminated(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    await asyncio.Event().wait()


@app.task(base=AsyncWatched, bind=True)
async def async_lost(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=AsyncWatched, bind=True, retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
async def async_lost_and_retried(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=AsyncWatched, bind=True, reject_on_worker_lost=True)
async def async_lost_and_requeued(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
    if is_first_time(self):
        os.kill(os.getpid(), signal.SIGKILL)


class TakesLongToTell(AsyncWatched):
    abstract = True
    hook_time_limit = 0.2

    async def on_tenant_success(self, outcome: TaskOutcome) -> None:  # type: ignore[override]
        await self.tell(outcome)
        await asyncio.Event().wait()


@app.task(base=TakesLongToTell, bind=True)
async def async_hook_hangs(self: AsyncWatched, secret: str = "") -> None:
    begin(self)
