"""The routes of ``task_router``: what a tenant sees of its tasks and does to them, and nobody else."""

from __future__ import annotations

import base64
import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from broker_rig import PostgresServer, running_server
from celery import Celery
from fastapi.testclient import TestClient
from record_statements import noted_statements
from router_rig import AMY, ANN, BOB, api_of, client_of, fail, launch, move, rows, succeed, with_work
from sqlalchemy import Engine, event

from rhesis_tasks import launch_with_context, status, tenant_scope
from rhesis_tasks.headers import Progress
from rhesis_tasks.processes import free_port, wait_until
from rhesis_tasks.states import TERMINAL, WAITING, State
from rhesis_tasks.status import STOP, get_task, list_tasks, task_tree
from rhesis_tasks.testing import StartWorker, TenantDatabase, new_tenant_database

if TYPE_CHECKING:
    from conftest import MakeApp

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[TenantDatabase]:
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture
def tenant_database(database: TenantDatabase) -> TenantDatabase:
    """The library's fixture, made once and emptied for each test."""
    database.execute("TRUNCATE rhesis_tasks.task_record, rhesis_tasks.group_record, rhesis_tasks.message CASCADE")
    return database


@pytest.fixture
def app(make_app: MakeApp, tenant_database: TenantDatabase) -> Celery:
    """An application with one task, on PostgreSQL alone."""
    return with_work(make_app(broker_url=tenant_database.url))


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def ann(app: Celery) -> TestClient:
    return client_of(app, ANN)


@pytest.fixture
def bob(app: Celery) -> TestClient:
    return client_of(app, BOB)


def ids(client: TestClient, **parameters: Any) -> list[str]:
    """The tasks of a page, in its order."""
    response = client.get("/tasks/", params=parameters)
    assert response.status_code == 200, response.text
    return [item["task_id"] for item in response.json()["items"]]


def pages(client: TestClient, between: Callable[[], object] = lambda: None, **parameters: Any) -> list[list[str]]:
    """The tasks of all pages, with something that happens between two of them."""
    found = []
    cursor: dict[str, str] = {}
    while True:
        page = client.get("/tasks/", params={**parameters, **cursor}).json()
        found.append([item["task_id"] for item in page["items"]])
        if page["next"] is None:
            return found
        cursor = {"cursor": page["next"]}
        between()


def cursor_of(place: str) -> str:
    return base64.urlsafe_b64encode(place.encode()).decode()


@contextmanager
def counted_statements() -> Iterator[list[str]]:
    """What goes to any database in the block."""
    with noted_statements() as statements:
        event.listen(Engine, "before_cursor_execute", count := lambda *given: statements.append(given[2]))
        try:
            yield statements
        finally:
            event.remove(Engine, "before_cursor_execute", count)


# --- one task ------------------------------------------------------------------------------------------------------


TIMES = ("launched_at", "started_at", "last_started_at", "abort_requested_at")


def test_a_running_task_shows_where_it_is(app: Celery, ann: TestClient) -> None:
    launch(app, ANN, "parent")
    launch(app, ANN, "running", root_id="parent", parent_id="parent")
    move(app, ANN, "running", State.STARTED, retries=1, root_id="parent", queue="celery", worker="w")
    with tenant_scope(AMY):
        app.backend.store_progress("running", Progress(3, 10, "three of ten"))
        app.backend.request_abort("running")

    shown = ann.get("/tasks/running").json()

    times = {name: shown.pop(name) for name in TIMES}
    assert [datetime.datetime.fromisoformat(each).utcoffset() for each in times.values()] == [datetime.timedelta()] * 4
    assert times["launched_at"] < times["started_at"] <= times["last_started_at"] < times["abort_requested_at"]
    assert shown == {
        "task_id": "running",
        "name": "work",
        "state": "started",
        "result": None,
        "error": None,
        "progress": {"done": 3, "total": 10, "message": "three of ten"},
        "retries": 1,
        "organization_id": "acme",
        "user_id": "ann",
        "root_id": "parent",
        "parent_id": "parent",
        "abort_requested_by": "amy",
        "eta": None,
        "finished_at": None,
    }


def test_a_delayed_task_shows_its_time(app: Celery, ann: TestClient) -> None:
    launch(app, ANN, "later", eta=datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC))

    shown = ann.get("/tasks/later").json()

    assert (shown["state"], shown["eta"]) == ("delayed", "2030-01-02T03:04:05Z")


@pytest.mark.parametrize("state", State)
def test_every_state_is_shown_as_it_is_called(app: Celery, ann: TestClient, state: State) -> None:
    move(app, ANN, "task", state)

    shown = ann.get("/tasks/task").json()

    assert shown["state"] == state
    assert (shown["finished_at"] is not None) == (state in TERMINAL)


