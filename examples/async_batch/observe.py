"""What can be seen of the tenants' runs from outside: what they stored, where their tasks are, what was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final, TypeAlias
from uuid import UUID

import httpx2 as httpx
from sqlalchemy import select

from async_batch.models import Evaluation, Prompt
from async_batch.worker import SETTINGS, celery_app
from rhesis_tasks import TenantContext, TenantSessions, tenant_scope
from rhesis_tasks.postgres.results import TaskRecord

__all__ = ["Moment", "Result", "Run", "Asked", "asked", "find_record", "moment", "results", "sessions"]

Asked: TypeAlias = dict[str, dict[str, dict[str, int]]]
"""By tenant and prompt: the provider's counts."""

sessions: Final = TenantSessions(SETTINGS.database_url)


@dataclasses.dataclass(slots=True)
class Run:
    """A tenant's run, and the tasks that were launched for it, one after the other."""

    tenant: TenantContext
    id: UUID
    tasks: list[str] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The tenant's."""
        return self.tenant.organization_id


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What is stored about a prompt."""

    prompt: str
    score: float | None
    error: str | None
    attempts: int


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """What had been done at some time, by tenant."""

    finished: dict[str, set[str]]  #: the prompts that had a result
    asked: Asked


def results(run: Run) -> list[Result]:
    """What the tenant sees of its run."""
    columns = (Prompt.text, Evaluation.score, Evaluation.error, Evaluation.attempts)
    of_run = select(*columns).join(Evaluation, Evaluation.prompt_id == Prompt.id).where(Evaluation.run_id == run.id)
    with sessions.begin(run.tenant, readonly=True) as db:
        return [Result(*row) for row in db.execute(of_run).tuples()]


def find_record(tenant: TenantContext, task_id: str) -> TaskRecord | None:
    """What a tenant sees of a task: None, unless it is the tenant's own."""
    backend: Any = celery_app.backend
    with tenant_scope(tenant):
        found: TaskRecord | None = backend.get_record(task_id)
    return found


def asked() -> Asked:
    """What the provider has counted."""
    counts: Asked = httpx.get(f"{SETTINGS.provider_url}/statistics", trust_env=False).raise_for_status().json()
    return counts


def moment(runs: Iterable[Run]) -> Moment:
    """What is done now."""
    # In this order: what is finished is not asked any more.
    finished = {run.name: {result.prompt for result in results(run)} for run in runs}
    return Moment(finished, asked())
