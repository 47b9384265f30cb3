"""What ends workers and happens to servers: poison, suspension, failover, partitions, no room, clocks, backups."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import broker_tasks
import psycopg
import pytest
from broker_rig import (  # noqa: F401  # fixtures
    PostgresServer,
    Rig,
    TcpProxy,
    as_other_user,
    proxy,
    rig,
    running_proxy,
    running_rig,
    running_server,
    server,
)
from celery import Celery
from fault_tasks import application, runs_in
from kombu.exceptions import OperationalError

from rhesis_tasks import TenantContext, tenant_scope, unconfigure
from rhesis_tasks.errors import DatabaseFullError
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.processes import python, wait_until
from rhesis_tasks.settings import database_url, rendered

GRACE = 2.0
LONG = 60.0
ACME = TenantContext("acme", "alice")
HOUR = 3600.0

pytestmark = [pytest.mark.newest_only, pytest.mark.timeout(240)]


@pytest.fixture
def configured(rig: Rig) -> Iterator[Celery]:
    """An application that launches for tenants, and keeps records."""
    app = application(rig.url, main="launching")
    yield app
    unconfigure(app)
    app.close()


def labels(name: str, number: int) -> list[str]:
    return [f"{name}-{i}" for i in range(number)]


def pass_time(seconds: float) -> None:
    """Where time itself is what happens."""
    time.sleep(seconds)


# --- poison --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_what_kills_each_worker_that_it_meets_is_buried_and_what_was_with_it_is_done(
    rig: Rig, configured: Celery, pool: str
) -> None:
    """With threads the worker dies; with prefork a pool process, and the message is to be rejected then."""
    innocents = labels("innocent", 20)
    with tenant_scope(ACME):
        for number, label in enumerate(innocents):
            if number == 3:
                configured.send_task("poison", ["poison"], task_id="poison")
            configured.send_task("work", [label, 0.05], task_id=label)

    def start() -> list[object]:
        return [rig.worker(pool, concurrency=2, prefetch=8, application="fault_tasks", grace=GRACE, max_deliveries=4)]

    workers = start()
    deadline = time.monotonic() + 180
    while rig.messages() and time.monotonic() < deadline:
        if not workers[-1].running:  # type: ignore[attr-defined]
            workers += start()
        pass_time(0.1)

    assert rig.messages() == []
    ((label, reason, tenant),) = rig.query("SELECT task_id, reason, tenant FROM rhesis_tasks.dead_letter")
    assert (label, tenant) == ("poison", "acme")
    assert reason.startswith("it was delivered 4 times in vain; last, ")
    assert ("was lost" if pool == "threads" else "its worker gave it back") in reason
    found = runs_in(rig.runs)
    assert len(found["poison"]) == 4
    assert {each for each in innocents if not [run for run in found.get(each, []) if run.ended]} == set()
    ((state, error, message),) = rig.query(
        "SELECT state, error_type, error_message FROM rhesis_tasks.task_record WHERE task_id = 'poison'"
    )
    assert (state, error) == ("dead", "DeadLetterError") and reason in message
    assert rig.query("SELECT DISTINCT state FROM rhesis_tasks.task_record WHERE task_id <> 'poison'") == [("success",)]


# --- suspension and partitions -------------------------------------------------------------------------------------


def test_a_worker_that_was_suspended_for_too_long_finds_its_work_done_by_others(rig: Rig) -> None:
    """Three grace periods of silence are a death, though its sessions are there; what it acknowledges is refused."""
    running, ahead = labels("running", 2), labels("ahead", 6)
    rig.publish(*running, *ahead, gate="gate")
    suspended = rig.worker("threads", concurrency=2, prefetch=4, grace=GRACE)
    rig.wait_started(*running)
    rig.wait_claimed(8)
    number = rig.consumer_of(suspended)
    other = rig.worker("threads", concurrency=8, prefetch=1, grace=GRACE)

    os.killpg(suspended.process.pid, signal.SIGSTOP)
    taken_over = rig.consumer_of(other)
    wait_until("another to hold all of it", lambda: rig.holders(*running, *ahead) == {taken_over}, 60)
    rig.open_gate()
    rig.wait_done(*running, *ahead)
    os.killpg(suspended.process.pid, signal.SIGCONT)
    suspended.wait_for("done twice")
    rig.publish("after")
    rig.wait_done("after")

    assert rig.consumer_of(suspended) == number  # it is there again
    # Its pool had accepted what it had claimed ahead, and goes on with it.
    assert set(rig.runs.done) == {*running, *ahead, "after"}
    assert max(rig.runs.started.values()) == 2


@pytest.mark.parametrize("how", ["held back", "lost"])
def test_a_worker_behind_a_network_that_says_nothing_is_dead_after_three_graces_and_comes_back(
    rig: Rig, proxy: TcpProxy, how: str
) -> None:
    """The connections stay open, so that neither side is told."""
    rig.publish("running", *labels("ahead", 3), gate="gate")
    cut_off = rig.worker("threads", concurrency=1, prefetch=4, url=rig.through(proxy.port), grace=GRACE)
    rig.wait_started("running")
    rig.wait_claimed(4)
    other = rig.worker("threads", concurrency=4, prefetch=1, grace=GRACE)

    (proxy.hold if how == "held back" else proxy.drop)()
    taken_over = rig.consumer_of(other)
    wait_until("another to hold all of it", lambda: rig.holders("running", "ahead-0") == {taken_over}, 60)
    rig.open_gate()
    rig.wait_done("running", *labels("ahead", 3))
    (proxy.flow if how == "held back" else proxy.forget)()
    cut_off.wait_for("done twice")
    os.killpg(other.process.pid, signal.SIGKILL)
    rig.publish("after")
    rig.wait_done("after", timeout=60)

    assert set(rig.runs.done) == {"running", *labels("ahead", 3), "after"}
    assert max(rig.runs.started.values()) == 2


# --- failover ------------------------------------------------------------------------------------------------------


def test_a_standby_that_is_promoted_under_load_goes_on_where_the_primary_stopped(tmp_path: Path) -> None:
    with running_server() as primary, running_server(primary=primary) as standby:
        with psycopg.connect(primary.url, autocommit=True) as connection:
            # What a publisher was told is published, is on both.
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        with running_rig(primary, tmp_path) as rig, ExitStack() as stack:
            stack.callback(commit_alone, primary)  # or the database could not be dropped
            url = database_url(rig.url)
            both = rendered(
                url.set(drivername="postgresql", host=None, port=None).update_query_dict(
                    {"host": "127.0.0.1,127.0.0.1", "port": f"{primary.port},{standby.port}"}
                )
            )
            wait_until("the standby to follow", lambda: bool(rig.query(
                "SELECT true FROM pg_stat_replication WHERE sync_state = 'sync'")))  # fmt: skip
            for pool in ("threads", "prefork"):
                rig.worker(pool, url=both)
            app = broker_tasks.application(both)
            sent: list[str] = []
            stop = threading.Event()

            def publish() -> None:
                while not stop.is_set():
                    rig.publish(f"task-{len(sent)}", app=app)
                    sent.append(f"task-{len(sent)}")

            publisher = threading.Thread(target=publish, daemon=True)
            publisher.start()
            try:
                wait_until("some to be done", lambda: len(rig.runs.done) > 30)
                primary.stop("immediate")
                standby.promote()
                commit_alone(standby)
                before = len(sent)
                wait_until("more to be published", lambda: len(sent) > before + 30, 60)
            finally:
                stop.set()
                publisher.join(60)
                app.close()
            wait_until(f"all of {len(sent)} to be done", lambda: set(sent) <= set(rig.runs.done), 60)
            with psycopg.connect(
                rendered(database_url(standby.url).set(drivername="postgresql", database=rig.database))
            ) as c:
                left = "SELECT count(*) FROM rhesis_tasks.message WHERE task_id IS NOT NULL"
                wait_until("no message to be left", lambda: c.execute(left).fetchone() == (0,), 60)
            print(f"{len(sent)} published, {len(rig.done_more_than_once())} done twice")


def commit_alone(server: PostgresServer) -> None:
    """Let a server wait for no standby any more."""
    if not server.running:
        server.start()
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")


# --- no room -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_file_system(megabytes: int) -> Iterator[Path]:
    """A folder of the server's user in a file system of this size."""
    folder = Path(tempfile.mkdtemp(prefix="rhesis-pg-disk-", dir="/tmp"))
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        folder.rmdir()
        pytest.skip("a small file system cannot be mounted here: that takes root, and a machine that permits it")
    try:
        user = as_other_user()
        space = folder / "space"
        space.mkdir(mode=0o700)
        os.chown(space, user["user"], user["group"])
        yield space
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@pytest.fixture
def small_disk(server: PostgresServer) -> Iterator[Path]:
    """A file system of 8 MB that the server may write to."""
    with small_file_system(8) as space:
        yield space


