"""What goes wrong with the broker: who is told, in which words, how soon; and that nothing is lost on the way."""

from __future__ import annotations

import itertools
import os
import re
import select
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest
from broker_rig import PostgresServer, as_other_user, running_server
from celery import Celery
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import OperationalError
from kombu.message import Message
from sqlalchemy import text

import rhesis_tasks.postgres.connection
from rhesis_tasks import BaseTask, TenantContext, tenant_scope
from rhesis_tasks.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    MissingPrivilegeError,
    RhesisTasksError,
    SchemaError,
)
from rhesis_tasks.postgres.schema import VERSION, create_schema
from rhesis_tasks.processes import Child, child, free_port, python, wait_until
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

if TYPE_CHECKING:
    from conftest import MakeApp

TIMEOUT = 30
ACME = TenantContext("acme", "alice")


@pytest.fixture(scope="module")
def tenant_database(postgres_url: str) -> Iterator[TenantDatabase]:
    """One database on the embedded server, behind its unix socket, for all these tests."""
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server on a loopback port that asks everybody but its superuser for a password."""
    with running_server() as server:
        with psycopg.connect(server.url, autocommit=True) as superuser:
            rules = Path(setting(superuser, "hba_file"))
            rules.write_text("host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
            superuser.execute("SELECT pg_reload_conf()")
        yield server


def setting(superuser: psycopg.Connection[Any], name: str) -> str:
    (value,) = superuser.execute("SELECT current_setting(%s)", [name]).fetchone() or ("",)
    return str(value)


@pytest.fixture
def tcp(server: PostgresServer) -> Iterator[TenantDatabase]:
    """A new database on that server."""
    with new_tenant_database(server.url) as database:
        yield database


def as_superuser(database: TenantDatabase, statement: str) -> None:
    with database.admin.connect() as superuser:
        superuser.exec_driver_sql(statement)


def changed(given: TenantDatabase, **parts: Any) -> str:
    """The application's URL with other parts."""
    url = database_url(given.url).set(drivername="postgresql", **parts)
    return url.render_as_string(hide_password=False)


# --- what can be wrong with a database ---------------------------------------------------------------------------


class Trouble(NamedTuple):
    """Something that is wrong, and what the application is told."""

    make: Callable[[TenantDatabase], str]  #: returns the application's URL
    error: type[RhesisTasksError]
    says: str
    schema: str | None = None


def unreachable(database: TenantDatabase) -> str:
    return changed(database, port=free_port())


def no_such_socket(database: TenantDatabase) -> str:
    return changed(database, host=None, port=None, query={"host": "/nowhere"})


def wrong_password(database: TenantDatabase) -> str:
    return changed(database, password="s3cret-and-wrong")


def no_such_database(database: TenantDatabase) -> str:
    return changed(database, database="nowhere")


def read_only_login(database: TenantDatabase) -> str:
    as_superuser(database, f"ALTER ROLE {quote_identifier(database.role)} SET default_transaction_read_only = on")
    return database.url


