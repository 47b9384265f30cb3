"""``rhesis_tasks.operations``: what an operator sees of all tenants' messages, and does to them."""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from applications import application
from celery import Celery, chain, chord
from celery.exceptions import TaskRevokedError
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool
from test_broker_roles import TRAPS

import rhesis_tasks.postgres.operations
from rhesis_tasks import TenantContext, configure, launch_with_context, operations, tenant_scope, unconfigure
from rhesis_tasks.errors import ConfigurationError, DeadLetterError, MissingPrivilegeError, NotSupportedError
from rhesis_tasks.operations import MessageFilter, MessageState, Operation
from rhesis_tasks.postgres.operations import OperationTable
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import python, wait_until
from rhesis_tasks.settings import database_url, quote_identifier
from rhesis_tasks.states import State
from rhesis_tasks.status import Cancellation, cancel_task
from rhesis_tasks.testing import TenantDatabase, running_worker

if TYPE_CHECKING:
    from conftest import MakeApp

HERE = Path(__file__).parent
TIMEOUT = 60
WAITING, DELAYED, RUNNING, DEAD = MessageState
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "operation_tasks") as (tasks, database):
        yield tasks, database


@pytest.fixture
def tasks(tasks_and_database: tuple[Any, TenantDatabase]) -> Any:
    return tasks_and_database[0]


@pytest.fixture
def app(tasks: Any) -> Celery:
    app: Celery = tasks.app
    return app


@pytest.fixture
def database(tasks_and_database: tuple[Any, TenantDatabase]) -> TenantDatabase:
    return tasks_and_database[1]


@pytest.fixture
def queue() -> str:
    """A queue of this test's own, that nobody consumes unless told to."""
    return f"queue-{next(numbers)}"


@pytest.fixture
def acme() -> TenantContext:
    return TenantContext(f"acme-{next(numbers)}", "ann")


@pytest.fixture
def globex() -> TenantContext:
    return TenantContext(f"globex-{next(numbers)}", "gus")


@pytest.fixture
def worker(database: TenantDatabase, queue: str) -> Iterator[None]:
    """A worker of the test's queue, with processes that can be terminated."""
    with running_worker("operation_tasks", cwd=HERE, env={"DATABASE_URL": database.url}, arguments=("--queues", queue)):
        yield


@pytest.fixture
def launch(queue: str) -> Callable[..., str]:
    """Launches a task into the test's queue, and returns its id."""

    def launched(task: Any, *args: Any, context: TenantContext, **options: Any) -> str:
        return str(launch_with_context(task, *args, context=context, options={"queue": queue, **options}).id)

    return launched


@pytest.fixture
def bury(app: Celery, database: TenantDatabase) -> Callable[[TenantContext, str], None]:
    """Makes a dead letter of a message that waits, as the worker does that gives it up."""

    def give_up(tenant: TenantContext, task_id: str) -> None:
        error = DeadLetterError("its message was given up: it was delivered 5 times in vain")
        with tenant_scope(tenant):
            app.backend.mark_as_failure(task_id, error)
        with database.owner.begin() as connection:
            (number,) = connection.execute(
                text("UPDATE rhesis_tasks.message SET claim_token = 0 WHERE task_id = :id RETURNING id"),
                {"id": task_id},
            ).one()
            connection.execute(text("SELECT rhesis_tasks.bury(:id, 0, 'a test')"), {"id": number})

    return give_up


@pytest.fixture
def in_each_state(
    tasks: Any, launch: Callable[..., str], bury: Callable[[TenantContext, str], None]
) -> Callable[[TenantContext], dict[MessageState, str]]:
    """Launches three tasks of a tenant: one waits, one is delayed, one is dead."""

    def launched(tenant: TenantContext) -> dict[MessageState, str]:
        ids = {
            WAITING: launch(tasks.add, 1, 2, context=tenant),
            DELAYED: launch(tasks.add, 3, 4, context=tenant, countdown=3600),
            DEAD: launch(tasks.add, 5, 6, context=tenant),
        }
        bury(tenant, ids[DEAD])
        return ids

    return launched


InEachState = Callable[[TenantContext], dict[MessageState, str]]


def record(app: Celery, tenant: TenantContext, task_id: str) -> Any:
    with tenant_scope(tenant):
        return app.backend.get_record(task_id)


def state(app: Celery, tenant: TenantContext, task_id: str) -> State | None:
    found = record(app, tenant, task_id)
    return None if found is None else found.state


def wait_for_state(app: Celery, tenant: TenantContext, task_id: str, wanted: State) -> None:
    wait_until(f"{task_id} to be {wanted}", lambda: state(app, tenant, task_id) is wanted, TIMEOUT)


def of(tenant: TenantContext, **more: Any) -> MessageFilter:
    return MessageFilter(organization_id=tenant.organization_id, **more)


def audited(app: Celery, operation: Operation) -> list[Any]:
    return [each for each in operations.audit_records(app, limit=1000) if each.operation == operation.id]