def fill(rig: Rig) -> None:
    for number in range(1000):
        rig.app.send_task("run", [f"big-{number}", "x" * 5000], task_id=f"big-{number}", retry=False, countdown=HOUR)


def fill_with_messages(queue: MessageQueue) -> None:
    for _ in range(1000):
        queue.publish("", "celery", "{}", b"x" * 5000)


def test_a_full_disk_is_said_to_be_full_and_workers_go_on_when_there_is_room(
    rig: Rig, server: PostgresServer, small_disk: Path
) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    with rig.connect() as connection:
        connection.execute("ALTER TABLE rhesis_tasks.message SET TABLESPACE small")
    ballast = small_disk / "ballast"
    try:
        worker = rig.worker("threads", grace=GRACE)
        rig.publish("before")
        rig.wait_done("before")
        sent = labels("task", 50)
        rig.publish(*sent[:25], gate="gate")
        ballast.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))

        with pytest.raises(OperationalError, match=r"has no room.*No space left on device.*Make room") as caught:
            fill(rig)
        assert isinstance(caught.value.__cause__, DatabaseFullError)
        with queue_of(rig) as queue, pytest.raises(DatabaseFullError):
            fill_with_messages(queue)
        pass_time(3 * GRACE)
        ballast.unlink()
        rig.query("DELETE FROM rhesis_tasks.message WHERE due_at IS NOT NULL OR task_id IS NULL")
        rig.publish(*sent[25:])
        rig.open_gate()
        rig.wait_done(*sent, timeout=60)

        assert worker.running
        assert rig.done_more_than_once() == set()
    finally:
        ballast.unlink(missing_ok=True)
        with rig.connect() as connection:
            connection.execute("ALTER TABLE rhesis_tasks.message SET TABLESPACE pg_default")
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("DROP TABLESPACE small")


