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
from rhesis_tasks.processes import wait_until
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

    def give_up(self, launch: Any, dies: Sequence[str]) -> Any:
        """Launch something while no worker is there, whose tasks of these ids were delivered too often already."""
        with tenant_scope(ACME):
            result = launch()
        self.database.execute(
            "UPDATE rhesis_tasks.message SET deliveries = 5, last_reason = 'its worker host:1 was lost' "
            f"WHERE task_id IN ({', '.join(repr(each) for each in dies)})"
        )
        with running_worker(
            "dead_letter_tasks",
            cwd=HERE,
            pool=self.pool,
            env={"DATABASE_URL": self.database.url, "TOLD": str(self._path)},
        ):
            for each in dies:
                wait_until(f"{each} to be buried", lambda each=each: self.is_buried(each), TIMEOUT)
            wait_until(
                "all that follows", lambda: self.owned("SELECT count(*) FROM rhesis_tasks.message") == 0, TIMEOUT
            )
        return result

    def is_buried(self, task_id: str) -> bool:
        query = f"SELECT reason FROM rhesis_tasks.dead_letter WHERE task_id = {task_id!r}"
        return bool(self.owned(query) == REASON)

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
