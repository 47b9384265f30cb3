"""What kombu promises of a transport, on PostgreSQL: routing, order, acknowledgement, and whose a message is."""

from __future__ import annotations

import logging
import os
import pickle
import random
import selectors
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.exceptions import ChannelError, ContentDisallowed
from kombu.message import Message
from kombu.pidbox import Mailbox
from kombu.pools import ProducerPool
from kombu.simple import SimpleQueue
from sqlalchemy import text

import rhesis_tasks  # noqa: F401  # teaches kombu the URLs
from rhesis_tasks.postgres.consumer import Consumer as TransportConsumer
from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

TIMEOUT = 10
"""Seconds that a message may take that comes."""

QUIET = 0.3
"""Seconds without a message after which we believe that none comes."""

# Far above the time that anything takes here, so that nothing is given to others because it was slow.
GRACE = 60

Connect = Callable[..., Connection]


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[TenantDatabase]:
    """One database for all these tests, since most of them are shorter than it takes to make one."""
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture
def tenant_database(database: TenantDatabase) -> Iterator[TenantDatabase]:
    """That database, empty again afterwards."""
    yield database
    wait_until("all connections to end", lambda: sessions(database) == 0, TIMEOUT)
    database.execute(
        "DELETE FROM rhesis_tasks.message",
        "DELETE FROM rhesis_tasks.dead_letter",
        "DELETE FROM rhesis_tasks.queue",
        "DELETE FROM rhesis_tasks.exchange WHERE name NOT LIKE 'amq.%'",
    )


@pytest.fixture
def connect(tenant_database: TenantDatabase) -> Iterator[Connect]:
    """Makes connections of the application's role with these transport options, closed afterwards."""
    with ExitStack() as opened:

        def connect(**options: Any) -> Connection:
            made = Connection(tenant_database.url, transport_options={"grace": GRACE, **options})
            opened.callback(made.release)
            return made

        yield connect


@pytest.fixture
def connection(connect: Connect) -> Connection:
    """The connection of a test that needs only one."""
    return connect()