@contextlib.contextmanager
def queue_of(rig: Rig) -> Iterator[MessageQueue]:
    connection = Connection(database_url(rig.url), name="test")
    yield MessageQueue(connection, "rhesis_tasks")
    connection.close()


@contextlib.contextmanager
def server_with_small_log() -> Iterator[tuple[PostgresServer, Path]]:
    """A server whose pg_wal is on a file system of 128 MB, and the file there that takes a quarter of it."""
    # No checkpoint makes room meanwhile.
    settings = {"checkpoint_timeout": "1h", "max_wal_size": "4GB", "min_wal_size": "32MB"}
    with small_file_system(128) as space, running_server(settings=settings) as server:
        server.stop()
        log = server.data / "pg_wal"
        owner = log.stat()
        shutil.copytree(log, space / "pg_wal")
        for path in (space / "pg_wal", *(space / "pg_wal").rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        shutil.rmtree(log)
        log.symlink_to(space / "pg_wal")
        ballast = space / "ballast"
        ballast.write_bytes(b"x" * (32 << 20))
        server.start()
        yield server, ballast


class Load(threading.Thread):
    """Publishes large messages until it is stopped, each one once, and writes down which of them failed."""

    def __init__(self, app: Celery) -> None:
        super().__init__(name="load", daemon=True)
        self._app = app
        self._stop_it = threading.Event()
        self.sent: set[str] = set()
        self.failed: set[str] = set()

    def run(self) -> None:
        number = 0
        while not self._stop_it.is_set():
            number += 1
            label = f"task-{number}"
            try:
                self._app.send_task("run", [label], headers={"x": os.urandom(20_000).hex()}, task_id=label, retry=False)
            except OperationalError:
                self.failed.add(label)
                time.sleep(0.05)
            else:
                self.sent.add(label)

    def stop(self) -> None:
        self._stop_it.set()
        self.join(60)


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_when_the_servers_log_has_no_room_what_was_published_is_done_once_there_is_some(
    tmp_path: Path, pool: str
) -> None:
    """The server panics and stops.  What it told nobody to be published may be run, or not; once at most."""
    with server_with_small_log() as (server, ballast), running_rig(server, tmp_path) as rig:
        worker = rig.worker(pool, grace=GRACE)
        load = Load(rig.app)
        load.start()
        try:
            wait_until("the server's log to have no room", lambda: "PANIC" in server.log, 60)
            wait_until("a publish to fail", lambda: bool(load.failed), 60)
            wait_until("the server to stop", lambda: not server.running, 60)
            pass_time(2 * GRACE)
            ballast.unlink()
            server.start()
            before = len(load.sent)
            wait_until("more to be published", lambda: len(load.sent) > before + 30, 60)
        finally:
            ballast.unlink(missing_ok=True)  # or the server could not be started
            load.stop()
        wait_until(f"all of {len(load.sent)} to be done", lambda: load.sent <= set(rig.runs.done), 60)
        wait_until("no message to be left", lambda: not rig.messages(), 60)

        done = rig.runs.done
        print(
            f"{len(load.sent)} published, {len(load.failed)} failed, {len(done.keys() & load.failed)} of those done, "
            f"{len(rig.done_more_than_once())} done twice"
        )
        assert "No space left on device" in server.log
        assert done.keys() <= load.sent | load.failed
        assert rig.done_more_than_once() == set()
        assert rig.query("SELECT count(*) FROM rhesis_tasks.dead_letter") == [(0,)]
        assert worker.running


def test_too_many_connections_are_said_to_be_too_many_and_workers_start_and_go_on_when_there_are_some(
    tmp_path: Path,
) -> None:
    with running_server(settings={"max_connections": 12}) as server, running_rig(server, tmp_path) as rig:
        first = rig.worker("threads", grace=LONG)
        rig.publish("before")
        rig.wait_done("before")
        with ExitStack() as stack, ExitStack() as workers:
            with contextlib.suppress(psycopg.OperationalError):
                for _ in range(12):
                    stack.enter_context(psycopg.connect(rig.url))
            with queue_of(rig) as queue, pytest.raises(DatabaseFullError, match="Raise max_connections"):
                queue.queue_exists("celery")
            started: list[object] = []
            starting = threading.Thread(target=lambda: started.append(rig.worker("threads", grace=LONG)), daemon=True)
            starting.start()
            # The first one loses its connections, and there are none to be had.
            server_side = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'rhesis-tasks'"
            )
            rig.query(server_side)
            with contextlib.suppress(psycopg.OperationalError):
                for _ in range(12):
                    workers.enter_context(psycopg.connect(rig.url))
            first.wait_for("lost its connection")
            pass_time(2)
        starting.join(60)
        assert started
        rig.publish(*labels("task", 20))
        rig.wait_done(*labels("task", 20), timeout=60)
        assert first.running


