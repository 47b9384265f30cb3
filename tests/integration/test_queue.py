"""The queue in the database and its consumer, on real connections; what a model can tell is in test_queue_model.py.

``RHESIS_TASKS_TEST_BACKLOG`` says how many messages wait where the cost of a large backlog is measured.
"""

from __future__ import annotations

import json
import os
import selectors
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.errors import InvalidRegularExpression
from queue_rig import (  # noqa: F401  # fixtures
    DEADLINE,
    LONG,
    Connect,
    Sql,
    StartWorker,
    Watched,
    Worker,
    bodies,
    claimed,
    claims,
    connect,
    holders,
    one_database,
    pages,
    pool,
    publish,
    queue,
    queue_on,
    sql,
    tenant_database,
    worker,
)
from sqlalchemy import Engine, text

from rhesis_tasks.errors import DatabaseUnavailableError
from rhesis_tasks.postgres import consumer as consumer_module
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.consumer import Delivery
from rhesis_tasks.postgres.queue import Claimed, Exchange, Kept, Late, MessageQueue, QueueForm
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

BACKLOG = int(os.environ.get("RHESIS_TASKS_TEST_BACKLOG", "1000000"))


def by_queue(sql: Sql, column: str = "queue") -> list[Any]:
    return [value for (value,) in sql(f"SELECT {column} FROM rhesis_tasks.message ORDER BY id")]


# --- routing -----------------------------------------------------------------------------------------------------


def test_a_message_for_a_queue_that_nobody_declared_makes_it(queue: MessageQueue) -> None:
    routed = queue.publish("", "new", "{}", b"1")

    assert routed == 1
    assert queue.queue_exists("new")
    assert queue.declare_queue("new", durable=False).durable is True, "it is there already"
    assert bodies(claimed(queue, "new")) == [b"1"]


def test_a_message_comes_out_as_it_went_in(queue: MessageQueue, sql: Sql) -> None:
    envelope = '{"headers": {"tenant": "\\u00e4"}, "b": 1,  "a": 2}'
    body = bytes(range(256))

    queue.publish("", "a", envelope, body, priority=7, tenant="acme", task_id="one", task_name="work")

    assert sql("SELECT priority, tenant, task_id, task_name FROM rhesis_tasks.message") == [(7, "acme", "one", "work")]
    message = claimed(queue, "a")[0]
    assert (message.envelope, message.body, message.deliveries) == (envelope, body, 1)


def test_an_exchange_that_is_not_there_is_told_from_one_that_routes_nowhere(queue: MessageQueue) -> None:
    queue.declare_exchange("here", "direct", True, False)

    assert queue.publish("here", "key", "{}", b"") == 0
    assert queue.publish("gone", "key", "{}", b"") is None


def test_an_exchange_stays_as_it_was_first_made(queue: MessageQueue) -> None:
    made = queue.declare_exchange("news", "topic", True, False, '{"a": 1}')

    again = queue.declare_exchange("news", "fanout", False, True)

    assert made == again == Exchange("topic", True, False, {"a": 1})


def test_fanout_brings_one_message_to_each_queue_that_is_bound_however_often(queue: MessageQueue) -> None:
    queue.declare_exchange("news", "fanout", True, False)
    for name in ("a", "b", "c"):
        queue.declare_queue(name)
    for name, key in (("a", ""), ("a", "again"), ("b", "")):
        queue.bind(name, "news", key)

    assert queue.publish("news", "whatever", "{}", b"1") == 2
    assert [queue.size(name) for name in ("a", "b", "c")] == [1, 1, 0]


def test_nothing_is_bound_to_what_is_not_there(queue: MessageQueue) -> None:
    queue.declare_queue("a")
    queue.declare_exchange("news", "fanout", True, False)

    assert queue.bind("a", "gone", "") is False
    assert queue.bind("gone", "news", "") is False
    assert queue.bind("a", "news", "") is True
    assert queue.bind("a", "news", "") is True, "twice is once"
    assert queue.bindings() == [("a", "news", "")]


