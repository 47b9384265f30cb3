"""Several workers, two tenants, and everything that can be killed is killed, at random, all of the time.

RHESIS_TASKS_CHAOS_SECONDS says for how long (8; for minutes run with ``--timeout 0 -s``), RHESIS_TASKS_CHAOS_SEED with
what luck.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from broker_rig import (  # noqa: F401  # fixtures
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
from fault_tasks import Run, application, runs_in

from rhesis_tasks import TenantContext, tenant_scope, unconfigure
from rhesis_tasks.processes import Child, wait_until

SECONDS = float(os.environ.get("RHESIS_TASKS_CHAOS_SECONDS", "8"))
SEED = int(os.environ.get("RHESIS_TASKS_CHAOS_SEED", str(time.time_ns() % 1_000_000)))
TENANTS = [TenantContext("acme", "alice"), TenantContext("globex", "bob")]
MAX_DELIVERIES = 5
POOLS = ["threads", "prefork", "threads", "prefork"]


class Chaos:
    """Workers that are killed and started again, and the server and the connections between them."""

    def __init__(self, rig: Rig, server: PostgresServer, proxy: TcpProxy, luck: random.Random) -> None:
        self._rig = rig
        self._server = server
        self._proxy = proxy
        self._luck = luck
        self.died: dict[int, float] = {}  # when each process that we killed was dead, by its number
        self.done: list[str] = []  # what we did
        self._workers = [self._start(pool) for pool in POOLS]

    def _start(self, pool: str) -> tuple[str, Child]:
        url = self._rig.through(self._proxy.port)
        return pool, self._rig.worker(pool, concurrency=2, prefetch=4, url=url, application="fault_tasks")

    def happen(self) -> None:
        """One of the things that happen."""
        what = self._luck.choices(
            [self._kill_worker, self._kill_child, self._cut, self._restart, self._end_sessions], [3, 3, 3, 1, 2]
        )[0]
        self.done.append(what.__name__.strip("_"))
        what()

    def _kill_worker(self) -> None:
        number = self._luck.randrange(len(self._workers))
        pool, worker = self._workers[number]
        processes = [worker.process.pid, *children(worker.process.pid)]
        kill(worker)
        worker.process.wait()
        self.died |= dict.fromkeys(processes, time.monotonic())
        self._workers[number] = self._start(pool)

    def _kill_child(self) -> None:
        worker = self._luck.choice([worker for pool, worker in self._workers if pool == "prefork"])
        if found := children(worker.process.pid):
            child = self._luck.choice(found)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            self.died[child] = time.monotonic()

    def _cut(self) -> None:
        self._proxy.cut()

    def _restart(self) -> None:
        self._server.restart("immediate")

    def _end_sessions(self) -> None:
        with suppress(Exception):  # the server may have been restarted a moment ago
            self._rig.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND pid <> pg_backend_pid() AND random() < 0.5",
                self._rig.database,
            )


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(each) for each in text.split()]


class Publisher(threading.Thread):
    """Publishes until it is stopped, for two tenants, at once or delayed."""

    def __init__(self, url: str, luck: random.Random) -> None:
        super().__init__(name="publisher", daemon=True)
        self._app = application(url, main="publisher")
        self._luck = luck
        self._stop_it = threading.Event()
        self.sent: dict[str, float] = {}  # when each was to be done at the earliest
        self.retried: set[str] = set()  # what there may be two messages of
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_it.is_set():
                self._publish(f"task-{len(self.sent)}")
                time.sleep(0.01)
        except BaseException as error:
            self.error = error

    def _publish(self, label: str) -> None:
        delay = self._luck.uniform(0.1, 4.0) if self._luck.random() < 0.3 else None
        policy = {
            "max_retries": 200,
            "interval_start": 0.05,
            "interval_max": 0.2,
            "errback": lambda *_: self.retried.add(label),
        }
        at = time.monotonic() + (delay or 0)
        with tenant_scope(self._luck.choice(TENANTS)):
            self._app.send_task(
                "work",
                [label, self._luck.choice([0.0, 0.02, 0.2])],
                task_id=label,
                countdown=delay,
                retry=True,
                retry_policy=policy,
            )
        self.sent[label] = at

    def stop(self) -> None:
        """Stop, and raise what has gone wrong."""
        self._stop_it.set()
        self.join(60)
        unconfigure(self._app)
        self._app.close()
        if self.error is not None:
            raise self.error


@pytest.mark.newest_only
@pytest.mark.timeout(max(120, 15 * SECONDS))
def test_what_goes_in_comes_out_whatever_is_killed(rig: Rig, server: PostgresServer, proxy: TcpProxy) -> None:
    print(f"RHESIS_TASKS_CHAOS_SEED={SEED}")
    chaos = Chaos(rig, server, proxy, random.Random(SEED))
    publisher = Publisher(rig.through(proxy.port), random.Random(SEED + 1))
    publisher.start()
    end = time.monotonic() + SECONDS
    luck = random.Random(SEED + 2)
    while time.monotonic() < end:
        time.sleep(luck.uniform(0.2, 1.0))
        chaos.happen()
    publisher.stop()
    sent = set(publisher.sent)
    wait_until(f"all of {len(sent)} tasks to be done", lambda: sent <= ended(runs_in(rig.runs)), 60 + 3 * SECONDS, 0.5)
    wait_until("no message to be left", lambda: not rig.messages(), 60)

    found = runs_in(rig.runs)
    again = {label: runs for label, runs in found.items() if len(runs) > 1}
    counts = {what: chaos.done.count(what) for what in sorted(set(chaos.done))}
    print(
        f"{len(sent)} tasks, {sum(map(len, found.values()))} runs, {len(publisher.retried)} published again; {counts}"
    )
    assert rig.query("SELECT task_id, reason FROM rhesis_tasks.dead_letter") == []
    assert found.keys() == sent
    assert {label: runs for label, runs in again.items() if len(runs) > MAX_DELIVERIES * copies(label, publisher)} == {}
    assert [pair for runs in again.values() for pair in at_once(runs, chaos.died, publisher.retried)] == []
    early = {label for label, runs in found.items() if runs[0].began < publisher.sent[label] - 0.05}
    assert early == set()
    assert rig.query("SELECT DISTINCT organization_id FROM rhesis_tasks.task_record ORDER BY 1") == [
        ("acme",),
        ("globex",),
    ]


def ended(found: dict[str, list[Run]]) -> set[str]:
    return {label for label, runs in found.items() if any(run.ended is not None for run in runs)}


def copies(label: str, publisher: Publisher) -> int:
    """How many messages there may be of a task; an attempt whose answer was lost may have made one."""
    return 3 if label in publisher.retried else 1


def at_once(runs: list[Run], died: dict[int, float], retried: set[str]) -> Iterator[tuple[Run, Run]]:
    """Runs of one message of which one began before the one before had ended, or its process was dead."""
    for before, after in itertools.pairwise(runs):
        over = before.ended if before.ended is not None else died.get(before.process)
        if before.label not in retried and (over is None or after.began < over):
            yield before, after