# --- looking -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
def test_messages_in_each_state_are_listed_and_counted_without_bodies(
    tasks: Any, app: Celery, acme: TenantContext, queue: str, launch: Callable[..., str], bury: Any
) -> None:
    running = launch(tasks.runs_until_asked, context=acme)
    wait_for_state(app, acme, running, State.STARTED)
    waiting = launch(tasks.add, 1, 2, context=acme, queue=f"{queue}-other")
    delayed = launch(tasks.add, 1, 2, context=acme, countdown=3600)
    dead = launch(tasks.add, 1, 2, context=acme, queue=f"{queue}-other")
    bury(acme, dead)

    found = {each.task_id: each for each in operations.messages(app, of(acme))}
    operations.revoke(app, of(acme, task_id=running), operator="olga", dry_run=False)

    assert {task_id: each.state for task_id, each in found.items()} == {
        running: RUNNING,
        waiting: WAITING,
        delayed: DELAYED,
        dead: DEAD,
    }
    assert found[running].worker is not None
    assert found[delayed].due_at is not None
    assert (found[dead].reason, found[dead].died_at is not None) == ("a test", True)
    assert {(each.organization_id, each.user_id) for each in found.values()} == {(acme.organization_id, "ann")}
    assert not {"body", "envelope"} & set(dir(found[dead]))
    assert operations.count(app, of(acme, states=[WAITING, DELAYED, DEAD])) == {WAITING: 1, DELAYED: 1, DEAD: 1}
    assert [each.task_id for each in operations.dead_letters(app, of(acme))] == [dead]


def test_messages_are_paged_by_the_last_one_that_was_seen(
    app: Celery, acme: TenantContext, in_each_state: InEachState
) -> None:
    ids = in_each_state(acme)
    seen: list[Any] = []
    while page := operations.messages(app, of(acme), limit=1, after=seen[-1].id if seen else None):
        seen += page

    assert [each.task_id for each in seen] == [ids[WAITING], ids[DELAYED], ids[DEAD]]


def test_each_part_of_a_filter_leaves_others_out(
    tasks: Any, app: Celery, acme: TenantContext, globex: TenantContext, queue: str, launch: Callable[..., str]
) -> None:
    old = launch(tasks.add, 1, 2, context=acme)
    names = launch(tasks.total, [1], context=TenantContext(acme.organization_id, "zoe"))
    foreign = launch(tasks.add, 1, 2, context=globex, queue=f"{queue}-other")
    published_at = operations.messages(app, MessageFilter(task_id=names))[0].published_at
    nobody = app.send_task("celery.ping", task_id=f"nobody-{queue}", queue=queue).id

    def ids(**which: Any) -> set[str | None]:
        return {each.task_id for each in operations.messages(app, MessageFilter(**which), limit=1000)}

    assert ids(organization_id=acme.organization_id) == {old, names}
    assert ids(queue=f"{queue}-other") == {foreign}
    assert ids(queue=queue, user_id="zoe") == {names}
    assert ids(queue=queue, task_name="operation_tasks.add") == {old}
    assert ids(queue=queue, published_before=published_at) == {old}
    assert ids(queue=queue, organization_id="") == {nobody}
    assert ids(queue=queue, older_than=3600) == set()
    assert ids(queue=queue, older_than=0) == {old, names, nobody}
    assert ids(task_id=foreign, organization_id=acme.organization_id) == set()
    assert ids(queue=queue, states=[]) == set()
    assert ids(queue="no such queue") == set()


# --- purging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["purge", "replay", "revoke", "terminate", "offboard"])
def test_a_dry_run_counts_and_changes_nothing(
    app: Celery, acme: TenantContext, in_each_state: InEachState, action: str
) -> None:
    ids = in_each_state(acme)
    before = operations.messages(app, of(acme))
    which: Any = acme.organization_id if action == "offboard" else of(acme)

    done = getattr(operations, action)(app, which, operator="olga")

    assert done.is_dry_run and done.found
    assert operations.messages(app, of(acme)) == before
    assert [state(app, acme, ids[each]) for each in (WAITING, DELAYED, DEAD)] == ["queued", "delayed", "dead"]
    assert audited(app, done) == []


