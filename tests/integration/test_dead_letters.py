"""Who is told that a message was given up: the task's record and its waiters, callbacks, hooks, chain and chord."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from applications import application
from celery import Celery, chain, chord

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.errors import DeadLetterError
from rhesis_tasks.postgres.records import TaskRecord
from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.status import get_task
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent
TIMEOUT = 40
ACME = TenantContext("acme", "alice")
REASON = "it was delivered 5 times in vain; last, its worker host:1 was lost"


class Rig:
    """The application in this process, a worker, and what this one has told."""

    def __init__(self, tasks: Any, database: TenantDatabase, path: Path, pool: str) -> None:
        self.tasks = tasks
        self.app: Celery = tasks.app
        self.database = database
        self.pool = pool
        self._path = path
        path.touch()

    def give_up(self, launch: Any, dies: Sequence[str], **env: str) -> Any:
        """Launch something while no worker is there, whose tasks of these ids were delivered too often already."""
        with tenant_scope(ACME):
            result = launch()
        self.database.execute(
            "UPDATE rhesis_tasks.message SET deliveries = 5, last_reason = 'its worker host:1 was lost' "
            f"WHERE task_id IN ({', '.join(repr(each) for each in dies)})"
        )
        self.work_until_buried(dies, **env)
        for each in dies:
            assert self.reason(each) == REASON
        return result

    def work_until_buried(self, dies: Sequence[str], **env: str) -> None:
        """Run a worker until it has given up the messages of these tasks, and has done all others."""
        with running_worker(
            "dead_letter_tasks",
            cwd=HERE,
            pool=self.pool,
            env={"DATABASE_URL": self.database.url, "TOLD": str(self._path), **env},
        ):
            for each in dies:
                wait_until(f"{each} to be buried", lambda each=each: self.reason(each) is not None, TIMEOUT)
            wait_until(
                "all that follows", lambda: self.owned("SELECT count(*) FROM rhesis_tasks.message") == 0, TIMEOUT
            )

    def reason(self, task_id: str) -> Any:
        """Why a task's message is a dead letter; None if it is none."""
        return self.owned(f"SELECT reason FROM rhesis_tasks.dead_letter WHERE task_id = {task_id!r}")

    def owned(self, query: str) -> Any:
        with self.database.owner.connect() as connection:
            return connection.exec_driver_sql(query).scalar()

    def lines(self) -> list[str]:
        return sorted(self._path.read_text().splitlines())

    def record(self, task_id: str) -> TaskRecord:
        with tenant_scope(ACME):
            found = get_task(self.app, task_id)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "dead_letter_tasks") as found:
        yield found


@pytest.fixture(params=["prefork", "threads"])
def rig(request: pytest.FixtureRequest, tasks_and_database: tuple[Any, TenantDatabase], tmp_path: Path) -> Rig:
    return Rig(*tasks_and_database, tmp_path / "told", request.param)


def test_a_dead_tasks_waiters_callbacks_and_hooks_are_told_and_its_body_never_runs(rig: Rig) -> None:
    task_id = f"alone-{rig.pool}"
    launch = rig.tasks.work.s(1).set(task_id=task_id, link_error=rig.tasks.failed.s())

    result = rig.give_up(launch.apply_async, [task_id])

    assert rig.lines() == [f"acme callback {task_id}", f"acme hook {task_id} DeadLetterError"]
    record = rig.record(task_id)
    assert (record.state, record.error_type) == ("dead", "DeadLetterError")
    assert record.error_message == f"its message was given up: {REASON}"
    assert record.failure_reason == "its message was given up"
    with tenant_scope(ACME), pytest.raises(DeadLetterError, match="5 times in vain"):
        result.get(timeout=TIMEOUT)


def test_the_chord_of_a_dead_part_fails(rig: Rig) -> None:
    dead, alive, body = (f"{name}-{rig.pool}" for name in ("dead", "alive", "body"))
    header = [rig.tasks.work.s(1).set(task_id=dead), rig.tasks.work.s(2).set(task_id=alive)]

    result = rig.give_up(chord(header, rig.tasks.work.s().set(task_id=body)).apply_async, [dead])

    assert "acme ran 2" in rig.lines()
    record = rig.record(body)
    assert (record.state, record.error_type) == ("failure", "ChordError")
    assert dead in str(record.error_message)
    with tenant_scope(ACME), pytest.raises(DeadLetterError):  # Celery raises what the part has failed with
        result.get(timeout=TIMEOUT)


def test_the_rest_of_a_dead_tasks_chain_never_runs(rig: Rig) -> None:
    task_id = f"first-{rig.pool}"

    rig.give_up(chain(rig.tasks.work.s(1).set(task_id=task_id), rig.tasks.work.s()).apply_async, [task_id])

    assert not [line for line in rig.lines() if " ran " in line]
    assert rig.record(task_id).state == "dead"


