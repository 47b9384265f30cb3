"""The stream of a task's events: over HTTP, from a server with several clients."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
import uvicorn
from broker_rig import running_server
from celery import Celery
from fastapi import FastAPI
from router_rig import ANN, BOB, api_of, change, client_of, fail, launch, move, succeed, with_work

from rhesis_tasks import TenantContext, fastapi, streaming, tenant_scope
from rhesis_tasks.headers import Progress
from rhesis_tasks.postgres.engines import shared_engine
from rhesis_tasks.processes import free_port, wait_until
from rhesis_tasks.states import State
from rhesis_tasks.status import get_task
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

if TYPE_CHECKING:
    from conftest import MakeApp

Follow = Callable[..., AbstractContextManager["Stream"]]


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[TenantDatabase]:
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture
def tenant_database(database: TenantDatabase) -> TenantDatabase:
    """The library's fixture, made once and emptied for each test."""
    database.execute("TRUNCATE rhesis_tasks.task_record")
    return database


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    return with_work(make_app())


class Stream:
    """One client's stream, read in a thread."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ids: list[str] = []
        self.has_ended = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        name = ""
        for line in self.response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                self.ids.append(value)
            elif field == "data":
                self.events.append((name, json.loads(value)))
        self.has_ended = True

    def next(self, number: int) -> dict[str, Any]:
        """The event of this number, once it is there."""
        wait_until(f"event {number} of {self.events}", lambda: len(self.events) > number, 10)
        return self.events[number][1]

    def to_its_end(self) -> list[tuple[str, dict[str, Any]]]:
        self._thread.join(30)
        assert self.has_ended, self.events
        return self.events


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The URL of a server of its own."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until("the server", lambda: server.started, 10)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def streams_of(url: str) -> Iterator[Follow]:
    """Follows a task as a tenant."""

    @contextmanager
    def follow(tenant: TenantContext, task_id: str) -> Iterator[Stream]:
        headers = {"Authorization": f"Bearer {tenant.user_id}"}
        # A client for each, since one that many threads share may close the connection of another.
        with (
            httpx.Client(base_url=url, timeout=30) as client,
            client.stream("GET", f"/tasks/{task_id}/events", headers=headers) as response,
        ):
            assert response.status_code == 200, response.read()
            yield Stream(response)

    yield follow


@pytest.fixture
def follow(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Follow]:
    monkeypatch.setattr(streaming, "LOOK_EVERY", 0.02)
    with served(api_of(app, redact=lambda text: text.replace("secret", "***"))) as url, streams_of(url) as follow:
        yield follow


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a record was looked at."""
    times: list[float] = []

    def look(app: Celery, task_id: str) -> Any:
        times.append(time.monotonic())
        return get_task(app, task_id)

    monkeypatch.setattr(fastapi, "get_task", look)
    return times


def report(app: Celery, tenant: TenantContext, task_id: str, done: int) -> None:
    with tenant_scope(tenant):
        app.backend.store_progress(task_id, Progress(done, 3, f"{tenant.user_id} at {done}"))


# --- what is said --------------------------------------------------------------------------------------------------


def test_each_change_of_state_or_progress_is_an_event_until_the_task_has_ended(app: Celery, follow: Follow) -> None:
    launch(app, ANN, "task")
    with follow(ANN, "task") as stream:
        assert stream.next(0)["state"] == "queued"
        change(app, ANN, "task", State.STARTED)
        assert stream.next(1)["state"] == "started"
        for number in (1, 2):
            report(app, ANN, "task", number)
            assert stream.next(1 + number)["progress"] == {"done": number, "total": 3, "message": f"ann at {number}"}
        change(app, ANN, "task", State.RETRY, retries=1)
        assert stream.next(4)["state"] == "retry"
        succeed(app, ANN, "task", {"count": 3})
        events = stream.to_its_end()

    assert [name for name, _ in events] == ["status"] * 5 + ["end"]
    assert (events[-1][1]["state"], events[-1][1]["result"]) == ("success", {"count": 3})


