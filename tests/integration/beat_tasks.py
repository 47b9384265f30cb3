"""The Celery application of the test of beat: what a schedule can launch, and what it cannot."""

from __future__ import annotations

import json
import os

from celery import Celery

from rhesis_tasks import BaseTask, TenantContext, configure, context_headers, current_tenant, tenant_scope

app = Celery("beat_tasks")
configure(app)

app.conf.beat_schedule = {
    "across tenants": {"task": "beat_tasks.sweep", "schedule": 0.3},
    "for one tenant": {
        "task": "beat_tasks.digest",
        "schedule": 0.3,
        "args": ("by beat",),
        "options": {"headers": context_headers(TenantContext("acme", "the scheduler"))},
    },
    "for nobody": {"task": "beat_tasks.digest", "schedule": 0.3, "args": ("for nobody",)},
}


def note(what: str) -> None:
    tenant = current_tenant()
    with open(os.environ["BEAT_FILE"], "a", encoding="utf-8") as file:
        file.write(json.dumps([what, tenant and tenant.organization_id, tenant and tenant.user_id]) + "\n")


@app.task(base=BaseTask, system=True)
def sweep() -> None:
    note("sweep")
    for organization_id in ("acme", "globex"):
        with tenant_scope(TenantContext(organization_id)):
            digest.delay("by sweep")


@app.task(base=BaseTask)
def digest(what: str) -> None:
    note(what)
