"""Messages that wait for their time, those that end workers, and dead letters, in the queue and its consumer.

RHESIS_TASKS_DELAYED says how many delayed messages are many (20000).
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from queue_rig import (  # noqa: F401  # fixtures
    DEADLINE,
    LONG,
    Connect,
    Sql,
    StartWorker,
    Watched,
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
    sql,
    tenant_database,
    worker,
)
from sqlalchemy import text

from rhesis_tasks.postgres.queue import Claimed, MessageQueue
from rhesis_tasks.processes import wait_until
from rhesis_tasks.testing import TenantDatabase

DELAYED = int(os.environ.get("RHESIS_TASKS_DELAYED", "20000"))

# --- delays ------------------------------------------------------------------------------------------------------


def make_due(sql: Sql) -> None:
    sql("UPDATE rhesis_tasks.message SET due_at = clock_timestamp(), not_before = clock_timestamp()")


def test_a_delayed_message_is_not_claimed_before_it_is_due(queue: MessageQueue, sql: Sql) -> None:
    queue.publish("", "a", "{}", b"later", delay=LONG)
    queue.publish("", "a", "{}", b"now")

    assert bodies(claimed(queue, "a")) == [b"now"]
    assert queue.size("a") == 0
    assert queue.promote(10) == pytest.approx(LONG, abs=60)
    assert claimed(queue, "a") == []

    make_due(sql)
    assert queue.promote(10) is None, "no other one is delayed"
    [message] = claimed(queue, "a")
    assert (message.body, message.is_due, message.deliveries) == (b"later", True, 1)


def test_a_message_without_a_delay_was_never_due(queue: MessageQueue) -> None:
    queue.publish("", "a", "{}", b"1", delay=0)
    queue.publish("", "a", "{}", b"2", delay=-5)

    assert [(each.body, each.is_due) for each in claimed(queue, "a")] == [(b"1", False), (b"2", False)]


def test_what_lapses_before_it_is_due_is_promoted_then_and_is_not_due(queue: MessageQueue) -> None:
    queue.publish("", "a", "{}", b"1", delay=LONG, lapse=0.01)

    found: list[Claimed] = []

    def is_promoted() -> bool:
        queue.promote(10)
        found.extend(claimed(queue, "a"))
        return bool(found)

    wait_until("it to be promoted", is_promoted, DEADLINE, interval=0.01)
    assert [each.is_due for each in found] == [False], "its ETA is to come"


def test_what_is_due_is_promoted_in_parts_the_longest_due_first(queue: MessageQueue, sql: Sql) -> None:
    for body in publish(queue, "a", 5, delay=LONG):
        seconds = int(body)
        sql("UPDATE rhesis_tasks.message SET due_at = clock_timestamp() - make_interval(secs => %s) WHERE body = %s",
            seconds, body)  # fmt: skip

    assert queue.promote(2) == 0, "others are due, too"
    assert bodies(claimed(queue, "a")) == [b"4", b"5"]
    assert queue.promote(2) == 0
    assert queue.promote(2) is None
    assert bodies(claimed(queue, "a")) == [b"1", b"2", b"3"]


def test_what_another_promotes_at_this_moment_is_passed_over(queue: MessageQueue, connect: Connect, sql: Sql) -> None:
    publish(queue, "a", 2, delay=LONG)
    make_due(sql)
    other = connect()
    raw = other.connection.open()
    with raw.transaction():
        other.promote(1)
        queue.connection.query("SET lock_timeout = '5s'")

        assert queue.promote(10) == 0, "as far as it can see"
        assert bodies(claimed(queue, "a")) == [b"2"]
    assert bodies(claimed(queue, "a")) == [b"1"]


def test_messages_of_queues_that_are_not_durable_are_delayed_too(queue: MessageQueue, sql: Sql) -> None:
    queue.declare_queue("passing", durable=False)
    publish(queue, "passing", 1, delay=LONG)
    assert claimed(queue, "passing") == []

    make_due(sql)
    queue.promote(10)

    assert bodies(claimed(queue, "passing")) == [b"1"]


def test_who_promotes_does_not_ask_again_and_again_while_another_locks_what_is_due(
    queue: MessageQueue, worker: StartWorker, tenant_database: TenantDatabase, sql: Sql
) -> None:
    publish(queue, "a", 1, delay=LONG)
    make_due(sql)
    with tenant_database.owner.connect() as another:
        another.exec_driver_sql("SELECT FROM rhesis_tasks.message FOR UPDATE")
        one = worker()
        one.consume("a")
        began = time.monotonic()
        assert one.next(timeout=1) is None
        assert 2 <= one.ear.calls["promote"] <= 2 + (time.monotonic() - began) / 0.05

    delivery = one.next()
    assert delivery is not None and delivery.message.body == b"1"


@pytest.mark.parametrize("others", [0, 2])
def test_a_consumer_gets_a_delayed_message_when_it_is_due_though_nobody_publishes(
    queue: MessageQueue, worker: StartWorker, others: int
) -> None:
    """One of all consumers promotes; a poll would not come in this time."""
    waiting = [worker(poll_interval=LONG) for _ in range(1 + others)]
    for each in waiting:
        each.consume("a")
        assert each.next(timeout=0.5) is None
    began = time.monotonic()
    queue.publish("", "a", "{}", b"1", delay=0.7)

    found: list[bytes] = []

    def is_delivered() -> bool:
        found.extend(one.message.body for each in waiting if (one := each.next(timeout=0.01)) is not None)
        return bool(found)

    wait_until("it to be delivered", is_delivered, DEADLINE)
    assert found == [b"1"]
    assert time.monotonic() - began > 0.65


def test_another_consumer_promotes_when_the_first_one_is_gone(queue: MessageQueue, worker: StartWorker) -> None:
    first, second = worker(), worker()
    second.consume("a")
    assert second.next(timeout=0.1) is None
    first.consumer.close()
    queue.publish("", "a", "{}", b"1", delay=0.1)

    delivery = second.next()

    assert delivery is not None, "it is told, and would give its next life sign in half an hour"
    assert delivery.message.body == b"1"


@pytest.mark.parametrize(("seconds", "promotes"), [(50, False), (65, True)])
def test_another_consumer_promotes_when_the_first_one_has_missed_a_life_sign(
    queue: MessageQueue, sql: Sql, seconds: int, promotes: bool
) -> None:
    first, second = queue.new_consumer(), queue.new_consumer()
    for consumer in (first, second):
        queue.attach(consumer, "here", ["a"], grace=100)
    sql("UPDATE rhesis_tasks.consumer SET seen_at = now() - make_interval(secs => %s) WHERE id = %s", seconds, first)

    assert queue.tend(second, 100).promotes is promotes


def delay_many(sql: Sql) -> None:
    """Messages that are due in an hour and later, in another order than they are stored."""
    sql(
        "INSERT INTO rhesis_tasks.message (queue, envelope, body, due_at) "
        "SELECT 'a', '{}', 'later', now() + make_interval(secs => 3600 + 3600 * random()) FROM generate_series(1, %s)",
        DELAYED,
    )


def test_many_delayed_messages_cost_a_claim_nothing(queue: MessageQueue, sql: Sql) -> None:
    """Not one page more: they are in none of the indexes that it walks."""
    claim = "claim(1, '{}', '{}', '{a}', 32, '{}', 0, true, 5, 30, '{NULL}', '{NULL}', '{NULL}')"
    publish(queue, "a", 1)
    pages(queue, claim), pages(queue, claim)
    few = pages(queue, claim)

    delay_many(sql)

    assert pages(queue, claim) <= few + 10


def test_what_is_due_is_promoted_without_a_walk_through_all_that_is_delayed(queue: MessageQueue, sql: Sql) -> None:
    delay_many(sql)
    queue.publish("", "a", "{}", b"1", delay=0.01)
    wait_until("it to be due", lambda: sql("SELECT min(due_at) < clock_timestamp() FROM rhesis_tasks.message")[0][0], 5)

    queue.connection.query("SELECT rhesis_tasks.promote(0)")  # so that what planning looks at is not counted

    looked_at = pages(queue, "promote(1000)")

    assert bodies(claimed(queue, "a")) == [b"1"]
    assert looked_at < DELAYED / 40


def test_what_comes_to_be_due_among_many_is_delivered_within_a_second(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    delay_many(sql)
    waiting = worker(poll_interval=LONG)
    waiting.consume("a")
    assert waiting.next(timeout=0.5) is None

    late = []
    for delay in (0.7, 0.2, 0.7):
        due = time.monotonic() + delay
        queue.publish("", "a", "{}", b"1", delay=delay)
        delivery = waiting.next()
        assert delivery is not None
        late.append(time.monotonic() - due)
        waiting.ack(delivery)

    assert min(late) >= 0
    assert max(late) < 1


# --- what ends workers -------------------------------------------------------------------------------------------


def make_suspect(queue: MessageQueue, name: str, *, deliveries: int = 2, priority: int = 0) -> int:
    """A message that was delivered so often in vain; returns its id."""
    queue.publish("", name, "{}", b"suspect", priority=priority)
    consumer = queue.new_consumer()
    for _ in range(deliveries):
        [message] = [each for each in queue.claim(consumer, [name], 100, has_none=True)[0] if each.body == b"suspect"]
        assert queue.release(claims([message]), reason="it was too much") == 1
    queue.detach(consumer)  # others that it claimed go back uncounted
    return message.id


def test_what_was_delivered_twice_in_vain_is_claimed_by_who_has_nothing_and_nothing_with_it(
    queue: MessageQueue,
) -> None:
    make_suspect(queue, "a", priority=9)
    publish(queue, "a", 2)
    consumer = queue.new_consumer()

    assert bodies(queue.claim(consumer, ["a"], 1)[0]) == [b"1"], "it has something, for all that is known"
    [alone] = queue.claim(consumer, ["a"], 10, has_none=True)[0]
    assert (alone.body, alone.deliveries) == (b"suspect", 3)
    assert bodies(queue.claim(consumer, ["a"], 10, has_none=True)[0]) == [b"2"]


def make_wait(sql: Sql, seconds: float) -> None:
    """Let a suspect have waited for so long."""
    sql(
        "UPDATE rhesis_tasks.message SET claimed_at = clock_timestamp() - make_interval(secs => %s) "
        "WHERE body = 'suspect'",
        seconds,
    )


def test_who_has_something_claims_no_more_once_a_suspect_has_waited_for_long(queue: MessageQueue) -> None:
    make_suspect(queue, "a")
    publish(queue, "a", 1)
    consumer = queue.new_consumer()
    queue.subscribe(consumer, "a")

    assert queue.claim(consumer, ["a"], 10, patience=0)[0] == []
    assert bodies(queue.claim(consumer, ["a"], 10, patience=0, has_none=True)[0]) == [b"suspect"]
    assert bodies(queue.claim(consumer, ["a"], 10, patience=0)[0]) == [b"1"], "nobody waits any more"


@pytest.mark.parametrize(
    ("seconds", "makes_room"), [(29, None), (31, 0), (332, 1), (932, 2), (2132, None), (4532, 0), (8132, 1), (18932, 0)]
)
def test_one_of_all_who_have_something_makes_room_for_a_suspect_and_for_a_time(
    queue: MessageQueue, sql: Sql, seconds: float, makes_room: int | None
) -> None:
    consumers = [queue.new_consumer() for _ in range(3)]
    for consumer in consumers:
        queue.attach(consumer, "busy", ["a"], hold_lock=False)
    make_suspect(queue, "a")
    make_wait(sql, seconds)
    publish(queue, "a", 3)

    got = [len(queue.claim(consumer, ["a"], 1, patience=30)[0]) for consumer in consumers]

    assert got == [0 if number == makes_room else 1 for number in range(3)]


@pytest.mark.parametrize(("seconds", "claims_on"), [(31, False), (332, True), (932, False), (2132, True)])
def test_a_single_consumer_makes_room_for_a_suspect_for_a_part_of_the_time(
    queue: MessageQueue, sql: Sql, seconds: float, claims_on: bool
) -> None:
    consumer = queue.new_consumer()
    queue.attach(consumer, "busy", ["a"], hold_lock=False)
    make_suspect(queue, "a")
    make_wait(sql, seconds)
    publish(queue, "a", 1)

    assert bool(queue.claim(consumer, ["a"], 1, patience=30)[0]) is claims_on


def test_of_what_comes_to_who_makes_room_another_one_is_notified(
    queue: MessageQueue, worker: StartWorker, sql: Sql, pool: ThreadPoolExecutor
) -> None:
    publish(queue, "a", 2)
    first, second = worker({"channel": 2}), worker({"channel": 2})
    for one in (first, second):
        one.consume("a")
        one.limits["channel"] = 1
        assert one.next() is not None
        one.limits["channel"] = 2
    make_suspect(queue, "a")
    assert first.next(timeout=0.5) is None
    coming = second.in_background(pool)
    make_wait(sql, 60)

    queue.publish("", "a", "{}", b"3")
    assert first.next(timeout=0.5) is None, "it makes room, and was notified, since it has waited for longer"

    delivery = coming.result(DEADLINE)
    assert delivery is not None and delivery.message.body == b"3"


def test_room_is_made_for_a_suspect_whose_claim_was_lost_on_the_way(queue: MessageQueue) -> None:
    make_suspect(queue, "a")
    publish(queue, "a", 1)
    consumer = queue.new_consumer()
    queue.subscribe(consumer, "a")
    assert bodies(queue.claim(consumer, ["a"], 1, has_none=True)[0]) == [b"suspect"]

    assert queue.agree(consumer, []) == set()

    assert queue.claim(consumer, ["a"], 10, patience=0)[0] == []


def test_suspects_of_other_queues_do_not_hold_anybody_up(queue: MessageQueue) -> None:
    make_suspect(queue, "b")
    publish(queue, "a", 1)
    consumer = queue.new_consumer()
    queue.attach(consumer, "busy", ["a", "b"], hold_lock=False)

    assert bodies(queue.claim(consumer, ["a"], 10, patience=0)[0]) == [b"1"]


def test_what_was_delivered_too_often_is_claimed_to_be_buried(queue: MessageQueue, sql: Sql) -> None:
    make_suspect(queue, "a", deliveries=5)
    publish(queue, "a", 1)
    consumer = queue.new_consumer()

    [dead] = queue.claim(consumer, ["a"], 10, max_deliveries=5)[0]

    assert (dead.body, dead.deliveries, dead.last_reason) == (b"suspect", 6, "it was too much")
    assert dead.token is not None
    assert queue.bury(dead.id, dead.token, "too often") is True
    assert queue.bury(dead.id, dead.token, "too often") is False, "once is enough"
    assert sql("SELECT id, body, deliveries, reason FROM rhesis_tasks.dead_letter") == [
        (dead.id, b"suspect", 6, "too often")
    ]


def test_without_a_limit_it_is_claimed_again_and_again(queue: MessageQueue) -> None:
    make_suspect(queue, "a", deliveries=20)

    assert bodies(queue.claim(queue.new_consumer(), ["a"], 10, has_none=True)[0]) == [b"suspect"]


def test_a_consumer_hands_out_a_suspect_when_it_has_nothing_and_then_nothing_until_it_is_done(
    queue: MessageQueue, worker: StartWorker
) -> None:
    make_suspect(queue, "a")
    publish(queue, "a", 2)
    one = worker({"channel": 10})
    one.consume("a")

    suspect = one.next()
    assert suspect is not None and suspect.message.body == b"suspect"
    assert one.next(timeout=0.5) is None

    one.ack(suspect)
    assert one.all() == [b"1", b"2"]


def test_a_consumer_that_always_has_something_lets_it_run_out_for_a_suspect(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    publish(queue, "a", 2)
    one = worker({"channel": 2})
    one.consume("a")
    first, second = one.next(), one.next()
    assert first is not None and second is not None
    make_suspect(queue, "a")
    make_wait(sql, 60)
    publish(queue, "a", 5)

    one.ack(first)
    assert one.next(timeout=0.5) is None, "it has the second"
    one.ack(second)

    suspect = one.next()
    assert suspect is not None and suspect.message.body == b"suspect"


def test_a_consumer_buries_what_was_delivered_too_often_and_goes_on(
    queue: MessageQueue, worker: StartWorker, sql: Sql
) -> None:
    make_suspect(queue, "a", deliveries=3)
    publish(queue, "a", 2)
    one = worker({"channel": 10}, max_deliveries=3)
    one.consume("a")

    assert one.all() == [b"1", b"2"]

    reason = "it was delivered 3 times in vain; last, it was too much"
    assert one.dead == [(b"suspect", reason)]
    assert sql("SELECT body, reason FROM rhesis_tasks.dead_letter") == [(b"suspect", reason)]


def test_a_limit_of_one_delivery_is_one(queue: MessageQueue, worker: StartWorker) -> None:
    make_suspect(queue, "a", deliveries=1)
    one = worker({"channel": 10}, max_deliveries=1)
    one.consume("a")

    assert one.next(timeout=0.5) is None
    assert one.dead == [(b"suspect", "it was delivered 1 time in vain; last, it was too much")]


def test_a_message_is_buried_though_nobody_can_be_told(queue: MessageQueue, worker: StartWorker, sql: Sql) -> None:
    make_suspect(queue, "a", deliveries=3)
    one = worker({"channel": 10}, max_deliveries=3)
    one.dead = None  # type: ignore[assignment]  # so that telling fails
    one.consume("a")

    assert one.next(timeout=0.5) is None

    assert sql("SELECT body FROM rhesis_tasks.dead_letter") == [(b"suspect",)]


def test_the_reason_of_a_lost_worker_is_kept_with_its_messages(queue: MessageQueue, connect: Connect, sql: Sql) -> None:
    publish(queue, "a", 1)
    other = connect()
    consumer = other.new_consumer()
    other.attach(consumer, "host-1:42", ["a"])
    other.claim(consumer, ["a"], 1)
    other.connection.close()
    keeper = queue.new_consumer()

    def is_released() -> bool:
        queue.tend(keeper, 0)
        return queue.size("a") == 1

    wait_until("its message to be released", is_released, DEADLINE, interval=0.01)
    assert sql("SELECT last_reason FROM rhesis_tasks.message") == [("its worker host-1:42 was lost",)]


# --- suspended consumers -----------------------------------------------------------------------------------------


def test_who_says_nothing_for_three_graces_is_dead_though_it_has_its_lock(
    queue: MessageQueue, connect: Connect, sql: Sql
) -> None:
    publish(queue, "a", 1)
    silent = connect()
    consumer = silent.new_consumer()
    silent.attach(consumer, "suspended", ["a"], grace=60)
    [held] = silent.claim(consumer, ["a"], 1)[0]

    sql("UPDATE rhesis_tasks.consumer SET seen_at = now() - interval '100 seconds'")
    queue.tend(queue.new_consumer(), LONG)
    assert queue.size("a") == 0

    sql("UPDATE rhesis_tasks.consumer SET grace = 0.2")  # a server that was started just now counts from then on

    def is_released() -> bool:
        queue.tend(queue.new_consumer(), LONG)
        return queue.size("a") == 1

    wait_until("it to be taken for dead", is_released, DEADLINE)
    assert silent.tend(consumer, LONG).known is False, "and it is told when it comes back"
    assert [each.is_there for each in silent.ack(claims([held]))] == [True], "its acknowledgement is fenced"


def test_a_claim_that_is_made_while_its_consumer_is_taken_for_dead_is_released_all_the_same(
    queue: MessageQueue, connect: Connect, sql: Sql
) -> None:
    """Between the release of what it held and the end of its row, it would be nobody's."""
    publish(queue, "a", 1)
    slow = connect()
    consumer = slow.new_consumer()
    slow.attach(consumer, "slow", ["a"], hold_lock=False)
    keeper = queue.new_consumer()
    queue.tend(keeper, LONG)
    sql("UPDATE rhesis_tasks.consumer SET absent_since = now() - interval '1 hour'")
    with slow.connection.open().transaction():
        slow.claim(consumer, ["a"], 1)
        queue.connection.query("SET statement_timeout = '300ms'")
        with pytest.raises(Exception, match="statement timeout"):
            queue.tend(keeper, 0)  # it waits for the claim's end
    queue.connection.query("SET statement_timeout = 0")

    queue.tend(keeper, 0)

    assert holders(sql) == [(b"1", None, 1)]
    slow.claim(consumer, ["a"], 1)
    assert sql("SELECT count(*) FROM rhesis_tasks.consumer WHERE id = %s", consumer) == [(1,)], "it is there again"