def test_a_purge_deletes_what_waits_and_says_in_the_records_who_did_it(
    app: Celery,
    acme: TenantContext,
    globex: TenantContext,
    in_each_state: InEachState,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids, others = in_each_state(acme), in_each_state(globex)
    others_before = operations.messages(app, of(globex))

    with caplog.at_level(logging.INFO, "rhesis_tasks.audit"):
        done = operations.purge(app, of(acme), operator="olga", dry_run=False)

    assert (dict(done.before), dict(done.after)) == ({WAITING: 1, DELAYED: 1}, {WAITING: 0, DELAYED: 0})
    assert (dict(done.counts), done.records) == ({"waiting": 1, "delayed": 1, "records": 2}, 2)
    assert [each.task_id for each in operations.messages(app, of(acme))] == [ids[DEAD]]
    for task_id in (ids[WAITING], ids[DELAYED]):
        found = record(app, acme, task_id)
        assert (found.state, found.abort_requested_by) == (State.REVOKED, "operator olga")
        assert found.error_message == "purged by an operator"
        assert found.finished_at is not None
    assert state(app, acme, ids[DEAD]) is State.DEAD
    assert operations.messages(app, of(globex)) == others_before
    assert state(app, globex, others[WAITING]) is State.QUEUED
    [line] = [each.getMessage() for each in caplog.records if each.name == "rhesis_tasks.audit"]
    assert line.startswith("purge by olga of {")
    [note] = audited(app, done)
    assert (note.action, note.operator, note.counts) == ("purge", "olga", dict(done.counts))
    assert note.filter == {"organization_id": acme.organization_id, "states": ["waiting", "delayed"]}


def test_whoever_waits_for_a_purged_task_hears_of_it(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str]
) -> None:
    result = app.AsyncResult(launch(tasks.add, 1, 2, context=acme))
    operations.purge(app, of(acme), operator="olga", dry_run=False)

    with tenant_scope(acme), pytest.raises(TaskRevokedError, match="purged by an operator"):
        result.get(timeout=TIMEOUT)


def test_dead_letters_are_purged_where_they_are_named_and_their_tasks_stay_dead(
    app: Celery, acme: TenantContext, in_each_state: InEachState
) -> None:
    ids = in_each_state(acme)

    done = operations.purge(app, of(acme, states=[DEAD]), operator="olga", dry_run=False)

    assert dict(done.counts) == {"dead": 1}
    assert {each.state for each in operations.messages(app, of(acme))} == {WAITING, DELAYED}
    assert state(app, acme, ids[DEAD]) is State.DEAD


def test_a_task_that_began_in_vain_and_waits_again_is_revoked_too(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str]
) -> None:
    task_id = launch(tasks.add, 1, 2, context=acme)
    with tenant_scope(acme):
        app.backend.store_result(task_id, None, "STARTED")

    operations.purge(app, of(acme), operator="olga", dry_run=False)

    assert state(app, acme, task_id) is State.REVOKED


def test_a_purge_of_everything_has_to_be_said_and_what_is_claimed_is_not_purged(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match="Name an organization, user, task, queue or age"):
        operations.purge(app, MessageFilter(states=[WAITING]), operator="olga", dry_run=False)
    with pytest.raises(ConfigurationError, match="Revoke or terminate it"):
        operations.purge(app, MessageFilter(queue="a", states=[RUNNING]), operator="olga", dry_run=False)
    with pytest.raises(ConfigurationError, match="the name of its operator"):
        operations.purge(app, MessageFilter(queue="a"), operator=" ", dry_run=False)


@pytest.mark.parametrize("packed", [{}, {"compression": "zlib"}], ids=str)
def test_the_rest_of_a_purged_chain_is_revoked_and_a_chord_hears_of_its_part(
    tasks: Any, app: Celery, acme: TenantContext, queue: str, packed: dict[str, str]
) -> None:
    options = {"queue": queue, **packed}
    last = launch_with_context(chain(tasks.add.s(1, 2).set(**options), tasks.add.s(3)), context=acme)
    header = [tasks.add.s(1, 2).set(**options), tasks.add.s(3, 4).set(**options)]
    body = launch_with_context(chord(header, tasks.total.s()), context=acme)

    done = operations.purge(app, of(acme), operator="olga", dry_run=False)

    assert dict(done.counts) == {"waiting": 3, "records": 3}
    assert state(app, acme, last.id) is State.REVOKED
    assert record(app, acme, last.parent.id).abort_requested_by == "operator olga"
    with tenant_scope(acme), pytest.raises(Exception, match="purged by an operator"):
        body.get(timeout=TIMEOUT)


def test_a_chain_that_was_delivered_in_vain_is_revoked_with_what_it_has_launched(
    tasks: Any, app: Celery, acme: TenantContext, queue: str
) -> None:
    """Its worker was lost after it had launched the next one, and before that was written down."""
    options = {"queue": queue}
    last = launch_with_context(chain(tasks.add.s(1, 2).set(**options), tasks.add.s(3).set(**options)), context=acme)
    with tenant_scope(acme):
        app.backend.store_result(last.parent.id, None, "STARTED")
    launch_with_context(tasks.add.s(3, 3), context=acme, options={"queue": queue, "task_id": last.id})

    done = operations.purge(app, of(acme), operator="olga", dry_run=False)

    assert done.counts["waiting"] == 2
    assert [state(app, acme, each) for each in (last.parent.id, last.id)] == [State.REVOKED, State.REVOKED]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"chain": [', {}),
        (b'[[], {}, {"chain": [1, 2]}]', {}),
        (b'[[], {}, {"chord": 7}]', {"group": "g"}),
        (b'[[], {}, {"chain": [{}]}]', {"rhesis_tasks": 7}),
        (b"\xff", {"group": "g"}),
    ],
)
def test_what_nobody_can_read_is_purged_all_the_same(
    app: Celery, queue: str, body: bytes, headers: dict[str, Any]
) -> None:
    with app.connection_for_write() as connection, connection.Producer() as producer:
        message = {"task": "shop.add", "id": f"broken-{queue}", **headers}
        producer.publish(
            body, routing_key=queue, headers=message, content_type="application/json", content_encoding="utf-8"
        )

    done = operations.purge(app, MessageFilter(queue=queue), operator="olga", dry_run=False)

    assert dict(done.counts) == {"waiting": 1}
    assert not operations.messages(app, MessageFilter(queue=queue))


