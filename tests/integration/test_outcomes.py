"""However a task ends, on every pool: all that is called for it sees its tenant, and nothing of it is left over.

Each ending is run once in each pool's worker, for two tenants at once.  What bodies, hooks, receivers and error
callbacks saw is in a file, the worker's log in another (see outcome_tasks.py), and several tests look at them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
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
from rhesis_tasks.headers import HEADER, context_headers
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.testing import running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
A = TenantContext("tenant-a", "ann")
B = TenantContext("tenant-b", "bob")
SECRET = "the-secret-argument"
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
    message: str | None = None
    logged: str | None = None  # where the log has another message than the record
    reason: str | None = None
    retries: int = 0
    log: str = ""  # what our lines are about
    told: str | None = None  # the outcomes that tenant hooks hear of; by default those in the log
    told_by_task: str = ""  # ... and of which a task tells, since the main process decides
    is_expected: bool = False
    times: int = 1  # that it all happens


BEGUN = "task_prerun before_start body"
RUN = f"{BEGUN} task_postrun"
DONE = f"{RUN} on_success after_return"
RETRIED = f"{RUN} on_retry task_retry"
FAILED = f"{RUN} on_failure task_failure after_return errback3 errback1"
SUCCESS = Ending("success", DONE, log="started success")
FAILURE = Ending("failure", FAILED, log="started failure")
# It is told where it has ended, and so is what comes next.
AGAIN = Ending("success", f"{RETRIED} {DONE}", log="started retry started success", retries=1)
USED_UP = Ending("failure", f"{RETRIED} {FAILED}", log="started retry started failure", retries=1)
LOST = Ending(
    "failure",
    f"{BEGUN} errback1",
    main="task_failure errback3",
    error="WorkerLostError",
    message="Worker exited prematurely: signal 9 (SIGKILL) Job: N.",
    reason="the process that ran it was lost",
    log="started failure",
    told_by_task="failure",
)


def failure(error: str, message: str, reason: str | None = None, like: Ending = FAILURE, **more: Any) -> Ending:
    reason = reason or f"{error} is not listed in retry_on"
    return dataclasses.replace(like, error=error, message=message, reason=reason, **more)


def success(like: Ending = SUCCESS, **more: Any) -> Ending:
    return dataclasses.replace(like, **more)


REVOKED = Ending("revoked", "", main="task_revoked", error="TaskRevokedError", message="revoked")

ENDINGS = {
    "success": SUCCESS,
    "exception": failure("ValueError", "broken"),
    "retry": AGAIN,
    "ignore": Ending("started", RUN, log="started", told=""),
    "reject": Ending(
        "failure",
        f"{RUN} errback1",
        # Celery 5.6 takes no notice of it.
        main="errback3" if IS_5_6 else "task_failure errback3",
        error="Reject",
        message="no use",
        reason="it rejected its message",
        log="started failure",
        told_by_task="failure",
    ),
    "requeue": Ending("success", f"{RUN} {DONE}", log="started requeued started success", told="success"),
    "soft_limit": failure("SoftTimeLimitExceeded", "", "its soft time limit was reached"),
    "hard_limit": Ending(
        "failure",
        f"{BEGUN} errback1",
        main="on_failure task_failure after_return errback3",
        perhaps="task_postrun",
        error="TimeLimitExceeded",
        message="0.2",
        reason="its time limit was reached",
        log="started failure",
        told_by_task="failure",
    ),
    "system_exit": dataclasses.replace(LOST, child=f"{RUN} errback1", message="Worker exited prematurely: exitcode 3."),
    "unencodable": failure(
        "EncodeError",
        "TypeError('Object of type object is not JSON serializable')",
        "its result cannot be stored",
        logged="Object of type object is not JSON serializable",
    ),
    # Celery has no error callbacks for what is revoked, but for a chord's.
    "expired": dataclasses.replace(REVOKED, state="expired", message="expired"),
    "revoked": REVOKED,
    "terminated": dataclasses.replace(
        REVOKED, child=BEGUN, perhaps="task_postrun", message="terminated", log="started", told=""
    ),
    "lost": LOST,
    # Celery 5.6 does not have retry_on_worker_lost.
    "lost_and_retried": LOST
    if IS_5_6
    else dataclasses.replace(AGAIN, child=f"{BEGUN} {DONE}", main="on_retry task_retry", told_by_task="retry"),
    "lost_and_requeued": Ending("success", f"{BEGUN} {DONE}", log="started requeued started success", told="success"),
    "unpicklable": failure("NeedsTwoArguments", "nothing for anything"),
    "unencodable_error": failure("ValueError", "broken <lock>", logged="('broken', <lock>)"),
    "unprintable": failure("Unprintable", "", logged="<str() failed with a RuntimeError>"),
    "expected": failure("KeyError", "nothing", logged="'nothing'", is_expected=True),
    "used_up": failure("ConnectionError", "down", "all 1 retries are used up", USED_UP),
    "given_up": failure("Fatal", "down for good", "Fatal is listed in give_up_on"),
    "too_old": failure("ConnectionError", "down", "it is older than 0.05 s"),
    "by_hand": failure("ConnectionError", "down", "all 1 retries are used up", USED_UP),
    "by_hand_without_error": failure(
        "MaxRetriesExceededError", "Can't retry TASK: all 0 retries are used up", "all 0 retries are used up"
    ),
    "hook_raises": SUCCESS,
    "hook_hangs": SUCCESS,
    "lost_in_hook": success(child=f"{BEGUN} on_success after_return"),
    "delivered_twice": success(times=2),
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
ONCE = {**dict.fromkeys(POOLS, "it does not depend on the pool"), "prefork": SUPPORTED}

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
    "unpicklable": ONCE,
    "unencodable_error": ONCE,
    "unprintable": ONCE,
    "expected": ONCE,
    "used_up": ONCE,
    "given_up": ONCE,
    "too_old": ONCE,
    "by_hand": ONCE,
    "by_hand_without_error": ONCE,
    "hook_raises": ONCE,
    "hook_hangs": ONCE,
    "lost_in_hook": PREFORK_ONLY,
    "delivered_twice": ONCE,
}
PLAIN_CASES = [(pool, ending) for pool in POOLS for ending in SUPPORT if SUPPORT[ending][pool] is SUPPORTED]
# The same with a body that is async def; a gevent worker does not start with such tasks.
WITHOUT_ASYNC = {ending for ending, pools in SUPPORT.items() if pools is ONCE} - {"hook_hangs"} | {"lost_in_hook"}
CASES = [
    *PLAIN_CASES,
    *((pool, f"async_{ending}") for pool, ending in PLAIN_CASES if pool != "gevent" and ending not in WITHOUT_ASYNC),
]

# Where a pool has it otherwise.  Threads and gevent trip over a SystemExit, so that nobody hears of the task again.
UNHEARD_OF = Ending("started", RUN, log="started", told="")
DIFFERENT = {(pool, "system_exit"): UNHEARD_OF for pool in ("threads", "gevent")}
if IS_5_6:
    # It tells error callbacks only.
    DIFFERENT["gevent", "hard_limit"] = dataclasses.replace(ENDINGS["hard_limit"], main="errback3")
    # It stores the SystemExit that billiard 4.3 reports instead of the process's loss, and JSON cannot encode that.
    DIFFERENT["prefork", "system_exit"] = UNHEARD_OF
    # It takes what has succeeded for failed; the record stays as it is.
    DIFFERENT["prefork", "lost_in_hook"] = success(
        child=f"{BEGUN} on_success after_return errback1", main="task_failure errback3"
    )


# --- the rig -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was seen at an ending of two tasks."""

    expected: Ending
    tenants: dict[str, TenantContext]  # by the task's id
    lines: list[dict[str, Any]]
    log: list[dict[str, Any]]
    left: list[Any]  # what tasks without a tenant saw, right afterwards
    left_in_main: list[Any]

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """What was called for a task, but for tenant hooks."""
        return [
            line
            for line in self.lines
            if line["task_id"] == task_id and not line["what"].startswith("around") and "hook" not in line
        ]

    def hooks(self, task_id: str) -> list[dict[str, Any]]:
        """The tenant hooks that were called for a task."""
        return [line for line in self.lines if line["task_id"] == task_id and "hook" in line]

    def told(self, task_id: str) -> list[dict[str, Any]]:
        """Our lines in the log about a task."""
        return [line for line in self.log if line["task_id"] == task_id and line["task_outcome"]]

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
        self._outcomes: dict[str, Outcome | TimeoutError] = {}

    def lines(self) -> list[dict[str, Any]]:
        """What was seen until now; a line that is being written comes later."""
        return self._read(self._path)

    def log(self) -> list[dict[str, Any]]:
        """What the worker has logged until now."""
        return self._read(self._path.with_suffix(".log"))

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
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
            try:
                self._outcomes[ending] = self._run(ending)
            except TimeoutError as error:
                self._outcomes[ending] = error  # not to be waited for in each test
        outcome = self._outcomes[ending]
        if isinstance(outcome, TimeoutError):
            raise outcome
        return outcome

    def _run(self, ending: str) -> Outcome:
        task, errback1, errback3 = getattr(self.tasks, ending), self.tasks.errback1, self.tasks.errback3
        tenants = {uuid(): A, uuid(): B}
        before, logged_before = len(self.lines()), len(self.log())
        if ending.endswith("revoked"):
            for task_id in tenants:
                self.revoke(task_id)
        for task_id, tenant in tenants.items():
            link_error = [errback1.s(), errback3.s()]
            options = {"task_id": task_id, "link_error": link_error, **OPTIONS.get(ending.removeprefix("async_"), {})}
            self.launch(tenant, lambda: task.apply_async((SECRET,), **options))  # noqa: B023
        if ending.endswith("terminated"):
            self.terminate(tenants)
        plain = ending.removeprefix("async_")
        expected = DIFFERENT.get((self.pool, plain), ENDINGS[plain])
        calls = Counter(f"{expected.child} {expected.main}".split()) + self.hooks_at(plain, expected)
        for task_id, tenant in tenants.items():
            self.until(f"all that is called at {ending}", task_id, lambda seen: seen >= calls)
            if plain == "delivered_twice":
                self.launch(tenant, lambda: task.apply_async((SECRET,), task_id=task_id))  # noqa: B023
                self.until("its second end", task_id, lambda seen: seen["task_postrun"] == 2)
        return Outcome(
            expected,
            tenants,
            left=self.settle(),
            left_in_main=self.seen_in_main(),
            lines=self.lines()[before:],
            log=self.log()[logged_before:],
        )

    def hooks_at(self, ending: str, expected: Ending) -> Counter[str]:
        """The tenant hooks that run at an ending; a gevent worker has none that are ``async def``."""
        told = expected.log.replace("started", "").replace("requeued", "") if expected.told is None else expected.told
        whose = ["own", "the application's", *(["the application's async"] if self.pool != "gevent" else [])]
        if ending == "lost_in_hook":
            whose = ["own"]
        return Counter(f"{each} {outcome}" for each in whose for outcome in told.split())

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
        in_child = Counter((what, rig.pool != "prefork") for what in expected.child.split() * expected.times)
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


