"""Chords: the last of the parts launches the body, once, whatever becomes of them and of the workers."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from applications import application
from celery import Celery, chain, chord, group, signals
from celery.app.task import Context
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid
from record_statements import noted_statements
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks import BaseTask, TenantContext, configure, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.headers import HEADER, Envelope, encode
from rhesis_tasks.hooks import on_tenant_failure
from rhesis_tasks.postgres.engines import shared_engine
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.status import Cancellation, cancel_task
from rhesis_tasks.testing import TenantDatabase, running_worker

if TYPE_CHECKING:
    from conftest import MakeApp

HERE = Path(__file__).parent
TIMEOUT = 30
A = TenantContext("tenant-a", "ann")
B = TenantContext("tenant-b", "bob")


class Rig:
    """The application in this process, and a worker of its own."""

    def __init__(self, tasks: Any, database: TenantDatabase, worker: Child, pool: str, path: Path) -> None:
        self.tasks = tasks
        self.database = database
        self.worker = worker
        self.pool = pool
        self._path = path

    def launch(self, header: Any, body: Any = None, tenant: TenantContext = A) -> AsyncResult[Any]:
        with tenant_scope(tenant):
            return chord(header)(self.tasks.total.s() if body is None else body)

    def get(self, result: AsyncResult[Any], tenant: TenantContext = A) -> Any:
        """What the body returned; a handle with parents would raise what they raised."""
        with tenant_scope(tenant):
            return self.tasks.app.AsyncResult(result.id).get(timeout=TIMEOUT)

    def record(self, task_id: str, tenant: TenantContext = A) -> TaskRecord | None:
        with tenant_scope(tenant):
            found: TaskRecord | None = self.tasks.app.backend.get_record(task_id)
            return found

    def lines(self) -> Counter[str]:
        return Counter(self._path.read_text().splitlines())

    def until(self, line: str) -> None:
        wait_until(f"the line {line!r}", lambda: self.lines()[line] > 0, TIMEOUT)

    def settle(self) -> None:
        """Wait until there is nothing to do any more."""
        left = (
            "SELECT tableoid::regclass::text, queue, task_name, task_id, holder, deliveries, due_at, published_at "
            "FROM rhesis_tasks.message"
        )
        try:
            wait_until("all messages to be done", lambda: not self.owned(left), TIMEOUT)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.owned(left)}") from None

    def owned(self, query: str, **parameters: Any) -> list[Any]:
        with self.database.owner.connect() as connection:
            return [tuple(row) for row in connection.execute(text(query), parameters)]


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "chord_tasks") as found:
        yield found


@pytest.fixture(scope="module", params=["prefork", "threads"])
def rig(
    request: pytest.FixtureRequest,
    tasks_and_database: tuple[Any, TenantDatabase],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    tasks, database = tasks_and_database
    path = tmp_path_factory.mktemp("chords") / "lines"
    path.touch()
    environment = {"DATABASE_URL": database.url, "CHORDS": str(path)}
    with running_worker("chord_tasks", cwd=HERE, pool=request.param, concurrency=4, env=environment) as worker:
        yield Rig(tasks, database, worker, request.param, path)


ON_PREFORK = pytest.mark.parametrize("rig", ["prefork"], indirect=True)


def failed_part(error: ChordError) -> str:
    """The id of the part that the error names."""
    return str(error).split()[1]


# --- waiting for it -----------------------------------------------------------------------------------------------


@ON_PREFORK
@pytest.mark.timeout(60)
def test_who_waits_for_a_body_that_is_not_on_record_yet_is_told_and_does_not_look_for_it(rig: Rig) -> None:
    with tenant_scope(A):
        result = chord([rig.tasks.echo.s(1), rig.tasks.echo.s(2).set(countdown=1)], rig.tasks.total.s()).apply_async()

        # It looks by itself after an hour.
        assert result.get(timeout=3600, interval=3600) == [1, 2]


@ON_PREFORK
@pytest.mark.timeout(60)
@pytest.mark.parametrize("length", [2, 4])
def test_who_waits_for_a_chain_is_told_that_its_last_task_is_on_record(rig: Rig, length: int) -> None:
    steps = [rig.tasks.echo.s(1).set(countdown=1), *[rig.tasks.echo.s() for _ in range(length - 1)]]
    with tenant_scope(A):
        result = chain(*steps).apply_async()

        assert result.get(timeout=3600, interval=3600) == 1


# --- what a body gets --------------------------------------------------------------------------------------------


def test_a_body_gets_the_results_in_the_order_of_the_header(rig: Rig) -> None:
    """One test for many canvases, since each takes a moment."""
    echo, add, total = rig.tasks.echo, rig.tasks.add, rig.tasks.total
    canvases: dict[str, tuple[Any, Any]] = {
        "plain": (chord([echo.s(i) for i in range(3)], total.s()), [0, 1, 2]),
        "a hundred": (chord([echo.s(i) for i in range(100)], total.s()), list(range(100))),
        "a generator": (chord((echo.s(i) for i in range(3)), total.s()), [0, 1, 2]),
        "one part": (chord([echo.s(7)], total.s()), [7]),
        "no part": (chord([], total.s()), []),
        "a group as header": (chord(group(echo.s(1), echo.s(2)), total.s()), [1, 2]),
        "structures": (chord([echo.s([1, {"a": None}]), echo.s(None)], total.s()), [[1, {"a": None}], None]),
        "nested": (chord([chord([echo.s(1), echo.s(2)], total.s()), echo.s(3)], total.s()), [[1, 2], 3]),
        "nested twice": (
            chord([chord([chord([echo.s(1), echo.s(2)], total.s()), echo.s(3)], total.s())], total.s()),
            [[[1, 2], 3]],
        ),
        "in a chain": (chain(echo.s(1), group(add.s(1), add.s(2)), total.s(), echo.s()), [2, 3]),
        "two in a chain": (
            chain(group(echo.s(1), echo.s(2)), total.s(), group(echo.s(), echo.s()), total.s()),
            [[1, 2], [1, 2]],
        ),
        "chains": (chord([chain(echo.s(1), add.s(1), add.s(1)), echo.s(5)], total.s()), [3, 5]),
        "a chain as body": (chord([echo.s(1), echo.s(2)], chain(total.s(), echo.s())), [1, 2]),
        "a chord as body": (
            chord([echo.s(1), echo.s(2)], chord([total.s(), total.s()], total.s())), [[1, 2], [1, 2]]
        ),
        "parts that ignore their results": (chord([rig.tasks.quiet.s(i) for i in range(3)], total.s()), [0, 1, 2]),
        "parts that are retried": (chord([rig.tasks.flaky.s(1), echo.s(2)], total.s()), [1, 2]),
        "parts that are replaced": (
            chord([echo.s(0), rig.tasks.replaced.s(1), echo.s(2)], total.s()), [0, ["tenant-a", 1], 2]
        ),
        "parts that are replaced by a chord": (
            chord([rig.tasks.replaced_by_chord.s([1, 2]), echo.s(3)], total.s()), [[1, 2], 3]
        ),
    }  # fmt: skip
    with tenant_scope(A):
        launched = {name: canvas.apply_async() for name, (canvas, _) in canvases.items()}

    found = {name: rig.get(result) for name, result in launched.items()}

    assert found == {name: expected for name, (_, expected) in canvases.items()}
    rig.settle()
    assert rig.owned("SELECT * FROM rhesis_tasks.chord_part") == []
    assert not [line for line in rig.lines() if line.startswith("published")], "nothing polls for a chord"
    assert "chord_unlock" not in rig.worker.output


def test_groups_in_a_header_come_as_celery_has_them(rig: Rig) -> None:
    echo, add = rig.tasks.echo, rig.tasks.add

    of_group = rig.launch([group(echo.s(1), echo.s(2)), echo.s(3)])
    of_chain = rig.launch([chain(echo.s(1), group(add.s(1), add.s(2))), echo.s(5)])

    assert sorted(rig.get(of_group)) == [1, 2, 3], "Celery makes them parts like the others"
    assert rig.get(of_chain) == [[2, 3], 5]


def test_what_a_part_adds_is_waited_for_and_works_for_the_same_tenant(rig: Rig) -> None:
    result = rig.launch([rig.tasks.adding.s(1), rig.tasks.echo.s(5)])

    assert sorted(rig.get(result), key=str) == [1, 5, ["tenant-a", 2]]


def test_a_body_runs_once_for_the_launcher_who_alone_sees_the_result(rig: Rig) -> None:
    result = launch_with_context(
        chord([rig.tasks.whose.s(i) for i in range(2)], rig.tasks.total_and_whose.s()), context=A
    )

    assert rig.get(result) == ["tenant-a", "ann", [["tenant-a", 0], ["tenant-a", 1]]]
    assert rig.record(result.id, B) is None
    with tenant_scope(A):
        parts = [each.id for each in result.parent.results]
    assert all(rig.record(each) is not None and rig.record(each, B) is None for each in parts)
    rig.settle()
    assert rig.lines()[f"body {result.id}"] == 1


def test_parts_of_other_tenants_are_theirs_and_the_body_is_the_launchers(rig: Rig) -> None:
    of_b = {"headers": {HEADER: encode(Envelope(B))}}
    header = [rig.tasks.whose.s(0), rig.tasks.whose.s(1).set(**of_b), rig.tasks.whose.s(2).set(**of_b)]

    result = rig.launch(header, rig.tasks.total_and_whose.s())

    assert rig.get(result) == ["tenant-a", "ann", [["tenant-a", 0], ["tenant-b", 1], ["tenant-b", 2]]]
    assert rig.record(result.id, B) is None
    with tenant_scope(A):
        parts = [each.id for each in result.parent.results]
    assert [rig.record(each, A) is not None for each in parts] == [True, False, False]
    assert [rig.record(each, B) is not None for each in parts] == [False, True, True]


def test_chords_of_two_tenants_at_once_keep_apart(rig: Rig) -> None:
    def run(number: int) -> tuple[TenantContext, AsyncResult[Any]]:
        tenant = (A, B)[number % 2]
        header = [rig.tasks.whose.s(number), rig.tasks.whose.s(number)]
        return tenant, rig.launch(header, rig.tasks.total_and_whose.s(), tenant)

    with ThreadPoolExecutor(4) as threads:
        launched = list(threads.map(run, range(20)))

    for number, (tenant, result) in enumerate(launched):
        own = [tenant.organization_id, number]
        assert rig.get(result, tenant) == [tenant.organization_id, tenant.user_id, [own, own]]
        assert rig.record(result.id, B if tenant is A else A) is None


def test_the_same_group_id_of_two_tenants_is_two_chords(rig: Rig) -> None:
    group_id = uuid()
    launched = {}
    for tenant in (A, B):
        with tenant_scope(tenant):
            header = group([rig.tasks.whose.s(0), rig.tasks.whose.s(1)], task_id=group_id)
            launched[tenant.organization_id] = tenant, chord(header)(rig.tasks.total.s())

    for name, (tenant, result) in launched.items():
        assert rig.get(result, tenant) == [[name, 0], [name, 1]]


def test_a_body_runs_once_though_the_parts_end_at_the_same_time(rig: Rig) -> None:
    results = [rig.launch([rig.tasks.echo.s(i), rig.tasks.echo.s(-i)]) for i in range(30)]

    assert [rig.get(result) for result in results] == [[i, -i] for i in range(30)]
    rig.settle()
    lines = rig.lines()
    assert [lines[f"body {result.id}"] for result in results] == [1] * 30


# --- parts that do not succeed -----------------------------------------------------------------------------------


def failing_chord(rig: Rig, part: Any, tenant: TenantContext = A) -> tuple[str, AsyncResult[Any]]:
    """A chord of three of which one does not succeed, with an error callback: that part's id, and the result."""
    part_id = uuid()
    header = [rig.tasks.echo.s(1), part.set(task_id=part_id), rig.tasks.echo.s(2)]
    return part_id, rig.launch(header, rig.tasks.total.s().on_error(rig.tasks.errback.s()), tenant)


