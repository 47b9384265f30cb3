"""Waiting for results: who waits is told of the end, asks next to nothing meanwhile, and is told of nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from broker_rig import PostgresServer, running_server
from celery import Celery
from celery.exceptions import TaskRevokedError, TimeoutError
from celery.result import GroupResult
from pooler import running_pgbouncer
from record_statements import noted_statements

from rhesis_tasks import BaseTask, TenantContext, tenant_scope
from rhesis_tasks.postgres import results, waiting
from rhesis_tasks.postgres.engines import shared_engine
from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.status import cancel_task
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

if TYPE_CHECKING:
    from conftest import MakeApp

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "bob")
TIMEOUT = 30
NEVER = 60  # an interval at which a test would see that something is polled for
PROMPTLY = 3.0  # on a machine that has much else to do


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    return with_task(make_app())


def with_task(app: Celery) -> Celery:
    @app.task(base=BaseTask, name="work", shared=False)
    def work() -> None: ...

    return app


def launched(app: Celery, tenant: TenantContext = ACME, **options: Any) -> str:
    with tenant_scope(tenant):
        return str(app.tasks["work"].apply_async(**options).id)


def end(app: Celery, task_id: str, value: Any = 42, state: str = "SUCCESS", tenant: TenantContext = ACME) -> None:
    """As a worker does it."""
    with tenant_scope(tenant):
        app.backend.store_result(task_id, value, state)


def get(app: Celery, task_id: str, tenant: TenantContext = ACME, **options: Any) -> Any:
    with tenant_scope(tenant):
        return app.AsyncResult(task_id).get(**{"timeout": TIMEOUT, **options})


class Waiters:
    """Threads that wait for results."""

    def __init__(self, pool: ThreadPoolExecutor, superuser: str) -> None:
        self._pool = pool
        self._superuser = superuser

    def get(self, app: Celery, task_id: str, tenant: TenantContext = ACME, **options: Any) -> Future[Any]:
        """Begin to wait, and let that be known to the database."""
        before = self.wanted(task_id)
        future = self._pool.submit(get, app, task_id, tenant, **options)
        wait_until(f"somebody to wait for {task_id}", lambda: self.wanted(task_id) != before)
        return future

    def wanted(self, task_id: str) -> list[Any]:
        return self._query(
            "SELECT organization_id, wanted_until::text FROM rhesis_tasks.task_record WHERE task_id = %s ORDER BY 1",
            task_id,
        )

    def listeners(self) -> list[int]:
        """The process ids of the connections on which is listened."""
        rows = self._query(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'rhesis-tasks results' "
            "AND datname = current_database() AND query LIKE 'LISTEN %%'"
        )
        return [pid for (pid,) in rows]

    def listener(self) -> int:
        """The one connection on which is listened."""
        wait_until("somebody to listen", lambda: len(self.listeners()) == 1)
        return self.listeners()[0]

    def _query(self, sql: str, *parameters: Any) -> list[Any]:
        with psycopg.connect(self._superuser, autocommit=True) as connection:
            return connection.execute(sql, parameters).fetchall()


@contextmanager
def waiting_threads(database: TenantDatabase) -> Iterator[Waiters]:
    name = database_url(database.url).database
    url = database.admin.url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    with ThreadPoolExecutor(30) as pool:
        yield Waiters(pool, url)


@pytest.fixture
def waiters(tenant_database: TenantDatabase) -> Iterator[Waiters]:
    with waiting_threads(tenant_database) as found:
        yield found


@pytest.fixture
def statements(app: Celery) -> Iterator[list[str]]:
    """What the result backend asks of the database."""
    with noted_statements(shared_engine(app.backend.url)) as noted:
        yield noted


def seconds_of(future: Future[Any], result: Any = 42) -> float:
    """How long it takes from now on until it has the result."""
    began = time.monotonic()
    assert future.result(TIMEOUT) == result
    return time.monotonic() - began


# --- being told --------------------------------------------------------------------------------------------------


def test_who_waits_is_told_of_the_end(app: Celery, waiters: Waiters) -> None:
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=NEVER)
    waiters.listener()

    end(app, task_id)

    assert seconds_of(waiter) < PROMPTLY


def test_nothing_is_asked_while_nothing_happens(app: Celery, waiters: Waiters, statements: list[str]) -> None:
    task_id = launched(app)
    statements.clear()
    waiter = waiters.get(app, task_id)
    waiters.listener()
    time.sleep(3)  # six of Celery's intervals

    asked = len(statements)
    end(app, task_id)

    assert seconds_of(waiter) < PROMPTLY
    assert asked <= 5, statements
    assert len(statements) <= 7, statements


def test_a_result_that_is_there_takes_one_statement_and_no_listener(
    app: Celery, waiters: Waiters, statements: list[str]
) -> None:
    task_id = launched(app)
    end(app, task_id)
    statements.clear()

    assert get(app, task_id) == 42

    assert (len(statements), waiters.listeners()) == (1, [])


@pytest.mark.parametrize("interval", [0, 0.2])
def test_a_task_that_is_launched_later_is_waited_for_too(app: Celery, interval: float) -> None:
    """The next tasks of a chain, and the body of a chord, have no record before."""
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(get, app, "later", interval=interval)
        time.sleep(0.5)
        launched(app, task_id="later")
        time.sleep(0.5)

        end(app, "later")

        assert seconds_of(waiter) < PROMPTLY


def test_many_who_wait_share_one_connection(app: Celery, waiters: Waiters) -> None:
    task_ids = [launched(app) for _ in range(8)]
    futures = [waiters.get(app, task_id, interval=NEVER) for task_id in task_ids * 3]
    listeners = [waiters.listener()]

    for task_id in task_ids:
        end(app, task_id, task_id)
    found = [future.result(TIMEOUT) for future in futures]

    assert found == task_ids * 3
    assert waiters.listeners() == listeners


def test_two_processes_wait_for_the_same_task(app: Celery, waiters: Waiters, tenant_database: TenantDatabase) -> None:
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=NEVER)
    before = waiters.wanted(task_id)
    with child("waiter", python("-c", OTHER_PROCESS, task_id), env={"DATABASE_URL": tenant_database.url}) as other:
        wait_until("the other process to wait", lambda: waiters.wanted(task_id) != before, TIMEOUT)
        wait_until("both to listen", lambda: len(waiters.listeners()) == 2)

        end(app, task_id)

        assert seconds_of(waiter) < PROMPTLY
        other.wait_for("it is 42", PROMPTLY)


OTHER_PROCESS = """
import sys
from celery import Celery
from rhesis_tasks import TenantContext, configure, tenant_scope