def backend(queue: MessageQueue) -> int:
    assert isinstance(queue.connection, Watched)
    return queue.connection.backend


def test_a_claim_that_acknowledges_and_the_end_of_its_consumer_wait_for_each_other_in_one_order(
    queue: MessageQueue, connect: Connect, tenant_database: TenantDatabase, sql: Sql, pool: ThreadPoolExecutor
) -> None:
    publish(queue, "a", 2)
    slow = connect()
    consumer, keeper = slow.new_consumer(), queue.new_consumer()
    slow.attach(consumer, "slow", ["a"], hold_lock=False)
    done = claims(slow.claim(consumer, ["a"], 1)[0])
    queue.tend(keeper, LONG)
    sql("UPDATE rhesis_tasks.consumer SET absent_since = now() - interval '1 hour' WHERE id = %s", consumer)
    backends = [backend(slow), backend(queue)]

    def waits(number: int) -> bool:
        return bool(sql("SELECT cardinality(pg_blocking_pids(%s)) > 0", backends[number])[0][0])

    with tenant_database.owner.connect() as another:
        another.exec_driver_sql(f"SELECT FROM rhesis_tasks.message WHERE id = {done[0][0]} FOR UPDATE")
        claiming = pool.submit(slow.claim, consumer, ["a"], 1, acks=done)
        wait_until("the claim to wait for what it acknowledges", lambda: waits(0), DEADLINE)
        tending = pool.submit(queue.tend, keeper, 0)
        wait_until("the other one to wait for the claim", lambda: waits(1), DEADLINE)

    messages, late = claiming.result(DEADLINE)
    assert (bodies(messages), late) == ([b"2"], [])
    assert tending.result(DEADLINE).known is False
    assert holders(sql) == [(b"2", None, 1)]


def test_a_look_that_finds_nothing_writes_nothing(queue: MessageQueue, tenant_database: TenantDatabase) -> None:
    """Or each would wait for the disk."""
    queue.declare_queue("a")
    consumer = queue.new_consumer()
    queue.attach(consumer, "idle", ["a"], hold_lock=False)
    queue.claim(consumer, ["a"], 1)

    with tenant_database.owner.begin() as connection:
        looked = connection.exec_driver_sql(
            "SELECT * FROM rhesis_tasks.claim("
            f"{consumer}, '{{}}', '{{}}', '{{a}}', 8, '{{}}', 0, true, 5, 30, '{{}}', '{{}}', '{{}}')"
        ).all()
        transaction = connection.scalar(text("SELECT pg_current_xact_id_if_assigned()"))

    assert (looked, transaction) == ([], None)
