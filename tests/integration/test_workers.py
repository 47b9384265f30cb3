"""The tenant on real workers: what the bodies of tasks saw is compared with what the launcher meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from applications import application
from celery import chain, chord, group
from celery.result import AsyncResult
from kombu.utils.uuid import uuid

from rhesis_tasks import TenantContext, launch_with_context, tenant_scope
from rhesis_tasks.errors import MissingTenantError
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.rls import enable_rls
from rhesis_tasks.testing import running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
A = TenantContext("tenant-a", "ann", "project-a")
B = TenantContext("tenant-b", "bob")


class Rig:
    """The application in this process, and a worker of its own."""

    def __init__(self, tasks: Any, worker: Child) -> None:
        self.tasks = tasks
        self.worker = worker

    def get(self, result: AsyncResult[Any], tenant: TenantContext) -> Any:
        with tenant_scope(tenant):
            return result.get(timeout=TIMEOUT)

    def record(self, task_id: str, tenant: TenantContext) -> TaskRecord | None:
        with tenant_scope(tenant):
            found: TaskRecord | None = self.tasks.app.backend.get_record(task_id)
            return found

    def ended(self, task_id: str, tenant: TenantContext) -> TaskRecord:
        """The record of a task once its state is final."""
        found: list[TaskRecord] = []

        def is_final() -> bool:
            record = self.record(task_id, tenant)
            if record is not None and record.state in ("success", "failure", "revoked"):
                found.append(record)
            return bool(found)

        wait_until(f"task {task_id} to end", is_final, TIMEOUT)
        return found[0]


@pytest.fixture(scope="module")
def tasks_and_url(postgres_url: str) -> Iterator[tuple[Any, str]]:
    """The tasks, and the URL of their database."""
    with application(postgres_url, "tenant_tasks") as (tasks, database):
        database.execute(
            "CREATE TABLE note (id bigint GENERATED ALWAYS AS IDENTITY, organization_id text NOT NULL, body text)",
            enable_rls("note", role=database.role, column_type="text"),
            f'GRANT SELECT, INSERT ON note TO "{database.role}"',
        )
        yield tasks, database.url


@pytest.fixture(scope="module", params=["prefork", "threads", "solo", "gevent"])
def rig(request: pytest.FixtureRequest, tasks_and_url: tuple[Any, str]) -> Iterator[Rig]:
    """A worker in each pool."""
    tasks, url = tasks_and_url
    with running_worker("tenant_tasks", cwd=HERE, pool=request.param, env={"DATABASE_URL": url}) as worker:
        yield Rig(tasks, worker)


def expected(tenant: TenantContext, **more: Any) -> dict[str, Any]:
    return {
        "organization": tenant.organization_id,
        "user": tenant.user_id,
        "project": tenant.project_id,
        "request_organization": tenant.organization_id,
        "request_user": tenant.user_id,
        "request_id": None,
        "locale": "en",
        "retries": 0,
        **more,
    }


def test_every_way_to_launch_brings_the_launchers_context_to_the_body(rig: Rig) -> None:
    """One test for many cases, since a worker takes seconds to start."""
    look, look_back, app = rig.tasks.look, rig.tasks.look_back, rig.tasks.app
    launches: dict[str, Callable[[TenantContext], AsyncResult[Any]]] = {
        "launch_with_context": lambda tenant: launch_with_context(look, context=tenant),
        "delay": lambda _: look.delay(),
        "apply_async": lambda _: look.apply_async(headers={"mine": "1"}),
        "send_task": lambda _: app.send_task("tenant_tasks.look"),
        "signature": lambda tenant: launch_with_context(look.s(1), context=tenant),
        "retry": lambda tenant: launch_with_context(rig.tasks.flaky, 2, context=tenant),
        "autoretry_for": lambda tenant: launch_with_context(rig.tasks.flaky_the_celery_way, context=tenant),
        "chain": lambda tenant: launch_with_context(chain(look.s(), look_back.s(), look_back.s()), context=tenant),
        "chord": lambda tenant: launch_with_context(
            chord([look.s(i) for i in range(3)], look_back.s()), context=tenant
        ),
        "chord of chains": lambda tenant: launch_with_context(
            chord([chain(look.s(), look_back.s()), look.s()], look_back.s()), context=tenant
        ),
        "chord in a chain": lambda tenant: launch_with_context(
            chain(look.s(), group(look_back.s(), look_back.s()), look_back.s()), context=tenant
        ),
    }
    started: list[tuple[str, TenantContext, AsyncResult[Any]]] = []
    for tenant in (A, B, A):
        with tenant_scope(tenant):
            started += [(case, tenant, launch(tenant)) for case, launch in launches.items()]

    def saw(value: Any) -> Iterator[dict[str, Any]]:
        """What every part of a canvas saw, out of what its last part returned."""
        if isinstance(value, list):
            for item in value:
                yield from saw(item)
        elif "mine" in value:
            yield value["mine"]
            yield from saw(value["before"])
        else:
            yield value

    for case, tenant, result in started:
        parts = list(saw(rig.get(result, tenant)))

        retries = {"retry": 2, "autoretry_for": 2}.get(case, 0)
        assert parts == [expected(tenant, retries=retries)] * len(parts), case
        assert rig.ended(result.id, tenant).organization_id == tenant.organization_id, case


def test_registered_variables_travel_and_nothing_is_left_for_the_next_task(rig: Rig) -> None:
    def launch_with_values() -> AsyncResult[Any]:
        rig.tasks.request_id.set("req-1")
        rig.tasks.Vars().locale = "de"
        return launch_with_context(rig.tasks.look, context=A)

    with_values = copy_context().run(launch_with_values)
    leaks = [launch_with_context(rig.tasks.leak, "leaked", context=A) for _ in range(4)]

    assert rig.get(with_values, A) == expected(A, request_id="req-1", locale="de")
    for leak in leaks:
        rig.get(leak, A)
    after = [launch_with_context(rig.tasks.look, context=B) for _ in range(8)]
    untenanted = [rig.tasks.plain.apply_async(headers={"rhesis_tasks": {"v": 1}}) for _ in range(8)]
    assert [rig.get(result, B) for result in after] == [expected(B)] * 8
    assert [result.get(timeout=TIMEOUT) for result in untenanted] == [[None, None]] * 8


def test_a_launch_inside_a_task_is_for_the_same_tenant(rig: Rig) -> None:
    inner = rig.get(launch_with_context(rig.tasks.nested, context=A), A)

    record = rig.ended(inner, A)

    assert record.result == expected(A)
    assert record.parent_id is not None
    assert rig.record(inner, B) is None


def test_a_task_acts_for_other_tenants_in_scopes_only(rig: Rig) -> None:
    acted = launch_with_context(rig.tasks.act_for, ["x", "y"], context=A)
    refused = launch_with_context(rig.tasks.relaunch_as, "tenant-b", context=A)

    assert rig.get(acted, A) == [["x", "y"], "tenant-a"]
    assert rig.get(refused, A) == "TenantConflictError"


def test_a_message_without_a_tenant_is_refused_at_the_worker_and_stored_as_a_failure(rig: Rig) -> None:
    before = rig.worker.output.count("looking around")
    task_id = uuid()
    publish(rig, task_id, {"v": 1})
    result = rig.tasks.app.AsyncResult(task_id)

    with pytest.raises(MissingTenantError, match=r"Its body was not run"):
        result.get(timeout=TIMEOUT)

    assert rig.worker.output.count("looking around") == before


@pytest.mark.parametrize("header", [{"v": 99, "organization_id": "tenant-a"}, {"organization_id": "tenant-a"}, "junk"])
def test_a_header_that_cannot_be_read_never_runs_a_body(rig: Rig, header: Any) -> None:
    before = rig.worker.output.count("looking around")
    task_id = uuid()
    publish(rig, task_id, header)

    with pytest.raises(Exception, match="context header"):
        rig.tasks.app.AsyncResult(task_id).get(timeout=TIMEOUT)

    assert rig.worker.output.count("looking around") == before


def publish(rig: Rig, task_id: str, header: Any) -> None:
    """A message as somebody else's publisher makes it."""
    app = rig.tasks.app
    with app.producer_or_acquire() as producer:
        message = app.amqp.create_task_message(task_id, "tenant_tasks.look", (), {})
        app.backend.record_launch(task_id, "tenant_tasks.look")
        app.amqp.send_task_message(producer, "tenant_tasks.look", message, headers={"rhesis_tasks": header})


