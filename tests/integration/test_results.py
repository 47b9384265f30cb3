"""PostgreSQL as the result backend: one record for each task, moved by the table of states, seen by its tenant only."""

from __future__ import annotations

import pickle
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery, chain, chord
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import AsyncResult, GroupResult
from celery.states import EXCEPTION_STATES
from kombu.exceptions import OperationalError as BrokerUnavailable
from record_statements import noted_statements
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import ProgrammingError

from rhesis_tasks import (
    BaseTask,
    TenantContext,
    current_tenant,
    launch_with_context,
    register_context_var,
    tenant_scope,
)
from rhesis_tasks.errors import DatabaseUnavailableError, MissingTenantError
from rhesis_tasks.headers import HEADER, Envelope, capture, encode
from rhesis_tasks.postgres.engines import run, shared_engine
from rhesis_tasks.postgres.results import PostgresBackend, TaskRecord
from rhesis_tasks.postgres.schema import RECORDS_SETTING, create_schema
from rhesis_tasks.processes import free_port, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.states import UNFINISHED, State, to_celery
from rhesis_tasks.testing import TenantDatabase
from rhesis_tasks.variables import unregister_context_var

if TYPE_CHECKING:
    from conftest import MakeApp

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "bob")


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    """A configured application with one task that needs a tenant and one that does not."""
    return with_tasks(make_app())


def with_tasks(app: Celery) -> Celery:
    @app.task(base=BaseTask, name="work", shared=False)
    def work(value: Any = None) -> None: ...

    @app.task(name="plain", shared=False)
    def plain() -> None: ...

    return app


@pytest.fixture
def backend(app: Celery) -> PostgresBackend:
    assert isinstance(app.backend, PostgresBackend)
    return app.backend


@pytest.fixture
def application(tenant_database: TenantDatabase) -> Iterator[Engine]:
    """An engine of the application's role, with nothing of ours on it."""
    engine = create_engine(database_url(tenant_database.url), pool_size=1, max_overflow=0, pool_timeout=10)
    yield engine
    engine.dispose()


# Those that Celery stores under a name of their own.
STORED = [State.QUEUED, State.STARTED, State.RETRY, State.SUCCESS, State.FAILURE, State.REVOKED]


def message(tenant: TenantContext | None, task_id: str, **attributes: Any) -> Context:
    """The request of a task as a worker makes it of a message that carries the tenant."""
    header = {HEADER: encode(Envelope(tenant))} if tenant else {}
    return Context({"id": task_id, "task": "work", "retries": 0, **header, **attributes})


def outcome(state: str, value: str) -> Any:
    """What Celery stores with a state: an exception or a value."""
    return ValueError(value) if state in EXCEPTION_STATES else value


def scope(tenant: TenantContext | None) -> AbstractContextManager[object]:
    return tenant_scope(tenant) if tenant else nullcontext()


def record_of(backend: PostgresBackend, tenant: TenantContext, task_id: str) -> TaskRecord:
    with tenant_scope(tenant):
        record = backend.get_record(task_id)
    assert record is not None, f"{tenant} has no record of {task_id}"
    return record


def rows(database: TenantDatabase, query: str = "SELECT organization_id, task_id FROM rhesis_tasks.task_record") -> Any:
    """What is really in the tables: their owner sees the rows of all."""
    with database.owner.connect() as connection:
        return sorted(tuple(row) for row in connection.execute(text(query)))


# --- error callbacks -----------------------------------------------------------------------------------------------


def test_an_error_callback_is_called_for_whom_it_was_bound_to(app: Celery, backend: PostgresBackend) -> None:
    called: list[tuple[str | None, str | None]] = []
    trace = ContextVar[str | None]("trace", default=None)
    register_context_var(trace)

    @app.task(base=BaseTask, shared=False)
    def on_error(request: Any, exception: Any, traceback: Any) -> None:
        tenant = current_tenant()
        called.append((tenant and tenant.organization_id, trace.get()))

    try:
        with tenant_scope(GLOBEX):
            own = trace.set("globex's")
            bound = on_error.s().set(headers={HEADER: encode(capture())})
            trace.reset(own)
        backend.mark_as_failure(
            "failed", ValueError("broken"), request=message(ACME, "failed", errbacks=[on_error.s(), bound])
        )
    finally:
        unregister_context_var(trace)

    assert called == [("acme", None), ("globex", "globex's")]
    assert current_tenant() is None


def test_what_parts_have_returned_is_forgotten_with_their_group(
    backend: PostgresBackend, tenant_database: TenantDatabase
) -> None:
    tenant_database.execute("SELECT rhesis_tasks.chord_size('acme', 'group', 2, 0)")
    tenant_database.execute("SELECT rhesis_tasks.chord_part_ended('acme', 'group', 'part', 0, 'SUCCESS', 'secret')")
    assert rows(tenant_database, "SELECT task_id FROM rhesis_tasks.chord_part") == [("part",)]

    with tenant_scope(ACME):
        backend.delete_group("group")

    assert rows(tenant_database, "SELECT task_id FROM rhesis_tasks.chord_part") == []


