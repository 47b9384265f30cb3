"""``async def`` tasks on real workers: sessions, soft time limits, and what they leave behind.

``RHESIS_TASKS_ASYNC_TASKS`` says how many littering tasks each worker runs; run with ``-s`` to see what it held.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from applications import application
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.processes import Child, python, wait_until
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
TASKS = int(os.environ.get("RHESIS_TASKS_ASYNC_TASKS", "300"))
A = TenantContext("tenant-a", "ann")
B = TenantContext("tenant-b", "bob")

ENDED = ("success", "failure", "revoked")


class Rig:
    """The application in this process, a worker of its own with one process or thread, and their database."""

    def __init__(self, tasks: Any, worker: Child, queue: str, database: TenantDatabase) -> None:
        self.tasks = tasks
        self.worker = worker
        self.queue = queue
        self.database = database

    def launch(self, tenant: TenantContext, task: Any, *args: Any) -> Any:
        def publish() -> Any:
            self.tasks.label.set("-".join((tenant.organization_id, *map(str, args))))
            with tenant_scope(tenant):
                return task.apply_async(args, queue=self.queue)

        return copy_context().run(publish)

    def run(self, tenant: TenantContext, task: Any, *args: Any) -> Any:
        return self.ended(self.launch(tenant, task, *args).id, tenant)

    def ended(self, task_id: str, tenant: TenantContext, timeout: float = TIMEOUT) -> TaskRecord:
        """The record of a task once it has ended."""
        found: list[TaskRecord] = []

        def has_ended() -> bool:
            record = self.record(task_id, tenant)
            found[:] = [record] if record.state in ENDED else []
            return bool(found)

        try:
            wait_until(f"task {task_id} to end", has_ended, timeout)
        except TimeoutError as error:
            error.add_note(self.worker.output[-3000:])
            raise
        return found[0]

    def record(self, task_id: str, tenant: TenantContext) -> TaskRecord:
        with tenant_scope(tenant):
            found: TaskRecord | None = self.tasks.app.backend.get_record(task_id)
        assert found is not None
        return found

    def resources(self) -> dict[str, Any]:
        found: dict[str, Any] = self.tasks.resources.apply_async(queue=self.queue).get(timeout=TIMEOUT, interval=0.02)
        return found

    def in_transaction(self) -> list[str]:
        """What sessions of the application are in the middle of."""
        return self._activity("state <> 'idle' AND query NOT LIKE '%pg_stat_activity%'")

    def connections(self) -> int:
        return len(self._activity("true"))

    def _activity(self, condition: str) -> list[str]:
        with self.database.admin.connect() as connection:
            query = f"SELECT state || ': ' || query FROM pg_stat_activity WHERE usename = :role AND {condition}"
            return list(connection.scalars(text(query), {"role": self.database.role}).all())

    def notes(self) -> list[tuple[str, str]]:
        url = self.database.admin.url.set(database=database_url(self.database.url).database)
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            return [(row[0], row[1]) for row in connection.execute(text("SELECT organization_id, body FROM note"))]


WORKERS = {
    "prefork": {"pool": "prefork"},
    "prefork-asyncpg": {"pool": "prefork", "driver": "asyncpg"},
    "prefork-uvloop": {"pool": "prefork", "event_loop": "uvloop"},
    "threads": {"pool": "threads"},
    "threads-asyncpg": {"pool": "threads", "driver": "asyncpg"},
    "solo": {"pool": "solo"},
    "solo-uvloop": {"pool": "solo", "event_loop": "uvloop"},
}
PREFORK = [name for name in WORKERS if name.startswith("prefork")]


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    """The tasks, and their database."""
    with application(postgres_url, "async_tasks") as (tasks, database):
        database.execute(
            "CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY, organization_id text NOT NULL, body text)",
            "INSERT INTO note (organization_id, body) VALUES ('tenant-a', 'of a'), ('tenant-b', 'of b')",
            f'GRANT SELECT, INSERT ON note TO "{database.role}"',
            enable_rls("note", role=database.role, column_type="text"),
        )
        yield tasks, database


@pytest.fixture(scope="module")
def rigs(tasks_and_database: tuple[Any, TenantDatabase]) -> Iterator[Callable[[str], Rig]]:
    """A worker of each kind that is asked for; it stays, to be asked again."""
    tasks, database = tasks_and_database
    with ExitStack() as workers:
        known: dict[str, Rig] = {}

        def rig_of(name: str) -> Rig:
            if name not in known:
                options = WORKERS[name]
                env = {"DATABASE_URL": database.url, "EVENT_LOOP": options.get("event_loop", "asyncio")}
                if "driver" in options:
                    env["SESSIONS_URL"] = database.url.replace("postgresql:", f"postgresql+{options['driver']}:")
                worker = running_worker(
                    "async_tasks",
                    cwd=HERE,
                    pool=options["pool"],
                    concurrency=1,
                    env=env,
                    arguments=["-Q", name, "-n", f"{name}@test"],
                )
                known[name] = Rig(tasks, workers.enter_context(worker), name, database)
            return known[name]

        yield rig_of


@pytest.fixture
def rig(request: pytest.FixtureRequest, rigs: Callable[[str], Rig]) -> Rig:
    """A worker of a kind."""
    return rigs(request.param)


on_every_worker = pytest.mark.parametrize("rig", WORKERS, indirect=True)
on_prefork = pytest.mark.parametrize("rig", PREFORK, indirect=True)


# --- sessions ---------------------------------------------------------------------------------------------------


@on_every_worker
def test_tasks_of_all_tenants_use_one_loop_and_see_their_own_rows(rig: Rig) -> None:
    seen = [rig.run(tenant, rig.tasks.look).result for tenant in (A, B, A, B)]

    assert [each["organization"] for each in seen] == ["tenant-a", "tenant-b"] * 2
    assert all("of a" in each["notes"] and "of b" not in each["notes"] for each in seen[::2])
    assert all("of b" in each["notes"] and "of a" not in each["notes"] for each in seen[1::2])
    assert len({(each["pid"], each["thread"], each["loop"]) for each in seen}) == 1


@on_every_worker
def test_many_sessions_at_once_are_all_the_tenants(rig: Rig) -> None:
    record = rig.run(B, rig.tasks.together, 30)

    assert record.result == ["tenant-b"] * 32


# --- soft time limits -------------------------------------------------------------------------------------------

LIMITED = ("failure", "SoftTimeLimitExceeded")


@on_prefork
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("sleeps_in_transactions", LIMITED),
        ("cleans_up", LIMITED),
        ("returns_what_it_has", ("success", None)),
        ("fails_cleaning_up", ("failure", "ValueError")),
        ("never_awaits", LIMITED),
        ("will_not_end", LIMITED),
        ("waits_for_the_database", LIMITED),
        ("waits_for_a_thread", LIMITED),
    ],
)
def test_the_soft_time_limit_ends_a_coroutine_and_its_transactions(
    rig: Rig, name: str, ending: tuple[str, str | None]
) -> None:
    if rig.queue.endswith("asyncpg") and name == "waits_for_the_database" and sqlalchemy.__version__.startswith("2.0."):
        pytest.skip("SQLAlchemy 2.0.22 does not tell asyncpg's server that a statement was cancelled, which goes on")
    before = rig.run(B, rig.tasks.look).result

    record = rig.run(A, getattr(rig.tasks, name))

    after = rig.run(B, rig.tasks.look).result
    assert (record.state, record.error_type) == ending, record.traceback
    wait_until("its transactions to end", lambda: rig.in_transaction() == [], TIMEOUT)
    assert after["pid"] == before["pid"], "the process goes on"
    assert (after["loop"] == before["loop"]) or name in ("will_not_end",)
    assert "never committed" not in [body for _, body in rig.notes()]
    assert name != "cleans_up" or ("tenant-a", "cleaned up") in rig.notes()
    assert name != "returns_what_it_has" or record.result == "what it has"


@pytest.mark.parametrize("rig", ["prefork"], indirect=True)
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("sleeps_in_a_session", LIMITED),
        ("leaves_a_session_open", LIMITED),
        ("waits_in_the_database", LIMITED),
        ("finishes_cleanly", ("success", None)),
    ],
)
def test_the_soft_time_limit_ends_a_function_and_its_transactions(
    rig: Rig, name: str, ending: tuple[str, str | None]
) -> None:
    record = rig.run(A, getattr(rig.tasks, name))

    assert (record.state, record.error_type) == ending, record.traceback
    assert record.failure_reason == ("its soft time limit was reached" if ending == LIMITED else None)
    wait_until("its transactions to end", lambda: rig.in_transaction() == [], TIMEOUT)
    assert "never committed" not in [body for _, body in rig.notes()]
    assert name != "finishes_cleanly" or ("tenant-a", "done so far") in rig.notes()
    assert rig.run(B, rig.tasks.look).result["organization"] == "tenant-b"


# --- leaks ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(60 + TASKS)
@pytest.mark.parametrize("rig", ["solo", "threads-asyncpg", "prefork", "solo-uvloop"], indirect=True)
def test_nothing_of_a_task_is_met_by_the_next_ones_and_nothing_grows(rig: Rig) -> None:
    rng = random.Random(7)
    rounds = 4
    held = []
    for number in range(rounds):
        launched = []
        for each in range(TASKS // rounds):
            tenant = (A, B)[each % 2]
            task = rig.tasks.cancels_itself if rng.random() < 0.1 else rig.tasks.litter
            launched.append((tenant, rig.launch(tenant, task, number * TASKS + each).id))
        for tenant, task_id in launched:
            record = rig.ended(task_id, tenant, TIMEOUT + TASKS / 10)
            assert record.state == "failure" or record.result == [tenant.organization_id]
            assert record.error_type in (None, "TimeoutError", "TaskCancelledError"), record.traceback
        wait_until("all transactions to end", lambda: rig.in_transaction() == [], TIMEOUT)
        held.append({**rig.resources(), "connections": rig.connections()})
        assert held[-1].pop("crossed") == []
    print(f"{rig.queue}: {TASKS} tasks, {held}")

    for what in ("files", "threads", "connections"):
        assert held[-1][what] <= held[0][what] + 5, (what, held)


# --- workers ----------------------------------------------------------------------------------------------------


def test_a_gevent_worker_says_which_tasks_it_cannot_run(tasks_and_database: tuple[Any, TenantDatabase]) -> None:
    pytest.importorskip("gevent", reason="gevent is not installed here")
    _, database = tasks_and_database

    ended = subprocess.run(
        python("-m", "celery", "-A", "async_tasks", "worker", "--pool", "gevent", "-Q", "gevent"),
        cwd=HERE,
        env={**os.environ, "DATABASE_URL": database.url},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

    assert ended.returncode != 0
    assert "has async def tasks, which a gevent worker cannot run: async_tasks.cancels_itself" in ended.stderr


@pytest.fixture(params=["prefork", "threads", "solo"])
def stopping(request: pytest.FixtureRequest, tasks_and_database: tuple[Any, TenantDatabase]) -> Iterator[Rig]:
    """With a worker of its own, to be told to stop."""
    (tasks, database), pool = tasks_and_database, request.param
    queue = f"stopping-{pool}"
    env = {"DATABASE_URL": database.url}
    with running_worker(
        "async_tasks", cwd=HERE, pool=pool, concurrency=1, env=env, arguments=["-Q", queue, "-n", f"{queue}@test"]
    ) as worker:
        yield Rig(tasks, worker, queue, database)


def stop(worker: Child) -> None:
    worker.process.send_signal(signal.SIGTERM)
    wait_until("the worker to stop", lambda: not worker.running, TIMEOUT)


def test_a_worker_that_is_told_to_stop_lets_its_coroutine_end(stopping: Rig) -> None:
    launched = stopping.launch(A, stopping.tasks.takes_a_while)
    wait_until("the task to start", lambda: stopping.record(launched.id, A).state == "started", TIMEOUT)

    stop(stopping.worker)

    assert stopping.record(launched.id, A).result == "done"
    assert "Traceback" not in stopping.worker.output


def test_a_worker_that_is_told_to_stop_does_not_wait_for_a_thread_that_a_task_has_left(stopping: Rig) -> None:
    record = stopping.run(A, stopping.tasks.gives_up_a_thread)

    stop(stopping.worker)

    assert record.state == "success"
    assert "Traceback" not in stopping.worker.finished_output()
