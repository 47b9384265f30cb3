"""The routes of ``task_router`` answer as their OpenAPI document says, to whatever schemathesis makes of it."""

from __future__ import annotations

import base64
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from router_rig import ANN, BOB, api_of, client_of, fail, launch, move, rows, succeed, with_work
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from rhesis_tasks import TenantContext
from rhesis_tasks.states import State
from rhesis_tasks.testing import TenantDatabase

if TYPE_CHECKING:
    from conftest import MakeApp

MARKS = {ANN: "only-anns", BOB: "only-bobs"}  # in every id and text of theirs
OTHER = {ANN: BOB, BOB: ANN}
EXAMPLES = 25

# Of the same function they are the same ones each time.
fixed = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def app(make_app: MakeApp, tenant_database: TenantDatabase) -> Celery:
    """An application with tasks of two tenants in all states, a run and its parts, odd results and errors."""
    app = with_work(make_app(broker_url=tenant_database.url))
    for tenant, mark in MARKS.items():
        root = launch(app, tenant, f"{mark}-root", name=f"{mark}-name")
        launch(app, tenant, f"{mark}-part", name=f"{mark}-name", root_id=root, parent_id=root)
        for state in State:
            move(app, tenant, f"{mark}-{state}", state, name=mark, progress_done=1, progress_message=mark)
        succeed(app, tenant, f"{mark}-result", {mark: [1.5, None, f"{mark}\ud800", float("nan")]})
        fail(app, tenant, f"{mark}-error", f"{mark} \0\udfff")
    return app


def known(app: Celery) -> dict[str, Any]:
    """What a tenant can know of its own and of another's: ids, names, cursors."""
    ids = [f"{mark}-{end}" for mark in MARKS.values() for end in ("root", "part", "result", "error", *State)]
    cursors = [
        client_of(app, tenant).get("/tasks/", params={"limit": limit}).json()["next"]
        for tenant in MARKS
        for limit in (1, 5)
    ]
    return {
        "task_id": st.sampled_from(ids),
        "root_id": st.sampled_from([f"{mark}-root" for mark in MARKS.values()]),
        "name": st.sampled_from([f"{mark}-name" for mark in MARKS.values()]),
        "cursor": st.sampled_from(cursors),
    }


def said(response: Any) -> str:
    """All that a response says, cursors too."""
    text = f"{dict(response.headers)} {response.text}"
    page = response.json()
    if isinstance(page, dict) and page.get("next"):
        text += base64.urlsafe_b64decode(page["next"] + "==").decode()
    return text


def attempt(app: Celery, operation: Any, mode: GenerationMode) -> Counter[tuple[str, int]]:
    """Use an operation as either tenant; by whom and with which code it was answered."""
    values = known(app)
    # For the document a cursor is any text, and a time a text only (pydantic takes seconds since 1970, too).
    of_list = [positive_data_acceptance, negative_data_rejection] if operation.path == "/tasks/" else []
    seen: Counter[tuple[str, int]] = Counter()

    @fixed
    @given(
        case=operation.as_strategy(generation_mode=mode),
        tenant=st.sampled_from(list(MARKS)),
        use_known=st.booleans(),
        data=st.data(),
    )
    def once(case: Any, tenant: TenantContext, use_known: bool, data: st.DataObject) -> None:
        for given_values in (case.path_parameters, case.query):
            for name in [name for name in given_values or () if name in values and use_known]:
                given_values[name] = data.draw(values[name], label=name)

        response = case.call(headers={"Authorization": f"Bearer {tenant.user_id}"})

        # What is known is valid, so that a request may be none that has to be refused any more.
        case.validate_response(response, excluded_checks=[*of_list, *([negative_data_rejection] if use_known else [])])
        assert MARKS[OTHER[tenant]] not in said(response)
        seen[str(tenant.user_id), response.status_code] += 1

    once()
    return seen


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_every_answer_is_as_documented_and_says_nothing_of_another_tenant(app: Celery, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api_of(app, allow_terminate=False))
    seen: dict[str, Counter[tuple[str, int]]] = {}

    for result in schema.exclude(path_regex="/events$").get_all_operations():  # see test_task_events.py: those may last
        operation = result.ok()
        seen[operation.label] = attempt(app, operation, mode)

    codes = {label: {code for _, code in answers} for label, answers in seen.items()}
    assert len(codes) == 4
    assert all(user in {who for who, _ in answers} for answers in seen.values() for user in ("ann", "bob"))
    if mode is GenerationMode.POSITIVE:
        assert codes["GET /tasks/"] >= {200, 400}
        assert codes["GET /tasks/{task_id}"] == codes["GET /tasks/{task_id}/tree"] == {200, 404}
        assert codes["POST /tasks/{task_id}/cancel"] == {200, 403, 404}
    else:
        assert all(422 in answers for answers in codes.values())


def test_whatever_one_tenant_sends_leaves_the_others_tasks_as_they_are(
    app: Celery, tenant_database: TenantDatabase
) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api_of(app))
    cancel = schema["/tasks/{task_id}/cancel"]["POST"]
    before = rows_of_bob = [row for row in rows(tenant_database) if MARKS[BOB] in str(row)]
    foreign = known(app)["task_id"]

    @fixed
    @given(case=cancel.as_strategy(), data=st.data())
    def once(case: Any, data: st.DataObject) -> None:
        case.path_parameters["task_id"] = data.draw(foreign)
        case.call(headers={"Authorization": "Bearer ann"})

    once()

    rows_of_bob = [row for row in rows(tenant_database) if MARKS[BOB] in str(row)]
    assert rows_of_bob == before
    assert len(before) == 13
