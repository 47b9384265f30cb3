"""Test sets and their runs.

No query here names the organization: ``get_tenant`` makes the caller's tenant active, and row-level security
hides everybody else's rows.  A foreign id is therefore simply a 404, like one that does not exist.
Routes that use a session, which blocks, are plain ``def``: FastAPI runs them in threads.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from celery import chord, group
from celery.result import GroupResult
from fastapi import APIRouter, Depends, HTTPException
from pydantic import BaseModel
from sqlalchemy import func, select

from app.auth import CurrentUser, get_tenant
from app.database import sessions
from app.models import RunState, Test, TestResult, TestRun, TestSet
from app.tasks import collect_run, evaluate_test, fail_run
from rhesis_tasks import launch_with_context

__all__ = ["router"]

router = APIRouter(tags=["runs"], dependencies=[Depends(get_tenant)])


class TestSetSummary(BaseModel):
    """A test set in a list."""

    id: UUID
    name: str
    tests: int


class RunStarted(BaseModel):
    """A run is on its way: ``task_id`` collects the report, the parts evaluate one test each."""

    run_id: UUID
    task_id: str
    part_task_ids: list[str]


class RunStatus(BaseModel):
    """How far a run is."""

    id: UUID
    test_set_id: UUID
    state: RunState
    total: int
    done: int
    passed: int
    failed: int
    report: dict[str, Any] | None
    created_at: datetime
    finished_at: datetime | None


@router.get("/test-sets")
def list_test_sets() -> list[TestSetSummary]:
    """The caller's test sets."""
    with sessions.begin() as db:
        rows = db.execute(
            select(TestSet.id, TestSet.name, func.count(Test.id))
            .outerjoin(Test, Test.test_set_id == TestSet.id)
            .group_by(TestSet.id, TestSet.name)
            .order_by(TestSet.name, TestSet.id)
        )
        return [TestSetSummary(id=id_, name=name, tests=tests) for id_, name, tests in rows]


@router.post("/test-sets/{test_set_id}/runs", status_code=202)
def start_run(test_set_id: UUID, user: CurrentUser) -> RunStarted:
    """Evaluate all tests of a set in parallel."""
    run_id = uuid4()
    with sessions.begin() as db:
        if db.scalar(select(TestSet.id).where(TestSet.id == test_set_id)) is None:
            raise HTTPException(404, "there is no such test set")
        test_ids = db.scalars(select(Test.id).where(Test.test_set_id == test_set_id).order_by(Test.id)).all()
        if not test_ids:
            raise HTTPException(409, "this test set has no tests, so there is nothing to run")
        db.add(
            TestRun(
                organization_id=UUID(user.organization_id),
                id=run_id,
                test_set_id=test_set_id,
                requested_by=user.id,
                total=len(test_ids),
            )
        )
    # Only now that the run is committed are its tasks launched: a worker can be faster than a commit, and
    # would look for a run that is not there yet.
    canvas = chord(
        group(evaluate_test.s(str(run_id), str(test_id)) for test_id in test_ids),
        collect_run.s(str(run_id)).on_error(fail_run.si(str(run_id))),
    )
    result = launch_with_context(canvas, current_user=user)
    parts = result.parent  # the result of a chord is that of its body; the body's parent is the group
    assert isinstance(parts, GroupResult)
    part_task_ids = [part.id for part in parts.results or ()]
    return RunStarted(run_id=run_id, task_id=result.id, part_task_ids=part_task_ids)


@router.get("/runs/{run_id}")
def read_run(run_id: UUID) -> RunStatus:
    """How far a run is, and its report when it has finished."""
    with sessions.begin() as db:
        run = db.scalars(select(TestRun).where(TestRun.id == run_id)).one_or_none()
        if run is None:
            raise HTTPException(404, "there is no such run")
        done, passed = db.execute(
            select(func.count(), func.count().filter(TestResult.passed)).where(TestResult.run_id == run_id)
        ).one()
        return RunStatus(
            id=run.id,
            test_set_id=run.test_set_id,
            state=run.state,
            total=run.total,
            done=done,
            passed=passed,
            failed=done - passed,
            report=run.report,
            created_at=run.created_at,
            finished_at=run.finished_at,
        )
