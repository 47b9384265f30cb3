"""Workers and publishers behind PgBouncer, in both of its modes, and past it for notifications."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import broker_tasks
import psycopg
import pytest
from broker_rig import PostgresServer, Rig, kill, running_rig, running_server
from celery import Celery
from pooler import PgBouncer, running_pgbouncer

from rhesis_tasks.processes import wait_until

GRACE = 3.0  # where a test has to wait for it
LONG = 60.0  # where a test would see that something waits for it


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module", params=["transaction", "session"])
def bouncer(request: pytest.FixtureRequest, server: PostgresServer) -> Iterator[PgBouncer]:
    # Few, so that clients do share them; in session mode each client has one for itself.
    with running_pgbouncer(server, request.param, 3 if request.param == "transaction" else 30) as bouncer:
        yield bouncer


@pytest.fixture
def rig(server: PostgresServer, bouncer: PgBouncer, tmp_path: Path) -> Iterator[Rig]:
    with running_rig(server, tmp_path) as rig:
        yield rig


@pytest.fixture
def url(rig: Rig, bouncer: PgBouncer) -> str:
    """The broker's URL through PgBouncer."""
    return rig.through(bouncer.port)


@pytest.fixture
def app(url: str) -> Iterator[Celery]:
    """A publisher behind PgBouncer."""
    app = broker_tasks.application(url)
    yield app
    app.close()


def labels(name: str, number: int) -> list[str]:
    return [f"{name}-{i}" for i in range(number)]


def latencies(rig: Rig, app: Celery, number: int) -> list[float]:
    """Seconds from publishing to the end of a task, on an idle worker."""
    found = []
    for label in labels("latency", number):
        began = time.monotonic()
        rig.publish(label, app=app)
        wait_until("the task to be done", lambda label=label: rig.runs.done[label] == 1, interval=0.01)
        found.append(time.monotonic() - began)
        wait_until("the worker to be idle", lambda: not rig.messages())
    return found


def test_a_worker_behind_a_pooler_polls_and_says_so_once(rig: Rig, app: Celery, url: str) -> None:
    worker = rig.worker("threads", url=url, poll_interval=LONG)
    sent = labels("task", 50)
    rig.publish(*sent, app=app)
    rig.wait_done(*sent)

    idle = latencies(rig, app, 3)

    assert statistics.median(idle) <= 1.5, f"idle latencies: {idle}"
    assert worker.output.count("polling instead") == 1
    assert rig.done_more_than_once() == set()
    print(f"idle latencies: {', '.join(f'{each:.2f} s' for each in idle)}")


def test_a_worker_behind_a_pooler_leaves_no_lock_and_no_listen_on_its_connections(
    rig: Rig, app: Celery, url: str, bouncer: PgBouncer, server: PostgresServer
) -> None:
    rig.query(f"ALTER DATABASE {rig.database} SET log_statement = 'all'")

    def said(word: str) -> int:
        """How many statements with this word were sent to this database."""
        return len([line for line in server.log.splitlines() if f" {rig.database} LOG:" in line and word in line])

    worker = rig.worker("threads", url=url, grace=GRACE)
    rig.publish("task", app=app)
    rig.wait_done("task")
    wait_until("a few life signs", lambda: said("tend(") >= 3)

    assert said("claim(") > 0
    assert said("LISTEN") == 0
    assert not rig.holds_lock(rig.consumer_of(worker))
    if bouncer.mode == "transaction":
        with psycopg.connect(url, autocommit=True) as connection, connection.transaction():
            locks = "SELECT true FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
            assert connection.execute(locks).fetchall() == []
            assert connection.execute("SELECT pg_listening_channels()").fetchall() == []


def test_a_killed_workers_messages_are_done_elsewhere_and_a_living_one_keeps_what_it_runs(
    rig: Rig, app: Celery, url: str
) -> None:
    """All are behind the pooler, where no lock tells who is alive."""
    living = ["threads", "prefork", "solo"]
    for pool in living:
        rig.publish(pool, queue=pool, gate="living", app=app)
        rig.worker(pool, concurrency=1, queues=pool, url=url, grace=GRACE)
    sent = labels("task", 10)
    rig.publish(*sent, gate="gate", app=app)
    victim = rig.worker("threads", concurrency=2, prefetch=5, url=url, grace=GRACE)
    rig.wait_claimed(len(living) + len(sent))
    rig.wait_started(*living, *sent[:2])
    rig.worker("threads", concurrency=8, queues=",".join(["celery", *living]), url=url, grace=GRACE)
    began = time.monotonic()

    kill(victim)
    rig.open_gate()
    wait_until("the victim's messages to be done", lambda: set(sent) <= set(rig.runs.done), 15)
    took = time.monotonic() - began
    wait_until("the grace period to be over twice", lambda: time.monotonic() > began + 2.5 * GRACE)
    rig.open_gate("living")
    rig.wait_done(*living)

    assert took <= 2 * GRACE + 2, f"the last message was done {took:.1f} s after the kill"
    assert {label for label, times in rig.runs.started.items() if times > 1} == set(sent[:2])
    print(f"done {took:.1f} s after the kill, with a grace period of {GRACE:g} s")


def test_a_listen_url_past_the_pooler_brings_notifications_back(rig: Rig, app: Celery, url: str) -> None:
    worker = rig.worker("threads", url=url, listen_url=rig.url, poll_interval=LONG)
    rig.publish("first", app=app)
    rig.wait_done("first")

    idle = latencies(rig, app, 5)

    assert max(idle) <= 5, f"idle latencies: {idle}"
    assert "polling instead" not in worker.output
    assert rig.holds_lock(rig.consumer_of(worker))
    print(f"idle latencies: {', '.join(f'{each * 1000:.0f} ms' for each in idle)}")


def test_workers_behind_a_pooler_outlive_a_crash_of_the_server_and_of_the_pooler(
    rig: Rig, app: Celery, url: str, bouncer: PgBouncer, server: PostgresServer
) -> None:
    running = ["threads", "prefork"]
    for pool in running:
        rig.publish(pool, queue=pool, gate="gate", app=app)
        rig.worker(pool, concurrency=1, queues=pool, url=url)
    rig.wait_started(*running)
    rig.worker("threads", queues=",".join(["celery", *running]), url=url)
    sent = labels("task", 60)

    rig.publish(*sent[:20], app=app)
    server.restart("immediate")
    crashed = time.monotonic()
    rig.publish(*sent[20:40], app=app)
    bouncer.stop()
    bouncer.start()
    rig.publish(*sent[40:], app=app)
    wait_until("all other tasks to be done", lambda: set(sent) <= set(rig.runs.done), 30)
    wait_until("the grace period to be over", lambda: time.monotonic() > crashed + 8)  # for a reaper that is mistaken
    rig.open_gate()
    rig.wait_done(*sent, *running)

    # The first message after each crash is published on a connection that is gone, and then again.
    assert rig.done_more_than_once() <= {sent[20], sent[40]}
    assert [rig.runs.started[pool] for pool in running] == [1, 1]
