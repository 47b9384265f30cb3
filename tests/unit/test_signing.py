"""Signed context: what is not signed, or for something else, never runs; whoever has a key is believed."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, Task, chain, chord, group
from celery.signals import worker_init, worker_shutdown
from hypothesis import given
from hypothesis import strategies as st
from kombu.message import Message

from rhesis_tasks import (
    BaseTask,
    TenantContext,
    configure,
    context_headers,
    current_tenant,
    launch_with_context,
    tenant_scope,
)
from rhesis_tasks.errors import SignatureError, TaskDefinitionError
from rhesis_tasks.headers import HEADER, Envelope, encode
from rhesis_tasks.signing import Signer

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")
OLD, NEW, FOREIGN = "an old key, of the year", b"a new key, of yesterday", "somebody else's own key"

Seen = list[Any]
MakeSigned = Callable[..., Celery]


@pytest.fixture
def seen() -> Seen:
    """What the bodies of tasks noted."""
    return []


@pytest.fixture
def signed(make_app: Callable[..., Celery], seen: Seen) -> MakeSigned:
    """Makes applications with signing keys and the same tasks, on one queue."""

    def make(*keys: str | bytes, queue: str = "signed") -> Celery:
        app = make_app(configured=False, task_default_queue=queue)
        configure(app, signing_keys=keys)

        @app.task(base=BaseTask, bind=True, name="note")
        def note(self: BaseTask, *_: Any, organization_id: str | None = None) -> None:
            seen.append(self.tenant.organization_id)

        @app.task(base=BaseTask, bind=True, name="stubborn")
        def stubborn(self: BaseTask) -> None:
            seen.append(self.tenant.organization_id)
            if self.request.retries < 2:
                raise self.retry(countdown=0)

        @app.task(base=BaseTask, name="sweep", system=True)
        def sweep() -> None:
            seen.append(current_tenant())

        @app.task(base=BaseTask, name="anybody", tenant_required=False)
        def anybody(organization_id: str | None = None) -> None:
            seen.append(current_tenant())

        @app.task(name="inline")
        def inline(request: Any, error: Any, traceback: Any) -> None:
            seen.append("inline")

        @app.task(name="plain")
        def plain(*_: Any) -> None:
            seen.append(current_tenant())

        return app

    return make


@pytest.fixture
def app(signed: MakeSigned) -> Celery:
    return signed(NEW, OLD)


@pytest.fixture
def stranger(app: Celery, make_app: Callable[..., Celery]) -> Celery:
    """Somebody who can write to the queue and has no key."""
    return make_app(configured=False, task_default_queue="signed")


def task(app: Celery, name: str) -> Any:
    return app.tasks[name]


# --- what is signed runs -----------------------------------------------------------------------------------------


LAUNCHES: dict[str, tuple[Callable[[Celery], Any], int]] = {
    "delay": (lambda app: task(app, "note").delay(), 1),
    "send_task": (lambda app: app.send_task("note"), 1),
    "launch_with_context": (lambda app: launch_with_context(task(app, "note")), 1),
    "a signature": (lambda app: launch_with_context(task(app, "note").s()), 1),
    "retries": (lambda app: task(app, "stubborn").delay(), 3),
    "chain": (lambda app: chain(*[task(app, "note").si()] * 4).delay(), 4),
    "launched chain": (lambda app: launch_with_context(chain(*[task(app, "note").si()] * 4)), 4),
    "group": (lambda app: group([task(app, "note").si()] * 2).delay(), 2),
    "chord": (lambda app: chord([task(app, "note").si()] * 2, task(app, "note").si()).delay(), 3),
    "launched chord": (
        lambda app: launch_with_context(chord([task(app, "note").si()] * 2, task(app, "note").si())),
        3,
    ),
    "link": (lambda app: task(app, "note").apply_async(link=task(app, "note").si()), 2),
    "headers of the application's own": (
        lambda app: task(app, "note").apply_async(headers={HEADER: dict(encode(Envelope(ACME)))}),
        1,
    ),
    "eager": (lambda app: task(app, "note").apply(throw=True), 1),
}


@pytest.mark.parametrize(("launch", "bodies"), LAUNCHES.values(), ids=LAUNCHES)
def test_what_we_launch_is_believed(
    app: Celery, launch: Callable[[Celery], Any], bodies: int, work_off: Any, seen: Seen
) -> None:
    with tenant_scope(ACME):
        launch(app)
    work_off(app)

    assert seen == ["acme"] * bodies


def test_work_of_no_tenant_is_signed_too(app: Celery, work_off: Any, seen: Seen) -> None:
    for name in ("sweep", "anybody", "plain"):
        task(app, name).delay()
    work_off(app)

    assert seen == [None] * 3


@pytest.mark.parametrize("publishing", [(OLD,), (NEW,), (NEW, OLD), (FOREIGN, OLD)])
def test_keys_are_rotated_by_the_list(
    signed: MakeSigned, publishing: tuple[Any, ...], work_off: Any, seen: Seen
) -> None:
    with tenant_scope(ACME):
        task(signed(*publishing), "note").delay()
    believed = publishing[0] != FOREIGN
    work_off(signed(NEW, OLD))

    assert seen == ["acme"] * believed


def test_what_only_an_old_key_signed_is_refused_once_it_is_dropped(
    signed: MakeSigned, work_off: Any, seen: Seen
) -> None:
    with tenant_scope(ACME):
        task(signed(OLD), "note").delay()
    work_off(signed(NEW))

    assert seen == []


# --- what is not never does --------------------------------------------------------------------------------------


def plain(tenant: TenantContext) -> dict[str, Any]:
    """The headers for a tenant as they come in a message, unsigned."""
    return {HEADER: dict(encode(Envelope(tenant)))}


HEADERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "unsigned": {HEADER: dict(encode(Envelope(ACME)))},
    "flat": {"organization_id": "acme"},
    "unsigned for nobody": {HEADER: encode(Envelope())},
    "ours and flat, of two tenants": {HEADER: dict(encode(Envelope(ACME))), "organization_id": "globex"},
    "garbage": {HEADER: "garbage"},
    "empty signature": {HEADER: {**encode(Envelope(ACME)), "sig": ""}},
    "no text": {HEADER: {**encode(Envelope(ACME)), "sig": 7}},
    "of a foreign key": {HEADER: Signer([FOREIGN]).sign(encode(Envelope(ACME)), "note", "forged")},
    "for another task": {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "other", "forged")},
    "for another id": {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "note", "other")},
    "of a later part": {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "note", None)},
    "for another tenant": {
        HEADER: {**Signer([NEW]).sign(encode(Envelope(ACME)), "note", "forged"), "organization_id": "globex"}
    },
    "with a variable more": {
        HEADER: {**Signer([NEW]).sign(encode(Envelope(ACME)), "note", "forged"), "vars": {"locale": "de"}}
    },
    "a state of ours": {"rhesis_tasks_state": {"is_running": True}, HEADER: dict(encode(Envelope(ACME)))},
}


@pytest.mark.parametrize("name", ["note", "sweep", "anybody", "plain"])
@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_what_nobody_with_a_key_signed_never_runs(
    app: Celery,
    stranger: Celery,
    name: str,
    headers: dict[str, Any] | None,
    work_off: Any,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stranger.send_task(name, headers=headers, task_id="forged")
    work_off(app)

    result = app.AsyncResult("forged")
    assert seen == []
    assert result.state == "FAILURE"
    assert isinstance(result.result, SignatureError)
    [record] = [record for record in caplog.records if record.name == "rhesis_tasks.security"]
    assert record.levelno == logging.WARNING
    assert name in record.getMessage()
    for secret in (OLD, NEW.decode(), "'sig'"):
        assert secret not in caplog.text + str(result.result)


def test_arguments_name_no_tenant_where_the_context_is_signed(
    app: Celery, stranger: Celery, work_off: Any, seen: Seen
) -> None:
    header = {HEADER: Signer([NEW]).sign(encode(Envelope()), "note", "smuggled")}
    stranger.send_task("note", kwargs={"organization_id": "acme"}, headers=header, task_id="smuggled")
    work_off(app)

    assert seen == []


def test_arguments_of_a_later_part_that_is_nobodys_name_no_tenant(
    app: Celery, stranger: Celery, taken: Any, work_off: Any, seen: Seen
) -> None:
    chain(task(app, "sweep").si(), task(app, "anybody").si()).delay()
    message = taken(app)[0]
    args, kwargs, embed = message.payload
    embed["chain"][0]["kwargs"] = {"organization_id": "acme"}
    push(stranger, dict(message.headers), [args, kwargs, embed])
    work_off(app)

    assert seen == [None, None]


def test_a_publisher_with_a_key_signs_the_tenant_that_arguments_name(app: Celery, work_off: Any, seen: Seen) -> None:
    task(app, "note").delay(organization_id="acme")
    work_off(app)

    assert seen == ["acme"]


def steal(app: Celery, launch: Callable[[], Any], taken: Callable[[Celery], list[Message]]) -> tuple[Any, ...]:
    """The headers, arguments and embedded signatures of a message of acme's."""
    with tenant_scope(ACME):
        launch()
    message = taken(app)[0]
    return (dict(message.headers), *message.payload)


