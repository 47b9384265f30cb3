"""The tenant of a request, and the status route that knows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from celery import Celery
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from rhesis_tasks import (
    BaseTask,
    TenantContext,
    alaunch_with_context,
    configure,
    current_tenant,
    launch_with_context,
    tenant_scope,
    unconfigure,
)
from rhesis_tasks.fastapi import task_router, tenant_dependency
from rhesis_tasks.testing import TenantDatabase


@dataclasses.dataclass
class User:
    id: str
    organization_id: str


USERS = {"ann": User("ann", "tenant-a"), "bob": User("bob", "tenant-b")}


async def get_current_user(authorization: Annotated[str, Header()]) -> User:
    try:
        return USERS[authorization.removeprefix("Bearer ")]
    except KeyError:
        raise HTTPException(401, "who are you?") from None


get_tenant = tenant_dependency(get_current_user)
Tenant = Annotated[TenantContext, Depends(get_tenant)]


@pytest.fixture
def celery_app(tenant_database: TenantDatabase) -> Iterator[Celery]:
    app = Celery("api", set_as_current=False)
    configure(app, tenant_database.url, broker_url="memory://")
    yield app
    unconfigure(app)


@pytest.fixture
def client(celery_app: Celery) -> Iterator[TestClient]:
    api = FastAPI()
    api.include_router(task_router(celery_app, get_tenant), prefix="/tasks")

    @celery_app.task(base=BaseTask, bind=True, name="work", shared=False)
    def work(self: BaseTask, number: int) -> int:
        return number

    @api.get("/sync")
    def sync_route(tenant: Tenant) -> list[str | None]:
        active = current_tenant()
        return [tenant.organization_id, active and active.organization_id]

    @api.get("/async")
    async def async_route(tenant: Tenant) -> list[str | None]:
        active = current_tenant()
        return [tenant.organization_id, active and active.organization_id]

    @api.get("/fails")
    async def failing_route(tenant: Tenant) -> None:
        raise HTTPException(418, tenant.organization_id)

    @api.get("/stream")
    async def streaming_route(tenant: Tenant) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield tenant.organization_id

        return StreamingResponse(parts())

    @api.get("/open")
    async def open_route() -> bool:
        return current_tenant() is None

    @api.post("/work")
    def launch(tenant: Tenant) -> str:
        return str(launch_with_context(work, 1).id)

    @api.post("/async-work")
    async def alaunch(user: Annotated[User, Depends(get_current_user)]) -> str:
        return str((await alaunch_with_context(work, 1, current_user=user)).id)

    with TestClient(api) as client:
        yield client


def as_user(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.mark.parametrize("path", ["/sync", "/async"])
@pytest.mark.parametrize(("user", "organization"), [("ann", "tenant-a"), ("bob", "tenant-b")])
def test_a_route_works_for_the_tenant_of_its_user(client: TestClient, path: str, user: str, organization: str) -> None:
    assert client.get(path, headers=as_user(user)).json() == [organization, organization]


@pytest.mark.parametrize("path", ["/sync", "/async", "/stream", "/fails"])
def test_no_tenant_is_left_after_a_request_however_it_ends(client: TestClient, path: str) -> None:
    client.get(path, headers=as_user("ann"))

    assert client.get("/open").json() is True
    assert current_tenant() is None


def test_a_streamed_response_is_the_tenants_own(client: TestClient) -> None:
    assert client.get("/stream", headers=as_user("bob")).text == "tenant-b"


def test_an_unknown_user_is_answered_by_the_applications_own_dependency(client: TestClient) -> None:
    assert client.get("/sync", headers=as_user("eve")).status_code == 401
    assert client.get("/tasks/unknown", headers=as_user("eve")).status_code == 401


@pytest.mark.parametrize("path", ["/work", "/async-work"])
def test_a_task_is_shown_to_its_tenant_from_the_launch_on(client: TestClient, path: str) -> None:
    task_id = client.post(path, headers=as_user("ann")).json()

    status = client.get(f"/tasks/{task_id}", headers=as_user("ann"))

    assert status.status_code == 200
    shown = status.json()
    assert shown.pop("launched_at")
    assert shown == {
        **dict.fromkeys(["abort_requested_at", "abort_requested_by", "eta", "parent_id", "progress"]),
        "root_id": task_id,
        "task_id": task_id,
        "name": "work",
        "state": "queued",
        "result": None,
        "error": None,
        "retries": 0,
        "organization_id": "tenant-a",
        "user_id": "ann",
        "started_at": None,
        "last_started_at": None,
        "finished_at": None,
    }


@pytest.mark.parametrize(
    "task_id", ["00000000-0000-4000-8000-000000000000", "x", "%00", "..%2F..", "a'--", "%F0%9F%90%98"]
)
def test_a_foreign_task_answers_exactly_as_an_unknown_one(client: TestClient, task_id: str) -> None:
    foreign_id = client.post("/work", headers=as_user("ann")).json()

    foreign = client.get(f"/tasks/{foreign_id}", headers=as_user("bob"))
    unknown = client.get(f"/tasks/{task_id}", headers=as_user("bob"))

    def answer(response: Any) -> tuple[int, bytes, dict[str, str]]:
        return response.status_code, response.content, dict(response.headers)

    assert foreign.status_code == 404
    if "%2F" not in task_id:  # a path with a slash is no task's, and answered by the router before us
        assert answer(foreign) == answer(unknown)


def test_results_and_errors_are_shown(client: TestClient, celery_app: Celery) -> None:
    with tenant_scope(TenantContext("tenant-a", "ann")):
        celery_app.backend.store_result("done", {"answer": 42}, "SUCCESS")
        celery_app.backend.store_result("failed", ValueError("no good", 1), "FAILURE")

    done = client.get("/tasks/done", headers=as_user("ann")).json()
    failed = client.get("/tasks/failed", headers=as_user("ann")).json()

    assert (done["state"], done["result"], done["error"]) == ("success", {"answer": 42}, None)
    assert (failed["state"], failed["result"]) == ("failure", None)
    assert failed["error"] == {"type": "ValueError", "message": "no good 1", "reason": None}
    assert failed["organization_id"] == "tenant-a"


def test_the_openapi_document_describes_the_status(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    operation = document["paths"]["/tasks/{task_id}"]["get"]
    assert "404" in operation["responses"]
    assert "TaskStatus" in json.dumps(operation["responses"]["200"])
    assert [parameter["name"] for parameter in operation["parameters"]] == ["task_id", "authorization"]
