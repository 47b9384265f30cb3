"""What the example claims, each claim tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from sqlalchemy import create_engine, func, select
from sqlalchemy.pool import NullPool

from async_batch.client import PATIENT
from async_batch.database import Database
from async_batch.models import Evaluation
from async_batch.observe import Asked, Moment, Result, Run, asked, find_record, results, sessions
from async_batch.provider import fate
from async_batch.tasks import Summary
from rhesis_tasks.settings import database_url

__all__ = ["Check", "checks", "checks_after_abort", "checks_after_kill", "checks_undisturbed"]

Check: TypeAlias = tuple[str, bool]


def checks(runs: Sequence[Run], prompts: int, seed: int, database: Database) -> Iterator[Check]:
    """Try what holds however a run goes.

    Args:
        runs: the tenants', all of whose tasks have ended.
        prompts: how many each tenant has.
        seed: the provider's.
        database: where the results are.
    """
    yield "each prompt of each tenant has a result, stored once", _is_stored_once(runs, prompts, database)
    yield (
        "each result is the provider's answer to this tenant, or why there was none",
        all(_is_right(run, result, seed) for run in runs for result in results(run)),
    )
    yield "no tenant sees a result or a task of another", not any(_sees_others(run, runs) for run in runs)


def checks_after_kill(killed: Moment) -> Iterator[Check]:
    """Try what holds if a worker was killed."""
    counts = asked()
    yield _is_not_asked_again(killed, counts)
    twice = _answered_twice(counts)
    yield (
        f"the {len(twice)} prompts answered twice had no result when the worker was killed",
        not any(prompt in killed.finished[tenant] for tenant, prompt in twice),
    )


def checks_after_abort(summary: Summary, stopped: Moment) -> Iterator[Check]:
    """Try what holds if a task was asked to stop early.

    Args:
        summary: what that task has returned.
        stopped: what was done then.
    """
    yield "the task that was asked to stop early did so, and said so", summary["aborted"] and summary["left"] > 0
    yield _is_not_asked_again(stopped, asked())
    yield from checks_undisturbed()


def checks_undisturbed() -> Iterator[Check]:
    """Try what holds if no worker was killed."""
    yield "no prompt was answered twice", not _answered_twice(asked())


def _is_stored_once(runs: Sequence[Run], prompts: int, database: Database) -> bool:
    """By a superuser, who sees every row."""
    engine = create_engine(database_url(database.superuser_url), poolclass=NullPool)
    by_tenant = select(Evaluation.organization_id, func.count(), func.count(Evaluation.prompt_id.distinct())).group_by(
        Evaluation.organization_id
    )
    with engine.connect() as connection:
        stored = {tenant: counts for tenant, *counts in connection.execute(by_tenant)}
    return stored == {run.name: [prompts, prompts] for run in runs}


def _is_right(run: Run, result: Result, seed: int) -> bool:
    expected = fate(run.name, result.prompt, str(seed))
    if expected.failures < math.inf:
        return (result.score, result.error) == (expected.score, None)
    return result.score is None and bool(result.error) and result.attempts == PATIENT.max_retries + 1


def _sees_others(run: Run, runs: Sequence[Run]) -> bool:
    with sessions.begin(run.tenant, readonly=True) as db:
        owners = db.scalars(select(Evaluation.organization_id).distinct()).all()  # of all rows that there are for it
    others = [task_id for other in runs if other is not run for task_id in other.tasks]
    return owners != [run.name] or any(find_record(run.tenant, task_id) for task_id in others)


def _is_not_asked_again(before: Moment, counts: Asked) -> Check:
    finished = [(tenant, prompt) for tenant, prompts in before.finished.items() for prompt in prompts]
    return (
        f"the {len(finished)} prompts that had a result in the middle were not asked again",
        bool(finished) and all(counts[tenant][each] == before.asked[tenant][each] for tenant, each in finished),
    )


def _answered_twice(counts: Asked) -> list[tuple[str, str]]:
    return [(tenant, prompt) for tenant in counts for prompt, count in counts[tenant].items() if count["answered"] > 1]
