"""However a task ends, on every pool: all that is called for it sees its tenant, and nothing of it is left over.

Each ending is run once in each pool's worker, for two tenants at once.  What bodies, hooks, receivers and error
callbacks saw is in a file (see outcome_tasks.py), and several tests look at it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any

import celery
import pytest
from applications import application
from celery import chord
from kombu.utils.uuid import uuid

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.testing import running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
A = TenantContext("tenant-a", "ann")
B = TenantContext("tenant-b", "bob")
POOLS = ("prefork", "threads", "solo", "gevent")
IS_5_6 = celery.VERSION[:2] == (5, 6)


# --- what happens at each ending ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ending:
    """What is called, and in which process of a prefork worker; words that are separated by spaces."""

    state: str  # the record's
    child: str  # where tasks run
    main: str = ""
    perhaps: str = ""  # a process that is ended may have the time for it, or not
    error: str | None = None


BEGUN = "task_prerun before_start body"
RUN = f"{BEGUN} task_postrun"
DONE = f"{RUN} on_success after_return"
FAILED = f"{RUN} on_failure task_failure after_return errback3 errback1"
LOST = Ending("failure", f"{BEGUN} errback1", main="task_failure errback3", error="WorkerLostError")

ENDINGS = {
    "success": Ending("success", DONE),
    "exception": Ending("failure", FAILED, error="ValueError"),
    "retry": Ending("success", f"{RUN} on_retry task_retry {DONE}"),
    "ignore": Ending("started", RUN),
    # Celery 5.6 takes no notice of it.
    "reject": Ending("started", RUN)
    if IS_5_6
    else Ending("failure", f"{RUN} errback1", main="task_failure errback3", error="Reject"),
    "requeue": Ending("success", f"{RUN} {DONE}"),
    "soft_limit": Ending("failure", FAILED, error="SoftTimeLimitExceeded"),
    "hard_limit": Ending(
        "failure",
        f"{BEGUN} errback1",
        main="on_failure task_failure after_return errback3",
        perhaps="task_postrun",
        error="TimeLimitExceeded",
    ),
    "system_exit": dataclasses.replace(LOST, child=f"{RUN} errback1"),
    "unencodable": Ending("failure", FAILED, error="EncodeError"),
    # Celery has no error callbacks for what is revoked, but for a chord's.
    "expired": Ending("expired", "", main="task_revoked", error="TaskRevokedError"),
    "revoked": Ending("revoked", "", main="task_revoked", error="TaskRevokedError"),
    "terminated": Ending("revoked", BEGUN, main="task_revoked", perhaps="task_postrun", error="TaskRevokedError"),
    "lost": LOST,
    # Celery 5.6 does not have retry_on_worker_lost.
    "lost_and_retried": LOST if IS_5_6 else Ending("success", f"{BEGUN} {DONE}", main="on_retry task_retry"),
    "lost_and_requeued": Ending("success", f"{BEGUN} {DONE}"),
}

# It has expired when the worker gets it; expires= would let the broker drop it.
OPTIONS = {"expired": {"headers": {"expires": "2020-01-01T00:00:00+00:00"}}}

# --- where there is such an ending -------------------------------------------------------------------------------

SUPPORTED = None
NO_SOFT_LIMIT = "only prefork has soft time limits"
NO_HARD_LIMIT = "the pool has no time limits"
NO_TERMINATION = "the pool cannot end a running task"
NO_CHILD = "the pool has no child process to lose"
EVERYWHERE = dict.fromkeys(POOLS, SUPPORTED)
PREFORK_ONLY = {**dict.fromkeys(POOLS, NO_CHILD), "prefork": SUPPORTED}

# None, or why the pool does not have the ending.
SUPPORT: dict[str, dict[str, str | None]] = {
    "success": EVERYWHERE,
    "exception": EVERYWHERE,
    "retry": EVERYWHERE,
    "ignore": EVERYWHERE,
    "reject": EVERYWHERE,
    "requeue": EVERYWHERE,
    "soft_limit": {**dict.fromkeys(POOLS, NO_SOFT_LIMIT), "prefork": SUPPORTED},
    "hard_limit": {**EVERYWHERE, "threads": NO_HARD_LIMIT, "solo": NO_HARD_LIMIT},
    "system_exit": {**EVERYWHERE, "solo": "Celery trips over what the body raised, and the worker ends"},
    "unencodable": EVERYWHERE,
    "expired": EVERYWHERE,
    "revoked": EVERYWHERE,
    "terminated": {**EVERYWHERE, "threads": NO_TERMINATION, "solo": NO_TERMINATION},
    "lost": PREFORK_ONLY,
    "lost_and_retried": PREFORK_ONLY,
    "lost_and_requeued": PREFORK_ONLY,
}
PLAIN_CASES = [(pool, ending) for pool in POOLS for ending in SUPPORT if SUPPORT[ending][pool] is SUPPORTED]
# The same with a body that is async def; a gevent worker does not start with such tasks.
CASES = [*PLAIN_CASES, *((pool, f"async_{ending}") for pool, ending in PLAIN_CASES if pool != "gevent")]

# Where a pool has it otherwise.  Threads and gevent trip over a SystemExit, so that nobody hears of the task again.
DIFFERENT = {(pool, "system_exit"): Ending("started", RUN) for pool in ("threads", "gevent")}
if IS_5_6:
    # It tells error callbacks only.
    DIFFERENT["gevent", "hard_limit"] = dataclasses.replace(ENDINGS["hard_limit"], main="errback3")
    # It stores the SystemExit that billiard 4.3 reports instead of the process's loss, and JSON cannot encode that.
    DIFFERENT["prefork", "system_exit"] = Ending("started", RUN)


# --- the rig -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was seen at an ending of two tasks."""

    expected: Ending
    tenants: dict[str, TenantContext]  # by the task's id
    lines: list[dict[str, Any]]
    left: list[Any]  # what tasks without a tenant saw, right afterwards
    left_in_main: list[Any]

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """What was called for a task."""
        return [line for line in self.lines if line["task_id"] == task_id and not line["what"].startswith("around")]

    @property
    def around(self) -> list[dict[str, Any]]:
        """What was there before and after the runs."""
        return [line for line in self.lines if line["what"].startswith("around")]