def test_a_failure_is_stored_with_its_tenant_and_seen_by_nobody_else(rig: Rig) -> None:
    result = launch_with_context(rig.tasks.broken, context=A)

    with pytest.raises(ValueError, match="broken for tenant-a"):
        rig.get(result, A)

    record = rig.ended(result.id, A)
    assert (record.state, record.organization_id, record.user_id) == ("failure", "tenant-a", "ann")
    assert (record.error_type, record.error_message) == ("ValueError", "broken for tenant-a")
    assert "ValueError" in (record.traceback or "")
    assert rig.record(result.id, B) is None


def test_a_task_that_never_recovers_is_tried_as_often_as_its_policy_says(rig: Rig) -> None:
    result = launch_with_context(rig.tasks.flaky, 99, context=A)

    with pytest.raises(ConnectionError):
        rig.get(result, A)

    record = rig.ended(result.id, A)
    assert (record.state, record.retries) == ("failure", 3)


def test_sessions_in_tasks_write_and_read_their_own_tenants_rows_only(rig: Rig) -> None:
    one, other = (TenantContext(f"notes-{uuid()}") for _ in range(2))
    failed = launch_with_context(rig.tasks.add_note, "rolled back", fail=True, context=other)
    with pytest.raises(ValueError, match="after the insert"):
        rig.get(failed, other)

    decorated = [launch_with_context(rig.tasks.add_note, f"note {number}", context=one) for number in range(3)]
    by_hand = launch_with_context(rig.tasks.add_notes_by_hand, ["x", "y"], context=other)

    assert max(rig.get(result, one) for result in decorated) <= 3
    assert rig.get(by_hand, other) == [1, 2]
    assert rig.get(launch_with_context(rig.tasks.add_note, "the last", context=one), one) == 4