def assert_failed(rig: Rig, part_id: str, result: AsyncResult[Any], cause: str) -> None:
    with pytest.raises(ChordError, match=cause) as raised:
        rig.get(result)
    assert failed_part(raised.value) == part_id
    rig.until(f"errback {result.id}")
    rig.settle()
    record = rig.record(result.id)
    assert record is not None
    assert (record.state, record.error_type, record.organization_id) == ("failure", "ChordError", "tenant-a")
    assert rig.record(result.id, B) is None
    lines = rig.lines()
    assert (lines[f"errback {result.id}"], lines[f"body {result.id}"]) == (1, 0)


def test_a_part_that_fails_fails_the_body(rig: Rig) -> None:
    part_id, result = failing_chord(rig, rig.tasks.broken.s("it"))

    assert_failed(rig, part_id, result, r"ValueError\('it is broken'\)")


def test_a_part_that_fails_in_a_nested_chord_fails_all_bodies_around_it(rig: Rig) -> None:
    inner_id = uuid()
    inner = chord([rig.tasks.broken.s("it"), rig.tasks.echo.s(1)], rig.tasks.total.s().set(task_id=inner_id))

    result = rig.launch([inner, rig.tasks.echo.s(2)])

    with pytest.raises(ChordError):
        rig.get(result)
    inner_record = rig.record(inner_id)
    assert inner_record is not None
    assert (inner_record.state, inner_record.error_type) == ("failure", "ChordError")


