"""Nothing is lost on PostgreSQL: workers, publishers, connections and the server are killed at any point.

What went in is counted against what came out: each message is done at least once, and more than once only where
nobody could have known that it had been.  RHESIS_TASKS_TEST_SCALE (1) makes the tests larger.
"""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import broker_tasks
import celery
import pytest
from broker_rig import (  # noqa: F401  # fixtures
    Held,
    PostgresServer,
    Rig,
    TcpProxy,
    kill,
    proxy,
    rig,
    running_proxy,
    running_rig,
    running_server,
    server,
)

from rhesis_tasks.errors import DatabaseUnavailableError
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.consumer import Consumer, Delivery, Subscription
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.settings import database_url

SCALE = int(os.environ.get("RHESIS_TASKS_TEST_SCALE", "1"))
GRACE = 2.0  # where a test has to wait for it
LONG = 60.0  # a grace period that no test waits for


def labels(name: str, number: int) -> list[str]:
    return [f"{name}-{i}" for i in range(number)]


def pass_time(seconds: float) -> None:
    """Where time itself is what happens."""
    time.sleep(seconds)


# --- workers are killed --------------------------------------------------------------------------------------------


@pytest.mark.newest_only
def test_what_killed_workers_held_is_done_by_another_within_seconds(rig: Rig) -> None:
    """At the default grace period of 5 seconds: it is over at most 2.5 s + 5 s after the kill."""
    pools = ["threads", "prefork"]
    sent, victims = [], []
    for pool in pools:
        messages = labels(pool, 100 * SCALE)
        rig.publish(*messages, queue=pool, gate="gate")
        victims.append(rig.worker(pool, prefetch=50, queues=pool))
        sent += messages
    rig.wait_claimed(100 * len(pools))
    rig.wait_started("threads-0", "threads-1", "prefork-0", "prefork-1")
    rig.worker("threads", concurrency=4, prefetch=100, queues=",".join(pools))
    started = set(rig.runs.started)

    for victim in victims:
        kill(victim)
    killed = time.monotonic()
    rig.open_gate()
    rig.wait_done(*sent)
    took = time.monotonic() - killed

    assert took <= 10, f"the last message was done {took:.1f} s after the kill"
    assert rig.done_more_than_once() == set()
    assert {label for label, times in rig.runs.started.items() if times > 1} <= started
    print(f"{len(sent)} messages of killed workers were done {took:.1f} s after the kill")


@pytest.mark.newest_only
def test_pool_processes_that_outlive_their_worker_do_not_keep_its_messages(rig: Rig) -> None:
    """Those, too, that were forked while it was connected, in the place of others."""
    victim = rig.worker("prefork", prefetch=5, linger=True, grace=GRACE, arguments=["--max-tasks-per-child", "1"])
    first, sent = labels("first", 4), labels("task", 10)
    rig.publish(*first)
    rig.wait_done(*first)
    rig.publish(*sent, gate="gate")
    rig.wait_claimed(10)
    rig.wait_started(*sent[:2])
    rig.worker("threads", concurrency=10, grace=GRACE)

    victim.process.kill()
    victim.process.wait()
    os.killpg(victim.process.pid, 0)  # raises if no process is left
    rig.wait_started(*sent, timeout=10)
    rig.open_gate()
    rig.wait_done(*sent)

    assert rig.done_more_than_once() <= set(sent[:2])


def test_a_task_that_loses_its_pool_process_runs_again_if_it_is_to_be_rejected(rig: Rig) -> None:
    rig.worker("prefork", grace=LONG)

    rig.publish("lost", task="lose_child_and_reject")
    rig.publish("bystander")
    rig.wait_done("lost", "bystander")

    assert (rig.runs.started["lost"], rig.runs.done["lost"], rig.runs.done["bystander"]) == (2, 1, 1)


