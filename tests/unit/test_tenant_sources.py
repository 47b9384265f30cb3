"""Whose work a task is, where something else than the active tenant says it: arguments, a system task, a canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from rhesis_tasks import BaseTask, TenantContext, current_tenant, launch_with_context, tenant_scope
from rhesis_tasks.errors import InvalidTenantError, MissingTenantError, TenantConflictError
from rhesis_tasks.headers import HEADER, Envelope, encode, find

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")


@pytest.fixture
def seen() -> list[Any]:
    """What the bodies of tasks noted."""
    return []


@pytest.fixture
def report(app: Celery, seen: list[Any]) -> Any:
    """A task as an application had it before: its callers pass the ids by hand."""

    @app.task(base=BaseTask, name="report")
    def report(number: int, organization_id: str | None = None, user_id: str | None = None) -> None:
        seen.append((current_tenant(), organization_id))

    return report


@pytest.fixture
def stranger(app: Celery, make_app: Callable[..., Celery]) -> Celery:
    """An application that publishes to the same queue and knows nothing of this library."""
    return make_app(configured=False, task_default_queue=app.conf.task_default_queue)


# --- ids among the arguments -----------------------------------------------------------------------------------

LAUNCHES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "delay": lambda task, ids: task.delay(1, **ids),
    "apply_async": lambda task, ids: task.apply_async((1,), ids),
    "send_task": lambda task, ids: task.app.send_task("report", (1,), ids),
    "signature": lambda task, ids: task.s(1, **ids).delay(),
    "launch_with_context": lambda task, ids: launch_with_context(task, 1, **ids),
    "group": lambda task, ids: group(task.s(1, **ids)).delay(),
    "eager": lambda task, ids: task.apply((1,), ids),
}
launches = pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)


@launches
def test_ids_among_the_arguments_name_the_tenant(
    report: Any, launch: Callable[[Any, dict[str, Any]], Any], work_off: Any, seen: list[Any]
) -> None:
    launch(report, {"organization_id": "acme", "user_id": "alice"})
    work_off(report.app)

    assert seen == [(ACME, "acme")]


@launches
def test_ids_among_the_arguments_of_another_tenant_than_the_active_one_are_refused_at_the_call(
    report: Any, launch: Callable[[Any, dict[str, Any]], Any], published: Any
) -> None:
    with tenant_scope(GLOBEX), pytest.raises(TenantConflictError, match=r"globex.*acme|acme.*globex"):
        launch(report, {"organization_id": "acme", "user_id": "alice"})

    assert published(report.app) == []


@launches
def test_ids_among_the_arguments_that_are_no_ids_are_refused_at_the_call(
    report: Any, launch: Callable[[Any, dict[str, Any]], Any], published: Any
) -> None:
    with pytest.raises(InvalidTenantError, match="organization_id"):
        launch(report, {"organization_id": ["acme"]})

    assert published(report.app) == []


@pytest.mark.parametrize("ids", [{"organization_id": "acme"}, {"organization_id": "acme", "user_id": "alice"}])
def test_ids_among_the_arguments_may_say_what_the_active_tenant_says(
    report: Any, ids: dict[str, Any], work_off: Any, seen: list[Any]
) -> None:
    with tenant_scope(ACME):
        report.delay(1, **ids)
    work_off(report.app)

    assert seen == [(ACME, "acme")]


def test_a_user_alone_among_the_arguments_is_an_argument(report: Any, work_off: Any, seen: list[Any]) -> None:
    with tenant_scope(ACME):
        report.delay(1, user_id="somebody the report is about")
    work_off(report.app)

    assert seen == [(ACME, None)]


def test_a_task_can_say_that_its_arguments_mean_something_else(app: Celery, work_off: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, name="share", tenant_in_arguments=False)
    def share(organization_id: str) -> None:
        seen.append((current_tenant(), organization_id))

    with tenant_scope(ACME):
        share.delay(organization_id="globex")
    work_off(app)

    assert seen == [(ACME, "globex")]


def test_an_older_callers_message_is_for_the_tenant_in_its_arguments(
    report: Any, stranger: Celery, work_off: Any, seen: list[Any]
) -> None:
    stranger.send_task("report", (1,), {"organization_id": "acme", "user_id": "alice"})
    work_off(report.app)

    assert seen == [(ACME, "acme")]


@pytest.mark.parametrize(
    "headers",
    [{HEADER: encode(Envelope(GLOBEX))}, {"organization_id": "globex"}],
    ids=["ours", "flat"],
)
def test_a_message_whose_header_and_arguments_contradict_each_other_never_runs(
    report: Any, stranger: Celery, headers: dict[str, Any], work_off: Any, seen: list[Any]
) -> None:
    stranger.send_task("report", (1,), {"organization_id": "acme"}, headers=headers, task_id="two tenants")
    work_off(report.app)

    result = report.app.AsyncResult("two tenants")
    assert seen == []
    assert isinstance(result.result, TenantConflictError)
    assert "globex" in str(result.result)
    assert "acme" in str(result.result)


def test_a_message_whose_headers_contradict_each_other_never_runs(
    report: Any, stranger: Celery, work_off: Any, seen: list[Any]
) -> None:
    headers = {HEADER: encode(Envelope(GLOBEX)), "organization_id": "acme"}
    stranger.send_task("report", (1,), headers=headers, task_id="two headers")
    work_off(report.app)

    assert seen == []
    assert isinstance(report.app.AsyncResult("two headers").result, TenantConflictError)


def test_ids_among_the_arguments_may_not_contradict_where_a_task_is_called_as_a_function(
    report: Any, seen: list[Any]
) -> None:
    with tenant_scope(ACME):
        report(1, organization_id="acme")
        with pytest.raises(TenantConflictError):
            report(1, organization_id="globex")
    with pytest.raises(MissingTenantError):
        report(1, organization_id="globex")

    assert seen == [(ACME, "acme")]


# --- work that belongs to no tenant ----------------------------------------------------------------------------


@pytest.fixture
def sweep(app: Celery, seen: list[Any]) -> Any:
    """A task across tenants."""

    @app.task(base=BaseTask, bind=True, name="sweep", system=True)
    def sweep(self: BaseTask, *_: Any, organization_id: str | None = None) -> None:
        seen.append((current_tenant(), self.request.organization_id))
        for tenant in (ACME, GLOBEX):
            with tenant_scope(tenant):
                seen.append(current_tenant())

    return sweep


@pytest.mark.parametrize("active", [None, ACME])
@launches
def test_a_system_task_has_no_tenant_whoever_launches_it(
    app: Celery,
    sweep: Any,
    active: TenantContext | None,
    launch: Callable[[Any, dict[str, Any]], Any],
    work_off: Any,
    seen: list[Any],
) -> None:
    if launch is LAUNCHES["send_task"]:
        launch = lambda task, _: task.app.send_task("sweep")  # noqa: E731
    if active is None:
        launch(sweep, {})
    else:
        with tenant_scope(active):
            launch(sweep, {"organization_id": "acme"})
    work_off(app)

    assert seen == [(None, None), ACME, GLOBEX]


def test_a_system_task_has_no_tenant_though_its_message_names_one(
    sweep: Any, stranger: Celery, work_off: Any, seen: list[Any]
) -> None:
    stranger.send_task("sweep", headers={HEADER: encode(Envelope(ACME))})
    work_off(sweep.app)

    assert seen == [(None, None), ACME, GLOBEX]


def test_a_system_task_called_as_a_function_has_no_tenant(sweep: Any, seen: list[Any]) -> None:
    with tenant_scope(ACME):
        sweep()
        assert current_tenant() == ACME

    assert seen == [(None, None), ACME, GLOBEX]


def test_what_a_system_task_launches_needs_a_scope(app: Celery, report: Any, work_off: Any, seen: list[Any]) -> None:
    @app.task(base=BaseTask, name="for each", system=True)
    def for_each() -> None:
        with pytest.raises(MissingTenantError):
            report.delay(0)
        for number, tenant in enumerate((ACME, GLOBEX)):
            with tenant_scope(tenant):
                report.delay(number)

    for_each.delay()
    work_off(app)

    assert seen == [(ACME, None), (GLOBEX, None)]


def test_what_follows_a_system_task_in_a_canvas_is_the_launchers(
    app: Celery, sweep: Any, report: Any, work_off: Any, seen: list[Any]
) -> None:
    with tenant_scope(ACME):
        chain(sweep.s(), report.si(1)).delay()
    work_off(app)

    assert seen == [(None, None), ACME, GLOBEX, (ACME, None)]


# --- a canvas that is launched in Celery's own way -------------------------------------------------------------

CANVASES: dict[str, Callable[[Any], Any]] = {
    "chain": lambda task: chain(task.si(1), task.si(2), task.si(3)),
    "chord": lambda task: chord([task.si(1), task.si(2)], task.si(3)),
    "chain with a group": lambda task: chain(task.si(1), group(task.si(2), task.si(3)), task.si(4)),
    "chord in a chain": lambda task: chain(task.si(1), chord([task.si(2)], task.si(3)), task.si(4)),
    "links": lambda task: task.si(1).on_error(task.si(2)).set(link=[task.si(3)]),
}


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_every_part_is_bound_when_the_canvas_is_launched(
    report: Any, canvas: Callable[[Any], Any], published: Any, embedded: Any
) -> None:
    whole = canvas(report)
    before = repr(whole), dict(whole)
    with tenant_scope(ACME):
        whole.delay()

    messages = published(report.app)
    later = [signature for message in messages for signature in embedded(message)]
    bound: list[Any] = [find(signature["options"].get("headers")) for signature in later]
    assert [message.organization for message in messages] == ["acme"] * len(messages)
    assert [header and header["organization_id"] for header in bound] == ["acme"] * len(later) != []
    assert (repr(whole), dict(whole)) == before, "the caller's canvas can be launched again, for somebody else"


def test_a_part_that_was_bound_to_another_tenant_stays_so(report: Any, work_off: Any, seen: list[Any]) -> None:
    others = report.si(2).set(headers={HEADER: encode(Envelope(GLOBEX))})
    with tenant_scope(ACME):
        chain(report.si(1), others, report.si(3)).delay()
    work_off(report.app)

    assert [tenant for tenant, _ in seen] == [ACME, GLOBEX, ACME]


MIXED: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "chain": lambda task, headers: chain(task.si(1), task.si(2)).apply_async(headers=headers),
    "link": lambda task, headers: task.apply_async((1,), headers=headers, link=task.si(2)),
    "link_error": lambda task, headers: task.apply_async((1,), headers=headers, link_error=task.si(2)),
}


@pytest.mark.parametrize("launch", MIXED.values(), ids=MIXED)
def test_what_follows_a_launch_with_another_tenants_headers_is_not_left_to_chance(
    report: Any, launch: Callable[[Any, dict[str, Any]], Any], published: Any
) -> None:
    headers = {HEADER: encode(Envelope(GLOBEX))}
    with tenant_scope(ACME), pytest.raises(TenantConflictError, match=r"globex.*report after it.*acme"):
        launch(report, headers)
    assert published(report.app) == []

    with tenant_scope(GLOBEX):
        launch(report, headers)
    launch(report, headers)
    assert [message.organization for message in published(report.app)] == ["globex", "globex"]


@pytest.mark.parametrize("nested", [{}, {"headers": {"sentry-trace": "1"}}], ids=["plain", "nested headers"])
@pytest.mark.parametrize(
    ("headers", "kwargs"),
    [({"organization_id": "acme", "user_id": "alice"}, {}), ({}, {"organization_id": "acme", "user_id": "alice"})],
    ids=["flat headers", "arguments"],
)
def test_a_retry_of_an_older_callers_message_keeps_the_tenant(
    app: Celery,
    stranger: Celery,
    headers: dict[str, Any],
    kwargs: dict[str, Any],
    nested: dict[str, Any],
    work_off: Any,
    seen: list[Any],
) -> None:
    @app.task(base=BaseTask, bind=True, name="again")
    def again(self: BaseTask, organization_id: str = "", user_id: str = "") -> None:
        seen.append(current_tenant())
        if self.request.retries < 2:
            with tenant_scope(GLOBEX):
                raise self.retry(countdown=0)

    stranger.send_task("again", kwargs=kwargs, headers={**headers, **nested})
    work_off(app)

    assert seen == [ACME] * 3


# --- what comes after a task that is nobody's -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["link", "link_error"])
def test_a_launch_for_nobody_is_refused_where_what_follows_needs_a_tenant(
    app: Celery, report: Any, option: str, published: Any
) -> None:
    @app.task(base=BaseTask, name="anybody", tenant_required=False)
    def anybody() -> None: ...

    with pytest.raises(MissingTenantError, match="task report needs a tenant"):
        anybody.apply_async(**{option: [report.si(1)]})
    assert published(app) == []

    anybody.apply_async(**{option: [report.si(1, organization_id="acme")]})
    assert len(published(app)) == 1


def test_an_error_callback_that_would_be_refused_does_not_end_the_worker(
    app: Celery, stranger: Celery, report: Any, work_off: Any, seen: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(base=BaseTask, name="fails", tenant_required=False)
    def fails() -> None:
        raise ValueError("as it is meant to")

    @app.task(base=BaseTask, name="note")
    def note(organization_id: str | None = None) -> None:
        seen.append((current_tenant(), organization_id))

    ours = stranger.signature("note", kwargs={"organization_id": "acme"}, immutable=True)
    stranger.send_task("fails", link_error=[stranger.signature("report", (2,), immutable=True), ours], task_id="failed")
    work_off(app)

    assert [tenant for tenant, _ in seen] == [TenantContext("acme")]
    assert isinstance(app.AsyncResult("failed").result, ValueError)
    assert "an error callback of task fails is left out: task report needs a tenant" in caplog.text


def test_nested_headers_that_name_another_tenant_are_a_conflict(
    app: Celery, stranger: Celery, report: Any, work_off: Any, seen: list[Any]
) -> None:
    header = encode(Envelope(ACME))
    for number, nested in enumerate([{HEADER: encode(Envelope(GLOBEX))}, {"organization_id": "globex"}]):
        stranger.send_task("report", (1,), headers={HEADER: header, "headers": nested}, task_id=f"nested {number}")
    work_off(app)

    assert seen == []
    for number in range(2):
        assert isinstance(app.AsyncResult(f"nested {number}").result, TenantConflictError)
