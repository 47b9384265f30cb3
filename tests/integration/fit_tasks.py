"""Tasks that hold two sessions each, all at once: ``celery -A fit_tasks``."""

from __future__ import annotations

import os
import threading

from celery import Celery
from sqlalchemy import text
from sqlalchemy.orm import Session

from rhesis_tasks import BaseTask, TenantSessions, configure, tenant_session

AT_ONCE = 12

app = Celery("fit_tasks")
configure(app, sessions=TenantSessions(os.environ["DATABASE_URL"], pool_timeout=5))
all_hold = threading.Barrier(AT_ONCE)


@app.task(base=BaseTask, bind=True)
@tenant_session
def hold(self: BaseTask, db: Session) -> str | None:
    """Returns the tenant, as the database has it, once all of the tasks hold their sessions."""
    db.execute(text("SELECT 1"))
    with tenant_session() as second:
        found: str | None = second.scalar(text("SELECT current_setting('app.current_organization')"))
        all_hold.wait(20)
    return found