def read_only_database(database: TenantDatabase) -> str:
    name = quote_identifier(database_url(database.url).database)
    as_superuser(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    return database.url


def not_granted(database: TenantDatabase) -> str:
    return changed(database, username=stranger(database))


def stranger(database: TenantDatabase) -> str:
    """A login without any grant, for as long as the database lives."""
    name, password = f"{database.role}_stranger", database_url(database.url).password
    as_superuser(database, f"CREATE ROLE {quote_identifier(name)} LOGIN PASSWORD '{password}'")
    return name


def healthy(database: TenantDatabase) -> str:
    return database.url


def newer(database: TenantDatabase) -> str:
    database.execute(f"UPDATE rhesis_tasks.schema_version SET version = {VERSION + 1}")
    return database.url


def older(database: TenantDatabase) -> str:
    database.execute(f"UPDATE rhesis_tasks.schema_version SET version = {VERSION - 1}")
    return database.url


UNAVAILABLE = {
    "unreachable": Trouble(unreachable, DatabaseUnavailableError, r"127\.0\.0\.1.*refused"),
    "no socket": Trouble(no_such_socket, DatabaseUnavailableError, "/nowhere.*No such file"),
    "wrong password": Trouble(wrong_password, DatabaseUnavailableError, "password authentication failed for user"),
    "no database": Trouble(no_such_database, DatabaseUnavailableError, 'database "nowhere" does not exist'),
    "read-only login": Trouble(read_only_login, DatabaseUnavailableError, "read-only.*primary"),
    "read-only database": Trouble(read_only_database, DatabaseUnavailableError, "read-only.*primary"),
}
MISCONFIGURED = {
    "not granted": Trouble(not_granted, MissingPrivilegeError, "rhesis-tasks schema create.*--role"),
    "missing schema": Trouble(healthy, MissingPrivilegeError, "'jobs'.*rhesis-tasks schema create", "jobs"),
    "newer schema": Trouble(newer, SchemaError, f"version {VERSION + 1}.*needs {VERSION}.*[Uu]pgrade rhesis-tasks"),
    "older schema": Trouble(older, SchemaError, f"version {VERSION - 1}.*needs {VERSION}.*rhesis-tasks schema create"),
}


@pytest.fixture
def trouble(request: pytest.FixtureRequest, tcp: TenantDatabase) -> Iterator[tuple[Trouble, str]]:
    """One of these, and the URL that leads there."""
    trouble: Trouble = request.param
    yield trouble, trouble.make(tcp)
    if trouble is UNAVAILABLE["read-only database"]:
        as_superuser(tcp, f"ALTER DATABASE {quote_identifier(database_url(tcp.url).database)} RESET ALL")
    if trouble is MISCONFIGURED["not granted"]:
        as_superuser(tcp, f"DROP ROLE {quote_identifier(f'{tcp.role}_stranger')}")


def each(troubles: dict[str, Trouble]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trouble", troubles.values(), ids=troubles, indirect=True)


def assert_no_password(said: str, url: str) -> None:
    password = database_url(url).password
    assert password and password not in said


def everything_said_by(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# --- launching ---------------------------------------------------------------------------------------------------


def task_of(app: Celery) -> Any:
    @app.task(base=BaseTask, name="work", shared=False)
    def work() -> None: ...

    return work


@each({**UNAVAILABLE, **MISCONFIGURED})
def test_a_launch_says_soon_what_is_wrong_with_the_database_and_never_the_password(
    trouble: tuple[Trouble, str], make_app: MakeApp
) -> None:
    expected, url = trouble
    task = task_of(make_app(url, broker_url=None, schema=expected.schema))
    started = time.monotonic()

    with pytest.raises(expected.error, match=f"(?s){expected.says}") as refused:
        launch(task)

    assert time.monotonic() - started < 10
    assert_no_password(everything_said_by(refused.value), url)


@each(UNAVAILABLE)
def test_a_launch_whose_broker_is_unavailable_is_celerys_operational_error(
    trouble: tuple[Trouble, str], make_app: MakeApp
) -> None:
    """What applications catch with any broker: ``except task.OperationalError``."""
    expected, url = trouble
    task = task_of(make_app(None, broker_url=url, result_backend="cache+memory://"))
    started = time.monotonic()

    with pytest.raises(task.OperationalError, match=f"(?s){expected.says}") as refused:
        launch(task)

    assert isinstance(refused.value.__cause__, DatabaseUnavailableError)
    assert time.monotonic() - started < 10
    assert_no_password(everything_said_by(refused.value), url)


@each(MISCONFIGURED)
def test_a_launch_whose_broker_is_misconfigured_is_not_tried_again(
    trouble: tuple[Trouble, str], make_app: MakeApp
) -> None:
    expected, url = trouble
    task = task_of(make_app(None, broker_url=url, result_backend="cache+memory://", schema=expected.schema))

    with pytest.raises(expected.error, match=f"(?s){expected.says}") as refused:
        launch(task)

    assert_no_password(everything_said_by(refused.value), url)


@pytest.mark.parametrize("records", [True, False], ids=["with records", "without records"])
def test_a_launch_gives_up_on_a_server_that_says_nothing(make_app: MakeApp, records: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, ThreadPoolExecutor(1) as thread:
        url = f"postgresql://app:s3cret@127.0.0.1:{mute.getsockname()[1]}/shop"
        backend = {} if records else {"result_backend": "cache+memory://"}
        task = task_of(make_app(url if records else None, broker_url=url, broker_connection_timeout=1, **backend))

        launched = thread.submit(launch, task)
        try:
            with mute.accept()[0]:
                wait_until("the first attempt to end", lambda: launched.done() or is_called(mute), timeout=10)
        finally:
            mute.close()  # further attempts fail at once
        error = launched.exception(TIMEOUT)

    assert isinstance(error, OperationalError | DatabaseUnavailableError)
    assert "s3cret" not in everything_said_by(error)


def is_called(server: socket.socket) -> bool:
    """Whether somebody waits to be accepted."""
    return bool(select.select([server], [], [], 0)[0])


def launch(task: Any) -> None:
    with tenant_scope(ACME):
        task.delay()


def test_a_connection_that_is_refused_for_its_schema_leaves_no_session(tcp: TenantDatabase) -> None:
    with Connection(newer(tcp)) as connection, pytest.raises(SchemaError):
        connection.connect()

    with tcp.owner.connect() as owner:
        mine = text("SELECT count(*) FROM pg_stat_activity WHERE usename = :role")
        wait_until("the session to end", lambda: owner.scalar(mine, {"role": tcp.role}) == 0, timeout=5)


def test_a_launch_succeeds_once_the_trouble_is_over(tcp: TenantDatabase, make_app: MakeApp) -> None:
    task = task_of(make_app(newer(tcp), broker_url=None))
    with pytest.raises(SchemaError):
        launch(task)
    tcp.execute(f"UPDATE rhesis_tasks.schema_version SET version = {VERSION}")

    launch(task)

    with tcp.owner.connect() as owner:
        assert owner.scalar(text("SELECT count(*) FROM rhesis_tasks.message")) == 1


def test_a_standby_is_refused_until_it_is_promoted(server: PostgresServer, tcp: TenantDatabase) -> None:
    with psycopg.connect(server.url) as superuser:
        signal = Path(setting(superuser, "data_directory"), "standby.signal")
    server.stop()
    signal.touch()
    if user := as_other_user():
        os.chown(signal, user["user"], user["group"])
    server.start()

    with Connection(tcp.url) as connection, pytest.raises(OperationalError, match=r"read-only: a standby.*primary"):
        connection.ensure_connection(max_retries=0, timeout=0.1)

    with psycopg.connect(server.url, autocommit=True) as superuser:
        assert superuser.execute("SELECT pg_promote()").fetchone() == (True,)
    with Connection(tcp.url) as connection:
        connection.Producer().publish("it is the primary now", routing_key="letters")


def test_a_login_that_only_launches_is_told_that_it_may_not_consume(tenant_database: TenantDatabase) -> None:
    create_schema(tenant_database.owner, schema="jobs", web_roles=[tenant_database.role])
    with Connection(f"{tenant_database.url}&schema=jobs") as connection:
        connection.Producer().publish("hello", routing_key="letters")

        with pytest.raises(MissingPrivilegeError, match=r"may not do this.*--role for logins that run .*workers"):
            connection.SimpleQueue("letters").get(timeout=1)


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grace", "poll_interval"])
def test_a_time_that_is_none_is_refused_by_the_name_of_its_option(
    tenant_database: TenantDatabase, make_app: MakeApp, name: str
) -> None:
    for value in (-1, 0, "x", "5", None, True, float("nan"), float("inf"), 1e9):
        task = task_of(make_app(broker_url=None, broker_transport_options={name: value}))

        with pytest.raises(ConfigurationError, match=f"'{name}'.* seconds, not {re.escape(repr(value))}"):
            launch(task)

    with tenant_database.owner.connect() as owner:
        assert owner.scalar(text("SELECT count(*) FROM rhesis_tasks.task_record")) == 0, "nothing was launched"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schema": "No Name"}, "schema 'No Name' is not a lower-case SQL name"),
        ({"listen_url": "redis://app:s3cret@host/0"}, "a database URL looks like postgresql://"),
        ({"listen_url": "s3cret"}, "a database URL looks like postgresql://"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(
    tenant_database: TenantDatabase, options: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        Connection(tenant_database.url, transport_options=options).connect()

    assert "s3cret" not in everything_said_by(refused.value)


def test_options_of_other_transports_are_passed_over(tenant_database: TenantDatabase) -> None:
    options = {"visibility_timeout": 3600, "max_retries": 3, "confirm_publish": True}

    with Connection(tenant_database.url, transport_options=options) as connection:
        connection.Producer().publish("hello", routing_key="letters")


# --- workers -----------------------------------------------------------------------------------------------------

SHOP = """
import os
from celery import Celery
from rhesis_tasks import BaseTask, configure

app = Celery("shop")
configure(app, schema=os.environ.get("SHOP_SCHEMA"))

@app.task(base=BaseTask, name="work")
def work():
    print("worked")
"""


def starting_worker(folder: Path, url: str, schema: str | None = None) -> Any:
    """A worker that may never become ready."""
    (folder / "shop.py").write_text(SHOP)
    command = python(
        *("-m", "celery", "-A", "shop", "worker", "--pool", "solo", "--loglevel", "INFO"),
        *("--without-gossip", "--without-mingle"),
    )
    environment = {"DATABASE_URL": url, "SHOP_SCHEMA": schema or "rhesis_tasks"}
    return child("a worker", command, env=environment, cwd=folder)


@each(MISCONFIGURED)
def test_a_worker_that_retrying_would_not_help_stops_and_says_why(trouble: tuple[Trouble, str], tmp_path: Path) -> None:
    expected, url = trouble

    with starting_worker(tmp_path, url, expected.schema) as worker:
        code = worker.process.wait(TIMEOUT)
        said = worker.finished_output()

    assert code != 0, said
    assert expected.error.__name__ in said
    assert_says(said, expected.says)
    assert_no_password(said, url)
    assert "CREATE TABLE" not in said, "what it says is lost in the text of a script"
    assert "Traceback" not in said


def assert_says(output: str, pattern: str) -> None:
    assert re.search(pattern, output), output


def test_a_worker_with_the_grants_of_a_web_server_stops_and_says_why(
    tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    create_schema(tenant_database.owner, schema="jobs", web_roles=[tenant_database.role])

    with starting_worker(tmp_path, tenant_database.url, "jobs") as worker:
        code = worker.process.wait(TIMEOUT)
        said = worker.finished_output()

    assert code != 0, said
    assert_says(said, "MissingPrivilegeError.*may not do this.*--role for logins that run")


def launch_and_wait(make_app: MakeApp, url: str, worker: Child) -> None:
    launch(task_of(make_app(url, broker_url=None)))
    worker.wait_for("worked", TIMEOUT)


def test_a_worker_that_is_started_before_its_server_waits_for_it(
    server: PostgresServer, tcp: TenantDatabase, make_app: MakeApp, tmp_path: Path
) -> None:
    server.stop()
    try:
        with starting_worker(tmp_path, tcp.url) as worker:
            worker.wait_for("Cannot connect to", TIMEOUT)
            assert_says(worker.output, rf"Cannot connect to postgresql://{tcp.role}:\*\*\*@.*refused")

            server.start()

            worker.wait_for(" ready.", TIMEOUT)
            launch_and_wait(make_app, tcp.url, worker)
        assert_no_password(worker.output, tcp.url)
    finally:
        if not server.running:
            server.start()


def test_a_worker_with_a_wrong_password_says_so_and_tries_again(
    tcp: TenantDatabase, make_app: MakeApp, tmp_path: Path
) -> None:
    url = wrong_password(tcp)

    with starting_worker(tmp_path, url) as worker:
        worker.wait_for("password authentication failed for user", TIMEOUT)
        as_superuser(tcp, f"ALTER ROLE {quote_identifier(tcp.role)} PASSWORD '{database_url(url).password}'")

        worker.wait_for(" ready.", TIMEOUT)
        launch_and_wait(make_app, url, worker)

    assert_no_password(worker.output, url)


# --- connections that are lost between any two statements --------------------------------------------------------


class Fault:
    """Ends the session of one of our connections, before or after the statement with a certain number.

    Before: the statement finds the connection dead.  After: it is carried out, and its answer is lost.
    """

    def __init__(self, database: TenantDatabase, at: int, when: str) -> None:
        self._database = database
        self._at = at
        self._when = when
        self._numbers = itertools.count()
        self._thread = threading.current_thread()  # the listener's statements come at times of their own
        self.statement = ""  #: which one it was

    def query(self, real: Callable[..., Any], connection: Any, sql: str, parameters: Any = (), **options: Any) -> Any:
        if threading.current_thread() is not self._thread or next(self._numbers) != self._at:
            return real(connection, sql, parameters, **options)
        self.statement = sql
        if self._when == "after":
            real(connection, sql, parameters, **options)
        ((pid,),) = real(connection, "SELECT pg_backend_pid()")
        with self._database.admin.connect() as superuser:
            assert superuser.scalar(text(f"SELECT pg_terminate_backend({pid}, {TIMEOUT * 1000})")) is True
        if self._when == "before":
            return real(connection, sql, parameters, **options)
        connection.close()
        raise DatabaseUnavailableError("the answer was lost")


BODIES = ("a", "b", "c")


class Life:
    """What becomes of three messages, the second of which is requeued once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.came: Counter[str] = Counter()
        self.exchange = Exchange("mail", type="topic")
        self.queue = Queue("life", self.exchange, "#")

    def take(self, body: str, message: Message) -> None:
        self.came[body] += 1
        if body == "b" and self.came["b"] == 1:
            message.requeue()
        else:
            message.ack()

    def is_over(self) -> bool:
        return self.came >= Counter(("a", "b", "b", "c"))

    def connection(self) -> Connection:
        return Connection(self.url, transport_options={"grace": 0.6, "poll_interval": 0.5})

    def publish(self, connection: Connection) -> None:
        """As Celery does: declared first, and tried again on a new connection."""
        policy = {"max_retries": 3, "interval_start": 0, "interval_step": 0.05, "interval_max": 0.1}
        for body in BODIES:
            Producer(connection).publish(
                body,
                exchange=self.exchange,
                routing_key=f"letter.{body}",
                declare=[self.queue],
                retry=True,
                retry_policy=policy,
            )

    def consume(self, connection: Connection, seconds: float = 5) -> None:
        """As Celery's worker does: after an error of the connection it begins anew."""
        deadline = time.monotonic() + seconds
        while not self.is_over():
            assert time.monotonic() < deadline, f"only these came: {dict(self.came)}"
            try:
                with Consumer(connection, [self.queue], callbacks=[self.take], prefetch_count=2):
                    while not self.is_over() and time.monotonic() < deadline:
                        with suppress(TimeoutError):
                            connection.drain_events(timeout=0.1)
            except connection.connection_errors:
                connection.close()

    def get(self, connection: Connection, seconds: float = 5) -> None:
        """One by one, without a consumer, over the same connection whatever happens."""
        deadline = time.monotonic() + seconds
        while not self.is_over():
            assert time.monotonic() < deadline, f"only these came: {dict(self.came)}"
            with suppress(*connection.connection_errors):
                message = self.queue(connection.default_channel).get()
                if message is not None:
                    self.take(message.payload, message)

    def take_what_is_left(self, database: TenantDatabase) -> None:
        """What others get later; of those that are gone without a word, after the grace period."""
        with (
            self.connection() as connection,
            Consumer(connection, [self.queue], callbacks=[self.take]),
            database.owner.connect() as owner,
        ):

            def nothing_is_left() -> bool:
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.05)
                return owner.scalar(text("SELECT count(*) FROM rhesis_tasks.message WHERE queue = 'life'")) == 0

            wait_until("all messages to be acknowledged", nothing_is_left, TIMEOUT)


@pytest.mark.parametrize("how", ["consume", "get"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_lost_when_the_connection_is_lost_at_any_statement(
    tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch, how: str, when: str
) -> None:
    real = rhesis_tasks.postgres.connection.Connection.query
    wrong: list[str] = []

    for at in itertools.count():
        life, fault = Life(tenant_database.url), Fault(tenant_database, at, when)
        try:
            with monkeypatch.context() as patch, life.connection() as connection:
                patch.setattr(
                    rhesis_tasks.postgres.connection.Connection,
                    "query",
                    lambda self, *args, fault=fault, **options: fault.query(real, self, *args, **options),
                )
                life.publish(connection)
                getattr(life, how)(connection)
            life.take_what_is_left(tenant_database)
        except Exception as error:
            wrong.append(f"{when} statement {at}, {fault.statement!r}: {error!r}")
            tenant_database.execute("DELETE FROM rhesis_tasks.message")
        else:
            again = life.came - Counter(("a", "b", "b", "c"))
            if again.total() > duplicates(fault.statement, when):
                wrong.append(f"{when} statement {at}, {fault.statement!r}: {dict(again)} came again")
        if not fault.statement:
            break

    assert at > 10
    assert not wrong, "\n".join(wrong)


def duplicates(statement: str, when: str) -> int:
    """How many messages may come twice when the connection is lost at a statement."""
    if ".publish(" in statement and when == "after":
        return 1  # the publisher cannot know that it was published
    if ".ack(" in statement and when == "before":
        return 2  # the connection was being closed, and gone before it could say what was done: the prefetch count
    return 0


def test_what_fails_only_when_it_is_committed_is_an_error(tenant_database: TenantDatabase) -> None:
    """The server's answer has rows then, and the error behind them: so it is too when it panics in a commit."""
    connection = rhesis_tasks.postgres.connection.Connection(database_url(tenant_database.owner_url), name="test")
    try:
        connection.query("CREATE TABLE only_one (id integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        insert = "INSERT INTO only_one VALUES (1) RETURNING id"
        assert connection.query(insert) == [(1,)]

        for _ in range(3):  # prepared or not
            with pytest.raises(psycopg.errors.UniqueViolation):
                connection.query(insert)
    finally:
        connection.close()
