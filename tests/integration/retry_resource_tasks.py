"""The application of test_retry_resources.py, ``celery -A retry_resource_tasks``: tasks that others get in the way of.

Its data is on a server of its own, DATA_URL, so that the broker stays when that one goes.  ATTEMPTS is a folder: each
attempt leaves a file in it, and tasks that are to meet wait there for each other's.
"""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

from celery import Celery
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from rhesis_tasks import BaseTask, TenantSessions, configure, tenant_session
from rhesis_tasks.processes import wait_until
from rhesis_tasks.retry import DATABASE, HTTP
from rhesis_tasks.sessions import TenantSession

app = Celery("retry_resource_tasks")
configure(app, sessions=TenantSessions(os.environ["DATA_URL"]))

FOLDER = Path(os.environ["ATTEMPTS"])


class Counted(BaseTask):
    """A task whose attempts can be counted."""

    abstract = True
    retry_policy = DATABASE | HTTP

    def before_start(self, task_id: str, args: object, kwargs: object) -> None:
        """Leave a file."""
        super().before_start(task_id, args, kwargs)  # type: ignore[arg-type]
        (FOLDER / f"{task_id}.{self.request.retries}").touch()


def meet(place: str, number: int) -> None:
    """Wait until two have been here; whoever comes again goes on at once."""
    (FOLDER / f"{place}-{number}").touch()
    wait_until(f"the other at {place}", (FOLDER / f"{place}-{1 - number}").exists, 30)


# --- HTTP ------------------------------------------------------------------------------------------------------


@app.task(base=Counted)
def by_urllib(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - of this machine
        body: bytes = answer.read()
    return body.decode()


@app.task(base=Counted)
def by_requests(url: str) -> str:
    import requests

    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(url, timeout=10)
        answer.raise_for_status()
        return answer.text


@app.task(base=Counted)
async def by_aiohttp(url: str) -> str:
    import aiohttp

    async with aiohttp.ClientSession() as client, client.get(url, raise_for_status=True) as answer:
        return await answer.text()


# --- the database ----------------------------------------------------------------------------------------------

ADD = text("UPDATE account SET balance = balance + 1 WHERE id = :id")
SUM = text("SELECT sum(balance) FROM account")


@app.task(base=Counted)
@tenant_session
def add_to_both(db: Session, place: str, number: int) -> None:
    """In the opposite order of the other task's: a deadlock."""
    db.execute(ADD, {"id": number})
    meet(place, number)
    db.execute(ADD, {"id": 1 - number})


@app.task(base=Counted)
@tenant_session(isolation_level="REPEATABLE READ")
def add_to_one(db: Session, place: str, number: int) -> None:
    """What the other task changes in the meantime."""
    db.execute(SUM)
    meet(place, number)
    db.execute(ADD, {"id": 0})


@app.task(base=Counted)
@tenant_session(isolation_level="REPEATABLE READ")
async def add_to_one_async(db: AsyncSession, place: str, number: int) -> None:
    await db.execute(SUM)
    meet(place, number)
    await db.execute(ADD, {"id": 0})


@app.task(base=Counted)
@tenant_session(isolation_level="SERIALIZABLE")
def add_the_sum(db: TenantSession, place: str, number: int) -> None:
    """Right only if the other task's is added before or afterwards."""
    found = db.execute(SUM).scalar_one()
    meet(place, number)
    db.execute(
        text("INSERT INTO account (organization_id, id, balance) VALUES (:organization_id, :id, :balance)"),
        {"organization_id": db.tenant.organization_id, "id": 10 + number, "balance": found},
    )


@app.task(base=Counted)
@tenant_session(lock_timeout=0.1)
def add_unless_locked(db: Session) -> None:
    db.execute(ADD, {"id": 0})


@app.task(base=Counted, bind=True)
@tenant_session
def add_slowly(self: BaseTask, db: Session) -> None:
    """The first attempt takes longer than anybody waits."""
    db.execute(ADD, {"id": 0})
    if not self.request.retries:
        (FOLDER / f"{self.request.id}.added").touch()
        db.execute(text("SELECT pg_sleep(60)"))


@app.task(base=Counted)
@tenant_session
def break_a_rule(db: Session) -> None:
    """A second account of the same number: no waiting mends that."""
    db.execute(text("INSERT INTO account SELECT * FROM account"))