def test_a_part_that_is_cancelled_before_it_is_started_fails_the_body(rig: Rig) -> None:
    part_id, result = failing_chord(rig, rig.tasks.until.s("/nowhere", 1).set(countdown=2))

    with tenant_scope(A):
        assert cancel_task(rig.tasks.app, part_id) is Cancellation.CANCELLED

    assert_failed(rig, part_id, result, "TaskRevokedError")
    record = rig.record(part_id)
    assert record is not None
    assert (record.state, record.abort_requested_by, record.started_at) == ("revoked", "ann", None)
    assert rig.lines()[f"started {part_id}"] == 0


def test_a_part_that_is_revoked_by_an_operator_fails_the_body(rig: Rig) -> None:
    part_id, result = failing_chord(rig, rig.tasks.echo.s(1).set(countdown=2))

    rig.tasks.app.control.revoke(part_id)

    assert_failed(rig, part_id, result, "TaskRevokedError")


def test_a_part_that_expires_in_its_queue_fails_the_body(rig: Rig) -> None:
    part_id, result = failing_chord(rig, rig.tasks.echo.s(1).set(headers={"expires": "2020-01-01T00:00:00+00:00"}))

    assert_failed(rig, part_id, result, "TaskRevokedError")
    record = rig.record(part_id)
    assert record is not None and record.state == "expired"