def test_a_stream_goes_on_through_an_outage_of_the_database(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOK_EVERY", 0.02)
    failed: list[Exception] = []

    def look(app: Celery, task_id: str) -> Any:
        try:
            return get_task(app, task_id)
        except Exception as error:
            failed.append(error)
            raise

    monkeypatch.setattr(fastapi, "get_task", look)
    with running_server() as server, new_tenant_database(server.url) as database:
        app = with_work(make_app(database.url, broker_url=database.url))
        move(app, ANN, "task", State.STARTED)
        with served(api_of(app)) as url, streams_of(url) as follow, follow(ANN, "task") as stream:
            assert stream.next(0)["state"] == "started"
            server.stop()
            wait_until("looks to fail", lambda: len(failed) > 2, 30)
            server.start()
            succeed(app, ANN, "task", 3)
            events = stream.to_its_end()

    assert [(name, said["state"]) for name, said in events] == [("status", "started"), ("end", "success")]


def test_an_event_says_what_the_status_route_says(app: Celery, follow: Follow) -> None:
    succeed(app, ANN, "task", ["\ud800", b"\xff", float("nan"), "two\nlines\r\n\n"])

    with follow(ANN, "task") as stream:
        [(name, said)] = stream.to_its_end()

    assert (name, said) == ("end", client_of(app, ANN).get("/tasks/task").json())


@pytest.mark.parametrize("state", State)
def test_a_stream_ends_at_once_if_the_task_has_ended(app: Celery, follow: Follow, state: State) -> None:
    move(app, ANN, "task", state)

    with follow(ANN, "task") as stream:
        stream.next(0)
        if state in ("queued", "delayed", "started", "retry"):
            time.sleep(0.2)
            assert not stream.has_ended
            fail(app, ANN, "task", "it is over")
        assert stream.to_its_end()[-1][0] == "end"


def test_errors_are_redacted_in_every_event(app: Celery, follow: Follow) -> None:
    move(app, ANN, "task", State.RETRY, error_type="E", error_message="the secret of an attempt")
    with follow(ANN, "task") as stream:
        assert stream.next(0)["error"] == {"type": "E", "message": "the *** of an attempt", "reason": None}
        fail(app, ANN, "task", "the secret at last")
        assert stream.to_its_end()[-1][1]["error"]["message"] == "the *** at last"


def test_no_proxy_and_no_cache_keeps_what_it_says(app: Celery, follow: Follow) -> None:
    move(app, ANN, "task", State.SUCCESS)

    with follow(ANN, "task") as stream:
        headers = stream.response.headers

    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")


def test_an_event_source_that_has_seen_the_end_is_told_not_to_come_back(app: Celery, follow: Follow) -> None:
    for tenant, task_id in ((ANN, "ended"), (BOB, "bobs")):
        move(app, tenant, task_id, State.SUCCESS)
    with follow(ANN, "ended") as stream:
        assert [stream.next(0)["state"], stream.ids] == ["success", ["end"]]

    answers = {
        task_id: client_of(app, ANN).get(f"/tasks/{task_id}/events", headers={"Last-Event-ID": "end"})
        for task_id in ("ended", "bobs", "unknown")
    }

    assert (answers["ended"].status_code, answers["ended"].content) == (204, b"")
    assert [(answers[each].status_code, answers[each].content) for each in ("bobs", "unknown")] == [
        (404, b'{"detail":"no such task"}')
    ] * 2


# --- who sees it ---------------------------------------------------------------------------------------------------


def test_tenants_that_follow_tasks_of_the_same_id_at_once_see_their_own(app: Celery, follow: Follow) -> None:
    for tenant in (ANN, BOB):
        move(app, tenant, "task", State.STARTED)
    with ExitStack() as stack:
        streams = [(tenant, stack.enter_context(follow(tenant, "task"))) for tenant in (ANN, BOB) * 5]
        for number in (1, 2, 3):
            for tenant in (ANN, BOB):
                report(app, tenant, "task", number)
            for _, stream in streams:
                stream.next(number)
        for tenant in (ANN, BOB):
            succeed(app, tenant, "task", tenant.user_id)
        seen = [(tenant, stream.to_its_end()) for tenant, stream in streams]

    for tenant, events in seen:
        told = [f"{tenant.user_id} at {number}" for number in (1, 2, 3)]
        assert {each["organization_id"] for _, each in events} == {tenant.organization_id}
        assert [each["progress"]["message"] for _, each in events[1:4]] == told
        assert events[-1][1]["result"] == tenant.user_id


def test_another_ones_change_is_no_event(app: Celery, follow: Follow) -> None:
    for tenant in (ANN, BOB):
        move(app, tenant, "task", State.STARTED)
    with follow(ANN, "task") as stream:
        stream.next(0)
        report(app, BOB, "task", 1)
        succeed(app, BOB, "task", "bobs")
        time.sleep(0.2)
        assert len(stream.events) == 1
        succeed(app, ANN, "task", "anns")
        assert [each["result"] for _, each in stream.to_its_end()] == [None, "anns"]


def test_the_stream_of_a_record_that_is_deleted_ends(app: Celery, follow: Follow) -> None:
    move(app, ANN, "task", State.STARTED)
    with follow(ANN, "task") as stream:
        stream.next(0)
        with tenant_scope(ANN):
            app.backend.forget("task")
        assert [name for name, _ in stream.to_its_end()] == ["status"]

    assert client_of(app, ANN).get("/tasks/task/events").status_code == 404


# --- what it costs -------------------------------------------------------------------------------------------------


def test_nobody_looks_any_more_when_the_client_has_gone(
    app: Celery, looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LOOK_EVERY", 0.02)
    move(app, ANN, "task", State.STARTED)
    with served(api_of(app)) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET /tasks/task/events HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer ann\r\n\r\n")
            wait_until("some looks", lambda: len(looks) > 3, 10)

        def is_quiet() -> bool:
            before = len(looks)
            time.sleep(0.3)
            return len(looks) == before

        wait_until("nobody to look", is_quiet, 10)


def test_more_streams_than_there_are_connections_hold_none_between_two_looks(app: Celery, follow: Follow) -> None:
    """Or some would see nothing until others have ended."""
    move(app, ANN, "task", State.STARTED)
    pool: Any = shared_engine(app.backend.url).pool
    assert 0 < pool.checkedin() < pool.size() + pool._max_overflow < 40
    with ExitStack() as stack, ThreadPoolExecutor(40) as threads:
        opened = list(threads.map(lambda _: stack.enter_context(follow(ANN, "task")), range(40)))
        for stream in opened:
            stream.next(0)
        succeed(app, ANN, "task", 1)
        assert [stream.to_its_end()[-1][0] for stream in opened] == ["end"] * 40


def test_a_task_is_looked_at_once_a_second(app: Celery, looks: list[float]) -> None:
    move(app, ANN, "task", State.STARTED)
    with served(api_of(app)) as url, streams_of(url) as follow, follow(ANN, "task") as stream:
        for number in range(25):
            report(app, ANN, "task", number)
            time.sleep(0.1)
        succeed(app, ANN, "task", 1)
        events = stream.to_its_end()

    assert min(later - earlier for earlier, later in pairwise(looks)) >= 1
    assert 3 <= len(events) <= len(looks)