app = Celery("other")
configure(app, broker_url="memory://")
with tenant_scope(TenantContext("acme")):
    print("it is", app.AsyncResult(sys.argv[1]).get(timeout=30, interval=60))
"""


def test_a_forked_child_listens_by_itself(app: Celery, waiters: Waiters) -> None:
    first, second = launched(app), launched(app)
    waiter = waiters.get(app, first, interval=NEVER)
    parents = waiters.listener()
    reading, writing = os.pipe()
    before = waiters.wanted(second)
    process = os.fork()
    if process == 0:  # it must not come back to pytest
        try:
            os.write(writing, str(get(app, second, interval=NEVER)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    wait_until("the child to wait", lambda: waiters.wanted(second) != before)
    wait_until("the child to listen", lambda: len(waiters.listeners()) == 2)

    end(app, second)
    began = time.monotonic()
    of_child = os.read(reading, 100)
    end(app, first)

    assert (of_child, time.monotonic() - began < PROMPTLY) == (b"42", True)
    assert seconds_of(waiter) < PROMPTLY
    os.waitpid(process, 0)
    os.close(reading)
    assert parents in waiters.listeners()


def test_the_connection_is_closed_when_nobody_waits_and_made_again(
    app: Celery, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "IDLE", 0.2)
    for _ in range(2):
        task_id = launched(app)
        waiter = waiters.get(app, task_id, interval=NEVER)
        waiters.listener()

        end(app, task_id)

        assert seconds_of(waiter) < PROMPTLY
        wait_until("nobody to listen", lambda: not waiters.listeners())


def test_what_is_heard_while_it_begins_to_listen_holds_nobody_up(
    app: Celery, tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "IDLE", 0.0)  # each listener's connection is closed right away
    channel = app.backend.records.channel()
    has_listened = threading.Event()

    def notify() -> None:
        with psycopg.connect(tenant_database.url, autocommit=True) as connection:
            while not has_listened.is_set():
                connection.execute(f"NOTIFY {channel}, 'of somebody'")

    def listen() -> None:
        for _ in range(100):
            listener = waiting.ResultListener(app.backend.url, channel)
            with listener.waiting("of somebody") as heard:
                assert listener.listen()
                assert heard.wait(TIMEOUT)

    with ThreadPoolExecutor(3) as pool:
        pool.submit(notify)
        pool.submit(notify)
        try:
            pool.submit(listen).result(TIMEOUT)
        finally:
            has_listened.set()


# --- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.7])
def test_who_has_waited_long_enough_gets_celerys_timeout(app: Celery, timeout: float) -> None:
    task_id = launched(app)
    began = time.monotonic()

    with pytest.raises(TimeoutError):
        get(app, task_id, timeout=timeout)

    assert timeout <= time.monotonic() - began < timeout + PROMPTLY


@pytest.mark.parametrize("state", ["FAILURE", "REVOKED"])
def test_a_failure_is_raised_with_its_type_or_returned(app: Celery, waiters: Waiters, state: str) -> None:
    task_id = launched(app)
    error = {"FAILURE": LookupError("no such test set"), "REVOKED": TaskRevokedError("terminated")}[state]
    raising = waiters.get(app, task_id, interval=NEVER)
    returning = waiters.get(app, task_id, interval=NEVER, propagate=False)

    end(app, task_id, error, state)

    with pytest.raises(type(error)) as raised:
        raising.result(TIMEOUT)
    assert raised.value.args == error.args
    returned = returning.result(TIMEOUT)
    assert (type(returned), returned.args) == (type(error), error.args)


def test_who_waits_for_a_task_that_is_cancelled_is_told(app: Celery, waiters: Waiters) -> None:
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=NEVER)
    waiters.listener()
    began = time.monotonic()

    with tenant_scope(ACME):
        cancel_task(app, task_id)

    with pytest.raises(TaskRevokedError):
        waiter.result(TIMEOUT)
    assert time.monotonic() - began < PROMPTLY


def test_what_does_not_end_the_task_ends_no_wait(app: Celery, waiters: Waiters) -> None:
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=NEVER)
    waiters.listener()
    end(app, task_id, None, "STARTED")
    end(app, task_id, ConnectionError("down"), "RETRY")
    end(app, task_id, {"done": 1}, "PROGRESS")
    time.sleep(0.5)
    still_waits = not waiter.done()

    end(app, task_id)

    assert (still_waits, waiter.result(TIMEOUT)) == (True, 42)


def test_a_group_is_waited_for_in_order(app: Celery, waiters: Waiters) -> None:
    task_ids = [launched(app) for _ in range(5)]
    group = GroupResult("group", [app.AsyncResult(task_id) for task_id in task_ids])
    with ThreadPoolExecutor(2) as pool:

        def wait(method: str) -> Any:
            with tenant_scope(ACME):
                return getattr(group, method)(timeout=TIMEOUT)

        futures = [pool.submit(wait, method) for method in ("get", "join")]
        waiters.listener()
        for number, task_id in reversed(list(enumerate(task_ids))):
            end(app, task_id, number)

        assert [future.result(TIMEOUT) for future in futures] == [[0, 1, 2, 3, 4]] * 2


def test_a_group_with_a_failure_raises_it(app: Celery) -> None:
    task_ids = [launched(app) for _ in range(3)]
    for task_id in task_ids[1:]:
        end(app, task_id, 1)
    end(app, task_ids[0], LookupError("none"), "FAILURE")

    with tenant_scope(ACME):
        group = GroupResult("group", [app.AsyncResult(task_id) for task_id in task_ids])

        with pytest.raises(LookupError, match="none"):
            group.get(timeout=TIMEOUT)


def test_on_interval_is_called_while_it_waits_and_asks_nothing_of_the_database(
    app: Celery, waiters: Waiters, statements: list[str]
) -> None:
    task_id = launched(app)
    calls: list[float] = []
    statements.clear()

    with tenant_scope(ACME), pytest.raises(TimeoutError):
        app.backend.wait_for(task_id, timeout=1.5, interval=0.1, on_interval=lambda: calls.append(time.monotonic()))

    assert len(calls) >= 8
    assert len(statements) <= 6, statements


def test_on_interval_takes_a_tenth_of_the_time_at_most(app: Celery) -> None:
    """Celery's looks at each part of a chord whose body is waited for."""
    task_id = launched(app)
    calls: list[float] = []

    def take_long() -> None:
        calls.append(time.monotonic())
        time.sleep(0.1)

    with tenant_scope(ACME), pytest.raises(TimeoutError):
        app.backend.wait_for(task_id, timeout=1.6, interval=0.1, on_interval=take_long)

    assert len(calls) == 2