class Rig:
    """The application in this process, and a worker of its own with a single process, thread or greenlet."""

    def __init__(self, tasks: Any, worker: Child, pool: str, path: Path) -> None:
        self.tasks = tasks
        self.worker = worker
        self.pool = pool
        self.name = f"{pool}@test"
        self._path = path
        self._outcomes: dict[str, Outcome] = {}

    def lines(self) -> list[dict[str, Any]]:
        """What was seen until now; a line that is being written comes later."""
        whole = self._path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def seen(self, task_id: str) -> Counter[str]:
        return Counter(line["what"] for line in self.lines() if line["task_id"] == task_id)

    def record(self, task_id: str, tenant: TenantContext) -> TaskRecord | None:
        with tenant_scope(tenant):
            found: TaskRecord | None = self.tasks.app.backend.get_record(task_id)
            return found

    def revoke(self, task_id: str, *, terminate: bool = False) -> None:
        """Revoke a task, and wait until the worker knows."""
        control = self.tasks.app.control
        assert control.revoke(task_id, destination=[self.name], reply=True, timeout=TIMEOUT, terminate=terminate)

    def launch(self, tenant: TenantContext, publish: Callable[[], Any]) -> Any:
        """Publish for a tenant and with a label."""

        def publish_for() -> Any:
            self.tasks.label.set(f"label of {tenant.organization_id}")
            with tenant_scope(tenant):
                return publish()

        return copy_context().run(publish_for)

    def run(self, ending: str) -> Outcome:
        """Let the tasks of both tenants end like this, unless that was done already."""
        if ending not in self._outcomes:
            self._outcomes[ending] = self._run(ending)
        return self._outcomes[ending]

    def _run(self, ending: str) -> Outcome:
        task, errback1, errback3 = getattr(self.tasks, ending), self.tasks.errback1, self.tasks.errback3
        tenants = {uuid(): A, uuid(): B}
        before = len(self.lines())
        if ending.endswith("revoked"):
            for task_id in tenants:
                self.revoke(task_id)
        for task_id, tenant in tenants.items():
            link_error = [errback1.s(), errback3.s()]
            options = {"task_id": task_id, "link_error": link_error, **OPTIONS.get(ending.removeprefix("async_"), {})}
            self.launch(tenant, lambda: task.apply_async(**options))  # noqa: B023
        if ending.endswith("terminated"):
            self.terminate(tenants)
        plain = ending.removeprefix("async_")
        expected = DIFFERENT.get((self.pool, plain), ENDINGS[plain])
        calls = Counter(f"{expected.child} {expected.main}".split())
        for task_id in tenants:
            self.until(f"all that is called at {ending}", task_id, lambda seen: seen >= calls)
        return Outcome(
            expected,
            tenants,
            left=self.settle(),
            left_in_main=self.seen_in_main(),
            lines=self.lines()[before:],
        )

    def terminate(self, task_ids: Any) -> None:
        """End each while its body is running."""
        for task_id in task_ids:
            self.until("the body to run", task_id, lambda seen: seen["body"] > 0)
            self.revoke(task_id, terminate=True)

    def until(self, what: str, task_id: str, is_there: Callable[[Counter[str]], bool]) -> None:
        try:
            wait_until(what, lambda: is_there(self.seen(task_id)), TIMEOUT)
        except TimeoutError as error:
            error.add_note(f"seen: {dict(self.seen(task_id))}; the worker's log ends with {self.worker.output[-2000:]}")
            raise

    def settle(self) -> list[Any]:
        """What tasks without a tenant see.  The second comes after all that was published before the first ran."""
        plain = self.tasks.plain
        return [plain.apply_async().get(timeout=TIMEOUT, interval=0.02) for _ in range(2)]

    def seen_in_main(self) -> list[Any]:
        """What the worker's main process has for a tenant, when it is between tasks."""
        (answer,) = self.tasks.app.control.broadcast(
            "seen_in_main", reply=True, timeout=TIMEOUT, destination=[self.name], limit=1
        )
        found: list[Any] = answer[self.name]
        return found


