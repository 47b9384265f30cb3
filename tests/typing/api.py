"""The public API as a user's type checker sees it.  Checked by mypy and pyright, never run.

Lines marked ``type: ignore`` (mypy) and ``pyright: ignore`` must be errors: an ignore that is not needed is reported.
"""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from celery import Celery, chord, group
from celery.result import AsyncResult
from celery.schedules import crontab
from contextvars_extras import ContextVarsRegistry  # pyright: ignore[reportMissingTypeStubs]
from sqlalchemy import column, select
from sqlalchemy.orm import Mapped, Session

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    TenantContext,
    TenantSessions,
    alaunch_with_context,
    configure,
    current_tenant,
    launch_with_context,
    register_context_var,
    require_tenant,
    tenant_scope,
    tenant_session,
)
from rhesis_tasks.beat import each_tenant
from rhesis_tasks.ddl import DisableRLS, EnableRLS
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure, on_tenant_retry, on_tenant_success
from rhesis_tasks.models import TenantMixin, tenant_column
from rhesis_tasks.retry import DATABASE, HTTP, NO_RETRY, GiveUp, RetryLater, http_retry_after, retry_policy_named
from rhesis_tasks.rls import disable_rls_statements, enable_rls

app = Celery("typed")
configure(app, "postgresql://localhost/app", worker_concurrency=4)


@dataclasses.dataclass
class User:
    """Any class with these two attributes is a user."""

    id: UUID
    organization_id: int


user = User(UUID(int=1), 1)


# --- row-level security ----------------------------------------------------------------------------------------

assert_type(enable_rls("orders", role=["app", "web"], strict=True), str)
assert_type(disable_rls_statements("orders", index_columns=None), list[str])
enable_rls("orders")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
enable_rls("orders", role="app", tenant="acme")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
EnableRLS("orders", role="app", column_type="text")
DisableRLS("orders", role="app")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class Order(TenantMixin):
    """A model with the mixin's column."""


class TextOrder:
    """A model with a column of another type."""

    organization_id: Mapped[str] = tenant_column("text")


def organization(order: Order) -> UUID:
    """What a model's attribute is."""
    return order.organization_id


# --- context ---------------------------------------------------------------------------------------------------

assert_type(current_tenant(), TenantContext | None)
assert_type(require_tenant(), TenantContext)
assert_type(TenantContext(UUID(int=1), 7).organization_id, str)
TenantContext(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
TenantContext()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

with tenant_scope(user) as tenant:
    assert_type(tenant, TenantContext)
with tenant_scope(tenant) as same:
    assert_type(same, TenantContext)
tenant_scope("acme")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

register_context_var(ContextVar[str]("request_id"), dump=str, log=True)


# --- sessions --------------------------------------------------------------------------------------------------

sessions = TenantSessions("postgresql://localhost/app", pool_size=2)
with sessions.begin() as db:
    assert_type(db.tenant, TenantContext)
    plain: Session = db


@tenant_session
def count(db: Session, name: str, *, limit: int = 10) -> int:
    """The session is the first parameter: gone for the caller."""
    return limit


assert_type(count("x", limit=3), int)
count(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
count()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@tenant_session
def rename(self: BaseTask, db: Session, name: str) -> str:
    """As is the first one after self."""
    assert_type(self.tenant, TenantContext)
    return name


@tenant_session(param="session")
def named(name: str, session: Session) -> bytes:
    """With a name of its own, only the result's type is known."""
    return name.encode()


assert_type(named("x"), bytes)


@tenant_session  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
def late(self: BaseTask, name: str, db: Session) -> str:
    """Anywhere else it needs the parentheses."""
    return name


@tenant_session()
def late_in_parentheses(self: BaseTask, name: str, db: Session) -> str:
    """With them it may be anywhere, and no arguments are checked."""
    return name


late_in_parentheses(1, 2, 3)


async def asynchronous() -> None:
    """They are opened by ``async with`` only."""
    async with sessions.async_session() as db:
        assert_type(db.tenant, TenantContext)
    with sessions.async_session():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


# --- tasks -----------------------------------------------------------------------------------------------------


@app.task(base=BaseTask, bind=True, retry_policy=RetryPolicy(max_retries=5, retry_on=(OSError,)))
def work(self: BaseTask, number: int) -> int:
    """A bound task."""
    self.log.info("for %s", self.tenant.organization_id)
    with self.get_db_session() as session:
        session.commit()
    return number


class Special(BaseTask):
    """A base of the application's own."""

    tenant_required = False
    retry_policy = RetryPolicy(max_retries=0)


class ByTenant(BaseTask):
    """One whose retries depend on the tenant."""

    def retry_policy(self, tenant: TenantContext | None) -> RetryPolicy:
        """Which."""
        return DATABASE | HTTP if tenant else NO_RETRY


class Telling(BaseTask):
    """One with hooks, of either kind."""

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        """A plain one."""
        assert_type(outcome.key, str)
        assert_type(outcome.tenant, TenantContext | None)

    async def on_tenant_failure(self, outcome: TaskOutcome) -> None:
        """An asynchronous one."""
        assert_type(outcome.error, BaseException | None)

    @tenant_session
    def on_tenant_retry(self, db: Session, outcome: TaskOutcome) -> None:
        """One with a session."""


@on_tenant_success(app)
@on_tenant_retry(app, task="reports.*", error=OSError)
def tell(outcome: TaskOutcome) -> None:
    """Of an application."""


@on_tenant_failure(app, task="reports.*", error=(OSError, ValueError))
async def tell_later(outcome: TaskOutcome) -> None:
    """An asynchronous one of an application."""


@on_tenant_failure(app)
@tenant_session
def write(db: Session, outcome: TaskOutcome) -> None:
    """One with a session."""


def launching() -> None:
    """Launches give back Celery's result."""
    assert_type(launch_with_context(work, 1, current_user=user), AsyncResult[Any])
    assert_type(launch_with_context(work.s(1), context=TenantContext("acme")), AsyncResult[Any])
    launch_with_context(chord(group(work.s(1)), work.s()), options={"queue": "slow"})
    launch_with_context(work, 1, current_user="somebody")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    launch_with_context(work, 1, context=user)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def schedules() -> None:
    each_tenant(app, "a", work, schedule=60, tenants="SELECT id FROM organizations", args=(1,))
    each_tenant(app, "b", work.s(1), schedule=crontab(hour=2), tenants=lambda: [TenantContext("acme"), "globex"])
    each_tenant(app, "c", "work", schedule=timedelta(hours=1), tenants=select(column("id")), spread=60.0)
    each_tenant(app, "d", work, schedule="hourly", tenants=list)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def launching_async() -> None:
    """As does the asynchronous form."""
    assert_type(await alaunch_with_context(work, 1, current_user=user), AsyncResult[Any])


# --- settings --------------------------------------------------------------------------------------------------

assert_type(DATABASE | HTTP, RetryPolicy)
assert_type(HTTP.decide(OSError(), 0, elapsed=1.5), RetryLater | GiveUp)
assert_type(http_retry_after(OSError()), float | None)
assert_type(retry_policy_named("http"), RetryPolicy)
RetryPolicy(3, max_age=60, backoff="linear", jitter="none", when=lambda error: not error.args)
RetryPolicy(backoff="fast")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
RetryPolicy(3, 1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
RetryPolicy(max_retries="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Vars(ContextVarsRegistry):  # type: ignore[misc]
    """A registry of the application's own."""

    locale: str = "en"


register_context_var(Vars)