def test_who_waits_for_a_chain_hears_of_its_first_tasks_failure(app: Celery) -> None:
    first, last = launched(app), launched(app)
    with tenant_scope(ACME), ThreadPoolExecutor(1) as pool:
        result = app.AsyncResult(last, parent=app.AsyncResult(first))

        def wait() -> Any:
            with tenant_scope(ACME):
                return result.get(timeout=TIMEOUT)

        waiter = pool.submit(wait)
        time.sleep(0.3)
        end(app, first, LookupError("none"), "FAILURE")

        with pytest.raises(LookupError, match="none"):
            waiter.result(TIMEOUT)


def test_a_record_that_is_forgotten_meanwhile_is_waited_for_until_it_is_there_again(
    app: Celery, waiters: Waiters
) -> None:
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=0.1)
    waiters.listener()
    with tenant_scope(ACME):
        app.AsyncResult(task_id).forget()
    time.sleep(0.5)

    end(app, task_id)

    assert seconds_of(waiter) < PROMPTLY


def test_an_id_that_nobody_knows_is_waited_for_in_vain(app: Celery) -> None:
    with pytest.raises(TimeoutError):
        get(app, "unknown", timeout=0.5)


# --- other tenants -----------------------------------------------------------------------------------------------


def test_another_tenant_waits_in_vain(app: Celery, waiters: Waiters, tenant_database: TenantDatabase) -> None:
    task_id = launched(app)
    with ThreadPoolExecutor(1) as pool:
        foreign = pool.submit(get, app, task_id, GLOBEX, timeout=2)
        waiter = waiters.get(app, task_id, interval=NEVER)

        end(app, task_id, "secret")

        assert waiter.result(TIMEOUT) == "secret"
        with pytest.raises(TimeoutError):
            foreign.result(TIMEOUT)