def test_many_messages_go_in_batches_that_are_one_operation(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "BATCH", 2)
    for _ in range(5):
        launch(tasks.add, 1, 2, context=acme)

    done = operations.purge(app, of(acme), operator="olga", dry_run=False)

    assert dict(done.counts) == {"waiting": 5, "records": 5}
    [note] = audited(app, done)
    assert note.counts == {"waiting": 5, "records": 5}


def test_celery_purge_and_ours_do_the_same(
    tasks: Any,
    app: Celery,
    acme: TenantContext,
    globex: TenantContext,
    queue: str,
    launch: Callable[..., str],
    bury: Any,
    database: TenantDatabase,
) -> None:
    """Waiting and delayed messages go, and their tasks are revoked; what is claimed and what is dead stays."""

    def fill(tenant: TenantContext, name: str) -> list[str]:
        ids = [
            launch(tasks.add, 1, 2, context=tenant, queue=name),
            launch(tasks.add, 1, 2, context=tenant, queue=name, countdown=3600),
            launch(tasks.add, 1, 2, context=tenant, queue=name),
            launch(tasks.add, 1, 2, context=tenant, queue=name),
        ]
        bury(tenant, ids[2])
        database.execute(f"UPDATE rhesis_tasks.message SET claim_token = 0, holder = 0 WHERE task_id = '{ids[3]}'")
        return ids

    theirs, ours = fill(acme, f"{queue}-theirs"), fill(globex, f"{queue}-ours")

    celery = subprocess.run(
        python("-m", "celery", "-A", "operation_tasks", "purge", "--force", "--queues", f"{queue}-theirs"),
        cwd=HERE,
        env={"DATABASE_URL": database.url, "PATH": "", "USER": "olga"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    done = operations.purge(app, MessageFilter(queue=f"{queue}-ours"), operator="olga", dry_run=False)

    def seen(tenant: TenantContext, ids: list[str]) -> list[Any]:
        records = [record(app, tenant, task_id) for task_id in ids]
        found = {each.task_id: each.state for each in operations.messages(app, of(tenant))}
        return [(found.get(each.task_id), each.state, each.error_message) for each in records]

    notes = operations.audit_records(app, limit=2)
    assert "Purged 2 messages" in celery.stdout
    assert sum(done.before.values()) == 2
    assert seen(acme, theirs) == seen(globex, ours)
    assert [each[:2] for each in seen(acme, theirs)] == [
        (None, "revoked"),
        (None, "revoked"),
        (DEAD, "dead"),
        (RUNNING, "queued"),
    ]
    assert notes[0].counts == notes[1].counts
    assert [(each.action, each.operator) for each in notes] == [("purge", "olga"), ("purge", "olga")]
    database.execute("DELETE FROM rhesis_tasks.message WHERE holder = 0")


def test_while_workers_run_each_task_is_done_or_purged_and_never_both(
    tasks: Any, app: Celery, acme: TenantContext, queue: str, launch: Callable[..., str], database: TenantDatabase
) -> None:
    ids = [launch(tasks.add, number, 1, context=acme) for number in range(300)]

    def workers() -> Any:
        return running_worker(
            "operation_tasks", cwd=HERE, pool="threads", env={"DATABASE_URL": database.url},
            arguments=("--queues", queue),
        )  # fmt: skip

    with workers(), workers():
        wait_until("a task to be done", lambda: State.SUCCESS in {state(app, acme, each) for each in ids}, TIMEOUT)
        done = operations.purge(app, of(acme), operator="olga", dry_run=False)
        wait_until("no message to be left", lambda: not operations.messages(app, of(acme)), TIMEOUT)

    states = [state(app, acme, each) for each in ids]
    assert set(states) <= {State.SUCCESS, State.REVOKED}
    assert states.count(State.REVOKED) == done.counts.get("waiting", 0)


# --- replaying -----------------------------------------------------------------------------------------------------


def test_a_replayed_dead_letter_runs_under_its_task_id(
    app: Celery, acme: TenantContext, queue: str, in_each_state: InEachState, database: TenantDatabase
) -> None:
    ids = in_each_state(acme)

    done = operations.replay(app, of(acme), operator="olga", dry_run=False)
    [message] = operations.messages(app, MessageFilter(task_id=ids[DEAD]))
    again = operations.replay(app, of(acme), operator="olga", dry_run=False)

    assert (dict(done.before), dict(done.after), done.counts) == ({DEAD: 1}, {DEAD: 0}, {"replayed": 1, "records": 1})
    assert (message.state, message.queue, message.deliveries) == (WAITING, queue, 0)
    found = record(app, acme, ids[DEAD])
    assert (found.state, found.error_type, found.finished_at) == (State.QUEUED, None, None)
    assert not again.found and audited(app, again) == []
    assert [each.operator for each in audited(app, done)] == ["olga"]
    with running_worker(
        "operation_tasks", cwd=HERE, pool="solo", env={"DATABASE_URL": database.url}, arguments=("--queues", queue)
    ):
        wait_for_state(app, acme, ids[DEAD], State.SUCCESS)
    assert record(app, acme, ids[DEAD]).result == 11


def test_whoever_waits_for_a_message_is_notified_of_a_replay(
    app: Celery, acme: TenantContext, queue: str, in_each_state: InEachState, database: TenantDatabase
) -> None:
    in_each_state(acme)
    database.execute(f"INSERT INTO rhesis_tasks.waiter (queue, consumer) VALUES ('{queue}', 999)")
    with psycopg.connect(database.url, autocommit=True) as waiting:
        [(channel,)] = waiting.execute("SELECT rhesis_tasks.channel_of(999)").fetchall()
        waiting.execute(f'LISTEN "{channel}"')

        operations.replay(app, of(acme), operator="olga", dry_run=False)

        assert [each.payload for each in waiting.notifies(timeout=TIMEOUT, stop_after=1)] == [queue]


def test_the_dead_letter_of_a_task_that_has_ended_otherwise_is_kept(
    app: Celery, acme: TenantContext, in_each_state: InEachState, database: TenantDatabase
) -> None:
    ids = in_each_state(acme)
    database.execute(f"UPDATE rhesis_tasks.task_record SET state = 'success' WHERE task_id = '{ids[DEAD]}'")

    done = operations.replay(app, of(acme), operator="olga", dry_run=False)

    assert dict(done.counts) == {"kept": 1}
    assert len(operations.dead_letters(app, of(acme))) == 1


def test_a_late_writer_changes_nothing_of_a_task_that_is_dead(
    app: Celery, acme: TenantContext, in_each_state: InEachState
) -> None:
    ids = in_each_state(acme)

    with tenant_scope(acme):
        for late in ("STARTED", "SUCCESS", "RETRY"):
            app.backend.store_result(ids[DEAD], None, late)

    assert state(app, acme, ids[DEAD]) is State.DEAD


# --- stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("worker")
def test_revoking_takes_away_what_waits_and_asks_what_runs_to_stop(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str]
) -> None:
    running = launch(tasks.runs_until_asked, context=acme)
    wait_for_state(app, acme, running, State.STARTED)
    delayed = launch(tasks.add, 1, 2, context=acme, countdown=3600)

    done = operations.revoke(app, of(acme), operator="olga", dry_run=False)

    assert dict(done.counts) == {"delayed": 1, "running": 1, "records": 2}
    assert state(app, acme, delayed) is State.REVOKED
    wait_for_state(app, acme, running, State.SUCCESS)
    found = record(app, acme, running)
    assert (found.result, found.abort_requested_by) == ("asked", "operator olga")


@pytest.mark.usefixtures("worker")
def test_terminating_ends_what_runs_and_what_its_worker_holds_never_begins(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str]
) -> None:
    running = [launch(tasks.never_ends, context=acme) for _ in range(2)]
    for each in running:
        wait_for_state(app, acme, each, State.STARTED)
    held = launch(tasks.add, 1, 2, context=acme)
    wait_until(
        "the third one to be claimed",
        lambda: operations.count(app, of(acme, states=[RUNNING])) == {RUNNING: 3},
        TIMEOUT,
    )

    done = operations.terminate(app, of(acme), operator="olga", dry_run=False)

    assert done.counts["running"] == 3
    for each in (*running, held):
        wait_for_state(app, acme, each, State.REVOKED)
    wait_until("no message to be left", lambda: not operations.messages(app, of(acme)), TIMEOUT)