def test_colleagues_see_each_others_tasks(app: Celery, ann: TestClient) -> None:
    launch(app, ANN, "anns")

    assert ann.get("/tasks/anns").json() == client_of(app, AMY).get("/tasks/anns").json()


def test_a_traceback_and_the_workers_name_are_not_shown(app: Celery, ann: TestClient) -> None:
    move(app, ANN, "broken", State.FAILURE, error_type="E", error_message="m", traceback="in line 7", worker="w@h")

    text = ann.get("/tasks/broken").text

    assert "line 7" not in text
    assert "w@h" not in text


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        ("\ud800", "\\ud800"),
        ({"a\udfff": [1, "\ud83d"]}, {"a\\udfff": [1, "\\ud83d"]}),
        ("nul \0", "nul \0"),
        (b"\xff", "_w=="),
        (float("nan"), None),
        ([float("inf"), -1.5], [None, -1.5]),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "2026-01-02T00:00:00Z"),
        (10**400, 10**400),
    ],
    ids=["surrogate", "in a dict", "NUL", "bytes", "nan", "inf", "datetime", "huge"],
)
def test_a_result_that_json_cannot_say_is_shown_as_near_as_it_can(
    app: Celery, ann: TestClient, result: Any, shown: Any
) -> None:
    succeed(app, ANN, "odd", result)
    launch(app, ANN, "other")

    assert ann.get("/tasks/odd").json()["result"] == shown
    assert ids(ann) == ["other", "odd"]
    assert ann.get("/tasks/odd/tree").json()["task"]["result"] == shown


def test_a_result_of_many_levels_is_shown_as_far_as_it_can_be_written(app: Celery, ann: TestClient) -> None:
    nested: list[Any] = []
    for _ in range(400):
        nested = [nested]
    succeed(app, ANN, "nested", nested)

    response = ann.get("/tasks/nested")

    assert response.status_code == 200
    assert response.text.count('"..."') == 1


# --- lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [*([state] for state in State), [State.QUEUED, State.DEAD], list(State)], ids=lambda wanted: wanted[-1]
)
def test_a_list_is_filtered_by_any_of_several_states(app: Celery, ann: TestClient, wanted: list[State]) -> None:
    for state in State:
        move(app, ANN, f"is-{state}", state)

    assert set(ids(ann, state=wanted)) == {f"is-{state}" for state in wanted}


def test_a_list_is_filtered_by_name_and_run(app: Celery, ann: TestClient) -> None:
    launch(app, ANN, "root")
    launch(app, ANN, "part", root_id="root", parent_id="root", name="other")
    launch(app, ANN, "alone", name="other")

    assert ids(ann, root_id="root") == ["part", "root"]
    assert ids(ann, name="other") == ["alone", "part"]
    assert ids(ann, name="other", root_id="root") == ["part"]
    assert ids(ann, name="other", root_id="root", state="success") == []
    assert ids(ann, name="oth") == ids(ann, name="other%") == ids(ann, name="OTHER") == []


@pytest.mark.parametrize("hours", [0, 5.5, -11, 14])
def test_a_list_is_filtered_by_the_time_of_launch_in_any_time_zone(app: Celery, ann: TestClient, hours: float) -> None:
    for task_id in ("first", "second", "third"):
        launch(app, ANN, task_id)
    with tenant_scope(ANN):
        second = get_task(app, "second").launched_at  # type: ignore[union-attr]
    there = second.astimezone(datetime.timezone(datetime.timedelta(hours=hours))).isoformat()

    assert ids(ann, launched_from=there) == ["third", "second"]
    assert ids(ann, launched_before=there) == ["first"]
    assert ids(ann, launched_from=there, launched_before=there) == []


@pytest.mark.parametrize(
    "moment",
    [
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
        "2026-01-01T00:00:00+23:59",
        "2026-01-01T00:00:00-23:59",
    ],
)
def test_times_at_the_end_of_the_calendar_are_times(app: Celery, ann: TestClient, moment: str) -> None:
    launch(app, ANN, "now")

    found = ids(ann, launched_from=moment), ids(ann, launched_before=moment)

    assert sorted(found) == [[], ["now"]]
    assert ann.get("/tasks/", params={"cursor": cursor_of(f"{moment} id")}).status_code == 200


