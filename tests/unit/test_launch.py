"""launch_with_context: what it refuses at the caller's line, and what every part of a launch carries."""

from __future__ import annotations

import asyncio
import datetime
import json
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from contextvars import Context, ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signature
from celery.canvas import xmap, xstarmap
from celery.result import AsyncResult, GroupResult

from rhesis_tasks import (
    BaseTask,
    TenantContext,
    alaunch_with_context,
    current_tenant,
    launch_with_context,
    register_context_var,
    tenant_scope,
)
from rhesis_tasks.errors import (
    InvalidTenantError,
    MissingTenantError,
    NotConfiguredError,
    NotSupportedError,
    TaskArgumentsError,
    TenantConflictError,
)
from rhesis_tasks.headers import HEADER, Envelope, decode, encode, find

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")
ALICE = SimpleNamespace(id="alice", organization_id="acme")


class Tasks:
    """The tasks of the application under test; each notes its name and its tenant."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.seen: list[tuple[str, TenantContext | None]] = []
        seen = self.seen

        @app.task(base=BaseTask, name="add")
        def add(x: int, y: int = 1) -> int:
            seen.append(("add", current_tenant()))
            return x + y

        @app.task(base=BaseTask, name="total")
        def total(numbers: list[int]) -> int:
            seen.append(("total", current_tenant()))
            return sum(numbers)

        @app.task(base=BaseTask, name="on_error")
        def on_error(*_: Any) -> None:
            seen.append(("on_error", current_tenant()))

        @app.task(base=BaseTask, name="free", tenant_required=False)
        def free(*_: Any) -> None:
            seen.append(("free", current_tenant()))

        @app.task(base=BaseTask, name="fail")
        def fail() -> None:
            raise KeyError("as asked")

        self.add, self.total, self.on_error, self.free, self.fail = add, total, on_error, free, fail


@pytest.fixture
def tasks(app: Celery) -> Tasks:
    return Tasks(app)


CANVASES: dict[str, Callable[[Tasks], Any]] = {
    "signature": lambda t: t.add.s(1),
    "signature with headers": lambda t: t.add.s(1).set(headers={"x": 1}),
    "link": lambda t: t.add.s(1).set(link=t.add.s(2)),
    "several links": lambda t: t.add.s(1).set(
        link=[t.add.s(2), t.add.s(3)], link_error=[t.on_error.s(), t.on_error.s()]
    ),
    "link of a link": lambda t: t.add.s(1).set(link=t.add.s(2).set(link=t.add.s(3))),
    "link_error": lambda t: t.fail.s().set(link_error=t.on_error.s()),
    "chain": lambda t: chain(t.add.s(1), t.add.s(2), t.add.s(3)),
    "chain with links": lambda t: chain(t.add.s(1).set(link=t.add.s(9)), t.add.s(2)).set(link_error=t.on_error.s()),
    "piped chain": lambda t: t.add.s(1) | t.add.s(2),
    "group": lambda t: group(t.add.s(1), t.add.s(2)),
    "group with a link": lambda t: group(t.add.s(1), t.add.s(2).set(link=t.add.s(3))),
    "chord": lambda t: chord([t.add.s(1), t.add.s(2)], t.total.s()),
    "chord of a group": lambda t: chord(group(t.add.s(1), t.add.s(2)), t.total.s()),
    "chord with an error callback": lambda t: chord([t.add.s(1), t.fail.si()], t.total.s().on_error(t.on_error.s())),
    "chord with a chain as its body": lambda t: chord([t.add.s(1), t.add.s(2)], chain(t.total.s(), t.add.s(1))),
    "group then a task": lambda t: chain(group(t.add.s(1), t.add.s(2)), t.total.s(), t.add.s(1)),
    "chain with a chord": lambda t: chain(t.add.s(1), group(t.add.s(1), t.add.s(2)), t.total.s(), t.add.s(1)),
    "group of chains": lambda t: group(chain(t.add.s(1), t.add.s(2)), chain(t.add.s(3), t.add.s(4))),
    "chain of a chain": lambda t: chain(t.add.s(1), chain(t.add.s(2), t.add.s(3)), t.add.s(4)),
    "chord in a chord": lambda t: chord([chord([t.add.s(1), t.add.s(2)], t.total.s()), t.add.s(3)], t.total.s()),
}


@pytest.fixture(params=CANVASES)
def canvas(request: pytest.FixtureRequest, tasks: Tasks) -> Any:
    """Each kind of work in turn."""
    return CANVASES[request.param](tasks)


@pytest.fixture
def locale() -> ContextVar[str]:
    """A registered variable."""
    variable: ContextVar[str] = ContextVar("locale")
    register_context_var(variable)
    return variable


# --- for whom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "active", "tenant"),
    [
        ({"current_user": ALICE}, None, ACME),
        ({"context": ACME}, None, ACME),
        ({"context": ACME, "current_user": ALICE}, None, ACME),
        ({}, ACME, ACME),
        ({"current_user": ALICE}, ACME, ACME),
        ({"context": TenantContext("acme", "alice", "project")}, None, TenantContext("acme", "alice", "project")),
        ({"current_user": SimpleNamespace(id=7, organization_id=8)}, None, TenantContext("8", "7")),
    ],
)
def test_the_tenant_is_the_users_the_contexts_or_the_active_one(
    tasks: Tasks, arguments: dict[str, Any], active: TenantContext | None, tenant: TenantContext, published: Any
) -> None:
    with tenant_scope(active) if active else nullcontext():
        launched = launch_with_context(tasks.add, 1, **arguments)

    (message,) = published(tasks.app)
    assert message.envelope == Envelope(tenant)
    assert (message.task, message.args, message.headers["id"]) == ("add", [1], launched.id)
    assert isinstance(launched, AsyncResult)


def test_the_launchers_own_context_is_as_before(tasks: Tasks) -> None:
    launch_with_context(tasks.add, 1, current_user=ALICE)
    assert current_tenant() is None

    with tenant_scope(TenantContext("acme")) as active:
        launch_with_context(tasks.add, 1, current_user=ALICE)
        assert current_tenant() is active


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, MissingTenantError),
        ({"current_user": SimpleNamespace(id=1, organization_id=None)}, InvalidTenantError),
        ({"current_user": "alice"}, InvalidTenantError),
        ({"current_user": SimpleNamespace(id=1.5, organization_id="acme")}, InvalidTenantError),
        ({"context": ALICE}, InvalidTenantError),
        ({"context": "acme"}, InvalidTenantError),
        ({"context": GLOBEX, "current_user": ALICE}, TenantConflictError),
    ],
)
def test_a_launch_for_nobody_in_particular_is_refused(
    tasks: Tasks, arguments: dict[str, Any], error: type[Exception], published: Any
) -> None:
    with pytest.raises(error):
        launch_with_context(tasks.add, 1, **arguments)

    assert published(tasks.app) == []


@pytest.mark.parametrize(
    "arguments", [{"current_user": SimpleNamespace(id="bob", organization_id="acme")}, {"context": GLOBEX}]
)
def test_a_launch_for_another_than_the_active_tenant_is_refused(
    tasks: Tasks, arguments: dict[str, Any], published: Any
) -> None:
    with tenant_scope(ACME), pytest.raises(TenantConflictError, match="the active tenant is organization acme"):
        launch_with_context(tasks.add, 1, **arguments)

    assert published(tasks.app) == []


def test_a_task_that_needs_no_tenant_can_be_launched_without_one(tasks: Tasks, published: Any) -> None:
    launch_with_context(tasks.free)

    assert [message.organization for message in published(tasks.app)] == [None]


def test_registered_variables_are_bound_at_the_launch(
    tasks: Tasks, canvas: Any, locale: ContextVar[str], published: Any, embedded: Any
) -> None:
    def launch() -> None:
        locale.set("de")
        launch_with_context(canvas, current_user=ALICE)

    Context().run(launch)

    for message in published(tasks.app):
        assert message.envelope.variables == {"locale": "de"}
        for part in embedded(message):
            assert decode(find(part["options"]["headers"])).variables == {"locale": "de"}


# --- what can be launched --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (None, "takes a task or a signature, not NoneType"),
        ("add", "takes a task or a signature, not str"),
        ({"x": 1}, "takes a task or a signature, not dict"),
        (print, r"Is the function decorated with @app.task\?"),
        (BaseTask, r"Is the function decorated with @app.task\?"),
    ],
)
def test_what_is_neither_task_nor_signature_is_refused(thing: Any, text: str) -> None:
    with pytest.raises(TaskArgumentsError, match=text):
        launch_with_context(thing, current_user=ALICE)


@pytest.mark.parametrize("kind", ["task", "signature", "canvas"])
def test_a_task_of_an_application_that_is_not_configured_is_refused(
    make_app: Callable[..., Celery], kind: str, published: Any
) -> None:
    tasks = Tasks(make_app(configured=False))
    thing = {"task": tasks.add, "signature": tasks.add.s(1), "canvas": chain(tasks.add.s(1), tasks.add.s(2))}[kind]

    with pytest.raises(NotConfiguredError, match=r"Call rhesis_tasks.configure\(app, ...\)"):
        launch_with_context(thing, current_user=ALICE)

    assert published(tasks.app) == []


@pytest.mark.parametrize("arguments", [{"session": object()}, {"idempotency_key": "k"}, {"idempotency_key": ""}])
def test_session_and_idempotency_key_are_refused_rather_than_ignored(
    tasks: Tasks, arguments: dict[str, Any], published: Any
) -> None:
    with pytest.raises(NotSupportedError, match="session= and idempotency_key= are reserved"):
        launch_with_context(tasks.add, 1, current_user=ALICE, **arguments)

    assert published(tasks.app) == []


# --- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1}), ((), {"y": 1})]
)
def test_wrong_arguments_are_a_type_error_that_shows_the_tasks_signature(
    tasks: Tasks, args: tuple[Any, ...], kwargs: dict[str, Any], published: Any
) -> None:
    with pytest.raises(TaskArgumentsError, match=r"task add is called as add\(x: 'int', y: 'int' = 1\)") as caught:
        launch_with_context(tasks.add, *args, current_user=ALICE, **kwargs)

    assert isinstance(caught.value, TypeError)
    assert published(tasks.app) == []


def test_wrong_arguments_are_reported_at_the_callers_line_also_if_no_tenant_is_there(tasks: Tasks) -> None:
    with pytest.raises(TaskArgumentsError):
        launch_with_context(tasks.add)


def test_arguments_arrive_as_they_were_given(tasks: Tasks, published: Any) -> None:
    launch_with_context(tasks.add, 1, y=2, current_user=ALICE)
    launch_with_context(tasks.add.s(2), 1, current_user=ALICE)  # prepended, as Celery does
    launch_with_context(tasks.add.s(1), y=2, current_user=ALICE)
    launch_with_context(tasks.add.si(1), current_user=ALICE)

    assert [(message.args, message.kwargs) for message in published(tasks.app)] == [
        ([1], {"y": 2}),
        ([1, 2], {}),
        ([1], {"y": 2}),
        ([1], {}),
    ]


@pytest.mark.parametrize("reserved", ["current_user", "context", "session", "idempotency_key", "options"])
def test_a_task_with_a_parameter_named_like_one_of_ours_is_launched_as_a_signature(
    app: Celery, reserved: str, published: Any
) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def clash(x, {reserved}=None): ...", namespace)  # noqa: S102
    clash = app.task(base=BaseTask, name="clash")(namespace["clash"])

    with pytest.raises(
        TaskArgumentsError, match=rf"named like one of .*: {reserved}\.  .*launch_with_context\(task\.s"
    ):
        launch_with_context(clash, 1, current_user=ALICE)
    launch_with_context(clash.s(1, **{reserved: "theirs"}), current_user=ALICE)

    (message,) = published(app)
    assert (message.args, message.kwargs, message.organization) == ([1], {reserved: "theirs"}, "acme")


def test_a_bound_task_takes_its_arguments_without_self(app: Celery, published: Any) -> None:
    @app.task(base=BaseTask, bind=True, name="bound")
    def bound(self: Any, x: int) -> None: ...

    launch_with_context(bound, 1, current_user=ALICE)
    with pytest.raises(TaskArgumentsError, match=r"bound\(x: 'int'\)"):
        launch_with_context(bound, 1, 2, current_user=ALICE)

    assert [message.args for message in published(app)] == [[1]]


# --- canvases --------------------------------------------------------------------------------------------------


def test_every_part_of_a_canvas_carries_the_tenant(tasks: Tasks, canvas: Any, published: Any, embedded: Any) -> None:
    launch_with_context(canvas, current_user=ALICE)

    messages = published(tasks.app)
    assert messages
    for message in messages:
        assert message.envelope.tenant == ACME
        for part in embedded(message):
            assert decode(find(part["options"].get("headers"))).tenant == ACME, part


def test_every_part_of_a_canvas_runs_for_the_tenant(tasks: Tasks, canvas: Any, work_off: Any) -> None:
    launch_with_context(canvas, current_user=ALICE)
    work_off(tasks.app)

    assert {tenant for _, tenant in tasks.seen} == {ACME}


def test_the_callers_signature_is_not_changed(tasks: Tasks, canvas: Any) -> None:
    before = json.dumps(canvas)

    launch_with_context(canvas, current_user=ALICE)

    assert json.dumps(canvas) == before


def test_a_signature_can_be_launched_again_for_another_tenant(tasks: Tasks, canvas: Any, published: Any) -> None:
    for tenant in (ACME, GLOBEX):
        launch_with_context(canvas, context=tenant)

        assert {message.organization for message in published(tasks.app)} == {tenant.organization_id}


def test_nothing_is_published_if_there_is_no_tenant(tasks: Tasks, canvas: Any, published: Any) -> None:
    with pytest.raises(MissingTenantError):
        launch_with_context(canvas)

    assert published(tasks.app) == []


@pytest.mark.parametrize(
    "mixed",
    [
        pytest.param(lambda t: chain(t.free.si(), t.add.si(1)), id="chain"),
        pytest.param(lambda t: group(t.free.si(), t.free.si(), t.add.si(1)), id="group"),
        pytest.param(lambda t: chord([t.free.si(), t.free.si()], t.add.si(1)), id="chord's body"),
        pytest.param(lambda t: chord([t.free.si(), t.add.si(1)], t.free.si()), id="chord's header"),
        pytest.param(lambda t: t.free.si().set(link=t.add.si(1)), id="link"),
        pytest.param(lambda t: t.free.si().set(link_error=t.on_error.si()), id="link_error"),
        pytest.param(lambda t: chain(t.free.si(), group(t.free.si(), chain(t.free.si(), t.add.si(1)))), id="nested"),
        pytest.param(lambda t: t.add.map([1, 2]), id="map"),
        pytest.param(lambda t: t.add.starmap([(1,), (2,)]), id="starmap"),
        pytest.param(lambda t: t.add.chunks([(1,), (2,)], 1), id="chunks"),
    ],
)
def test_nothing_is_published_if_one_part_needs_a_tenant_and_there_is_none(
    tasks: Tasks, mixed: Callable[[Tasks], Any], published: Any
) -> None:
    with pytest.raises(MissingTenantError, match="needs a tenant, and none is active"):
        launch_with_context(mixed(tasks))

    assert published(tasks.app) == []


def test_nothing_is_published_if_a_link_among_the_options_needs_a_tenant(tasks: Tasks, published: Any) -> None:
    with pytest.raises(MissingTenantError):
        launch_with_context(tasks.free, options={"link": tasks.add.si(1)})

    assert published(tasks.app) == []


def test_the_kind_of_result_is_that_of_the_canvas(tasks: Tasks) -> None:
    one, other = tasks.add.s(1), tasks.add.s(2)

    assert isinstance(launch_with_context(chain(one, other), current_user=ALICE), AsyncResult)
    assert isinstance(launch_with_context(group(one, other), current_user=ALICE), GroupResult)
    assert isinstance(launch_with_context(chord([one, other], tasks.total.s()), current_user=ALICE), AsyncResult)
    assert isinstance(launch_with_context(tasks.add.chunks([(1,), (2,)], 1), current_user=ALICE), GroupResult)


def test_the_results_of_canvases_are_the_ones_celery_gives(tasks: Tasks, work_off: Any) -> None:
    in_chain = launch_with_context(chain(tasks.add.s(1), tasks.add.s(2)), current_user=ALICE)
    in_group = launch_with_context(group(tasks.add.s(1), tasks.add.s(2)), current_user=ALICE)
    in_chord = launch_with_context(chord([tasks.add.s(1), tasks.add.s(2)], tasks.total.s()), current_user=ALICE)
    mapped = launch_with_context(tasks.add.starmap([(1,), (2, 2)]), current_user=ALICE)
    work_off(tasks.app)

    assert [in_chain.get(), in_group.get(), in_chord.get(), mapped.get()] == [4, [2, 3], 5, [2, 4]]


@pytest.mark.parametrize("kind", ["map", "starmap"])
def test_what_is_called_by_a_map_of_one_tenant_is_bound_to_no_other(tasks: Tasks, published: Any, kind: str) -> None:
    def mapped(tenant: TenantContext) -> Any:
        part = tasks.add.s().set(headers={HEADER: encode(Envelope(tenant))})
        return xmap(part, [1], app=tasks.app) if kind == "map" else xstarmap(part, [(1, 2)], app=tasks.app)

    with tenant_scope(ACME):
        with pytest.raises(TenantConflictError, match=f"celery.{kind} calls add in its own context"):
            mapped(GLOBEX).delay()
        mapped(ACME).delay()

    assert [message.task for message in published(tasks.app)] == [f"celery.{kind}"]


def test_a_part_that_is_bound_to_another_tenant_is_refused(tasks: Tasks, published: Any) -> None:
    foreign = tasks.add.s(1).set(headers={HEADER: encode(Envelope(GLOBEX))})

    for canvas in (foreign, chain(tasks.add.s(1), foreign), tasks.add.s(1).set(link=foreign)):
        with pytest.raises(TenantConflictError, match="add is bound to organization globex"):
            launch_with_context(canvas, current_user=ALICE)

    assert published(tasks.app) == []


@pytest.mark.parametrize(
    "headers", [{HEADER: encode(Envelope(GLOBEX))}, {"organization_id": "globex", "user_id": "gus"}]
)
@pytest.mark.parametrize("kind", ["task", "signature", "chain"])
def test_headers_of_another_tenant_among_the_options_are_refused(
    tasks: Tasks, kind: str, headers: dict[str, Any], published: Any
) -> None:
    thing = {"task": tasks.on_error, "signature": tasks.add.s(1), "chain": chain(tasks.add.s(1), tasks.add.s(2))}[kind]

    with pytest.raises(TenantConflictError):
        launch_with_context(thing, current_user=ALICE, options={"headers": headers})

    assert published(tasks.app) == []


@pytest.mark.parametrize(
    "headers", [{HEADER: encode(Envelope(GLOBEX))}, {"organization_id": "globex", "user_id": "gus"}]
)
def test_parts_that_are_bound_already_keep_their_tenant_if_the_launcher_has_none(
    tasks: Tasks, headers: dict[str, Any], published: Any
) -> None:
    bound = tasks.add.s(1).set(headers=headers)

    launch_with_context(bound)
    launch_with_context(group(bound, bound))

    assert [message.envelope.tenant for message in published(tasks.app)] == [GLOBEX] * 3


def test_headers_among_the_options_leave_every_part_of_a_canvas_bound(tasks: Tasks, work_off: Any) -> None:
    canvas = chord([tasks.add.s(1), tasks.add.s(2)], tasks.total.s())

    launch_with_context(canvas, context=ACME, options={"headers": {"x": 1}})
    work_off(tasks.app)

    assert tasks.seen == [("add", ACME), ("add", ACME), ("total", ACME)]


def test_headers_among_the_options_travel_along(tasks: Tasks, published: Any) -> None:
    headers = {"x": 1}

    for tenant in (ACME, GLOBEX):
        launch_with_context(tasks.add, 1, context=tenant, options={"headers": headers})

    assert [(message.headers["x"], message.organization) for message in published(tasks.app)] == [
        (1, "acme"),
        (1, "globex"),
    ]
    assert headers == {"x": 1}


@pytest.mark.parametrize(
    "canvas",
    [
        pytest.param(lambda t, part: part, id="signature"),
        pytest.param(lambda t, part: chain(part, t.add.s(1)), id="first of a chain"),
        pytest.param(lambda t, part: chain(t.add.s(1), part), id="last of a chain"),
        pytest.param(lambda t, part: group(part, t.add.s(1)), id="group"),
        pytest.param(lambda t, part: chord([part, t.add.s(1)], t.total.s()), id="chord's header"),
        pytest.param(lambda t, part: chord([t.add.s(1)], part), id="chord's body"),
        pytest.param(lambda t, part: t.add.s(1).set(link=part), id="link"),
    ],
)
def test_headers_of_a_part_stay_on_that_part(
    tasks: Tasks, canvas: Callable[[Tasks, Any], Any], published: Any, embedded: Any
) -> None:
    launch_with_context(canvas(tasks, tasks.add.s(2).set(headers={"x": 1})), current_user=ALICE)

    messages = published(tasks.app)
    carried = [message.headers for message in messages]
    carried += [part["options"]["headers"] for message in messages for part in embedded(message)]
    assert {headers["x"] for headers in carried if "x" in headers} == {1}
    assert all(decode(find(headers)).tenant == ACME for headers in carried)


# --- signatures as dicts ---------------------------------------------------------------------------------------


def test_a_signature_that_has_been_stored_as_json_can_be_launched(tasks: Tasks, canvas: Any, work_off: Any) -> None:
    stored = json.loads(json.dumps(canvas))
    before = json.dumps(stored)
    tasks.app.set_current()  # a dict does not know its application

    launch_with_context(stored, current_user=ALICE)
    work_off(tasks.app)

    assert {tenant for _, tenant in tasks.seen} == {ACME}
    assert json.dumps(stored) == before


def test_a_signature_made_from_a_name_belongs_to_the_current_application(tasks: Tasks, published: Any) -> None:
    tasks.app.set_current()

    launch_with_context(signature("add", (1,)), current_user=ALICE)
    launch_with_context(signature("elsewhere", (1,)), current_user=ALICE)

    assert [(message.task, message.organization) for message in published(tasks.app)] == [
        ("add", "acme"),
        ("elsewhere", "acme"),
    ]


def test_of_several_configured_applications_the_current_one_is_meant(
    tasks: Tasks, make_app: Callable[..., Celery], published: Any
) -> None:
    other = make_app()
    tasks.app.set_current()

    launch_with_context(json.loads(json.dumps(tasks.add.s(1))), current_user=ALICE)
    launch_with_context(signature("add", (1,)), current_user=ALICE)

    assert [message.organization for message in published(tasks.app)] == ["acme", "acme"]
    assert published(other) == []


# --- options ---------------------------------------------------------------------------------------------------


def test_options_are_celerys_own(tasks: Tasks, published: Any) -> None:
    options = {
        "queue": "elsewhere-in-launch-tests",
        "countdown": 3600,
        "expires": 7200,
        "priority": 3,
        "task_id": "my-id",
    }
    given = dict(options)

    before = datetime.datetime.now(datetime.UTC)
    launched = launch_with_context(tasks.add, 1, current_user=ALICE, options=options)

    (message,) = published(tasks.app, options["queue"])
    eta = datetime.datetime.fromisoformat(message.headers["eta"])
    assert datetime.timedelta(seconds=3600) <= eta - before < datetime.timedelta(seconds=3660)
    assert message.headers["expires"] is not None
    assert message.headers["id"] == launched.id == "my-id"
    assert message.organization == "acme"
    assert options == given
    assert published(tasks.app) == []


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("countdwn", "countdown"),
        ("expire", "expires"),
        ("priorty", "priority"),
        ("queues", "queue"),
        ("header", "headers"),
        ("link_errors", "link_error"),
        ("routingkey", "routing_key"),
    ],
)
def test_an_option_that_is_called_almost_like_one_of_celerys_is_refused(
    tasks: Tasks, misspelt: str, meant: str, published: Any
) -> None:
    with pytest.raises(TaskArgumentsError, match=rf"no option '{misspelt}': did you mean {meant}\?"):
        launch_with_context(tasks.add, 1, current_user=ALICE, options={misspelt: 3600})

    assert published(tasks.app) == []


@pytest.mark.parametrize("options", ["queue", "", ["queue"], 5])
def test_options_that_are_no_mapping_are_refused(tasks: Tasks, options: Any, published: Any) -> None:
    with pytest.raises(TaskArgumentsError, match=r"options= is a mapping of Celery's options, such as .* not "):
        launch_with_context(tasks.add, 1, current_user=ALICE, options=options)

    assert published(tasks.app) == []


def test_options_that_routers_brokers_and_stamps_have_of_their_own_are_left_alone(tasks: Tasks, published: Any) -> None:
    stamp = {"stamped_headers": ["queues"], "queues": "mine"}
    properties = {"expiration": 60, "delivery_mode": 1, "user_id": "ann", "MessageGroupId": "acme", "region": "eu"}

    launch_with_context(tasks.add, 1, current_user=ALICE, options={**stamp, **properties, "ignore_result": True})

    (message,) = published(tasks.app)
    assert message.headers["stamps"] == {"queues": "mine"}
    assert message.headers["ignore_result"] is True


@pytest.mark.parametrize("kind", ["signature", "chain", "chord"])
def test_options_of_a_canvas_are_celerys_own(tasks: Tasks, kind: str, published: Any) -> None:
    canvas = {
        "signature": tasks.add.s(1),
        "chain": chain(tasks.add.s(1), tasks.add.s(2)),
        "chord": chord([tasks.add.s(1)], tasks.total.s()),
    }[kind]
    queue = "elsewhere-in-launch-tests"

    launched = launch_with_context(canvas, current_user=ALICE, options={"task_id": f"my-{kind}", "queue": queue})

    assert launched.id == f"my-{kind}"
    assert [message.organization for message in published(tasks.app, queue)] in (["acme"], [])
    published(tasks.app)


@pytest.mark.parametrize("key", ["link", "link_error"])
@pytest.mark.parametrize("several", [False, True])
def test_links_among_the_options_carry_the_tenant_too(
    tasks: Tasks, key: str, several: bool, published: Any, embedded: Any
) -> None:
    link = tasks.add.s(2)
    before = json.dumps(link)

    launch_with_context(tasks.add, 1, current_user=ALICE, options={key: [link, link] if several else link})

    (message,) = published(tasks.app)
    parts = embedded(message)
    assert len(parts) == (2 if several else 1)
    for part in parts:
        assert HEADER in (part["options"].get("headers") or {})
    assert json.dumps(link) == before


# --- eagerly, and from an event loop ---------------------------------------------------------------------------


def test_an_eager_launch_runs_every_part_for_the_tenant(tasks: Tasks, canvas: Any) -> None:
    tasks.app.conf.task_always_eager = True

    with suppress(KeyError):  # of the task that fails: a chord run eagerly raises it
        launch_with_context(canvas, current_user=ALICE)

    assert {tenant for _, tenant in tasks.seen} == {ACME}
    assert current_tenant() is None


def test_a_launch_from_a_running_event_loop_does_not_block_it(tasks: Tasks, published: Any) -> None:
    loop_ran, threads = threading.Event(), []

    @tasks.app.task(base=BaseTask, name="slow")
    def slow() -> None: ...

    send_task = tasks.app.send_task

    def slow_send_task(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        assert loop_ran.wait(10), "waited 10 seconds for the event loop to run meanwhile"
        return send_task(*args, **options)

    tasks.app.send_task = slow_send_task  # type: ignore[method-assign]

    async def main() -> AsyncResult[Any]:
        launching = asyncio.ensure_future(alaunch_with_context(slow, current_user=ALICE))
        await asyncio.sleep(0)
        loop_ran.set()
        return await launching

    launched = asyncio.run(main())
    tasks.app.send_task = send_task  # type: ignore[method-assign]

    (message,) = published(tasks.app)
    assert (message.headers["id"], message.organization) == (launched.id, "acme")
    assert threads != [threading.current_thread()]


def test_an_async_launch_uses_the_active_tenant_and_variables(
    tasks: Tasks, locale: ContextVar[str], published: Any
) -> None:
    async def main() -> None:
        locale.set("de")
        async with tenant_scope(ACME):
            await alaunch_with_context(tasks.add, 1, y=2, options={"priority": 1})

    asyncio.run(main())

    (message,) = published(tasks.app)
    assert message.envelope == Envelope(ACME, {"locale": "de"})
    assert (message.args, message.kwargs) == ([1], {"y": 2})


@pytest.mark.parametrize(
    ("args", "arguments", "error"),
    [
        ((1,), {}, MissingTenantError),
        ((), {"current_user": ALICE}, TaskArgumentsError),
        ((1,), {"current_user": ALICE, "context": GLOBEX}, TenantConflictError),
        ((1,), {"current_user": ALICE, "session": object()}, NotSupportedError),
    ],
)
def test_an_async_launch_refuses_what_a_launch_refuses(
    tasks: Tasks, args: tuple[Any, ...], arguments: dict[str, Any], error: type[Exception], published: Any
) -> None:
    with pytest.raises(error):
        asyncio.run(alaunch_with_context(tasks.add, *args, **arguments))

    assert published(tasks.app) == []


# --- arguments of parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "canvas",
    [
        lambda t: t.add.s(),
        lambda t: t.add.s(1, 2, 3),
        lambda t: group(t.add.s(1, 2), t.add.s()),
        lambda t: chord([t.add.s(1, 2)], t.add.s(1, 2)),
        lambda t: chord([t.add.s(1, 2, 3)], t.total.s()),
        lambda t: chain(t.add.s(1), t.add.s(1, 2)),
        lambda t: chain(t.add.s(1), t.add.si()),
        lambda t: t.add.s(1).set(link=t.add.s(1, 2)),
    ],
)
def test_nothing_is_published_if_the_arguments_of_one_part_do_not_fit(
    tasks: Tasks, canvas: Callable[[Tasks], Any], published: Any
) -> None:
    with pytest.raises(TaskArgumentsError, match="is called as"):
        launch_with_context(canvas(tasks), current_user=ALICE)

    assert published(tasks.app) == []


def test_an_empty_chain_is_refused(tasks: Tasks) -> None:
    with pytest.raises(TaskArgumentsError, match="empty chain"):
        launch_with_context(chain(), current_user=ALICE)


def test_likely_mistakes_are_answered_with_what_was_meant(app: Celery, tasks: Tasks) -> None:
    @app.task(base=BaseTask, name="unbound")
    def unbound(self: Any, x: int) -> None: ...

    with pytest.raises(TaskArgumentsError, match=r"needs @app\.task\(bind=True\)"):
        launch_with_context(unbound, 1, current_user=ALICE)
    with pytest.raises(TaskArgumentsError, match="current_user="):
        launch_with_context(tasks.add, 1, user=ALICE)
    with pytest.raises(TaskArgumentsError, match=r'given as options=\{"countdown": 60, "queue": \.\.\.\}$'):
        launch_with_context(tasks.add, 1, current_user=ALICE, countdown=60, queue="mail")