class Inbox:
    """A consumer that keeps what it gets."""

    def __init__(self, channel: Any, *queues: Queue, **options: Any) -> None:
        self.messages: list[Message] = []
        self.consumer = Consumer(channel, queues, on_message=self.messages.append, **options)
        self.connection: Connection = self.consumer.connection
        self.consumer.consume()

    def wait_for(self, number: int, timeout: float = TIMEOUT) -> list[Message]:
        """All messages so far, once there are that many."""
        deadline = time.monotonic() + timeout
        while len(self.messages) < number:
            try:
                self.connection.drain_events(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise TimeoutError(f"{len(self.messages)} of {number} messages after {timeout:g} seconds") from None
        return self.messages

    def stays_at(self, number: int) -> bool:
        """Whether that many messages came, and then none for a while."""
        self.wait_for(number)
        try:
            self.connection.drain_events(timeout=QUIET)
        except TimeoutError:
            return len(self.messages) == number
        return False


def declared(queue: Queue, channel: Any) -> Queue:
    """The queue as it is used through a channel or connection, made if it is not there."""
    bound: Queue = queue(getattr(channel, "default_channel", channel))
    bound.declare()
    return bound


def publish(connection: Connection, *bodies: Any, to: str = "letters", **options: Any) -> None:
    """Publish to one queue, over the default exchange."""
    for body in bodies:
        connection.Producer().publish(body, routing_key=to, **options)


def payloads(messages: list[Message]) -> list[Any]:
    return [message.payload for message in messages]


def stored(database: TenantDatabase, queue: str = "letters") -> list[str]:
    """The state of each message in a queue's part of the table."""
    with database.owner.connect() as connection:
        return list(
            connection.scalars(
                text(
                    "SELECT CASE WHEN claim_token IS NOT NULL THEN 'claimed' ELSE 'waiting' END "
                    "FROM (SELECT id, queue, claim_token FROM rhesis_tasks.message) m WHERE queue = :queue "
                    "UNION ALL SELECT 'dead' FROM rhesis_tasks.dead_letter WHERE queue = :queue ORDER BY 1"
                ),
                {"queue": queue},
            )
        )


def until_stored(
    database: TenantDatabase, expected: list[str], connection: Connection | None = None, queue: str = "letters"
) -> None:
    """Acknowledgements are collected for a moment, so that their effect is waited for.

    With a connection, it waits for messages meanwhile as a worker does.
    """

    def holds() -> bool:
        if connection is not None:
            quietly(connection, 0)
        return stored(database, queue) == expected

    wait_until(f"queue {queue!r} to hold {expected}", holds, TIMEOUT)


def quietly(connection: Connection, timeout: float) -> None:
    """Wait for a message, or not."""
    with suppress(TimeoutError):
        connection.drain_events(timeout=timeout)


LETTERS = Queue("letters")


# --- bodies, headers, properties ---------------------------------------------------------------------------------

ANYTHING = {"text": "grüße 🐘 \0 \u2028", "number": -1.5e300, "nothing": None, "list": [True, {"": []}]}


@pytest.mark.parametrize(
    ("body", "options", "content"),
    [
        (ANYTHING, {}, ("application/json", "utf-8")),
        ([], {"serializer": "json"}, ("application/json", "utf-8")),
        ("grüße 🐘 \0", {}, ("text/plain", "utf-8")),
        ("grüße", {"content_type": "text/plain", "content_encoding": "iso-8859-1"}, ("text/plain", "iso-8859-1")),
        (bytes(range(256)), {}, ("application/data", "binary")),
        (b"", {}, ("application/data", "binary")),
        ("x" * 5_000_000, {}, ("text/plain", "utf-8")),
        ({"x": "grüße" * 1_000_000}, {}, ("application/json", "utf-8")),
        (random.Random(1).randbytes(5_000_000), {}, ("application/data", "binary")),
        (ANYTHING, {"compression": "zlib"}, ("application/json", "utf-8")),
        (b"\0\xff" * 1_000_000, {"compression": "bzip2"}, ("application/data", "binary")),
    ],
    ids=lambda value: repr(value)[:24] if not isinstance(value, tuple) else "",
)
def test_a_body_arrives_as_it_was_published(
    connection: Connection, body: Any, options: dict[str, Any], content: tuple[str, str]
) -> None:
    publish(connection, body, **options)

    (message,) = Inbox(connection, LETTERS).wait_for(1)

    assert message.decode() == body
    assert type(message.decode()) is type(body)
    assert (message.content_type, message.content_encoding) == content


def test_a_compressed_body_is_stored_compressed(connection: Connection, tenant_database: TenantDatabase) -> None:
    publish(connection, "x" * 1_000_000, compression="zlib")

    with tenant_database.owner.connect() as owner:
        assert owner.scalar(text("SELECT length(body) FROM rhesis_tasks.message")) < 10_000


def test_a_pickled_body_is_read_by_nobody_who_did_not_ask_for_pickle(connection: Connection) -> None:
    publish(connection, {1, 2}, {3}, serializer="pickle")
    refusing = declared(LETTERS, connection).get()
    accepting = declared(LETTERS, connection).get(accept=["pickle"])

    with pytest.raises(ContentDisallowed):
        refusing.decode()

    assert accepting.decode() == {3}


def test_headers_and_properties_arrive_as_they_were_published(connection: Connection) -> None:
    headers = {"nested": {"list": [1, 2.5, None, True]}, "text": "grüße \0 🐘", "empty": {}, "": "no name"}
    properties = {
        "correlation_id": "c-1",
        "reply_to": "answers",
        "message_id": "m-1",
        "type": "greeting",
        "app_id": "grüße",
        "timestamp": 1_700_000_000,
    }

    publish(connection, {}, headers=headers, priority=7, expiration=60, delivery_mode=1, **properties)

    (message,) = Inbox(connection, LETTERS).wait_for(1)
    assert message.headers == headers
    assert message.properties.items() >= properties.items()
    assert message.properties.items() >= {"priority": 7, "expiration": "60000", "delivery_mode": 1}.items()
    assert message.delivery_info.items() >= {"exchange": "", "routing_key": "letters", "redelivered": False}.items()


def test_publishing_leaves_the_callers_headers_as_they_are(connection: Connection) -> None:
    headers = {"a": {"b": 1}}

    publish(connection, {}, headers=headers)

    assert headers == {"a": {"b": 1}}


# --- routing -----------------------------------------------------------------------------------------------------


def queue_sizes(connection: Connection, *queues: Queue) -> list[int]:
    return [queue(connection.default_channel).queue_declare(passive=True).message_count for queue in queues]


def test_the_default_exchange_makes_the_queue_that_it_publishes_to(connection: Connection) -> None:
    publish(connection, "one", to="nobody declared it")

    message = Queue("nobody declared it")(connection.default_channel).get()

    assert message.payload == "one"


def test_a_direct_exchange_routes_by_the_whole_key_once_to_each_queue(connection: Connection) -> None:
    exchange = Exchange("mail", type="direct")
    red, blue, both = (Queue(name, exchange, name) for name in ("red", "blue", "both"))
    for queue in (red, blue, both):
        declared(queue, connection)
    declared(both, connection).bind_to(exchange, "red")
    declared(both, connection).bind_to(exchange, "blue")
    producer = connection.Producer(exchange=exchange)

    for key in ("red", "blue", "blue", "green", "re", ""):
        producer.publish(key, routing_key=key)

    assert queue_sizes(connection, red, blue, both) == [1, 2, 3]


def test_a_queue_gets_one_copy_however_many_of_its_bindings_match(connection: Connection) -> None:
    exchange = Exchange("mail", type="topic")
    queue = declared(Queue("all", exchange, "#"), connection)
    queue.bind_to(exchange, "a.*")
    queue.bind_to(exchange, "a.b")

    connection.Producer(exchange=exchange).publish({}, routing_key="a.b")

    assert queue_sizes(connection, queue) == [1]


@pytest.mark.parametrize(
    ("binding", "matching", "other"),
    [
        ("orders.paid", ["orders.paid"], ["orders.paid.now", "orders", "ordersxpaid", "xorders.paid"]),
        ("orders.*", ["orders.paid", "orders.ü"], ["orders", "orders.paid.now"]),
        ("*.paid", ["orders.paid"], ["paid", "a.b.paid"]),
        ("#", ["", "orders", "orders.paid.now"], []),
        ("orders.#", ["orders", "orders.paid", "orders.paid.now"], ["bills.paid", "xorders.paid"]),
        ("orders.#.now", ["orders.now", "orders.paid.now", "orders.a.b.now"], ["orders.paid"]),
        ("a+b.(c).*", ["a+b.(c).d"], ["aab.c.d", "a+b.c.d"]),
        ("köln_1-x.$^|.*", ["köln_1-x.$^|.ß"], ["koln_1-x.$^|.y"]),
    ],
)
def test_a_topic_exchange_routes_by_pattern(
    connection: Connection, binding: str, matching: list[str], other: list[str]
) -> None:
    exchange = Exchange("news", type="topic")
    declared(Queue("subscriber", exchange, binding), connection)
    producer = connection.Producer(exchange=exchange)

    for key in (*other, *matching):
        producer.publish({"key": key}, routing_key=key)

    inbox = Inbox(connection, Queue("subscriber", exchange, binding))
    assert inbox.stays_at(len(matching))
    assert [message.payload["key"] for message in inbox.messages] == matching


def test_a_fanout_exchange_gives_every_queue_a_copy_whatever_the_key(connection: Connection) -> None:
    exchange = Exchange("news", type="fanout")
    queues = [declared(Queue(name, exchange), connection) for name in ("one", "two", "three")]

    connection.Producer(exchange=exchange).publish("hello", routing_key="whatever")

    assert [queue.get().payload for queue in queues] == ["hello"] * 3


@pytest.mark.parametrize("name", ["x" * 256, "a\0b"], ids=["too long", "with NUL"])
@pytest.mark.parametrize(
    "use",
    [
        lambda channel, name: channel.queue_declare(name),
        lambda channel, name: channel.exchange_declare(name, "topic"),
        lambda channel, name: channel.queue_bind("letters", "amq.topic", name),
        lambda channel, name: channel.basic_publish(channel.prepare_message("lost?"), "amq.topic", name),
    ],
    ids=["a queue", "an exchange", "a binding", "a route"],
)
def test_what_cannot_be_a_name_is_refused_and_nothing_else_is_hurt(
    connection: Connection, use: Callable[[Any, str], None], name: str
) -> None:
    channel = connection.channel()
    publish(connection, "before")

    with pytest.raises(ChannelError, match=r"cannot name a .*: at most 255 characters, none of them NUL"):
        use(channel, name)

    assert declared(LETTERS, connection).get().payload == "before"


def test_an_unbound_queue_gets_no_more_and_keeps_what_it_has(connection: Connection) -> None:
    exchange = Exchange("news", type="topic")
    queue = declared(Queue("subscriber", exchange, "a.*"), connection)
    queue.bind_to(exchange, "b.*")
    producer = connection.Producer(exchange=exchange)
    for key in ("a.1", "b.1"):
        producer.publish(key, routing_key=key)

    queue.unbind_from(exchange, "a.*")

    for key in ("a.2", "b.2"):
        producer.publish(key, routing_key=key)
    assert payloads([queue.get() for _ in range(3)]) == ["a.1", "b.1", "b.2"]
    assert queue.get() is None


def test_a_deleted_queue_is_gone_with_its_messages_and_bindings(connection: Connection) -> None:
    exchange = Exchange("news", type="fanout")
    queue = declared(Queue("subscriber", exchange), connection)
    producer = connection.Producer(exchange=exchange)
    producer.publish("old")

    assert queue.delete() == 1

    producer.publish("meanwhile")
    assert declared(Queue("subscriber"), connection).get() is None


def test_a_queue_is_left_alone_if_it_is_to_be_deleted_only_when_empty_or_unused(connection: Connection) -> None:
    queue = declared(LETTERS, connection)
    publish(connection, "one")
    queue.delete(if_empty=True)
    assert queue_sizes(connection, queue) == [1]
    inbox = Inbox(connection, queue)
    inbox.wait_for(1)[0].ack()

    queue.delete(if_unused=True)

    publish(connection, "two")
    assert payloads(inbox.wait_for(2)) == ["one", "two"]


def test_bindings_are_seen_at_once_by_other_connections(connect: Connect) -> None:
    exchange = Exchange("news", type="fanout")
    publisher, subscriber = connect(), connect()
    producer = publisher.Producer(exchange=exchange)
    producer.publish("nobody listens")
    queue = declared(Queue("subscriber", exchange), subscriber)

    producer.publish("somebody listens")

    assert queue.get().payload == "somebody listens"
    assert queue.get() is None
    assert ("subscriber", "news", "") in set(publisher.default_channel.list_bindings())


# --- what cannot be routed or declared ---------------------------------------------------------------------------


def test_a_message_that_no_queue_gets_is_dropped_if_it_is_neither_a_task_nor_mandatory(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    connection.Producer(exchange=Exchange("news", type="fanout")).publish("nobody listens")

    with tenant_database.owner.connect() as owner:
        assert owner.scalar(text("SELECT count(*) FROM rhesis_tasks.message")) == 0


@pytest.mark.parametrize("options", [{"mandatory": True}, {"headers": {"task": "work", "id": "1"}}])
def test_a_task_or_mandatory_message_that_no_queue_gets_is_an_error(
    connection: Connection, options: dict[str, Any]
) -> None:
    producer = connection.Producer(exchange=Exchange("mail", type="direct"))

    with pytest.raises(ChannelError, match=r"NO_ROUTE.*'mail'.*'nowhere'") as refused:
        producer.publish({}, routing_key="nowhere", **options)

    assert refused.value.reply_code == 312


def test_an_exchange_that_is_not_there_is_an_error(connection: Connection) -> None:
    with pytest.raises(ChannelError, match="no exchange 'nowhere'") as refused:
        connection.Producer().publish({}, exchange="nowhere", routing_key="x")

    assert refused.value.reply_code == 404


def test_a_deleted_exchange_is_not_there_any_more(connection: Connection) -> None:
    exchange = Exchange("news", type="fanout")(connection.default_channel)
    exchange.declare()
    exchange.delete()

    with pytest.raises(ChannelError) as refused:
        connection.Producer().publish({}, exchange="news")

    assert refused.value.reply_code == 404


@pytest.mark.parametrize(
    "declare",
    [
        lambda channel: Exchange("nowhere", passive=True)(channel).declare(),
        lambda channel: Queue("nowhere")(channel).queue_declare(passive=True),
        lambda channel: channel.queue_bind("nowhere", "amq.direct", "x"),
        lambda channel: (Queue("letters")(channel).declare(), channel.queue_bind("letters", "nowhere", "x")),
    ],
    ids=["exchange", "queue", "binding a queue", "binding to an exchange"],
)
def test_what_is_only_looked_for_and_not_there_is_an_error(
    connection: Connection, declare: Callable[[Any], Any]
) -> None:
    with pytest.raises(ChannelError, match=r"NOT_FOUND.*nowhere") as refused:
        declare(connection.default_channel)

    assert refused.value.reply_code == 404


def test_what_is_only_looked_for_is_found(connection: Connection) -> None:
    channel = connection.default_channel
    Exchange("news", type="fanout")(channel).declare()
    declared(LETTERS, connection)
    publish(connection, "one", "two")

    Exchange("news", passive=True)(channel).declare()

    assert LETTERS(channel).queue_declare(passive=True) == ("letters", 2, 0)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Exchange("x", type="direct"), Exchange("x", type="topic")),
        (Exchange("x", type="fanout"), Exchange("x", type="direct")),
        (Exchange("x", durable=True), Exchange("x", durable=False)),
        (Exchange("x", auto_delete=False), Exchange("x", auto_delete=True)),
        (Exchange("x", arguments={"a": 1}), Exchange("x", arguments={"a": 2})),
        (Queue("x", durable=True), Queue("x", durable=False)),
        (Queue("x", durable=False), Queue("x", durable=True)),
    ],
    ids=["type", "other type", "durable", "auto_delete", "arguments", "durable queue", "transient queue"],
)
def test_declaring_again_in_another_form_is_an_error(connect: Connect, first: Any, then: Any) -> None:
    first(connect().default_channel).declare()
    first(connect().default_channel).declare()

    with pytest.raises(ChannelError, match="PRECONDITION_FAILED") as refused:
        then(connect().default_channel).declare()

    assert refused.value.reply_code == 406