@pytest.mark.parametrize(
    "parameters",
    [
        {"state": "unknown"},
        {"state": "QUEUED"},
        {"state": ""},
        {"state": ["queued", "x"]},
        {"launched_from": "2026-01-01T00:00:00"},
        {"launched_before": "yesterday"},
        {"launched_from": "10000-01-01T00:00:00Z"},
        {"limit": 0},
        {"limit": -1},
        {"limit": 201},
        {"limit": "many"},
        {"limit": 10**30},
        {"name": "x" * 256},
        {"root_id": "x" * 256},
    ],
    ids=str,
)
def test_parameters_that_make_no_sense_are_refused(ann: TestClient, parameters: dict[str, Any]) -> None:
    assert ann.get("/tasks/", params=parameters).status_code == 422


def test_a_page_has_as_many_as_are_wanted_and_fifty_otherwise(app: Celery, ann: TestClient) -> None:
    for number in range(205):
        launch(app, ANN, f"task-{number}")

    assert list(map(len, pages(ann))) == [50, 50, 50, 50, 5]
    assert list(map(len, pages(ann, limit=200))) == [200, 5]
    assert list(map(len, pages(ann, limit=41))) == [41] * 5  # no empty page behind the last one


@pytest.mark.parametrize("limit", [1, 4, 23])
def test_all_pages_have_all_tasks_once(
    app: Celery, ann: TestClient, tenant_database: TenantDatabase, limit: int
) -> None:
    expected = [launch(app, ANN, f"task-{number:02}") for number in range(23)]
    launch(app, BOB, "bobs")
    tenant_database.execute("UPDATE rhesis_tasks.task_record SET launched_at = '2026-01-01' WHERE task_id < 'task-11'")

    found = [task_id for page in pages(ann, limit=limit) for task_id in page]

    assert found == sorted(expected, reverse=True)  # those of one and the same time by their ids


def test_pages_stay_what_they_are_while_others_are_launched_and_end(app: Celery, ann: TestClient) -> None:
    expected = [launch(app, ANN, f"task-{number}") for number in range(9)]
    later = iter(range(9))

    def meanwhile() -> None:
        number = next(later)
        launch(app, ANN, f"later-{number}")
        move(app, ANN, f"task-{number}", State.SUCCESS)

    found = pages(ann, meanwhile, limit=2)

    assert [task_id for page in found for task_id in page] == expected[::-1]


def test_filters_hold_on_every_page(app: Celery, ann: TestClient) -> None:
    for number in range(10):
        launch(app, ANN, f"task-{number}", name="even" if number % 2 == 0 else "odd")

    assert pages(ann, limit=2, name="odd") == [["task-9", "task-7"], ["task-5", "task-3"], ["task-1"]]


@pytest.mark.parametrize("letter", ["x", "é", "🐘"])
def test_a_cursor_of_the_longest_ids_leads_on(app: Celery, ann: TestClient, letter: str) -> None:
    expected = [launch(app, ANN, str(number) + letter * 254) for number in range(3)]

    assert pages(ann, limit=1) == [[task_id] for task_id in reversed(expected)]


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "\0",
        "€",
        "null",
        "MTIz",
        "_w==",  # no UTF-8
        cursor_of(""),
        cursor_of("2026-01-01T00:00:00+00:00"),
        cursor_of("2026-01-01T00:00:00+00:00 "),
        cursor_of("2026-01-01T00:00:00 naive"),
        cursor_of("2026-02-30T00:00:00+00:00 id"),
        cursor_of("2026-01-01T00:00:00+00:00 nul\0"),
        cursor_of("now id"),
        cursor_of("infinity id"),
        cursor_of("'; DROP TABLE task_record -- id"),
        "A" * 10_000,
    ],
)
def test_what_is_no_cursor_is_refused(app: Celery, ann: TestClient, cursor: str) -> None:
    launch(app, ANN, "task")

    response = ann.get("/tasks/", params={"cursor": cursor})

    assert (response.status_code, response.json()) == (400, {"detail": "no cursor of this list"})


def test_a_forged_cursor_leads_to_ones_own_tasks_only(app: Celery, ann: TestClient, bob: TestClient) -> None:
    launch(app, ANN, "anns-first")
    for number in range(2):
        launch(app, BOB, f"bobs-{number}")
    launch(app, ANN, "anns-last")
    bobs = bob.get("/tasks/", params={"limit": 1}).json()["next"]

    assert ids(ann, cursor=bobs) == ["anns-first"]
    assert ids(ann, cursor=cursor_of("9999-01-01T00:00:00+00:00 '; SELECT 1 --")) == ["anns-last", "anns-first"]
    assert ids(ann, cursor=cursor_of("1970-01-01T00:00:00+00:00 x")) == []