@pytest.mark.usefixtures("worker")
def test_what_runs_is_terminated_after_its_worker_was_taken_for_dead_and_has_it_again(
    tasks: Any,
    app: Celery,
    acme: TenantContext,
    queue: str,
    launch: Callable[..., str],
    database: TenantDatabase,
) -> None:
    running = launch(tasks.never_ends, context=acme)
    wait_for_state(app, acme, running, State.STARTED)

    def deliveries() -> int:
        [found] = operations.messages(app, of(acme))
        return found.deliveries if found.state == RUNNING else 0

    lost = "UPDATE rhesis_tasks.message SET claim_token = NULL, holder = NULL WHERE task_id = %s"
    with database.owner.begin() as connection:
        connection.exec_driver_sql(lost, (running,))
        connection.exec_driver_sql("SELECT rhesis_tasks.wake(%s)", (queue,))
    wait_until("the worker to have it again", lambda: deliveries() == 2, TIMEOUT)

    operations.terminate(app, of(acme), operator="olga", dry_run=False)

    wait_until("no message to be left", lambda: not operations.messages(app, of(acme)), TIMEOUT)
    assert state(app, acme, running) is State.REVOKED
    others = [launch(tasks.runs_until_asked, context=acme) for _ in range(2)]
    for each in others:
        wait_for_state(app, acme, each, State.STARTED)  # both processes are free
    operations.revoke(app, of(acme), operator="olga", dry_run=False)
    for each in others:
        wait_for_state(app, acme, each, State.SUCCESS)


