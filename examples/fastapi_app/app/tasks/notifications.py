"""Tell another service how each task has ended: a webhook, if NOTIFICATION_URL says where it is.

It may be told of the same outcome twice, when a worker is lost meanwhile, and with the same ``Idempotency-Key``.
"""

from __future__ import annotations

import json
import os
import urllib.request

from app.worker import celery_app
from rhesis_tasks.hooks import TaskOutcome, on_tenant_failure, on_tenant_success

__all__ = ["notify"]

TIMEOUT = 3.0  # seconds; a hook may take ten by default


@on_tenant_success(celery_app)
@on_tenant_failure(celery_app)
def notify(outcome: TaskOutcome) -> None:
    """Send what has ended, and how.  Arguments, results and the texts of errors stay here."""
    url = os.environ.get("NOTIFICATION_URL", "").strip()
    if not url or outcome.tenant is None:
        return
    body = {
        "task": outcome.name,
        "task_id": outcome.task_id,
        "organization_id": outcome.tenant.organization_id,
        "user_id": outcome.tenant.user_id,
        "state": outcome.state.value,
        "reason": outcome.reason,
    }
    request = urllib.request.Request(  # noqa: S310 - the operator says where
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": outcome.key},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT):  # noqa: S310 - an answer of 4xx or 5xx raises
        pass