# --- clocks --------------------------------------------------------------------------------------------------------


# As sitecustomize, before anything else is imported.  (libfaketime makes threads of Python wait for ever.)
WRONG_CLOCK = """
import datetime, os, time
right, off = datetime.datetime, float(os.environ["HOURS_OFF"]) * 3600
class Kind(type):
    def __instancecheck__(cls, value):
        return isinstance(value, right)
class Wrong(right, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)
right_time = time.time
time.time = lambda: right_time() + off
datetime.datetime = Wrong
"""


def wrong_clock(folder: Path, hours: int) -> dict[str, str]:
    """The environment of a process whose clock is wrong."""
    (folder / "sitecustomize.py").write_text(WRONG_CLOCK)
    return {"PYTHONPATH": str(folder), "HOURS_OFF": str(hours)}


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_countdown_follows_the_servers_clock_whatever_the_workers_say(
    rig: Rig, configured: Celery, tmp_path: Path, hours: int
) -> None:
    worker = rig.worker("threads", application="fault_tasks", environment=wrong_clock(tmp_path, hours))
    off = datetime.datetime.fromisoformat(worker.output[worker.output.index("[2") + 1 :][:19]) - datetime.datetime.now()
    assert abs(off.total_seconds() / HOUR - hours) < 0.1, worker.output
    began = time.monotonic()
    with tenant_scope(ACME):
        configured.send_task("work", ["at-once"], task_id="at-once")
        configured.send_task("work", ["later"], task_id="later", countdown=3)
    wait_until("both to be done", lambda: len(runs_in(rig.runs)) == 2, 30)

    later = runs_in(rig.runs)["later"][0].began - began
    print(f"with a clock that is {hours:+d} h off, a countdown of 3 s took {later:.2f} s")
    assert 3.0 <= later < 15


