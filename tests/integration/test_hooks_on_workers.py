"""Hooks on real workers: whose rows they see, and that a lost process keeps none of them from running."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from applications import application

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.hooks import RUN_HOOKS
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
QUEUE = "custom"
A = TenantContext("tenant-a", "ann")
B = TenantContext("tenant-b", "bob")
NOTES = {"tenant-a": ["of a"], "tenant-b": ["of b"]}


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    """The tasks, and their database with a note of each tenant's."""
    with application(postgres_url, "hook_tasks") as (tasks, database):
        database.execute(
            "CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY, organization_id text NOT NULL, body text)",
            "INSERT INTO note (organization_id, body) VALUES ('tenant-a', 'of a'), ('tenant-b', 'of b')",
            f'GRANT SELECT ON note TO "{database.role}"',
            enable_rls("note", role=database.role, column_type="text"),
        )
        yield tasks, database


class Rig:
    """The application in this process, workers of a queue, and what their hooks write down."""

    def __init__(self, tasks: Any, database: TenantDatabase, folder: Path) -> None:
        self.tasks = tasks
        self.release = folder / "release"
        self._told = folder / "told"
        self._env = {"DATABASE_URL": database.url, "TOLD": str(self._told), "RELEASE": str(self.release)}

    def worker(self, name: str, pool: str = "prefork", concurrency: int = 2) -> AbstractContextManager[Child]:
        arguments = ["-Q", QUEUE, "-n", f"{name}@test"]
        return running_worker(
            "hook_tasks", cwd=HERE, pool=pool, concurrency=concurrency, env=self._env, arguments=arguments
        )

    @staticmethod
    def launch(tenant: TenantContext, task: Any) -> str:
        with tenant_scope(tenant):
            return str(task.apply_async(queue=QUEUE).id)

    def told(self) -> list[dict[str, Any]]:
        return list(map(json.loads, self._told.read_text().splitlines())) if self._told.exists() else []

    def wait_for(self, count: int, worker: Child) -> list[dict[str, Any]]:
        try:
            wait_until(f"{count} lines of hooks", lambda: len(self.told()) >= count, TIMEOUT)
        except TimeoutError as error:
            error.add_note(f"{self.told()}\n{worker.output[-3000:]}")
            raise
        return self.told()


@pytest.fixture
def rig(tasks_and_database: tuple[Any, TenantDatabase], tmp_path: Path) -> Rig:
    return Rig(*tasks_and_database, tmp_path)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_hooks_see_the_rows_of_their_tenant_alone(rig: Rig, pool: str) -> None:
    with rig.worker(pool, pool) as worker:
        launched = {rig.launch(tenant, rig.tasks.look): tenant.organization_id for tenant in (A, B) * 10}
        told = rig.wait_for(3 * len(launched), worker)

    ways = Counter((each["how"], each["key"]) for each in told)
    assert ways == Counter((how, f"{each}:success") for how in ("own", "sync", "async") for each in launched)
    for each in told:
        organization = launched[each["request"]]
        assert (each["organization"], each["told"]) == (organization, organization)
        assert each["notes"] == NOTES[organization]


@pytest.mark.parametrize(("name", "error"), [("lost", "WorkerLostError"), ("too_long", "TimeLimitExceeded")])
def test_what_the_main_process_decides_is_told_once_by_a_task_of_the_same_queue(
    rig: Rig, name: str, error: str
) -> None:
    with rig.worker(name, concurrency=1) as worker:
        launched = {rig.launch(tenant, getattr(rig.tasks, name)): tenant.organization_id for tenant in (A, B, A)}
        rig.wait_for(len(launched), worker)
        # What would tell it again was published before this.
        after = rig.launch(A, rig.tasks.look)
        rig.wait_for(len(launched) + 3, worker)

    told = [each for each in rig.told() if each["request"] != after]
    assert Counter(each["key"] for each in told) == Counter(f"{each}:failure" for each in launched)
    for each in told:
        organization = launched[each["request"]]
        assert (each["run_by"], each["error"]) == (RUN_HOOKS, error)
        assert (each["organization"], each["told"]) == (organization, organization)
        assert each["notes"] == NOTES[organization]


@pytest.mark.parametrize("whole", [True, False], ids=["the whole worker", "its child"])
def test_a_hook_whose_process_is_killed_runs_again_with_the_same_key(rig: Rig, whole: bool) -> None:
    with rig.worker("first", concurrency=1) as worker:
        key = f"{rig.launch(B, rig.tasks.held)}:failure"
        (begun,) = rig.wait_for(1, worker)
        if not whole:
            os.kill(begun["pid"], signal.SIGKILL)
            rig.wait_for(2, worker)
        os.killpg(worker.process.pid, signal.SIGKILL)
    rig.release.touch()
    before = len(rig.told())

    with rig.worker("next", concurrency=1) as worker:
        told = rig.wait_for(before + 2, worker)

    assert [each["how"] for each in told] == ["begun"] * (before + 1) + ["done"]
    assert {(each["key"], each["organization"], each["run_by"]) for each in told} == {(key, "tenant-b", RUN_HOOKS)}