def test_an_exchange_of_a_type_that_we_do_not_have_is_an_error(connection: Connection) -> None:
    with pytest.raises(ChannelError, match="direct, fanout, topic") as refused:
        Exchange("x", type="headers")(connection.default_channel).declare()

    assert refused.value.reply_code == 406


def test_a_connection_knows_which_exchanges_it_has(connection: Connection) -> None:
    kinds = ("direct", "topic", "fanout", "headers")

    assert [connection.supports_exchange_type(kind) for kind in kinds] == [True, True, True, False]


def test_a_queue_without_a_name_gets_one_of_its_own(connection: Connection) -> None:
    names = {connection.default_channel.queue_declare().queue for _ in range(3)}

    assert len(names) == 3


@pytest.mark.parametrize("name", ["x" * 256, "nul \0"], ids=["too long", "NUL"])
@pytest.mark.parametrize("use", ["declare", "publish"])
def test_a_name_that_a_queue_cannot_have_is_a_channel_error_as_with_other_brokers(
    connection: Connection, use: str, name: str
) -> None:
    with pytest.raises(ChannelError):
        publish(connection, {}, to=name) if use == "publish" else declared(Queue(name), connection)

    publish(connection, "still usable")
    assert declared(LETTERS, connection).get().payload == "still usable"


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 3, 0])
def test_higher_priorities_come_first_and_equal_ones_in_the_order_of_publishing(
    connect: Connect, prefetch: int
) -> None:
    published = [(number * 7 % 10, number) for number in range(60)]
    publisher = connect()
    for priority, number in published:
        publish(publisher, [priority, number], priority=priority)
    got: list[list[int]] = []

    def take(body: list[int], message: Message) -> None:
        got.append(body)
        message.ack()

    consumer = connect()
    with Consumer(consumer, [LETTERS], callbacks=[take], prefetch_count=prefetch):
        for _ in published:
            consumer.drain_events(timeout=TIMEOUT)

    assert got == [list(each) for each in sorted(published, key=lambda each: (-each[0], each[1]))]


@pytest.mark.parametrize(("given", "like"), [(-5, 0), (99, 9), (None, 0)])
def test_a_priority_out_of_range_counts_as_the_nearest(connection: Connection, given: int | None, like: int) -> None:
    publish(connection, "before", priority=like)
    publish(connection, "given", priority=given)
    publish(connection, "after", priority=like)
    queue = declared(LETTERS, connection)

    assert payloads([queue.get() for _ in range(3)]) == ["before", "given", "after"]