def test_a_dead_letter_cannot_be_revoked(app: Celery, acme: TenantContext) -> None:
    with pytest.raises(ConfigurationError, match="no task to stop"):
        operations.revoke(app, of(acme, states=[DEAD]), operator="olga", dry_run=False)


@pytest.mark.parametrize("action", [operations.purge, operations.revoke, operations.terminate])
def test_what_means_everything_has_to_be_said(app: Celery, action: Callable[..., Operation], queue: str) -> None:
    with pytest.raises(ConfigurationError, match=r"without a filter .* everything=True"):
        action(app, MessageFilter(states=[WAITING]), operator="olga", dry_run=False)

    assert action(app, MessageFilter(), operator="olga", everything=True).is_dry_run


@pytest.mark.usefixtures("worker")
def test_of_two_organizations_tasks_with_one_id_only_that_of_the_filter_is_stopped(
    tasks: Any, app: Celery, acme: TenantContext, globex: TenantContext, queue: str, launch: Callable[..., str]
) -> None:
    same = f"report-{queue}"
    for tenant in (acme, globex):
        launch(tasks.never_ends, context=tenant, task_id=same)
        wait_for_state(app, tenant, same, State.STARTED)

    operations.terminate(app, of(acme), operator="olga", dry_run=False)
    wait_until("acme's message to be gone", lambda: not operations.messages(app, of(acme)), TIMEOUT)

    assert (state(app, acme, same), state(app, globex, same)) == (State.REVOKED, State.STARTED)
    with tenant_scope(globex):
        assert cancel_task(app, same, terminate=True) is Cancellation.TERMINATED
    wait_for_state(app, globex, same, State.REVOKED)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("ended_by", ["an operator", "its expiry"])
def test_a_task_that_was_stopped_or_has_expired_stops_no_other_organizations_with_its_id(
    tasks: Any,
    app: Celery,
    acme: TenantContext,
    globex: TenantContext,
    queue: str,
    launch: Callable[..., str],
    ended_by: str,
) -> None:
    same = f"report-{queue}"
    if ended_by == "an operator":
        launch(tasks.runs_until_asked, context=acme, task_id=same)
        wait_for_state(app, acme, same, State.STARTED)
        operations.revoke(app, of(acme), operator="olga", dry_run=False)
        wait_for_state(app, acme, same, State.SUCCESS)
    else:
        launch(tasks.add, 1, 2, context=acme, task_id=same, headers={"expires": "2020-01-01T00:00:00+00:00"})
        wait_for_state(app, acme, same, State.EXPIRED)

    launch(tasks.add, 1, 2, context=globex, task_id=same)

    wait_for_state(app, globex, same, State.SUCCESS)


# --- transactions ----------------------------------------------------------------------------------------------------


def test_the_rows_of_an_operator_who_is_suspended_are_free_after_a_while(
    app: Celery, database: TenantDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rhesis_tasks.postgres.operations, "PATIENCE", 1)
    processes: list[int] = []

    def step(transaction: Connection) -> None:
        processes.append(transaction.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        if len(processes) == 1:
            with database.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                seen = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
                wait_until("its end", lambda: connection.scalar(seen, {"pid": processes[0]}) == 0, TIMEOUT)
            transaction.exec_driver_sql("SELECT")

    operations._table(app).in_transaction(step)

    assert len(set(processes)) == 2


# --- offboarding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("organization_id", [None, "", 7])
def test_offboarding_needs_the_name_of_an_organization(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str], organization_id: Any
) -> None:
    launch(tasks.add, 1, 2, context=acme)

    with pytest.raises(ConfigurationError, match="name it by its id"):
        operations.offboard(app, organization_id, operator="olga", dry_run=False)

    assert operations.count(app, of(acme))[WAITING] == 1


