"""Sessions that a task leaves in the middle of a transaction, wherever it has opened them."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from sqlalchemy import Engine, text

from rhesis_tasks import BaseTask, TenantSessions, tenant_scope, wrap
from rhesis_tasks.processes import wait_until
from rhesis_tasks.sessions import sessions_of
from rhesis_tasks.settings import database_url
from rhesis_tasks.threads import ContextThreadPoolExecutor

if TYPE_CHECKING:
    from conftest import MakeApp, Notes

    from rhesis_tasks.testing import TenantDatabase

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TIMEOUT = 20.0
LEFT_OPEN = "left a session open: its transaction is rolled back"


@pytest.fixture
def tenant_database(emptied_database: TenantDatabase) -> TenantDatabase:
    return emptied_database


@pytest.fixture(params=["psycopg", "asyncpg"])
def app(request: pytest.FixtureRequest, notes: Notes, make_app: MakeApp) -> Celery:
    """An application whose asynchronous sessions are by this driver."""
    url = database_url(notes.url).set(drivername=f"postgresql+{request.param}")
    return make_app(sessions=TenantSessions(url))


@pytest.fixture
def keep() -> Iterator[list[Any]]:
    """What holds sessions, so that none is closed because it is collected."""
    kept: list[Any] = []
    yield kept
    kept.clear()
    gc.collect()  # here, since SQLAlchemy and asyncio warn of what nobody has closed


@pytest.fixture
def executor() -> Iterator[ContextThreadPoolExecutor]:
    with ContextThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def in_transaction(notes: Notes, superuser: Engine) -> Callable[[], list[str]]:
    """What sessions of the application are in the middle of."""

    def look() -> list[str]:
        query = "SELECT state || ': ' || query FROM pg_stat_activity WHERE usename = :role AND state <> 'idle'"
        with superuser.connect() as connection:
            return list(connection.scalars(text(query), {"role": notes.database.role}))

    return look


def write_in_a_session(task: BaseTask, keep: list[Any]) -> None:
    db = sessions_of(task.app)()  # in a coroutine, the task's own method would make an asynchronous one
    keep.append(db)
    db.execute(
        text("INSERT INTO note (organization_id, body) VALUES (CAST(:organization_id AS uuid), 'never committed')"),
        {"organization_id": task.tenant.organization_id},
    )


async def write_in_an_asynchronous_session(task: BaseTask, keep: list[Any]) -> None:
    db = task.get_async_db_session()
    keep.append(db)
    await db.run_sync(lambda sync: sync.execute(text("DELETE FROM note")))


def of_a_function(task: BaseTask, keep: list[Any], _: Any) -> None:
    write_in_a_session(task, keep)


def of_an_executors_thread(task: BaseTask, keep: list[Any], executor: ContextThreadPoolExecutor) -> None:
    executor.submit(write_in_a_session, task, keep).result()


def of_a_wrapped_thread(task: BaseTask, keep: list[Any], _: Any) -> None:
    thread = threading.Thread(target=wrap(write_in_a_session), args=(task, keep))
    thread.start()
    thread.join()


def of_asyncio_run(task: BaseTask, keep: list[Any], _: Any) -> None:
    asyncio.run(write_in_an_asynchronous_session(task, keep))


def of_asyncio_run_in_a_thread(task: BaseTask, keep: list[Any], executor: ContextThreadPoolExecutor) -> None:
    executor.submit(of_asyncio_run, task, keep, None).result()


async def of_a_coroutine(task: BaseTask, keep: list[Any], _: Any) -> None:
    write_in_a_session(task, keep)


async def of_to_thread(task: BaseTask, keep: list[Any], _: Any) -> None:
    await asyncio.to_thread(write_in_a_session, task, keep)


async def of_asyncio_run_in_to_thread(task: BaseTask, keep: list[Any], _: Any) -> None:
    await asyncio.to_thread(of_asyncio_run, task, keep, None)


@pytest.mark.parametrize(
    "leave",
    [
        of_a_function,
        of_an_executors_thread,
        of_a_wrapped_thread,
        of_asyncio_run,
        of_asyncio_run_in_a_thread,
        of_a_coroutine,
        of_to_thread,
        of_asyncio_run_in_to_thread,
    ],
)
def test_no_transaction_of_a_task_goes_on_after_it(
    app: Celery,
    notes: Notes,
    executor: ContextThreadPoolExecutor,
    keep: list[Any],
    in_transaction: Any,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[..., Any],
) -> None:
    if asyncio.iscoroutinefunction(leave):

        @app.task(base=BaseTask, bind=True, shared=False)
        async def work(self: BaseTask) -> None:
            await leave(self, keep, executor)

    else:

        @app.task(base=BaseTask, bind=True, shared=False)
        def work(self: BaseTask) -> None:
            leave(self, keep, executor)

    with tenant_scope(notes.acme):
        result = work.apply()

    assert result.state == "SUCCESS", result.traceback
    assert len(keep) == 1
    wait_until("its transaction to end", lambda: in_transaction() == [], TIMEOUT)
    assert [record.message for record in caplog.records if LEFT_OPEN in record.message] == [
        f"task {work.name} {LEFT_OPEN}"
    ]
    with sessions_of(app)(notes.acme) as db:
        assert notes.seen(db) == notes.of(notes.acme)


def test_no_transaction_goes_on_of_a_coroutine_that_is_run_eagerly_where_an_event_loop_runs(
    app: Celery, notes: Notes, keep: list[Any], in_transaction: Any
) -> None:
    @app.task(base=BaseTask, bind=True, shared=False)
    async def work(self: BaseTask) -> None:
        write_in_a_session(self, keep)

    async def route() -> None:
        with tenant_scope(notes.acme):
            assert work.apply().state == "SUCCESS"

    asyncio.run(route())

    wait_until("its transaction to end", lambda: in_transaction() == [], TIMEOUT)


@pytest.mark.parametrize("app", ["psycopg"], indirect=True)
def test_the_statement_of_a_thread_that_goes_on_after_its_task_is_cancelled(
    app: Celery, notes: Notes, executor: ContextThreadPoolExecutor, in_transaction: Any
) -> None:
    @app.task(base=BaseTask, bind=True, shared=False)
    def sleep_in_the_database(self: BaseTask) -> None:
        with self.get_db_session() as db:
            db.execute(text("SELECT pg_sleep(60)"))

    @app.task(base=BaseTask, bind=True, shared=False)
    def work(self: BaseTask) -> None:
        running.append(executor.submit(sleep_in_the_database.run))
        wait_until("the statement to begin", lambda: any("pg_sleep" in each for each in in_transaction()), TIMEOUT)

    running: list[Any] = []
    began = time.monotonic()
    with tenant_scope(notes.acme):
        assert work.apply().state == "SUCCESS"

    with pytest.raises(Exception, match=r"canceling statement|connection is closed|closed the connection"):
        running[0].result(TIMEOUT)
    assert time.monotonic() - began < TIMEOUT
    wait_until("its transaction to end", lambda: in_transaction() == [], TIMEOUT)


@pytest.mark.parametrize("app", ["psycopg"], indirect=True)
def test_a_thread_that_is_in_no_transaction_keeps_its_connection_and_its_session(
    app: Celery, notes: Notes, executor: ContextThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    has_committed, has_ended = threading.Event(), threading.Event()

    def write_twice(task: BaseTask) -> list[str]:
        with task.get_db_session() as db:
            notes.write(db, notes.acme, "before")
            db.commit()
            has_committed.set()
            assert has_ended.wait(TIMEOUT)
            notes.write(db, notes.acme, "after")
            db.commit()
            return notes.seen(db)

    @app.task(base=BaseTask, bind=True, shared=False)
    def work(self: BaseTask) -> None:
        running.append(executor.submit(write_twice, self))
        assert has_committed.wait(TIMEOUT)

    running: list[Any] = []
    with tenant_scope(notes.acme):
        assert work.apply().state == "SUCCESS"
    has_ended.set()

    assert running[0].result(TIMEOUT) == [*notes.of(notes.acme), "after", "before"]
    assert LEFT_OPEN not in caplog.text
