"""The ready retry policies, on what they are for: a service, and transactions that get in each other's way."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import asyncpg
import psycopg
import pytest
from applications import application
from broker_rig import PostgresServer, running_server
from celery.result import AsyncResult
from kombu.utils.uuid import uuid
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.processes import wait_until
from rhesis_tasks.retry import is_transient_database_error
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database, running_worker

HERE = Path(__file__).parent
ACME = TenantContext("acme", "ann")
TIMEOUT = 60


# --- a service -------------------------------------------------------------------------------------------------

Answer = tuple[int, Callable[[], str] | None]
"""A status, and what its Retry-After says at that time."""


class Service:
    """Answers each path as it was told to, one answer after the other, and notes when it was asked."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._answers: dict[str, list[Answer]] = {}
        self._asked: dict[str, list[float]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, retry_after = outer._next(self.path)
                self.send_response(status)
                if retry_after is not None:
                    self.send_header("Retry-After", retry_after())
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"done")

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def _next(self, path: str) -> Answer:
        with self._lock:
            self._asked[path].append(time.monotonic())
            answers = self._answers[path]
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def answering(self, *answers: Answer) -> str:
        """A new URL; the last answer is given from then on."""
        path = f"/{uuid()}"
        with self._lock:
            self._answers[path], self._asked[path] = list(answers), []
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def gaps(self, url: str) -> list[float]:
        """Seconds between the requests for a URL."""
        with self._lock:
            asked = self._asked["/" + url.rpartition("/")[2]]
            return [later - earlier for earlier, later in itertools.pairwise(asked)]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    thread = Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


# --- the data, and the workers ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """The application's data, on a server of its own."""

    server: PostgresServer
    database: TenantDatabase

    def reset(self) -> None:
        """Two accounts with nothing on them."""
        role = self.database.role
        self.database.execute(
            "DROP TABLE IF EXISTS account",
            "CREATE TABLE account (organization_id text, id int, balance int, PRIMARY KEY (organization_id, id))",
            f'GRANT SELECT, INSERT, UPDATE ON account TO "{role}"',
            "INSERT INTO account VALUES ('acme', 0, 0), ('acme', 1, 0)",
            enable_rls("account", role=role, column_type="text"),
        )

    def balances(self) -> dict[int, int]:
        with psycopg.connect(self.superuser_url) as connection:
            return dict(connection.execute("SELECT id, balance FROM account").fetchall())

    @property
    def superuser_url(self) -> str:
        name = database_url(self.database.url).database
        return database_url(self.server.url).set(database=name, drivername="postgresql").render_as_string()


@pytest.fixture(scope="module")
def data() -> Iterator[Data]:
    with running_server() as server, new_tenant_database(server.url) as database:
        yield Data(server, database)


@dataclasses.dataclass
class Rig:
    """The application in this process, with a worker that works for it."""

    tasks: Any
    attempts_folder: Path

    def launch(self, task: str, *args: Any) -> AsyncResult[Any]:
        with tenant_scope(ACME):
            return getattr(self.tasks, task).delay(*args)

    def begun(self, result: AsyncResult[Any]) -> int:
        """How many attempts there were."""
        return len(list(self.attempts_folder.glob(f"{result.id}.[0-9]*")))

    def ended(self, result: AsyncResult[Any]) -> TaskRecord:
        """The record of a task once its state is final."""
        found: list[TaskRecord] = []

        def is_final() -> bool:
            with tenant_scope(ACME):
                record = self.tasks.app.backend.get_record(result.id)
            if record is not None and record.state in ("success", "failure"):
                found.append(record)
            return bool(found)

        wait_until(f"task {result.id} to end", is_final, TIMEOUT)
        assert self.begun(result) == found[0].retries + 1
        return found[0]

    def both(self, task: str) -> list[int]:
        """The retries of two tasks that meet, when both have ended well."""
        place = uuid()
        records = [self.ended(each) for each in [self.launch(task, place, number) for number in (0, 1)]]

        assert [record.state for record in records] == ["success", "success"]
        return sorted(record.retries for record in records)