@at_every_ending
def test_tenant_hooks_run_once_for_each_outcome_under_its_tenant(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    for task_id, tenant in outcome.tenants.items():
        hooks = outcome.hooks(task_id)
        organization = tenant.organization_id
        assert Counter(line["what"] for line in hooks) == rig.hooks_at(ending.removeprefix("async_"), outcome.expected)
        for line in hooks:
            assert (line["org"], line["tenant_told"], line["label"]) == (
                organization,
                organization,
                f"label of {organization}",
            )
            assert line["in_database"] == (organization if line["what"].startswith("own") else None)


@at_every_ending
def test_tenant_hooks_run_where_the_task_has_ended_or_in_a_task_if_the_main_process_says_so(
    rig: Rig, ending: str
) -> None:
    outcome = rig.run(ending)

    for task_id in outcome.tenants:
        bodies = [line["pid"] for line in outcome.of(task_id) if line["what"] == "body"]
        for line in outcome.hooks(task_id):
            told = line["what"].rpartition(" ")[2]
            by_task = told in outcome.expected.told_by_task.split()
            assert line["run_by"] == getattr(rig.tasks, ending).name, (
                "hooks that a task runs have their own task's request"
            )
            assert line["main"] == (rig.pool != "prefork")
            assert by_task or line["pid"] == bodies[line["retries"]] or told == "success"


@at_every_ending
def test_tenant_hooks_are_told_how_it_has_ended(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)
    expected = outcome.expected

    for task_id in outcome.tenants:
        for line in outcome.hooks(task_id):
            told = line["what"].rpartition(" ")[2]
            retries = 0 if told == "retry" else expected.retries
            assert (line["retries"], line["has_duration"]) == (retries, True)
            assert line["key"] == f"{task_id}:{told}" + (":0" if told == "retry" else "")
            if told == "failure":
                assert (line["error"], line["reason"]) == (expected.error, expected.reason)
            else:
                assert line["reason"] is None
            assert line["result"] == (f"result: {SECRET}" if told == "success" and ending.endswith("success") else None)


@at_every_ending
def test_the_record_says_why_a_task_failed_and_when_it_ran(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)
    expected = outcome.expected

    for task_id, tenant in outcome.tenants.items():
        record = rig.record(task_id, tenant)
        assert record is not None
        assert (record.error_message and general(record.error_message)) == expected.message
        assert (record.failure_reason, record.retries) == (expected.reason, expected.retries)
        assert (record.traceback is not None) == (record.state == "failure" and not expected.told_by_task)
        times = [record.launched_at, record.started_at, record.last_started_at, record.finished_at]
        assert [time is not None for time in times] == [
            True,
            "body" in expected.child,
            "body" in expected.child,
            expected.state != "started",
        ]
        known = [time for time in times if time is not None]
        assert known == sorted(known)
        if record.started_at is not None and record.last_started_at is not None:
            is_later = expected.log.split().count("started") > 1
            assert (record.last_started_at > record.started_at) == is_later


LEVELS = {"started": "INFO", "success": "INFO", "retry": "WARNING", "requeued": "WARNING", "failure": "ERROR"}


@at_every_ending
def test_the_log_has_one_line_for_each_start_and_each_outcome(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)
    expected = outcome.expected
    name = getattr(rig.tasks, ending).name

    for task_id, tenant in outcome.tenants.items():
        lines = outcome.told(task_id)
        assert Counter(line["task_outcome"] for line in lines) == Counter(expected.log.split() * expected.times)
        for line in lines:
            assert line["level"] == ("INFO" if expected.is_expected else LEVELS[line["task_outcome"]])
            assert (line["logger"], line["task_name"]) == ("celery.app.trace", name)
            assert (line["organization_id"], line["user_id"]) == (tenant.organization_id, tenant.user_id)
            assert line["label"] == f"label of {tenant.organization_id}"
            told = general(line["text"].removeprefix(f"Task {name}[{task_id}] "))
            assert re.fullmatch(text_of(line["task_outcome"], expected), told)
            assert bool(line["traceback"]) == (
                line["task_outcome"] == "failure" and not expected.told_by_task and not expected.is_expected
            )


def general(text: str) -> str:
    """Without what differs from run to run."""
    text = re.sub(r"Job: \d+", "Job: N", text)
    text = re.sub(r"<unlocked _thread.lock object at \w+>", "<lock>", text)
    return re.sub(r"Can't retry [\w.]+\[[\w-]+\]", "Can't retry TASK", text)


def text_of(outcome: str, expected: Ending) -> str:
    """What a line says after the task's name and id: a regular expression."""
    seconds = r"\d+\.\d{3} s"
    attempt = expected.retries + 1
    if outcome == "started":
        return r"started: attempt \d"
    if outcome == "requeued":
        return "was put back into its queue(: the process that ran it was lost)?"
    if outcome == "success":
        return rf"succeeded in {seconds} \(attempt {attempt}\)"
    if outcome == "retry":
        return rf"is tried again in 0 s(: .*)? \(attempt 1 ended in {seconds}\)"
    told = re.escape(f"{expected.error}: {expected.logged or expected.message}".rstrip(": "))
    return rf"failed in {seconds}: {told} \(attempt {attempt}: {re.escape(str(expected.reason))}\)"


# That a time limit was reached comes when it is, before the end.
ALLOWED = " ignored$| time limit .* exceeded for |^Discarding revoked task"


@at_every_ending
def test_celerys_own_lines_say_nothing_a_second_time(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    others = [
        line["text"]
        for line in outcome.log
        if not line["task_outcome"] and line["logger"].startswith("celery.") and line["task_id"] in outcome.tenants
    ]
    allowed = ALLOWED
    if ending == "lost_in_hook":
        # That it has succeeded is said; Celery 5.6 does not know.
        allowed += "|raised error: WorkerLostError" if IS_5_6 else "|succeeded before the worker was lost"
    assert [text for text in others if not re.search(allowed, text)] == []


@at_every_ending
def test_no_argument_and_no_result_is_in_the_log(rig: Rig, ending: str) -> None:
    outcome = rig.run(ending)

    assert [line for line in outcome.log if SECRET in json.dumps(line)] == []
    assert SECRET not in rig.worker.output


# --- what hooks do, and tasks that are refused -------------------------------------------------------------------

ON_PREFORK = pytest.mark.parametrize("rig", ["prefork"], indirect=True)


@ON_PREFORK
@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (
            "hook_raises",
            "hook FailsToTell.on_tenant_success of task outcome_tasks.hook_raises failed, which changes "
            "nothing: ValueError: the hook is broken",
        ),
        (
            "hook_hangs",
            "hook TakesLongToTell.on_tenant_success of task outcome_tasks.hook_hangs failed, which changes "
            "nothing: HookTimeoutError: it did not end within 0.2 s",
        ),
        (
            "async_hook_hangs",
            "hook TakesLongToTell.on_tenant_success of task async_outcome_tasks.async_hook_hangs "
            "failed, which changes nothing: HookTimeoutError: it did not end within 0.2 s",
        ),
    ],
)
def test_a_hook_that_fails_is_in_the_log_with_its_tenant(rig: Rig, ending: str, line: str) -> None:
    outcome = rig.run(ending)

    for task_id, tenant in outcome.tenants.items():
        found = [each for each in outcome.log if each["task_id"] == task_id and each["logger"] == "rhesis_tasks.hooks"]
        assert [(each["level"], each["text"], each["organization_id"]) for each in found] == [
            ("ERROR", line, tenant.organization_id)
        ]


