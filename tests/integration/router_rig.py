"""What the tests of ``task_router`` share: users of two tenants, the API of an application, and tasks in any state."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from celery import Celery
from fastapi import FastAPI, Header, HTTPException
from fastapi.testclient import TestClient

from rhesis_tasks import BaseTask, TenantContext, tenant_scope
from rhesis_tasks.fastapi import task_router, tenant_dependency
from rhesis_tasks.postgres.records import StateChange
from rhesis_tasks.states import TRANSITIONS, State
from rhesis_tasks.testing import TenantDatabase

ANN, AMY, BOB = TenantContext("acme", "ann"), TenantContext("acme", "amy"), TenantContext("globex", "bob")
TO = {transition.target: transition for transition in TRANSITIONS}


@dataclasses.dataclass
class User:
    id: str | None
    organization_id: str | None


USERS = {tenant.user_id: User(tenant.user_id, tenant.organization_id) for tenant in (ANN, AMY, BOB)}


async def get_current_user(authorization: Annotated[str, Header()] = "") -> Any:
    if authorization == "Bearer nobody":
        return None  # as a login does that leaves it to its routes
    if authorization == "Bearer newcomer":
        return User("newcomer", None)
    try:
        return USERS[authorization.removeprefix("Bearer ")]
    except KeyError:
        raise HTTPException(401, "who are you?") from None


def with_work(app: Celery) -> Celery:
    """The application with a task."""

    @app.task(base=BaseTask, bind=True, name="work", shared=False)
    def work(self: BaseTask, number: int = 0) -> int:
        return number

    return app


def api_of(app: Celery, **options: Any) -> FastAPI:
    api = FastAPI()
    api.include_router(task_router(app, tenant_dependency(get_current_user), **options), prefix="/tasks")
    return api


def client_of(app: Celery, tenant: TenantContext, **options: Any) -> TestClient:
    return TestClient(api_of(app, **options), headers={"Authorization": f"Bearer {tenant.user_id}"})


def launch(app: Celery, tenant: TenantContext, task_id: str, *, name: str = "work", **lineage: Any) -> str:
    """A record as of a launch."""
    with tenant_scope(tenant):
        app.backend.record_launch(task_id, name, **lineage)
    return task_id


def move(app: Celery, tenant: TenantContext, task_id: str, state: State, **values: Any) -> str:
    """A launched task in a state."""
    launch(app, tenant, task_id)
    change(app, tenant, task_id, state, **values)
    return task_id


def change(app: Celery, tenant: TenantContext, task_id: str, state: State, **values: Any) -> None:
    """Move a task that is there."""
    app.backend.records.change(
        tenant.organization_id, StateChange(task_id=task_id, transition=TO[state], user_id=tenant.user_id, **values)
    )


def succeed(app: Celery, tenant: TenantContext, task_id: str, result: Any) -> str:
    with tenant_scope(tenant):
        app.backend.store_result(task_id, result, "SUCCESS")
    return task_id


def fail(app: Celery, tenant: TenantContext, task_id: str, message: str) -> str:
    with tenant_scope(tenant):
        app.backend.store_result(task_id, ValueError(message), "FAILURE")
    return task_id


def rows(database: TenantDatabase) -> list[tuple[Any, ...]]:
    """All records and all messages, of all tenants."""
    with database.owner.connect() as connection:
        return [
            tuple(row)
            for table in ("task_record", "message")
            for row in connection.exec_driver_sql(f"SELECT t::text FROM rhesis_tasks.{table} t ORDER BY 1")
        ]