# --- launching ---------------------------------------------------------------------------------------------------


def test_a_launch_is_on_record_before_any_worker_has_seen_it(app: Celery, backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        task_id = app.tasks["work"].delay().id

    record = record_of(backend, ACME, task_id)
    assert (record.task_id, record.name, record.state) == (task_id, "work", State.QUEUED)
    assert (record.organization_id, record.user_id, record.root_id, record.parent_id) == (
        "acme",
        "alice",
        task_id,
        None,
    )
    assert record.launched_at.tzinfo is not None
    assert (record.started_at, record.finished_at, record.result, record.error_type) == (None, None, None, None)


def test_a_task_that_ignores_its_result_has_no_record(app: Celery, tenant_database: TenantDatabase) -> None:
    with tenant_scope(ACME):
        app.tasks["work"].apply_async(ignore_result=True)

    assert rows(tenant_database) == []


def whole(app: Celery, kind: str, *, last: str = "work", **options: Any) -> Any:
    """A chain or chord that ends in a task."""
    part, end = app.signature("work", immutable=True), app.signature(last, immutable=True, options=options)
    return chain(part, end, app=app) if kind == "chain" else chord([part], end, app=app)


@pytest.mark.parametrize("kind", ["chain", "chord"])
@pytest.mark.parametrize("by", ["the task", "its signature", "the launch", "the setting", "the setting, by name"])
def test_what_ends_in_a_task_that_ignores_its_result_has_no_record(
    make_app: MakeApp, tenant_database: TenantDatabase, kind: str, by: str
) -> None:
    app = with_tasks(make_app(task_ignore_result=by.startswith("the setting")))

    @app.task(base=BaseTask, name="quiet", shared=False, ignore_result=True)
    def quiet() -> None: ...

    last = {"the task": "quiet", "the setting, by name": "another's"}.get(by, "work")
    ignored = whole(app, kind, last=last, **({"ignore_result": True} if by == "its signature" else {}))
    result = launch_with_context(ignored, context=ACME, options={"ignore_result": True} if by == "the launch" else None)

    assert ("acme", result.id) not in rows(tenant_database)


@pytest.mark.parametrize("kind", ["chain", "chord"])
@pytest.mark.parametrize("stored", [False, True])
def test_what_runs_eagerly_is_on_record_as_it_has_ended_or_not_at_all(
    make_app: MakeApp, tenant_database: TenantDatabase, kind: str, stored: bool
) -> None:
    app = with_tasks(make_app(task_always_eager=True, task_store_eager_result=stored))

    @app.task(base=BaseTask, name="end", shared=False)
    def end() -> str:
        return "the end"

    result = launch_with_context(whole(app, kind, last="end"), context=ACME)

    found = rows(tenant_database, "SELECT name, task_id, state FROM rhesis_tasks.task_record WHERE name <> 'work'")
    assert found == ([("end", result.id, "success")] if stored else [])


@pytest.mark.parametrize("kind", ["chain", "chord"])
@pytest.mark.parametrize("options", [{"countdown": 3600}, {"eta": datetime.now(UTC) + timedelta(hours=1)}])
def test_a_chain_or_chord_that_is_not_to_be_begun_yet_is_delayed(
    app: Celery, backend: PostgresBackend, kind: str, options: dict[str, Any]
) -> None:
    result = launch_with_context(whole(app, kind), context=ACME, options=options)

    record = record_of(backend, ACME, result.id)
    assert record.state == State.DELAYED
    assert record.eta is not None and timedelta(minutes=50) < record.eta - datetime.now(UTC) < timedelta(minutes=61)


def test_arguments_are_not_stored(app: Celery, tenant_database: TenantDatabase) -> None:
    with tenant_scope(ACME):
        app.tasks["work"].delay("the quick brown fox")

    (row,) = rows(tenant_database, "SELECT row_to_json(r)::text FROM rhesis_tasks.task_record AS r")
    assert "work" in row[0] and "fox" not in row[0]


def test_launching_an_id_again_leaves_a_finished_record_as_it_is(backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        assert backend.record_launch("one", "work") is True
        backend.store_result("one", 42, "SUCCESS")

        assert backend.record_launch("one", "work") is False

    record = record_of(backend, ACME, "one")
    assert (record.state, record.result) == (State.SUCCESS, 42)


@pytest.fixture
def app_without_broker(make_app: MakeApp) -> Celery:
    """An application whose broker does not answer, and is not waited for."""
    return with_tasks(
        make_app(
            broker_url=f"amqp://guest:guest@127.0.0.1:{free_port()}//",
            broker_transport_options={"max_retries": 0, "interval_start": 0, "interval_step": 0},
        )
    )


def test_a_failed_publish_takes_the_record_back(app_without_broker: Celery, tenant_database: TenantDatabase) -> None:
    with tenant_scope(ACME), pytest.raises(BrokerUnavailable):
        app_without_broker.tasks["work"].apply_async(retry=False)

    assert rows(tenant_database) == []


def test_a_failed_publish_of_a_chain_takes_all_records_back(
    app_without_broker: Celery, tenant_database: TenantDatabase
) -> None:
    work = app_without_broker.tasks["work"]

    with pytest.raises(BrokerUnavailable):
        launch_with_context(chain(work.si(1), work.si(2)), context=ACME, options={"retry": False})

    assert rows(tenant_database) == []


def test_a_failed_publish_leaves_a_record_that_was_there_before(app_without_broker: Celery) -> None:
    backend = app_without_broker.backend
    with tenant_scope(ACME):
        backend.store_result("one", 42, "SUCCESS")

        with pytest.raises(BrokerUnavailable):
            app_without_broker.tasks["work"].apply_async(task_id="one", retry=False)

    assert record_of(backend, ACME, "one").result == 42


# --- running -----------------------------------------------------------------------------------------------------


def test_a_task_goes_from_launch_to_success(app: Celery, backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        task_id = app.tasks["work"].delay().id
    request = message(
        ACME, task_id, hostname="celery@here", delivery_info={"routing_key": "slow"}, root_id="root", parent_id="parent"
    )

    backend.store_result(task_id, {"pid": 1}, "STARTED", request=request)
    started = record_of(backend, ACME, task_id)
    request.retries = 2
    backend.store_result(task_id, {"answer": 42}, "SUCCESS", request=request)
    done = record_of(backend, ACME, task_id)

    assert (started.state, started.finished_at, started.result) == (State.STARTED, None, None)
    assert (started.queue, started.worker) == ("slow", "celery@here")
    assert (done.state, done.result, done.retries) == (State.SUCCESS, {"answer": 42}, 2)
    assert (done.name, done.user_id, done.root_id, done.parent_id) == ("work", "alice", "root", "parent")
    assert done.launched_at == started.launched_at
    assert done.started_at == started.started_at
    assert started.started_at is not None and done.finished_at is not None
    assert done.launched_at <= started.started_at <= done.finished_at


def test_the_database_moves_a_record_exactly_where_the_table_of_states_allows(backend: PostgresBackend) -> None:
    moved: dict[tuple[State, State], bool] = {}

    with tenant_scope(ACME):
        for before in STORED:
            for after in STORED:
                task_id = f"{before}-{after}"
                backend.store_result(task_id, outcome(to_celery(before), "before"), to_celery(before))
                backend.store_result(task_id, outcome(to_celery(after), "after"), to_celery(after))
                meta = backend.get_task_meta(task_id)
                moved[before, after] = meta["status"] == to_celery(after) and "after" in str(meta["result"])

    assert moved == {(before, after): before in UNFINISHED for before in STORED for after in STORED}


@pytest.mark.parametrize("late", ["STARTED", "RETRY", "FAILURE", "REVOKED", "SUCCESS", "PROGRESS"])
def test_a_late_writer_never_overwrites_a_success(backend: PostgresBackend, late: str) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", "the result", "SUCCESS")
        first = backend.get_record("one")

        backend.store_result("one", outcome(late, "late"), late, traceback="Traceback", request=message(ACME, "one"))

        assert backend.get_record("one") == first
        assert backend.get_task_meta("one")["status"] == "SUCCESS"


def test_a_start_that_comes_after_a_failure_is_ignored(backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", ValueError("bad"), "FAILURE", traceback="Traceback")

        backend.store_result("one", None, "STARTED")

    record = record_of(backend, ACME, "one")
    assert (record.state, record.error_type, record.error_message) == (State.FAILURE, "ValueError", "bad")
    assert record.traceback == "Traceback"


def test_a_success_after_retries_keeps_no_error(backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", ValueError("bad"), "RETRY", "Traceback", message(ACME, "one", retries=1))
        waiting = backend.get_record("one")
        backend.store_result("one", "good", "SUCCESS", request=message(ACME, "one", retries=1))
        done = backend.get_record("one")

    assert waiting is not None and done is not None
    assert (waiting.state, waiting.error_type, waiting.retries) == (State.RETRY, "ValueError", 1)
    assert (done.state, done.error_type, done.error_message, done.traceback) == (State.SUCCESS, None, None, None)
    assert (done.result, done.retries) == ("good", 1)


def test_an_applications_own_state_is_a_running_tasks(app: Celery, backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        result = app.tasks["work"].delay()

        app.tasks["work"].update_state(task_id=result.id, state="PROGRESS", meta={"done": 3, "total": 10})

        assert (result.state, result.info, result.ready()) == ("PROGRESS", {"done": 3, "total": 10}, False)
        progress = backend.get_record(result.id)
        backend.store_result(result.id, "good", "SUCCESS")
        done = backend.get_record(result.id)
        assert result.state == "SUCCESS"
    assert progress is not None and done is not None
    assert (progress.state, progress.custom_state, progress.result) == (State.STARTED, "PROGRESS", None)
    assert (done.state, done.custom_state, done.result) == (State.SUCCESS, None, "good")


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "ünïcode\0", [1, [2, {"three": 3.5}]], {"a": {"b": []}}, uuid.UUID(int=7)])
def test_a_result_comes_back_as_it_was(app: Celery, backend: PostgresBackend, value: Any) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", value, "SUCCESS")

        record = backend.get_record("one")
        assert record is not None and record.result == value
        assert app.AsyncResult("one").get(timeout=5) == value


def test_celerys_handle_knows_what_the_record_knows(app: Celery, backend: PostgresBackend) -> None:
    request = message(ACME, "one", hostname="celery@here", delivery_info={"routing_key": "slow"}, retries=1)
    request.children.append(app.AsyncResult("child"))
    backend.store_result("one", 42, "SUCCESS", request=request)

    with tenant_scope(ACME):
        result = app.AsyncResult("one")
        record = backend.get_record("one")

        assert record is not None
        assert (result.state, result.result, result.name) == ("SUCCESS", 42, "work")
        assert (result.worker, result.queue, result.retries) == ("celery@here", "slow", 1)
        assert result.date_done == record.finished_at
        assert [child.id for child in result.children] == ["child"]


@pytest.mark.parametrize("error", [ValueError("bad", 7), KeyError("key"), MissingTenantError("no tenant")])
def test_an_exception_is_raised_again_with_its_type(app: Celery, backend: PostgresBackend, error: Exception) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", error, "FAILURE", traceback="Traceback (most recent call last)")
        result = app.AsyncResult("one")

        with pytest.raises(type(error)) as raised:
            result.get(timeout=5)

        assert type(raised.value) is type(error)
        assert raised.value.args == error.args
        assert result.traceback == "Traceback (most recent call last)"
    record = record_of(backend, ACME, "one")
    assert (record.state, record.error_type) == (State.FAILURE, type(error).__name__)
    assert all(str(part) in str(record.error_message) for part in error.args)


@pytest.mark.parametrize("character", ["\0", "\ud800"], ids=["NUL", "lone surrogate"])
def test_a_failure_with_characters_that_no_text_column_holds_is_stored(
    backend: PostgresBackend, character: str
) -> None:
    backend.store_result(
        "one", ValueError(f"bad {character} byte"), "FAILURE", f"Traceback {character}", message(ACME, "one")
    )

    record = record_of(backend, ACME, "one")
    assert (record.state, record.error_type) == (State.FAILURE, "ValueError")
    assert str(record.error_message).startswith("bad ")


def test_a_stored_pickle_is_not_unpickled(
    app: Celery, backend: PostgresBackend, tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "pwned",)

    with tenant_scope(ACME):
        backend.store_result("one", 42, "SUCCESS")
    with tenant_database.owner.begin() as connection:
        connection.execute(text("UPDATE rhesis_tasks.task_record SET result = :p"), {"p": pickle.dumps(Attack())})

    with tenant_scope(ACME):
        for read in (lambda: backend.get_record("one"), lambda: app.AsyncResult("one").result):
            with suppress(Exception):
                read()

    assert not (tmp_path / "pwned").exists()


def test_a_killed_connection_in_the_pool_is_not_noticed(
    backend: PostgresBackend, tenant_database: TenantDatabase
) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", 42, "SUCCESS")
        with tenant_database.owner.connect() as connection:
            pids = "SELECT pid FROM pg_stat_activity WHERE usename = :role"
            before = connection.scalars(text(pids), {"role": tenant_database.role}).all()
    application = create_engine(database_url(tenant_database.url))
    with application.connect() as connection:
        for pid in before:
            assert connection.scalar(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    application.dispose()

    assert before
    assert record_of(backend, ACME, "one").result == 42


# --- other tenants -----------------------------------------------------------------------------------------------


def test_another_tenants_task_is_as_unknown_as_one_that_never_was(app: Celery, backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        task_id = app.tasks["work"].delay().id
        backend.store_result(task_id, "secret", "SUCCESS")

    with tenant_scope(GLOBEX):
        foreign, unknown = backend.get_task_meta(task_id), backend.get_task_meta("never was")

        assert backend.get_record(task_id) is None
        assert {**foreign, "task_id": "never was"} == unknown
        assert app.AsyncResult(task_id).state == "PENDING"
        assert backend.task_result_exists(task_id) is False


def test_a_result_that_its_owner_has_read_is_not_in_a_cache_for_others(make_app: MakeApp) -> None:
    app = make_app(result_cache_max=100)  # the application asks for Celery's cache, which knows no tenants
    backend = app.backend
    with tenant_scope(ACME):
        backend.store_result("one", "secret", "SUCCESS")
        GroupResult("group", [app.AsyncResult("one")]).save(backend=backend)
        assert app.AsyncResult("one").get(timeout=5) == "secret"
        assert GroupResult.restore("group", backend=backend) is not None
        backend.reload_task_result("one")
        backend.reload_group_result("group")

    assert app.backend is backend, "the test needs the same backend object"
    with tenant_scope(GLOBEX):
        assert (app.AsyncResult("one").state, app.AsyncResult("one").result) == ("PENDING", None)
        assert GroupResult.restore("group", backend=backend) is None
    with pytest.raises(MissingTenantError):
        _ = app.AsyncResult("one").state
    assert GroupResult.restore("group", backend=backend) is None


def test_one_task_id_of_two_tenants_is_two_records(
    app: Celery, backend: PostgresBackend, tenant_database: TenantDatabase
) -> None:
    for tenant in (ACME, GLOBEX):
        with tenant_scope(tenant):
            app.tasks["work"].apply_async(task_id="one")
    backend.store_result("one", "acme's", "SUCCESS", request=message(ACME, "one"))
    backend.store_result("one", ValueError("globex's"), "FAILURE", request=message(GLOBEX, "one"))

    assert rows(tenant_database) == [("acme", "one"), ("globex", "one")]
    assert record_of(backend, ACME, "one").result == "acme's"
    assert record_of(backend, GLOBEX, "one").error_message == "globex's"


def test_a_result_belongs_to_the_tenant_of_the_message_whoever_stores_it(backend: PostgresBackend) -> None:
    with tenant_scope(GLOBEX):
        backend.store_result("one", 1, "SUCCESS", request=message(ACME, "one"))
    backend.store_result("two", 2, "SUCCESS", request=message(ACME, "two"))

    assert record_of(backend, ACME, "one").result == 1
    assert record_of(backend, ACME, "two").result == 2
    with tenant_scope(GLOBEX):
        assert backend.get_record("one") is None


def test_a_failure_with_a_header_that_nobody_can_read_belongs_to_no_tenant(
    backend: PostgresBackend, tenant_database: TenantDatabase
) -> None:
    request = Context({"id": "one", "task": "work", HEADER: {"v": 99, "organization_id": "acme"}})

    with tenant_scope(ACME):
        backend.store_result("one", ValueError("no such version"), "FAILURE", request=request)

    assert rows(tenant_database) == [("", "one")]


def test_threads_of_two_tenants_never_read_each_others_result(app: Celery) -> None:
    threads, operations = 4, 40
    start = threading.Barrier(threads, timeout=30)

    def work(number: int) -> list[Any]:
        tenant = (ACME, GLOBEX)[number % 2]
        start.wait()
        wrong = []
        for count in range(operations):
            with tenant_scope(tenant):
                app.backend.store_result(f"task {count}", tenant.organization_id, "SUCCESS")
                value = app.AsyncResult(f"task {count}").result
            if value != tenant.organization_id:
                wrong.append((tenant, count, value))
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        wrong = [one for found in pool.map(work, range(threads), timeout=60) for one in found]

    assert wrong == []


# --- no tenant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda result: result.state,
        lambda result: result.ready(),
        lambda result: result.get(timeout=30),
        lambda result: result.backend.get_record(result.id),
    ],
    ids=["state", "ready", "get", "get_record"],
)
@pytest.mark.parametrize("task_id", ["one", "never was"])
def test_without_a_tenant_a_lookup_is_an_error_not_an_endless_wait(
    app: Celery, backend: PostgresBackend, task_id: str, read: Callable[[AsyncResult[Any]], Any]
) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", 42, "SUCCESS")

    with pytest.raises(MissingTenantError, match="tenant_scope"):
        read(app.AsyncResult(task_id))


def test_a_task_without_a_tenant_is_visible_without_a_tenant_only(
    app: Celery, backend: PostgresBackend, tenant_database: TenantDatabase
) -> None:
    result = app.tasks["plain"].delay()
    queued = result.state
    backend.store_result(result.id, 42, "SUCCESS", request=message(None, result.id))

    assert (queued, result.get(timeout=5)) == ("PENDING", 42)
    with tenant_scope(ACME):
        assert app.AsyncResult(result.id).state == "PENDING"
        assert backend.get_record(result.id) is None
    assert rows(tenant_database) == [("", result.id)]


# --- forgetting and expiry ---------------------------------------------------------------------------------------


def test_only_its_tenant_can_forget_a_result(app: Celery, backend: PostgresBackend) -> None:
    with tenant_scope(ACME):
        backend.store_result("one", 42, "SUCCESS")

    with tenant_scope(GLOBEX):
        app.AsyncResult("one").forget()
    app.AsyncResult("one").forget()
    kept = record_of(backend, ACME, "one").result
    with tenant_scope(ACME):
        app.AsyncResult("one").forget()
        gone = backend.get_record("one")

    assert (kept, gone) == (42, None)


def results_of_long_ago(app: Celery, database: TenantDatabase) -> None:
    """For two tenants and for none: an old and a new success, an old unfinished task, an old and a new group."""
    for tenant in (ACME, GLOBEX, None):
        for task_id, state in (("old", "SUCCESS"), ("new", "SUCCESS"), ("old but running", "STARTED")):
            app.backend.store_result(task_id, 42, state, request=message(tenant, task_id))
        with scope(tenant):
            for group_id in ("old", "new"):
                GroupResult(group_id, [app.AsyncResult("one")]).save(backend=app.backend)
    database.execute(
        "UPDATE rhesis_tasks.task_record SET launched_at = now() - interval '9 days', "
        "started_at = now() - interval '9 days' WHERE task_id ^@ 'old'",
        "UPDATE rhesis_tasks.task_record SET finished_at = now() - interval '8 days' WHERE task_id = 'old'",
        "UPDATE rhesis_tasks.group_record SET created_at = now() - interval '8 days' WHERE group_id = 'old'",
    )


GROUPS = "SELECT organization_id, group_id FROM rhesis_tasks.group_record"
ORGANIZATIONS = ("", "acme", "globex")


def test_cleaning_up_removes_what_expired_of_all_tenants_and_nothing_else(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    results_of_long_ago(app, tenant_database)

    with tenant_scope(GLOBEX):  # whoever happens to be active
        app.backend.cleanup()

    assert rows(tenant_database) == sorted((o, t) for o in ORGANIZATIONS for t in ("new", "old but running"))
    assert rows(tenant_database, GROUPS) == [(organization, "new") for organization in ORGANIZATIONS]


@pytest.mark.parametrize(("column", "is_kept"), [("eta", True), ("last_started_at", True), ("launched_at", False)])
def test_a_task_that_has_not_ended_is_kept_for_thirty_days_after_it_was_to_begin(
    app: Celery, tenant_database: TenantDatabase, column: str, is_kept: bool
) -> None:
    with tenant_scope(ACME):
        app.backend.record_launch("one", "work")
    tenant_database.execute(
        "UPDATE rhesis_tasks.task_record SET launched_at = now() - interval '40 days'",
        f"UPDATE rhesis_tasks.task_record SET {column} = now() - interval '{20 if is_kept else 40} days'",
    )

    app.backend.cleanup()

    assert rows(tenant_database) == [("acme", "one")] * is_kept


def test_celerys_own_task_cleans_up(app: Celery, tenant_database: TenantDatabase) -> None:
    results_of_long_ago(app, tenant_database)

    app.tasks["celery.backend_cleanup"]()

    assert ("acme", "old") not in rows(tenant_database)


@pytest.mark.parametrize("never", [None, 0])
def test_results_that_never_expire_are_not_cleaned_up(
    make_app: MakeApp, tenant_database: TenantDatabase, never: int | None
) -> None:
    app = make_app(result_expires=never)
    results_of_long_ago(app, tenant_database)
    before = rows(tenant_database), rows(tenant_database, GROUPS)

    app.backend.cleanup()

    assert (rows(tenant_database), rows(tenant_database, GROUPS)) == before


# --- groups ------------------------------------------------------------------------------------------------------


def test_a_group_is_saved_restored_and_deleted_by_its_tenant_only(app: Celery, backend: PostgresBackend) -> None:
    def restored(tenant: TenantContext | None) -> list[str] | None:
        with scope(tenant):
            group = GroupResult.restore("group", backend=backend)
        return None if group is None else [result.id for result in group.results]

    with tenant_scope(ACME):
        GroupResult("group", [app.AsyncResult("one"), app.AsyncResult("two")]).save(backend=backend)
        assert restored(ACME) == ["one", "two"]
    seen_by_others = restored(GLOBEX), restored(None)
    for other in (GLOBEX, None):
        with scope(other):
            backend.delete_group("group")
    kept = restored(ACME)
    with tenant_scope(ACME):
        backend.delete_group("group")

    assert (seen_by_others, kept, restored(ACME)) == ((None, None), ["one", "two"], None)


def test_one_group_id_of_two_tenants_is_two_groups(app: Celery, backend: PostgresBackend) -> None:
    for tenant, members in ((ACME, ["a"]), (GLOBEX, ["g"]), (ACME, ["a", "a2"])):
        with tenant_scope(tenant):
            GroupResult("group", [app.AsyncResult(member) for member in members]).save(backend=backend)

    with tenant_scope(ACME):
        of_acme = GroupResult.restore("group", backend=backend)
    with tenant_scope(GLOBEX):
        of_globex = GroupResult.restore("group", backend=backend)

    assert [[result.id for result in group.results] for group in (of_acme, of_globex)] == [["a", "a2"], ["g"]]


# --- attacks on the tables ---------------------------------------------------------------------------------------

TABLES = pytest.mark.parametrize(("table", "key"), [("task_record", "task_id"), ("group_record", "group_id")])


# --- what it costs -------------------------------------------------------------------------------------------------


def test_launch_start_and_end_of_a_task_are_one_statement_each(app: Celery, backend: PostgresBackend) -> None:
    request = Context(id="one", task="work", **{HEADER: encode(Envelope(ACME))})
    backend.records.channel()  # the first one looks for the tables

    with noted_statements(shared_engine(backend.url)) as statements:
        with tenant_scope(ACME):
            backend.record_launch("one", "work")
        backend.store_result("one", {"pid": 1}, "STARTED", request=request)
        backend.mark_as_done("one", 42, request)

    assert [statement.partition("(")[0] for statement in statements] == [
        'SELECT "rhesis_tasks".record_launch',
        'SELECT "rhesis_tasks".record_state',
        'SELECT "rhesis_tasks".record_state',
    ]


def test_no_index_has_what_changes_in_the_life_of_a_task(app: Celery, superuser: Engine) -> None:
    """Or each change would be written into all of them."""
    with superuser.connect() as connection:
        indexed = connection.scalars(
            text(
                "SELECT attname FROM pg_index JOIN pg_attribute ON attrelid = indexrelid "
                "WHERE indrelid = 'rhesis_tasks.task_record'::regclass"
            )
        ).all()
        conditions = connection.scalars(
            text(
                "SELECT indpred FROM pg_index WHERE indrelid = 'rhesis_tasks.task_record'::regclass "
                "AND (indpred IS NOT NULL OR indexprs IS NOT NULL)"
            )
        ).all()

    assert set(indexed) == {"organization_id", "task_id", "launched_at", "root_id"}
    assert conditions == []


def test_who_is_interrupted_in_the_middle_of_a_statement_gives_no_connection_back(backend: PostgresBackend) -> None:
    backend.records.channel()
    engine = shared_engine(backend.url)
    [(before,)] = run(engine, "SELECT pg_backend_pid()", ())

    def interrupt(*_: object) -> None:
        raise SoftTimeLimitExceeded

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(SoftTimeLimitExceeded):
            run(engine, "SELECT pg_sleep(%s)", (30,))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)

    [(after,)] = run(engine, "SELECT pg_backend_pid()", ())
    assert after != before
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # of a QueuePool


def test_an_error_of_the_database_is_sqlalchemys_and_costs_no_connection(backend: PostgresBackend) -> None:
    backend.records.channel()
    engine = shared_engine(backend.url)
    [(before,)] = run(engine, "SELECT pg_backend_pid()", ())

    with pytest.raises(ProgrammingError, match="no_such_table") as error:
        run(engine, "SELECT * FROM no_such_table WHERE id = %s", (1,))

    assert (error.value.params, error.value.connection_invalidated) == ((1,), False)
    assert run(engine, "SELECT pg_backend_pid()", ()) == [(before,)]


def test_an_outcome_waits_for_a_connection_as_it_does_for_the_server(
    app: Celery, backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an outage, in which those who were the first have them all."""
    request = Context(id="one", task="work", **{HEADER: encode(Envelope(ACME))})
    backend.records.channel()
    pool: Any = shared_engine(backend.url).pool
    monkeypatch.setattr(pool, "_timeout", 0.1)
    with ThreadPoolExecutor(1) as thread:
        with ExitStack() as lent:
            for _ in range(pool.size() + pool._max_overflow):
                lent.enter_context(shared_engine(backend.url).connect())
            with pytest.raises(DatabaseUnavailableError, match=r"no connection to .* has become free"):
                backend.records.channel()
            stored = thread.submit(backend.mark_as_done, "one", 42, request)
            wait_until("a try", lambda: "is said once the server is back" in caplog.text, 30)
        stored.result(30)

    with tenant_scope(ACME):
        assert backend.get_record("one").state == "success"


def fill(app: Celery) -> None:
    for tenant in (ACME, GLOBEX, None):
        with scope(tenant):
            app.backend.store_result("one", "secret", "SUCCESS")
            GroupResult("one", [app.AsyncResult("one")]).save(backend=app.backend)


@TABLES
@pytest.mark.parametrize("setting", [None, "", "acme", "unknown", "' OR true --", "%"])
def test_the_applications_role_sees_the_rows_of_its_setting_only(
    app: Celery, application: Engine, table: str, key: str, setting: str | None
) -> None:
    fill(app)

    with application.begin() as connection:
        if setting is not None:
            connection.execute(text("SELECT set_config(:n, :v, true)"), {"n": RECORDS_SETTING, "v": setting})
        seen = connection.scalars(text(f"SELECT organization_id FROM rhesis_tasks.{table}")).all()
        deleted = connection.scalars(text(f"DELETE FROM rhesis_tasks.{table} RETURNING organization_id")).all()
        connection.rollback()

    expected = {None: [""], "": [""], "acme": ["acme"]}.get(setting, [])
    assert (seen, deleted) == (expected, expected)


def test_nothing_is_left_on_the_connections_of_the_backend(app: Celery, backend: PostgresBackend) -> None:
    fill(app)
    with tenant_scope(ACME):
        backend.get_record("one")

    with shared_engine(backend.url).connect() as connection:
        assert connection.scalar(text(f"SELECT current_setting('{RECORDS_SETTING}', true)")) == ""
        seen = connection.scalars(text("SELECT organization_id FROM rhesis_tasks.task_record")).all()
    assert seen == [""]


@TABLES
def test_the_applications_role_cannot_write_another_tenants_row(
    app: Celery, application: Engine, tenant_database: TenantDatabase, table: str, key: str
) -> None:
    fill(app)
    other_columns = {"task_record": "'queued'", "group_record": "NULL"}[table]
    column = {"task_record": "state", "group_record": "result"}[table]

    for statement in (
        f"INSERT INTO rhesis_tasks.{table} (organization_id, {key}, {column}) VALUES ('globex', 'x', {other_columns})",
        f"UPDATE rhesis_tasks.{table} SET organization_id = 'globex', {key} = 'x'",
        f"UPDATE rhesis_tasks.{table} SET organization_id = '', {key} = 'x'",
    ):
        with application.connect() as connection, connection.begin() as transaction:
            connection.execute(text(f"SELECT set_config('{RECORDS_SETTING}', 'acme', true)"))
            with pytest.raises(ProgrammingError, match="row-level security"):
                connection.execute(text(statement))
            transaction.rollback()

    assert rows(tenant_database, f"SELECT organization_id, {key} FROM rhesis_tasks.{table}") == [
        ("", "one"),
        ("acme", "one"),
        ("globex", "one"),
    ]


def test_a_tenant_named_like_sql_gets_its_own_records_only(app: Celery, backend: PostgresBackend) -> None:
    fill(app)
    bobby = TenantContext("' OR organization_id <> '")

    with tenant_scope(bobby):
        assert backend.get_record("one") is None
        backend.store_result("one", "bobby's", "SUCCESS")

    assert record_of(backend, bobby, "one").result == "bobby's"
    assert record_of(backend, ACME, "one").result == "secret"


# --- where the results are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
@pytest.mark.parametrize("given", ["result_backend=", "CELERY_RESULT_BACKEND", "DATABASE_URL"])
def test_the_backend_is_ours_for_each_usual_form_of_the_url(
    make_app: MakeApp, tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch, given: str, scheme: str
) -> None:
    url = tenant_database.url.replace("postgresql", scheme, 1)
    if given == "result_backend=":
        app = make_app(None, result_backend=url)
    else:
        monkeypatch.setenv(given, url)
        app = make_app(None)

    with tenant_scope(ACME):
        app.backend.store_result("one", 42, "SUCCESS")

    assert isinstance(app.backend, PostgresBackend)
    assert rows(tenant_database) == [("acme", "one")]


def test_an_explicit_result_backend_wins_over_the_environment(
    make_app: MakeApp, tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_RESULT_BACKEND", f"postgresql://app@127.0.0.1:{free_port()}/nowhere")

    app = make_app(None, result_backend=tenant_database.url)

    assert app.backend.url == database_url(tenant_database.url).render_as_string(hide_password=False)


@pytest.mark.parametrize("given", ["schema=", "RHESIS_TASKS_SCHEMA"])
def test_the_tables_may_be_in_another_schema(
    make_app: MakeApp, tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    create_schema(tenant_database.owner, schema="jobs", roles=[tenant_database.role])
    if given == "schema=":
        app = make_app(schema="jobs")
    else:
        monkeypatch.setenv("RHESIS_TASKS_SCHEMA", "jobs")
        app = make_app()

    with tenant_scope(ACME):
        app.backend.store_result("one", 42, "SUCCESS")
        assert app.AsyncResult("one").get(timeout=5) == 42
        app.backend.cleanup()

    assert rows(tenant_database, "SELECT organization_id, task_id FROM jobs.task_record") == [("acme", "one")]
    assert rows(tenant_database) == []


def test_a_launch_without_its_database_says_which_one_cannot_be_reached(make_app: MakeApp) -> None:
    app = make_app("postgresql://me:hunter2@127.0.0.1:1/none")

    with tenant_scope(ACME), pytest.raises(DatabaseUnavailableError, match=r"me:\*\*\*@127.0.0.1:1") as caught:
        app.send_task("elsewhere")

    assert "hunter2" not in str(caught.value)