@pytest.fixture(scope="module")
def tasks_and_env(
    postgres_url: str, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The tasks, and the environment that they need."""
    env = {"DATA_URL": data.database.url, "ATTEMPTS": str(tmp_path_factory.mktemp("attempts"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        with application(postgres_url, "retry_resource_tasks") as (tasks, database):
            yield tasks, {**env, "DATABASE_URL": database.url}


@pytest.fixture(scope="module", params=["prefork", "threads"])
def rig(request: pytest.FixtureRequest, tasks_and_env: tuple[Any, dict[str, str]]) -> Iterator[Rig]:
    """A worker in each pool."""
    tasks, env = tasks_and_env
    with running_worker("retry_resource_tasks", cwd=HERE, pool=request.param, env=env):
        yield Rig(tasks, Path(env["ATTEMPTS"]))


@pytest.fixture
def accounts(data: Data) -> Data:
    """The data, as it is at first."""
    data.reset()
    return data


# --- HTTP ------------------------------------------------------------------------------------------------------

WAYS = ["by_urllib", "by_requests", "by_aiohttp"]
OK: Answer = (200, None)


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [
        pytest.param(429, lambda: "1", id="429, seconds"),
        pytest.param(503, lambda: formatdate(time.time() + 2, usegmt=True), id="503, date"),
    ],
)
def test_a_service_is_not_asked_again_before_it_wants(
    rig: Rig, service: Service, status: int, retry_after: Callable[[], str]
) -> None:
    urls = {way: service.answering((status, retry_after), OK) for way in WAYS}
    records = [rig.ended(each) for each in [rig.launch(way, url) for way, url in urls.items()]]

    assert [(record.state, record.result, record.retries) for record in records] == [("success", "done", 1)] * 3
    for url in urls.values():
        (gap,) = service.gaps(url)
        assert gap >= 1


def test_a_service_that_fails_for_a_while_is_asked_until_it_answers(rig: Rig, service: Service) -> None:
    urls = {way: service.answering((503, None), (500, None), OK) for way in WAYS}
    records = [rig.ended(each) for each in [rig.launch(way, url) for way, url in urls.items()]]

    assert [(record.state, record.result, record.retries) for record in records] == [("success", "done", 2)] * 3
    assert [len(service.gaps(url)) for url in urls.values()] == [2, 2, 2]


def test_what_a_service_refuses_is_not_asked_for_again(rig: Rig, service: Service) -> None:
    urls = {way: service.answering((404, None), OK) for way in WAYS}
    records = [rig.ended(each) for each in [rig.launch(way, url) for way, url in urls.items()]]

    assert [(record.state, record.retries) for record in records] == [("failure", 0)] * 3
    assert [service.gaps(url) for url in urls.values()] == [[], [], []]


# --- transactions ----------------------------------------------------------------------------------------------


def test_of_two_transactions_in_a_deadlock_one_is_tried_again_and_both_end_well(rig: Rig, accounts: Data) -> None:
    assert rig.both("add_to_both") == [0, 1]
    assert accounts.balances() == {0: 2, 1: 2}


@pytest.mark.parametrize("task", ["add_to_one", "add_to_one_async"])
def test_of_two_transactions_that_change_one_row_one_is_tried_again_and_both_end_well(
    rig: Rig, accounts: Data, task: str
) -> None:
    assert rig.both(task) == [0, 1]
    assert accounts.balances() == {0: 2, 1: 0}


def test_of_two_transactions_that_overlook_each_other_one_is_tried_again_and_both_end_well(
    rig: Rig, accounts: Data
) -> None:
    accounts.database.execute("ALTER TABLE account NO FORCE ROW LEVEL SECURITY", "UPDATE account SET balance = 1")

    first, second = rig.both("add_the_sum")  # which may overlook the first a second time, as that one commits

    assert first == 0
    assert second >= 1
    assert sorted(accounts.balances().values()) == [1, 1, 2, 4]


def test_a_lock_that_is_not_to_be_had_is_tried_for_again(rig: Rig, accounts: Data) -> None:
    with closing(psycopg.connect(accounts.superuser_url)) as other:
        other.execute("SELECT * FROM account FOR UPDATE")
        result = rig.launch("add_unless_locked")
        wait_until("a second attempt", lambda: rig.begun(result) >= 2, TIMEOUT)
    record = rig.ended(result)

    assert record.state == "success"
    assert record.retries >= 1
    assert accounts.balances() == {0: 1, 1: 0}


def test_what_no_waiting_mends_is_not_tried_again(rig: Rig, accounts: Data) -> None:
    record = rig.ended(rig.launch("break_a_rule"))

    assert (record.state, record.retries) == ("failure", 0)
    assert record.error_type is not None and record.error_type.endswith("IntegrityError")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_that_goes_in_the_middle_is_waited_for(rig: Rig, accounts: Data, mode: str) -> None:
    result = rig.launch("add_slowly")
    wait_until("it to be in the middle", (rig.attempts_folder / f"{result.id}.added").exists, TIMEOUT)
    accounts.server.stop(mode)
    try:
        wait_until("an attempt without a database", lambda: rig.begun(result) >= 2, TIMEOUT)
    finally:
        accounts.server.start()
    record = rig.ended(result)

    assert record.state == "success", record.error_message
    assert record.retries >= 1
    assert accounts.balances() == {0: 1, 1: 0}


# --- what the drivers raise ------------------------------------------------------------------------------------


def raised(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


class ByPsycopg:
    """A connection, and what is asked on it."""

    @staticmethod
    def ask(url: str, *statements: str) -> None:
        with closing(psycopg.connect(url)) as connection:
            for statement in statements:
                connection.execute(statement)


class ByAsyncpg:
    @staticmethod
    def ask(url: str, *statements: str) -> None:
        async def ask() -> None:
            connection = await asyncpg.connect(url)
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                with suppress(asyncpg.InterfaceError):
                    await connection.close(timeout=10)

        asyncio.run(ask())


class BySqlalchemy:
    @staticmethod
    def ask(url: str, *statements: str) -> None:
        engine = create_engine(database_url(url), poolclass=NullPool)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))


class BySqlalchemyAndAsyncpg:
    @staticmethod
    def ask(url: str, *statements: str) -> None:
        engine = create_async_engine(database_url(url).set(drivername="postgresql+asyncpg"), poolclass=NullPool)

        async def ask() -> None:
            async with engine.begin() as connection:
                for statement in statements:
                    await connection.execute(text(statement))

        asyncio.run(ask())


@pytest.mark.parametrize("driver", [ByPsycopg, ByAsyncpg, BySqlalchemy, BySqlalchemyAndAsyncpg])
def test_each_driver_says_what_is_worth_another_attempt(accounts: Data, driver: Any) -> None:
    url = accounts.superuser_url
    role = accounts.database.role
    with closing(psycopg.connect(url)) as other:
        other.execute("SELECT * FROM account FOR UPDATE")
        locked = raised(lambda: driver.ask(url, "SELECT * FROM account FOR UPDATE NOWAIT"))
    with closing(psycopg.connect(url, autocommit=True)) as other:
        other.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT 0')
        too_many = raised(lambda: driver.ask(accounts.database.url))
        other.execute(f'ALTER ROLE "{role}" CONNECTION LIMIT -1')
    ended = raised(lambda: driver.ask(url, "SELECT pg_terminate_backend(pg_backend_pid())"))
    lost = raised(lambda: driver.ask(url, "SELECT 1", "SELECT pg_terminate_backend(pg_backend_pid())", "SELECT 1"))
    missing = raised(lambda: driver.ask(url, "SELECT * FROM missing"))
    cancelled = raised(lambda: driver.ask(url, "SET statement_timeout = 1", "SELECT pg_sleep(10)"))
    accounts.server.stop("fast")
    try:
        gone = raised(lambda: driver.ask(url, "SELECT 1"))
    finally:
        accounts.server.start()

    for error in (locked, too_many, ended, lost, gone):
        assert is_transient_database_error(error), repr(error)
    for error in (missing, cancelled):
        assert not is_transient_database_error(error), repr(error)
