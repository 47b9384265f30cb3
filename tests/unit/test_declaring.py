"""A task's queue is declared for each connection, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from amqp.exceptions import ConnectionError as AMQPConnectionError
from celery import Celery
from celery.app.amqp import AMQP
from celery.signals import before_task_publish
from kombu import Exchange, Queue
from kombu.common import Broadcast
from kombu.transport.virtual import Channel

from rhesis_tasks import configure, unconfigure


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queues that were declared, in turn."""
    found: list[str] = []
    declare = Channel.queue_declare

    def note(self: Channel, queue: str | None = None, **options: Any) -> Any:
        found.append(queue or "")
        return declare(self, queue, **options)

    monkeypatch.setattr(Channel, "queue_declare", note)
    return found


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queues that were copied, to be bound to a channel."""
    found: list[str] = []
    bind = Queue.bind

    def note(self: Queue, channel: Any) -> Any:
        found.append(self.name)
        return bind(self, channel)

    monkeypatch.setattr(Queue, "bind", note)
    return found


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the next message that is published fail."""
    publish, errors = Channel.basic_publish, [error]

    def basic_publish(self: Channel, *args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return publish(self, *args, **kwargs)

    monkeypatch.setattr(Channel, "basic_publish", basic_publish)


@pytest.mark.parametrize("route", ["default", "named", "created", "object", "routed"])
def test_a_message_gets_to_its_queue_which_is_declared_and_bound_once(
    app: Celery, published: Callable[..., list[Any]], declared: list[str], bound: list[str], route: str
) -> None:
    default = app.conf.task_default_queue
    slow, new = f"{default}-slow", f"{default}-new"
    app.conf.task_queues = [Queue(default), Queue(slow)]
    app.conf.task_routes = {"routed": slow}
    options = {"named": {"queue": slow}, "created": {"queue": new}, "object": {"queue": Queue(new)}}
    queue = {"default": default, "named": slow, "created": new, "object": new, "routed": slow}[route]

    for _ in range(2):
        app.send_task(route, **options.get(route, {}))

    assert declared == bound == [queue]
    app.amqp.queues.add(Queue(queue))
    assert [message.task for message in published(app, queue)] == [route, route]


def test_a_topic_exchange_with_its_queues(
    app: Celery, published: Callable[..., list[Any]], declared: list[str]
) -> None:
    eu, us = (f"{app.conf.task_default_queue}-{region}" for region in ("eu", "us"))
    exchange = Exchange("topics", type="topic")
    app.conf.task_queues = [Queue(eu, exchange, routing_key="task.eu"), Queue(us, exchange, routing_key="task.us")]

    for _ in range(2):
        app.send_task("work", queue=eu)
    app.send_task("work", queue=us)

    assert declared == [eu, us]
    assert [len(published(app, queue)) for queue in (eu, us)] == [2, 1]


def test_each_connection_has_it_declared(app: Celery, declared: list[str]) -> None:
    for _ in range(2):
        with app.connection_for_write() as connection:
            app.send_task("work", connection=connection)
            app.send_task("work", connection=connection)

    assert declared == [app.conf.task_default_queue] * 2


def test_after_a_lost_connection_it_is_declared_again(
    app: Celery, declared: list[str], published: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    app.send_task("first")
    fail_once(monkeypatch, AMQPConnectionError("lost"))

    app.send_task("second")

    assert declared == [app.conf.task_default_queue] * 2
    assert [message.task for message in published(app)] == ["first", "second"]


@pytest.mark.parametrize("of_its_own", [{"auto_delete": True}, {"queue_arguments": {"x-expires": 60_000}}])
def test_a_queue_that_may_go_is_declared_each_time(
    app: Celery, declared: list[str], of_its_own: dict[str, Any]
) -> None:
    app.conf.task_queues = [Queue("fleeting", **of_its_own)]

    for _ in range(3):
        app.send_task("work", queue="fleeting")

    assert declared == ["fleeting"] * 3


def test_a_broadcast_is_the_workers_to_declare(app: Celery, declared: list[str]) -> None:
    app.conf.task_queues = [Broadcast("everybody")]

    app.send_task("work", queue="everybody")

    assert declared == []


def test_a_route_without_a_queue(app: Celery, published: Callable[..., list[Any]]) -> None:
    app.conf.task_routes = {"work": {"routing_key": app.conf.task_default_queue}}

    for _ in range(2):
        app.send_task("work")

    assert [message.task for message in published(app)] == ["work", "work"]


def test_what_a_launch_wants_declared_is(app: Celery, declared: list[str]) -> None:
    other = f"{app.conf.task_default_queue}-other"

    app.send_task("work", declare=[Queue(other)])
    app.send_task("work", declare=[])

    assert declared == [other]


@pytest.fixture
def receive() -> Iterator[Callable[[Callable[..., None]], None]]:
    """Connects a receiver of ``before_task_publish`` until the test ends."""
    connected = []

    def connect(receiver: Callable[..., None]) -> None:
        before_task_publish.connect(receiver, weak=False)
        connected.append(receiver)

    yield connect
    for receiver in connected:
        before_task_publish.disconnect(receiver)


def test_receivers_of_the_signal_see_the_queue_and_may_add_to_it(
    app: Celery, declared: list[str], receive: Callable[[Callable[..., None]], None]
) -> None:
    audit, seen = f"{app.conf.task_default_queue}-audit", []

    def note(declare: Any = None, **_: Any) -> None:
        seen.append([queue.name for queue in declare[:]])
        declare.append(Queue(audit))

    receive(note)

    for _ in range(2):
        app.send_task("work")

    assert seen == [[app.conf.task_default_queue]] * 2
    assert declared == [app.conf.task_default_queue, audit]


class OwnAMQP(AMQP):
    pass


@pytest.mark.parametrize("own", [OwnAMQP, f"{__name__}:{OwnAMQP.__name__}"])
def test_an_application_keeps_its_own_class(own: Any) -> None:
    app = Celery("own", broker="memory://", amqp=own, set_as_current=False)
    configure(app)
    try:
        assert type(app.amqp) is OwnAMQP
    finally:
        unconfigure(app)


def test_one_that_was_used_before_stays() -> None:
    app = Celery("used", broker="memory://", set_as_current=False)
    amqp = app.amqp
    configure(app)
    try:
        app.send_task("work")
        assert app.amqp is amqp
    finally:
        unconfigure(app)
        app.close()