def test_offboarding_takes_what_parts_of_a_chord_have_returned_though_the_chord_was_forgotten(
    app: Celery, acme: TenantContext, database: TenantDatabase
) -> None:
    part = "INSERT INTO rhesis_tasks.chord_part (organization_id, group_id, task_id, state, result)"
    database.execute(f"{part} VALUES ('{acme.organization_id}', 'gone', 'part', 'SUCCESS', 'secret')")

    operations.offboard(app, acme.organization_id, operator="olga", dry_run=False)

    with database.owner.connect() as connection:
        left = text("SELECT count(*) FROM rhesis_tasks.chord_part WHERE organization_id = :id")
        assert connection.scalar(left, {"id": acme.organization_id}) == 0


@pytest.mark.usefixtures("worker")
def test_offboarding_leaves_nothing_of_a_tenant_but_the_audit(
    tasks: Any,
    app: Celery,
    acme: TenantContext,
    globex: TenantContext,
    queue: str,
    in_each_state: InEachState,
    launch: Callable[..., str],
    database: TenantDatabase,
) -> None:
    running = launch(tasks.never_ends, context=acme)
    wait_for_state(app, acme, running, State.STARTED)
    launch(tasks.add, 1, 2, context=acme, queue=f"{queue}-other")
    foreign = launch(tasks.add, 1, 2, context=globex, queue=f"{queue}-other")
    with tenant_scope(acme):
        app.GroupResult(f"group-{queue}", [app.AsyncResult(running)]).save()
    database.execute(
        f"INSERT INTO rhesis_tasks.schedule_run (schedule, organization_id, due_at) "
        f"VALUES ('nightly', '{acme.organization_id}', now())"
    )

    with pytest.raises(ConfigurationError, match="has 1 running task; nothing was changed"):
        operations.offboard(app, acme.organization_id, operator="olga", dry_run=False)
    refused = operations.count(app, of(acme))
    done = operations.offboard(app, acme.organization_id, operator="olga", dry_run=False, stop=True)
    again = operations.offboard(app, acme.organization_id, operator="olga", dry_run=False)

    assert (refused[RUNNING], refused[WAITING]) == (1, 1)
    assert (done.counts["waiting"], done.counts["running"], done.counts["records"]) == (1, 1, 2)
    assert done.counts["groups"] == 1
    assert not operations.messages(app, of(acme))
    with database.owner.connect() as connection:
        for table in ("task_record", "group_record", "chord_part", "schedule_run"):
            statement = text(f"SELECT count(*) FROM rhesis_tasks.{table} WHERE organization_id = :id")
            assert connection.scalar(statement, {"id": acme.organization_id}) == 0, table
    assert state(app, globex, foreign) is State.QUEUED
    assert not again.found
    [note] = audited(app, done)
    assert (note.action, note.filter) == ("offboard", {"organization_id": acme.organization_id})


