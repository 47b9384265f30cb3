"""The Celery application that the worker tests start: ``celery -A tenant_tasks``."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

from celery import Celery
from contextvars_extras import ContextVarsRegistry
from sqlalchemy import text
from sqlalchemy.orm import Session

from rhesis_tasks import (
    BaseTask,
    RetryPolicy,
    configure,
    current_tenant,
    launch_with_context,
    register_context_var,
    tenant_scope,
    tenant_session,
)

request_id: ContextVar[str] = ContextVar("request_id")
register_context_var(request_id, log=True)


class Vars(ContextVarsRegistry):
    """Variables that the application declares together."""

    locale: str = "en"


register_context_var(Vars)

app = Celery("tenant_tasks")
configure(app)

QUICK = RetryPolicy(max_retries=3, base=0.05, factor=1.0, retry_on=(ConnectionError,))


def seen(task: BaseTask) -> dict[str, Any]:
    """What the body of a task knows."""
    tenant = current_tenant()
    return {
        "organization": tenant and tenant.organization_id,
        "user": tenant and tenant.user_id,
        "project": tenant and tenant.project_id,
        "request_organization": task.request.organization_id,
        "request_user": task.request.user_id,
        "request_id": request_id.get(None),
        "locale": Vars().locale,
        "retries": task.request.retries,
    }


@app.task(base=BaseTask, bind=True)
def look(self: BaseTask, *_: Any) -> dict[str, Any]:
    self.log.info("looking around")
    return seen(self)


@app.task(base=BaseTask, bind=True)
def look_back(self: BaseTask, before: Any) -> dict[str, Any]:
    """A later part of a canvas: what it sees, and what the earlier parts saw."""
    return {"mine": seen(self), "before": before}


@app.task(base=BaseTask, bind=True, retry_policy=QUICK)
def flaky(self: BaseTask, failures: int) -> dict[str, Any]:
    if self.request.retries < failures:
        raise ConnectionError("down")
    return seen(self)


@app.task(base=BaseTask, bind=True, autoretry_for=(KeyError,), retry_kwargs={"max_retries": 2, "countdown": 0.05})
def flaky_the_celery_way(self: BaseTask) -> dict[str, Any]:
    if self.request.retries < 2:
        raise KeyError("down")
    return seen(self)


@app.task(base=BaseTask, bind=True)
def broken(self: BaseTask) -> None:
    raise ValueError(f"broken for {self.tenant.organization_id}")


@app.task(base=BaseTask, bind=True)
def nested(self: BaseTask) -> str:
    """Launches another task; its id is returned, since a task must not wait for another."""
    return str(look.delay().id)


@app.task(base=BaseTask, bind=True)
def act_for(self: BaseTask, others: list[str]) -> list[Any]:
    """Acts for several tenants, one after the other."""
    from rhesis_tasks import TenantContext

    found = []
    for other in others:
        with tenant_scope(TenantContext(other)):
            found.append(current_tenant().organization_id)  # type: ignore[union-attr]
    return [found, self.tenant.organization_id]


@app.task(base=BaseTask, bind=True)
def leak(self: BaseTask, value: str) -> None:
    """Sets variables and never resets them."""
    request_id.set(value)
    Vars().locale = value
    tenant_scope(type("User", (), {"id": "intruder", "organization_id": "intruder"})).__enter__()


@app.task(bind=True)
def plain(self: Any) -> Any:
    """Not based on BaseTask: carries the context, insists on nothing."""
    tenant = current_tenant()
    return [tenant and tenant.organization_id, request_id.get(None)]


@app.task(base=BaseTask, bind=True)
@tenant_session
def add_note(self: BaseTask, db: Session, body: str, fail: bool = False) -> int:
    db.execute(
        text("INSERT INTO note (organization_id, body) VALUES (:organization_id, :body)"),
        {"organization_id": self.tenant.organization_id, "body": body},
    )
    if fail:
        raise ValueError("after the insert")
    return int(db.scalar(text("SELECT count(*) FROM note")) or 0)


@app.task(base=BaseTask, bind=True)
def add_notes_by_hand(self: BaseTask, bodies: list[str]) -> list[int]:
    """A commit after each, in one session."""
    counts = []
    with self.get_db_session() as db:
        for body in bodies:
            db.execute(
                text("INSERT INTO note (organization_id, body) VALUES (:organization_id, :body)"),
                {"organization_id": self.tenant.organization_id, "body": body},
            )
            db.commit()
            counts.append(int(db.scalar(text("SELECT count(*) FROM note")) or 0))
    return counts


@app.task(base=BaseTask, bind=True)
def hang(self: BaseTask) -> None:
    """Waits for ever."""
    threading.Event().wait()


@app.task(base=BaseTask, bind=True)
def relaunch_as(self: BaseTask, organization: str) -> str:
    """Tries to launch for another tenant, and tells how that ended."""
    user = type("User", (), {"id": "u", "organization_id": organization})
    try:
        launch_with_context(look, current_user=user)
    except Exception as error:
        return type(error).__name__
    return "launched"
