"""The one task: it evaluates what a run has no result of yet, and stores each result as it comes.

Where it is broken off does not matter.  Whoever runs it again for the same run, a worker to which the message came back
or a user who launches it anew, goes on from what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Final, NamedTuple, TypedDict
from uuid import UUID

from sqlalchemy import exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from async_batch.client import FAILURES, PATIENT, Provider
from async_batch.models import Evaluation, Prompt
from async_batch.worker import SETTINGS, celery_app
from rhesis_tasks import BaseTask, BatchOutcome

__all__ = ["LIMIT", "Summary", "evaluate_test_set"]

LIMIT: Final = 15
"""How many prompts of a run are at the provider, or wait for their next attempt, at the same time."""


class Summary(TypedDict):
    """Where a run is.  It counts the whole run, whichever task did the work."""

    prompts: int
    evaluated: int
    failed: int
    attempts: int  #: of those that have a result
    left: int  #: prompts without a result
    aborted: bool  #: whether somebody asked the task to stop early


class Item(NamedTuple):
    """A prompt that is to be evaluated."""

    id: UUID
    text: str


@celery_app.task(base=BaseTask, bind=True)
async def evaluate_test_set(self: BaseTask, run_id: str, test_set: str) -> Summary:
    """Evaluate the prompts of a test set of the tenant's.

    Args:
        run_id: a UUID of the launcher's choice.  With the same one again, what has a result is left alone.
        test_set: the name of the test set.
    """
    run = UUID(run_id)
    async with self.get_async_db_session() as db:  # closed before the long work: it holds no transaction
        left = await _without_result(db, run, test_set)
        finished = (await _results(db, run, test_set)).stored
    self.log.info("run %s: %d prompts have results, %d have none", run, finished, len(left))

    # A real application has the tenant's API key in a vault.
    async with Provider(SETTINGS.provider_url, api_key=self.tenant.organization_id, connections=LIMIT) as provider:

        async def evaluate(item: Item) -> float:
            return await provider.evaluate(item.text)

        outcomes = self.batch(evaluate, left, limit=LIMIT, retry_policy=PATIENT, start=finished)
        async with aclosing(outcomes), self.get_async_db_session() as db:
            async for outcome in outcomes:
                if not outcome.was_stopped:  # else it has no result: it is next launch's
                    await _store(db, run, outcome)

    async with self.get_async_db_session() as db:
        results = await _results(db, run, test_set)
    return Summary(
        prompts=results.prompts,
        evaluated=results.stored - results.failed,
        failed=results.failed,
        attempts=results.attempts,
        left=results.prompts - results.stored,
        aborted=await self.aborted(),
    )


async def _without_result(db: AsyncSession, run: UUID, test_set: str) -> Sequence[Item]:
    """No condition on the organization: row-level security has it."""
    has_result = exists().where(Evaluation.run_id == run, Evaluation.prompt_id == Prompt.id)
    rows = await db.execute(
        select(Prompt.id, Prompt.text).where(Prompt.test_set == test_set, ~has_result).order_by(Prompt.id)
    )
    return [Item(*row) for row in rows.tuples()]


async def _store(db: AsyncSession, run: UUID, outcome: BatchOutcome[Item, float]) -> None:
    """Store one result, for good: what is committed is not asked again.

    A commit takes a millisecond or two, an answer a hundred.  At thousands of results a second, collect some before
    each commit; what a killed worker has collected is lost.

    Raises:
        Exception: what the provider has nothing to do with.  It is a defect of ours, and no result of a prompt.
    """
    if outcome.error is not None and not isinstance(outcome.error, FAILURES):
        raise outcome.error
    values = {
        "run_id": run,
        "prompt_id": outcome.item.id,
        "score": outcome.result,
        "error": None if outcome.error is None else f"{type(outcome.error).__name__}: {outcome.error}",
        "attempts": outcome.attempts,
    }
    # Another task may work for the same run, if a worker was wrongly taken for dead.  The first result stays.
    await db.execute(insert(Evaluation).values(values).on_conflict_do_nothing())
    await db.commit()


class Results(NamedTuple):
    """What is stored of a run."""

    prompts: int
    stored: int
    failed: int
    attempts: int


async def _results(db: AsyncSession, run: UUID, test_set: str) -> Results:
    stored: Any = func.count(Evaluation.prompt_id)
    row = await db.execute(
        select(
            func.count(),
            stored,
            stored.filter(Evaluation.error.is_not(None)),
            func.coalesce(func.sum(Evaluation.attempts), 0),
        )
        .select_from(Prompt)
        .outerjoin(Evaluation, (Evaluation.prompt_id == Prompt.id) & (Evaluation.run_id == run))
        .where(Prompt.test_set == test_set)
    )
    return Results(*row.one().tuple())
