"""What tests of the queue have in common: the queue on real connections, and a consumer driven as a transport does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.consumer import Consumer, Delivery, Subscription
from rhesis_tasks.postgres.queue import Claimed, MessageQueue
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

DEADLINE = 10.0  # seconds: for what should take milliseconds
LONG = 3600.0  # seconds: longer than any test


class Watched(Connection):
    """A connection that counts what is asked, and that a test can meddle with."""

    def __init__(self, url: str) -> None:
        super().__init__(database_url(url), name="test")
        self.calls: Counter[str] = Counter()
        self.heard: list[str] = []
        self.before: Callable[[str], None] = lambda _: None
        self.after: Callable[[str], None] = lambda _: None
        self.on_notification(lambda _: None)

    def query(self, sql: str, parameters: Any = (), *, timeout: float | None = None) -> list[tuple[Any, ...]]:
        found = re.search(r"\.(\w+)\(", sql)
        name = found[1] if found else sql
        self.before(name)
        rows = super().query(sql, parameters, timeout=timeout)
        self.calls[name] += 1
        self.after(name)
        return rows

    def on_notification(self, call: Callable[[str], None]) -> None:
        def hear(payload: str) -> None:
            call(payload)
            self.heard.append(payload)

        super().on_notification(hear)

    @property
    def backend(self) -> int:
        """The process that serves it."""
        return self.open().info.backend_pid


def queue_on(connection: Connection, schema: str = "rhesis_tasks") -> MessageQueue:
    return MessageQueue(connection, schema)


Connect = Callable[..., MessageQueue]
Sql = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def one_database(postgres_url: str) -> Iterator[TenantDatabase]:
    with new_tenant_database(postgres_url) as database:
        yield database


@pytest.fixture
def tenant_database(one_database: TenantDatabase) -> TenantDatabase:
    """One database for all tests of this file, emptied for each."""
    one_database.execute(
        "TRUNCATE rhesis_tasks.message, rhesis_tasks.dead_letter, rhesis_tasks.consumer, rhesis_tasks.subscription, "
        "rhesis_tasks.waiter, rhesis_tasks.queue, rhesis_tasks.binding",
        "DELETE FROM rhesis_tasks.exchange WHERE name NOT LIKE 'amq.%'",
    )
    return one_database


@pytest.fixture
def connect(tenant_database: TenantDatabase) -> Iterator[Connect]:
    """Makes queues, each over a connection of its own, as the application's role."""
    with ExitStack() as made:

        def make(schema: str = "rhesis_tasks") -> MessageQueue:
            connection = Watched(tenant_database.url)
            made.callback(connection.close)
            return queue_on(connection, schema)

        yield make


@pytest.fixture
def queue(connect: Connect) -> MessageQueue:
    """The queue, as a publisher and as a consumer has it."""
    return connect()


@pytest.fixture
def sql(tenant_database: TenantDatabase) -> Iterator[Sql]:
    """Runs a statement as the owner of the tables."""
    connection = Connection(database_url(tenant_database.owner_url), name="owner")
    yield lambda statement, *parameters: connection.query(statement, parameters)
    connection.close()


def publish(queue: MessageQueue, name: str, number: int, **options: Any) -> list[bytes]:
    """Publish messages to a queue; returns their bodies."""
    bodies = [b"%d" % each for each in range(1, number + 1)]
    for body in bodies:
        queue.publish("", name, "{}", body, **options)
    return bodies


def claimed(queue: MessageQueue, *names: str, slots: int = 100) -> list[Claimed]:
    """What a new consumer gets."""
    return queue.claim(queue.new_consumer(), names, slots)[0]


def bodies(messages: list[Claimed]) -> list[bytes]:
    return [message.body for message in messages]


def claims(messages: list[Claimed]) -> list[tuple[int, int]]:
    return [(message.id, message.token) for message in messages if message.token is not None]


class Worker:
    """A consumer as a transport drives it: with connections of its own, and limits of unacknowledged messages."""

    def __init__(
        self,
        url: str,
        limits: dict[Hashable, int],
        grace: float = LONG,
        poll_interval: float = LONG,
        max_deliveries: int | None = 5,
    ) -> None:
        self.limits = limits
        self.held: Counter[Hashable] = Counter()
        self.work, self.ear = Watched(url), Watched(url)
        self.consumer = Consumer(
            queue_on(self.work),
            queue_on(self.ear),
            name="worker",
            grace=grace,
            poll_interval=poll_interval,
            max_deliveries=max_deliveries,
            free=lambda group: limits[group] - self.held[group] if group in limits else None,
            declare=lambda _: None,
            on_dead=lambda delivery, reason: self.dead.append((delivery.message.body, reason)),
            on_call=lambda: None,
        )
        self.dead: list[tuple[bytes, str]] = []
        self.consumer.start()

    @property
    def number(self) -> int:
        return self.consumer.number

    def consume(self, *queues: str, group: Hashable = "channel", no_ack: bool = False) -> None:
        for name in queues:
            self.consumer.subscribe(Subscription(f"{group}:{name}", name, group, no_ack))

    def next(self, timeout: float = DEADLINE) -> Delivery | None:
        delivery = self.consumer.next(timeout)
        if delivery is not None and not delivery.subscription.no_ack:
            self.held[delivery.subscription.group] += 1
        return delivery

    def ack(self, delivery: Delivery) -> None:
        self.held[delivery.subscription.group] -= 1
        self.consumer.ack(delivery.message)

    def all(self) -> list[bytes]:
        """The bodies of all that is handed out at once; acknowledged."""
        found = []
        while (delivery := self.next(timeout=0.3)) is not None:
            found.append(delivery.message.body)
            self.ack(delivery)
        return found

    def in_background(self, pool: ThreadPoolExecutor) -> Future[Delivery | None]:
        """Wait in a thread for the next message, which only a notification brings."""
        # Once it has asked to be notified, it looks three times again, the last time after 0.2 seconds.
        assert self.next(timeout=0.5) is None
        return pool.submit(self.next, DEADLINE)


StartWorker = Callable[..., Worker]


@pytest.fixture
def worker(tenant_database: TenantDatabase) -> Iterator[StartWorker]:
    """Starts consumers; closed after the test."""
    with ExitStack() as started:

        def start(limits: dict[Hashable, int] | None = None, **options: Any) -> Worker:
            worker = Worker(tenant_database.url, limits or {}, **options)
            started.callback(worker.work.close)
            started.callback(worker.consumer.close)
            return worker

        yield start


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def holders(sql: Sql) -> list[tuple[Any, ...]]:
    """(body, holder, deliveries) of each message."""
    return sql("SELECT body, holder, deliveries FROM rhesis_tasks.message ORDER BY id")


def pages(queue: MessageQueue, call: str) -> int:
    """How many pages a function looks at."""
    [(plan,)] = queue.connection.query(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM rhesis_tasks.{call}")
    return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])