def test_a_cursor_says_nothing_but_its_place(app: Celery, ann: TestClient) -> None:
    for number in range(2):
        move(app, ANN, f"task-{number}", State.FAILURE, error_type="E", error_message="secret")

    page = ann.get("/tasks/", params={"limit": 1}).json()
    place = base64.urlsafe_b64decode(page["next"] + "==").decode()

    launched_at, task_id = place.split(" ")
    assert task_id == "task-1"
    assert datetime.datetime.fromisoformat(launched_at) == datetime.datetime.fromisoformat(
        page["items"][0]["launched_at"]
    )


@pytest.mark.parametrize("text", ["\0", "\ud800"], ids=["NUL", "surrogate"])
def test_texts_that_postgresql_cannot_store_are_no_tasks(app: Celery, text: str) -> None:
    launch(app, ANN, "task")

    with tenant_scope(ANN):
        assert list_tasks(app, name=text) == list_tasks(app, root_id=text) == []
        assert list_tasks(app, after=(datetime.datetime.now(datetime.UTC), text)) == []
        assert get_task(app, text) is None
        assert task_tree(app, text) is None
        assert status.cancel_task(app, text) is None


# --- errors, redacted ----------------------------------------------------------------------------------------------


def errors_of(client: TestClient, task_id: str) -> list[Any]:
    """A failed task's error, wherever it is shown."""
    return [
        client.get(f"/tasks/{task_id}").json()["error"],
        client.get("/tasks/").json()["items"][0]["error"],
        client.get(f"/tasks/{task_id}/tree").json()["task"]["error"],
    ]


def test_errors_are_redacted_wherever_they_are_shown(app: Celery) -> None:
    fail(app, ANN, "broken", "the password is hunter2")
    client = client_of(app, ANN, redact=lambda text: text.replace("hunter2", "***").replace("ValueError", "?"))

    assert errors_of(client, "broken") == [{"type": "ValueError", "message": "the password is ***", "reason": None}] * 3


def test_the_error_of_an_attempt_is_redacted_too(app: Celery) -> None:
    move(app, ANN, "again", State.RETRY, error_type="OSError", error_message="hunter2")
    client = client_of(app, ANN, redact=lambda _: "-")

    assert errors_of(client, "again") == [{"type": "OSError", "message": "-", "reason": None}] * 3


def broken_hook(text: str) -> str:
    raise RuntimeError(text)