PUBLISH = "import broker_tasks, sys; broker_tasks.app.send_task('run', ['later'], task_id='later', countdown=3)"


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_countdown_of_a_publisher_whose_clock_is_wrong_is_as_long_as_it_says(
    rig: Rig, tmp_path: Path, hours: int
) -> None:
    environment = {
        **os.environ,
        **wrong_clock(tmp_path, hours),
        broker_tasks.URL: rig.url,
        broker_tasks.RUNS: str(rig.runs.path),
    }
    subprocess.run(
        python("-c", PUBLISH),
        env=environment, cwd=Path(__file__).parent, check=True,
    )  # fmt: skip
    ((waits,),) = rig.query("SELECT extract(epoch FROM not_before - published_at)::float FROM rhesis_tasks.message")

    assert 2 <= waits <= 3.1


# --- backups -------------------------------------------------------------------------------------------------------


def test_a_restored_backup_gives_what_was_claimed_to_others_and_numbers_go_on(
    rig: Rig, server: PostgresServer, tmp_path: Path
) -> None:
    with queue_of(rig) as queue:
        queue.declare_queue("celery")
        for number in range(4):
            queue.publish("", "celery", "{}", b"old", task_id=f"old-{number}")
        consumer = queue.new_consumer()
        queue.attach(consumer, "of before", ["celery"])
        claimed, _ = queue.claim(consumer, ["celery"], 2)
        greatest = rig.query("SELECT max(id), max(claim_token) FROM rhesis_tasks.message")[0]
        dump = server.program("pg_dump", "--no-owner", "--no-privileges", "--dbname", superuser(server, rig.database))
    backup = tmp_path / "backup.sql"
    backup.write_text(dump)
    pass_time(0.01)
    with psycopg.connect(server.url, autocommit=True) as connection:
        (then,) = connection.execute("SELECT clock_timestamp()").fetchone() or (datetime.datetime.min,)
        connection.execute("CREATE DATABASE restored")
    try:
        url = superuser(server, "restored")
        server.program("psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--file", str(backup), "--dbname", url)
        connection_ = Connection(database_url(url), name="test")
        restored = MessageQueue(connection_, "rhesis_tasks")
        new = restored.new_consumer()
        restored.attach(new, "of today", ["celery"], grace=0.1)
        restored.publish("", "celery", "{}", b"new")
        first, _ = restored.claim(new, ["celery"], 10)

        def is_released() -> bool:
            restored.tend(new, 0.1)
            return not connection_.query("SELECT true FROM rhesis_tasks.message WHERE holder <> %s", [new])

        wait_until("claims of before to be released", is_released, 10)
        second, _ = restored.claim(new, ["celery"], 10)
        old = connection_.query("SELECT count(*) FROM rhesis_tasks.message WHERE published_at < %s", [then])
        connection_.close()

        assert [message.body for message in first] == [b"old", b"old", b"new"]
        assert {message.id for message in second} == {message.id for message in claimed}
        assert new > consumer
        assert max(message.id for message in first) > greatest[0]
        assert min(message.token or 0 for message in (*first, *second)) > greatest[1]
        assert old == [(4,)]
    finally:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("DROP DATABASE restored WITH (FORCE)")


def superuser(server: PostgresServer, database: str | None) -> str:
    return rendered(database_url(server.url).set(drivername="postgresql", database=database))
