"""A long transaction keeps the server from removing what is gone; what the broker does costs no more for it.

Pages are counted, not time: what a statement has to read to pass what is gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import kombu
import psycopg
import pytest
from sqlalchemy import URL

from rhesis_tasks.postgres import places
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.queue import MessageQueue, Place
from rhesis_tasks.processes import wait_until
from rhesis_tasks.settings import database_url, rendered
from rhesis_tasks.testing import TenantDatabase

TURNS = 30 * int(os.environ.get("RHESIS_TASKS_TEST_SCALE", "1"))
BATCH = 32


def _url(database: TenantDatabase) -> URL:
    return database_url(database.owner.url).update_query_dict({"options": "-c synchronous_commit=off"})


class Load:
    """A queue under a long transaction, its only consumer, and what statements read."""

    def __init__(self, database: TenantDatabase) -> None:
        self.database = database
        self.connection = Connection(_url(database), name="test")
        self.queue = MessageQueue(self.connection, "rhesis_tasks")
        self.consumer = self.queue.new_consumer()
        self.acks: list[tuple[int, int]] = []
        self.places: dict[str, Place] = {}  # of the first message of each queue's last claim
        self.queue.declare_queue("tasks")
        self.queue.declare_queue("events", durable=False)
        self.queue.attach(self.consumer, "test", ["tasks", "events"])

    def turn(self) -> None:
        """Publish, claim, wait."""
        for number in range(BATCH):
            self.queue.publish("", "tasks", "{}", b"x" * 900, delay=0.001 if number % 8 == 0 else None)
            self.queue.publish("", "events", "{}", b"x" * 200, ttl=5.0)
        time.sleep(0.002)
        self.queue.promote(1000)
        messages, _ = self.queue.claim(
            self.consumer, ["tasks"], BATCH, take_from=["events"], take_slots=100, acks=self.acks, places=self.places
        )
        self.acks = [(message.id, message.token) for message in messages if message.token is not None]
        for message in reversed(messages):
            assert message.place is not None
            self.places[message.queue] = message.place

    def wake(self, times: int, consumer: int | None = None) -> None:
        """A consumer waits and is notified, so often."""
        self.connection.query(
            f"DO $$ BEGIN FOR i IN 1..{times} LOOP PERFORM rhesis_tasks.wait_for({consumer or self.consumer}, "
            "'{tasks}', '{}'); PERFORM rhesis_tasks.wake('tasks'); END LOOP; END $$"
        )

    def pages(self, call: str, *arguments: Any) -> int:
        """How many pages a call of a function reads; what it does is undone."""
        raw = self.connection.open()
        marks = ", ".join(["%s"] * len(arguments))
        with raw.transaction(force_rollback=True):
            found = raw.execute(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM rhesis_tasks.{call}({marks})", arguments
            ).fetchone()
        assert found is not None
        plan = found[0][0]["Plan"]
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def at(place: Place | None) -> list[list[Any]]:
    """What the claim function takes for a place."""
    return [[None if place is None else part] for part in (place or (None, None, None))]


@pytest.fixture
def long_transaction(tenant_database: TenantDatabase) -> Iterator[None]:
    """Open until the end of the test."""
    with psycopg.connect(rendered(tenant_database.owner.url.set(drivername="postgresql"))) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield


@pytest.fixture
def load(tenant_database: TenantDatabase) -> Iterator[Load]:
    load = Load(tenant_database)
    yield load
    load.connection.close()


@pytest.mark.usefixtures("long_transaction")
@pytest.mark.parametrize("queue", ["tasks", "events"])
def test_a_claim_from_where_the_consumer_was_costs_the_same_all_through_a_long_transaction(
    load: Load, queue: str
) -> None:
    wanted = {"tasks": (["tasks"], BATCH, [], 0), "events": ([], 0, ["events"], BATCH)}[queue]

    def pages(place: Place | None) -> int:
        return load.pages("claim", load.consumer, [], [], *wanted, True, 5, 30.0, *at(place))

    walked_on, from_the_beginning = [], []
    for _ in range(3):
        for _ in range(TURNS):
            load.turn()
        walked_on.append(pages(load.places[queue]))
        from_the_beginning.append(pages(None))

    print(f"pages of a claim: {walked_on}; from the beginning: {from_the_beginning}")
    assert from_the_beginning[2] > from_the_beginning[0] + TURNS * BATCH / 10  # the transaction does what is said of it
    assert walked_on[2] <= walked_on[0] + TURNS * BATCH / 20


@pytest.mark.usefixtures("long_transaction")
def test_statistics_of_tables_full_of_what_is_gone_do_not_let_a_claim_walk_it(load: Load) -> None:
    """As empty as they seem then, one plan looks as good as another."""
    for _ in range(3 * TURNS):
        load.turn()
    for table in ("message", "transient_message"):
        load.database.execute(f"ANALYZE rhesis_tasks.{table}")
    for _ in range(BATCH):
        load.queue.publish("", "tasks", "{}", b"x" * 900)

    read = load.pages("claim", load.consumer, [], [], ["tasks"], BATCH, [], 0, True, 5, 30.0, *at(load.places["tasks"]))

    assert read < TURNS * BATCH


@pytest.mark.usefixtures("long_transaction")
def test_publishing_passes_only_those_who_waited_a_moment_ago(load: Load) -> None:
    """Each task that arrives at idle workers leaves a waiter behind that is gone."""

    def pages() -> tuple[int, int]:
        return (
            load.pages("publish", "", "tasks", "{}", b""),
            load.pages("wait_for", load.consumer, ["tasks"], []),
        )

    pages()  # the first time the session looks up what there is
    short = pages()
    load.wake(4000)
    long = pages()

    def are_short() -> bool:
        load.queue.tend(load.consumer, 5.0)
        return all(now < (before + at_first) / 2 for now, before, at_first in zip(pages(), long, short, strict=True))

    wait_until(f"{long} pages to be nearly {short} again", are_short, 60, interval=1.0)
    print(f"pages of a publish, and of asking to be notified: {short}, {long}, and then {pages()}")


@pytest.mark.usefixtures("long_transaction")
def test_who_has_waited_for_long_is_called_to_wait_anew_and_still_notified(load: Load) -> None:
    """Else the one who waits longest would keep all who have waited since from being forgotten."""
    heard: list[str] = []
    with psycopg.connect(rendered(load.database.owner.url.set(drivername="postgresql")), autocommit=True) as ear:
        ear.add_notify_handler(lambda notification: heard.append(notification.payload))
        (channel,) = load.connection.query("SELECT rhesis_tasks.channel_of(%s)", [load.consumer])[0]
        ear.execute(f'LISTEN "{channel}"')
        load.queue.wait_for(load.consumer, ["quiet"])
        load.queue.subscribe(load.consumer, "quiet")
        other = load.queue.new_consumer()
        load.wake(4000, consumer=other)

        def is_called() -> bool:
            load.queue.tend(other, 60.0)
            ear.execute("SELECT 1")
            return heard == ["quiet"]

        wait_until("it to be called", is_called, 60, interval=1.0)
        load.queue.wait_for(load.consumer, ["quiet"])
        load.queue.publish("", "quiet", "{}", b"")
        ear.execute("SELECT 1")
        assert heard == ["quiet", "quiet"]


def test_what_a_consumer_says_now_and_then_costs_the_same_as_time_goes_on(load: Load) -> None:
    """Without a long transaction what is gone is passed once, though nobody has removed it yet."""
    agree, tend = [], []
    for _ in range(3):
        for _ in range(TURNS):
            load.turn()
        tokens = [token for _, token in load.acks]
        load.queue.agree(load.consumer, tokens)  # which passes it
        load.queue.tend(load.consumer, 5.0)
        agree.append(load.pages("agree", load.consumer, tokens))
        tend.append(load.pages("tend", load.consumer, 5.0))

    print(f"pages: {agree} and {tend}")
    assert agree[2] <= 2 * agree[0] + 50
    assert tend[2] <= 2 * tend[0] + 50


def test_a_consumer_walks_on_where_it_claims_and_where_it_takes(
    tenant_database: TenantDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_LONG", -1.0), ("_PART", 1e-9), ("_BACK", 0.0)):  # each claim seems to have taken long
        monkeypatch.setattr(places, name, value)
    claim, walked_on = MessageQueue.claim, set()

    def note(self: MessageQueue, *args: Any, **options: Any) -> Any:
        walked_on.update(options["places"])
        return claim(self, *args, **options)

    monkeypatch.setattr(MessageQueue, "claim", note)
    with kombu.Connection(tenant_database.url) as connection:
        received: list[str] = []
        tasks, events = kombu.Queue("tasks"), kombu.Queue("events", durable=False)
        for queue, no_ack in ((tasks, False), (events, True)):
            consumer = connection.Consumer([queue], no_ack=no_ack, on_message=lambda got: received.append(got.body))
            consumer.consume()
        producer = connection.Producer()
        deadline = time.monotonic() + 60
        while walked_on != {"tasks", "events"}:
            assert time.monotonic() < deadline, f"it walks on in {walked_on} only, after {len(received)} messages"
            for queue in (tasks, events):
                producer.publish("", routing_key=queue.name)
            with suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