@pytest.mark.parametrize(
    "redact", [broken_hook, lambda _: None, lambda text: text.encode()], ids=["raises", "none", "bytes"]
)
def test_a_redaction_that_fails_shows_nothing(
    app: Celery, redact: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    fail(app, ANN, "broken", "the password is hunter2")

    assert (
        errors_of(client_of(app, ANN, redact=redact), "broken")
        == [{"type": "ValueError", "message": "", "reason": None}] * 3
    )
    assert "redact= failed" in caplog.text


def test_a_redaction_may_return_what_utf8_cannot_say(app: Celery) -> None:
    fail(app, ANN, "broken", "cut here")

    assert errors_of(client_of(app, ANN, redact=lambda _: "\ud83d"), "broken")[0]["message"] == "\\ud83d"


def test_a_redaction_sees_nothing_of_tasks_without_errors(app: Celery) -> None:
    succeed(app, ANN, "done", "hunter2")

    assert client_of(app, ANN, redact=broken_hook).get("/tasks/done").json()["result"] == "hunter2"


# --- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_cancelling_does_what_it_says(app: Celery, ann: TestClient, state: State) -> None:
    move(app, ANN, "task", state)
    before = ann.get("/tasks/task").json()

    response = ann.post("/tasks/task/cancel")

    after = ann.get("/tasks/task").json()
    assert response.status_code == 200
    if state in WAITING:
        assert response.json() == {"outcome": "cancelled"}
        assert (after["state"], after["abort_requested_by"]) == ("revoked", "ann")
        assert after["finished_at"] is not None
    elif state is State.STARTED:
        assert response.json() == {"outcome": "asked"}
        assert (after["state"], after["abort_requested_by"]) == ("started", "ann")
    else:
        assert response.json() == {"outcome": "ended"}
        assert after == before


def test_a_cancelled_tasks_message_is_gone(app: Celery, ann: TestClient, tenant_database: TenantDatabase) -> None:
    task = app.tasks["work"]
    cancelled, other = (launch_with_context(task, number, context=ANN).id for number in range(2))

    assert ann.post(f"/tasks/{cancelled}/cancel").json() == {"outcome": "cancelled"}

    with tenant_database.owner.connect() as connection:
        left = connection.exec_driver_sql("SELECT task_id FROM rhesis_tasks.message").scalars().all()
    assert left == [other]


def test_the_first_who_cancels_is_remembered(app: Celery, ann: TestClient) -> None:
    move(app, ANN, "task", State.STARTED)
    amy = client_of(app, AMY)

    outcomes = [client.post("/tasks/task/cancel").json()["outcome"] for client in (amy, ann)]

    assert outcomes == ["asked", "asked"]
    assert ann.get("/tasks/task").json()["abort_requested_by"] == "amy"


@pytest.fixture
def told(app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What workers are told to do."""
    told: list[Any] = []
    monkeypatch.setattr(app.control, "broadcast", lambda command, arguments, **_: told.append((command, arguments)))
    return told


@pytest.mark.parametrize("task_id", ["running", "foreign", UNKNOWN])
def test_terminating_is_forbidden_unless_it_is_allowed(
    app: Celery, ann: TestClient, told: list[Any], tenant_database: TenantDatabase, task_id: str
) -> None:
    move(app, ANN, "running", State.STARTED)
    move(app, BOB, "foreign", State.STARTED)
    before = rows(tenant_database)

    response = ann.post(f"/tasks/{task_id}/cancel", params={"terminate": True})

    assert (response.status_code, response.json()) == (403, {"detail": "tasks cannot be terminated here"})
    assert rows(tenant_database) == before
    assert told == []


def test_terminating_tells_the_worker_of_ones_own_running_task(app: Celery, told: list[Any]) -> None:
    client = client_of(app, ANN, allow_terminate=True)
    for state in State:
        move(app, ANN, f"is-{state}", state)
    move(app, BOB, "foreign", State.STARTED)

    outcomes = {
        task_id: client.post(f"/tasks/{task_id}/cancel", params={"terminate": True}).json().get("outcome")
        for task_id in [*(f"is-{state}" for state in State), "foreign", UNKNOWN]
    }

    assert told == [(STOP, {"tasks": [[ANN.organization_id, "is-started"]], "terminate": True})]
    assert outcomes == {
        **{f"is-{state}": "cancelled" for state in WAITING},
        "is-started": "terminated",
        **{f"is-{state}": "ended" for state in TERMINAL},
        "foreign": None,
        UNKNOWN: None,
    }


def test_where_terminating_is_allowed_it_still_has_to_be_asked_for(app: Celery, told: list[Any]) -> None:
    move(app, ANN, "running", State.STARTED)

    client_of(app, ANN, allow_terminate=True).post("/tasks/running/cancel")

    assert told == []


def test_on_a_real_worker_a_task_shows_its_progress_stops_when_asked_and_ends_when_terminated(
    app: Celery, tenant_database: TenantDatabase, start_worker: StartWorker
) -> None:
    start_worker("cli_tasks", cwd=Path(__file__).parent, env={"DATABASE_URL": tenant_database.url})
    client = client_of(app, ANN, allow_terminate=True)
    with tenant_scope(ANN):
        counting = app.send_task("cli_tasks.counts", (1000,)).id
        waiting = app.send_task("cli_tasks.runs_until_asked").id

    def shown(task_id: str) -> dict[str, Any]:
        return dict(client.get(f"/tasks/{task_id}").json())

    wait_until("the first progress", lambda: shown(counting)["progress"], 20)
    wait_until("the other one's start", lambda: shown(waiting)["state"] == "started", 20)
    outcomes = [
        client.post(path).json()["outcome"]
        for path in (f"/tasks/{waiting}/cancel", f"/tasks/{counting}/cancel?terminate=true")
    ]
    wait_until("both ends", lambda: {shown(each)["state"] for each in (counting, waiting)} <= TERMINAL, 20)

    assert outcomes == ["asked", "terminated"]
    assert (shown(waiting)["state"], shown(waiting)["abort_requested_by"]) == ("success", "ann")
    assert (shown(counting)["state"], shown(counting)["progress"]["total"]) == ("revoked", 1000)


# --- trees ---------------------------------------------------------------------------------------------------------


def shape(tree: dict[str, Any]) -> dict[str, Any]:
    """Who hangs on whom."""
    below: dict[str, Any] = {}
    for child in tree["children"]:
        below |= shape(child)
    return {tree["task"]["task_id"]: below}


def shape_of(client: TestClient, task_id: str) -> dict[str, Any]:
    response = client.get(f"/tasks/{task_id}/tree")
    assert response.status_code == 200, response.text
    return shape(response.json())


@pytest.fixture
def run(app: Celery) -> dict[str, Any]:
    """A run of two levels, one part of which is another tenant's."""
    launch(app, ANN, "root")
    for task_id, parent in [("left", "root"), ("right", "root"), ("leaf", "left"), ("lost", "expired")]:
        launch(app, ANN, task_id, root_id="root", parent_id=parent)
    launch(app, BOB, "bobs", root_id="root", parent_id="root")
    launch(app, ANN, "of another run")
    return {"root": {"left": {"leaf": {}}, "right": {}, "lost": {}}}


@pytest.mark.parametrize("task_id", ["root", "left", "leaf", "lost"])
def test_a_tree_is_that_of_the_whole_run_whichever_task_is_asked_for(
    ann: TestClient, run: dict[str, Any], task_id: str
) -> None:
    assert shape_of(ann, task_id) == run


def test_a_tree_has_the_tasks_of_its_tenant_only(bob: TestClient, run: dict[str, Any]) -> None:
    assert shape_of(bob, "bobs") == {"bobs": {}}
    assert bob.get("/tasks/root/tree").status_code == 404


def test_the_tasks_of_a_tree_are_shown_as_by_themselves(ann: TestClient, run: dict[str, Any]) -> None:
    tree = ann.get("/tasks/root/tree").json()

    assert tree["task"] == ann.get("/tasks/root").json()
    assert tree["children"][0]["children"][0]["task"] == ann.get("/tasks/leaf").json()


@pytest.mark.parametrize("length", [100, 101, 102, 300, 1200])
def test_a_run_of_any_depth_has_a_tree(app: Celery, ann: TestClient, length: int) -> None:
    for number in range(length):
        launch(app, ANN, f"t{number}", root_id="t0", parent_id=f"t{number - 1}" if number else None)
    succeed(app, ANN, f"t{length - 1}", [[[["deep", "too"]]]])

    tree = ann.get("/tasks/t0/tree").json()

    levels = [[tree]]
    while below := [child for node in levels[-1] for child in node["children"]]:
        levels.append(below)
    found = [node["task"]["task_id"] for level in levels for node in level]
    assert found == [f"t{number}" for number in range(length)]
    assert len(levels) == min(length, status.MAX_DEPTH + 1)
    assert levels[-1][-1]["task"]["result"] == [[[["deep", "too"]]]]


def test_a_deep_tree_can_end_in_a_deep_result(app: Celery, ann: TestClient) -> None:
    result: list[Any] = []
    for number in range(120):
        launch(app, ANN, f"t{number}", root_id="t0", parent_id=f"t{number - 1}" if number else None)
        result = [result]
    succeed(app, ANN, "t119", result)

    assert ann.get("/tasks/t0/tree").status_code == 200


def test_tasks_that_have_launched_each_other_are_in_their_tree(app: Celery, ann: TestClient) -> None:
    launch(app, ANN, "root")
    for task_id, parent in [("a", "root"), ("b", "a"), ("c", "b"), ("a", "c"), ("d", "a")]:
        launch(app, ANN, task_id, root_id="root", parent_id=parent)

    assert shape_of(ann, "c") == {"root": {"a": {"b": {"c": {}}, "d": {}}}}


def test_a_root_that_was_launched_by_its_own_run_is_the_root(app: Celery, ann: TestClient) -> None:
    launch(app, ANN, "root")
    launch(app, ANN, "child", root_id="root", parent_id="root")
    launch(app, ANN, "root", root_id="root", parent_id="child")

    assert shape_of(ann, "child") == {"root": {"child": {}}}


def test_a_run_whose_root_is_gone_begins_with_its_first_task(app: Celery, ann: TestClient) -> None:
    for task_id, parent in [("first", "gone"), ("second", "gone"), ("third", "first")]:
        launch(app, ANN, task_id, root_id="gone", parent_id=parent)

    assert shape_of(ann, "third") == {"first": {"second": {}, "third": {}}}


def test_of_a_huge_run_the_latest_tasks_the_root_and_the_one_that_is_asked_for_are_shown(
    app: Celery, ann: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(app, ANN, "root")
    for number in range(6):
        launch(app, ANN, f"t{number}", root_id="root", parent_id="root")
    monkeypatch.setattr(status, "MAX_TREE", 3)

    assert shape_of(ann, "t0") == {"root": {"t0": {}, "t3": {}, "t4": {}, "t5": {}}}


# --- other tenants -------------------------------------------------------------------------------------------------

OF_ONE_TASK = [
    ("GET", "/tasks/{}"),
    ("GET", "/tasks/{}/events"),
    ("GET", "/tasks/{}/tree"),
    ("POST", "/tasks/{}/cancel"),
    ("POST", "/tasks/{}/cancel?terminate=true"),
]
ATTEMPTS = [
    *OF_ONE_TASK,
    ("GET", "/tasks/?root_id={}"),
    ("GET", "/tasks/?root_id={}&state=started&limit=1"),
    ("GET", "/tasks/?name=secret.{}"),
]


@pytest.fixture
def foreign(app: Celery) -> str:
    """Ann's running task, with a child, progress and a name of its own."""
    task_id = str(launch_with_context(app.tasks["work"], 1, context=ANN).id)
    launch(app, ANN, task_id, name=f"secret.{task_id}")
    move(app, ANN, task_id, State.STARTED, name=f"secret.{task_id}", progress_done=1, progress_message="secret")
    launch(app, ANN, "child", root_id=task_id, parent_id=task_id)
    return task_id


@pytest.mark.parametrize(("method", "path"), ATTEMPTS)
def test_a_foreign_id_answers_as_an_unknown_one(app: Celery, foreign: str, method: str, path: str) -> None:
    bob = client_of(app, BOB, allow_terminate=True)
    bob.get("/tasks/first")  # whatever is done once in a process is done

    answers = []
    for task_id in (foreign, UNKNOWN):
        with counted_statements() as statements:
            response = bob.request(method, path.format(task_id))
        answers.append((response.status_code, response.content, response.headers.multi_items(), statements))

    assert answers[0] == answers[1]
    status_code, content, _, statements = answers[0]
    assert (status_code, content) in [(404, b'{"detail":"no such task"}'), (200, b'{"items":[],"next":null}')]
    assert statements  # it is the database that knows nothing of it


@pytest.mark.parametrize(("method", "path"), ATTEMPTS)
def test_an_attempt_on_a_foreign_task_changes_nothing(
    app: Celery, foreign: str, told: list[Any], tenant_database: TenantDatabase, method: str, path: str
) -> None:
    for state in WAITING:
        move(app, ANN, f"is-{state}", state)
    before = rows(tenant_database)
    bob = client_of(app, BOB, allow_terminate=True)

    for task_id in [foreign, *(f"is-{state}" for state in WAITING)]:
        bob.request(method, path.format(task_id))

    assert rows(tenant_database) == before
    assert len(before) == 6  # five records and a message
    assert told == []


def test_a_task_of_the_same_id_is_another_one(app: Celery, ann: TestClient, bob: TestClient) -> None:
    move(app, ANN, "import", State.STARTED)
    launch(app, BOB, "import", name="bobs")

    assert bob.post("/tasks/import/cancel").json() == {"outcome": "cancelled"}

    assert (ids(ann), ids(bob)) == (["import"], ["import"])
    assert ann.get("/tasks/import").json()["state"] == "started"
    assert ann.get("/tasks/import").json()["abort_requested_at"] is None
    assert shape_of(bob, "import") == {"import": {}}


GUESSES = [
    "1",
    "'",
    "' OR 1=1 --",
    "*",
    "%25",
    "_",
    "%00",
    "task%00",
    "%ED%A0%80",  # a lone surrogate, as UTF-8 would have it
    "%FF",
    "%0d%0aX-Injected:%201",
    "..",
    "../health",
    "..%2F..%2Ftasks",
    "%2E%2E",
    "//",
    ";a=b",
    "ta%73k",
    "TASK",
    "task%20",
    "%20task",
    "x" * 255,
    "x" * 256,
    "x" * 20_000,
    "🐘" * 60,
]


@pytest.mark.parametrize("guess", GUESSES, ids=lambda guess: guess[:20])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("GET", "/events"), ("GET", "/tree"), ("POST", "/cancel")])
def test_no_guess_finds_a_foreign_task(
    app: Celery, bob: TestClient, tenant_database: TenantDatabase, method: str, suffix: str, guess: str
) -> None:
    launch(app, ANN, "task", name="secret")
    before = rows(tenant_database)

    response = bob.request(method, f"/tasks/{guess}{suffix}")

    assert response.status_code in (404, 405, 422) or (response.status_code, response.json()["items"]) == (200, [])
    assert "secret" not in response.text
    assert "x-injected" not in response.headers
    assert rows(tenant_database) == before


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "x" * 255, "' OR 1=1 --", "%"])
@pytest.mark.parametrize("parameter", ["name", "root_id"])
def test_no_filter_finds_a_foreign_task(app: Celery, bob: TestClient, parameter: str, text: str) -> None:
    launch(app, ANN, "task")

    response = bob.get(f"/tasks/?{parameter}={quote(text, errors='surrogatepass')}")

    assert (response.status_code, response.json()["items"]) == (200, [])