def test_a_dead_task_that_no_worker_knows_has_failed_in_its_tenants_record(rig: Rig) -> None:
    task_id = f"unknown-{rig.pool}"

    rig.give_up(lambda: rig.app.send_task("nobody.knows", task_id=task_id), [task_id])

    record = rig.record(task_id)
    assert (record.state, record.error_type) == ("dead", "DeadLetterError")


def test_the_callbacks_of_a_dead_task_are_told_whichever_content_the_worker_accepts(rig: Rig) -> None:
    task_id = f"accepted-{rig.pool}"
    launch = rig.tasks.work.s(1).set(task_id=task_id, link_error=rig.tasks.failed.s(), serializer="pickle")

    rig.give_up(launch.apply_async, [task_id], ACCEPT_CONTENT="json pickle", C_FORCE_ROOT="1")

    assert rig.lines() == [f"acme callback {task_id}", f"acme hook {task_id} DeadLetterError"]


# --- messages that cannot be read --------------------------------------------------------------------------------

PICKLED = "it could not be read: its content type 'application/x-python-serialize' is not accepted"
KEY = "a key of at least 16 bytes"
SPOILED = "UPDATE rhesis_tasks.message SET body = '{broken' WHERE task_id = "


def test_a_task_whose_message_is_not_accepted_is_dead_and_its_waiters_and_hooks_are_told(rig: Rig) -> None:
    task_id = f"pickled-{rig.pool}"
    with tenant_scope(ACME):
        result = rig.tasks.work.apply_async(["pickle"], task_id=task_id, serializer="pickle")

    rig.work_until_buried([task_id])

    assert rig.reason(task_id) == PICKLED
    assert rig.lines() == [f"acme hook {task_id} DeadLetterError"]
    record = rig.record(task_id)
    assert (record.state, record.error_type) == ("dead", "DeadLetterError")
    assert record.error_message == f"its message was given up: {PICKLED}"
    with tenant_scope(ACME), pytest.raises(DeadLetterError, match="could not be read"):
        result.get(timeout=TIMEOUT)


def test_a_task_whose_message_is_broken_is_dead_and_the_error_quotes_nothing_of_it(rig: Rig) -> None:
    task_id = f"broken-{rig.pool}"
    with tenant_scope(ACME):
        rig.tasks.work.apply_async([1], task_id=task_id)
    rig.database.execute(f"{SPOILED}{task_id!r}")

    rig.work_until_buried([task_id])

    assert rig.reason(task_id) == "it could not be read: JSONDecodeError"
    assert rig.record(task_id).state == "dead"


def test_a_task_that_no_worker_knows_is_dead_if_its_message_cannot_be_decompressed(rig: Rig) -> None:
    task_id = f"unknown-broken-{rig.pool}"
    with tenant_scope(ACME):
        rig.app.send_task("nobody.knows", task_id=task_id, compression="zlib")
    rig.database.execute(f"{SPOILED}{task_id!r}")

    rig.work_until_buried([task_id])

    record = rig.record(task_id)
    assert record.state == "dead"
    assert record.error_message == "its message was given up: it could not be read: it cannot be decompressed"


def test_what_nobody_has_signed_and_nobody_can_read_changes_no_record(rig: Rig) -> None:
    forged = [
        (f"forged-{number}-{rig.pool}", name, compression)
        for number, (name, compression) in enumerate(
            [("dead_letter_tasks.work", None), ("dead_letter_tasks.work", "zlib"), ("nobody.knows", "zlib")]
        )
    ]
    for task_id, name, compression in forged:
        with tenant_scope(ACME):
            rig.app.send_task(name, task_id=task_id, compression=compression)
        rig.database.execute(f"{SPOILED}{task_id!r}")

    rig.work_until_buried([task_id for task_id, *_ in forged], SIGNING_KEY=KEY)

    assert [rig.record(task_id).state for task_id, *_ in forged] == ["queued"] * 3
    assert rig.lines() == []


SEND_PICKLED = """
import sys
from dead_letter_tasks import work
from rhesis_tasks import TenantContext, tenant_scope

with tenant_scope(TenantContext("acme", "alice")):
    work.apply_async([1], task_id=sys.argv[1], serializer="pickle")
"""


def test_a_task_whose_signed_message_cannot_be_read_is_dead(rig: Rig) -> None:
    task_id = f"signed-{rig.pool}"
    signed = {"DATABASE_URL": rig.database.url, "TOLD": "", "SIGNING_KEY": KEY}
    with child("publisher", python("-c", SEND_PICKLED, task_id), env=signed, cwd=HERE) as publisher:
        assert publisher.process.wait(TIMEOUT) == 0, publisher.finished_output()

    rig.work_until_buried([task_id], SIGNING_KEY=KEY)

    assert rig.record(task_id).state == "dead"
    assert rig.lines() == [f"acme hook {task_id} DeadLetterError"]
