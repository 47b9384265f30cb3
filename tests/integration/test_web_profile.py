"""A database that cannot be reached: a web process is told so within seconds, and a worker goes on trying."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from broker_rig import PostgresServer, TcpProxy, running_proxy, running_server
from celery import Celery
from kombu.exceptions import OperationalError

from rhesis_tasks import BaseTask, TenantContext, launch_with_context, tenant_scope
from rhesis_tasks.errors import AnswerTimeoutError, DatabaseUnavailableError
from rhesis_tasks.processes import free_port, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import new_tenant_database, running_worker

if TYPE_CHECKING:
    from conftest import MakeApp

HERE = Path(__file__).parent
ACME = TenantContext("acme", "ann")
SOON = 14.0
"""Seconds: a refusal is known in less than one, silence after four for each of two attempts; and some to spare."""


def task_of(app: Celery) -> Any:
    @app.task(base=BaseTask, name="work", shared=False)
    def work() -> None: ...

    return work


def delay(task: Any) -> None:
    with tenant_scope(ACME):
        task.delay()


def launch(task: Any) -> None:
    launch_with_context(task, context=ACME)


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


# --- the ways in which a database is away: each returns a task whose next launch finds it so -----------------------

Away = Callable[[ExitStack, Callable[[str], Any]], Any]


def closed_port(_stack: ExitStack, task_on: Callable[[str], Any]) -> Any:
    """Nobody listens."""
    return task_on(f"postgresql://app:s3cret@127.0.0.1:{free_port()}/shop")


def silent_host(stack: ExitStack, task_on: Callable[[str], Any]) -> Any:
    """Somebody listens, and never says a word."""
    mute = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=20))
    return task_on(f"postgresql://app:s3cret@127.0.0.1:{mute.getsockname()[1]}/shop")


def stopped_server(stack: ExitStack, task_on: Callable[[str], Any]) -> Any:
    """It was there at the last launch, and is stopped."""
    server = stack.enter_context(running_server())
    database = stack.enter_context(new_tenant_database(server.url))
    task = task_on(database.url)
    delay(task)
    server.stop()
    stack.callback(server.start)  # for the database to be dropped
    return task


def cut_network(stack: ExitStack, task_on: Callable[[str], Any]) -> Any:
    """It was there at the last launch; the connection is reset, and there is no way to it any more."""
    task, proxy = launched_through_proxy(stack, task_on)
    proxy.refuse()
    return task


def lost_to_silence(stack: ExitStack, task_on: Callable[[str], Any]) -> Any:
    """The connection is reset, and whoever connects anew is not answered."""
    task, proxy = launched_through_proxy(stack, task_on)
    proxy.hold()
    proxy.cut()
    return task


def launched_through_proxy(stack: ExitStack, task_on: Callable[[str], Any]) -> tuple[Any, TcpProxy]:
    """A task that was launched once, and the proxy between it and the server."""
    server = stack.enter_context(running_server())
    database = stack.enter_context(new_tenant_database(server.url))
    proxy = stack.enter_context(running_proxy(server.port))
    url = database_url(database.url).set(drivername="postgresql", port=proxy.port)
    task = task_on(url.render_as_string(hide_password=False))
    delay(task)
    return task, proxy


@pytest.mark.newest_only
@pytest.mark.parametrize("start", [delay, launch])
@pytest.mark.parametrize("records", [True, False], ids=["with records", "without records"])
@pytest.mark.parametrize("away", [closed_port, silent_host, stopped_server, cut_network, lost_to_silence])
def test_a_web_process_is_told_within_seconds_that_the_database_is_away(
    away: Away, records: bool, start: Callable[[Any], None], make_app: MakeApp
) -> None:
    backend = {} if records else {"result_backend": "cache+memory://"}
    with ExitStack() as stack:
        task = away(stack, lambda url: task_of(make_app(url, broker_url=None, **backend)))
        began = time.monotonic()

        with pytest.raises((DatabaseUnavailableError, OperationalError)) as told:
            start(task)
        took = time.monotonic() - began

    expected = DatabaseUnavailableError if records else OperationalError  # Celery's own, around ours
    assert type(told.value) is expected
    assert records or isinstance(told.value.__cause__, DatabaseUnavailableError)
    assert "cannot connect to postgresql" in str(told.value)
    assert ("timeout expired" if away in (silent_host, lost_to_silence) else "127.0.0.1") in str(told.value)
    assert took < SOON


# --- the connection stays, and no answer comes ---------------------------------------------------------------------

WITHIN = 1.5  # seconds, in place of ten
BOUND = {"broker_transport_options": {"answer_timeout": WITHIN}}
BOUND_RECORDS = {"result_backend_transport_options": {"answer_timeout": WITHIN}}
NO_ANSWER = f"no answer within {WITHIN:g} seconds.*is not known"


def silence_server(stack: ExitStack, server: PostgresServer, _proxy: TcpProxy) -> None:
    """It is suspended."""
    server.suspend()
    stack.callback(server.resume)


def silence_proxy(stack: ExitStack, _server: PostgresServer, proxy: TcpProxy) -> None:
    """Nothing comes through to it, as if it were gone."""
    proxy.hold()
    stack.callback(proxy.flow)


@contextmanager
def promptly() -> Iterator[None]:
    """The block takes little longer than an answer is waited for."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert WITHIN <= took < WITHIN + 5


