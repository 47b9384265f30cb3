"""What a tenant sees of its tasks and does to them: lists, trees, cancelling; on real workers where one has a part."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import celery
import pytest
from applications import application
from celery import Celery, chain, group
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from kombu.utils.uuid import uuid
from sqlalchemy import Connection, Engine, text

from rhesis_tasks import BaseTask, TenantContext, tenant_scope
from rhesis_tasks.errors import MissingTenantError, NotSupportedError
from rhesis_tasks.postgres.records import TaskRecord
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import wait_until
from rhesis_tasks.states import State
from rhesis_tasks.status import MAX_DEPTH, Cancellation, TaskNode, cancel_task, get_task, list_tasks, task_tree
from rhesis_tasks.testing import TenantDatabase, running_worker
from rhesis_tasks.threads import ContextThreadPoolExecutor

if TYPE_CHECKING:
    from conftest import MakeApp

HERE = Path(__file__).parent
TIMEOUT = 30
ACME = TenantContext("acme", "alice")
BORIS = TenantContext("acme", "boris")
GLOBEX = TenantContext("globex", "bob")


@pytest.fixture
def app(make_app: MakeApp, tenant_database: TenantDatabase) -> Celery:
    """An application whose messages are in PostgreSQL, too, and that has no worker."""
    app = make_app(broker_url=tenant_database.url)
    for name in ("work", "other"):
        app.task(work, base=BaseTask, name=name, shared=False)
    return app


def work(value: Any = None) -> None: ...


def launched(app: Celery, name: str = "work", tenant: TenantContext = ACME, **options: Any) -> str:
    with tenant_scope(tenant):
        return str(app.tasks[name].apply_async(**options).id)


def store(app: Celery, task_id: str, state: str, value: Any = None, tenant: TenantContext = ACME) -> None:
    with tenant_scope(tenant):
        app.backend.store_result(task_id, value, state)


def listed(app: Celery, tenant: TenantContext = ACME, **which: Any) -> list[str]:
    with tenant_scope(tenant):
        return [record.task_id for record in list_tasks(app, **which)]


def get(app: Celery, task_id: str, tenant: TenantContext = ACME) -> TaskRecord:
    with tenant_scope(tenant):
        record = get_task(app, task_id)
    assert record is not None
    return record


def owned(database: TenantDatabase, query: str, **parameters: Any) -> list[Any]:
    with database.owner.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query), parameters)]


def messages(database: TenantDatabase) -> list[str]:
    return [row[0] for row in owned(database, "SELECT task_id FROM rhesis_tasks.message ORDER BY id")]


# --- lists -------------------------------------------------------------------------------------------------------


def test_a_list_has_the_latest_launch_first_and_nobody_elses(app: Celery) -> None:
    task_ids = [launched(app) for _ in range(3)]
    foreign = launched(app, tenant=GLOBEX)

    assert listed(app) == task_ids[::-1]
    assert listed(app, GLOBEX) == [foreign]


def test_a_list_is_of_what_was_asked_for(app: Celery) -> None:
    first, second, third = launched(app), launched(app, "other"), launched(app)
    store(app, first, "SUCCESS")
    store(app, third, "FAILURE", ValueError("bad"))
    at = get(app, second).launched_at

    assert listed(app, states=[State.SUCCESS]) == [first]
    assert listed(app, states=[State.QUEUED, State.FAILURE]) == [third, second]
    assert listed(app, states=[]) == []
    assert listed(app, states=State.SUCCESS) == listed(app, states="success") == [first]
    assert listed(app, states=("success", State.QUEUED)) == [second, first]
    assert listed(app, name="other") == [second]
    assert listed(app, name="work", states=[State.FAILURE]) == [third]
    assert listed(app, root_id=second) == [second]
    assert listed(app, root_id=UUID(second)) == [second]
    assert listed(app, launched_from=at) == [third, second]
    assert listed(app, launched_before=at) == [first]
    assert listed(app, limit=1) == [third]
    assert listed(app, limit=0) == []
    assert listed(app, name="unknown") == []


def pages(app: Celery, limit: int) -> Iterator[list[TaskRecord]]:
    after = None
    with tenant_scope(ACME):
        while page := list_tasks(app, limit=limit, after=after):
            yield page
            after = page[-1].launched_at, page[-1].task_id


@pytest.mark.parametrize(
    ("which", "error", "says"),
    [
        ({"states": "succes"}, ValueError, "states are delayed, queued, .* not 'succes'"),
        ({"states": ["SUCCESS"]}, ValueError, r"states are delayed, queued, .* not \['SUCCESS'\]"),
        ({"limit": -1}, ValueError, "an int of 0 or more, not -1"),
        ({"limit": "50"}, ValueError, "an int of 0 or more, not '50'"),
        ({"limit": True}, ValueError, "an int of 0 or more, not True"),
        ({"limit": None}, ValueError, "an int of 0 or more, not None"),
        ({"root_id": 5}, TypeError, "the id of a task is a str or UUID, not int"),
    ],
)
def test_a_list_of_what_cannot_be_is_refused(app: Celery, which: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        listed(app, **which)


def test_an_id_may_be_a_uuid_and_is_no_result(app: Celery) -> None:
    task_id = launched(app)
    as_uuid, result = UUID(task_id), app.AsyncResult(task_id)

    for look in (get_task, task_tree, cancel_task):
        with tenant_scope(ACME):
            assert look(app, as_uuid) is not None
            assert look(app, UUID(uuid())) is None
            with pytest.raises(TypeError, match=r"is a str or UUID, not AsyncResult.  That of a result is result\.id"):
                look(app, result)  # type: ignore[arg-type]
    assert get(app, task_id).state == "revoked"


def test_pages_have_each_task_once_while_others_are_launched(app: Celery) -> None:
    before = [launched(app) for _ in range(7)]

    seen = []
    for page in pages(app, 2):
        seen += [record.task_id for record in page]
        launched(app)

    assert seen == before[::-1]


def test_pages_have_each_task_once_though_all_were_launched_at_the_same_moment(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    task_ids = {launched(app) for _ in range(7)}
    tenant_database.execute("UPDATE rhesis_tasks.task_record SET launched_at = '2026-01-01'")

    seen = [record.task_id for page in pages(app, 3) for record in page]

    assert len(seen) == 7
    assert set(seen) == task_ids


# --- trees -------------------------------------------------------------------------------------------------------


def of_tree(node: TaskNode | None) -> Any:
    """A tree as nested lists of ids."""
    assert node is not None
    return [node.record.task_id, *map(of_tree, node.children)]


def record(app: Celery, task_id: str, root_id: str, parent_id: str | None, tenant: TenantContext = ACME) -> None:
    with tenant_scope(tenant):
        app.backend.record_launch(task_id, "work", root_id, parent_id)


def test_a_tree_begins_at_the_root_whichever_task_is_asked_for(app: Celery) -> None:
    for task_id, parent_id in [("r", None), ("a", "r"), ("b", "r"), ("aa", "a")]:
        record(app, task_id, "r", parent_id)
    record(app, "elsewhere", "elsewhere", None)
    record(app, "foreign", "r", "r", GLOBEX)

    with tenant_scope(ACME):
        trees = [of_tree(task_tree(app, task_id)) for task_id in ("r", "a", "b", "aa")]

        assert trees == [["r", ["a", ["aa"]], ["b"]]] * 4
        assert (task_tree(app, "unknown"), task_tree(app, "foreign")) == (None, None)


def test_what_has_lost_its_parent_hangs_on_the_root(app: Celery) -> None:
    for task_id, parent_id in [("r", None), ("b", "gone"), ("bb", "b")]:
        record(app, task_id, "r", parent_id)

    with tenant_scope(ACME):
        assert of_tree(task_tree(app, "bb")) == ["r", ["b", ["bb"]]]


def test_what_has_lost_its_root_begins_at_the_earliest(app: Celery) -> None:
    for task_id, parent_id in [("a", "r"), ("b", "a"), ("c", "r")]:
        record(app, task_id, "r", parent_id)

    with tenant_scope(ACME):
        assert of_tree(task_tree(app, "c")) == ["a", ["b"], ["c"]]


def test_a_tree_with_circles_ends_and_has_all(app: Celery) -> None:
    for task_id, parent_id in [("r", "b"), ("a", "r"), ("b", "a"), ("x", "y"), ("y", "x")]:
        record(app, task_id, "r", parent_id)

    with tenant_scope(ACME):
        assert of_tree(task_tree(app, "a")) == ["r", ["a", ["b"]], ["x", ["y"]]]


def test_a_chain_of_two_thousand_is_a_tree_that_is_not_too_deep(app: Celery, tenant_database: TenantDatabase) -> None:
    tenant_database.execute(
        "INSERT INTO rhesis_tasks.task_record (organization_id, task_id, state, root_id, parent_id) "
        "SELECT 'acme', n::text, 'success', '0', CASE WHEN n > 0 THEN (n - 1)::text END FROM generate_series(0, 1999) n"
    )

    with tenant_scope(ACME):
        node = task_tree(app, "1000")

    depth = 0
    while node is not None and len(node.children) == 1:
        assert node.record.task_id == str(depth)
        depth, (node,) = depth + 1, node.children
    assert node is not None
    assert [child.record.task_id for child in node.children] == [str(n) for n in range(depth + 1, 2000)]
    assert depth == MAX_DEPTH - 1


# --- cancelling what has not started -----------------------------------------------------------------------------


def cancelled(app: Celery, task_id: str, tenant: TenantContext = ACME) -> Cancellation | None:
    with tenant_scope(tenant):
        return cancel_task(app, task_id)


@pytest.mark.parametrize("options", [{}, {"countdown": 600}], ids=["queued", "delayed"])
def test_cancelling_what_has_not_started_takes_its_message_away(
    app: Celery, tenant_database: TenantDatabase, options: dict[str, Any]
) -> None:
    task_id, kept = launched(app, **options), launched(app, **options)
    assert get(app, task_id).state == ("delayed" if options else "queued")

    assert cancelled(app, task_id, BORIS) is Cancellation.CANCELLED

    assert messages(tenant_database) == [kept]
    ended = get(app, task_id)
    assert (ended.state, ended.error_type, ended.error_message) == ("revoked", "TaskRevokedError", "cancelled")
    assert (ended.abort_requested_by, ended.user_id, ended.started_at) == ("boris", "alice", None)
    assert ended.abort_requested_at is not None and ended.finished_at is not None
    with tenant_scope(ACME), pytest.raises(TaskRevokedError):
        app.AsyncResult(task_id).get(timeout=5)


def test_who_waits_for_a_chain_hears_at_once_that_its_first_task_is_cancelled(app: Celery) -> None:
    with tenant_scope(ACME):
        result = chain(app.signature("work"), app.signature("other")).apply_async()
    with tenant_scope(ACME), ContextThreadPoolExecutor() as threads:
        waiting = threads.submit(result.get, timeout=TIMEOUT)
        assert cancelled(app, result.parent.id) is Cancellation.CANCELLED
        with pytest.raises(TaskRevokedError):
            waiting.result()


def test_cancelling_what_waits_for_its_next_attempt_takes_that_away(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    task_id = launched(app)
    tenant_database.execute("DELETE FROM rhesis_tasks.message")  # the first attempt's
    with tenant_scope(ACME):
        app.tasks["work"].apply_async(task_id=task_id, countdown=600, retries=1)
    store(app, task_id, "RETRY", ConnectionError("down"))

    assert cancelled(app, task_id) is Cancellation.CANCELLED

    assert messages(tenant_database) == []
    assert get(app, task_id).state == "revoked"


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_what_has_ended_cannot_be_cancelled(app: Celery, state: str) -> None:
    task_id = launched(app)
    store(app, task_id, state, ValueError("bad") if state != "SUCCESS" else 42)
    before = get(app, task_id)

    assert cancelled(app, task_id) is Cancellation.ENDED

    assert get(app, task_id) == before


def test_what_runs_is_asked_to_stop_by_the_first_who_does(app: Celery) -> None:
    task_id = launched(app)
    store(app, task_id, "STARTED")

    asked = cancelled(app, task_id, BORIS), cancelled(app, task_id)

    assert asked == (Cancellation.ASKED, Cancellation.ASKED)
    running = get(app, task_id)
    assert (running.state, running.abort_requested_by) == ("started", "boris")


def test_nobody_cancels_what_is_not_theirs(app: Celery, tenant_database: TenantDatabase) -> None:
    task_id = launched(app)

    assert cancelled(app, task_id, GLOBEX) is None
    assert cancelled(app, "unknown") is None
    assert cancelled(app, "NUL \0") is None
    with pytest.raises(MissingTenantError):
        cancel_task(app, task_id)

    assert (get(app, task_id).state, messages(tenant_database)) == ("queued", [task_id])


def test_the_same_id_of_another_tenant_is_not_cancelled(app: Celery, tenant_database: TenantDatabase) -> None:
    for tenant in (ACME, GLOBEX):
        launched(app, tenant=tenant, task_id="one")

    assert cancelled(app, "one") is Cancellation.CANCELLED

    assert get(app, "one", GLOBEX).state == "queued"
    assert owned(tenant_database, "SELECT tenant FROM rhesis_tasks.message") == [("globex",)]


def test_what_is_launched_again_after_it_was_cancelled_stays_cancelled(app: Celery) -> None:
    task_id = launched(app)
    cancelled(app, task_id)

    launched(app, task_id=task_id)

    assert get(app, task_id).state == "revoked"


def test_without_records_nothing_can_be_shown(make_app: MakeApp) -> None:
    app = make_app(result_backend="cache+memory://")

    with tenant_scope(ACME), pytest.raises(NotSupportedError, match="keeps no records"):
        get_task(app, "one")


# --- what a record says ------------------------------------------------------------------------------------------

DUE: dict[str, Callable[[datetime.datetime], dict[str, Any]]] = {
    "countdown": lambda _: {"countdown": 3600},
    "eta": lambda due: {"eta": due},
    "text": lambda due: {"eta": due.isoformat()},
    "eta without a zone": lambda due: {"eta": due.replace(tzinfo=None)},
}


@pytest.mark.parametrize("how", DUE)
def test_a_record_says_when_the_task_is_due(make_app: MakeApp, tenant_database: TenantDatabase, how: str) -> None:
    name = tenant_database.owner.url.database
    tenant_database.execute(f"ALTER DATABASE {name} SET TimeZone = 'Asia/Tokyo'")
    app = make_app(broker_url=tenant_database.url)
    app.task(work, base=BaseTask, name="work", shared=False)

    in_an_hour = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)

    found = get(app, launched(app, **DUE[how](in_an_hour)))

    assert found.state == "delayed"
    assert found.eta is not None
    assert abs(found.eta - in_an_hour) < datetime.timedelta(minutes=5)


@pytest.mark.parametrize("options", [{}, {"countdown": 0}, {"eta": datetime.datetime(2020, 1, 1)}, {"countdown": -5}])
def test_what_may_run_at_once_is_queued(app: Celery, options: dict[str, Any]) -> None:
    found = get(app, launched(app, **options))

    assert (found.state, found.eta) == ("queued", None)


@pytest.mark.parametrize("is_wanted", [False, True])
def test_arguments_are_stored_only_if_that_is_wanted(
    app: Celery, tenant_database: TenantDatabase, is_wanted: bool
) -> None:
    app.conf.result_extended = is_wanted
    task_id = launched(app, args=("fox",))
    request = Context(id=task_id, task="work", args=["fox"], kwargs={"of": "dogs"})
    with tenant_scope(ACME):
        app.backend.store_result(task_id, 42, "SUCCESS", request=request)
        meta = app.backend.get_task_meta(task_id)

    (row,) = owned(tenant_database, "SELECT row_to_json(r)::text, args, kwargs FROM rhesis_tasks.task_record r")
    if is_wanted:
        assert (meta["args"], meta["kwargs"]) == (["fox"], {"of": "dogs"})
    else:
        assert "args" not in meta
        assert row[1:] == (None, None)


# --- what it costs -----------------------------------------------------------------------------------------------


def test_lists_and_cancelling_read_by_their_indexes(
    app: Celery, tenant_database: TenantDatabase, superuser: Engine
) -> None:
    """On a hundred thousand tasks; counted, not timed."""
    tenant_database.execute(
        "INSERT INTO rhesis_tasks.task_record (organization_id, task_id, name, state, root_id, launched_at) "
        "SELECT CASE n % 10 WHEN 0 THEN 'globex' ELSE 'acme' END, n::text, 'work', 'queued', (n / 10)::text, "
        "now() - n * interval '1 s' FROM generate_series(1, 100000) n",
        "INSERT INTO rhesis_tasks.message (queue, tenant, task_id, envelope, body) "
        "SELECT 'celery', 'acme', n::text, '{\"headers\": {}}', '' FROM generate_series(1, 100000) n",
        "ANALYZE rhesis_tasks.task_record, rhesis_tasks.message",
    )
    nothing = "NULL, NULL, NULL, NULL, NULL"
    calls = {
        "the latest": f"records_of('acme', {nothing}, NULL, NULL, 50)",
        "a page": f"records_of('acme', {nothing}, now() - interval '50000 s', '50000', 50)",
        "a run": "records_of('acme', NULL, NULL, '77', NULL, NULL, NULL, NULL, 50)",
    }
    for what, call in calls.items():
        assert rows_read(superuser, tenant_database, "task_record", call, 12) <= 12 * 60, what
    cancel = "record_cancel('acme', '{n}', 'me', 'revoked', '', 'T', 'm', '{{queued}}')"
    assert rows_read(superuser, tenant_database, "message", cancel, 12) <= 12 * 2
    assert rows_read(superuser, tenant_database, "task_record", cancel, 12) <= 12 * 2


def test_a_task_of_a_new_table_is_looked_up_by_its_key(
    app: Celery, tenant_database: TenantDatabase, superuser: Engine
) -> None:
    """Planned while the table was empty, and not analyzed since."""
    with superuser.connect() as connection:
        look_up = f"SELECT * FROM rhesis_tasks.record_of('acme', '{7}')"
        connection.exec_driver_sql("ALTER TABLE rhesis_tasks.task_record SET (autovacuum_enabled = off)")
        for _ in range(10):
            connection.exec_driver_sql(look_up).all()
        connection.exec_driver_sql(
            "INSERT INTO rhesis_tasks.task_record (organization_id, task_id, state, root_id) "
            "SELECT 'acme', n::text, 'queued', n::text FROM generate_series(1, 10000) n"
        )
        before = fetched(connection)
        connection.exec_driver_sql(look_up).all()

        assert fetched(connection) - before <= 2


def fetched(connection: Connection) -> int:
    """How many rows of task_record this transaction has read by an index."""
    query = "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'task_record'"
    return int(connection.exec_driver_sql(query).scalar_one())


def rows_read(superuser: Engine, database: TenantDatabase, table: str, call: str, times: int) -> int:
    """How many rows of a table so many calls read, of which the later ones may have other plans than the first."""
    with superuser.connect() as connection:
        connection.exec_driver_sql(f'SET LOCAL ROLE "{database.role}"')
        for n in range(1, times + 1):
            connection.exec_driver_sql(f"SELECT * FROM rhesis_tasks.{call.format(n=n)}").all()
        connection.exec_driver_sql("RESET ROLE")
        scans, rows, fetched = connection.exec_driver_sql(
            "SELECT seq_scan, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables "
            f"WHERE schemaname = 'rhesis_tasks' AND relname = '{table}'"
        ).one()
        connection.rollback()
    assert scans == 0, f"{scans} scans of the whole table"
    return int(rows + fetched)


# --- on workers --------------------------------------------------------------------------------------------------


class Rig:
    """The application in this process, and a worker of its own that does one task at a time and holds others."""

    def __init__(self, tasks: Any, database: TenantDatabase, path: Path) -> None:
        self.tasks = tasks
        self.app: Celery = tasks.app
        self.database = database
        self._path = path

    def started(self) -> list[str]:
        """Whose bodies were begun."""
        return self._path.read_text().splitlines()

    def run_until(self, gate: Path, listens: bool = True, **options: Any) -> str:
        """Launch a task that lasts until there is a file."""
        with tenant_scope(ACME):
            return str(self.tasks.until.apply_async((str(gate), listens), **options).id)

    def wait_started(self, task_id: str) -> None:
        wait_until("the task to be started", lambda: task_id in self.started(), TIMEOUT)

    def ended(self, task_id: str) -> TaskRecord:
        wait_until("the task to end", lambda: get(self.app, task_id).finished_at is not None, TIMEOUT)
        return get(self.app, task_id)

    def settle(self) -> None:
        wait_until("all messages to be done", lambda: not messages(self.database), TIMEOUT)


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "status_tasks") as found:
        yield found


@pytest.fixture(scope="module", params=["prefork", "threads"])
def rig(
    request: pytest.FixtureRequest,
    tasks_and_database: tuple[Any, TenantDatabase],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    tasks, database = tasks_and_database
    path = tmp_path_factory.mktemp("status") / "started"
    path.touch()
    with running_worker(
        "status_tasks",
        cwd=HERE,
        pool=request.param,
        concurrency=1,
        env={"DATABASE_URL": database.url, "STATUS": str(path)},
        arguments=("--prefetch-multiplier", "4"),
    ):
        yield Rig(tasks, database, path)


def test_what_a_worker_holds_and_has_not_started_is_not_run(rig: Rig, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = rig.run_until(gate)
    rig.wait_started(first)
    second = rig.run_until(gate)
    held = "SELECT claim_token IS NOT NULL FROM rhesis_tasks.message WHERE task_id = :id"
    wait_until("the worker to hold it", lambda: owned(rig.database, held, id=second) == [(True,)], TIMEOUT)

    assert cancelled(rig.app, second) is Cancellation.CANCELLED
    gate.touch()

    assert rig.ended(first).result == "done"
    rig.settle()
    dropped = get(rig.app, second)
    assert (dropped.state, dropped.started_at, dropped.error_message) == ("revoked", None, "cancelled")
    assert second not in rig.started()


def test_what_runs_can_stop_when_it_is_asked_to(rig: Rig, tmp_path: Path) -> None:
    task_id = rig.run_until(tmp_path / "never")
    rig.wait_started(task_id)

    assert cancelled(rig.app, task_id, BORIS) is Cancellation.ASKED

    ended = rig.ended(task_id)
    assert (ended.state, ended.result, ended.abort_requested_by) == ("success", "aborted", "boris")


@pytest.mark.parametrize("rig", ["prefork"], indirect=True)
def test_what_runs_is_ended_with_its_process_if_that_is_wanted(rig: Rig, tmp_path: Path) -> None:
    task_id = rig.run_until(tmp_path / "never", listens=False)
    rig.wait_started(task_id)

    with tenant_scope(ACME):
        assert cancel_task(rig.app, task_id, terminate=True) is Cancellation.TERMINATED

    ended = rig.ended(task_id)
    assert (ended.state, ended.error_message, ended.abort_requested_by) == ("revoked", "terminated", "alice")


def test_a_cancelled_delay_never_runs(rig: Rig, tmp_path: Path) -> None:
    task_id = rig.run_until(tmp_path / "never", countdown=1.5)

    assert cancelled(rig.app, task_id) is Cancellation.CANCELLED

    rig.settle()
    assert get(rig.app, task_id).started_at is None


def test_what_nobody_started_in_time_has_expired(rig: Rig) -> None:
    with tenant_scope(ACME):
        result = rig.tasks.echo.apply_async((1,), headers={"expires": "2020-01-01T00:00:00+00:00"})

    expired = rig.ended(result.id)

    assert (expired.state, expired.error_type, expired.error_message) == ("expired", "TaskRevokedError", "expired")
    with tenant_scope(ACME):
        assert result.state == "REVOKED"


def test_a_run_on_a_worker_is_a_tree(rig: Rig) -> None:
    echo, add, first = rig.tasks.echo, rig.tasks.add, uuid()
    with tenant_scope(ACME):
        result = chain(echo.s(1).set(task_id=first), group(add.s(1), add.s(2)), echo.s()).apply_async()
        assert rig.app.AsyncResult(result.id).get(timeout=TIMEOUT) == [2, 3]
        rig.settle()
        node = task_tree(rig.app, result.id)
    assert node is not None

    def names(each: TaskNode) -> list[Any]:
        return [str(each.record.name).removeprefix("status_tasks."), *map(names, each.children)]

    # As Celery has it: the last part to end launches the body.  (5.6 says that it is the first task's.)
    assert node.record.task_id == first
    is_5_6 = celery.VERSION[:2] == (5, 6)
    expected = [["add"], ["add"], ["echo"]] if is_5_6 else [["add"], ["add", ["echo"]]]
    assert sorted(names(node)[1:], key=len) == expected


# --- upgrading ---------------------------------------------------------------------------------------------------

# Back to what version 2 had, in which workers wrote to the tables themselves.
AS_IN_VERSION_2 = (
    "ALTER TABLE rhesis_tasks.task_record DROP COLUMN progress_done, DROP COLUMN progress_total, "
    "DROP COLUMN progress_message, DROP COLUMN abort_requested_at, DROP COLUMN abort_requested_by, DROP COLUMN eta, "
    "DROP COLUMN args, DROP COLUMN kwargs, DROP COLUMN wanted_until",
    "ALTER TABLE rhesis_tasks.group_record DROP COLUMN chord_size, DROP COLUMN chord_added, DROP COLUMN chord_done_at",
    "DROP TABLE rhesis_tasks.chord_part",
    "DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc "
    "WHERE pronamespace = 'rhesis_tasks'::regnamespace AND (proname ~ '^(record|group|result|chord)_' "
    "OR proname = 'records_of') LOOP EXECUTE 'DROP FUNCTION ' || f; END LOOP; END $$",
    "DROP INDEX rhesis_tasks.task_record_launched_at, rhesis_tasks.task_record_root, rhesis_tasks.message_task_id",
    "UPDATE rhesis_tasks.schema_version SET version = 2",
    "INSERT INTO rhesis_tasks.task_record (organization_id, task_id, name, state, result, finished_at) VALUES "
    "('acme', 'done', 'work', 'success', '42', now()), ('acme', 'waiting', 'work', 'queued', NULL, NULL)",
    "INSERT INTO rhesis_tasks.message (queue, tenant, task_id, envelope, body) "
    "VALUES ('celery', 'acme', 'waiting', '{\"content-type\": \"application/json\", \"headers\": {}}', '')",
)

WRITE_OF_VERSION_2 = """\
INSERT INTO rhesis_tasks.task_record AS r (organization_id, task_id, name, state) VALUES ('acme', 'old', 'work', '{}')
ON CONFLICT (organization_id, task_id) DO UPDATE SET state = excluded.state WHERE r.state IN ('queued', 'started')
"""


def test_an_upgrade_of_version_2_keeps_its_records_and_its_workers(
    make_app: MakeApp, tenant_database: TenantDatabase, superuser: Engine
) -> None:
    tenant_database.execute(*AS_IN_VERSION_2)

    def old_worker(state: str) -> None:
        with superuser.begin() as connection:
            connection.exec_driver_sql(f'SET LOCAL ROLE "{tenant_database.role}"')
            connection.exec_driver_sql("SET LOCAL rhesis_tasks.organization_id = 'acme'")
            connection.exec_driver_sql(WRITE_OF_VERSION_2.format(state))

    old_worker("started")
    create_schema(tenant_database.owner, roles=[tenant_database.role])
    old_worker("success")

    app = make_app(broker_url=tenant_database.url)
    assert [get(app, task_id).state for task_id in ("done", "waiting", "old")] == ["success", "queued", "success"]
    assert get(app, "done").result == 42
    assert set(listed(app)) == {"done", "waiting", "old"}
    assert cancelled(app, "waiting") is Cancellation.CANCELLED
    assert messages(tenant_database) == []
