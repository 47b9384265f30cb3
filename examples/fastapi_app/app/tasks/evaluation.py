"""Evaluating a test set: every test in a task of its own, then one task that collects the report.

No task takes a tenant as an argument.  It travels with the message, the sessions carry it into the database,
and row-level security does the rest.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.models import Test, TestResult, TestRun
from app.rules import broken_rules
from app.worker import celery_app
from rhesis_tasks import BaseTask, tenant_session

__all__ = ["collect_run", "evaluate_test", "fail_run"]


@celery_app.task(base=BaseTask, bind=True)
@tenant_session
def evaluate_test(self: BaseTask, db: Session, run_id: str, test_id: str) -> bool:
    """Judge one answer and store the result; True if it passes.

    The decorator opens the session and commits when the function returns.  A task may run twice (its worker
    was killed after the commit, say), so the result is an upsert.
    """
    test = db.scalars(select(Test).where(Test.id == UUID(test_id))).one()
    reasons = broken_rules(
        test.response,
        must_contain=test.must_contain,
        must_not_contain=test.must_not_contain,
        max_words=test.max_words,
    )
    found = {"passed": not reasons, "reasons": reasons}
    key = {"organization_id": UUID(self.tenant.organization_id), "run_id": UUID(run_id), "test_id": test.id}
    result = insert(TestResult).values(**key, **found)
    db.execute(result.on_conflict_do_update(index_elements=list(key), set_=found))
    return not reasons


@celery_app.task(base=BaseTask, bind=True)
def collect_run(self: BaseTask, outcomes: list[bool], run_id: str) -> dict[str, Any]:
    """Write the report of a run, all of whose tests have been evaluated.

    With ``get_db_session()`` the task commits where it wants to: here in the middle, so that readers can see
    the run being collected.  The session sends the tenant again with its next transaction.
    """
    self.log.info("collecting %d results of run %s", len(outcomes), run_id)
    with self.get_db_session() as db:
        run = db.scalars(select(TestRun).where(TestRun.id == UUID(run_id))).one()
        run.state = "collecting"
        db.commit()

        run.report = report = _report(db, run)
        run.state = "finished"
        run.finished_at = func.now()
        db.commit()
    return {key: report[key] for key in ("total", "passed", "failed")}


@celery_app.task(base=BaseTask, bind=True)
@tenant_session
def fail_run(self: BaseTask, db: Session, run_id: str) -> None:
    """Close a run one of whose tasks has failed for good.  Which one, and why, their records tell."""
    self.log.warning("run %s has failed", run_id)
    run = db.scalars(select(TestRun).where(TestRun.id == UUID(run_id))).one()
    run.state = "failed"
    run.finished_at = func.now()


def _report(db: Session, run: TestRun) -> dict[str, Any]:
    """Read from the stored results, not from the messages: it may be written again at any time."""
    rows = db.execute(
        select(Test.id, Test.prompt, TestResult.passed, TestResult.reasons)
        .join(TestResult, TestResult.test_id == Test.id)
        .where(TestResult.run_id == run.id)
        .order_by(Test.id)
    ).all()
    failures = [
        {"test_id": str(row.id), "prompt": row.prompt, "reasons": row.reasons} for row in rows if not row.passed
    ]
    return {
        "total": len(rows),
        "passed": len(rows) - len(failures),
        "failed": len(failures),
        "failures": failures,
    }