# Headers, keyword arguments, whose record it is, and why.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], TenantContext | None, str, str]] = {
    "missing": ({}, {}, None, "MissingTenantError", "it has no tenant, and was not run"),
    "unreadable": (
        {HEADER: {"v": 99}},
        {},
        None,
        "HeaderError",
        "its message cannot be understood, and it was not run",
    ),
    "contradiction": (
        context_headers(A),
        {"organization_id": "tenant-b"},
        A,
        "TenantConflictError",
        "its message contradicts itself about the tenant, and it was not run",
    ),
}


@pytest.mark.parametrize("rig", ["prefork", "threads"], indirect=True)
@pytest.mark.parametrize("why", REFUSED)
def test_a_task_that_is_refused_has_a_record_a_line_of_nobody_and_no_hooks(rig: Rig, why: str) -> None:
    headers, kwargs, owner, error, reason = REFUSED[why]
    task_id, app, name = uuid(), rig.tasks.app, rig.tasks.success.name

    # As somebody else's Celery does it.
    celery.Celery.send_task(app, name, (SECRET,), kwargs, task_id=task_id, headers=headers)
    rig.until("its end", task_id, lambda seen: seen["task_postrun"] > 0)
    rig.settle()

    about = [line for line in rig.lines() if line["task_id"] == task_id]
    assert not [line for line in about if line["what"] == "body" or "hook" in line]
    (line,) = [each for each in rig.log() if each["task_id"] == task_id and each["task_outcome"]]
    assert (line["task_outcome"], line["level"]) == ("failure", "ERROR")
    assert (line["organization_id"], line["user_id"], line["label"]) == ("-", "-", "-")
    assert line["text"].startswith(f"Task {name}[{task_id}] failed: {error}: ")
    assert line["text"].endswith(f" (attempt 1: {reason})")
    assert SECRET not in json.dumps(line)
    row = app.backend.records.get(owner.organization_id if owner else "", task_id)
    assert row is not None
    assert (row["state"], row["error_type"], row["failure_reason"]) == ("failure", error, reason)
    assert all(rig.record(task_id, tenant) is None for tenant in (A, B) if tenant is not owner)


