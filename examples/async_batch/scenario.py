"""What happens: two tenants launch the task at once, it is disturbed in the middle, and goes on.

Imports the application, so DATABASE_URL and PROVIDER_URL must be set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from async_batch.checks import Check, checks, checks_after_abort, checks_after_kill, checks_undisturbed
from async_batch.children import kill, running_worker
from async_batch.database import TENANTS, TEST_SET, Database
from async_batch.observe import Moment, Run, asked, find_record, moment, results
from async_batch.tasks import evaluate_test_set
from async_batch.worker import celery_app
from rhesis_tasks import launch_with_context, tenant_scope
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.processes import Child, ChildFailedError
from rhesis_tasks.states import TERMINAL, State

__all__ = ["play"]

TIMEOUT: Final = 120.0
"""Seconds within which whatever is waited for must happen."""


def play(disturbance: str, prompts: int, seed: int, database: Database, console: Console) -> bool:
    """Play it.

    Args:
        disturbance: what happens in the middle: "kill" (the worker), "abort" (a task) or "nothing".
        prompts: how many each tenant has.
        seed: the provider's.
        database: where it is played.
        console: where to tell of it.

    Returns:
        Whether all checks hold.

    Raises:
        ChildFailedError: a worker has ended by itself, or a task has failed.
        TimeoutError: something did not happen in time.
    """
    runs = [Run(tenant, uuid4()) for tenant in TENANTS]
    with ExitStack() as stack:
        console.print("Starting a worker ...")
        stage = Stage(runs, prompts, stack.enter_context(running_worker()), console)
        console.print(f"Launching one task each for {' and '.join(run.name for run in runs)} ...")
        for run in runs:
            _launch(run)
        with stage:
            if disturbance == "kill":
                special = _kill(stage, stack)
            elif disturbance == "abort":
                special = _abort(stage)
            else:
                special = checks_undisturbed()
            stage.wait("the tasks to end", lambda: all(_has_ended(run) for run in runs))
        console.print(_table(runs))
        return _tell([*checks(runs, prompts, seed, database), *special], console)


def _launch(run: Run) -> None:
    result = launch_with_context(evaluate_test_set, str(run.id), TEST_SET, context=run.tenant)
    run.tasks.append(result.id)


def _kill(stage: Stage, stack: ExitStack) -> Iterable[Check]:
    stage.wait("a third of the results", stage.is_in_the_middle)
    kill(stage.worker)
    killed = moment(stage.runs)
    stage.console.print(f"kill -9 of the worker, with {_counted(killed)}.")
    stage.console.print("Starting another, which gets the tasks once the first one is missed ...")
    stage.worker = stack.enter_context(running_worker())
    return checks_after_kill(killed)


def _abort(stage: Stage) -> Iterable[Check]:
    run = stage.runs[0]
    stage.wait("a third of the results", stage.is_in_the_middle)
    backend: Any = celery_app.backend
    with tenant_scope(run.tenant):
        backend.request_abort(run.tasks[-1])
    stage.wait("the task to stop early", lambda: _has_ended(run))
    stopped = moment(stage.runs)
    summary = _record(run, run.tasks[-1]).result
    stage.console.print(
        f"Asked to stop early, the task of {run.name} ended with {len(stopped.finished[run.name])} results."
    )
    stage.console.print("Launching it again ...")
    _launch(run)
    return checks_after_abort(summary, stopped)


def _has_ended(run: Run) -> bool:
    return _record(run, run.tasks[-1]).state is State.SUCCESS


def _record(run: Run, task_id: str) -> TaskRecord:
    record = find_record(run.tenant, task_id)
    assert record is not None, "there is one from the launch on"
    return record


class Stage:
    """Shows how far the tasks are, by their records, while something is waited for.

    Args:
        runs: whose tasks.
        prompts: how many each tenant has.
        worker: the one that does the work.
        console: where it is shown.
    """

    def __init__(self, runs: Sequence[Run], prompts: int, worker: Child, console: Console) -> None:
        self.runs = runs
        self.worker = worker
        self.console = console
        self._prompts = prompts
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._bars = [self._progress.add_task(run.name, total=prompts) for run in runs]

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def is_in_the_middle(self) -> bool:
        """Whether each tenant has a third of its results."""
        return all(len(results(run)) * 3 >= self._prompts for run in self.runs)

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds.

        Raises:
            ChildFailedError: the worker has ended, or a task has failed.
            TimeoutError: the condition does not hold in time.
        """
        deadline = time.monotonic() + TIMEOUT
        while True:
            holds = condition()
            self._show()
            if holds:
                return
            if not self.worker.running:
                raise ChildFailedError(f"the worker has ended:\n{self.worker.finished_output()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {TIMEOUT:g} seconds for {what}:\n{self.worker.output}")
            time.sleep(0.2)

    def _show(self) -> None:
        for run, bar in zip(self.runs, self._bars, strict=True):
            record = _record(run, run.tasks[-1])
            if record.state in TERMINAL and record.state is not State.SUCCESS:
                raise ChildFailedError(f"the task of {run.name} ended as {record.state.value}: {record.error_message}")
            if record.progress_done is not None:  # else nobody has begun
                self._progress.update(bar, completed=record.progress_done)


def _counted(then: Moment) -> str:
    return " and ".join(f"{len(prompts)} results of {tenant}" for tenant, prompts in then.finished.items())


def _table(runs: Iterable[Run]) -> Table:
    table = Table("tenant", "prompts", "evaluated", "failed", "attempts", "429s", "seconds")
    counts = asked()
    for run in runs:
        first, last = _record(run, run.tasks[0]), _record(run, run.tasks[-1])
        assert last.finished_at is not None, "it has ended"
        summary = last.result
        table.add_row(
            run.name,
            *(str(summary[key]) for key in ("prompts", "evaluated", "failed", "attempts")),
            str(sum(count["limited"] for count in counts[run.name].values())),
            f"{(last.finished_at - first.launched_at).total_seconds():.1f}",
        )
    return table


def _tell(tried: Iterable[Check], console: Console) -> bool:
    succeeded = True
    for claim, holds in tried:
        console.print(f"[green]yes[/]  {escape(claim)}" if holds else f"[red]NO[/]   {escape(claim)}")
        succeeded &= holds
    return succeeded
