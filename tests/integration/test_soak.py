"""Many tenants at once, random canvases, failures, kills and litter: every body has its launcher's tenant.

``RHESIS_TASKS_SOAK_BODIES`` says how many bodies there are at least on each pool; run with ``-s`` to see the count, and
with ``--timeout 0`` if there are many.  ``RHESIS_TASKS_SOAK_SECONDS`` says for how long tables are watched.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from applications import application
from broker_rig import Rig, running_rig, running_server
from celery import chain, chord, group
from fault_tasks import application as new_application

from rhesis_tasks import TenantContext, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.testing import running_worker

HERE = Path(__file__).parent
BODIES = int(os.environ.get("RHESIS_TASKS_SOAK_BODIES", "500"))
SECONDS = float(os.environ.get("RHESIS_TASKS_SOAK_SECONDS", "30"))
TENANTS = [TenantContext(f"tenant-{number}", f"user-{number}") for number in range(20)]
AT_ONCE = max(300, BODIES // 20)
"""Bodies under way at the same time."""
TIMEOUT = 90 + AT_ONCE / 10
"""Seconds for those: some wait until a killed worker's messages are released."""


@pytest.fixture(scope="module")
def tasks_and_url(postgres_url: str) -> Iterator[tuple[Any, str]]:
    """The tasks, and the URL of their database."""
    with application(postgres_url, "soak_tasks") as (tasks, database):
        yield tasks, database.url


class Composer:
    """Makes canvases of tasks, each with a label of its own."""

    def __init__(self, tasks: Any, rng: random.Random, prefix: str, with_deaths: bool) -> None:
        self._tasks = tasks
        self._rng = rng
        self._prefix = prefix
        self._with_deaths = with_deaths
        self._number = 0
        self.labels: list[str] = []

    def label(self) -> str:
        self._number += 1
        self.labels.append(f"{self._prefix}-{self._number}")
        return self.labels[-1]

    def part(self) -> Any:
        """One task that succeeds in the end."""
        tasks = self._tasks
        kinds = ["step", "careless", "careless", "flaky", "stubborn", "nested", "replaced"]
        kind = self._rng.choice([*kinds, "dies"] if self._with_deaths and self._rng.random() < 0.1 else kinds)
        if kind == "nested":
            return tasks.nested.si(self.label(), self.label())
        if kind == "replaced":
            return tasks.replaced.si(self.label(), dict(tasks.careless.si(self.label())))
        return getattr(tasks, kind).si(self.label())

    def canvas(self) -> Any:
        match self._rng.randrange(6):
            case 0:
                return self.part()
            case 1:
                return chain(self.part() for _ in range(self._rng.randrange(2, 5)))
            case 2:
                return group(self.part() for _ in range(self._rng.randrange(1, 5)))
            case 3:
                return chord([self.part() for _ in range(self._rng.randrange(1, 4))], self.part())
            case 4:
                return self.part().set(link=[self.part()])
            case _:
                return self._tasks.broken.si(self.label()).on_error(self._tasks.careless.si(self.label()))


@contextmanager
def killable_worker(pool: str, queue: str, file: Path, url: str) -> Iterator[list[Child]]:
    """A worker that the block may kill and start again: the last of the list is the one that runs."""
    env = {"DATABASE_URL": url, "SOAK_FILE": str(file), "SOAK_QUEUE": queue}
    with ExitStack() as stack:

        def start() -> Child:
            return stack.enter_context(running_worker("soak_tasks", cwd=HERE, pool=pool, concurrency=4, env=env))

        workers = Workers(start)
        yield workers


class Workers(list[Child]):
    """The workers that were started one after the other."""

    def __init__(self, start: Any) -> None:
        self._start = start
        super().__init__([start()])

    def kill(self) -> None:
        """Kill the one that runs, and start another."""
        self[-1].process.kill()
        self.append(self._start())


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_every_body_has_its_launchers_tenant_whatever_happens(
    tasks_and_url: tuple[Any, str], pool: str, tmp_path: Path
) -> None:
    tasks, url = tasks_and_url
    rng = random.Random(pool)  # the same canvases each time
    file = tmp_path / "seen"
    file.touch()
    meant: dict[str, TenantContext | None] = {}
    began = time.monotonic()
    tasks.app.conf.task_default_queue = f"soak-{pool}"
    with killable_worker(pool, f"soak-{pool}", file, url) as workers:
        batch = 0
        while len(meant) < BODIES:
            batch += 1
            labels = launch(tasks, rng, f"{pool}-{batch}", with_deaths=pool == "prefork")
            meant |= labels
            if batch % 2:
                workers.kill()
            wait_until(f"batch {batch}", lambda labels=labels: labels.keys() <= seen(file).keys(), TIMEOUT)

    found = seen(file)
    wrong = {label: saw for label, all_saw in found.items() for saw in all_saw if saw != expected(meant[label])}
    runs = sum(map(len, found.values()))
    print(
        f"\n{pool}: {len(found)} bodies ran {runs} times for {len(TENANTS)} tenants in "
        f"{time.monotonic() - began:.0f} s, {len(workers) - 1} workers killed: {len(wrong)} bodies with a wrong or "
        "missing tenant"
    )
    assert wrong == {}
    assert found.keys() == meant.keys()


