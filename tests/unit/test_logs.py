"""The context on every log record."""

from __future__ import annotations

import copy
import logging
import logging.handlers
import pickle
import queue
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar
from typing import Any

import pytest
from celery import Celery

from rhesis_tasks import BaseTask, TenantContext, logs, register_context_var, tenant_scope
from rhesis_tasks.errors import InvalidTenantError

ACME = TenantContext("acme", "alice")
NOTHING = dict.fromkeys(logs.FIELDS, "-")


def context_of(record: logging.LogRecord) -> dict[str, Any]:
    return {field: getattr(record, field) for field in logs.FIELDS}


@pytest.fixture(autouse=True)
def factory() -> Iterator[Any]:
    """The record factory as it was, and is again after the test."""
    before = logging.getLogRecordFactory()
    yield before
    logs.uninstall()
    assert logging.getLogRecordFactory() is before


@pytest.fixture
def installed() -> None:
    logs.install()


@pytest.fixture
def log() -> logging.Logger:
    """A logger of a library that knows nothing of us."""
    return logging.getLogger("third.party")


# --- on every record -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_a_record_of_any_library_carries_the_tenant(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    with tenant_scope(ACME):
        log.warning("for a tenant")
    log.warning("for nobody")

    for_tenant, for_nobody = map(context_of, caplog.records)
    assert for_tenant == {**NOTHING, "organization_id": "acme", "user_id": "alice"}
    assert for_nobody == NOTHING