@pytest.mark.newest_only
@pytest.mark.parametrize("start", [delay, launch])
@pytest.mark.parametrize("records", [True, False], ids=["with records", "without records"])
@pytest.mark.parametrize("silence", [silence_server, silence_proxy])
def test_a_launch_that_is_not_answered_fails_once_and_its_message_is_not_taken_twice(
    silence: Any, records: bool, start: Callable[[Any], None], server: PostgresServer, make_app: MakeApp
) -> None:
    backend = {} if records else {"result_backend": "cache+memory://"}
    with new_tenant_database(server.url) as database, running_proxy(server.port) as proxy:
        url = database_url(database.url).set(drivername="postgresql", port=proxy.port)
        task = task_of(make_app(url.render_as_string(hide_password=False), broker_url=None, **BOUND, **backend))
        for _ in range(2):
            delay(task)  # the second time its statement is prepared

        with ExitStack() as stack:
            silence(stack, server, proxy)
            with pytest.raises((DatabaseUnavailableError, OperationalError), match=NO_ANSWER) as told, promptly():
                start(task)

        # What was sent is read once the server goes on.
        wait_until("the message to be taken", lambda: messages(database.owner) == 3)
        start(task)
        assert messages(database.owner) == 4
    assert type(told.value) is (AnswerTimeoutError if records else OperationalError)
    assert records or isinstance(told.value.__cause__, AnswerTimeoutError)


@pytest.mark.newest_only
def test_a_message_that_is_too_large_to_be_sent_at_once_keeps_nobody_waiting(
    server: PostgresServer, make_app: MakeApp
) -> None:
    with new_tenant_database(server.url) as database, ExitStack() as stack:
        app = make_app(database.url, broker_url=None, **BOUND)
        with tenant_scope(ACME):
            app.send_task("work")
            server.suspend()
            stack.callback(server.resume)

            with pytest.raises(AnswerTimeoutError, match=NO_ANSWER), promptly():
                app.send_task("work", ["x" * 30_000_000])


@pytest.mark.newest_only
@pytest.mark.parametrize("ask", ["get_record", "cancel_waiting", "list_records"])
def test_a_record_that_is_asked_for_in_vain_keeps_nobody_waiting(
    ask: str, server: PostgresServer, make_app: MakeApp
) -> None:
    with new_tenant_database(server.url) as database, ExitStack() as stack:
        app = make_app(database.url, broker_url=None, **BOUND_RECORDS)
        backend: Any = app.backend
        arguments = () if ask == "list_records" else ("no-such-id",)
        with tenant_scope(ACME):
            backend.list_records()
            server.suspend()
            stack.callback(server.resume)
            with pytest.raises(AnswerTimeoutError, match=NO_ANSWER), promptly():
                getattr(backend, ask)(*arguments)

            server.resume()
            assert not getattr(backend, ask)(*arguments)


@pytest.mark.newest_only
def test_a_launch_whose_record_is_elsewhere_fails_if_that_is_not_answered(
    server: PostgresServer, make_app: MakeApp
) -> None:
    with new_tenant_database(server.url) as database, ExitStack() as stack:
        task = task_of(make_app(database.url, broker_url="memory://", **BOUND_RECORDS))
        delay(task)
        server.suspend()
        stack.callback(server.resume)

        with pytest.raises(AnswerTimeoutError, match=NO_ANSWER), promptly():
            delay(task)


@pytest.mark.newest_only
@pytest.mark.parametrize("task", ["launching", "launching_at_once"])
def test_a_worker_waits_through_an_outage_that_a_web_process_is_told_of(
    task: str, server: PostgresServer, tmp_path: Path, make_app: MakeApp
) -> None:
    """Whether or not the process that runs the task had a connection before."""
    with new_tenant_database(server.url) as database:
        app = make_app(database.url, broker_url=None)
        environment = {"DATABASE_URL": database.url, "WEB_TASKS_NOTES": str(tmp_path)}
        with running_worker("web_tasks", cwd=HERE, concurrency=1, env=environment):
            with tenant_scope(ACME):
                app.send_task(f"web_tasks.{task}")
            wait_until("the task to begin", (tmp_path / "began").exists)

            server.stop()
            (tmp_path / "go").touch()
            wait_until("the task to launch the other one", (tmp_path / "launches").exists)
            with pytest.raises(DatabaseUnavailableError), tenant_scope(ACME):
                app.send_task("web_tasks.launched")
            time.sleep(6)  # many times what a web process tries
            server.start()

            wait_until("all messages to be done", lambda: messages(database.owner) == 0, timeout=60)

    assert (tmp_path / "launches").read_text() == "x"  # not tried again as a whole
    assert (tmp_path / "launched").read_text() == ("xx" if task == "launching" else "x")


def messages(owner: Any) -> int:
    """How many are left."""
    with owner.connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM rhesis_tasks.message").scalar())