def test_a_task_that_loses_its_pool_process_has_failed_if_it_is_not_to_be_rejected(rig: Rig) -> None:
    worker = rig.worker("prefork", grace=LONG)

    rig.publish("lost", task="lose_child")
    rig.publish("bystander")
    worker.wait_for("Task handler raised error: WorkerLostError")
    rig.wait_done("bystander")

    assert (rig.runs.started["lost"], rig.runs.done["lost"], rig.runs.done["bystander"]) == (1, 0, 1)


def test_a_rejection_is_not_forgotten_when_the_server_cannot_be_reached(rig: Rig, proxy: TcpProxy) -> None:
    rig.publish("lost", task="lose_child_and_reject", gate="gate")
    # Celery's heartbeat waits until it is sent, and everything in the main process with it.
    worker = rig.worker("prefork", url=rig.through(proxy.port), grace=LONG, arguments=["--without-heartbeat"])
    rig.wait_started("lost")

    proxy.refuse()
    rig.open_gate()
    worker.wait_for("Task handler raised error: WorkerLostError")
    pass_time(0.5)  # for it to be told to the server, in vain
    proxy.accept()
    rig.wait_done("lost", timeout=10)

    assert rig.runs.started["lost"] == 2


@pytest.mark.newest_only
def test_a_killed_workers_messages_run_again_if_they_had_started_and_once_if_they_had_not(rig: Rig) -> None:
    acknowledged, prefetched = labels("acknowledged", 3), labels("prefetched", 3)
    rig.publish(*acknowledged)
    rig.publish("running", *prefetched, gate="gate")
    victim = rig.worker("solo", concurrency=1, prefetch=10, grace=GRACE)
    rig.wait_started("running")
    wait_until("the first tasks to be acknowledged", lambda: len(rig.messages()) == 4)
    rig.publish("not claimed", gate="gate")
    rig.worker("threads", concurrency=8, grace=GRACE)
    rig.wait_started("not claimed")
    assert rig.holders(*acknowledged, "running", *prefetched) == {rig.consumer_of(victim)}

    kill(victim)
    rig.wait_started(*prefetched)
    rig.open_gate()
    rig.wait_done("running", *prefetched, "not claimed")

    assert rig.runs.started == {**dict.fromkeys([*acknowledged, *prefetched, "not claimed"], 1), "running": 2}
    assert rig.done_more_than_once() == set()


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_a_task_that_is_done_is_acknowledged_while_the_next_one_runs(rig: Rig, pool: str) -> None:
    """So that the death of its worker costs no second run."""
    rig.publish("short")
    rig.publish("long", gate="gate")
    rig.worker(pool, concurrency=1, grace=LONG, poll_interval=LONG)
    rig.wait_started("long")

    wait_until("the short one to be acknowledged", lambda: rig.holders("short") == set(), 2)


@pytest.mark.newest_only
def test_a_task_whose_worker_is_killed_between_its_body_and_the_acknowledgement_runs_again(rig: Rig) -> None:
    victim = rig.worker("solo", grace=GRACE)
    rig.publish("unlucky", task="die_before_ack")
    wait_until("the worker to die", lambda: not victim.running)
    assert rig.runs.done == {"unlucky": 1}

    rig.worker("solo", grace=GRACE)
    rig.wait_done("unlucky")

    assert rig.runs.done == {"unlucky": 2}


# --- publishers are killed -----------------------------------------------------------------------------------------


