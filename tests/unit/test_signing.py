"""Signed context: what is not signed, or for something else, never runs; whoever has a key is believed."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, Task, chain, chord, group
from hypothesis import example, given
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
from rhesis_tasks.errors import ConfigurationError, SignatureError, TaskArgumentsError, TaskDefinitionError
from rhesis_tasks.guard import Guard, refuse_to_start
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
        def sweep(*_: Any) -> None:
            seen.append(current_tenant())

        @app.task(base=BaseTask, name="anybody", tenant_required=False)
        def anybody(*_: Any, organization_id: str | None = None) -> None:
            seen.append(current_tenant())

        @app.task(base=BaseTask, name="fails", tenant_required=False)
        def fails(*_: Any) -> None:
            seen.append("fails")
            raise ValueError

        @app.task(base=BaseTask, name="relay")
        def relay(*_: Any) -> None:
            seen.append("relay")

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


@dataclasses.dataclass
class Letter:
    """A message, to be changed and sent by whoever can write to the broker."""

    headers: dict[str, Any]
    body: list[Any]
    properties: dict[str, Any]

    @property
    def context(self) -> dict[str, Any]:
        return self.headers[HEADER]  # type: ignore[no-any-return]

    def send(self, app: Celery, **changes: Any) -> None:
        with app.connection_for_write() as connection:
            queue = app.amqp.queues[app.conf.task_default_queue]
            producer = connection.Producer(exchange=queue.exchange, routing_key=queue.routing_key)
            sent = {"serializer": "json", **self.properties, **changes}
            producer.publish(self.body, declare=[queue], headers=dict(self.headers), **sent)


@pytest.fixture
def intercepted() -> Callable[..., Letter]:
    """Launches something for acme, and takes its message out of the queue."""

    def intercept(app: Celery, launch: Callable[[], Any]) -> Letter:
        with tenant_scope(ACME):
            launch()
        with app.connection_for_read() as connection:
            queue = app.amqp.queues[app.conf.task_default_queue].bind(connection.default_channel)
            message = queue.get(no_ack=True)
        names = ("correlation_id", "reply_to")
        properties = {name: message.properties[name] for name in names if name in message.properties}
        return Letter(dict(message.headers), list(message.payload), properties)

    return intercept


def test_a_message_that_is_sent_again_as_it_was_is_believed(
    app: Celery, stranger: Celery, intercepted: Any, work_off: Any, seen: Seen
) -> None:
    letter = intercepted(app, lambda: task(app, "note").delay(1))
    letter.send(stranger)
    letter.send(stranger, compression="gzip")
    work_off(app)

    assert seen == ["acme"] * 2


def evil(app: Celery) -> Any:
    return app.signature("sweep", immutable=True)


CHANGES: dict[str, Callable[[Letter, Celery], Any]] = {
    "no context": lambda letter, _: letter.headers.pop(HEADER),
    "no signature": lambda letter, _: letter.context.pop("sig"),
    "empty signature": lambda letter, _: letter.context.update(sig=""),
    "no text": lambda letter, _: letter.context.update(sig=7),
    "signature of a stranger": lambda letter, _: letter.context.update(sig="0" * 64),
    "garbage": lambda letter, _: letter.headers.update({HEADER: "garbage"}),
    "another tenant": lambda letter, _: letter.context.update(organization_id="globex"),
    "another user": lambda letter, _: letter.context.update(user_id="gus"),
    "a variable more": lambda letter, _: letter.context.update(vars={"locale": "de"}),
    "a newer version": lambda letter, _: letter.context.update(v=2),
    "another task": lambda letter, _: letter.headers.update(task="relay"),
    "another id": lambda letter, _: letter.headers.update(id="other"),
    "expiry": lambda letter, _: letter.headers.update(expires="2020-01-01T00:00:00+00:00"),
    "an ETA that cannot be": lambda letter, _: letter.headers.update(eta="0001-01-01T00:00:00+14:00"),
    "stamps": lambda letter, app: letter.headers.update(stamped_headers=["link"], stamps={"link": [evil(app)]}),
    "other arguments": lambda letter, _: letter.body[0].append(2),
    "other keywords": lambda letter, _: letter.body[1].update(organization_id="acme"),
    "a callback": lambda letter, app: letter.body[2].update(callbacks=[evil(app)]),
    "an error callback": lambda letter, app: letter.body[2].update(errbacks=[evil(app)]),
    "an error callback that is called": lambda letter, app: letter.body[2].update(errbacks=[app.signature("inline")]),
    "a chain": lambda letter, app: letter.body[2].update(chain=[evil(app)]),
    "a chain of nothing": lambda letter, _: letter.body[2].update(
        chain=[
            {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": []}, "options": {"task_id": "hers"}}
        ]
    ),
    "a chord's body": lambda letter, app: letter.body[2].update(chord=evil(app)),
    "delivery": lambda letter, _: letter.body[2].update(delivery_info="x"),
    "a garbled body": lambda letter, _: letter.body.clear(),
    "where to reply": lambda letter, _: letter.properties.update(reply_to="mine"),
}


@pytest.mark.parametrize("name", ["note", "sweep", "anybody", "plain", "fails"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_nobody_with_a_key_sent_never_runs(
    app: Celery,
    stranger: Celery,
    intercepted: Any,
    name: str,
    change: Callable[[Letter, Celery], Any],
    work_off: Any,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> None:
    letter = intercepted(app, lambda: task(app, name).delay(1))
    change(letter, stranger)
    letter.send(stranger)
    work_off(app)

    result = app.AsyncResult(letter.headers["id"])
    assert seen == []
    assert result.state == "FAILURE"
    assert isinstance(result.result, SignatureError)
    assert app.AsyncResult("hers").state == "PENDING"
    [record] = [record for record in caplog.records if record.name == "rhesis_tasks.security"]
    assert record.levelno == logging.WARNING
    assert letter.headers["task"] in record.getMessage()
    for secret in (OLD, NEW.decode(), "'sig'"):
        assert secret not in caplog.text + str(result.result)


ADDITIONS: dict[str, Callable[[Letter, Celery], Any]] = {
    "too deep": lambda letter, _: letter.headers.update(deep=nested(2_000)),
    "flat headers": lambda letter, _: letter.headers.update(organization_id="globex"),
    "nested headers": lambda letter, _: letter.headers.update(headers={"organization_id": "globex"}),
    "a state of ours": lambda letter, _: letter.headers.update(rhesis_tasks_state={"is_running": True}),
    "a chain in the headers": lambda letter, app: letter.headers.update(chain=[evil(app)]),
    "a name that hides a method": lambda letter, _: letter.headers.update(get=1),
    "what Redis adds": lambda letter, _: letter.headers.update(redelivered=True),
    "a trace": lambda letter, _: letter.headers.update(traceparent="00-1-1-01"),
}


@pytest.mark.parametrize("addition", ADDITIONS.values(), ids=ADDITIONS)
def test_headers_that_are_added_on_the_way_are_nothing_to_the_task(
    app: Celery,
    stranger: Celery,
    intercepted: Any,
    addition: Callable[[Letter, Celery], Any],
    work_off: Any,
    seen: Seen,
) -> None:
    letter = intercepted(app, lambda: task(app, "note").delay(1))
    addition(letter, stranger)
    letter.send(stranger)

    assert work_off(app) == ["note"]
    assert seen == ["acme"]
    assert app.AsyncResult(letter.headers["id"]).state == "SUCCESS"


def test_headers_that_a_broker_may_change_are_refused_where_they_are_given(app: Celery) -> None:
    with tenant_scope(ACME), pytest.raises(TaskArgumentsError, match="text, numbers, bool, None, lists and mappings"):
        task(app, "note").apply_async(headers={"price": Decimal("1.50")})


def test_ids_that_are_no_text_are_made_text(app: Celery, work_off: Any, seen: Seen) -> None:
    with tenant_scope(ACME):
        result = task(app, "note").apply_async(task_id=UUID(int=7), headers={1: "a"})
    work_off(app)

    assert seen == ["acme"]
    assert result.id == str(UUID(int=7))


@pytest.mark.parametrize("keys", [(), (FOREIGN,)], ids=["no key", "a key of its own"])
def test_another_applications_messages_never_run(
    signed: MakeSigned, make_app: Callable[..., Celery], app: Celery, keys: Any, work_off: Any, seen: Seen
) -> None:
    other = signed(*keys) if keys else make_app(task_default_queue="signed")
    with tenant_scope(ACME):
        chain(other.signature("note"), other.signature("note")).delay()
        context = context_headers(ACME)
        other.send_task("note", headers=context)
    work_off(app)

    assert seen == []


def test_content_is_not_read_another_way(
    app: Celery, stranger: Celery, intercepted: Any, work_off: Any, seen: Seen
) -> None:
    app.conf.accept_content = ["json", "yaml"]
    letter = intercepted(app, lambda: task(app, "note").delay(1))
    letter.body = json.dumps(letter.body)  # type: ignore[assignment]
    letter.send(stranger, serializer=None, content_type="application/x-yaml", content_encoding="utf-8")
    work_off(app)
    assert seen == []

    letter.send(stranger, serializer=None, content_type="application/json", content_encoding="utf-8")
    work_off(app)
    assert seen == ["acme"]


def test_a_refusal_takes_the_place_of_no_result(
    app: Celery, stranger: Celery, intercepted: Any, work_off: Any, seen: Seen
) -> None:
    letter = intercepted(app, lambda: task(app, "fails").delay(1))
    letter.send(stranger)
    work_off(app)
    letter.context.update(organization_id="globex")
    letter.send(stranger)
    work_off(app)

    assert seen == ["fails"]
    assert isinstance(app.AsyncResult(letter.headers["id"]).result, ValueError)


def test_a_forged_message_revokes_nothing(
    app: Celery, stranger: Celery, intercepted: Any, work_off: Any, seen: Seen
) -> None:
    letter = intercepted(app, lambda: task(app, "note").delay(1))
    genuine = Letter(dict(letter.headers), letter.body, letter.properties)
    letter.headers["expires"] = "2020-01-01T00:00:00+00:00"
    letter.send(stranger)
    genuine.send(stranger)
    work_off(app)

    assert seen == ["acme"]


def test_a_connection_or_producer_of_the_callers_own_signs_too(app: Celery, work_off: Any, seen: Seen) -> None:
    with tenant_scope(ACME):
        with app.connection_for_write() as connection:
            task(app, "note").apply_async(connection=connection)
            app.send_task("note", connection=connection)
        with app.producer_pool.acquire(block=True) as producer:
            task(app, "note").apply_async(producer=producer)
    work_off(app)

    assert seen == ["acme"] * 3


class Foreign(Task):  # type: ignore[type-arg]
    """A task class of somebody who does not know us."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class OwnRequest(BaseTask):
    """A task class with a request of its own."""

    abstract = True
    Request = "celery.worker.request:Request"