@pytest.fixture
def taken() -> Callable[[Celery], list[Message]]:
    """Takes the messages of an application out of its queue."""

    def take(app: Celery) -> list[Message]:
        with app.connection_for_read() as connection:
            queue = app.amqp.queues[app.conf.task_default_queue].bind(connection.default_channel)
            queue.declare()
            return list(iter(lambda: queue.get(no_ack=True), None))

    return take


def push(app: Celery, headers: dict[str, Any], body: Any) -> None:
    """Write a message by hand, as whoever can write to the broker."""
    with app.connection_for_write() as connection:
        queue = app.amqp.queues[app.conf.task_default_queue]
        producer = connection.Producer(serializer="json", exchange=queue.exchange, routing_key=queue.routing_key)
        producer.publish(body, declare=[queue], headers=headers)


PARTS: dict[str, Callable[[Celery], Any]] = {
    "unsigned": lambda app: app.signature("note", immutable=True, headers=plain(ACME)),
    "flat": lambda app: app.signature("note", immutable=True, headers={"organization_id": "acme"}),
    "without a header": lambda app: app.signature("sweep", immutable=True),
    "with ids among its arguments": lambda app: app.signature(
        "note", kwargs={"organization_id": "acme"}, immutable=True
    ),
    "of a foreign key": lambda app: app.signature("note", immutable=True, headers=HEADERS["of a foreign key"]),
    "for another task": lambda app: app.signature("note", immutable=True, headers=HEADERS["for another task"]),
    "a chain": lambda app: chain(app.signature("plain", immutable=True), app.signature("sweep", immutable=True)),
    "a map": lambda app: app.signature(
        "celery.map", kwargs={"task": app.signature("plain"), "it": [1]}, immutable=True
    ),
    "called as a function": lambda app: app.signature("inline"),
    "garbage": lambda _: {"task": ["note"], "options": 7, "subtask_type": "chain"},
}