@pytest.mark.newest_only
def test_what_a_killed_publisher_knows_to_be_published_is_in_the_queue_and_nothing_twice(rig: Rig) -> None:
    """At random moments, so that some die between the statement and its answer."""
    environment = {broker_tasks.URL: rig.url, broker_tasks.RUNS: str(rig.runs.path)}
    program = python(str(Path(broker_tasks.__file__)))

    for turn in range(4 * SCALE):
        with ExitStack() as stack:
            names = [f"{turn}{letter}" for letter in "ab"]
            publishers = [stack.enter_context(child(name, [*program, name], env=environment)) for name in names]
            firsts = {f"{name}-1" for name in names}
            wait_until("publishers to begin", lambda wanted=firsts: wanted <= set(rig.runs.of("published")))
            for publisher in publishers:
                pass_time(random.uniform(0, 0.1))
                publisher.process.kill()

    wait_until(
        "the server to be done with them",
        lambda: not rig.query("SELECT true FROM pg_stat_activity WHERE application_name = 'rhesis-tasks'"),
    )
    queued = [message.label for message in rig.messages()]
    assert set(rig.runs.of("published")) <= set(queued) <= set(rig.runs.of("publish"))
    assert len(queued) == len(set(queued))


# --- bodies last longer than the grace period, and connections are cut ---------------------------------------------


@pytest.mark.newest_only
def test_a_body_that_lasts_longer_than_the_grace_period_is_not_handed_out_twice(rig: Rig) -> None:
    """One of the workers cannot even say that it is alive, as if its body kept the interpreter to itself."""
    pools = {"threads": "threads", "prefork": "prefork", "solo": "solo", "hung": "threads"}
    workers = {}
    for queue, pool in pools.items():
        rig.publish(queue, queue=queue, gate="gate")
        workers[queue] = rig.worker(pool, concurrency=1, queues=queue, grace=GRACE)
    rig.wait_started(*pools)
    rig.worker("threads", concurrency=6, queues=",".join(pools), grace=GRACE)

    os.killpg(workers["hung"].process.pid, signal.SIGSTOP)
    pass_time(2 * GRACE)
    os.killpg(workers["hung"].process.pid, signal.SIGCONT)
    rig.open_gate()
    rig.wait_done(*pools)

    assert rig.runs.started == dict.fromkeys(pools, 1)


def test_a_connection_that_is_cut_while_a_body_runs_costs_nothing(rig: Rig, proxy: TcpProxy) -> None:
    pools = ["threads", "prefork", "solo"]
    workers = []
    for pool in pools:
        rig.publish(pool, queue=pool, gate="gate")
        workers.append(rig.worker(pool, concurrency=1, queues=pool, url=rig.through(proxy.port), grace=GRACE))
    rig.wait_started(*pools)
    consumers = [rig.consumer_of(worker) for worker in workers]
    rig.worker("threads", concurrency=6, queues=",".join(pools), grace=GRACE)

    for _ in range(3):
        assert proxy.cut() >= len(pools)
        wait_until("all workers to be back", lambda: all(map(rig.holds_lock, consumers)), GRACE)
    pass_time(2 * GRACE)
    rig.open_gate()
    rig.wait_done(*pools)

    assert rig.runs.started == dict.fromkeys(pools, 1)
    assert not [worker.name for worker in workers if "done twice" in worker.output]