def test_offboarding_takes_no_record_of_a_task_that_has_begun_since_they_were_counted(
    tasks: Any,
    app: Celery,
    acme: TenantContext,
    launch: Callable[..., str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task_id = launch(tasks.never_ends, context=acme)
    counted = OperationTable.count_records

    def count_before_it_begins(table: OperationTable, organization_id: str) -> tuple[int, int]:
        request.getfixturevalue("worker")
        wait_for_state(app, acme, task_id, State.STARTED)
        return counted(table, organization_id)

    with monkeypatch.context() as patch:
        patch.setattr(OperationTable, "count_records", count_before_it_begins)
        with pytest.raises(ConfigurationError, match="has begun to run meanwhile"):
            operations.offboard(app, acme.organization_id, operator="olga", dry_run=False)
    kept = state(app, acme, task_id)
    operations.offboard(app, acme.organization_id, operator="olga", dry_run=False, stop=True)

    assert kept is State.STARTED
    assert not operations.messages(app, of(acme))
    with tenant_scope(acme):
        assert app.backend.get_record(task_id) is None


# --- who may, and where --------------------------------------------------------------------------------------------


def test_a_login_that_only_launches_may_do_none_of_it(database: TenantDatabase, make_app: MakeApp) -> None:
    web = f"web_{uuid.uuid4().hex[:8]}"
    admin_url = database.owner.url.set(username=web, password="secret").set(drivername="postgresql")
    with database.admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {quote_identifier(web)} LOGIN PASSWORD 'secret'")
    try:
        create_schema(database.owner, web_roles=[web])
        url = admin_url.render_as_string(hide_password=False)
        app = make_app(url, broker_url=url)
        for call in (
            lambda: operations.messages(app),
            lambda: operations.count(app),
            lambda: operations.audit_records(app),
            lambda: operations.purge(app, MessageFilter(queue="a"), operator="mallory", dry_run=False),
            lambda: operations.offboard(app, "acme", operator="mallory", dry_run=False),
        ):
            with pytest.raises(MissingPrivilegeError, match="schema create"):
                call()
    finally:
        admin = create_engine(database.admin.url.set(database=database.owner.url.database), poolclass=NullPool)
        with admin.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {quote_identifier(web)}")
            connection.exec_driver_sql(f"DROP ROLE {quote_identifier(web)}")


def test_no_function_for_operators_can_be_led_to_run_the_callers_code(database: TenantDatabase) -> None:
    """As test_broker_roles.py has it for the others."""
    role = quote_identifier(database.role)
    admin = create_engine(database.admin.url.set(database=database.owner.url.database), poolclass=NullPool)
    with admin.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA traps AUTHORIZATION {role}")
    url = database_url(database.url)
    try:
        with create_engine(url, poolclass=NullPool).connect() as connection:

            def run(statement: str) -> None:
                connection.exec_driver_sql(statement, execution_options={"no_parameters": True})

            run(TRAPS.replace("json,", "json,jsonb,uuid,"))
            run("SET LOCAL search_path = traps, pg_catalog")
            for table in ("message", "dead_letter", "consumer", "task_record", "group_record", "audit_record"):
                run(f"CREATE TEMP TABLE {table} (LIKE pg_catalog.pg_class)")
            run("SELECT rhesis_tasks.publish('', 'trapped', '{}', 'body', 5, 'acme', 'one', 'work', 60)")
            which = """'{"organization_id": "acme", "older_than": 0, "user_id": null}'"""
            states, ended = "'{queued}', '{queued, started}'", "'operator o', 'revoked', 'E', 'm'"
            uuid = "'00000000-0000-0000-0000-000000000000'"
            run(f"SELECT * FROM rhesis_tasks.operation_messages({which}, -1, 10)")
            run(f"SELECT * FROM rhesis_tasks.operation_count({which})")
            run(f"SELECT * FROM rhesis_tasks.operation_summary({which}, 'queue')")
            run(f"SELECT * FROM rhesis_tasks.operation_stop({which}, 'o', '{{queued}}', 'revoked', 'E', 'm', '{{}}')")
            run(f"SELECT * FROM rhesis_tasks.operation_remove({which}, -1, 10, true)")
            run(f"SELECT rhesis_tasks.operation_end('{{acme}}', '{{one}}', {ended}, {states})")
            run(f"SELECT * FROM rhesis_tasks.operation_replay({which}, -1, 10, 'queued', {states})")
            run(f"SELECT * FROM rhesis_tasks.operation_purge({uuid}, 'trapped', -1, 10, 'o', {ended}, {states})")
            run(f"SELECT rhesis_tasks.operation_note({uuid}, 'purge', 'o', {which}, '{{}}')")
            run("SELECT * FROM rhesis_tasks.operation_notes(NULL, 10)")
            run("SELECT * FROM rhesis_tasks.operation_records('one')")
            run("SELECT * FROM rhesis_tasks.operation_count_records('acme')")
            run("SELECT * FROM rhesis_tasks.operation_forget('acme', 10)")
            connection.rollback()
    finally:
        with admin.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA traps CASCADE")


def test_audit_records_can_be_changed_by_nobody_who_runs_workers(database: TenantDatabase) -> None:
    with database.owner.connect() as connection:
        may = connection.scalar(
            text("SELECT has_table_privilege(:role, 'rhesis_tasks.audit_record', 'SELECT,INSERT,UPDATE,DELETE')"),
            {"role": database.role},
        )

    assert may is False


def test_where_results_are_elsewhere_no_record_is_touched(
    tasks: Any, app: Celery, acme: TenantContext, launch: Callable[..., str], database: TenantDatabase
) -> None:
    task_id = launch(tasks.add, 1, 2, context=acme)
    other = Celery("elsewhere", set_as_current=False)
    configure(other, database.url, result_backend="cache+memory://")
    try:
        done = operations.purge(other, of(acme, task_id=task_id), operator="olga", dry_run=False)
        gone = operations.messages(other, of(acme))
    finally:
        unconfigure(other)

    assert done.records is None
    assert not gone
    assert state(app, acme, task_id) is State.QUEUED


def test_another_broker_has_its_own_tools(make_app: MakeApp) -> None:
    with pytest.raises(NotSupportedError, match="broker is not PostgreSQL"):
        operations.messages(make_app())


def test_without_a_broker_the_variable_is_named() -> None:
    app = Celery("nowhere", set_as_current=False)

    with pytest.raises(NotSupportedError, match="DATABASE_URL is not set"):
        operations.messages(app)


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs(database: TenantDatabase, tmp_path: Path) -> None:
    page = (HERE.parents[1] / "docs" / "operations.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    (tmp_path / "page.py").write_text(code)
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom rhesis_tasks import configure\napp = Celery('shop')\nconfigure(app)\n"
    )

    done = subprocess.run(
        python("page.py"), cwd=tmp_path, env={**os.environ, "DATABASE_URL": database.url}, capture_output=True,
        text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip

    assert code
    assert done.returncode == 0, done.stderr
    assert "{} 0" in done.stdout.splitlines()