A_PART = "ChordError", "a part of its chord failed, and it was not run"
A_TASK = "ValueError", "a task before it in its chain failed, and it was not run"
NEVER_BEGINS: dict[str, tuple[Callable[[Any], Any], tuple[str, str]]] = {
    "the body of a chord": (lambda t: chord([t.broken.si(1), t.echo.si(2)], t.total.s()), A_PART),
    "a body that is a chain": (lambda t: chord([t.broken.si(1)], chain(t.total.s(), t.echo.s())), A_PART),
    "a body that is a chord": (lambda t: chord([t.broken.si(1)], chord([t.echo.si(2)], t.total.s())), A_PART),
    "what follows a group": (lambda t: chain(group(t.broken.si(1), t.echo.si(2)), t.total.s(), t.echo.s()), A_PART),
    "what follows a chord": (lambda t: chain(t.echo.si(1), chord([t.broken.si(1)], t.total.s()), t.echo.s()), A_PART),
    "around a chord": (lambda t: chord([chord([t.broken.si(1)], t.total.s()), t.echo.si(2)], t.total.s()), A_PART),
    "around a chain": (
        lambda t: chord([chain(t.broken.si(1), chord([t.echo.si(2)], t.total.s())), t.echo.si(3)], t.total.s()),
        A_PART,
    ),
    "the end of a chain": (lambda t: chain(t.broken.si(1), t.echo.s(), t.echo.s()), A_TASK),
    "the end of a chain in a chain": (lambda t: chain(chain(t.broken.si(1), t.echo.s()), t.echo.s()), A_TASK),
    "a chord at the end of a chain": (lambda t: chain(t.broken.si(1), chord([t.echo.si(2)], t.total.s())), A_TASK),
    "after a task that ignores its result": (lambda t: chain(t.quietly_broken.si(1), t.echo.s()), A_TASK),
}


