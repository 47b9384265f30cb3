"""What the demo claims, each claim tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from ..context import TenantContext
from ..sessions import TenantSessions
from ..settings import database_url
from .client import Account, Launched, Outcome
from .database import DemoDatabase

__all__ = ["Claim", "claims"]

Claim = tuple[str, bool]


def claims(
    accounts: list[Account], launched: list[Launched], outcomes: list[Outcome], database: DemoDatabase
) -> Iterator[Claim]:
    """Each claim, and whether it holds."""
    yield (
        "every run has its report, every other task succeeded",
        all(_as_meant(mine, outcome) for mine, outcome in zip(launched, outcomes, strict=True)),
    )
    yield (
        "every task is recorded under the organization that launched it",
        all(
            status["organization_id"] == outcome.user.organization_id and status["user_id"] == outcome.user.id
            for outcome in outcomes
            for status in outcome.statuses.values()
        ),
    )
    for account, other in ((0, 1), (1, 0)):
        yield (
            f"{accounts[account].user.id} gets 404 for what {accounts[other].user.id} launched, as for unknown ids",
            accounts[account].sees_nothing_of(launched[other]),
        )
    steps = [len(outcome.watched.progress) for outcome in outcomes]
    yield (
        f"both saw their slow task move ({steps[0]} and {steps[1]} times), and nothing of the other's",
        min(steps) > 0
        and all(outcome.watched.is_hidden for outcome in outcomes)
        and all(_is_done(outcome.statuses[mine.slow]) for mine, outcome in zip(launched, outcomes, strict=True)),
    )
    yield (
        "each one's list has all tasks of their organization, and no others",
        all(
            sorted(account.listed()) == sorted(mine.all_tasks) for account, mine in zip(accounts, launched, strict=True)
        ),
    )
    seen = _rows_without_tenant(database)
    visible = [_rows_of(database, outcome.user.organization_id) for outcome in outcomes]
    yield (
        f"a query without a tenant returns {seen} tests, with one {visible[0]} and {visible[1]}",
        seen == 0 and all(visible),
    )
    yield (
        "the flaky tasks succeeded after a retry",
        all(
            status["state"] == "success" and status["retries"] >= 1
            for status in (outcome.statuses[mine.flaky] for mine, outcome in zip(launched, outcomes, strict=True))
        ),
    )
    yield (
        "the broken tasks are stored failures with their tenant and reason",
        all(
            status["state"] == "failure"
            and status["organization_id"] == outcome.user.organization_id
            and bool(status["error"] and status["error"]["type"] and status["error"]["message"])
            for mine, outcome in zip(launched, outcomes, strict=True)
            for status in [outcome.statuses[mine.broken]]
        ),
    )


def _as_meant(launched: Launched, outcome: Outcome) -> bool:
    return all(outcome.statuses[task_id]["state"] == "success" for task_id in launched.tasks) and all(
        report["state"] == "finished" and report["done"] == report["total"] > 0 for report in outcome.reports
    )


def _is_done(status: dict[str, Any]) -> bool:
    """Whether the progress of a task that has ended is all of it."""
    return bool(status["progress"] and status["progress"]["done"] == status["progress"]["total"] == status["result"])


def _rows_without_tenant(database: DemoDatabase) -> int:
    engine = create_engine(database_url(database.application_url), poolclass=NullPool)
    with engine.connect() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM tests")) or 0)


def _rows_of(database: DemoDatabase, organization_id: str) -> int:
    sessions = TenantSessions(database.application_url, poolclass=NullPool)
    with sessions.begin(TenantContext(organization_id)) as db:
        return int(db.scalar(text("SELECT count(*) FROM tests")) or 0)