@pytest.fixture(scope="module")
def tasks_and_url(postgres_url: str) -> Iterator[tuple[Any, str]]:
    """The tasks, and the URL of their database."""
    with application(postgres_url, "async_outcome_tasks") as (tasks, database):
        yield tasks, database.url


@pytest.fixture(scope="module")
def rigs(tasks_and_url: tuple[Any, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Rig]]:
    """A worker in each pool that is asked for, with a queue of its own; it stays, to be asked again."""
    tasks, url = tasks_and_url
    folder = tmp_path_factory.mktemp("outcomes")
    with ExitStack() as workers:

        @functools.cache
        def rig_of(pool: str) -> Rig:
            path = folder / pool
            path.touch()
            worker = workers.enter_context(
                running_worker(
                    "outcome_tasks" if pool == "gevent" else "async_outcome_tasks",
                    cwd=HERE,
                    pool=pool,
                    concurrency=1,
                    env={"DATABASE_URL": url, "OUTCOMES": str(path), "OUTCOMES_QUEUE": pool},
                    arguments=["-Q", pool, "-n", f"{pool}@test"],
                )
            )
            return Rig(tasks, worker, pool, path)

        yield rig_of


@pytest.fixture
def rig(request: pytest.FixtureRequest, rigs: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch) -> Rig:
    """The worker in a pool; what is published here goes to it."""
    if request.param == "gevent":
        pytest.importorskip("gevent", reason="gevent is not installed here")
    monkeypatch.setenv("OUTCOMES_QUEUE", request.param)
    return rigs(request.param)


at_every_ending = pytest.mark.parametrize(("rig", "ending"), CASES, indirect=["rig"])


# --- every ending, on every pool ---------------------------------------------------------------------------------