@pytest.mark.parametrize("what", NEVER_BEGINS)
def test_what_never_begins_has_failed_and_its_end_is_told(rig: Rig, what: str) -> None:
    canvas, (error, reason) = NEVER_BEGINS[what]

    result = launch_with_context(canvas(rig.tasks), context=A)

    def told() -> list[str]:
        return [line for line in rig.lines().elements() if line.startswith(f"told {result.id}:failure ")]

    wait_until("hooks to be told", told, TIMEOUT)
    rig.settle()
    record = rig.record(result.id)
    assert record is not None
    assert (record.state, record.error_type, record.failure_reason) == ("failure", error, reason)
    [line] = told()
    assert line.startswith(f"told {result.id}:failure tenant-a {error} ")
    assert line.endswith(f" {reason}")


def test_of_a_chain_that_is_cut_off_the_last_task_is_told_as_part_of_the_run(rig: Rig) -> None:
    ids = [uuid() for _ in range(3)]
    tasks = [rig.tasks.broken.si(1), *(rig.tasks.echo.si(2) for _ in ids[1:])]
    whole = chain(*(task.set(task_id=task_id) for task, task_id in zip(tasks, ids, strict=True)), rig.tasks.echo.s())

    result = launch_with_context(whole, context=A)

    last = f"told {result.id}:failure tenant-a ValueError {ids[0]} {A_TASK[1]}"
    rig.until(last)
    rig.settle()
    told = [line.split()[1].removesuffix(":failure") for line in rig.lines().elements() if line.startswith("told ")]
    assert sorted(each for each in told if each in (*ids, result.id)) == sorted((ids[0], result.id))


END_OF_A_FIRST_TASK = {
    "cancelled": ({"countdown": 2}, "revoked"),
    "cancelled, compressed": ({"countdown": 2, "compression": "zlib"}, "revoked"),
    "revoked": ({"countdown": 2}, "revoked"),
    "expired": ({"headers": {"expires": "2020-01-01T00:00:00+00:00"}}, "expired"),
}


def end_first_task(rig: Rig, task_id: str, how: str) -> None:
    if how.startswith("cancelled"):
        with tenant_scope(A):
            assert cancel_task(rig.tasks.app, task_id) is Cancellation.CANCELLED
    elif how == "revoked":
        rig.tasks.app.control.revoke(task_id)


@pytest.mark.parametrize("how", END_OF_A_FIRST_TASK)
def test_who_waits_for_the_end_of_a_chain_hears_that_its_first_task_never_runs(rig: Rig, how: str) -> None:
    options, state = END_OF_A_FIRST_TASK[how]
    first_id = uuid()
    with tenant_scope(A):
        whole = chain(rig.tasks.echo.s(1).set(task_id=first_id, **options), rig.tasks.echo.s(), rig.tasks.echo.s())
        result = whole.apply_async()

    end_first_task(rig, first_id, how)

    with pytest.raises(TaskRevokedError):
        rig.get(result)
    rig.settle()
    records = [rig.record(str(each.id)) for each in (result, result.parent)]
    assert [(each.state, each.organization_id) for each in records if each] == [(state, "tenant-a")] * 2
    assert rig.record(result.id, B) is None


@pytest.mark.parametrize("how", END_OF_A_FIRST_TASK)
def test_a_chain_that_is_cut_off_fails_the_chord_that_it_is_a_part_of(rig: Rig, how: str) -> None:
    options, _ = END_OF_A_FIRST_TASK[how]
    first_id, last_id = uuid(), uuid()
    part = chain(rig.tasks.echo.s(1).set(task_id=first_id, **options), rig.tasks.echo.s().set(task_id=last_id))
    result = rig.launch([part, rig.tasks.echo.s(2)], rig.tasks.total.s().on_error(rig.tasks.errback.s()))

    end_first_task(rig, first_id, how)

    assert_failed(rig, last_id, result, "TaskRevokedError")


def test_a_part_that_is_asked_to_stop_ends_as_it_likes(rig: Rig) -> None:
    part_id = uuid()
    result = rig.launch([rig.tasks.until.s("/nowhere", 1).set(task_id=part_id), rig.tasks.echo.s(2)])
    rig.until(f"started {part_id}")

    with tenant_scope(A):
        assert cancel_task(rig.tasks.app, part_id) is Cancellation.ASKED

    assert rig.get(result) == ["aborted", 2]


