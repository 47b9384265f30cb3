"""The Celery application of the tests of schedules for each tenant: what runs, and when a worker dies over it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import after_task_publish

from rhesis_tasks import BaseTask, configure
from rhesis_tasks.beat import each_tenant

FOLDER = Path(os.environ["SCHEDULE_FOLDER"])
TENANTS_OF_DYING = 150
DIES_AFTER = 120  # launches

app = Celery("schedule_tasks")
configure(app)


def write(file: str, *what: Any) -> None:
    with (FOLDER / file).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(what) + "\n")


@app.task(base=BaseTask, bind=True)
def digest(self: BaseTask, what: str) -> None:
    write("runs", what, self.tenant.organization_id, self.tenant.user_id, self.request.id)


@app.task(base=BaseTask, bind=True)
def slow_for_acme(self: BaseTask) -> None:
    write("runs", "slow", self.tenant.organization_id, self.tenant.user_id, self.request.id)
    gate, deadline = FOLDER / "gate", time.monotonic() + 60
    while self.tenant.organization_id == "acme" and not gate.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def dying_tenants() -> Iterator[str]:
    yield from (f"org-{number:03}" for number in range(TENANTS_OF_DYING))


@after_task_publish.connect
def die_once(sender: str = "", body: Any = None, **_: Any) -> None:
    """The worker is killed between a launch and whatever it would write down about it."""
    if sender == digest.name and body[1].get("what") == "dying":
        write("launches", 1)
        if len((FOLDER / "launches").read_text().splitlines()) == DIES_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


match os.environ["SCHEDULE"]:
    case "two beats":
        organizations = "SELECT organization_id, user_id FROM organization ORDER BY organization_id"
        each_tenant(app, "digests", digest, schedule=1, tenants=organizations, args=("often",))
        each_tenant(app, "broken", digest, schedule=5, tenants="SELECT id FROM nowhere", args=("never",))
    case "slow":
        each_tenant(app, "slow", slow_for_acme, schedule=0.5, tenants=lambda: ["acme", "globex"])
    case "dying":
        each_tenant(app, "dying", digest, schedule=86_400, tenants=dying_tenants, kwargs={"what": "dying"})
