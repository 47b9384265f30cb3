"""Events that nobody listens to cost nothing; whoever begins to listen hears them soon; nothing else is left out.

Statements are counted by the server, in its log.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import unheard_tasks
from broker_rig import PostgresServer, running_server
from celery import Celery
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError

from rhesis_tasks import unconfigure
from rhesis_tasks.postgres.channel import UNHEARD_FOR
from rhesis_tasks.processes import wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import new_tenant_database, running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
MANY = 200


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


class Broker:
    """A new database, and how many messages were published to it."""

    def __init__(self, server: PostgresServer, url: str) -> None:
        self.url = url
        self._server = server
        self._name = str(database_url(url).database)

    def published(self) -> int:
        """How many statements have published something."""
        mark = f" {self._name} LOG:"
        return len([line for line in self._server.log.splitlines() if mark in line and "publish(" in line])


@pytest.fixture
def broker(server: PostgresServer) -> Iterator[Broker]:
    with new_tenant_database(server.url) as database:
        with psycopg.connect(server.url, autocommit=True) as superuser:
            superuser.execute(f"ALTER DATABASE {database_url(database.url).database} SET log_statement = 'all'")
        yield Broker(server, database.url)


@pytest.fixture
def app(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    app = unheard_tasks.application(broker.url)
    yield app
    app.close()
    unconfigure(app)


def test_of_many_events_that_nobody_hears_one_a_second_is_published(broker: Broker, app: Celery) -> None:
    with app.events.default_dispatcher() as dispatcher:
        before, began = broker.published(), time.monotonic()
        for _ in range(MANY):
            dispatcher.send("worker-heartbeat", freq=2)
        took = time.monotonic() - began

    published = broker.published() - before
    assert 1 <= published <= 1 + took / UNHEARD_FOR
    assert published < MANY


def test_a_busy_worker_publishes_next_to_nothing(broker: Broker, app: Celery) -> None:
    environ = {unheard_tasks.URL: broker.url, "DATABASE_URL": ""}
    with running_worker("unheard_tasks", cwd=HERE, pool="threads", env=environ) as worker:
        before, began = broker.published(), time.monotonic()
        results = [app.tasks["nothing"].delay() for _ in range(MANY)]
        for result in results:
            worker.wait_for(f"[{result.id}] succeeded", TIMEOUT)
        took = time.monotonic() - began

    # Received, started, succeeded; heartbeat, offline; each once a second at most.
    assert broker.published() - before - MANY <= 5 * (2 + took / UNHEARD_FOR)


def listening(connection: Connection, exchange: Exchange, key: str) -> Queue:
    """A queue that is bound by now."""
    queue = Queue(f"listener.{key}", exchange, routing_key=key, auto_delete=True, durable=False)
    bound = queue(connection.default_channel)
    bound.declare()
    return bound


def heard(queue: Queue) -> list[dict[str, Any]]:
    """What is in a queue."""
    messages = iter(lambda: queue.get(no_ack=True), None)
    return [event for message in messages for event in _several(message.payload)]


def _several(payload: Any) -> list[dict[str, Any]]:
    return payload if isinstance(payload, list) else [payload]


def test_who_begins_to_listen_hears_events_soon_and_then_all_of_them(app: Celery) -> None:
    with app.events.default_dispatcher() as dispatcher, app.connection_for_read() as connection:
        dispatcher.send("worker-heartbeat", number=-1)  # nobody hears it
        queue = listening(connection, dispatcher.exchange, "#")

        def hears() -> bool:
            dispatcher.send("worker-heartbeat", number=-1)
            return bool(heard(queue))

        wait_until("the listener to hear something", hears, TIMEOUT)
        for number in range(MANY):
            dispatcher.send("worker-heartbeat", number=number)

        assert [event["number"] for event in heard(queue)] == list(range(MANY))


def test_of_events_of_different_kinds_each_is_heard_that_somebody_listens_to(app: Celery) -> None:
    """As Celery's gossip does, which hears of workers and not of tasks."""
    with app.events.default_dispatcher() as dispatcher, app.connection_for_read() as connection:
        queue = listening(connection, dispatcher.exchange, "worker.#")

        for number in range(MANY):
            dispatcher.send("task-started", uuid="1")
            dispatcher.send("worker-heartbeat", number=number)

        assert [event["number"] for event in heard(queue)] == list(range(MANY))


def test_a_task_that_no_queue_gets_is_an_error_each_time(app: Celery) -> None:
    nowhere = {"exchange": "celeryev", "exchange_type": "topic", "routing_key": "worker.heartbeat"}
    with app.events.default_dispatcher() as dispatcher:
        for _ in range(3):
            dispatcher.send("worker-heartbeat")
            with pytest.raises(OperationalError, match="NO_ROUTE"):
                app.send_task("nothing", producer=dispatcher.producer, retry=False, **nowhere)


def test_other_messages_are_published_whether_anybody_was_there_or_not(broker: Broker, app: Celery) -> None:
    """A worker that has just begun to listen must not miss an order, because nobody was there a moment ago."""
    exchange = Exchange("orders", type="fanout", durable=False)
    with app.connection_for_write() as connection:
        producer = connection.Producer(exchange=exchange)
        producer.publish({"order": 1}, declare=[exchange])
        queue = listening(connection, exchange, "")
        producer.publish({"order": 2})

        assert [message["order"] for message in heard(queue)] == [2]