@ON_PREFORK
def test_a_part_that_is_terminated_fails_the_body(rig: Rig) -> None:
    part_id, result = failing_chord(rig, rig.tasks.until.s("/nowhere", 1))
    rig.until(f"started {part_id}")

    with tenant_scope(A):
        assert cancel_task(rig.tasks.app, part_id, terminate=True) is Cancellation.TERMINATED

    with pytest.raises(ChordError) as raised:
        rig.get(result)
    assert failed_part(raised.value) == part_id


# --- workers that die --------------------------------------------------------------------------------------------


@ON_PREFORK
def test_a_part_whose_process_dies_is_run_again_and_counted_once(rig: Rig) -> None:
    part_id = uuid()

    result = rig.launch([rig.tasks.dying.s(1).set(task_id=part_id), rig.tasks.echo.s(2)])

    assert rig.get(result) == [1, 2]
    rig.settle()
    lines = rig.lines()
    assert (lines[f"dying {part_id}"], lines[f"body {result.id}"]) == (2, 1)


@ON_PREFORK
def test_a_process_that_dies_while_it_launches_the_body_leaves_that_to_the_next(rig: Rig) -> None:
    part_id = uuid()

    result = rig.launch([rig.tasks.persistent.s(1).set(task_id=part_id)], rig.tasks.fragile.s())

    assert rig.get(result) == [1]
    rig.settle()
    lines = rig.lines()
    assert (lines[f"persistent {part_id}"], lines[f"body {result.id}"]) == (2, 1)


# --- a login that launches only ----------------------------------------------------------------------------------


def test_a_login_that_only_launches_can_launch_a_chord_and_wait_for_it(rig: Rig) -> None:
    role = f"test_web_{secrets.token_hex(4)}"
    with rig.database.admin.connect() as admin:
        admin.exec_driver_sql(f"CREATE ROLE {quote_identifier(role)} LOGIN PASSWORD 'secret'")
    create_schema(rig.database.owner, web_roles=[role])
    url = database_url(rig.database.url).set(username=role, password="secret").render_as_string(hide_password=False)
    app = Celery("web", set_as_current=False)
    configure(app, url)
    try:
        with tenant_scope(A):
            part = app.signature("chord_tasks.echo")
            canvas = chord([part.clone((1,)), part.clone((2,))], app.signature("chord_tasks.total"), app=app)
            result = canvas.apply_async()

            assert result.get(timeout=TIMEOUT) == [1, 2]
    finally:
        unconfigure(app)
        app.close()
        shared_engine(url).dispose()
        name = database_url(rig.database.url).database
        superuser = create_engine(rig.database.admin.url.set(database=name), poolclass=NullPool)
        with superuser.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


# --- the tables, without a worker --------------------------------------------------------------------------------


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    app = make_app()

    @app.task(base=BaseTask, name="total", shared=False)
    def total(results: Any) -> None: ...

    return app


def begun(app: Celery, size: int) -> list[Context]:
    """A chord as it is launched, and the requests of its parts."""
    group_id, body_id = uuid(), uuid()
    with tenant_scope(A):
        header = {HEADER: encode(Envelope(A))}
        body = app.signature("total", headers=header, task_id=body_id)
        parts = [uuid() for _ in range(size)]
        app.backend.apply_chord((group_id, [app.AsyncResult(part) for part in parts]), body)
        app.backend.set_chord_size(group_id, size)
    return [
        Context(id=part, task="part", group=group_id, group_index=index, chord=dict(body), **header)
        for index, part in enumerate(parts)
    ]


@pytest.fixture
def published() -> Iterator[list[str]]:
    """The names of the tasks that are published."""
    names: list[str] = []

    def note(sender: str, **_: Any) -> None:
        names.append(sender)

    signals.before_task_publish.connect(note, weak=False)
    yield names
    signals.before_task_publish.disconnect(note)


def test_the_last_parts_may_end_at_the_same_moment(app: Celery, published: list[str]) -> None:
    repetitions, parts = 25, 4
    chords = [begun(app, parts) for _ in range(repetitions)]
    together = threading.Barrier(parts, timeout=TIMEOUT)

    def end(number: int) -> None:
        for requests in chords:
            together.wait()
            app.backend.on_chord_part_return(requests[number], "SUCCESS", number)

    with ThreadPoolExecutor(parts) as threads:
        list(threads.map(end, range(parts), timeout=TIMEOUT))

    assert published == ["total"] * repetitions