class OwnStrategy(BaseTask):
    """A task class that deals with messages in its own way."""

    abstract = True
    Strategy = "somewhere:strategy"


@pytest.mark.parametrize("base", [Foreign, OwnRequest, OwnStrategy])
def test_a_worker_with_tasks_that_check_nothing_does_not_start(app: Celery, base: Any) -> None:
    app.task(base=base, name="blind")(lambda_free)

    with pytest.raises(SystemExit, match="its tasks blind do not check signatures"):
        refuse_to_start(app)


def test_a_worker_that_accepts_pickle_does_not_start(app: Celery) -> None:
    app.conf.accept_content = ["json", "pickle"]

    with pytest.raises(SystemExit, match="accepts pickle"):
        refuse_to_start(app)


class Consumer:
    """As much of Celery's as a step of its blueprint sees."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.gossip = SimpleNamespace(election_handlers={"task": lambda_free})
        self.strategies = app.tasks
        self.connection_errors = ()
        self.pool = SimpleNamespace()
        self.connection = SimpleNamespace(transport=None)
        self.handled: list[Any] = []

    def create_task_handler(self) -> Any:
        return self.handled.append


def test_a_worker_does_not_publish_what_gossip_tells_it_to(app: Celery) -> None:
    consumer = Consumer(app)
    Guard(consumer).start(consumer)

    assert consumer.gossip.election_handlers == {}


def test_an_unknown_task_has_to_be_signed_before_its_failure_is_stored(
    app: Celery, intercepted: Any, stranger: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = Consumer(app)
    Guard(consumer)
    handle = consumer.create_task_handler()
    messages = []
    for sender in (stranger, app):
        with tenant_scope(ACME):
            sender.send_task("unknown")
        with app.connection_for_read() as connection:
            queue = app.amqp.queues[app.conf.task_default_queue].bind(connection.default_channel)
            messages.append(queue.get(no_ack=True))
            messages[-1].reject_log_error = lambda *_: None
            handle(messages[-1])

    assert consumer.handled == [messages[1]]
    assert "'unknown', which is not known, is not signed: it is discarded" in caplog.text


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


@example(header={"sig": "of another"}, more={}, body=b"")
@given(header=header_values, more=st.dictionaries(st.text(max_size=5), header_values, max_size=2), body=st.binary())
def test_no_garbage_is_ever_accepted(header: Any, more: dict[str, Any], body: bytes) -> None:
    signer = Signer([NEW, OLD])
    types = {"content_type": "application/json", "content_encoding": "utf-8"}

    for context in (header, {**header, "sig": "0" * 64} if isinstance(header, dict) else header):
        assert not signer.accepts(Message(body=body, headers={**more, HEADER: context}))
    if isinstance(header, dict):
        signed = signer.sign({**more, HEADER: header}, body, **types, correlation_id=None, reply_to=None)
        assert signer.accepts(Message(body=body, headers=json.loads(json.dumps(signed)), **types))
        assert not signer.accepts(Message(body=body + b" ", headers=signed, **types))


def test_a_signer_does_not_show_its_keys() -> None:
    assert "key" not in repr(Signer([NEW, OLD])).replace("2 keys", "")


@pytest.mark.parametrize("keys", [None, 5, {"a key of 16 bytes", "another of those"}, {"a key of 16 bytes": 1}])
def test_keys_that_are_no_list_are_refused(keys: Any) -> None:
    with pytest.raises(ConfigurationError, match="takes a list of keys, newest first"):
        Signer(keys)


def test_a_number_that_no_broker_carries_is_refused_where_it_is_given(app: Celery) -> None:
    with tenant_scope(ACME), pytest.raises(TaskArgumentsError, match="Out of range"):
        task(app, "note").apply_async(headers={"ratio": float("nan")})
