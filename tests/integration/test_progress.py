"""How far a task is, and that it shall stop early: said through its record, on real workers, within its tenant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from applications import application
from celery import Celery
from celery.app.task import Context
from sqlalchemy import create_engine, text

from rhesis_tasks import BaseTask, TenantContext, tenant_scope
from rhesis_tasks.errors import InvalidProgressError, MissingTenantError, NotSupportedError
from rhesis_tasks.headers import HEADER, Envelope, Progress, encode
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.postgres.schema import RECORDS_SETTING
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.states import State
from rhesis_tasks.testing import TenantDatabase, new_tenant_database, running_worker

if TYPE_CHECKING:
    from conftest import MakeApp

HERE = Path(__file__).parent
TIMEOUT = 30
ACME = TenantContext("acme", "alice")
CAROL = TenantContext("acme", "carol")
GLOBEX = TenantContext("globex", "bob")

ENDED = (State.SUCCESS, State.FAILURE, State.REVOKED)


def progress_of(record: TaskRecord | None) -> tuple[int | None, int | None, str | None] | None:
    return record and (record.progress_done, record.progress_total, record.progress_message)


class Rig:
    """The application in this process, a worker of its own, and their database."""

    def __init__(self, tasks: Any, worker: Child, pool: str, folder: Path, database: TenantDatabase) -> None:
        self.tasks = tasks
        self.worker = worker
        self.pool = pool
        self.database = database
        self._folder = folder

    def launch(self, name: str, *args: Any, tenant: TenantContext = ACME) -> str:
        with tenant_scope(tenant):
            launched: str = getattr(self.tasks, name).apply_async(args, queue=self.pool).id
            return launched

    def record(self, task_id: str, tenant: TenantContext = ACME) -> TaskRecord | None:
        with tenant_scope(tenant):
            found: TaskRecord | None = self.tasks.app.backend.get_record(task_id)
            return found

    def abort(self, task_id: str, tenant: TenantContext = ACME) -> bool:
        with tenant_scope(tenant):
            asked: bool = self.tasks.app.backend.request_abort(task_id)
            return asked

    def row(self, task_id: str) -> Any:
        """All that is in the table."""
        with self.database.owner.connect() as connection:
            query = text("SELECT * FROM rhesis_tasks.task_record WHERE task_id = :id")
            return connection.execute(query, {"id": task_id}).mappings().all()

    def has(self, word: str, task_id: str, *more: object) -> bool:
        return Path(self._folder, "-".join((word, task_id, *map(str, more)))).exists()

    def wait_for(self, word: str, task_id: str, *more: object) -> None:
        """Until the task has come to a place."""
        wait_until(f"task {task_id} to say {word!r}", lambda: self.has(word, task_id, *more), TIMEOUT, 0.01)

    def let_end(self, task_id: str) -> None:
        Path(self._folder, f"end-{task_id}").touch()

    def until(self, what: str, task_id: str, is_there: Callable[[TaskRecord | None], bool]) -> TaskRecord:
        record = self.record(task_id)

        def look() -> bool:
            nonlocal record
            record = self.record(task_id)
            return is_there(record)

        try:
            wait_until(what, look, TIMEOUT, 0.02)
        except TimeoutError as error:
            error.add_note(f"the record: {record}; the worker's log ends with {self.worker.output[-2000:]}")
            raise
        assert record is not None
        return record

    def ended(self, task_id: str) -> TaskRecord:
        return self.until(f"task {task_id} to end", task_id, lambda record: bool(record and record.state in ENDED))

    def run(self, name: str, *args: Any) -> TaskRecord:
        return self.ended(self.launch(name, *args))


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "progress_tasks") as (tasks, database):
        yield tasks, database


@pytest.fixture(scope="module", params=["prefork", "threads"])
def rig(
    request: pytest.FixtureRequest,
    tasks_and_database: tuple[Any, TenantDatabase],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    """A worker in each pool."""
    tasks, database = tasks_and_database
    pool, folder = request.param, tmp_path_factory.mktemp("progress")
    with running_worker(
        "progress_tasks",
        cwd=HERE,
        pool=pool,
        env={"DATABASE_URL": database.url, "PROGRESS": str(folder)},
        arguments=["-Q", pool, "-n", f"{pool}@progress"],
    ) as worker:
        yield Rig(tasks, worker, pool, folder, database)


def sync_and_async(name: str) -> Any:
    return pytest.mark.parametrize("name", [name, f"{name}_async"], ids=["sync", "async"])


# --- progress ----------------------------------------------------------------------------------------------------


@sync_and_async("report")
def test_progress_is_in_the_record_while_the_task_runs_and_stays_there(rig: Rig, name: str) -> None:
    task_id = rig.launch(name, [[3, 10, "three of ten"]])

    running = rig.until("the progress", task_id, lambda record: progress_of(record) == (3, 10, "three of ten"))
    rig.let_end(task_id)
    ended = rig.ended(task_id)

    assert running.state is State.STARTED
    assert (ended.state, progress_of(ended)) == (State.SUCCESS, (3, 10, "three of ten"))


@pytest.mark.parametrize("error", [None, "ValueError"])
@sync_and_async("report")
def test_the_last_report_is_in_the_record_of_an_ended_task_however_soon_it_came(
    rig: Rig, name: str, error: str | None
) -> None:
    task_id = rig.launch(name, [[1, 10, "one"], [2, 10, "two"], [7, None, "seven"]], error)
    rig.wait_for("reported", task_id)
    rig.let_end(task_id)

    record = rig.ended(task_id)

    assert record.state is (State.FAILURE if error else State.SUCCESS)
    assert progress_of(record) == (7, None, "seven")


def test_the_last_report_of_a_failed_attempt_stays_until_the_next_attempt_reports(rig: Rig) -> None:
    record = rig.run("report_in_first_attempt", [[1, 10, "one"], [7, None, "seven"]])

    assert (record.state, record.retries, progress_of(record)) == (State.SUCCESS, 1, (7, None, "seven"))


@sync_and_async("report_before_a_quick_attempt")
def test_the_last_report_of_a_failed_attempt_stays_however_soon_the_next_one_begins(rig: Rig, name: str) -> None:
    record = rig.run(name, [[1, 10, "one"], [7, None, "seven"]])

    assert (record.state, record.retries, progress_of(record)) == (State.SUCCESS, 1, (7, None, "seven"))


def test_a_task_that_reports_nothing_has_no_progress(rig: Rig) -> None:
    assert progress_of(rig.run("ask_once")) == (None, None, None)


@pytest.mark.parametrize("is_last", [False, True], ids=["while it runs", "with its end"])
def test_a_message_that_no_text_column_holds_is_written_out(rig: Rig, is_last: bool) -> None:
    record = rig.run("report_strange", is_last)

    assert progress_of(record) == (2, 2, r"NUL \x00, lone surrogate \ud800")


@sync_and_async("report_in_scope_of")
def test_progress_goes_to_the_tasks_own_record_whatever_scope_the_body_is_in(rig: Rig, name: str) -> None:
    task_id = rig.launch(name, "globex")
    rig.until("the progress", task_id, lambda record: progress_of(record) == (1, 2, "in another's scope"))
    rows = rig.row(task_id)
    rig.let_end(task_id)

    assert [row["organization_id"] for row in rows] == ["acme"]
    assert progress_of(rig.ended(task_id)) == (1, 2, "in another's scope")
    assert len(rig.row(task_id)) == 1


def test_another_tenant_sees_no_progress_and_cannot_ask_to_stop(rig: Rig) -> None:
    task_id = rig.launch("report", [[3, 10, "three of ten"]])
    rig.until("the progress", task_id, lambda record: progress_of(record) == (3, 10, "three of ten"))
    before = rig.row(task_id)

    seen = rig.record(task_id, GLOBEX)
    asked = rig.abort(task_id, GLOBEX)
    with tenant_scope(GLOBEX):
        told = rig.tasks.app.backend.store_progress(task_id, Progress(9, 9, "of another tenant"))
    after = rig.row(task_id)
    rig.let_end(task_id)

    assert (seen, asked, told, after) == (None, False, False, before)
    assert rig.ended(task_id).abort_requested_at is None


# --- stopping early ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["until_aborted", "until_aborted_async", "until_aborted_in_the_background"])
def test_a_running_task_hears_that_it_shall_stop(rig: Rig, name: str) -> None:
    task_id = rig.launch(name)
    rig.wait_for("begun", task_id)

    assert rig.abort(task_id)

    record = rig.ended(task_id)
    assert (record.state, record.result) == (State.SUCCESS, "stopped early")
    assert record.abort_requested_by == "alice"


@sync_and_async("ask_once")
def test_a_task_that_was_asked_before_it_began_hears_it_at_its_first_question(rig: Rig, name: str) -> None:
    with tenant_scope(ACME):
        signature = getattr(rig.tasks, name).signature(queue=rig.pool)
        task_id = signature.freeze().id
        rig.tasks.app.backend.record_launch(task_id, signature.task)
        assert rig.abort(task_id)
        signature.apply_async()

    assert rig.ended(task_id).result is True


@sync_and_async("ask_once")
def test_a_task_that_nobody_asked_is_not_to_stop(rig: Rig, name: str) -> None:
    assert rig.run(name).result is False


@sync_and_async("fail_once")
def test_a_retry_hears_what_its_earlier_attempt_was_asked(rig: Rig, name: str) -> None:
    task_id = rig.launch(name)
    rig.wait_for("begun", task_id)
    assert rig.abort(task_id)
    rig.let_end(task_id)

    record = rig.ended(task_id)

    assert (record.retries, record.result) == (1, True)


# --- batches -----------------------------------------------------------------------------------------------------


def test_a_batch_reports_its_progress_while_it_runs_and_in_the_end(rig: Rig) -> None:
    task_id = rig.launch("batch", 5, 3, 100)

    rig.until("the progress", task_id, lambda record: progress_of(record) == (103, 105, ""))
    rig.let_end(task_id)

    record = rig.ended(task_id)
    assert (progress_of(record), sorted(record.result)) == ((105, 105, ""), [0, 1, 2, 3, 4])


def test_a_batch_that_shall_stop_finishes_what_is_running_and_begins_nothing_else(rig: Rig) -> None:
    task_id = rig.launch("batch_until_told")
    rig.wait_for("begun", task_id, 1)

    assert rig.abort(task_id)

    record = rig.ended(task_id)
    assert (record.state, sorted(record.result), progress_of(record)) == (State.SUCCESS, [0, 1], (2, 100, ""))


def test_what_a_batch_left_running_has_cleaned_up_before_its_task_has_ended(rig: Rig) -> None:
    task_id = rig.launch("leave_batch")

    assert rig.ended(task_id).state is State.SUCCESS
    assert rig.has("cleaned", task_id, 1)


# --- the database ------------------------------------------------------------------------------------------------


@sync_and_async("burst")
def test_however_often_a_task_reports_the_database_hears_it_once_in_a_while(rig: Rig, name: str) -> None:
    record = rig.run(name, 1000)

    assert record.state is State.SUCCESS
    assert 1 <= record.result <= 3
    assert progress_of(record) == (1000, 1000, "")


@sync_and_async("report_to_nobody")
def test_a_task_goes_on_where_its_record_cannot_be_reached_and_the_log_says_so(rig: Rig, name: str) -> None:
    record = rig.run(name)

    rig.worker.wait_for(f"the progress of task {record.task_id} could not be recorded: cannot connect to", TIMEOUT)
    assert (record.state, record.result) == (State.SUCCESS, "went on")
    assert progress_of(record) == (1, 2, "unheard")


def test_the_soft_time_limit_is_heard_while_the_record_is_written(rig: Rig) -> None:
    if rig.pool != "prefork":
        pytest.skip("only prefork has soft time limits")

    record = rig.run("report_slowly")

    assert (record.state, record.error_type) == (State.FAILURE, "SoftTimeLimitExceeded")


# --- who may ask, and when ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tenant_database(postgres_url: str) -> Iterator[TenantDatabase]:
    """One for all tests here, since a new one takes its time."""
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture
def app(make_app: MakeApp, tenant_database: TenantDatabase) -> Celery:
    """An application in this process, without records."""
    tenant_database.execute("DELETE FROM rhesis_tasks.task_record")
    return with_tasks(make_app())


def with_tasks(app: Celery) -> Celery:
    @app.task(base=BaseTask, bind=True, name="report", shared=False)
    def report(self: BaseTask, *progress: Any) -> bool:
        self.report_progress(*progress)
        return self.should_abort()

    @app.task(base=BaseTask, bind=True, name="report_async", shared=False)
    async def report_async(self: BaseTask, *progress: Any) -> bool:
        self.report_progress(*progress)
        return self.should_abort() or await self.aborted()

    return app


def store(app: Celery, task_id: str, state: str, tenant: TenantContext = ACME) -> None:
    request = Context({"id": task_id, "task": "report", "retries": 0, HEADER: encode(Envelope(tenant))})
    result = ValueError("bad") if state in ("FAILURE", "RETRY", "REVOKED") else None
    app.backend.store_result(task_id, result, state, request=request)


def record_of(app: Celery, task_id: str) -> TaskRecord | None:
    with tenant_scope(ACME):
        found: TaskRecord | None = app.backend.get_record(task_id)
        return found


@pytest.mark.parametrize("state", ["PENDING", "STARTED", "RETRY"])
def test_a_task_that_has_not_ended_can_be_asked_to_stop(app: Celery, state: str) -> None:
    store(app, "one", state)

    with tenant_scope(ACME):
        assert app.backend.request_abort("one") is True

    record = record_of(app, "one")
    assert record is not None and record.abort_requested_at is not None
    assert (record.abort_requested_by, record.abort_requested_at.tzinfo is not None) == ("alice", True)


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_task_that_has_ended_cannot_be_asked_to_stop_nor_report(app: Celery, state: str) -> None:
    store(app, "one", state)
    before = record_of(app, "one")

    with tenant_scope(ACME):
        assert app.backend.request_abort("one") is False
        assert app.backend.store_progress("one", Progress(1, 2, "late")) is False

    assert record_of(app, "one") == before


@pytest.mark.parametrize("task_id", ["never was", "", "' OR true --", "NUL \0"])
def test_an_unknown_task_cannot_be_asked_to_stop(app: Celery, task_id: str) -> None:
    store(app, "one", "STARTED")

    with tenant_scope(ACME):
        assert app.backend.request_abort(task_id) is False

    assert getattr(record_of(app, "one"), "abort_requested_at", "no record") is None


def test_who_asked_first_is_recorded_and_when(app: Celery) -> None:
    store(app, "one", "STARTED")

    with tenant_scope(ACME):
        app.backend.request_abort("one")
    first = record_of(app, "one")
    with tenant_scope(CAROL):
        again = app.backend.request_abort("one")

    assert again is True
    assert first is not None and first.abort_requested_by == "alice"
    assert record_of(app, "one") == first


def test_without_a_tenant_nobody_can_be_asked_to_stop(app: Celery) -> None:
    store(app, "one", "STARTED")

    with pytest.raises(MissingTenantError):
        app.backend.request_abort("one")


def test_a_task_is_told_that_it_shall_stop_when_it_reports_and_when_it_only_asks(app: Celery) -> None:
    store(app, "one", "STARTED")
    with tenant_scope(ACME):
        before = [app.backend.store_progress("one", progress) for progress in (Progress(1, None, ""), None)]
        app.backend.request_abort("one")
        after = [app.backend.store_progress("one", progress) for progress in (Progress(2, None, ""), None)]

    assert (before, after) == ([False, False], [True, True])
    assert progress_of(record_of(app, "one")) == (2, None, "")


@pytest.mark.parametrize("setting", [None, "", "globex", "' OR true --", "%"])
def test_the_applications_role_sees_and_changes_progress_only_with_the_tenants_setting(
    app: Celery, tenant_database: TenantDatabase, setting: str | None
) -> None:
    store(app, "one", "STARTED")
    with tenant_scope(ACME):
        app.backend.store_progress("one", Progress(1, 2, "secret"))
    before = record_of(app, "one")

    engine = create_engine(database_url(tenant_database.url))
    with engine.begin() as connection:
        if setting is not None:
            connection.execute(text("SELECT set_config(:n, :v, true)"), {"n": RECORDS_SETTING, "v": setting})
        seen = connection.scalars(text("SELECT progress_message FROM rhesis_tasks.task_record")).all()
        changed = connection.execute(
            text("UPDATE rhesis_tasks.task_record SET progress_done = 9, abort_requested_at = now()")
        ).rowcount
    engine.dispose()

    assert (seen, changed) == ([], 0)
    assert record_of(app, "one") == before


# --- without a record --------------------------------------------------------------------------------------------


@sync_and_async("report")
def test_an_eager_task_has_nobody_to_report_to_and_does_not_fail(
    app: Celery, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(app.backend, "store_progress", lambda *args: asked.append(args))

    with tenant_scope(ACME):
        result = app.tasks[name].apply((1, 2, "unheard"))

        assert (result.get(disable_sync_subtasks=False), result.state) == (False, "SUCCESS")
    assert (asked, record_of(app, result.id)) == ([], None)


def test_a_task_that_is_called_as_a_function_has_nobody_to_report_to_and_does_not_fail(app: Celery) -> None:
    with tenant_scope(ACME):
        assert app.tasks["report"](1, 2, "unheard") is False


def test_an_eager_task_whose_result_is_stored_has_its_progress_there(make_app: MakeApp) -> None:
    app = with_tasks(make_app(task_store_eager_result=True))

    with tenant_scope(ACME):
        task_id = app.tasks["report"].apply((1, 2, "stored")).id

    assert progress_of(record_of(app, task_id)) == (1, 2, "stored")


@sync_and_async("report")
def test_without_records_reporting_is_not_supported(make_app: MakeApp, name: str) -> None:
    app = with_tasks(make_app(result_backend="cache+memory://", task_store_eager_result=True))

    with tenant_scope(ACME), pytest.raises(NotSupportedError, match="keeps no records"):
        app.tasks[name].apply((1, 2)).get(disable_sync_subtasks=False)


def test_without_records_nobody_asks_a_task_to_stop(make_app: MakeApp) -> None:
    app = make_app(result_backend="cache+memory://", task_store_eager_result=True)

    @app.task(base=BaseTask, bind=True, shared=False)
    async def ask(self: BaseTask) -> bool:
        return self.should_abort() or await self.aborted()

    with tenant_scope(ACME):
        assert ask.apply().get(disable_sync_subtasks=False) is False


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        ((-1,), "done is an int of 0 or more, not -1"),
        ((1.0,), "done is an int of 0 or more, not 1.0"),
        ((True,), "done is an int of 0 or more, not True"),
        ((None,), "done is an int of 0 or more, not None"),
        (("1",), "done is an int of 0 or more, not '1'"),
        ((2**63,), f"done is an int of 0 or more, not {2**63}"),
        ((1, -1), "total is an int of 0 or more, not -1"),
        ((1, 2.5), "total is an int of 0 or more, not 2.5"),
        ((1, False), "total is an int of 0 or more, not False"),
        ((1, 2**63), f"total is an int of 0 or more, not {2**63}"),
        ((1, 2, None), "the message is a str, not None"),
        ((1, 2, b"bytes"), "the message is a str, not b'bytes'"),
    ],
)
def test_progress_that_makes_no_sense_is_refused_wherever_the_task_runs(
    make_app: MakeApp, progress: tuple[Any, ...], text: str
) -> None:
    app = with_tasks(make_app())
    report = app.tasks["report"]

    for is_stored in (False, True):
        app.conf.task_store_eager_result = is_stored
        for run in (lambda: report(*progress), lambda: report.apply(progress, throw=True)):
            with tenant_scope(ACME), pytest.raises(InvalidProgressError) as caught:
                run()
            assert str(caught.value) == text


@pytest.mark.parametrize("message", ["NUL \0", "lone surrogate \ud800"], ids=["NUL", "lone surrogate"])
def test_a_message_that_no_text_column_holds_is_written_out_before_the_tasks_end_too(app: Celery, message: str) -> None:
    store(app, "one", "STARTED")

    with tenant_scope(ACME):
        app.backend.store_progress("one", Progress(1, 2, message))

    written = message.replace("\0", r"\x00").replace("\ud800", r"\ud800")
    assert progress_of(record_of(app, "one")) == (1, 2, written)


def test_the_largest_numbers_can_be_stored(app: Celery) -> None:
    store(app, "one", "STARTED")

    with tenant_scope(ACME):
        app.backend.store_progress("one", Progress(2**63 - 1, 2**63 - 1, ""))

    assert progress_of(record_of(app, "one")) == (2**63 - 1, 2**63 - 1, "")