@ON_PREFORK
def test_a_task_that_the_worker_does_not_know_fails_for_its_tenant(rig: Rig) -> None:
    task_id, name = uuid(), "outcome_tasks.nowhere"

    rig.launch(A, lambda: rig.tasks.app.send_task(name, (SECRET,), task_id=task_id))
    rig.settle()

    record = rig.record(task_id, A)
    assert record is not None
    assert (record.state, record.error_type, record.failure_reason) == (
        "failure",
        "NotRegistered",
        "the worker has no such task",
    )
    assert rig.record(task_id, B) is None
    (line,) = [each for each in rig.log() if each["task_id"] == task_id]
    assert line["text"] == f"Task {name}[{task_id}] failed: NotRegistered (the worker has no such task)"
    assert (line["level"], line["organization_id"], line["task_name"]) == ("ERROR", A.organization_id, name)
    assert SECRET not in rig.worker.output


# --- in a chord --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rig", ["prefork"], indirect=True)
@pytest.mark.parametrize("ending", ["exception", "hard_limit", "lost", "terminated", "expired", "revoked"])
def test_a_chords_error_callbacks_and_hooks_run_once_for_the_tenant_that_launched_it(rig: Rig, ending: str) -> None:
    """Most of these endings are dealt with in the main process."""
    tasks, hooks = rig.tasks, {f"{whose} failure" for whose in ("own", "the application's", "the application's async")}
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
        rig.until("the body's hooks", body_id, lambda seen: hooks <= seen.keys())
    rig.settle()

    for body_id, tenant in bodies.items():
        organization, label = tenant.organization_id, f"label of {tenant.organization_id}"
        lines = [line for line in rig.lines() if line["task_id"] == body_id]
        calls = [(line["what"], line["org"], line["label"]) for line in lines]
        assert sorted(calls) == sorted((what, organization, label) for what in {"errback1", "errback3"} | hooks)
        told = {(line["error"], line["reason"], line["key"]) for line in lines if "hook" in line}
        assert told == {("ChordError", "a part of its chord failed, and it was not run", f"{body_id}:failure")}
        outcomes = [line["task_outcome"] for line in rig.log() if line["task_id"] == body_id and line["task_outcome"]]
        assert outcomes == ["failure"]
        record = rig.record(body_id, tenant)
        assert record is not None
        assert (record.state, record.error_type, record.organization_id) == ("failure", "ChordError", organization)
