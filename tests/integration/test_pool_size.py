"""Pools fit what a worker runs at once, and stay as they are where the application has sized them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from applications import application
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, TenantSessions, tenant_scope
from rhesis_tasks.testing import running_worker

if TYPE_CHECKING:
    from conftest import Notes


def test_the_pool_fits_as_many_tasks_as_run_at_once_unless_it_is_sized(notes: Notes) -> None:
    sessions = TenantSessions(notes.url)
    sessions.fit(12)
    assert (sessions.engine.pool.size(), sessions.engine.pool._max_overflow) == (12, 12)  # type: ignore[attr-defined]

    for option in ({"pool_size": 3}, {"max_overflow": 0}, {"poolclass": NullPool}):
        sized = TenantSessions(notes.url, **option)
        engine = sized.engine
        sized.fit(12)
        assert sized.engine is engine

    given = TenantSessions(sized.engine)
    given.fit(12)
    assert given.engine is sized.engine


@pytest.mark.parametrize("option", [{"poolclass": NullPool}, {"pool_size": 2, "max_overflow": 0}], ids=str)
def test_an_asynchronous_pool_of_another_size_stays_as_it_is(notes: Notes, option: dict[str, Any]) -> None:
    sessions = TenantSessions(notes.url, async_engine_options=option)
    sessions.fit(12)

    async def look() -> Any:
        async with sessions.async_begin(notes.acme) as db:
            assert await db.run_sync(notes.seen) == notes.of(notes.acme)
        found = sessions.async_engine().pool
        await sessions.async_dispose()
        return found

    pool = asyncio.run(look())
    if "poolclass" in option:
        assert isinstance(pool, NullPool)
    else:
        assert (pool.size(), pool._max_overflow) == (2, 0)


def test_as_many_tasks_as_a_worker_runs_at_once_each_get_two_sessions(postgres_url: str) -> None:
    """24 connections at once; SQLAlchemy's own pool has 15, and would say so after 5 seconds."""
    tenants = [TenantContext(f"tenant-{number}") for number in range(12)]
    with application(postgres_url, "fit_tasks") as (tasks, database):
        assert len(tenants) == tasks.AT_ONCE
        environment = {"DATABASE_URL": database.url}
        with running_worker(
            "fit_tasks", cwd=Path(__file__).parent, pool="threads", concurrency=tasks.AT_ONCE, env=environment
        ):
            results = []
            for tenant in tenants:
                with tenant_scope(tenant):
                    results.append(tasks.hold.delay())
            found = []
            for tenant, result in zip(tenants, results, strict=True):
                with tenant_scope(tenant):
                    found.append(result.get(timeout=40))

    assert found == [tenant.organization_id for tenant in tenants]
