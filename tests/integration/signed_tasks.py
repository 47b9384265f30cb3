"""The Celery application of test_forgeries.py, ``celery -A signed_tasks``; signed if SIGNING_KEY is set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery

from rhesis_tasks import BaseTask, configure, current_tenant

app = Celery("signed_tasks")
configure(app, signing_keys=list(filter(None, [os.environ.get("SIGNING_KEY")])) or ())


@app.task(shared=False, base=BaseTask, bind=True)
def note(self: BaseTask, *_: Any) -> str:
    return self.tenant.organization_id


@app.task(shared=False, base=BaseTask, bind=True)
def again(self: BaseTask) -> str:
    if not self.request.retries:
        raise self.retry(countdown=0)
    return self.tenant.organization_id


@app.task(shared=False, base=BaseTask, tenant_required=False)
def secret(*_: Any) -> None:
    """What nobody in these tests launches."""
    with Path(os.environ["SECRETS"]).open("a", encoding="utf-8") as file:
        file.write(f"{current_tenant()}\n")


@app.task(shared=False, base=BaseTask, tenant_required=False)
def fails(*_: Any) -> None:
    raise ValueError("as it is meant to")