@pytest.mark.usefixtures("installed")
def test_a_tenant_without_a_user_shows_a_dash(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    with tenant_scope(TenantContext("acme")):
        log.warning("x")

    assert context_of(caplog.records[0]) == {**NOTHING, "organization_id": "acme"}


def test_a_record_made_in_a_task_names_the_task(
    app: Celery, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(base=BaseTask, name="inner")
    def inner() -> None:
        log.warning("inner")

    @app.task(base=BaseTask, name="outer")
    def outer() -> None:
        inner.apply(task_id="inner-id")
        log.warning("outer")

    with tenant_scope(ACME):
        outer.apply(task_id="outer-id")

    tenant = {"organization_id": "acme", "user_id": "alice", "root_id": "outer-id"}
    assert [context_of(record) for record in caplog.records if record.name == "third.party"] == [
        {**tenant, "task_id": "inner-id", "task_name": "inner"},
        {**tenant, "task_id": "outer-id", "task_name": "outer"},
    ]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("format", [logs.WORKER_LOG_FORMAT, logs.TASK_LOG_FORMAT])
def test_the_worker_formats_fit_every_record(
    format: str, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with tenant_scope(ACME):
        log.warning("ready")

    text = logging.Formatter(format).format(caplog.records[0])
    assert "[org=acme user=alice]" in text
    assert text.endswith("ready")


# --- extra= of the caller --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("field", logs.FIELDS)
def test_the_callers_own_field_of_the_same_name_wins(
    field: str, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with tenant_scope(ACME):
        log.warning("x", extra={field: "mine", "other": 1})

    assert getattr(caplog.records[0], field) == "mine"
    assert caplog.records[0].other == 1  # type: ignore[attr-defined]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("field", ["message", "asctime", "name", "args", "levelname"])
def test_fields_that_logging_itself_refuses_are_still_refused(field: str, log: logging.Logger) -> None:
    with pytest.raises(KeyError):
        log.warning("x", extra={field: "mine"})


# --- records that travel ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda record: pickle.loads(pickle.dumps(record)),  # noqa: S301
        lambda record: logging.makeLogRecord(dict(record.__dict__)),
        lambda record: logging.handlers.QueueHandler(queue.SimpleQueue()).prepare(record),
        # as logging.handlers.SocketHandler sends it
        lambda record: logging.makeLogRecord(pickle.loads(pickle.dumps(record.__dict__))),  # noqa: S301
    ],
    ids=["copy", "deepcopy", "pickle", "makeLogRecord", "QueueHandler", "pickled attributes"],
)
def test_a_copied_or_pickled_record_keeps_its_context(
    duplicate: Callable[[logging.LogRecord], logging.LogRecord],
    log: logging.Logger,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tenant_scope(ACME):
        log.warning("hello %s", "world", extra={"task_id": "mine", "other": 1})

    record = duplicate(caplog.records[0])

    assert context_of(record) == {**NOTHING, "organization_id": "acme", "user_id": "alice", "task_id": "mine"}
    assert record.getMessage() == "hello world"
    assert record.other == 1  # type: ignore[attr-defined]


# --- registered variables --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_variables_registered_for_the_log_are_on_every_record_and_others_are_not(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    request_id: ContextVar[str] = ContextVar("request_id")
    secret: ContextVar[str] = ContextVar("secret")
    register_context_var(request_id, log=True)
    register_context_var(secret)

    def body() -> None:
        log.warning("before")
        request_id.set("r-1")
        secret.set("s")
        log.warning("after")

    Context().run(body)

    assert [record.request_id for record in caplog.records] == ["-", "r-1"]  # type: ignore[attr-defined]
    assert not any(hasattr(record, "secret") for record in caplog.records)


@pytest.mark.parametrize(
    "name", ["name", "args", "msg", "levelname", "message", "asctime", "organization_id", "task_id"]
)
def test_a_variable_named_like_a_field_that_records_have_anyway_is_refused_for_the_log(name: str) -> None:
    variable: ContextVar[str] = ContextVar(name)
    register_context_var(variable, name=f"my_{name}", log=True)
    register_context_var(variable)  # without log= it disturbs nobody

    with pytest.raises(InvalidTenantError, match=name):
        register_context_var(variable, log=True)


# --- install and uninstall -------------------------------------------------------------------------------------


def test_installing_twice_is_installing_once(
    factory: Any, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    logs.install()
    once = logging.getLogRecordFactory()
    logs.install()
    assert logging.getLogRecordFactory() is once
    log.warning("x")
    logs.uninstall()

    assert context_of(caplog.records[0]) == NOTHING
    assert logging.getLogRecordFactory() is factory


def test_uninstalling_what_is_not_installed_changes_nothing(factory: Any) -> None:
    logs.uninstall()

    assert logging.getLogRecordFactory() is factory


def test_a_factory_that_was_there_before_goes_on_working(
    factory: Any, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    class Record(logging.LogRecord):
        """A record of the application's own."""

    logging.setLogRecordFactory(Record)
    try:
        logs.install()
        log.warning("x")
        logs.uninstall()
        assert logging.getLogRecordFactory() is Record
    finally:
        logging.setLogRecordFactory(factory)

    assert isinstance(caplog.records[0], Record)
    assert context_of(caplog.records[0]) == NOTHING


def test_a_factory_that_wrapped_ours_is_not_torn_out(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    logs.install()
    ours = logging.getLogRecordFactory()

    def wrapper(*args: Any, **kwargs: Any) -> logging.LogRecord:
        return ours(*args, **kwargs)

    logging.setLogRecordFactory(wrapper)
    try:
        logs.uninstall()
        log.warning("x")
        assert logging.getLogRecordFactory() is wrapper
    finally:
        logging.setLogRecordFactory(ours)

    assert context_of(caplog.records[0]) == NOTHING


# --- TaskLogger ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("install", [True, False], ids=["installed", "not installed"])
def test_a_task_logger_carries_the_context_also_where_nothing_is_installed(
    install: bool, log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    if install:
        logs.install()
    with tenant_scope(ACME):
        logs.TaskLogger(log, {}).warning("x", extra={"task_id": "mine", "other": 1})

    record = caplog.records[0]
    assert context_of(record) == {**NOTHING, "organization_id": "acme", "user_id": "alice", "task_id": "mine"}
    assert record.other == 1  # type: ignore[attr-defined]


def test_a_tasks_own_logger_is_that_of_its_module(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    @app.task(base=BaseTask, bind=True, name="speak")
    def speak(self: BaseTask) -> None:
        self.log.warning("hello from %s", self.tenant)

    with tenant_scope(ACME):
        speak.apply(task_id="the-id")

    record = next(record for record in caplog.records if record.name == __name__)
    assert record.getMessage() == "hello from organization acme (user alice)"
    assert context_of(record)["task_id"] == "the-id"