def test_what_is_no_pattern_is_refused_where_it_is_bound_and_hurts_no_publisher(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("a")
    queue.declare_exchange("news", "topic", True, False)

    with pytest.raises(InvalidRegularExpression, match="invalid regular expression"):
        sql("SELECT rhesis_tasks.bind('a', 'news', 'by hand', '(')")

    assert queue.bindings() == []


def test_what_is_unbound_gets_nothing_any_more(queue: MessageQueue) -> None:
    queue.declare_queue("a")
    queue.declare_exchange("news", "fanout", True, False)
    queue.bind("a", "news", "one")
    queue.bind("a", "news", "two")

    queue.unbind("a", "news", "one")
    assert queue.publish("news", "", "{}", b"") == 1

    queue.unbind("a", "news", "two")
    assert queue.publish("news", "", "{}", b"") == 0


def test_a_deleted_exchange_takes_its_bindings_along_but_not_the_queues(queue: MessageQueue) -> None:
    queue.declare_queue("a")
    queue.declare_exchange("news", "fanout", True, False)
    queue.bind("a", "news", "")

    queue.delete_exchange("news", if_unused=True)
    assert queue.exchange_exists("news"), "it is used"

    queue.delete_exchange("news")
    assert not queue.exchange_exists("news")
    assert queue.bindings() == []
    assert queue.queue_exists("a")


def matches(binding: Sequence[str], words: Sequence[str]) -> bool:
    """What AMQP says of topics, and RabbitMQ does: the words of a binding key against those of a routing key."""
    if not binding:
        return not words
    if binding[0] == "#":
        return matches(binding[1:], words) or (bool(words) and matches(binding, words[1:]))
    return bool(words) and binding[0] in ("*", words[0]) and matches(binding[1:], words[1:])


def words_of(key: str) -> list[str]:
    return key.split(".") if key else []


BINDINGS = (
    *("#", "*", "stock.*", "stock.#", "#.nyse", "stock.*.ibm", "*.*", "a.#.z", "", ".", "stock", "task.succeeded"),
    *(
        "worker@host.local.#",
        "a+b.*",
        "(x).[y]",
        "^x$",
        "x{2}.*",
        "a|b",
        "b\\d.*",
        "a_b.*",
        "grün.*",
        "€.*",
        "a?",
        "-.#",
        "stock.#.#",
        "#.*",
        "*.#.nyse",
    ),
)
KEYS = (
    *("", ".", "stock", "stock.", ".stock", "stock.ibm", "stock.nyse.ibm", "stock.nyse", "x.nyse", ".nyse", "a.z"),
    *("a.b.z", "a.b.c.z", "stockXibm", "task-succeeded", "task.succeeded", "worker@host.local.x", "a+b.c", "aab.c"),
    *(
        "(x).[y]",
        "x.y",
        "^x$",
        "x",
        "xx.y",
        "x{2}.y",
        "a",
        "a|b",
        "b",
        "b1.c",
        "b\\d.c",
        "a_b.c",
        "grün.x",
        "€.x",
        "a?",
    ),
    *("-.b.c",),
)


def test_a_topic_is_matched_as_amqp_says(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_exchange("news", "topic", True, False)
    for number, binding in enumerate(BINDINGS):
        queue.declare_queue(f"{number}")
        queue.bind(f"{number}", "news", binding)

    for key in KEYS:
        queue.publish("news", key, "{}", b"")
        routed = sorted(BINDINGS[int(name)] for name in by_queue(sql))
        sql("DELETE FROM rhesis_tasks.message")

        wanted = sorted(each for each in BINDINGS if matches(words_of(each), words_of(key)))
        assert routed == wanted, f"routing key {key!r}"


word = st.sampled_from(["*", "#", ""]) | st.text(
    st.characters(codec="utf-8", exclude_characters=".\0", exclude_categories=["Cs"]), max_size=4
)
key = st.lists(word, min_size=1, max_size=4).map(".".join)


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(binding=key, routing_key=key)
def test_whatever_the_topic_it_is_matched_as_amqp_says(queue: MessageQueue, binding: str, routing_key: str) -> None:
    queue.declare_exchange("news", "topic", True, False)
    queue.declare_queue("a")
    queue.bind("a", "news", binding)

    routed = queue.publish("news", routing_key, "{}", b"")
    queue.unbind("a", "news", binding)

    assert routed == int(matches(words_of(binding), words_of(routing_key)))


def test_a_message_of_a_transient_queue_is_kept_out_of_the_write_ahead_log(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("passing", durable=False)
    queue.declare_queue("lasting", durable=True)
    queue.declare_exchange("both", "fanout", True, False)
    queue.bind("passing", "both", "")
    queue.bind("lasting", "both", "")

    queue.publish("both", "", "{}", b"")

    assert sql(
        "SELECT queue, relname, relpersistence::text FROM rhesis_tasks.message m JOIN pg_class c ON c.oid = m.tableoid "
        "ORDER BY 1"
    ) == [("lasting", "message", "p"), ("passing", "transient_message", "u")]
    assert [each.queue for each in claimed(queue, "passing", "lasting")] == ["passing", "lasting"]


def test_a_queue_stays_as_it_was_first_made(queue: MessageQueue) -> None:
    made = queue.declare_queue("a", durable=False, auto_delete=True, expires=20, message_ttl=0.5)

    again = queue.declare_queue("a", durable=True, message_ttl=10)

    assert made == again == QueueForm(False, True, 20, 0.5)
    assert queue.declare_queue("b") == QueueForm(True, False, None, None)


# --- time to live ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_queue", "of_message", "lives"),
    [(None, None, None), (None, 40, 40), (30, None, 30), (30, 40, 30), (50, 40, 40), (None, 0.5, 0.5)],
)
def test_a_message_lives_as_long_as_it_and_its_queue_say(
    queue: MessageQueue, sql: Sql, of_queue: float | None, of_message: float | None, lives: float | None
) -> None:
    queue.declare_queue("a", message_ttl=of_queue)

    queue.publish("", "a", "{}", b"", ttl=of_message)

    [(seconds,)] = sql("SELECT extract(epoch FROM expires_at - published_at)::float FROM rhesis_tasks.message")
    assert seconds == (None if lives is None else pytest.approx(lives, abs=0.4))


def test_a_delayed_message_lives_as_long_as_its_queue_says_once_it_is_due(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("a", message_ttl=30)

    queue.publish("", "a", "{}", b"", delay=LONG)
    queue.publish("", "a", "{}", b"", delay=LONG, lapse=60)
    queue.publish("", "a", "{}", b"", delay=LONG, ttl=10)
    queue.publish("", "a", "{}", b"", delay=-LONG)

    lives = sql("SELECT extract(epoch FROM expires_at - published_at)::float FROM rhesis_tasks.message ORDER BY id")
    assert [seconds for (seconds,) in lives] == pytest.approx([LONG + 30, 60 + 30, 10, 30], abs=0.4)


def test_a_message_that_waited_too_long_is_not_delivered_and_is_deleted_by_a_consumer(
    queue: MessageQueue, sql: Sql
) -> None:
    queue.publish("", "a", "{}", b"late", ttl=0)
    queue.publish("", "a", "{}", b"in time", ttl=LONG)
    consumer = queue.new_consumer()

    assert bodies(queue.claim(consumer, [], 0, take_from=["a"], take_slots=1)[0]) == [b"in time"]
    assert bodies(claimed(queue, "a")) == []

    queue.tend(consumer, LONG)

    assert by_queue(sql) == []


def test_a_message_that_is_claimed_in_time_may_take_as_long_as_it_does(queue: MessageQueue, sql: Sql) -> None:
    queue.publish("", "a", "{}", b"1", ttl=LONG)
    messages = claimed(queue, "a")
    sql("UPDATE rhesis_tasks.message SET expires_at = clock_timestamp()")

    queue.tend(queue.new_consumer(), LONG)

    assert by_queue(sql) == ["a"]
    queue.release(claims(messages))
    assert bodies(claimed(queue, "a")) == [], "released, it waits again, and has waited too long"


# --- queues that go ----------------------------------------------------------------------------------------------


def test_an_auto_delete_queue_goes_with_its_last_consumer(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("replies", auto_delete=True)
    queue.declare_exchange("news", "fanout", True, False)
    queue.bind("replies", "news", "")
    publish(queue, "replies", 2)
    first, second = queue.new_consumer(), queue.new_consumer()
    queue.tend(first, LONG)
    assert queue.queue_exists("replies"), "nobody has consumed from it yet"
    queue.subscribe(first, "replies")
    queue.subscribe(second, "replies")

    queue.unsubscribe(first, "replies")
    assert queue.queue_exists("replies")

    queue.unsubscribe(second, "replies")
    assert not queue.queue_exists("replies")
    assert queue.bindings() == []
    assert by_queue(sql) == []


def test_other_queues_stay_when_their_last_consumer_goes(queue: MessageQueue) -> None:
    queue.declare_queue("a")
    consumer = queue.new_consumer()
    queue.subscribe(consumer, "a")
    publish(queue, "a", 2)

    queue.unsubscribe(consumer, "a")

    assert queue.size("a") == 2


@pytest.mark.parametrize("goes", ["detaches", "dies"])
def test_an_auto_delete_queue_goes_with_a_consumer_that(queue: MessageQueue, connect: Connect, goes: str) -> None:
    queue.declare_queue("replies", auto_delete=True)
    consumer = queue.new_consumer()
    queue.attach(consumer, "gone", ["replies"], hold_lock=False)

    if goes == "detaches":
        queue.detach(consumer)
    else:
        queue.tend(queue.new_consumer(), 0)

    assert not queue.queue_exists("replies")


def test_two_last_consumers_that_leave_at_once_leave_no_queue_behind(queue: MessageQueue, connect: Connect) -> None:
    queue.declare_queue("replies", auto_delete=True)
    leaving = [(connect(), queue.new_consumer()) for _ in range(4)]
    for each, consumer in leaving:
        each.subscribe(consumer, "replies")
    start = threading.Barrier(len(leaving), timeout=DEADLINE)

    def leave(each: MessageQueue, consumer: int) -> None:
        start.wait()
        each.unsubscribe(consumer, "replies")

    with ThreadPoolExecutor(len(leaving)) as pool:
        list(pool.map(lambda pair: leave(*pair), leaving, timeout=DEADLINE))

    assert not queue.queue_exists("replies")


def test_an_expiring_queue_goes_when_it_was_unused_for_so_long(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("brief", expires=0.01)
    queue.declare_queue("long", expires=LONG)
    queue.declare_queue("ever")
    publish(queue, "brief", 2)
    consumer = queue.new_consumer()

    def is_gone() -> bool:
        queue.tend(consumer, LONG)
        return not queue.queue_exists("brief")

    wait_until("the queue to go", is_gone, DEADLINE, interval=0.001)
    assert queue.queue_exists("long") and queue.queue_exists("ever")
    assert by_queue(sql) == []


def test_an_expiring_queue_stays_while_it_is_consumed(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("a", expires=0.001)
    consumer = queue.new_consumer()
    queue.attach(consumer, "here", ["a"])
    sql("UPDATE rhesis_tasks.queue SET used_at = clock_timestamp() - interval '1 hour'")

    queue.tend(consumer, LONG)

    assert queue.queue_exists("a")


@pytest.mark.parametrize("use", ["declare", "subscribe", "unsubscribe"])
def test_the_time_of_an_expiring_queue_begins_anew_when_it_is_used(queue: MessageQueue, sql: Sql, use: str) -> None:
    queue.declare_queue("a", expires=LONG)
    consumer = queue.new_consumer()
    if use == "unsubscribe":
        queue.subscribe(consumer, "a")
    sql("UPDATE rhesis_tasks.queue SET used_at = clock_timestamp() - interval '1 day'")

    {
        "declare": lambda: queue.declare_queue("a", expires=LONG),
        "subscribe": lambda: queue.subscribe(consumer, "a"),
        "unsubscribe": lambda: queue.unsubscribe(consumer, "a"),
    }[use]()

    assert sql("SELECT used_at > clock_timestamp() - interval '1 minute' FROM rhesis_tasks.queue") == [(True,)]


def test_a_message_whose_queue_went_while_it_was_published_goes_too(queue: MessageQueue, sql: Sql) -> None:
    for name in ("a", "b", "c", "d"):
        queue.declare_queue(name, durable=False)
        publish(queue, name, 2)
    claims_of_gone = claimed(queue, "c", slots=1)
    sql("DELETE FROM rhesis_tasks.queue WHERE name IN ('a', 'c')")

    queue.tend(queue.new_consumer(), LONG)

    assert by_queue(sql) == ["b", "b", "c", "d", "d"], "what somebody holds stays until it is done"
    queue.ack(claims(claims_of_gone))
    assert by_queue(sql) == ["b", "b", "d", "d"]


def test_the_time_while_the_server_was_down_is_no_time_without_use(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("a", expires=LONG)
    sql("UPDATE rhesis_tasks.queue SET used_at = pg_postmaster_start_time() - interval '1 day'")

    queue.tend(queue.new_consumer(), LONG)

    assert queue.queue_exists("a")


def test_purging_leaves_what_is_claimed_and_what_is_buried(queue: MessageQueue, sql: Sql) -> None:
    publish(queue, "a", 4)
    first, second = claimed(queue, "a", slots=2)
    assert first.token is not None
    queue.bury(first.id, first.token, "for a test")

    assert queue.purge("a") == 2

    assert sql("SELECT id FROM rhesis_tasks.message ORDER BY id") == [(second.id,)]
    assert sql("SELECT id, reason FROM rhesis_tasks.dead_letter") == [(first.id, "for a test")]


def test_a_queue_is_deleted_with_its_messages_and_bindings_unless_it_is_used_or_full(queue: MessageQueue) -> None:
    queue.declare_queue("a")
    queue.declare_exchange("news", "fanout", True, False)
    queue.bind("a", "news", "")
    consumer = queue.new_consumer()
    queue.subscribe(consumer, "a")
    publish(queue, "a", 3)
    held = queue.claim(consumer, ["a"], 1)[0]

    assert queue.delete_queue("a", if_unused=True) is None
    assert queue.delete_queue("a", if_empty=True) is None
    assert queue.delete_queue("a") == 3
    assert not queue.queue_exists("a")
    assert queue.bindings() == []
    assert queue.ack(claims(held)) == [Late(held[0].id, held[0].token, False)], "too late"


@pytest.mark.parametrize(
    ("going", "name"), [("unsubscribe(ARRAY[{consumer}])", "replies"), ("tend({consumer}, 3600)", "expired")]
)
def test_a_queue_goes_without_a_look_at_the_messages_of_others(
    queue: MessageQueue, sql: Sql, going: str, name: str
) -> None:
    consumer = queue.new_consumer()
    queue.attach(consumer, "here", [], hold_lock=False)

    def looked_at() -> int:
        queue.declare_queue("replies", durable=False, auto_delete=True)
        queue.subscribe(consumer, "replies")
        queue.declare_queue("expired", durable=False, expires=0)
        publish(queue, name, 3)
        seen = pages(queue, going.format(consumer=consumer))
        assert not queue.queue_exists(name)
        assert by_queue(sql) == ["other"] * others
        return seen

    others = 0
    looked_at(), looked_at()
    few = looked_at()

    others = 20_000
    sql(
        "INSERT INTO rhesis_tasks.message (queue, envelope, body, due_at, claim_token, holder, deliveries) "
        "SELECT 'other', '{}', '1', CASE n % 4 WHEN 1 THEN now() + interval '1 day' END, "
        "CASE n % 4 WHEN 2 THEN n END, CASE n % 4 WHEN 2 THEN %s END, CASE n % 4 WHEN 3 THEN 2 ELSE 0 END "
        "FROM generate_series(1, %s) n",
        *(consumer, others),
    )

    assert looked_at() <= few + 50


# --- claiming ----------------------------------------------------------------------------------------------------


def test_a_claim_passes_over_what_another_is_claiming_at_this_moment(
    queue: MessageQueue, tenant_database: TenantDatabase
) -> None:
    publish(queue, "a", 5)
    with tenant_database.owner.begin() as other:
        theirs = other.execute(
            text("SELECT body FROM rhesis_tasks.claim(0, '{}', '{}', '{a}', 2, '{}', 0) ORDER BY rank")
        ).scalars()
        theirs = [bytes(body) for body in theirs]

        ours = claimed(queue, "a")

        assert (theirs, bodies(ours)) == ([b"1", b"2"], [b"3", b"4", b"5"])
        other.rollback()
    assert bodies(claimed(queue, "a")) == [b"1", b"2"], "what was not claimed in the end"


def test_many_who_claim_at_once_share_a_backlog_and_nothing_is_lost_or_done_twice(
    queue: MessageQueue, connect: Connect, sql: Sql
) -> None:
    sql("SELECT rhesis_tasks.publish('', 'a', '{}', n::text::bytea) FROM generate_series(1, 2000) n")

    def work(number: int) -> list[bytes]:
        mine, consumer = connect(), queue.new_consumer()
        done, acks = [], []
        while True:
            # Some take what they get for good.
            takes = number == 0
            messages, late = mine.claim(
                consumer,
                [] if takes else ["a"],
                3 + number * 4,
                take_from=["a"] if takes else [],
                take_slots=7,
                acks=acks,
            )
            assert late == []
            if not messages and not acks:
                return done
            done += bodies(messages)
            acks = claims(messages)

    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(work, range(4), timeout=60))

    assert sorted(int(body) for share in shares for body in share) == list(range(1, 2001))
    assert all(shares), "each got something"
    assert by_queue(sql) == []


def test_two_who_acknowledge_one_claim_at_once_are_not_both_in_time(queue: MessageQueue, connect: Connect) -> None:
    publish(queue, "a", 200)
    acks = claims(claimed(queue, "a", slots=200))
    start = threading.Barrier(2, timeout=DEADLINE)

    def ack(each: MessageQueue) -> list[Late]:
        start.wait()
        return each.ack(acks)

    with ThreadPoolExecutor(2) as pool:
        late = [each for some in pool.map(ack, [connect(), connect()], timeout=DEADLINE) for each in some]

    assert sorted((each.id, each.token) for each in late) == sorted(acks)


@pytest.mark.parametrize("what", ["claim", "ack", "release", "bury"])
def test_who_has_lost_a_message_to_another_cannot_do_anything_with_it(queue: MessageQueue, sql: Sql, what: str) -> None:
    publish(queue, "a", 2)
    lost = claims(claimed(queue, "a"))
    queue.release(lost)
    another = claimed(queue, "a")
    before = sql("SELECT * FROM rhesis_tasks.message ORDER BY id")
    nobody = queue.new_consumer()

    told = {
        "claim": lambda: queue.claim(nobody, ["a"], 10, acks=lost),
        "ack": lambda: queue.ack(lost),
        "release": lambda: queue.release(lost),
        "bury": lambda: [queue.bury(*each, "late") for each in lost],
    }[what]()

    assert sql("SELECT * FROM rhesis_tasks.message ORDER BY id") == before
    late = [Late(*each, True) for each in lost]
    assert (
        told
        == {
            "claim": ([], late),
            "ack": late,
            "release": 0,
            "bury": [False, False],
        }[what]
    )
    assert queue.ack(claims(another)) == []


@pytest.mark.parametrize("what", ["claim", "ack"])
def test_of_two_claims_of_one_message_the_lost_one_is_told(queue: MessageQueue, sql: Sql, what: str) -> None:
    publish(queue, "a", 1)
    lost = claims(claimed(queue, "a"))
    queue.release(lost)
    held = claims(claimed(queue, "a"))

    if what == "claim":
        late: list[Any] = queue.claim(queue.new_consumer(), [], 0, acks=[*lost, *held])[1]
    else:
        late = queue.ack([*lost, *held])

    assert by_queue(sql) == []
    assert [(each.id, each.token) for each in late] == lost


def test_slots_are_filled_from_the_first_queue_on(queue: MessageQueue) -> None:
    for name in ("a", "b"):
        publish(queue, name, 2)

    messages = claimed(queue, "b", "a", slots=3)

    assert [(each.queue, each.body) for each in messages] == [("b", b"1"), ("b", b"2"), ("a", b"1")]


def test_what_is_taken_comes_before_what_is_claimed_from_the_same_queue(queue: MessageQueue) -> None:
    publish(queue, "a", 4)

    messages, _ = queue.claim(queue.new_consumer(), ["a"], 2, take_from=["a"], take_slots=2)

    assert [(each.body, each.token is None) for each in messages] == [
        (b"1", True),
        (b"2", True),
        (b"3", False),
        (b"4", False),
    ]


# --- waking ------------------------------------------------------------------------------------------------------


class Ear:
    """A consumer that waits for queues, and hears what it is told."""

    def __init__(self, queue: MessageQueue, sql: Sql) -> None:
        self.queue = queue
        self.number = queue.new_consumer()
        self._sql = sql
        self._connection: Any = queue.connection
        queue.attach(self.number, "ear")
        queue.listen(self.number)

    def waits_for(self, *queues: str) -> None:
        self.queue.wait_for(self.number, queues)

    def heard(self) -> list[str]:
        """What it was told up to now, and was not asked about before."""
        self._sql("SELECT pg_notify(rhesis_tasks.channel_of(%s), 'that was all')", self.number)
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            while "that was all" not in self._connection.heard:
                assert selector.select(DEADLINE), "notifications come within moments"
                self._connection.receive()
        *told, _ = self._connection.heard
        self._connection.heard.clear()
        return told


@pytest.fixture
def ear(connect: Connect, sql: Sql) -> Callable[[], Ear]:
    return lambda: Ear(connect(), sql)


def test_a_message_wakes_one_of_those_who_wait(queue: MessageQueue, ear: Callable[[], Ear]) -> None:
    ears = [ear(), ear()]
    for each in ears:
        each.waits_for("a")

    woken = []
    for _ in range(3):
        queue.publish("", "a", "{}", b"")
        woken.append(sorted(map(Ear.heard, ears)))

    assert woken == [[[], ["a"]], [[], ["a"]], [[], []]]
    assert sorted(each.queue.size("a") for each in ears) == [3, 3], "to be woken is not to be given"


def test_each_queue_of_an_exchange_wakes_one_of_its_own(queue: MessageQueue, ear: Callable[[], Ear]) -> None:
    queue.declare_exchange("news", "fanout", True, False)
    first, second, third = ear(), ear(), ear()
    for name, each in (("a", first), ("b", second), ("c", third)):
        queue.declare_queue(name, durable=name != "b")
        each.waits_for(name)
    queue.bind("a", "news", "")
    queue.bind("b", "news", "")

    queue.publish("news", "", "{}", b"")

    assert [first.heard(), second.heard(), third.heard()] == [["a"], ["b"], []]


def test_nobody_is_notified_who_does_not_wait(
    queue: MessageQueue, ear: Callable[[], Ear], tenant_database: TenantDatabase
) -> None:
    listening = ear()
    listening.queue.subscribe(listening.number, "a")

    queue.publish("", "a", "{}", b"")

    assert listening.heard() == []


def test_who_waits_anew_waits_for_the_queues_it_names_and_for_no_others(
    queue: MessageQueue, ear: Callable[[], Ear]
) -> None:
    waiter = ear()
    waiter.waits_for("a", "b")
    waiter.waits_for("b", "c")

    for name in ("a", "b", "c"):
        queue.publish("", name, "{}", b"")

    assert waiter.heard() == ["b", "c"]


@pytest.mark.parametrize("goes", ["unsubscribe", "detach", "reap"])
def test_who_is_gone_is_woken_no_more_but_somebody_else_is(
    queue: MessageQueue, ear: Callable[[], Ear], sql: Sql, goes: str
) -> None:
    gone, stays = ear(), ear()
    gone.waits_for("a")
    {
        "unsubscribe": lambda: queue.unsubscribe(gone.number, "a"),
        "detach": lambda: queue.detach(gone.number),
        "reap": lambda: (gone.queue.connection.close(), reap(queue, sql, gone.number)),
    }[goes]()
    stays.waits_for("a")

    queue.publish("", "a", "{}", b"")

    assert stays.heard() == ["a"]


@pytest.mark.parametrize("goes", ["unsubscribe", "detach", "reap"])
def test_a_notification_to_one_who_leaves_is_not_lost_on_the_others(
    queue: MessageQueue, ear: Callable[[], Ear], sql: Sql, goes: str
) -> None:
    gone, stays = ear(), ear()
    gone.queue.subscribe(gone.number, "a")
    gone.waits_for("a")
    queue.publish("", "a", "{}", b"")
    stays.waits_for("a")
    assert (gone.heard(), stays.heard()) == (["a"], [])

    {
        "unsubscribe": lambda: queue.unsubscribe(gone.number, "a"),
        "detach": lambda: queue.detach(gone.number),
        "reap": lambda: (gone.queue.connection.close(), reap(queue, sql, gone.number)),
    }[goes]()

    assert stays.heard() == ["a"]


def test_who_cannot_take_what_it_was_notified_of_passes_it_on(queue: MessageQueue, ear: Callable[[], Ear]) -> None:
    full, other, third = ear(), ear(), ear()
    full.waits_for("a", "b")
    queue.publish("", "a", "{}", b"")
    other.waits_for("a")
    third.waits_for("b")

    full.queue.wait_for(full.number, [], pass_on=["a"])

    assert [each.heard() for each in (full, other, third)] == [["a"], ["a"], []]


def test_who_gives_a_message_back_wakes_somebody_for_it(queue: MessageQueue, ear: Callable[[], Ear]) -> None:
    publish(queue, "a", 3)
    consumer = queue.new_consumer()
    first, second, third = ((each.id, each.token) for each in queue.claim(consumer, ["a"], 3)[0])
    waiter = ear()

    told = []
    for give_back in (
        lambda: queue.release([first]),
        lambda: queue.agree(consumer, [third[1]]),
        lambda: queue.detach(consumer),
    ):
        waiter.waits_for("a")
        give_back()
        told.append(waiter.heard())

    assert told == [["a"], ["a"], ["a"]]
    assert queue.release([second]) == 0


@pytest.mark.parametrize("first", ["commits", "rolls back"])
def test_publishers_in_open_transactions_do_not_wait_for_each_other(
    queue: MessageQueue, ear: Callable[[], Ear], tenant_database: TenantDatabase, first: str
) -> None:
    queue.declare_queue("a")
    waiter = ear()
    waiter.waits_for("a")
    with tenant_database.owner.connect() as one, tenant_database.owner.connect() as two:
        for connection in (one, two):
            connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
            connection.exec_driver_sql("SELECT rhesis_tasks.publish('', 'a', '{}', '')")
        two.commit()
        heard_at_once = waiter.heard()
        one.commit() if first == "commits" else one.rollback()

    assert heard_at_once == [], "the first has woken the only one who waits, as soon as it commits"
    assert waiter.heard() == (["a"] if first == "commits" else [])
    assert queue.size("a") == (2 if first == "commits" else 1)


def test_publishers_in_open_transactions_wake_different_ones(
    queue: MessageQueue, ear: Callable[[], Ear], tenant_database: TenantDatabase
) -> None:
    queue.declare_queue("a")
    waiters = [ear(), ear()]
    for each in waiters:
        each.waits_for("a")

    with tenant_database.owner.begin() as one, tenant_database.owner.begin() as two:
        for connection in (one, two):
            connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
            connection.exec_driver_sql("SELECT rhesis_tasks.publish('', 'a', '{}', '')")

    assert [each.heard() for each in waiters] == [["a"], ["a"]]


# --- life and death ----------------------------------------------------------------------------------------------


def reap(queue: MessageQueue, sql: Sql, dead: int, grace: float = 0.0) -> None:
    """Let a consumer find that another one is dead."""
    by = queue.new_consumer()

    def is_gone() -> bool:
        queue.tend(by, grace)
        return not is_known(sql, dead)

    wait_until(f"consumer {dead} to be taken for dead", is_gone, DEADLINE, interval=0.01)


def is_known(sql: Sql, consumer: int) -> bool:
    return sql("SELECT count(*) FROM rhesis_tasks.consumer WHERE id = %s", consumer) == [(1,)]


def dead_with_messages(queue: MessageQueue, other: MessageQueue, sql: Sql) -> tuple[int, list[Claimed]]:
    """A consumer whose lock is free, and what it holds."""
    publish(queue, "a", 2)
    consumer = other.new_consumer()
    other.attach(consumer, "dying", ["a"])
    messages, _ = other.claim(consumer, ["a"], 2)
    other.connection.close()
    wait_until("its lock to be free", lambda: sql(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid::integer = rhesis_tasks.lock_class() "
        "AND objid = %s", consumer) == [(0,)], DEADLINE, interval=0.001)  # fmt: skip
    return consumer, messages


def test_who_gives_no_life_sign_is_dead_after_the_grace_period_and_not_before(
    queue: MessageQueue, connect: Connect, sql: Sql
) -> None:
    dead, messages = dead_with_messages(queue, connect(), sql)
    keeper = queue.new_consumer()

    for _ in range(3):
        queue.tend(keeper, LONG)
    assert is_known(sql, dead)
    assert queue.size("a") == 0

    def is_reaped() -> bool:
        queue.tend(keeper, 0.05)
        return not is_known(sql, dead)

    wait_until("the consumer to be taken for dead", is_reaped, DEADLINE, interval=0.001)
    again = claimed(queue, "a")
    assert [(each.id, each.deliveries) for each in again] == [(each.id, 2) for each in messages]
    assert queue.ack(claims(messages)) == [Late(*each, True) for each in claims(messages)], "too late"


def test_who_is_dead_is_dead_no_sooner_than_it_was_first_missed(
    queue: MessageQueue, connect: Connect, sql: Sql
) -> None:
    dead, _ = dead_with_messages(queue, connect(), sql)

    queue.tend(queue.new_consumer(), 0.001)

    [(missed,)] = sql("SELECT clock_timestamp() - absent_since < '1 minute' FROM rhesis_tasks.consumer")
    assert missed is True
    assert is_known(sql, dead)


def test_who_comes_back_in_time_keeps_what_it_holds(queue: MessageQueue, connect: Connect, sql: Sql) -> None:
    consumer, messages = dead_with_messages(queue, connect(), sql)
    keeper = queue.new_consumer()
    queue.tend(keeper, LONG)
    assert sql("SELECT count(absent_since) FROM rhesis_tasks.consumer") == [(1,)], "it is missed"

    assert connect().attach(consumer, "back", ["a"]) is True
    queue.tend(keeper, 0)

    assert is_known(sql, consumer)
    assert queue.ack(claims(messages)) == []


@pytest.mark.parametrize("sign", ["tend", "attach"])
def test_who_has_no_lock_but_says_so_in_time_is_alive(queue: MessageQueue, sql: Sql, sign: str) -> None:
    consumer, keeper = queue.new_consumer(), queue.new_consumer()
    queue.attach(consumer, "behind a pooler", hold_lock=False)
    queue.tend(keeper, LONG)
    assert sql("SELECT count(absent_since) FROM rhesis_tasks.consumer") == [(1,)], "it is missed"
    sql("SELECT pg_advisory_lock(rhesis_tasks.lock_class(), 0)")  # somebody else looks after the others

    if sign == "tend":
        assert queue.tend(consumer, LONG)[:2] == (True, False)
    else:
        assert queue.attach(consumer, "behind a pooler", hold_lock=False) is False

    assert sql("SELECT count(absent_since) FROM rhesis_tasks.consumer") == [(0,)]


def test_a_restart_of_the_server_is_nobodys_death(queue: MessageQueue, connect: Connect, sql: Sql) -> None:
    consumer, _ = dead_with_messages(queue, connect(), sql)
    sql("UPDATE rhesis_tasks.consumer SET absent_since = pg_postmaster_start_time() - interval '2 hours'")

    queue.tend(queue.new_consumer(), LONG)

    assert is_known(sql, consumer)
    assert sql("SELECT absent_since > pg_postmaster_start_time() FROM rhesis_tasks.consumer") == [(True,)]


def test_messages_of_a_consumer_that_nobody_knows_are_given_to_others(queue: MessageQueue, sql: Sql) -> None:
    publish(queue, "a", 2)
    claimed(queue, "a")
    sql("TRUNCATE rhesis_tasks.consumer, rhesis_tasks.holders_known")  # as a crash of the server does

    keeper = queue.new_consumer()
    queue.tend(keeper, LONG)
    assert queue.size("a") == 0, "not before the grace period is over"

    queue.tend(keeper, 0)
    assert queue.size("a") == 2


def test_who_was_taken_for_dead_is_told_though_it_has_claimed_something_since(queue: MessageQueue) -> None:
    publish(queue, "a", 2)
    consumer, keeper = queue.new_consumer(), queue.new_consumer()
    queue.attach(consumer, "slow", hold_lock=False)
    queue.claim(consumer, ["a"], 1)
    queue.tend(keeper, 0)
    queue.claim(consumer, ["a"], 1)  # it does not know yet that it was taken for dead
    queue.tend(keeper, LONG)

    assert queue.tend(consumer, LONG).known is False


def test_one_looks_after_the_others_at_a_time_and_nobody_waits_for_it(
    queue: MessageQueue, connect: Connect, sql: Sql
) -> None:
    dead, _ = dead_with_messages(queue, connect(), sql)
    sql("SELECT pg_advisory_lock(rhesis_tasks.lock_class(), 0)")

    queue.tend(queue.new_consumer(), 0)
    assert is_known(sql, dead)

    sql("SELECT pg_advisory_unlock_all()")
    queue.tend(queue.new_consumer(), 0)
    assert not is_known(sql, dead)


def test_a_consumer_is_told_when_to_call_again(queue: MessageQueue, connect: Connect, sql: Sql) -> None:
    consumer = queue.new_consumer()
    queue.attach(consumer, "keeper")

    assert queue.tend(consumer, 100) == Kept(known=True, locked=True, again_in=50, promotes=True)

    missed, _ = dead_with_messages(queue, connect(), sql)
    sql("UPDATE rhesis_tasks.consumer SET absent_since = pg_postmaster_start_time() WHERE id = %s", missed)
    [(for_seconds,)] = sql("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())::float")
    assert 0 < queue.tend(consumer, for_seconds + 5).again_in <= 5.05, "as soon as somebody may be dead"
    assert is_known(sql, missed)


def test_consumers_of_another_schema_are_others(
    queue: MessageQueue, connect: Connect, tenant_database: TenantDatabase
) -> None:
    create_schema(tenant_database.owner, schema="jobs", roles=[tenant_database.role])
    there = connect("jobs")
    number = queue.new_consumer()
    assert queue.attach(number, "here") is True
    there.attach(number, "of the same number", hold_lock=False)

    there.tend(number + 1, 0)

    assert there.tend(number, LONG).known is False, "it is another's lock"
    assert queue.tend(number, LONG)[:2] == (True, True)


# --- the consumer ------------------------------------------------------------------------------------------------


def body(delivery: Delivery | None) -> bytes | None:
    return None if delivery is None else delivery.message.body


def test_a_consumer_holds_no_more_than_its_limit(queue: MessageQueue, worker: StartWorker, sql: Sql) -> None:
    publish(queue, "a", 10)
    one = worker({"channel": 3})
    one.consume("a")

    deliveries = [one.next(), one.next(), one.next()]
    assert list(map(body, deliveries)) == [b"1", b"2", b"3"]
    assert one.next(timeout=0.3) is None
    assert Counter(holder for _, holder, _ in holders(sql)) == {one.number: 3, None: 7}

    assert deliveries[1] is not None
    one.ack(deliveries[1])
    assert body(one.next()) == b"4"
    assert one.next(timeout=0) is None


def test_a_consumer_that_is_busy_asks_once_for_each_message(queue: MessageQueue, worker: StartWorker) -> None:
    publish(queue, "a", 20)
    one = worker({"channel": 2})
    one.consume("a")
    held = [one.next(), one.next()]
    before = one.work.calls["claim"]

    for _ in range(10):
        done = held.pop(0)
        assert done is not None
        one.ack(done)
        held.append(one.next())
        assert one.next(timeout=0) is None  # as a transport asks, until there is no more

    # A busy machine may let it look in between.
    assert one.work.calls["claim"] - before <= 15


def test_acknowledgements_go_together_while_there_is_work_in_hand(
    queue: MessageQueue, worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("_GATHERING", "_PAUSE_WHEN_FULL"):
        monkeypatch.setattr(consumer_module, pause, DEADLINE)
    publish(queue, "a", 40)
    one = worker({"channel": 8})
    one.consume("a")
    held = [one.next() for _ in range(8)]
    before = one.work.calls["claim"]

    for _ in range(32):
        done = held.pop(0)
        assert done is not None
        one.ack(done)
        while (delivery := one.next(timeout=0)) is not None:
            held.append(delivery)

    assert (len(held), one.work.calls["claim"] - before) == (8, 8)


def test_an_acknowledgement_does_not_wait_long_for_others(
    queue: MessageQueue, worker: StartWorker, pool: ThreadPoolExecutor, sql: Sql
) -> None:
    publish(queue, "a", 4)
    one = worker({"channel": 4})
    one.consume("a")
    held = [one.next() for _ in range(4)]
    assert held[0] is not None
    coming = one.in_background(pool)

    one.ack(held[0])

    wait_until("the message to be gone", lambda: len(holders(sql)) == 3, DEADLINE)
    publish(queue, "a", 1)
    assert body(coming.result(DEADLINE)) == b"1"


def test_two_queues_of_one_group_share_its_limit_and_take_turns(queue: MessageQueue, worker: StartWorker) -> None:
    for name in ("a", "b"):
        publish(queue, name, 4)
    one = worker({"channel": 2})
    one.consume("a", "b")

    got: Counter[str] = Counter()
    while (delivery := one.next(timeout=0.3)) is not None:
        got[delivery.message.queue] += 1
        if (following := one.next(timeout=0.3)) is not None:
            got[following.message.queue] += 1
            assert one.next(timeout=0) is None
            one.ack(following)
        one.ack(delivery)
        if got.total() == 4:
            assert set(got) == {"a", "b"}, "neither queue starves the other"

    assert got == {"a": 4, "b": 4}


def test_groups_have_a_limit_each(queue: MessageQueue, worker: StartWorker) -> None:
    for name in ("a", "b"):
        publish(queue, name, 5)
    one = worker({"first": 1, "second": 2})
    one.consume("a", group="first")
    one.consume("b", group="second")

    groups = [delivery.subscription.group for _ in range(4) if (delivery := one.next(timeout=0.3)) is not None]

    assert Counter(groups) == {"first": 1, "second": 2}


def test_groups_that_consume_one_queue_have_a_limit_each(queue: MessageQueue, worker: StartWorker) -> None:
    publish(queue, "a", 5)
    one = worker({"first": 1, "second": 1})
    one.consume("a", group="first")
    one.consume("a", group="second")

    groups = [delivery.subscription.group for _ in range(4) if (delivery := one.next(timeout=0.3)) is not None]

    assert Counter(groups) == {"first": 1, "second": 1}


def test_who_cancels_gives_back_what_it_claimed_ahead_and_keeps_what_it_was_handed(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 5)
    one = worker({"channel": 4})
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    assert Counter(holder for _, holder, _ in holders(sql)) == {one.number: 4, None: 1}

    one.consumer.cancel("channel:a")

    assert holders(sql) == [
        (b"1", one.number, 1),
        *((body, None, 0) for body in (b"2", b"3", b"4", b"5")),
    ], "uncounted, since nobody began with them"
    assert one.next(timeout=0.3) is None
    one.ack(delivery)
    one.consumer.flush()
    assert queue.size("a") == len(holders(sql)) == 4


def test_an_acknowledgement_is_sent_within_moments_though_nobody_asks_for_more(
    queue: MessageQueue, worker: StartWorker, pool: ThreadPoolExecutor, sql: Sql
) -> None:
    publish(queue, "a", 3)
    one = worker({"channel": 3}, grace=2)
    one.consume("a")
    deliveries = [each for each in (one.next(), one.next(), one.next()) if each is not None]

    list(pool.map(one.ack, deliveries, timeout=DEADLINE))

    wait_until("the messages to be gone", lambda: holders(sql) == [], DEADLINE)


def test_an_acknowledgement_is_sent_at_once_by_who_waits_for_more(
    queue: MessageQueue, worker: StartWorker, pool: ThreadPoolExecutor, sql: Sql
) -> None:
    publish(queue, "a", 1)
    one = worker({"channel": 2})
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    coming = one.in_background(pool)

    one.ack(delivery)

    wait_until("the message to be gone", lambda: holders(sql) == [], DEADLINE)
    publish(queue, "a", 1)
    assert body(coming.result(DEADLINE)) == b"1"


def test_who_closes_acknowledges_what_was_done_and_gives_back_the_rest_uncounted(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 5)
    one = worker({"channel": 4})
    one.consume("a")
    done = one.next()
    assert done is not None
    assert body(one.next()) == b"2"
    one.ack(done)

    one.consumer.close()

    assert holders(sql) == [(body, None, 0) for body in (b"2", b"3", b"4", b"5")]
    assert not is_known(sql, one.number)
    assert sql("SELECT count(*) FROM rhesis_tasks.subscription") == [(0,)]
    assert sql("SELECT count(*) FROM rhesis_tasks.waiter") == [(0,)]


def test_who_closes_does_not_take_itself_for_dead(
    queue: MessageQueue, worker: StartWorker, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    one = worker(grace=0.05)
    one.consume("a")
    attached, looks = one.ear.calls["attach"], one.ear.calls["tend"]

    def let_the_listener_look(name: str) -> None:
        if name == "detach":
            with suppress(TimeoutError):  # it looks no more, as it should
                wait_until("it to attach again", lambda: one.ear.calls["attach"] > attached, timeout=1)

    wait_until("a look of the listener's", lambda: one.ear.calls["tend"] > looks, DEADLINE)
    one.work.after = let_the_listener_look
    one.consumer.close()

    assert "taken for dead" not in caplog.text
    assert not is_known(sql, one.number)


def test_what_is_consumed_without_acknowledgement_is_taken_for_good(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 3)
    one = worker({"channel": 1})
    one.consume("a", no_ack=True)

    assert [body(one.next()) for _ in range(3)] == [b"1", b"2", b"3"], "no limit applies"
    assert holders(sql) == []


def test_one_message_can_be_had_without_a_subscription(queue: MessageQueue, worker: StartWorker, sql: Sql) -> None:
    publish(queue, "a", 3)
    one = worker()

    first, second = one.consumer.get("a", "channel", False), one.consumer.get("a", "channel", True)
    assert (body(first), body(second)) == (b"1", b"2")
    assert holders(sql) == [(b"1", one.number, 1), (b"3", None, 0)]

    assert first is not None
    one.consumer.ack(first.message)
    one.consumer.flush()
    assert holders(sql) == [(b"3", None, 0)]
    assert one.consumer.get("empty", "channel", False) is None


def test_a_message_that_cannot_be_read_is_kept_where_nobody_claims_it(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 2)
    one = worker()
    one.consume("a")
    delivery = one.next()
    assert delivery is not None

    one.consumer.bury(delivery.message, "it cannot be read")
    one.consumer.close()

    assert sql("SELECT body, reason FROM rhesis_tasks.dead_letter") == [(b"1", "it cannot be read")]
    assert bodies(claimed(queue, "a")) == [b"2"]


def test_a_late_acknowledgement_is_told(
    queue: MessageQueue, worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    publish(queue, "a", 1)
    one = worker()
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    queue.release(claims([delivery.message]))

    one.ack(delivery)
    one.consumer.flush()

    assert f"message {delivery.message.id} was done, but had been given to others" in caplog.text
    assert queue.size("a") == 1


def test_a_message_that_comes_back_to_who_still_works_on_it_is_not_handed_out_again(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 1)
    one = worker()
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    queue.release(claims([delivery.message]))  # as when it was taken for dead

    assert one.next(timeout=0.5) is None
    assert holders(sql) == [(b"1", one.number, 2)]
    one.ack(delivery)
    one.consumer.flush()

    assert holders(sql) == []


# --- waking a consumer -------------------------------------------------------------------------------------------


def test_messages_arrive_by_notification_long_before_the_next_poll(
    queue: MessageQueue, worker: StartWorker, pool: ThreadPoolExecutor
) -> None:
    one = worker()
    one.consume("a", "b")
    for name in ("a", "b", "a"):
        coming = one.in_background(pool)

        queue.publish("", name, "{}", name.encode())

        delivery = coming.result(DEADLINE)
        assert body(delivery) == name.encode()
        one.ack(delivery)


def test_what_was_found_is_handed_out_before_the_consumer_asks_for_more(
    queue: MessageQueue, worker: StartWorker
) -> None:
    one = worker()
    one.consume("a")
    assert one.next(timeout=0.1) is None
    said: list[str] = []
    one.work.after = said.append
    for number in (1, 2):
        publish(queue, "a", 1)
        wait_until("the notification", lambda: one.ear.heard == ["a"] * number, DEADLINE, interval=0.001)  # noqa: B023
        said.clear()

        delivery = one.next()
        assert body(delivery) == b"1"
        assert said == ["claim"]

        assert delivery is not None
        one.ack(delivery)
        assert one.next(timeout=0.1) is None
        assert said[1:3] == ["wait_for", "claim"]


def test_a_message_wakes_a_consumer_that_is_not_full(
    queue: MessageQueue, worker: StartWorker, pool: ThreadPoolExecutor
) -> None:
    publish(queue, "a", 1)
    full, idle = worker({"channel": 1}), worker({"channel": 1})
    full.consume("a")
    assert body(full.next()) == b"1"
    assert full.next(timeout=0.3) is None
    idle.consume("a")
    coming = idle.in_background(pool)

    publish(queue, "a", 1)

    assert body(coming.result(DEADLINE)) == b"1"


def test_a_message_that_comes_while_a_consumer_asks_to_be_notified_does_not_make_it_deaf(
    queue: MessageQueue, worker: StartWorker
) -> None:
    one = worker()

    def publish_meanwhile(name: str) -> None:
        if name == "wait_for":
            one.work.after = lambda _: None
            queue.publish("", "a", "{}", b"meanwhile")
            wait_until("the notification", lambda: one.ear.heard == ["a"], DEADLINE, interval=0.001)

    one.work.after = publish_meanwhile
    one.consume("a")
    delivery = one.next()
    assert body(delivery) == b"meanwhile"
    assert delivery is not None
    one.ack(delivery)
    assert one.next(timeout=0.5) is None, "it looks no more"

    queue.publish("", "a", "{}", b"later")

    assert body(one.next(timeout=3)) == b"later"


def test_a_message_that_was_published_just_before_a_consumer_waits_is_found_soon(
    queue: MessageQueue, worker: StartWorker, tenant_database: TenantDatabase
) -> None:
    one = worker()
    with tenant_database.owner.connect() as publisher:
        publisher.exec_driver_sql("SELECT rhesis_tasks.publish('', 'a', '{}', '1')")  # nobody waits yet
        one.work.after = lambda name: publisher.commit() if name == "wait_for" else None
        one.consume("a")

        assert body(one.next()) == b"1"


def test_who_allows_himself_less_does_not_hurry_those_who_allow_themselves_more(
    queue: MessageQueue, connect: Callable[[], MessageQueue], sql: Sql
) -> None:
    patient, hasty = connect(), queue.new_consumer()
    slow = queue.new_consumer()
    patient.attach(slow, "behind a pooler", hold_lock=False, grace=60.0)
    queue.attach(hasty, "hasty", grace=0.05)

    for _ in range(2):  # the first look marks it as absent
        kept = queue.tend(hasty, 0.0)

    assert is_known(sql, slow)
    assert kept.again_in <= 0.05


def test_a_consumer_that_is_full_passes_on_what_it_is_notified_of(
    queue: MessageQueue, worker: StartWorker, pool: ThreadPoolExecutor
) -> None:
    full = worker({"channel": 1}, poll_interval=LONG)
    full.consume("a", "b")
    assert full.next(timeout=0.5) is None
    queue.publish("", "a", "{}", b"1")
    assert body(full.next()) == b"1"  # it does not look again, and b's publishers would still notify it
    idle = worker(poll_interval=LONG)
    idle.consume("b")
    coming = idle.in_background(pool)

    queue.publish("", "b", "{}", b"2")
    assert full.next(timeout=0.5) is None

    assert body(coming.result(DEADLINE)) == b"2"


def test_an_idle_consumer_asks_the_server_a_few_times_in_a_minute(worker: StartWorker) -> None:
    grace, poll_interval = 1.0, 0.4
    one = worker(grace=grace, poll_interval=poll_interval)
    one.consume("a", "b")
    began = time.monotonic()

    assert one.next(timeout=2.5) is None

    seconds = time.monotonic() - began
    asked = one.work.calls + one.ear.calls
    looks, life_signs = asked.pop("claim"), asked.pop("tend")
    assert looks <= 4 + seconds / poll_interval, "and three times more after it has asked to be notified"
    assert life_signs <= 2 + seconds / (grace / 2)
    assert asked.pop("promote") <= 2 + seconds / 0.5, "since it is the oldest of all"
    assert asked.pop("agree", 0) <= 1 + seconds / grace
    assert asked.pop("wait_for") == 1
    assert asked.pop("attach") == asked.pop("next_consumer") == asked.pop("channel_of") == 1
    assert asked.pop("subscribe") == 2
    assert set(asked.values()) == {1}, "and what a connection is opened with"


# --- losing connections ------------------------------------------------------------------------------------------


def terminate(superuser: Engine, connection: Watched) -> None:
    with superuser.connect() as admin:
        assert admin.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": connection.backend})


@pytest.mark.parametrize("lost", ["work", "ear", "both"])
def test_a_consumer_outlives_its_connections_and_nothing_is_lost_or_done_twice(
    queue: MessageQueue, worker: StartWorker, superuser: Engine, sql: Sql, pool: ThreadPoolExecutor, lost: str
) -> None:
    published = publish(queue, "a", 20)
    one = worker({"channel": 6})
    one.consume("a")
    deliveries = [each for _ in range(4) if (each := one.next()) is not None]
    one.ack(deliveries[0])
    ear, work = one.ear.backend, one.work.backend
    for name in ("ear", "work") if lost == "both" else (lost,):
        terminate(superuser, getattr(one, name))
    for delivery in deliveries[1:3]:
        one.ack(delivery)

    rest = one.all()
    one.ack(deliveries[3])
    one.consumer.flush()

    assert [body(each) for each in deliveries] + rest == published
    assert holders(sql) == []
    wait_until("it to be attached again", lambda: one.ear.backend != ear or lost == "work", DEADLINE)
    assert (one.work.backend != work) is (lost != "ear")
    wait_until("it to listen again", lambda: one.ear.calls["attach"] == (1 if lost == "work" else 2), DEADLINE)
    coming = one.in_background(pool)
    publish(queue, "a", 1)
    assert body(coming.result(DEADLINE)) == b"1", "it is notified as before"
    assert queue.tend(queue.new_consumer(), 0).known is False
    assert is_known(sql, one.number), "it has its lock"


def test_a_consumer_that_waits_notices_that_its_connections_are_lost(
    queue: MessageQueue, worker: StartWorker, superuser: Engine, pool: ThreadPoolExecutor
) -> None:
    one = worker()
    one.consume("a")
    coming = one.in_background(pool)

    terminate(superuser, one.work)
    terminate(superuser, one.ear)
    publish(queue, "a", 1)

    assert body(coming.result(DEADLINE)) == b"1"


def test_messages_whose_claim_was_lost_on_the_way_are_delivered_as_if_nothing_had_happened(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    published = publish(queue, "a", 5)
    one = worker({"channel": 3})

    def lose_the_answer(name: str) -> None:
        if name == "claim":
            one.work.after = lambda _: None
            one.work.close()
            raise DatabaseUnavailableError("the answer was lost")

    one.work.after = lose_the_answer
    one.consume("a")

    deliveries = [each for _ in range(3) if (each := one.next()) is not None]

    assert [body(each) for each in deliveries] == published[:3]
    assert [each.message.deliveries for each in deliveries] == [1, 1, 1]
    assert Counter(holder for _, holder, _ in holders(sql)) == {one.number: 3, None: 2}


def test_an_acknowledgement_whose_answer_was_lost_is_no_cause_for_alarm(
    queue: MessageQueue, worker: StartWorker, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    publish(queue, "a", 2)
    one = worker({"channel": 1})
    one.consume("a")
    delivery = one.next()
    assert delivery is not None

    def lose_the_answer(name: str) -> None:
        if name == "claim":
            one.work.after = lambda _: None
            one.work.close()
            raise DatabaseUnavailableError("the answer was lost")

    one.work.after = lose_the_answer
    one.ack(delivery)

    assert body(one.next()) == b"2"
    assert "had been given to others" not in caplog.text
    assert [each for each, _, _ in holders(sql)] == [b"2"]


def test_an_acknowledgement_under_way_is_not_forgotten_when_the_connection_is_made_anew(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 1)
    one = worker(grace=0.4)
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    under_way, go_on = threading.Event(), threading.Event()

    def linger(name: str) -> None:
        if name == "ack":
            under_way.set()
            go_on.wait(0.5)

    one.work.before = linger
    one.work.after = lambda name: go_on.set() if name == "agree" else None
    one.ack(delivery)
    assert under_way.wait(DEADLINE), "the listener sends it, since nobody asks for more"
    one.work.close()

    assert one.next(timeout=1) is None
    assert holders(sql) == []


def test_while_the_server_is_away_a_consumer_waits_as_long_as_it_was_told(worker: StartWorker) -> None:
    one = worker()
    one.consume("a")

    def be_away(_: str) -> None:
        raise DatabaseUnavailableError("away")

    one.work.before = be_away
    began = time.monotonic()
    assert one.next(timeout=0.5) is None
    assert time.monotonic() - began >= 0.5
    one.work.before = lambda _: None


def stay_away_for_too_long(
    one: Worker, queue: MessageQueue, sql: Sql, database: TenantDatabase, superuser: Engine
) -> None:
    """Let a consumer be without its listener's connection until others have taken it for dead, and come back."""
    login = f'ALTER ROLE "{database.role}"'
    queue.new_consumer()  # connected while that is possible
    with superuser.connect().execution_options(isolation_level="AUTOCOMMIT") as admin:
        admin.exec_driver_sql(f"{login} NOLOGIN")
        try:
            terminate(superuser, one.ear)
            reap(queue, sql, one.number, grace=0.1)
        finally:
            admin.exec_driver_sql(f"{login} LOGIN")
    looks = one.ear.calls["tend"]
    wait_until("it to say that it lives", lambda: one.ear.calls["tend"] > looks, DEADLINE)


def test_who_was_away_for_too_long_does_not_do_what_others_do_now(
    queue: MessageQueue, worker: StartWorker, sql: Sql, tenant_database: TenantDatabase, superuser: Engine
) -> None:
    publish(queue, "a", 3)
    one = worker({"channel": 3}, grace=0.5)
    one.consume("a")
    assert body(one.next()) == b"1"
    stay_away_for_too_long(one, queue, sql, tenant_database, superuser)

    others = claimed(queue, "a")

    assert bodies(others) == [b"1", b"2", b"3"]
    assert one.all() == [], "what it had claimed ahead it gives up"
    assert queue.ack(claims(others)) == []


def test_who_was_away_for_too_long_gets_new_messages_again(
    queue: MessageQueue,
    worker: StartWorker,
    sql: Sql,
    tenant_database: TenantDatabase,
    superuser: Engine,
    pool: ThreadPoolExecutor,
) -> None:
    one = worker(grace=0.5)
    one.consume("a")
    assert one.next(timeout=0) is None
    stay_away_for_too_long(one, queue, sql, tenant_database, superuser)
    coming = one.in_background(pool)

    publish(queue, "a", 1)

    assert body(coming.result(DEADLINE)) == b"1"


def test_who_was_away_and_gets_back_what_it_still_does_does_it_once(
    queue: MessageQueue,
    worker: StartWorker,
    sql: Sql,
    tenant_database: TenantDatabase,
    superuser: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(queue, "a", 1)
    one = worker({"channel": 3}, grace=0.5)
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    stay_away_for_too_long(one, queue, sql, tenant_database, superuser)
    assert holders(sql) == [(b"1", None, 1)]

    assert one.next(timeout=1) is None
    assert holders(sql) == [(b"1", one.number, 2)]
    one.ack(delivery)
    assert one.next(timeout=1) is None

    assert holders(sql) == []
    assert "had been given to others" not in caplog.text


def test_who_was_away_gives_back_what_it_got_back(
    queue: MessageQueue, worker: StartWorker, sql: Sql, tenant_database: TenantDatabase, superuser: Engine
) -> None:
    publish(queue, "a", 2)
    one = worker({"channel": 4}, grace=0.5)
    one.consume("a")
    first, second = one.next(), one.next()
    assert first is not None
    assert second is not None
    stay_away_for_too_long(one, queue, sql, tenant_database, superuser)
    assert one.next(timeout=1) is None

    one.consumer.release([first.message])
    one.consumer.bury(second.message, "it cannot be done")

    assert sql("SELECT body FROM rhesis_tasks.dead_letter") == [(b"2",)]
    assert holders(sql) == [(b"1", None, 2)]
    assert body(one.next()) == b"1", "it is not with it any more"


def test_what_was_done_by_one_who_was_away_is_not_done_again_by_it(
    queue: MessageQueue, worker: StartWorker, sql: Sql, tenant_database: TenantDatabase, superuser: Engine
) -> None:
    publish(queue, "a", 1)
    one = worker({"channel": 3}, grace=0.5)
    one.consume("a")
    delivery = one.next()
    assert delivery is not None
    stay_away_for_too_long(one, queue, sql, tenant_database, superuser)
    one.ack(delivery)

    assert one.next(timeout=1) is None

    wait_until("the message to go", lambda: holders(sql) == [], DEADLINE)


def test_what_has_the_number_of_what_one_did_and_was_never_delivered_is_delivered(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 1)
    one = worker({"channel": 3})
    one.consume("a")
    assert body(one.next()) == b"1"
    sql(
        "UPDATE rhesis_tasks.message "
        "SET claim_token = NULL, holder = NULL, deliveries = 0, body = 'restored' RETURNING 1"
    )
    queue.publish("", "a", "{}", b"2")

    assert {body(one.next()), body(one.next())} == {b"restored", b"2"}


# --- cost --------------------------------------------------------------------------------------------------------


def test_dead_letters_of_a_queue_are_counted_without_a_look_at_those_of_others(queue: MessageQueue, sql: Sql) -> None:
    for name in ("a", "b", "c"):
        queue.declare_queue(name)
    letters = (
        "INSERT INTO rhesis_tasks.dead_letter (id, queue, priority, deliveries, reason, published_at, envelope, body) "
        "SELECT n, %s, 0, 5, 'for a test', now(), '{}', '1' FROM generate_series(%s::integer, %s) n"
    )
    sql(letters, "b", 1, 2)
    queue.stats(), queue.stats()
    few = pages(queue, "queue_stats(10000)")

    sql(letters, "other", 3, 20_000)

    assert pages(queue, "queue_stats(10000)") <= few + 50
    assert {name: dead for name, *_, dead in queue.stats()} == {"a": 0, "b": 2, "c": 0}


def test_the_message_of_a_task_is_found_without_a_look_at_events_whether_its_queue_is_durable_or_not(
    queue: MessageQueue, tenant_database: TenantDatabase, sql: Sql
) -> None:
    queue.declare_queue("passing", durable=False)
    for name in ("lasting", "passing"):
        queue.publish("", name, "{}", b"1", task_id=name, tenant="acme", delay=LONG)
    owner = queue_on(Connection(database_url(tenant_database.owner_url), name="owner"))
    finding = "has_message('acme', 'none')"
    pages(owner, finding), pages(owner, finding)
    few = pages(owner, finding)

    sql(
        "INSERT INTO rhesis_tasks.transient_message (queue, envelope, body) "
        "SELECT 'events', '{}', '1' FROM generate_series(1, 20000)"
    )

    assert pages(owner, finding) <= few + 10
    owner.connection.close()
    assert queue.hasten(["lasting", "passing"]) == 2
    assert {each.queue for each in claimed(queue, "lasting", "passing")} == {"lasting", "passing"}


SMALL = 1_000

OPERATIONS: dict[str, str] = {
    "claim 32 and acknowledge 32": "SELECT * FROM rhesis_tasks.claim(1, %s, %s, '{a}', 32, '{}', 0, true, "
    "5, 30, '{NULL}', '{NULL}', '{NULL}')",
    "acknowledge 32": "SELECT * FROM rhesis_tasks.ack(%s, %s)",
    "release 32": "SELECT rhesis_tasks.release(%s, %s, true, NULL)",
    "release what a consumer holds": "SELECT rhesis_tasks.release_held(1, NULL)",
    "take 32": "SELECT * FROM rhesis_tasks.claim(1, '{}', '{}', '{}', 0, '{a}', 32, true, 5, 30, '{}', '{}', '{}')",
    "publish": "SELECT rhesis_tasks.publish('', 'a', '{}', 'body')",
    "publish with a delay": "SELECT rhesis_tasks.publish('', 'a', '{}', 'body', 0, 'b', 'c', 'd', NULL, 60, NULL)",
    "look for what is due": "SELECT rhesis_tasks.promote(32)",
    "tend": "SELECT * FROM rhesis_tasks.tend(1, 3600)",
}
OLD_PLANS = "plans of when it was empty"
OLD_STATISTICS = "statistics of when it was empty"
FRESH_STATISTICS = "fresh statistics"

Costs = dict[tuple[str, str], int]


def cost(queue: MessageQueue, operation: str) -> int:
    """How many pages an operation touches: of tables, of indexes, of the catalog."""
    held = claims(queue.claim(1, ["a"], 32)[0])
    statement = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {OPERATIONS[operation]}"
    parameters = ([id for id, _ in held], [token for _, token in held]) if "%s" in statement else ()
    [(explained,)] = queue.connection.query(statement, parameters)
    plan = (json.loads(explained) if isinstance(explained, str) else explained)[0]["Plan"]
    queue.connection.query("SELECT rhesis_tasks.release_held(1, NULL)")
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def costs_at(postgres_url: str, waiting: int) -> Costs:
    """The cost of each operation where so many messages wait, in the three situations."""
    costs: Costs = {}
    with new_tenant_database(postgres_url) as database, ExitStack() as open_connections:

        def connected(url: str) -> MessageQueue:
            connection = Connection(database_url(url), name="test")
            open_connections.callback(connection.close)
            return queue_on(connection)

        def measure(situation: str, queue: MessageQueue) -> None:
            for operation in OPERATIONS:
                cost(
                    queue, operation
                )  # what a session reads from the catalog when it plans something is not of interest
                costs[situation, operation] = cost(queue, operation)

        owner, old = connected(database.owner_url).connection, connected(database.url)
        for table in ("message", "transient_message"):
            owner.query(f"ALTER TABLE rhesis_tasks.{table} SET (autovacuum_enabled = false)")
            owner.query(f"ANALYZE rhesis_tasks.{table}")
        old.attach(1, "consumer", ["a"], hold_lock=False)
        for _ in range(6):  # after the fifth time a plan is kept
            for operation in OPERATIONS:
                old.publish("", "a", "{}", b"")
                cost(old, operation)
        old.purge("a")
        owner.query(
            "INSERT INTO rhesis_tasks.message (queue, envelope, body) "
            "SELECT 'a', '{}', 'body' FROM generate_series(1, %s)",
            (waiting,),
        )
        measure(OLD_PLANS, old)
        measure(OLD_STATISTICS, connected(database.url))
        owner.query("ANALYZE rhesis_tasks.message")
        measure(FRESH_STATISTICS, connected(database.url))
    return costs


@pytest.fixture(scope="module")
def costs(postgres_url: str) -> tuple[Costs, Costs]:
    """Where few messages wait, and where many do."""
    return costs_at(postgres_url, SMALL), costs_at(postgres_url, BACKLOG)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("situation", "operation"),
    [(situation, operation) for situation in (OLD_PLANS, OLD_STATISTICS, FRESH_STATISTICS) for operation in OPERATIONS],
)
def test_what_is_done_costs_the_same_however_many_messages_wait(
    costs: tuple[Costs, Costs], situation: str, operation: str
) -> None:
    few, many = costs

    assert many[situation, operation] <= 1.5 * few[situation, operation] + 300
