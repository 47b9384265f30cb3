"""The Celery application of test_hooks_on_workers.py, ``celery -A hook_tasks``.

Hooks write a line of JSON each to the file that TOLD names; tasks named ``held`` have a hook that holds on until the
file that RELEASE names is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task, signals
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from rhesis_tasks import BaseTask, configure, current_tenant, tenant_session
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure, on_tenant_success

app = Celery("hook_tasks")
configure(app)
run_by = ""  # hooks see the request of the task that has ended, whichever task runs them


@signals.task_prerun.connect
def begins(sender: Task[Any, Any], **_: Any) -> None:
    """For workers that run one task at a time."""
    global run_by
    run_by = sender.name


NOTES = text("SELECT body FROM note ORDER BY id")


def tell(how: str, outcome: TaskOutcome, notes: list[str]) -> None:
    """Write down who is told what, and which rows are seen."""
    tenant = current_tenant()
    line: dict[str, Any] = {
        "how": how,
        "key": outcome.key,
        "organization": tenant and tenant.organization_id,
        "told": outcome.tenant and outcome.tenant.organization_id,
        "error": outcome.error and type(outcome.error).__name__,
        "run_by": run_by,
        "request": outcome.task.request.id,
        "notes": notes,
        "pid": os.getpid(),
    }
    with Path(os.environ["TOLD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Watched(BaseTask):
    """With a hook that asks the task for a session."""

    abstract = True

    def on_tenant_success(self, outcome: TaskOutcome) -> None:
        with self.get_db_session() as db:
            tell("own", outcome, list(db.scalars(NOTES)))

    def on_tenant_failure(self, outcome: TaskOutcome) -> None:
        with self.get_db_session() as db:
            tell("own", outcome, list(db.scalars(NOTES)))


@on_tenant_success(app, task="*.look")
@tenant_session
def look_too(outcome: TaskOutcome, db: Session) -> None:
    tell("sync", outcome, list(db.scalars(NOTES)))


@on_tenant_success(app, task="*.look")
@tenant_session
async def look_meanwhile(outcome: TaskOutcome, db: AsyncSession) -> None:
    await asyncio.sleep(0.01)
    tell("async", outcome, list((await db.scalars(NOTES)).all()))


@app.task(base=Watched)
def look() -> None:
    """Succeeds."""
    time.sleep(0.01)


@app.task(base=Watched)
def lost() -> None:
    """Ends its process."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Watched, time_limit=0.3)
def too_long() -> None:
    """Is ended by its time limit."""
    time.sleep(60)


@app.task(base=BaseTask, hook_time_limit=60)
def held() -> None:
    """Ends its process; its hook takes its time."""
    os.kill(os.getpid(), signal.SIGKILL)


@on_tenant_failure(app, task="*.held")
def hold(outcome: TaskOutcome) -> None:
    tell("begun", outcome, [])
    while not Path(os.environ["RELEASE"]).exists():
        time.sleep(0.05)
    tell("done", outcome, [])