def test_two_tenants_at_once_never_see_each_other(rig: Rig) -> None:
    def run_for(number: int) -> tuple[TenantContext, Any]:
        tenant = TenantContext(f"org-{number % 5}", f"user-{number}")
        return tenant, launch_with_context(rig.tasks.look, number, context=tenant)

    with ThreadPoolExecutor(4) as threads:
        launched = list(threads.map(run_for, range(60)))

    wrong = [tenant for tenant, result in launched if rig.get(result, tenant) != expected(tenant)]
    assert not wrong


def test_the_workers_log_names_the_tenant_on_its_lines(rig: Rig) -> None:
    tenant = TenantContext("logged-organization", "logged-user")
    result = launch_with_context(rig.tasks.look, context=tenant)

    rig.worker.wait_for(f"Task tenant_tasks.look[{result.id}] succeeded", TIMEOUT)

    mark = "[org=logged-organization user=logged-user]"
    started, own, ended = [line for line in rig.worker.output.splitlines() if mark in line]
    assert f"Task tenant_tasks.look[{result.id}] started: attempt 1" in started
    assert own.endswith("looking around")
    assert f"Task tenant_tasks.look[{result.id}] succeeded in " in ended


@pytest.mark.parametrize("rig", ["prefork"], indirect=True)  # the only one of these pools that has hard limits
def test_what_a_hard_time_limit_ends_is_recorded_for_its_tenant_with_the_rest_of_the_chain(rig: Rig) -> None:
    with tenant_scope(A):
        result = chain(rig.tasks.hang.si().set(time_limit=1), rig.tasks.look.si()).apply_async()

    ends = [rig.ended(task_id, A) for task_id in (result.parent.id, result.id)]

    assert [(record.state, record.error_type) for record in ends] == [("failure", "TimeLimitExceeded")] * 2
