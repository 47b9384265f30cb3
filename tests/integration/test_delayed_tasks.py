"""Tasks that are to be run later, on real workers: countdowns, ETAs, retries, and what becomes of them meanwhile."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from applications import application
from celery import Celery

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.postgres.records import TaskRecord
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.states import TERMINAL
from rhesis_tasks.status import get_task
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent
TIMEOUT = 40
ACME, GLOBEX = TenantContext("acme", "alice"), TenantContext("globex", "bob")


class Run(NamedTuple):
    """What a body wrote down."""

    label: str
    organization: str
    at: float
    rest: str  #: its ETA, or which attempt it was


class Rig:
    """The application in this process, and what its workers did."""

    def __init__(self, tasks: Any, database: TenantDatabase, path: Path) -> None:
        self.tasks = tasks
        self.app: Celery = tasks.app
        self.database = database
        self._path = path
        path.touch()

    def worker(self, pool: str = "threads") -> AbstractContextManager[Child]:
        return running_worker(
            "delayed_tasks",
            cwd=HERE,
            pool=pool,
            env={"DATABASE_URL": self.database.url, "DELAYED": str(self._path)},
        )

    def launch(self, name: str, label: str, tenant: TenantContext = ACME, **options: Any) -> str:
        with tenant_scope(tenant):
            return str(getattr(self.tasks, name).apply_async((label,), **options).id)

    def runs(self, label: str) -> list[Run]:
        lines = (line.split(" ", 3) for line in self._path.read_text().splitlines())
        return [Run(its, whose, float(at), rest) for its, whose, at, rest in lines if its == label]

    def wait_for_runs(self, label: str, number: int = 1) -> list[Run]:
        wait_until(f"{number} runs of {label}", lambda: len(self.runs(label)) >= number, TIMEOUT)
        return self.runs(label)

    def record(self, task_id: str, tenant: TenantContext = ACME) -> TaskRecord:
        with tenant_scope(tenant):
            found = get_task(self.app, task_id)
        assert found is not None
        return found

    def wait_for_state(self, task_id: str, state: str) -> TaskRecord:
        wait_until(f"{task_id} to be {state}", lambda: self.record(task_id).state in (state, *TERMINAL), TIMEOUT)
        assert self.record(task_id).state == state
        return self.record(task_id)


@pytest.fixture(scope="module")
def rig(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with application(postgres_url, "delayed_tasks") as (tasks, database):
        yield Rig(tasks, database, tmp_path_factory.mktemp("delayed") / "runs")


# First those that bring their own workers: the ones of the fixture stay until the file ends.


def test_a_task_that_has_expired_before_any_worker_was_there_is_recorded_so(rig: Rig) -> None:
    task_id = rig.launch("note", "nobody-there", expires=0.5)
    expired_at = time.time() + 0.5
    wait_until("it to have expired", lambda: time.time() > expired_at, TIMEOUT)

    with rig.worker():
        rig.wait_for_state(task_id, "expired")
        wait_until("its message to go", lambda: messages_of(rig, task_id) == 0, TIMEOUT)

    assert rig.runs("nobody-there") == []


def test_delays_outlive_the_workers_and_are_waited_for_without_any(rig: Rig) -> None:
    with rig.worker() as first:
        began = time.time()
        task_id = rig.launch("note", "outlives", countdown=6)
        first.process.kill()
        first.process.wait(TIMEOUT)
    assert rig.runs("outlives") == []

    with rig.worker():
        [run] = rig.wait_for_runs("outlives")

        assert run.at - began >= 5.99
        rig.wait_for_state(task_id, "success")
    assert len(rig.runs("outlives")) == 1


def test_a_retry_outlives_the_worker_that_asked_for_it(rig: Rig) -> None:
    with rig.worker() as first:
        task_id = rig.launch("fail_once", "again")
        rig.wait_for_state(task_id, "retry")
        wait_until("its first message to go", lambda: messages_of(rig, task_id) == 1, TIMEOUT)
        first.process.kill()
        first.process.wait(TIMEOUT)
    with rig.worker():
        rig.wait_for_state(task_id, "success")

    first_run, second_run = rig.runs("again")
    assert (first_run.rest, second_run.rest) == ("0", "1")
    assert second_run.at - first_run.at >= 2.99
    assert second_run.organization == "acme"


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Child]:
    with rig.worker(request.param) as worker:
        yield worker


def test_a_delayed_task_is_run_when_its_time_has_come_and_no_worker_has_it_before(rig: Rig, worker: Child) -> None:
    label = f"countdown-{worker.process.pid}"
    began = time.time()
    task_id = rig.launch("note", label, countdown=2)

    assert rig.record(task_id).state == "delayed"
    assert list((rig.app.control.inspect(timeout=5).scheduled() or {}).values()) == [[]]

    [run] = rig.wait_for_runs(label)
    assert run.at - began >= 1.99
    assert run.organization == "acme"
    assert run.rest != "None", "it may know its ETA"
    assert rig.wait_for_state(task_id, "success").eta is not None


def test_an_eta_is_kept_for_each_tenant(rig: Rig, worker: Child) -> None:
    label = f"eta-{worker.process.pid}"
    due = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    for tenant in (ACME, GLOBEX):
        rig.launch("note", label, tenant, eta=due)

    runs = rig.wait_for_runs(label, 2)

    assert sorted(run.organization for run in runs) == ["acme", "globex"]
    assert min(run.at for run in runs) >= due.timestamp() - 0.01


def test_a_task_that_is_revoked_while_it_is_delayed_ends_at_once(rig: Rig, worker: Child) -> None:
    label = f"revoked-{worker.process.pid}"
    task_id = rig.launch("note", label, countdown=3600)

    rig.app.control.revoke(task_id)

    rig.wait_for_state(task_id, "revoked")
    wait_until("its message to go", lambda: messages_of(rig, task_id) == 0, TIMEOUT)
    assert rig.runs(label) == []
    assert "Failed to mark task" not in worker.output  # whose it is is known with its message only


def test_a_task_that_expires_while_it_is_delayed_ends_then(rig: Rig, worker: Child) -> None:
    label = f"expired-{worker.process.pid}"
    task_id = rig.launch("note", label, countdown=3600, expires=1)

    rig.wait_for_state(task_id, "expired")
    wait_until("its message to go", lambda: messages_of(rig, task_id) == 0, TIMEOUT)
    assert rig.runs(label) == []


def test_a_time_that_is_far_off_is_no_error(rig: Rig, worker: Child) -> None:
    task_id = rig.launch("note", f"far-{worker.process.pid}", eta=datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC))

    assert rig.record(task_id).state == "delayed"
    assert messages_of(rig, task_id) == 1


def messages_of(rig: Rig, task_id: str) -> int:
    with rig.database.owner.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT count(*) FROM rhesis_tasks.message WHERE task_id = %s", (task_id,)
        ).scalar_one()
    return int(found)