def test_more_chords_may_end_at_the_same_moment_than_there_are_connections_for_statements(
    app: Celery, published: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    pool: Any = shared_engine(app.backend.url).pool
    number = pool.size() + pool._max_overflow + 5
    ended = [*[("SUCCESS", 1)] * number, *[("FAILURE", ValueError("broken"))] * number]
    parts = [part for _ in ended for part in begun(app, 1)]
    together = threading.Barrier(len(parts), timeout=TIMEOUT)

    def end(part: Context, state: str, result: object) -> None:
        together.wait()
        app.backend.on_chord_part_return(part, state, result)

    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(end, parts, *zip(*ended, strict=True), timeout=TIMEOUT))

    assert "is said once the server is back" not in caplog.text
    assert published == ["total"] * number
    with tenant_scope(A):
        states = [app.backend.get_record(part.chord["options"]["task_id"]).state for part in parts]
    assert states == ["queued"] * number + ["failure"] * number


def test_a_part_that_is_delivered_twice_is_counted_once(app: Celery, published: list[str]) -> None:
    first, second = begun(app, 2)
    for _ in range(3):
        app.backend.on_chord_part_return(first, "SUCCESS", 1)
    before = list(published)

    for _ in range(3):
        app.backend.on_chord_part_return(second, "SUCCESS", 2)
    app.backend.on_chord_part_return(first, "SUCCESS", 1)

    assert (before, published) == ([], ["total"])


def test_a_part_that_is_not_the_last_is_recorded_in_the_commit_that_stores_what_it_returned(
    app: Celery, published: list[str]
) -> None:
    parts = begun(app, 3)
    with noted_statements(shared_engine(app.backend.url)) as statements:
        for part in parts[:2]:
            app.backend.mark_as_done(part.id, 1, part)
        before = len(statements)
        app.backend.mark_as_done(parts[2].id, 1, parts[2])

    assert (before, published) == (2, ["total"])
    with tenant_scope(A):
        assert [app.backend.get_record(part.id).state for part in parts] == ["success"] * 3


