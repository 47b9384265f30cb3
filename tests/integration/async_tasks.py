"""The Celery application of test_async_tasks.py: ``celery -A async_tasks``."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    TenantContext,
    TenantSessions,
    configure,
    current_tenant,
    register_context_var,
    tenant_scope,
    tenant_session,
)
from rhesis_tasks.retry import NO_RETRY

label: ContextVar[str] = ContextVar("label")
register_context_var(label)

app = Celery("async_tasks")
sessions = TenantSessions(os.environ.get("SESSIONS_URL") or os.environ["DATABASE_URL"])
configure(app, sessions=sessions, event_loop=os.environ.get("EVENT_LOOP", "asyncio"))

INSERT = text("INSERT INTO note (organization_id, body) VALUES (:organization_id, :body)")
WHOSE = text("SELECT current_setting('app.current_organization')")


async def write(db: AsyncSession, body: str) -> None:
    tenant = current_tenant()
    assert tenant is not None
    await db.execute(INSERT, {"organization_id": tenant.organization_id, "body": body})


def here() -> dict[str, Any]:
    return {"pid": os.getpid(), "thread": threading.get_ident(), "loop": id(asyncio.get_running_loop())}


@app.task(base=BaseTask, bind=True)
async def look(self: BaseTask) -> dict[str, Any]:
    """Where it runs, and what it sees of the notes."""
    async with self.get_db_session() as db:
        notes = list((await db.scalars(text("SELECT body FROM note ORDER BY id"))).all())
        return {**here(), "organization": self.tenant.organization_id, "notes": notes}


@app.task(base=BaseTask)
async def takes_a_while() -> str:
    await asyncio.sleep(1)
    return "done"


@app.task(base=BaseTask, bind=True)
@tenant_session
async def together(self: BaseTask, db: AsyncSession, parts: int) -> list[str]:
    """Many sessions at once, and one around them all; whose they are."""

    async def part() -> str:
        async with tenant_session() as own:
            return str(await own.scalar(WHOSE))

    def in_thread() -> str:
        with self.get_db_session() as own:
            return str(own.scalar(WHOSE))

    return [
        str(await db.scalar(WHOSE)),
        *await asyncio.gather(*(part() for _ in range(parts))),
        await asyncio.to_thread(in_thread),
    ]


# --- soft time limits -------------------------------------------------------------------------------------------


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def sleeps_in_transactions(self: BaseTask) -> None:
    async def part() -> None:
        async with tenant_session() as db:
            await write(db, "never committed")
            await asyncio.sleep(60)

    async with tenant_session() as db:
        await write(db, "never committed")
        await asyncio.gather(*(part() for _ in range(5)))


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def cleans_up(self: BaseTask) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        async with tenant_session() as db:
            await write(db, "cleaned up")


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def returns_what_it_has(self: BaseTask) -> str:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return "what it has"
    return "all"


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def fails_cleaning_up(self: BaseTask) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        raise ValueError("broken")


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def never_awaits(self: BaseTask) -> None:
    async with tenant_session() as db:
        await write(db, "never committed")
        while True:
            time.sleep(0.01)  # noqa: ASYNC251 - is what the test is about


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4, cleanup_grace=0.5)
async def will_not_end(self: BaseTask) -> None:
    async with tenant_session() as db:
        await write(db, "never committed")
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def waits_for_the_database(self: BaseTask) -> None:
    async with tenant_session() as db:
        await db.execute(text("SELECT pg_sleep(60)"))


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
async def waits_for_a_thread(self: BaseTask) -> None:
    await asyncio.to_thread(time.sleep, 2)


@app.task(base=BaseTask)
async def gives_up_a_thread() -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.to_thread(threading.Event().wait), 0.1)  # which nobody sets


# The same in tasks that are no coroutines.


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
@tenant_session
def sleeps_in_a_session(self: BaseTask, db: Session) -> None:
    db.execute(INSERT, {"organization_id": self.tenant.organization_id, "body": "never committed"})
    time.sleep(60)


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
def leaves_a_session_open(self: BaseTask) -> None:
    db = self.get_db_session()
    db.execute(INSERT, {"organization_id": self.tenant.organization_id, "body": "never committed"})
    time.sleep(60)


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
def waits_in_the_database(self: BaseTask) -> None:
    with self.get_db_session() as db:
        db.execute(text("SELECT pg_sleep(60)"))


@app.task(base=BaseTask, bind=True, soft_time_limit=0.4)
def finishes_cleanly(self: BaseTask) -> str:
    with self.get_db_session() as db:
        db.execute(INSERT, {"organization_id": self.tenant.organization_id, "body": "done so far"})
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            db.commit()
            return "what it has"
    return "all"


# --- leaks ------------------------------------------------------------------------------------------------------

now: tuple[str, int] | None = None  # what runs, in a worker with one thread
crossed: list[str] = []  # what was found of one task in another
kept: list[Any] = []  # what tasks keep for later


class Litterer:
    """One run that leaves behind whatever a coroutine can, and notes wherever something of it runs too late."""

    def __init__(self, task: BaseTask, number: int) -> None:
        self.task = task
        self.me = (task.tenant.organization_id, number)
        self.random = random.Random(number)

    def check(self, where: str) -> None:
        tenant = current_tenant()
        own = (self.me[0], self.me[0], f"{self.me[0]}-{self.me[1]}", self.me)
        found = (tenant and tenant.organization_id, self.task.request.organization_id, label.get(None), now)
        if found != own:
            crossed.append(f"{where}: {found} instead of {own}")

    def check_tenant(self, where: str) -> None:
        """Where the code may run late, but for its own tenant only."""
        tenant = current_tenant()
        if tenant is None or tenant.organization_id != self.me[0]:
            crossed.append(f"{where}: {tenant} instead of {self.me}")

    async def linger(self) -> None:
        try:
            await asyncio.sleep(self.random.random() / 100)
            self.check("a coroutine")
            await asyncio.sleep(60)
        finally:
            self.check("its cleanup")
            await asyncio.sleep(0)
            self.check("the rest of its cleanup")

    async def linger_in_transaction(self) -> None:
        async with tenant_session() as db:
            if await db.scalar(WHOSE) != self.me[0]:
                crossed.append("a session")
            self.check("a transaction")
            await asyncio.sleep(60)

    async def swallow(self) -> None:
        for _ in range(10_000):
            try:
                await asyncio.sleep(0.001)
                self.check("what swallows cancellations")
            except asyncio.CancelledError:
                pass

    async def numbers(self) -> Any:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            self.check("a generator")

    async def litter(self) -> None:
        loop = asyncio.get_running_loop()
        for kind in self.random.sample(range(10), 3):
            match kind:
                case 0:
                    kept[:] = [asyncio.create_task(self.linger()), *kept[:50]]
                case 1:
                    asyncio.create_task(self.linger_in_transaction())  # noqa: RUF006
                case 2:
                    kept[:] = [self.linger(), *kept[:50]]  # never awaited
                case 3:
                    label.set("intruder")
                    label.set(f"{self.me[0]}-{self.me[1]}")
                    tenant_scope(TenantContext(self.me[0], "somebody else")).__enter__()
                case 4:
                    generator = self.numbers()
                    await anext(generator)
                    kept[:] = [generator, *kept[:50]]
                case 5:
                    loop.call_later(0.002, lambda: loop.create_task(self.linger()))
                case 6:
                    loop.run_in_executor(None, self._in_thread)
                case 7:
                    asyncio.create_task(self._fail())  # noqa: RUF006
                case 8:
                    group = asyncio.gather(*(self.linger() for _ in range(5)))
                    loop.call_later(0.001, group.cancel)
                case 9 if self.random.random() < 0.05:
                    asyncio.create_task(self.swallow())  # noqa: RUF006

    def _in_thread(self) -> None:
        time.sleep(0.003)
        self.check_tenant("a thread")

    async def _fail(self) -> None:
        await asyncio.sleep(0)
        raise ValueError("nobody looks")


@app.task(base=BaseTask, bind=True, cleanup_grace=0.1, retry_policy=RetryPolicy(1, base=0, retry_on=(KeyError,)))
async def litter(self: BaseTask, number: int) -> list[str]:
    """Whose notes it sees; anything may be left behind."""
    global now
    litterer = Litterer(self, number)
    now = litterer.me
    litterer.check("the body")
    async with tenant_session() as db:
        found = sorted(set((await db.scalars(text("SELECT organization_id FROM note"))).all()))
    await litterer.litter()
    await asyncio.sleep(litterer.random.random() / 200)
    litterer.check("the body's end")
    ending = litterer.random.randrange(8)
    label.set("left over")
    if ending == 0 and not self.request.retries:
        raise KeyError("again")
    if ending == 1:
        tenant_scope(TenantContext("intruder")).__enter__()
    if ending == 2:
        async with asyncio.timeout(0.001):
            await asyncio.sleep(60)
    return found


@app.task(base=BaseTask, bind=True, retry_policy=NO_RETRY)
async def cancels_itself(self: BaseTask, number: int) -> list[str]:
    """Fails, unless ``asyncio.wait_for()`` of Python 3.11 loses the cancellation, as it may (psycopg 3.1 uses it)."""
    global now
    litterer = Litterer(self, number)
    now = litterer.me
    litterer.check("the body")
    await litterer.litter()
    asyncio.current_task().cancel()  # type: ignore[union-attr]
    async with tenant_session() as db:
        await db.execute(text("SELECT 1"))
    return [self.tenant.organization_id]


@app.task(base=BaseTask, tenant_required=False)
def resources() -> dict[str, Any]:
    """What the process holds, and what was found."""
    gc.collect()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
        "crossed": crossed[:20],
    }