def test_a_requeued_message_returns_to_its_place_marked_as_redelivered(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    publish(connect(), "a", "b", "c")
    first = Inbox(connect(), LETTERS, prefetch_count=2)
    a, b = first.wait_for(2)

    b.requeue()
    a.requeue()
    first.consumer.cancel()

    inbox = Inbox(connect(), LETTERS)
    assert payloads(inbox.wait_for(3)) == ["a", "b", "c"]
    assert [message.delivery_info["redelivered"] for message in inbox.messages] == [True, True, False]
    assert [message.delivery_info["redelivered"] for message in (a, b)] == [False, False]


# --- prefetch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_messages_come_unacknowledged_than_the_prefetch_count(
    connection: Connection, tenant_database: TenantDatabase, prefetch: int
) -> None:
    publish(connection, *range(6))
    inbox = Inbox(connection, LETTERS, prefetch_count=prefetch)

    assert inbox.stays_at(prefetch)

    assert sorted(stored(tenant_database)) == ["claimed"] * prefetch + ["waiting"] * (6 - prefetch)
    inbox.messages[0].ack()
    assert inbox.stays_at(prefetch + 1)
    inbox.messages[1].reject()
    assert inbox.stays_at(prefetch + 2)


def test_an_acknowledgement_reaches_the_server_by_itself_and_makes_room_at_once(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    connection = connect(grace=1)
    publish(connection, "one", "two")
    inbox = Inbox(connection, LETTERS, prefetch_count=1)
    assert inbox.stays_at(1), "so that the next look at the server is a poll interval away"

    inbox.messages[0].ack()

    until_stored(tenant_database, ["waiting"])
    inbox.wait_for(2, timeout=2)


def test_what_is_acknowledged_in_the_middle_of_a_look_makes_room_at_once(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the consumer has seen that there is no room, and before it has sent the acknowledgement."""
    connection = connect(poll_interval=60)
    publish(connection, "one", "two")
    inbox = Inbox(connection, LETTERS, prefetch_count=1)
    assert inbox.stays_at(1)
    in_hand, taken_acks = inbox.messages[:], TransportConsumer._taken_acks

    def acknowledge_and_take(self: TransportConsumer) -> Any:
        if in_hand:
            in_hand.pop().ack()
        return taken_acks(self)

    monkeypatch.setattr(TransportConsumer, "_taken_acks", acknowledge_and_take)
    connection.transport.consumer.look_now()

    inbox.wait_for(2, timeout=10)


def test_a_larger_prefetch_count_counts_at_once(connection: Connection) -> None:
    publish(connection, *range(4))
    inbox = Inbox(connection, LETTERS, prefetch_count=1)
    assert inbox.stays_at(1)

    inbox.consumer.qos(prefetch_count=3)

    inbox.wait_for(3, timeout=2)
    assert inbox.stays_at(3)


def test_a_smaller_prefetch_count_counts_once_enough_is_acknowledged(connection: Connection) -> None:
    publish(connection, *range(6))
    inbox = Inbox(connection, LETTERS, prefetch_count=3)
    assert inbox.stays_at(3)

    inbox.consumer.qos(prefetch_count=1)

    inbox.messages[0].ack()
    inbox.messages[1].ack()
    assert inbox.stays_at(3)
    inbox.messages[2].ack()
    assert inbox.stays_at(4)


def test_each_channel_has_its_own_prefetch_count(connection: Connection) -> None:
    publish(connection, *range(5), to="red")
    publish(connection, *range(5), to="blue")
    red = Inbox(connection.channel(), Queue("red"), prefetch_count=1)
    blue = Inbox(connection.channel(), Queue("blue"), prefetch_count=3)

    red.wait_for(1)
    blue.wait_for(3)

    assert red.stays_at(1) and blue.stays_at(3)


def test_the_prefetch_count_is_for_all_queues_of_a_channel_and_none_starves(connection: Connection) -> None:
    publish(connection, *["red"] * 20, to="red")
    publish(connection, *["blue"] * 20, to="blue")
    inbox = Inbox(connection, Queue("red"), Queue("blue"), prefetch_count=2)
    assert inbox.stays_at(2)

    for number in range(10):
        inbox.wait_for(number + 1)[number].ack()

    assert set(payloads(inbox.messages)) == {"red", "blue"}


# --- acknowledging -----------------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_gone_and_the_rest_is_not(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, *range(3))
    inbox = Inbox(connection, LETTERS)
    inbox.wait_for(3)

    inbox.messages[1].ack()

    until_stored(tenant_database, ["claimed", "claimed"], connection)
    connection.close()
    assert stored(tenant_database) == ["waiting", "waiting"]


def test_acknowledging_several_takes_all_up_to_that_one(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, *range(4))
    inbox = Inbox(connection, LETTERS)
    inbox.wait_for(4)
    inbox.messages[1].ack()

    inbox.messages[2].ack(multiple=True)

    until_stored(tenant_database, ["claimed"], connection)
    connection.close()
    assert payloads([declared(LETTERS, connection).get()]) == [3]


def test_a_rejected_message_is_gone(connection: Connection, tenant_database: TenantDatabase) -> None:
    publish(connection, "one")

    Inbox(connection, LETTERS).wait_for(1)[0].reject()

    until_stored(tenant_database, [], connection)


def test_a_message_is_acknowledged_once(connection: Connection) -> None:
    publish(connection, "one")
    message = Inbox(connection, LETTERS).wait_for(1)[0]
    message.ack()

    with pytest.raises(message.MessageStateError):
        message.ack()


def test_what_a_consumer_without_acknowledgements_gets_is_gone_at_once(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, *range(5))

    inbox = Inbox(connection, LETTERS, no_ack=True, prefetch_count=1)

    assert payloads(inbox.wait_for(5)) == list(range(5))
    assert stored(tenant_database) == []
    assert inbox.stays_at(5)


def test_getting_one_message_claims_it_until_it_is_acknowledged(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, "one", "two")
    queue = declared(LETTERS, connection)

    first = queue.get()
    second = queue.get()

    assert payloads([first, second]) == ["one", "two"]
    assert queue.get() is None
    assert stored(tenant_database) == ["claimed", "claimed"]
    first.ack()
    until_stored(tenant_database, ["claimed"], connection)
    second.requeue()
    again = queue.get()
    assert (again.payload, again.delivery_info["redelivered"]) == ("two", True)


def test_getting_one_message_without_acknowledgement_takes_it(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, "one", "two")

    assert declared(LETTERS, connection).get(no_ack=True).payload == "one"

    assert stored(tenant_database) == ["waiting"]


def test_recovering_gives_back_all_that_the_channel_has_not_acknowledged(connection: Connection) -> None:
    publish(connection, *range(4))
    other = Inbox(connection.channel(), Queue("elsewhere"))
    publish(connection, "elsewhere", to="elsewhere")
    other.wait_for(1)
    inbox = Inbox(connection, LETTERS)
    inbox.wait_for(4)
    inbox.messages[1].ack()

    inbox.consumer.recover(requeue=True)

    assert payloads(inbox.wait_for(7)) == [0, 1, 2, 3, 0, 2, 3]
    assert all(message.delivery_info["redelivered"] for message in inbox.messages[4:])
    assert other.stays_at(1)


@pytest.mark.parametrize("draining", [True, False], ids=["while messages come", "while none is waited for"])
def test_many_threads_acknowledge_at_the_same_time(
    connect: Connect, tenant_database: TenantDatabase, draining: bool
) -> None:
    number = 400
    connection = connect()
    with connection.channel() as channel:
        producer = Producer(channel)
        for each in range(number):
            producer.publish(each, routing_key="letters")
    inbox = Inbox(connection, LETTERS, prefetch_count=50 if draining else 0)
    failed: list[BaseException] = []

    def acknowledge(message: Message) -> None:
        try:
            message.ack()
        except BaseException as error:
            failed.append(error)
            raise

    with ThreadPoolExecutor(8) as threads:
        if draining:
            inbox.consumer.on_message = lambda message: (
                inbox.messages.append(message),
                threads.submit(acknowledge, message),
            )
        inbox.wait_for(number, timeout=30)
        if not draining:
            list(threads.map(acknowledge, inbox.messages, timeout=30))

    assert not failed
    until_stored(tenant_database, [], connection)
    assert sorted(payloads(inbox.messages)) == list(range(number)), "each was delivered once"


# --- queues ------------------------------------------------------------------------------------------------------


def test_purging_deletes_what_waits_and_says_how_much_that_was(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, *range(5))
    publish(connection, "other", to="other")
    claimed = Inbox(connection, LETTERS, prefetch_count=2)
    assert claimed.stays_at(2)

    assert declared(LETTERS, connection).purge() == 3

    assert stored(tenant_database) == ["claimed", "claimed"]
    assert stored(tenant_database, "other") == ["waiting"]
    assert claimed.consumer.purge() == 0


def test_the_size_of_a_queue_is_what_waits_in_it(connection: Connection) -> None:
    queue = declared(LETTERS, connection)
    sizes = queue_sizes(connection, queue)
    publish(connection, *range(3))
    sizes += queue_sizes(connection, queue)
    queue.get()

    assert sizes + queue_sizes(connection, queue) == [0, 3, 2]


def test_an_auto_delete_queue_goes_with_its_last_consumer(connect: Connect) -> None:
    queue = Queue("short-lived", auto_delete=True)
    observer = connect()
    declared(queue, observer)
    publish(observer, "early", to="short-lived")
    assert queue_sizes(observer, queue) == [1], "it waits for its first consumer"
    one, other = Inbox(connect(), queue, no_ack=True), Inbox(connect(), queue, no_ack=True)

    one.consumer.cancel()
    queue_sizes(observer, queue)
    other.consumer.cancel()

    with pytest.raises(ChannelError, match="no queue 'short-lived'"):
        queue_sizes(observer, queue)


@pytest.mark.parametrize(
    "close", [lambda inbox: inbox.consumer.channel.close(), lambda inbox: inbox.connection.close()]
)
def test_an_auto_delete_queue_goes_when_the_channel_or_connection_of_its_last_consumer_closes(
    connect: Connect, close: Callable[[Inbox], None]
) -> None:
    queue = Queue("short-lived", auto_delete=True)

    close(Inbox(connect().channel(), queue))

    with pytest.raises(ChannelError, match="no queue 'short-lived'"):
        queue_sizes(connect(), queue)


def test_a_queue_that_expires_goes_when_nobody_used_it_for_so_long(connect: Connect) -> None:
    keeper = Inbox(connect(grace=0.4), Queue("somebody must look after it"))
    user = connect(grace=0.4)
    unused, used = (Queue(name, expires=0.5) for name in ("unused", "used"))
    declared(unused, user)
    inbox = Inbox(user, used)
    observer = connect()
    started = time.monotonic()

    def exists(queue: Queue) -> bool:
        try:
            return queue_sizes(observer, queue) == [0]
        except ChannelError:
            return False

    wait_until("the unused queue to go", lambda: not exists(unused), TIMEOUT)

    assert time.monotonic() - started > 0.4
    assert exists(used)
    inbox.consumer.cancel()
    assert exists(used), "it has been used until now"
    wait_until("the other queue to go, too", lambda: not exists(used), TIMEOUT)
    assert keeper.stays_at(0)


@pytest.mark.parametrize(
    ("queue", "options", "seconds"),
    [
        (LETTERS, {"expiration": 0.5}, 0.5),
        (Queue("letters", message_ttl=0.5), {}, 0.5),
        (Queue("letters", message_ttl=0.5), {"expiration": 30}, 0.5),
        (Queue("letters", message_ttl=30), {"expiration": 0.5}, 0.5),
        (LETTERS, {"expiration": 0}, 0),
    ],
    ids=["of the message", "of the queue", "the queue's is shorter", "the message's is shorter", "none at all"],
)
def test_a_message_that_waited_for_too_long_is_not_delivered(
    connect: Connect, tenant_database: TenantDatabase, queue: Queue, options: dict[str, Any], seconds: float
) -> None:
    connection = connect()
    declared(queue, connection)
    publish(connection, "short-lived", **options)
    with tenant_database.owner.connect() as owner:
        lifetime = owner.scalar(
            text("SELECT extract(epoch FROM expires_at - published_at)::float FROM rhesis_tasks.message")
        )
    assert lifetime == pytest.approx(seconds, abs=0.1)
    wait_until("the message to expire", lambda: expired(tenant_database) == 1, TIMEOUT)
    tenant_database.execute("UPDATE rhesis_tasks.queue SET message_ttl = NULL")
    publish(connection, "another")

    assert declared(LETTERS, connection).get().payload == "another"
    inbox = Inbox(connect(grace=0.4), LETTERS)
    assert inbox.stays_at(0)
    wait_until("the message to be deleted", lambda: stored(tenant_database) == ["claimed"], TIMEOUT)


def expired(database: TenantDatabase) -> Any:
    with database.owner.connect() as owner:
        return owner.scalar(text("SELECT count(*) FROM rhesis_tasks.message WHERE expires_at <= clock_timestamp()"))


def test_a_message_that_was_delivered_in_time_does_not_expire_any_more(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    connection = connect(grace=0.4)
    publish(connection, "one", expiration=0.3)
    inbox = Inbox(connection, LETTERS)
    inbox.wait_for(1)
    wait_until("the message to expire", lambda: expired(tenant_database) == 1, TIMEOUT)

    assert inbox.stays_at(1)

    assert stored(tenant_database) == ["claimed"]


def test_messages_of_a_queue_that_is_not_durable_are_not_in_the_logged_table(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    declared(Queue("passing", durable=False), connection)
    publish(connection, "one", to="passing")
    publish(connection, "one", to="letters")

    with tenant_database.owner.connect() as owner:
        logged = owner.scalars(text("SELECT queue FROM ONLY rhesis_tasks.message")).all()
    assert logged == ["letters"]
    assert declared(Queue("passing", durable=False), connection).get().payload == "one"


# --- simple queues -----------------------------------------------------------------------------------------------


def test_a_simple_queue_is_put_into_and_got_from(connection: Connection, tenant_database: TenantDatabase) -> None:
    with connection.SimpleQueue("simple") as queue:
        for each in range(3):
            queue.put({"number": each}, compression="zlib")
        assert queue.qsize() == len(queue) == 3

        first = queue.get(timeout=TIMEOUT)

        assert first.payload == {"number": 0}
        first.ack()
        queue.get(timeout=TIMEOUT).requeue()
        numbers = [queue.get(timeout=TIMEOUT).payload["number"] for _ in range(2)]
        assert sorted(numbers) == [1, 2]
        with pytest.raises(SimpleQueue.Empty):
            queue.get(timeout=0.1)
        with pytest.raises(SimpleQueue.Empty):
            queue.get_nowait()
    connection.close()
    assert stored(tenant_database, "simple") == ["waiting"] * 2, "they were not acknowledged"


def test_a_simple_queue_waits_for_what_comes_later(connect: Connect) -> None:
    publisher = connect()
    with connect().SimpleQueue("simple", no_ack=True) as queue:
        later = threading.Timer(QUIET, publish, [publisher, "late"], {"to": "simple"})
        later.start()

        assert queue.get(timeout=TIMEOUT).payload == "late"

        later.join()


def test_a_simple_queue_is_cleared(connection: Connection) -> None:
    with connection.SimpleQueue("simple") as queue:
        for each in range(3):
            queue.put(each)

        assert queue.clear() == 3

        assert queue.qsize() == 0


def test_a_simple_buffer_is_gone_with_its_reader(connection: Connection, tenant_database: TenantDatabase) -> None:
    with connection.SimpleBuffer("buffer") as buffer:
        buffer.put("one")
        buffer.put("two")

        assert buffer.get(timeout=TIMEOUT).payload == "one"
        assert buffer.get(timeout=TIMEOUT).payload == "two"

    assert stored(tenant_database, "buffer") == []
    with pytest.raises(ChannelError, match="no queue 'buffer'"):
        queue_sizes(connection, Queue("buffer"))


# --- channels, connections, threads ------------------------------------------------------------------------------


def test_channels_of_one_connection_get_their_own_messages(connection: Connection) -> None:
    names = ("red", "green", "blue")
    inboxes = {name: Inbox(connection.channel(), Queue(name)) for name in names}
    for name in names:
        publish(connection, name, to=name)

    for inbox in inboxes.values():
        inbox.wait_for(1)

    assert {name: payloads(inbox.messages) for name, inbox in inboxes.items()} == {name: [name] for name in names}


def test_closing_one_channel_leaves_the_others_alone(connection: Connection, tenant_database: TenantDatabase) -> None:
    closing, staying = Inbox(connection.channel(), Queue("red")), Inbox(connection.channel(), Queue("blue"))
    publish(connection, "red", to="red")
    publish(connection, "blue", to="blue")
    closing.wait_for(1)
    staying.wait_for(1)

    closing.consumer.channel.close()

    assert (stored(tenant_database, "red"), stored(tenant_database, "blue")) == (["waiting"], ["claimed"])
    publish(connection, "more", to="blue")
    assert payloads(staying.wait_for(2)) == ["blue", "more"]
    staying.messages[0].ack()
    until_stored(tenant_database, ["claimed"], connection, queue="blue")


def test_consumers_on_two_connections_share_a_queue(connect: Connect) -> None:
    inboxes = [Inbox(connect(), LETTERS, prefetch_count=1) for _ in range(2)]
    publish(connect(), "one", "two")

    for inbox in inboxes:
        inbox.wait_for(1)

    assert sorted(payloads([*inboxes[0].messages, *inboxes[1].messages])) == ["one", "two"]
    assert all(inbox.stays_at(1) for inbox in inboxes)


def test_consumers_on_two_channels_share_a_queue_each_within_its_prefetch_count(connection: Connection) -> None:
    inboxes = [Inbox(connection.channel(), LETTERS, prefetch_count=1) for _ in range(2)]
    publish(connection, "one", "two", "three")

    for inbox in inboxes:
        inbox.wait_for(1, timeout=2)

    assert all(inbox.stays_at(1) for inbox in inboxes)
    inboxes[0].messages[0].ack()
    inboxes[0].wait_for(2)


def test_a_cancelled_consumer_gives_back_what_it_claimed_ahead_and_keeps_what_it_delivered(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    publish(connect(), *range(5))
    inbox = Inbox(connect(), LETTERS)
    inbox.wait_for(1)
    assert stored(tenant_database) == ["claimed"] * 5

    inbox.consumer.cancel()

    assert stored(tenant_database) == ["claimed"] + ["waiting"] * 4
    other = Inbox(connect(), LETTERS)
    assert payloads(other.wait_for(4)) == [1, 2, 3, 4]
    assert not any(message.delivery_info["redelivered"] for message in other.messages), "nobody has seen them"
    inbox.messages[0].ack()
    until_stored(tenant_database, ["claimed"] * 4, inbox.connection)


@pytest.mark.parametrize(
    "close",
    [lambda inbox: inbox.consumer.channel.close(), lambda inbox: inbox.connection.close()],
    ids=["channel", "connection"],
)
def test_what_a_closing_channel_or_connection_has_not_acknowledged_comes_to_others_at_once(
    connect: Connect, tenant_database: TenantDatabase, close: Callable[[Inbox], None]
) -> None:
    publish(connect(), *range(5))
    inbox = Inbox(connect().channel(), LETTERS)
    inbox.wait_for(3)
    inbox.messages[0].ack()
    waiting = Inbox(connect(), LETTERS)
    assert waiting.stays_at(0)

    close(inbox)

    assert payloads(waiting.wait_for(4, timeout=2)) == [1, 2, 3, 4]


def test_a_connection_is_used_again_after_it_was_closed(connection: Connection) -> None:
    publish(connection, "one")
    Inbox(connection, LETTERS).wait_for(1)
    connection.close()

    publish(connection, "two")

    assert payloads(Inbox(connection, LETTERS).wait_for(2)) == ["one", "two"]


def test_a_closed_connection_leaves_nothing_on_the_server(connect: Connect, tenant_database: TenantDatabase) -> None:
    connection = connect()
    Inbox(connection, LETTERS)
    assert held_locks(tenant_database) == 1

    connection.close()

    wait_until("the sessions to end", lambda: sessions(tenant_database) == 0, TIMEOUT)
    assert held_locks(tenant_database) == 0
    with tenant_database.owner.connect() as owner:
        for table in ("consumer", "subscription", "waiter"):
            assert owner.scalar(text(f"SELECT count(*) FROM rhesis_tasks.{table}")) == 0, table


def test_a_connection_closes_though_its_listener_was_told_to_acknowledge_later(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rhesis_tasks.postgres.consumer._UNATTENDED", 3600.0)
    connection = connect()
    publish(connection, "one")
    inbox = Inbox(connection, LETTERS)
    inbox.wait_for(1)[0].ack()
    listeners = [thread for thread in threading.enumerate() if thread.name.startswith("rhesis-tasks consumer")]

    connection.close()

    assert listeners
    assert not [thread for thread in listeners if thread.is_alive()]


def held_locks(database: TenantDatabase) -> int:
    """How many consumers show that they are alive."""
    with database.owner.connect() as owner:
        found: int = owner.scalar(
            text(
                "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database "
                "WHERE d.datname = current_database() AND locktype = 'advisory' AND granted "
                "AND classid::integer = rhesis_tasks.lock_class() AND objid <> 0"  # 0 is held by who looks after others
            )
        )
        return found


def sessions(database: TenantDatabase) -> int:
    with database.owner.connect() as owner:
        found: int = owner.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE application_name = 'rhesis-tasks' AND datname = current_database()"
            )
        )
        return found


def test_threads_publish_through_a_pool_of_producers(connect: Connect, tenant_database: TenantDatabase) -> None:
    with closing_pool(ProducerPool(connect().Pool(3), limit=3)) as producers:

        def work(number: int) -> None:
            with producers.acquire(block=True, timeout=TIMEOUT) as producer:
                producer.publish(number, routing_key="letters", retry=True)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(100), timeout=30))

        assert sessions(tenant_database) <= 3
    inbox = Inbox(connect(), LETTERS)
    assert sorted(payloads(inbox.wait_for(100))) == list(range(100))


def test_threads_consume_through_a_pool_of_connections(connect: Connect, tenant_database: TenantDatabase) -> None:
    publish(connect(), *range(40))
    got: list[int] = []
    with closing_pool(connect().Pool(2)) as connections:

        def work(_: int) -> None:
            with connections.acquire(block=True, timeout=TIMEOUT) as connection:
                message = declared(LETTERS, connection).get()
                got.append(message.payload)
                message.ack()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(40), timeout=30))

    assert sorted(got) == list(range(40))
    assert stored(tenant_database) == []


@contextmanager
def closing_pool(pool: Any) -> Iterator[Any]:
    try:
        yield pool
    finally:
        getattr(pool, "connections", pool).force_close_all()


# --- drain_events ------------------------------------------------------------------------------------------------


def test_drain_events_delivers_one_message_in_one_call(connection: Connection) -> None:
    publish(connection, "one", "two", "three")
    inbox = Inbox(connection, LETTERS)

    counts = []
    for _ in range(3):
        connection.drain_events(timeout=TIMEOUT)
        counts.append(len(inbox.messages))

    assert counts == [1, 2, 3]


@pytest.mark.parametrize("consuming", [True, False])
@pytest.mark.parametrize("timeout", [0, 0.4])
def test_drain_events_gives_up_after_the_timeout_and_not_before(
    connection: Connection, consuming: bool, timeout: float
) -> None:
    connection.connect()
    if consuming:
        inbox = Inbox(connection, LETTERS)
        assert inbox.stays_at(0)
    started = time.monotonic()

    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=timeout)

    assert time.monotonic() - started >= timeout


def test_a_message_ends_the_wait_as_soon_as_it_is_published(connect: Connect) -> None:
    inbox, publisher = Inbox(connect(poll_interval=60), LETTERS), connect()
    publish(publisher, "to open the connection", to="elsewhere")
    delays = []

    with ThreadPoolExecutor(1) as thread:
        for number in range(10):
            assert inbox.stays_at(number)
            sent = thread.submit(lambda: (time.monotonic(), publish(publisher, "hello"))[0])
            inbox.wait_for(number + 1)
            delays.append(time.monotonic() - sent.result(TIMEOUT))
            inbox.messages[-1].ack()

    assert sorted(delays)[5] < 0.2


def test_an_error_in_a_callback_comes_out_of_drain_events_and_the_message_stays_unacknowledged(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, "one", "two")

    def fail(body: Any, message: Message) -> None:
        if body == "one":
            raise KeyError(body)
        message.ack()

    with Consumer(connection, [LETTERS], callbacks=[fail]):
        with pytest.raises(KeyError):
            connection.drain_events(timeout=TIMEOUT)
        connection.drain_events(timeout=TIMEOUT)
        until_stored(tenant_database, ["claimed"], connection)


# --- mailboxes ---------------------------------------------------------------------------------------------------


@contextmanager
def node(connection: Connection, mailbox: Mailbox, name: str) -> Iterator[None]:
    """A process that answers, in a thread."""
    stop, ready = threading.Event(), threading.Event()

    def run() -> None:
        with connection.channel() as channel:
            answering = mailbox(connection).Node(
                name, state=name, channel=channel, handlers={"greet": lambda state, to: f"{state} greets {to}"}
            )
            consumer = answering.listen()
            ready.set()
            while not stop.is_set():
                quietly(connection, timeout=0.2)
            consumer.cancel()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(TIMEOUT)
        yield
    finally:
        stop.set()
        thread.join(TIMEOUT)


def test_nodes_of_a_mailbox_are_called_and_answer(connect: Connect, tenant_database: TenantDatabase) -> None:
    mailbox = Mailbox("town", type="fanout")
    caller = mailbox(connect())
    with node(connect(), mailbox, "ann"), node(connect(), mailbox, "bob"):
        both = caller.multi_call("greet", {"to": "you"}, timeout=TIMEOUT, limit=2)
        one = caller.call(["bob"], "greet", {"to": "me"}, timeout=TIMEOUT)
        nobody = caller.call(["eve"], "greet", {"to": "me"}, timeout=QUIET)

    assert sorted(both, key=str) == [{"ann": "ann greets you"}, {"bob": "bob greets you"}]
    assert one == [{"bob": "bob greets me"}]
    assert nobody == []


# --- what cannot be read -----------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, dict[str, Any]]] = {
    "unknown content type": (b"???", {"content_type": "application/x-unknown", "content_encoding": "binary"}),
    "broken JSON": (b"{broken", {"content_type": "application/json", "content_encoding": "utf-8"}),
    "broken UTF-8": (b'"\xff"', {"content_type": "application/json", "content_encoding": "utf-8"}),
    "unknown encoding": (b"x", {"content_type": "text/plain", "content_encoding": "klingon"}),
    "not what it is compressed as": (b"x", {"content_type": "application/data", "headers": {"compression": "zlib"}}),
    "unknown compression": (b"x", {"content_type": "application/data", "headers": {"compression": "x-unknown"}}),
}


@pytest.mark.parametrize(("broken", "end"), [*((broken, "ack") for broken in BROKEN), ("broken JSON", "reject")])
def test_a_body_that_cannot_be_decoded_is_buried_instead_of_lost(
    connect: Connect, tenant_database: TenantDatabase, caplog: pytest.LogCaptureFixture, broken: str, end: str
) -> None:
    publisher, connection = connect(), connect()
    body, options = BROKEN[broken]
    publish(publisher, body, **options)
    publish(publisher, {"later": True})
    got: list[Any] = []

    def take(body: Any, message: Message) -> None:
        got.append(body)
        message.ack()

    def give_up(message: Message, _: Exception) -> None:
        getattr(message, end)()  # Celery acknowledges it

    with Consumer(connection, [LETTERS], callbacks=[take], on_decode_error=give_up, accept=["json"]):
        while not got:
            connection.drain_events(timeout=TIMEOUT)
        until_stored(tenant_database, ["dead"], connection)

    assert got == [{"later": True}]
    assert_logged_as_dead(caplog)
    assert Inbox(connect(), LETTERS).stays_at(0)


def assert_logged_as_dead(caplog: pytest.LogCaptureFixture) -> None:
    (logged,) = [record for record in caplog.records if record.name.startswith("rhesis_tasks")]
    assert logged.levelno == logging.ERROR
    assert "queue 'letters' is a dead letter now: it could not be read" in logged.getMessage()


def test_a_body_that_was_read_is_not_buried_when_it_is_rejected(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    publish(connection, {"fine": True})
    message = Inbox(connection, LETTERS).wait_for(1)[0]
    message.decode()

    message.reject()

    until_stored(tenant_database, [], connection)


UNREADABLE = ["{}", "[]", "null", '"text"', '{"properties": 1}', '{"properties": {}, "headers": {}}']


def write_by_hand(database: TenantDatabase, envelope: str) -> None:
    with database.owner.begin() as owner:
        owner.execute(
            text("INSERT INTO rhesis_tasks.message (queue, envelope, body) VALUES ('letters', :envelope, 'x')"),
            {"envelope": envelope},
        )


@pytest.mark.parametrize("envelope", UNREADABLE)
def test_an_envelope_that_cannot_be_read_is_buried_and_later_messages_come(
    connect: Connect, tenant_database: TenantDatabase, caplog: pytest.LogCaptureFixture, envelope: str
) -> None:
    connection = connect()
    inbox = Inbox(connection, LETTERS, prefetch_count=1)
    write_by_hand(tenant_database, envelope)
    publish(connection, "later")

    assert payloads(inbox.wait_for(1)) == ["later"]

    inbox.messages[0].ack()
    until_stored(tenant_database, ["dead"], connection)
    assert_logged_as_dead(caplog)
    assert Inbox(connect(), LETTERS).stays_at(0)


def test_getting_one_message_passes_over_those_that_cannot_be_read(
    connection: Connection, tenant_database: TenantDatabase
) -> None:
    write_by_hand(tenant_database, "{}")
    publish(connection, "later")

    message = declared(LETTERS, connection).get()

    assert message is not None, "None would say that the queue is empty"
    assert message.payload == "later"
    assert stored(tenant_database) == ["claimed", "dead"]


# --- forks -------------------------------------------------------------------------------------------------------

# Python 3.12 and later warn of any fork while there are threads, which is what these tests are about.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_child(work: Callable[[], None]) -> None:
    """Do something in a forked child, and fail as it fails."""
    with forked(work):
        pass


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[None]:
    """A forked child that does something; its end is waited for at the end of the block."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(write)
    try:
        yield
    finally:
        with selectors.DefaultSelector() as selector:
            selector.register(read, selectors.EVENT_READ)
            ended = selector.select(TIMEOUT)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        said = os.read(read, 4000).decode() if ended else "the child did not end"
        os.close(read)
        _, status = os.waitpid(pid, 0)
    assert (os.waitstatus_to_exitcode(status), said) == (0, "")


@forks
@pytest.mark.parametrize("how", ["the same connection", "a new connection", "a channel that was open"])
def test_a_forked_child_publishes_and_closes_without_disturbing_its_parent(
    connect: Connect, tenant_database: TenantDatabase, how: str
) -> None:
    connection = connect()
    channel = connection.channel()
    inbox = Inbox(connection, LETTERS, prefetch_count=2)
    publish(connection, "unacknowledged")
    inbox.wait_for(1)

    def work() -> None:
        used = connection.clone() if how == "a new connection" else connection
        producer = Producer(channel if how == "a channel that was open" else used)
        producer.publish("from the child", routing_key="letters")
        channel.close()
        inbox.consumer.channel.close()
        used.close()
        connection.close()

    in_child(work)

    assert payloads(inbox.wait_for(2)) == ["unacknowledged", "from the child"]
    assert stored(tenant_database) == ["claimed", "claimed"]
    assert held_locks(tenant_database) == 1
    for message in inbox.messages:
        message.ack()
    until_stored(tenant_database, [], connection)


@forks
def test_what_a_forked_child_takes_through_its_parents_connection_comes_to_others_when_the_child_is_gone(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    connection = connect(grace=0.4)
    inbox = Inbox(connection, Queue("for the parent"))
    publish(connection, "taken by the child")

    def work() -> None:
        assert declared(LETTERS, connection).get().payload == "taken by the child"

    in_child(work)

    assert inbox.stays_at(0)
    other = Inbox(connect(), LETTERS)
    assert payloads(other.wait_for(1)) == ["taken by the child"]


@forks
def test_the_lock_is_free_when_the_parent_closes_though_a_child_is_alive(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    connection = connect()
    Inbox(connection, LETTERS)
    read, write = os.pipe()

    with forked(lambda: (os.close(write), os.read(read, 1))):
        assert held_locks(tenant_database) == 1
        connection.close()
        wait_until("the lock to be free", lambda: held_locks(tenant_database) == 0, TIMEOUT)
        os.close(write)
    os.close(read)


SCRIPT = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import rhesis_tasks
    from kombu import Connection, Consumer, Queue

    url, mode = sys.argv[1:]
    got = []
    connection = Connection(url, transport_options={"grace": 60})
    consumer = Consumer(connection, [Queue("letters")], on_message=got.append)
    consumer.consume()
    while not got:
        connection.drain_events(timeout=10)
    pid = os.fork()
    if pid == 0:
        if mode == "child exits":
            del consumer, got, connection
            sys.exit()
        print("child", os.getpid(), flush=True)
        sys.stdin.read()
    elif mode == "child exits":
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
        print("child ended", flush=True)
        while len(got) < 2:
            connection.drain_events(timeout=10)
        print("got", got[1].payload, flush=True)
        os._exit(0)
    else:
        os.waitpid(pid, 0)
"""


def test_the_end_of_a_forked_child_does_not_disturb_its_parent(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    publish(connect(), "first")
    command = python("-c", textwrap.dedent(SCRIPT), tenant_database.url, "child exits")

    with child("a parent", command) as parent:
        parent.wait_for("child ended", TIMEOUT)
        assert held_locks(tenant_database) == 1
        assert stored(tenant_database) == ["claimed"]
        publish(connect(), "second")
        parent.wait_for("got second", TIMEOUT)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell a process's end in other ways")
def test_the_lock_is_free_when_the_parent_is_killed_though_a_child_is_alive(
    connect: Connect, tenant_database: TenantDatabase
) -> None:
    publish(connect(), "first")
    command = python("-c", textwrap.dedent(SCRIPT), tenant_database.url, "parent is killed")
    read, write = os.pipe()

    with child("a parent", command) as parent:
        parent.wait_for("child ", TIMEOUT)
        pid = int(parent.output.split()[-1])
        assert held_locks(tenant_database) == 1
        parent.process.kill()
        parent.process.wait(TIMEOUT)
        wait_until("the lock to be free", lambda: held_locks(tenant_database) == 0, TIMEOUT)
        os.kill(pid, 0)
    os.close(read)
    os.close(write)


# --- passwords ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not connected"])
@pytest.mark.parametrize("where", ["before the host", "in the query"])
def test_what_a_connection_shows_of_itself_has_no_password(
    tenant_database: TenantDatabase, connected: bool, where: str
) -> None:
    url = database_url(tenant_database.url).set(drivername="postgresql", password="s3cret&ä")
    if where == "in the query":
        url = url.set(password=None).update_query_dict({"password": "s3cret&ä"})

    for show in (Connection.as_uri, repr, lambda it: str(it.info())):
        with Connection(url.render_as_string(hide_password=False)) as connection:
            if connected:
                connection.connect()

            said = show(connection)

            assert "s3cret" not in said
            assert tenant_database.role in said
            assert "s3cret" in connection.as_uri(include_password=True)


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not connected"])
@pytest.mark.parametrize(
    "copied",
    [lambda it: it.clone(), lambda it: pickle.loads(pickle.dumps(it))],  # noqa: S301
    ids=["cloned", "pickled"],
)
def test_a_copied_or_pickled_connection_can_still_log_in(
    connection: Connection, copied: Callable[[Connection], Connection], connected: bool
) -> None:
    if connected:
        connection.connect()

    copy = copied(connection)

    assert copy.as_uri(include_password=True) == connection.as_uri(include_password=True)
    assert copy.transport_options == connection.transport_options
    copy.close()