WITHOUT = {
    "no header": {},
    "a wrong token": {"Authorization": "Bearer eve"},
    "nobody": {"Authorization": "Bearer nobody"},
}


@pytest.mark.parametrize("headers", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize(("method", "path"), [("GET", "/tasks/"), *OF_ONE_TASK])
def test_without_authentication_there_is_nothing(
    app: Celery, foreign: str, tenant_database: TenantDatabase, headers: dict[str, str], method: str, path: str
) -> None:
    client = TestClient(api_of(app))
    before = rows(tenant_database)

    with counted_statements() as statements:
        response = client.request(method, path.format(foreign), headers=headers)

    assert response.status_code == 401
    assert statements == []
    assert rows(tenant_database) == before


@pytest.mark.parametrize(("method", "path"), [("GET", "/tasks/"), *OF_ONE_TASK])
def test_a_user_without_an_organization_is_forbidden_everything(
    app: Celery, foreign: str, method: str, path: str
) -> None:
    response = TestClient(api_of(app)).request(
        method, path.format(foreign), headers={"Authorization": "Bearer newcomer"}
    )

    assert (response.status_code, response.json()) == (403, {"detail": "you belong to no organization"})


# --- the database is away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("GET", "/tasks/"), *OF_ONE_TASK])
def test_while_the_database_is_away_a_client_is_told_when_to_ask_again(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    port = free_port()
    client = client_of(make_app(f"postgresql://app:s3cret@127.0.0.1:{port}/shop"), ANN, allow_terminate=True)

    response = client.request(method, path.format("task"))

    assert (response.status_code, response.json()) == (503, {"detail": "the database cannot be reached"})
    assert int(response.headers["Retry-After"]) > 0
    (told,) = [message for message in caplog.messages if "cannot be answered" in message]
    assert f"127.0.0.1:{port}" in told
    assert "s3cret" not in told


def test_a_database_that_goes_away_and_comes_back_is_told_to_clients_meanwhile(
    server: PostgresServer, make_app: MakeApp
) -> None:
    with new_tenant_database(server.url) as database:
        app = with_work(make_app(database.url, broker_url=database.url))
        client = client_of(app, ANN)
        move(app, ANN, "task", State.STARTED)
        codes = [client.get("/tasks/task").status_code]

        server.stop()
        codes += [client.get("/tasks/task").status_code, client.post("/tasks/task/cancel").status_code]
        server.start()
        codes += [client.get("/tasks/task").status_code, client.post("/tasks/task/cancel").status_code]

    assert codes == [200, 503, 503, 200, 200]


# --- the document --------------------------------------------------------------------------------------------------


def schema_of(**content: dict[str, Any]) -> str:
    """The model of a response, which has one media type."""
    [(media_type, described)] = content.items()
    if media_type == "text/event-stream":
        data = described["itemSchema"]["properties"]["data"]
        return "events of " + str(data["contentSchema"]["$ref"].rpartition("/")[2])
    assert media_type == "application/json"
    return str(described["schema"]["$ref"].rpartition("/")[2])


def test_the_openapi_document_says_what_each_route_answers(ann: TestClient) -> None:
    document = ann.get("/openapi.json").json()
    operations = {
        (method, path): operation for path, item in document["paths"].items() for method, operation in item.items()
    }

    responses = {
        key: {
            code: schema_of(**response["content"]) if "content" in response else None
            for code, response in operation["responses"].items()
        }
        for key, operation in operations.items()
    }

    error = "_Detail"
    always = {"422": "HTTPValidationError", "503": error}
    assert responses == {
        ("get", "/tasks/"): {"200": "TaskPage", "400": error, **always},
        ("get", "/tasks/{task_id}"): {"200": "TaskStatus", "404": error, **always},
        ("get", "/tasks/{task_id}/events"): {"200": "events of TaskStatus", "204": None, "404": error, **always},
        ("get", "/tasks/{task_id}/tree"): {"200": "TaskTree", "404": error, **always},
        ("post", "/tasks/{task_id}/cancel"): {"200": "TaskCancellation", "403": error, "404": error, **always},
    }
    for operation in operations.values():
        assert operation["description"]
        assert operation["tags"] == ["tasks"]
        for response in operation["responses"].values():
            assert response["description"]
        for parameter in operation["parameters"]:
            assert parameter.get("description") or parameter["name"] == "authorization", parameter["name"]


def test_the_openapi_document_describes_the_models(ann: TestClient) -> None:
    document = ann.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    assert schemas["State"]["enum"] == list(State)
    assert schemas["Cancellation"]["enum"] == ["cancelled", "asked", "terminated", "ended"]
    for name in ("TaskStatus", "TaskPage", "TaskTree", "TaskCancellation", "TaskError", "TaskProgress"):
        assert schemas[name]["description"]
    listed = document["paths"]["/tasks/"]["get"]["parameters"]
    limit = next(parameter["schema"] for parameter in listed if parameter["name"] == "limit")
    assert (limit["minimum"], limit["maximum"], limit["default"]) == (1, 200, 50)
    operations = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert max(Counter(operations).values()) == 1
    assert "NotSupportedError" not in json.dumps(document)
