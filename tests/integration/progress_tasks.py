"""The Celery application of test_progress.py, ``celery -A progress_tasks``: tasks that report, and shall stop early.

They wait where the test wants to look, and say how far they are, by files in the folder that PROGRESS names.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from record_statements import noted_statements

from rhesis_tasks import BaseTask, RetryPolicy, TenantContext, configure, tenant_scope
from rhesis_tasks.batch import ASK_EVERY
from rhesis_tasks.postgres.engines import shared_engine
from rhesis_tasks.processes import free_port

app = Celery("progress_tasks")
configure(app)

STRANGE = "NUL \0, lone surrogate \ud800"
AT_ONCE = RetryPolicy(max_retries=1, base=0, retry_on=(ConnectionError,))

Report = list[Any]  # [done, total, message]


def file(word: str, task: BaseTask, *more: object) -> Path:
    return Path(os.environ["PROGRESS"], "-".join((word, task.request.id, *map(str, more))))


def wait_for(word: str, task: BaseTask) -> None:
    while not file(word, task).exists():
        time.sleep(0.01)


async def wait_for_async(word: str, task: BaseTask) -> None:
    while not file(word, task).exists():  # noqa: ASYNC110 - somebody else says so
        await asyncio.sleep(0.01)


def say(word: str, task: BaseTask, *more: object) -> None:
    file(word, task, *more).touch()


# --- reporting -------------------------------------------------------------------------------------------------


@app.task(base=BaseTask, bind=True, retry_policy=AT_ONCE)
def report(self: BaseTask, reports: list[Report], error: str | None = None) -> None:
    """Reports one after the other, and ends when it may."""
    for each in reports:
        self.report_progress(*each)
    say("reported", self)
    wait_for("end", self)
    if error:
        raise {"ValueError": ValueError, "ConnectionError": ConnectionError}[error]


@app.task(base=BaseTask, bind=True, retry_policy=AT_ONCE)
async def report_async(self: BaseTask, reports: list[Report], error: str | None = None) -> None:
    for each in reports:
        self.report_progress(*each)
    say("reported", self)
    await wait_for_async("end", self)
    if error:
        raise {"ValueError": ValueError, "ConnectionError": ConnectionError}[error]


@app.task(base=BaseTask, bind=True, retry_policy=AT_ONCE)
def report_in_first_attempt(self: BaseTask, reports: list[Report]) -> None:
    if not self.request.retries:
        for each in reports:
            self.report_progress(*each)
        raise ConnectionError


def record_no_retry(task: BaseTask) -> None:
    """As if the next attempt had begun sooner than the end of this one is recorded, which does not count then."""
    backend: Any = task.app.backend

    def store_result(task_id: str, result: object, state: str, *_: object, **__: object) -> None:
        assert state == "RETRY"
        del backend.store_result

    backend.store_result = store_result


@app.task(base=BaseTask, bind=True, retry_policy=AT_ONCE)
def report_before_a_quick_attempt(self: BaseTask, reports: list[Report]) -> None:
    if not self.request.retries:
        for each in reports:
            self.report_progress(*each)
        record_no_retry(self)
        raise ConnectionError


@app.task(base=BaseTask, bind=True, max_retries=1, default_retry_delay=0)
async def report_before_a_quick_attempt_async(self: BaseTask, reports: list[Report]) -> None:
    if not self.request.retries:
        for each in reports:
            self.report_progress(*each)
        record_no_retry(self)
        self.retry()


@app.task(base=BaseTask, bind=True)
def report_strange(self: BaseTask, is_last: bool) -> None:
    """A message that no text column holds, written while the task runs or with its end."""
    if is_last:
        self.report_progress(1, 2, "first")
    self.report_progress(2, 2, STRANGE)


@app.task(base=BaseTask, bind=True)
def report_in_scope_of(self: BaseTask, organization: str) -> None:
    with tenant_scope(TenantContext(organization)):
        self.report_progress(1, 2, "in another's scope")
        say("reported", self)
        wait_for("end", self)


@app.task(base=BaseTask, bind=True)
async def report_in_scope_of_async(self: BaseTask, organization: str) -> None:
    with tenant_scope(TenantContext(organization)):
        self.report_progress(1, 2, "in another's scope")
        say("reported", self)
        await wait_for_async("end", self)


# --- stopping early --------------------------------------------------------------------------------------------


@app.task(base=BaseTask, bind=True)
def until_aborted(self: BaseTask) -> str:
    say("begun", self)
    while not self.should_abort():
        time.sleep(0.01)
    return "stopped early"


@app.task(base=BaseTask, bind=True)
async def until_aborted_async(self: BaseTask) -> str:
    say("begun", self)
    while not await self.aborted():  # noqa: ASYNC110 - somebody else says so
        await asyncio.sleep(0.01)
    assert self.should_abort()
    return "stopped early"


@app.task(base=BaseTask, bind=True)
async def until_aborted_in_the_background(self: BaseTask) -> str:
    say("begun", self)
    while not self.should_abort():  # noqa: ASYNC110 - somebody else says so
        await asyncio.sleep(0.01)
    return "stopped early"


@app.task(base=BaseTask, bind=True, retry_policy=AT_ONCE)
def fail_once(self: BaseTask) -> bool:
    """Fails when it may; its retry says whether it is to stop."""
    if self.request.retries:
        return self.should_abort()
    say("begun", self)
    wait_for("end", self)
    raise ConnectionError


@app.task(base=BaseTask, bind=True, retry_policy=AT_ONCE)
async def fail_once_async(self: BaseTask) -> bool:
    if self.request.retries:
        return await self.aborted()
    say("begun", self)
    await wait_for_async("end", self)
    raise ConnectionError


@app.task(base=BaseTask, bind=True)
def ask_once(self: BaseTask) -> bool:
    return self.should_abort()


@app.task(base=BaseTask, bind=True)
async def ask_once_async(self: BaseTask) -> bool:
    return await self.aborted()


# --- batches ---------------------------------------------------------------------------------------------------


@app.task(base=BaseTask, bind=True)
async def batch(self: BaseTask, count: int, at_once: int, start: int = 0) -> list[int]:
    """Some items end at once, the others when they may; those that ended are returned."""

    async def run(item: int) -> None:
        say("begun", self, item)
        if item >= at_once:
            await wait_for_async("end", self)

    return [outcome.item async for outcome in self.batch(run, range(count), limit=2, start=start)]


@app.task(base=BaseTask, bind=True)
async def batch_until_told(self: BaseTask) -> list[int]:
    """Items run until the task has heard that it shall stop, and one look of the batch longer."""

    async def run(item: int) -> None:
        say("begun", self, item)
        while not await self.aborted():  # noqa: ASYNC110 - somebody else says so
            await asyncio.sleep(0.01)
        await asyncio.sleep(2 * ASK_EVERY)

    return [outcome.item async for outcome in self.batch(run, range(100), limit=2)]


@app.task(base=BaseTask, bind=True)
async def leave_batch(self: BaseTask) -> int:
    async def run(item: int) -> int:
        try:
            if item:
                await asyncio.Event().wait()
        finally:
            say("cleaned", self, item)
        return item

    async for _ in self.batch(run, range(10), limit=3):
        break
    return 0


# --- the database ----------------------------------------------------------------------------------------------


@contextmanager
def counted_updates(task: BaseTask) -> Iterator[list[str]]:
    """The statements that take progress to the records meanwhile."""
    with noted_statements(shared_engine(task.app.backend.url)) as found:
        yield found


@app.task(base=BaseTask, bind=True)
def burst(self: BaseTask, count: int) -> int:
    with counted_updates(self) as updates:
        for done in range(1, count + 1):
            self.report_progress(done, count, "")
    return len(updates)


@app.task(base=BaseTask, bind=True)
async def burst_async(self: BaseTask, count: int) -> int:
    with counted_updates(self) as updates:
        for done in range(1, count + 1):
            self.report_progress(done, count, "")
            await asyncio.sleep(0)
        while not updates:  # noqa: ASYNC110 - it is written in the background
            await asyncio.sleep(0.01)
    return len(updates)


@contextmanager
def unreachable(task: BaseTask) -> Iterator[None]:
    """Nobody answers where the records are."""
    backend = task.app.backend
    url = backend.records.url
    backend.records.url = f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/nowhere"
    try:
        yield
    finally:
        backend.records.url = url


@app.task(base=BaseTask, bind=True)
def report_to_nobody(self: BaseTask) -> str:
    with unreachable(self):
        self.report_progress(1, 2, "unheard")
        assert not self.should_abort()
    return "went on"


@app.task(base=BaseTask, bind=True)
async def report_to_nobody_async(self: BaseTask) -> str:
    with unreachable(self):
        assert not await self.aborted()
        self.report_progress(1, 2, "unheard")
    return "went on"


@app.task(base=BaseTask, bind=True, soft_time_limit=1)
def report_slowly(self: BaseTask) -> None:
    """Its soft time limit is reached while the record is written."""
    backend: Any = self.app.backend
    backend.store_progress = lambda *_: time.sleep(30)
    try:
        self.report_progress(1, 2)
    finally:
        del backend.store_progress