def test_the_same_id_of_two_tenants_is_two_waits(app: Celery, waiters: Waiters) -> None:
    for tenant in (ACME, GLOBEX):
        launched(app, tenant, task_id="one")
    of_acme, of_globex = (waiters.get(app, "one", tenant, interval=NEVER) for tenant in (ACME, GLOBEX))
    waiters.listener()

    end(app, "one", "acme's", tenant=ACME)

    assert of_acme.result(TIMEOUT) == "acme's"
    assert not of_globex.done()
    end(app, "one", "globex's", tenant=GLOBEX)
    assert of_globex.result(TIMEOUT) == "globex's"


def test_a_notification_tells_nothing_of_tenant_or_task(app: Celery, waiters: Waiters) -> None:
    channel = app.backend.records.channel()
    keys = {(tenant, task): app.backend.records.wanted(tenant.organization_id, task, 1)
            for tenant in (ACME, GLOBEX) for task in ("one", "two")}  # fmt: skip
    assert len(set(keys.values())) == 4
    for tenant, task in keys:
        launched(app, tenant, task_id=task)
    with psycopg.connect(app.backend.url.replace("+psycopg", ""), autocommit=True) as everybody:
        heard: list[psycopg.Notify] = []
        everybody.add_notify_handler(heard.append)
        everybody.execute(f"LISTEN {channel}")
        waiter = waiters.get(app, "one", interval=NEVER)

        for tenant, task in keys:
            end(app, task, "secret", tenant=tenant)

        waiter.result(TIMEOUT)
        everybody.execute("SELECT 1")  # which takes in what has arrived
    assert [each.payload for each in heard] == [keys[ACME, "one"]], "only of what somebody waits for"
    assert len(heard[0].payload) == 32
    assert not any(word in heard[0].payload + heard[0].channel for word in ("acme", "one", "work", "secret"))