@pytest.mark.parametrize("genuine", [True, False], ids=["of a genuine message", "of a forged message"])
@pytest.mark.parametrize("where", ["callbacks", "errbacks", "chain", "chord"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_somebody_has_hung_on_a_message_never_runs(
    app: Celery,
    stranger: Celery,
    taken: Any,
    part: Callable[[Celery], Any],
    where: str,
    genuine: bool,
    work_off: Any,
    seen: Seen,
) -> None:
    headers, args, kwargs, embed = steal(app, lambda: task(app, "note").delay(), taken)
    if not genuine:
        headers = {**headers, HEADER: plain(ACME)[HEADER]}
    later = part(stranger)
    push(stranger, headers, [args, kwargs, {**embed, where: later if where == "chord" else [later]}])
    work_off(app)

    assert seen == []


def test_a_message_is_no_other_message(app: Celery, stranger: Celery, taken: Any, work_off: Any, seen: Seen) -> None:
    note = task(app, "note")
    headers, args, kwargs, embed = steal(app, lambda: chain(note.si(), task(app, "anybody").si()).delay(), taken)
    later = embed["chain"][0]["options"]["headers"][HEADER]
    push(stranger, {**headers, "id": "other"}, [args, kwargs, {"id": headers["id"]}])
    for embedded_id in ({}, {"id": None}, {"id": ""}):
        push(stranger, {**headers, "task": "anybody", "id": "new", HEADER: later}, [[], {}, embedded_id])
    work_off(app)

    assert seen == []


def test_a_message_of_celerys_own_that_calls_a_task_inside_calls_no_other(
    app: Celery, stranger: Celery, taken: Any, work_off: Any, seen: Seen
) -> None:
    headers, args, kwargs, embed = steal(app, lambda: task(app, "note").map([1]).delay(), taken)
    push(stranger, headers, [args, {**kwargs, "task": stranger.signature("plain")}, embed])
    work_off(app)
    assert seen == []

    push(stranger, headers, [args, kwargs, embed])
    work_off(app)
    assert seen == ["acme"]


def test_the_body_of_a_polled_chord_is_no_other(
    app: Celery, stranger: Celery, taken: Any, work_off: Any, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    unlock, body = task(app, "celery.chord_unlock"), task(app, "note").si()
    headers, (group_id, _), kwargs, embed = steal(app, lambda: unlock.apply_async(("g", body), {"result": []}), taken)
    push(stranger, headers, [[group_id, stranger.signature("sweep", immutable=True)], kwargs, embed])
    work_off(app)

    assert seen == []
    assert caplog.records[0].name == "rhesis_tasks.security"


def test_a_body_that_passes_on_headers_that_came_to_it_is_told_to_open_a_scope(
    app: Celery, work_off: Any, seen: Seen
) -> None:
    @app.task(base=BaseTask, name="relay")
    def relay(headers: dict[str, Any]) -> None:
        with pytest.raises(SignatureError, match="not signed"):
            task(app, "note").apply_async(headers=headers)
        with tenant_scope(GLOBEX):
            task(app, "note").delay()
        task(app, "note").apply_async(headers=context_headers(ACME))

    with tenant_scope(ACME):
        relay.delay(plain(GLOBEX))
    work_off(app)

    assert seen == ["globex", "acme"]


class Starting:
    """What Celery sends worker_init with."""

    def __init__(self, app: Celery) -> None:
        self.app = app


class Foreign(Task):  # type: ignore[type-arg]
    """A task class of somebody who does not know us."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def test_a_worker_with_tasks_that_check_nothing_does_not_start(app: Celery) -> None:
    app.task(base=Foreign, name="foreign")(lambda_free)

    with pytest.raises(SystemExit, match="its tasks foreign do not check signatures"):
        worker_init.send(sender=Starting(app))


def test_a_worker_that_publishes_before_it_checks_does_not_start(app: Celery) -> None:
    app.conf.worker_deduplicate_successful_tasks = True

    with pytest.raises(SystemExit, match="worker_deduplicate_successful_tasks"):
        worker_init.send(sender=Starting(app))


def test_in_a_workers_process_nothing_unsigned_is_signed_though_no_task_runs(app: Celery, published: Any) -> None:
    worker_init.send(sender=Starting(app))
    try:
        with pytest.raises(SignatureError):
            task(app, "note").apply_async(headers=plain(ACME))
    finally:
        worker_shutdown.send(sender=Starting(app))

    assert published(app) == []
    task(app, "note").apply_async(headers=plain(ACME))
    assert len(published(app)) == 1


def lambda_free() -> None: ...


def test_a_task_class_whose_call_would_refuse_nothing_is_refused() -> None:
    with pytest.raises(TaskDefinitionError, match="comes before that of rhesis-tasks in task class Mixed"):
        type("Mixed", (Foreign, BaseTask), {"abstract": True})

    type("Fine", (BaseTask, Foreign), {"abstract": True})


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_a_header_that_is_too_deep_to_be_checked_is_refused() -> None:
    assert not Signer([NEW]).accepts({**nested(100_000), "sig": "0" * 64}, "note", "1")


def test_keys_are_not_shown_pickled_or_kept_by_the_configuration(app: Celery) -> None:
    from rhesis_tasks import app as module

    assert NEW.decode() not in repr(module._configured) + repr(dict(module._configured)[app])
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(Signer([NEW]))


header_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(header=header_values, name=st.text(max_size=5), task_id=st.none() | st.text(max_size=5))
def test_no_garbage_is_ever_accepted(header: Any, name: str, task_id: str | None) -> None:
    signer = Signer([NEW, OLD])

    assert not signer.accepts(header, name, task_id)
    if isinstance(header, dict):
        assert not signer.accepts({**header, "sig": "0" * 64}, name, task_id)
        assert signer.accepts(signer.sign(header, name, task_id), name, task_id)


@pytest.mark.parametrize(("signed_for", "asked"), [(None, ""), ("", None), (None, "None")])
def test_a_later_part_is_no_message_whatever_its_id(signed_for: str | None, asked: str | None) -> None:
    signer = Signer([NEW])
    header = signer.sign(encode(Envelope(ACME)), "note", signed_for)

    assert signer.accepts(header, "note", signed_for)
    assert not signer.accepts(header, "note", asked)


def test_a_signer_does_not_show_its_keys() -> None:
    assert "key" not in repr(Signer([NEW, OLD])).replace("2 keys", "")