def expected(tenant: TenantContext | None) -> tuple[str, ...]:
    """What a body for this tenant notes."""
    if tenant is None:
        return ("None", "None", "None")
    return (str(tenant.organization_id), str(tenant.user_id), f"mark-{tenant.organization_id}")


def launch(tasks: Any, rng: random.Random, prefix: str, with_deaths: bool) -> dict[str, TenantContext | None]:
    """Launch random canvases for random tenants, and tasks for nobody; returns for whom each label is."""
    meant: dict[str, TenantContext | None] = {}
    number = 0
    while len(meant) < min(AT_ONCE, BODIES):
        number += 1
        if rng.random() < 0.1:
            meant[f"{prefix}-{number}"] = None
            tasks.nobodys.delay(f"{prefix}-{number}")
            continue
        tenant = rng.choice(TENANTS)
        composer = Composer(tasks, rng, f"{prefix}-{number}", with_deaths)
        canvas = composer.canvas()
        token = tasks.mark.set(f"mark-{tenant.organization_id}")
        try:
            if rng.random() < 0.5:
                launch_with_context(canvas, context=tenant)
            else:
                with tenant_scope(tenant):
                    canvas.delay()
        finally:
            tasks.mark.reset(token)
        meant |= dict.fromkeys(composer.labels, tenant)
    return meant


def seen(file: Path) -> dict[str, list[tuple[str, ...]]]:
    """What each body saw, by its label."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in file.read_text().splitlines():
        label, *saw = line.split(" ")
        found.setdefault(label, []).append(tuple(saw))
    return found


# --- table health --------------------------------------------------------------------------------------------------

MEGABYTE = 2**20
SIZES = """
    SELECT c.relname, pg_relation_size(c.oid) FROM pg_class c
    WHERE c.relnamespace = 'rhesis_tasks'::regnamespace AND c.relkind IN ('r', 'i')
      AND c.relname !~ '_record|chord_part'
"""


def health(rig: Rig, worker: Child) -> dict[str, int]:
    """Bytes of each table and index that holds what comes and goes, and what the worker has taken."""
    process = Path(f"/proc/{worker.process.pid}")
    ((connections,),) = rig.query(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()", rig.database
    )
    return {
        **dict(rig.query(SIZES)),
        "connections": connections,
        "memory": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list((process / "fd").iterdir())),
    }


@pytest.mark.newest_only
@pytest.mark.timeout(max(180, 4 * SECONDS))
def test_tables_connections_memory_and_files_stay_as_they_are_under_steady_load(tmp_path: Path) -> None:
    """Tasks at once, delayed ones, and ones that expire; what has ended is in the records alone."""
    # Once a minute by default: at that pace as well, but not in a test of seconds.
    with running_server(settings={"autovacuum_naptime": "1s"}) as server, running_rig(server, tmp_path) as rig:
        app = new_application(rig.url, main="soak")
        worker = rig.worker("threads", concurrency=4, prefetch=8, application="fault_tasks")
        began, found, sent = time.monotonic(), [], 0
        for part in itertools.count(1):
            while time.monotonic() < began + part * SECONDS / 3:
                with tenant_scope(TENANTS[sent % len(TENANTS)]):
                    later = 0.5 if sent % 4 == 0 else None
                    app.send_task("work", [f"task-{sent}"], countdown=later, expires=60 if sent % 5 == 0 else None)
                sent += 1
                time.sleep(0.002)
            found.append(health(rig, worker))
            if part == 3:
                break
        unconfigure(app)
        app.close()
        wait_until("all to be done", lambda: not rig.query("SELECT true FROM rhesis_tasks.message LIMIT 1"), TIMEOUT)
        states = rig.query("SELECT state, count(*) FROM rhesis_tasks.task_record GROUP BY state")

    first, _, last = found
    grown = {name: (first[name], size) for name, size in last.items() if size > 2 * first[name] + 2 * MEGABYTE}
    print(f"{sent} tasks in {SECONDS:g} s; " + ", ".join(f"{name} {last[name]:,}" for name in sorted(last)))
    assert {name: sizes for name, sizes in grown.items() if name != "memory"} == {}
    assert last["memory"] <= first["memory"] + 20 * MEGABYTE
    assert last["files"] <= first["files"] + 3
    assert last["connections"] <= first["connections"] + 2
    assert states == [("success", sent)]