def test_a_body_is_published_once_the_broker_can_be_reached(
    app: Celery, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [part] = begun(app, 1)
    publish, attempts = app.send_task, iter([OperationalError("no broker"), OperationalError("no broker")])

    def sometimes_unreachable(*args: Any, **options: Any) -> Any:
        for error in attempts:
            raise error
        return publish(*args, **options)

    monkeypatch.setattr(app, "send_task", sometimes_unreachable)

    app.backend.on_chord_part_return(part, "SUCCESS", 1)
    app.backend.on_chord_part_return(part, "SUCCESS", 1)

    assert published == ["total"]


def test_a_body_that_can_never_be_published_fails_with_the_reason(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    [part] = begun(app, 1)

    def impossible(*_: Any, **__: Any) -> None:
        raise ValueError("it is too large")

    monkeypatch.setattr(app, "send_task", impossible)

    app.backend.on_chord_part_return(part, "SUCCESS", 1)

    with tenant_scope(A), pytest.raises(ChordError, match="it is too large"):
        app.AsyncResult(part.chord["options"]["task_id"]).get(timeout=TIMEOUT)


@pytest.fixture
def destinations() -> Iterator[list[tuple[str, str]]]:
    """The names of the tasks that are published, and where to."""
    found: list[tuple[str, str]] = []

    def note(sender: str, routing_key: str, **_: Any) -> None:
        found.append((sender, routing_key))

    signals.before_task_publish.connect(note, weak=False)
    yield found
    signals.before_task_publish.disconnect(note)


def end_badly(app: Celery, **options: Any) -> str:
    """The only part of a chord fails; the id of the body."""
    [part] = begun(app, 1)
    part.chord["options"] |= options
    app.backend.on_chord_part_return(part, "FAILURE", ValueError("broken"))
    return str(part.chord["options"]["task_id"])


@pytest.mark.parametrize("by", ["the signature", "the routes", "the default"])
def test_a_bodys_hooks_are_run_where_it_would_have_been(
    app: Celery, destinations: list[tuple[str, str]], by: str
) -> None:
    on_tenant_failure(app)(lambda _: None)
    if by == "the routes":
        app.conf.task_routes = {"total": {"queue": "elsewhere"}, "rhesis_tasks.*": {"queue": "nowhere"}}

    end_badly(app, **({"queue": "elsewhere"} if by == "the signature" else {}))

    queue = app.conf.task_default_queue if by == "the default" else "elsewhere"
    assert destinations == [("rhesis_tasks.run_hooks", queue)]


def test_a_body_without_hooks_is_told_nothing_of(app: Celery, destinations: list[tuple[str, str]]) -> None:
    on_tenant_failure(app, task="another")(lambda _: None)

    end_badly(app)

    assert destinations == []


def test_a_body_that_was_cancelled_before_has_not_failed(app: Celery, destinations: list[tuple[str, str]]) -> None:
    on_tenant_failure(app)(lambda _: None)
    [part] = begun(app, 1)
    body_id = part.chord["options"]["task_id"]
    with tenant_scope(A):
        app.backend.record_launch(body_id, "total")
        assert cancel_task(app, body_id) is Cancellation.CANCELLED

    app.backend.on_chord_part_return(part, "FAILURE", ValueError("broken"))

    with tenant_scope(A):
        assert app.backend.get_record(body_id).state == "revoked"
    assert destinations == []


def test_parts_are_not_complete_while_it_is_not_known_how_many_there_are(app: Celery, published: list[str]) -> None:
    group_id = uuid()
    with tenant_scope(A):
        body = app.signature("total", headers={HEADER: encode(Envelope(A))}, task_id=uuid())
        app.backend.apply_chord((group_id, []), body)
        for index in range(2):
            part = Context(id=uuid(), group=group_id, group_index=index, chord=dict(body))
            app.backend.on_chord_part_return(part, "SUCCESS", index)
        before = list(published)
        app.backend.set_chord_size(group_id, 3)

        part = Context(id=uuid(), group=group_id, group_index=2, chord=dict(body))
        app.backend.on_chord_part_return(part, "SUCCESS", 2)

    assert (before, published) == ([], ["total"])


def test_a_part_that_is_added_twice_since_no_answer_came_is_counted_once(app: Celery, published: list[str]) -> None:
    parts = begun(app, 2)
    added = Context(id=uuid(), task="part", group=parts[0].group, chord=parts[0].chord)
    with tenant_scope(A):
        for _ in range(2):
            app.backend.add_to_chord(added.group, app.AsyncResult(added.id))
    for part in parts:
        app.backend.on_chord_part_return(part, "SUCCESS", 1)
    before = list(published)

    app.backend.on_chord_part_return(added, "SUCCESS", 1)

    assert (before, published) == ([], ["total"])


def chord_rows(database: TenantDatabase) -> list[int]:
    """How many chords and parts there are."""
    with database.owner.connect() as connection:
        tables = ("group_record", "chord_part")
        return [connection.scalar(text(f"SELECT count(*) FROM rhesis_tasks.{table}")) or 0 for table in tables]


def days_later(database: TenantDatabase, days: int) -> None:
    database.execute(f"UPDATE rhesis_tasks.group_record SET created_at = created_at - interval '{days} days'")


def test_a_chord_that_takes_longer_than_results_are_kept_is_completed(
    app: Celery, published: list[str], tenant_database: TenantDatabase
) -> None:
    first, second = begun(app, 2)
    app.backend.on_chord_part_return(first, "SUCCESS", 1)
    days_later(tenant_database, 5)  # result_expires is one

    app.backend.cleanup()
    app.backend.on_chord_part_return(second, "SUCCESS", 2)

    assert published == ["total"]
    app.backend.cleanup()
    assert chord_rows(tenant_database) == [0, 0]


def test_a_chord_that_is_never_completed_expires_with_its_parts(
    app: Celery, published: list[str], tenant_database: TenantDatabase
) -> None:
    first, second = begun(app, 2)
    app.backend.on_chord_part_return(first, "SUCCESS", 1)
    before = chord_rows(tenant_database)
    days_later(tenant_database, 32)

    app.backend.cleanup()
    app.backend.on_chord_part_return(second, "SUCCESS", 2)

    assert (before, chord_rows(tenant_database), published) == ([1, 1], [0, 0], [])