def test_a_worker_goes_on_after_its_connections_were_cut(rig: Rig, proxy: TcpProxy) -> None:
    sent = labels("task", 300 * SCALE)
    rig.publish(*sent)
    rig.worker("threads", concurrency=4, url=rig.through(proxy.port), grace=LONG, poll_interval=LONG)

    for part in range(1, 6):
        wait_until("a sixth more to be done", lambda part=part: len(rig.runs.done) >= part * len(sent) // 6)
        proxy.cut()
    rig.wait_done(*sent)
    rig.publish("after")
    rig.wait_done("after", timeout=10)  # it was notified: it polls once in a minute

    assert rig.done_more_than_once() == set()


# --- the server fails ----------------------------------------------------------------------------------------------


@pytest.mark.newest_only
def test_a_crash_of_the_server_under_load_loses_nothing(rig: Rig, server: PostgresServer) -> None:
    for pool in ("threads", "prefork"):
        rig.worker(pool, concurrency=2)
    sent: list[str] = []
    retried: set[str] = set()  # whose first message may have been committed, so that there may be two
    stop = threading.Event()

    def publish() -> None:
        while not stop.is_set():
            label = f"task-{len(sent)}"
            policy = {
                "max_retries": 100,
                "interval_start": 0.05,
                "interval_max": 0.2,
                "errback": lambda *_, label=label: retried.add(label),
            }
            rig.app.send_task("run", [label], task_id=label, retry=True, retry_policy=policy)
            sent.append(label)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        for _ in range(2 * SCALE):
            before = len(rig.runs.done)
            wait_until("some tasks to be done", lambda before=before: len(rig.runs.done) > before + 50)
            server.restart("immediate")
        before = len(sent)
        wait_until("more to be published", lambda: len(sent) > before + 50)
    finally:
        stop.set()
        publisher.join(30)
    rig.wait_done(*sent)

    twice = rig.done_more_than_once()
    print(f"{len(sent)} published, {len(twice)} done twice, {len(twice & retried)} of them published twice")
    # The workers were back within the grace period, so that what they held stayed theirs.
    assert twice <= retried


def test_workers_resume_by_themselves_after_an_outage_longer_than_the_grace_period(
    rig: Rig, server: PostgresServer, proxy: TcpProxy
) -> None:
    """Nobody is dead because the server was away: a running task stays its worker's, also of one that is back last."""
    grace = 3.0
    urls = {"threads": rig.url, "prefork": rig.url, "solo": rig.through(proxy.port)}
    workers, waiting = {}, []
    for pool, url in urls.items():
        rig.publish(pool, queue=pool, gate="gate")
        workers[pool] = rig.worker(pool, concurrency=1, queues=pool, url=url, grace=grace)
    rig.wait_started(*urls)
    for pool in urls:
        messages = labels(f"{pool}-waiting", 10)
        rig.publish(*messages, queue=pool)
        waiting += messages
    rig.worker("threads", concurrency=6, queues=",".join(urls), grace=grace)

    def wait_back(*pools: str) -> None:
        wait_until(
            f"{pools} to be back", lambda: all(rig.holds_lock(rig.consumer_of(workers[pool])) for pool in pools), grace
        )

    # As somebody may have seen it who looked when the sessions were ended one after the other.
    rig.query("UPDATE rhesis_tasks.consumer SET absent_since = clock_timestamp()")
    proxy.refuse()
    server.stop()
    pass_time(1.6 * grace)
    server.start()
    back = time.monotonic()
    wait_back("threads", "prefork")
    proxy.accept()
    wait_back("solo")
    print(f"workers were back {time.monotonic() - back:.1f} s after the server")
    pass_time(1.6 * grace)  # for a reaper that is mistaken
    rig.open_gate()
    rig.wait_done(*urls, *waiting)

    assert rig.runs.started == dict.fromkeys([*urls, *waiting], 1)


# --- workers are stopped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_a_warm_shutdown_finishes_what_runs_and_gives_back_the_rest_uncounted(rig: Rig, pool: str) -> None:
    sent = labels("task", 12)
    for label in sent:
        rig.publish(label, gate=label)
    worker = rig.worker(pool, concurrency=1, prefetch=12, grace=LONG)
    rig.wait_claimed(12)
    rig.wait_started(sent[0])
    consumer = rig.consumer_of(worker)

    worker.process.send_signal(signal.SIGTERM)
    worker.wait_for("Warm shutdown")
    if pool != "solo":  # whose only thread is busy
        subscriptions = "SELECT true FROM rhesis_tasks.subscription WHERE consumer = %s AND queue = 'celery'"
        wait_until("the worker to consume no more", lambda: not rig.query(subscriptions, consumer))

    def has_ended() -> bool:
        for label in rig.runs.started:
            rig.open_gate(label)
        return not worker.running

    wait_until("the worker to end", has_ended, 15)

    done, left = rig.runs.done, rig.messages()
    # A thread that becomes free before its pool is told to stop takes one more; Celery before 5.7 lets it take all.
    threads = 2 if celery.VERSION[:2] >= (5, 7) else 12
    assert len(done) <= (threads if pool == "threads" else 1)
    assert set(left) == {Held(label, holder=None, deliveries=0) for label in set(sent) - set(done)}
    rig.worker("threads", concurrency=12, grace=LONG)
    for label in sent:
        rig.open_gate(label)
    rig.wait_done(*sent, timeout=10)
    assert rig.runs.started == dict.fromkeys(sent, 1)


@pytest.mark.parametrize("signals", [[signal.SIGQUIT], [signal.SIGINT, signal.SIGINT]], ids=["SIGQUIT", "SIGINT twice"])
def test_a_cold_shutdown_loses_nothing(rig: Rig, signals: list[signal.Signals]) -> None:
    sent = labels("task", 12)
    rig.publish(*sent, gate="gate")
    worker = rig.worker("prefork", prefetch=6, grace=LONG)
    rig.wait_claimed(12)
    rig.wait_started(*sent[:2])
    rig.worker("threads", concurrency=12, grace=LONG)

    for number, each in enumerate(signals, 1):
        worker.process.send_signal(each)
        # The first SIGINT is for a warm shutdown, and makes the next one cold.
        worker.wait_for("Warm shutdown" if number < len(signals) else "again will terminate all")
    wait_until("the worker to end", lambda: not worker.running, 15)
    rig.open_gate()
    rig.wait_done(*sent, timeout=10)

    assert rig.done_more_than_once() == set()
    assert {label for label, times in rig.runs.started.items() if times > 1} <= set(sent[:3])


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_warm_shutdown_does_not_wait_for_a_server_that_is_away(rig: Rig, proxy: TcpProxy, pool: str) -> None:
    # Celery's heartbeat waits until it is sent.
    worker = rig.worker(pool, url=rig.through(proxy.port), arguments=["--without-heartbeat"])

    proxy.refuse()
    worker.wait_for("lost its connection")
    worker.process.send_signal(signal.SIGTERM)

    wait_until("the worker to end", lambda: not worker.running, 15)


def test_a_cold_shutdown_in_the_middle_of_a_statement_ends(rig: Rig) -> None:
    """Celery does it inside the signal handler, in the thread that waits for the statement's answer."""
    worker = rig.worker("threads", poll_interval=0.1)
    with rig.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE rhesis_tasks.message IN ACCESS EXCLUSIVE MODE")
        waiting = "SELECT true FROM pg_locks WHERE NOT granted AND relation = 'rhesis_tasks.message'::regclass"
        wait_until("the worker to be in a statement", lambda: connection.execute(waiting).fetchone() is not None)
        worker.process.send_signal(signal.SIGQUIT)
        worker.wait_for("again will terminate all")
    wait_until("the worker to end", lambda: not worker.running, 15)


# --- a consumer by itself ------------------------------------------------------------------------------------------

MakeConsumer = Callable[..., Consumer]


@pytest.fixture
def make_consumer(rig: Rig) -> Iterator[MakeConsumer]:
    """Makes consumers of the queue ``celery``, in this process, each on connections of its own."""
    with ExitStack() as stack:

        def make(
            *, url: str = rig.url, listen_url: str | None = None, slots: int = 10, grace: float = GRACE
        ) -> Consumer:
            work, listening = (Connection(database_url(each), name="test") for each in (url, listen_url or url))
            queue = MessageQueue(work, "rhesis_tasks")
            consumer = Consumer(
                queue,
                MessageQueue(listening, "rhesis_tasks"),
                name=f"{socket.gethostname()}:test",
                grace=grace,
                poll_interval=0.5,
                max_deliveries=5,
                free=lambda _: slots,
                declare=queue.declare_queue,
                on_dead=lambda *_: None,
                on_call=lambda: None,
            )
            consumer.start()
            consumer.subscribe(Subscription("tag", "celery", "group", no_ack=False))
            stack.callback(work.close)
            stack.callback(consumer.close)
            return consumer

        yield make


def received(consumer: Consumer, number: int, timeout: float = 10.0) -> list[Delivery]:
    """So many messages."""
    deadline = time.monotonic() + timeout
    found: list[Delivery] = []
    while len(found) < number:
        delivery = consumer.next(max(0.0, deadline - time.monotonic()))
        if delivery is None:
            raise TimeoutError(f"waited {timeout:g} seconds for {number} messages, and got {len(found)}")
        found.append(delivery)
    return found


def ids(deliveries: list[Delivery]) -> list[int]:
    return [delivery.message.id for delivery in deliveries]


@pytest.mark.newest_only
def test_a_consumer_that_was_away_too_long_drops_what_it_had_claimed_ahead(
    rig: Rig, proxy: TcpProxy, make_consumer: MakeConsumer
) -> None:
    rig.publish(*labels("task", 4))
    away = make_consumer(url=rig.through(proxy.port))
    (running,) = received(away, 1)
    other = make_consumer()

    proxy.refuse()
    taken = received(other, 4)
    proxy.accept()
    wait_until("it to be back", lambda: rig.holds_lock(away.number))

    assert len(set(ids(taken))) == 4 and running.message.id in ids(taken)
    assert away.next(1.0) is None
    assert {message.holder for message in rig.messages()} == {other.number}


@pytest.mark.newest_only
def test_an_acknowledgement_that_comes_too_late_is_told_of_and_changes_nothing(
    rig: Rig, proxy: TcpProxy, make_consumer: MakeConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    rig.publish("task")
    away = make_consumer(url=rig.through(proxy.port))
    (first,) = received(away, 1)
    other = make_consumer()

    proxy.refuse()
    away.ack(first.message)
    (second,) = received(other, 1)
    proxy.accept()
    wait_until("it to be told", lambda: away.next(0.1) is None and "done twice" in caplog.text, 10)

    assert f"message {first.message.id} was done, but had been given to others" in caplog.text
    assert [message.holder for message in rig.messages()] == [other.number]
    other.ack(second.message)
    other.flush()
    assert rig.messages() == []


@pytest.mark.newest_only
def test_a_consumer_that_gets_its_own_message_again_goes_on_with_it(
    rig: Rig, proxy: TcpProxy, make_consumer: MakeConsumer
) -> None:
    """It was away too long, and nobody else has taken the message when it is back."""
    rig.publish("task")
    away = make_consumer(url=rig.through(proxy.port))
    (first,) = received(away, 1)
    make_consumer(slots=0)  # which only looks after the others

    proxy.refuse()
    wait_until("the message to be released", lambda: rig.messages()[0].holder is None)
    proxy.accept()
    wait_until("it to be claimed again", lambda: away.next(0.1) is None and rig.messages()[0].holder == away.number)
    away.ack(first.message)
    away.flush()

    assert rig.messages() == []


def test_messages_whose_claim_was_answered_to_nobody_come_again_uncounted(
    rig: Rig, proxy: TcpProxy, make_consumer: MakeConsumer
) -> None:
    consumer = make_consumer(url=rig.through(proxy.port), listen_url=rig.url, grace=LONG)
    assert consumer.next(0.5) is None
    proxy.cut_after(answer_bytes=0)
    rig.publish(*labels("task", 3))

    deliveries = received(consumer, 3)

    assert proxy.has_cut
    assert [delivery.message.deliveries for delivery in deliveries] == [1, 1, 1]
    assert len(set(ids(deliveries))) == 3


def test_a_claim_that_the_server_carries_out_after_the_connection_was_lost_keeps_no_message(
    rig: Rig, proxy: TcpProxy, make_consumer: MakeConsumer
) -> None:
    """A server notices that nobody listens when it answers: the claim of a slow one may come after our return."""
    rig.publish("task")
    with rig.connect() as connection, connection.transaction():
        connection.execute("ALTER SEQUENCE rhesis_tasks.claim_token CACHE 1")  # claims wait for its lock
        consumer = make_consumer(url=rig.through(proxy.port), listen_url=rig.url)
        found: list[Delivery | None] = []
        thread = threading.Thread(target=lambda: found.append(consumer.next(4 * GRACE)))
        thread.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'rhesis_tasks.claim_token'::regclass"
        wait_until("the claim to be in the server", lambda: connection.execute(waiting).fetchone() == (1,))
        proxy.cut()
        wait_until("the consumer to be back", lambda: proxy.connections == 1)
        pass_time(0.5)  # for it to say what it holds
    thread.join(5 * GRACE)

    assert len(found) == 1
    assert found[0] is not None, f"nobody gets the message: {rig.messages()}"


def test_an_acknowledgement_that_was_answered_to_nobody_is_no_late_one(
    rig: Rig, proxy: TcpProxy, make_consumer: MakeConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    rig.publish("task")
    consumer = make_consumer(url=rig.through(proxy.port), listen_url=rig.url, grace=LONG)
    (delivery,) = received(consumer, 1)
    proxy.cut_after(answer_bytes=0)

    consumer.ack(delivery.message)
    with pytest.raises(DatabaseUnavailableError):
        consumer.flush()
    assert rig.messages() == []
    assert consumer.next(0.2) is None

    assert "done twice" not in caplog.text


def test_the_server_asks_within_seconds_whether_the_machine_of_a_worker_is_still_there(
    rig: Rig, server: PostgresServer
) -> None:
    """One that is gone without a word would hold its lock for two hours."""
    consumer = rig.consumer_of(rig.worker("threads"))
    locks = "SELECT client_port FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
    ((client_port,),) = rig.query(f"{locks} AND datname = %s AND objid::integer = %s", rig.database, consumer)

    wait_until("the question to be due within 30 s", lambda: seconds_to_keepalive(server.port, client_port) <= 30, 5)


def seconds_to_keepalive(local: int, remote: int) -> float:
    """When Linux will ask the other end of a connection for a life sign."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, _, _, timer, *_ = line.split()
        if [int(address.split(":")[1], 16) for address in (here, there)] == [local, remote]:
            kind, when = timer.split(":")
            return int(when, 16) / 100 if kind == "02" else math.inf  # other timers come first
    raise LookupError(f"no connection from {local} to {remote}")


FORKING = """
import os, signal, sys, threading
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.settings import database_url

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
connection = Connection(database_url(sys.argv[1]), name="forking")
opening = threading.Thread(target=connection.open)
opening.start()
signal.sigwait([signal.SIGUSR1])
if os.fork() == 0:
    signal.pause()
opening.join()
connection.query("SELECT pg_advisory_lock(1, 2)")
print("locked")
signal.pause()
"""


def test_a_child_that_is_forked_while_a_connection_is_made_does_not_keep_it(rig: Rig, proxy: TcpProxy) -> None:
    """Or the lock would outlive the worker that is killed."""
    locks = "SELECT true FROM pg_locks WHERE locktype = 'advisory' AND classid = 1 AND objid = 2"
    proxy.hold()
    command = python("-c", FORKING, rig.through(proxy.port))
    with child("a process that forks", command, cwd=Path(__file__).parent) as forking:
        wait_until("it to connect", lambda: proxy.connections == 1)
        forking.process.send_signal(signal.SIGUSR1)
        pass_time(0.5)  # for it to fork
        proxy.flow()
        forking.wait_for("locked")
        assert rig.query(locks)

        forking.process.kill()
        forking.process.wait()
        os.killpg(forking.process.pid, 0)  # raises if the child is gone

        wait_until("the lock to be free", lambda: not rig.query(locks), 5)