# --- faults ------------------------------------------------------------------------------------------------------


def test_who_waits_gets_over_the_loss_of_the_connection(
    app: Celery, waiters: Waiters, tenant_database: TenantDatabase
) -> None:
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=NEVER)
    lost = waiters.listener()
    with tenant_database.admin.connect() as admin:
        admin.exec_driver_sql(f"SELECT pg_terminate_backend({lost})")
    wait_until("another connection", lambda: waiters.listeners() not in ([], [lost]), timeout=8)

    end(app, task_id)

    assert seconds_of(waiter) < PROMPTLY


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def database(server: PostgresServer) -> Iterator[TenantDatabase]:
    with new_tenant_database(server.url) as database:
        yield database


def test_who_waits_gets_over_a_restart_of_the_server(
    make_app: MakeApp, server: PostgresServer, database: TenantDatabase
) -> None:
    app = with_task(make_app(database.url))
    task_id = launched(app)
    with waiting_threads(database) as waiters:
        waiter = waiters.get(app, task_id)
        waiters.listener()
        server.stop("fast")
        time.sleep(2)
        assert not waiter.done()
        server.start()
        waiters.listener()

        end(app, task_id)

        assert seconds_of(waiter) < PROMPTLY


def test_behind_a_pooler_that_passes_on_no_notifications_it_polls(
    make_app: MakeApp, server: PostgresServer, database: TenantDatabase
) -> None:
    with running_pgbouncer(server, "transaction", 3) as bouncer, waiting_threads(database) as waiters:
        url = database_url(database.url).set(port=bouncer.port).render_as_string(hide_password=False)
        app = with_task(make_app(url))
        task_ids = [launched(app) for _ in range(10)]
        futures = [waiters.get(app, task_id, interval=0.2) for task_id in task_ids]
        heard = waiters.listeners()

        for task_id in task_ids:
            end(app, task_id, task_id)

        assert [future.result(TIMEOUT) for future in futures] == task_ids
        assert (heard, waiters.listeners()) == ([], [])
        shared_engine(app.backend.url).dispose()


def test_how_long_somebody_waits_is_renewed(app: Celery, waiters: Waiters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "WANTED_FOR", 1.0)
    task_id = launched(app)
    waiter = waiters.get(app, task_id, interval=NEVER)
    waiters.listener()
    time.sleep(2)

    end(app, task_id)

    assert seconds_of(waiter) < 0.4, "it must be told, since it would ask by itself half a second later"