def test_the_table_says_of_every_pool_and_ending_whether_it_is_tested_or_why_not() -> None:
    assert SUPPORT.keys() == ENDINGS.keys()
    assert {ending: set(pools) for ending, pools in SUPPORT.items()} == {ending: set(POOLS) for ending in ENDINGS}
    assert all(reason is SUPPORTED or reason for pools in SUPPORT.values() for reason in pools.values())


@at_every_ending
def test_all_that_is_called_for_a_task_sees_its_tenant_and_variables(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    for task_id, tenant in outcome.tenants.items():
        lines = outcome.of(task_id)
        organization = tenant.organization_id
        assert lines
        assert {(line["what"], line["org"], line["label"]) for line in lines} == {
            (line["what"], organization, f"label of {organization}") for line in lines
        }


@at_every_ending
def test_all_that_is_called_for_a_task_finds_its_request(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    for task_id in outcome.tenants:
        of_its_own = [line for line in outcome.of(task_id) if not line["what"].startswith("errback")]
        assert {line["request_id"] for line in of_its_own} == {task_id}


@at_every_ending
def test_everything_is_called_as_often_as_celery_means_it_and_where(rig: Rig, ending: str) -> None:
    """Once, that is: a hard time limit is dealt with twice by Celery 5.7."""
    outcome = rig.run(ending)
    expected = outcome.expected
    perhaps = expected.perhaps.split()

    for task_id in outcome.tenants:
        seen = Counter((line["what"], line["main"]) for line in outcome.of(task_id) if line["what"] not in perhaps)
        in_child = Counter((what, rig.pool != "prefork") for what in expected.child.split())
        assert seen == in_child + Counter((what, True) for what in expected.main.split())


@at_every_ending
def test_nothing_is_left_over_for_what_runs_next(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    assert outcome.left == [[None, None]] * 2
    assert outcome.left_in_main == [None, None]
    assert [(line["what"], line["org"], line["label"]) for line in outcome.around] == [
        (line["what"], None, None) for line in outcome.around
    ]


@at_every_ending
def test_the_record_is_its_tenants_and_nobody_elses(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    for task_id, tenant in outcome.tenants.items():
        record = rig.record(task_id, tenant)
        assert record is not None
        assert (record.organization_id, record.user_id) == (tenant.organization_id, tenant.user_id)
        assert (record.state, record.error_type) == (outcome.expected.state, outcome.expected.error)
        assert rig.record(task_id, B if tenant is A else A) is None


# --- in a chord --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rig", ["prefork"], indirect=True)
@pytest.mark.parametrize("ending", ["exception", "hard_limit", "lost", "terminated", "expired", "revoked"])
def test_a_chords_error_callbacks_run_once_for_the_tenant_that_launched_it(rig: Rig, ending: str) -> None:
    """Most of these endings are dealt with in the main process."""
    tasks = rig.tasks
    header_ids = {uuid(): A, uuid(): B}
    bodies: dict[str, TenantContext] = {}
    for header_id, tenant in header_ids.items():
        if ending == "revoked":
            rig.revoke(header_id)
        header = [getattr(tasks, ending).s().set(task_id=header_id, **OPTIONS.get(ending, {})), tasks.success.s()]
        body = tasks.collect.s().set(link_error=[tasks.errback1.s(), tasks.errback3.s()])
        result = rig.launch(tenant, lambda: chord(header)(body))  # noqa: B023
        bodies[result.id] = tenant
    if ending == "terminated":
        rig.terminate(header_ids)

    for body_id in bodies:
        rig.until("the chord's error callbacks", body_id, lambda seen: {"errback1", "errback3"} <= seen.keys())
    rig.settle()

    for body_id, tenant in bodies.items():
        organization, label = tenant.organization_id, f"label of {tenant.organization_id}"
        calls = [(line["what"], line["org"], line["label"]) for line in rig.lines() if line["task_id"] == body_id]
        assert sorted(calls) == [("errback1", organization, label), ("errback3", organization, label)]
        record = rig.record(body_id, tenant)
        assert record is not None
        assert (record.state, record.error_type, record.organization_id) == ("failure", "ChordError", organization)
