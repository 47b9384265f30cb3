"""The tenant on OpenTelemetry's span of a running task.

Only attributes: spans, and the trace across a message, are made by ``opentelemetry-instrumentation-celery`` (extra
``otel``) or by whatever else traces the application.  OpenTelemetry is never imported from here: where nobody has
imported it, no span is open.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

from .context import current_tenant

__all__ = ["ORGANIZATION_ID", "PROJECT_ID", "USER_ID", "mark_current_span"]

# OpenTelemetry has no convention for tenants, so these are in a namespace of our own.
ORGANIZATION_ID: Final = "rhesis.organization_id"
PROJECT_ID: Final = "rhesis.project_id"
# The convention's name for who an operation is done for, which rules that remove personal data know.
USER_ID: Final = "enduser.id"

_log = logging.getLogger(__name__)


def mark_current_span() -> None:
    """Name the active tenant on the current span, if there are both; raises nothing."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return
    tenant = current_tenant()
    if tenant is None:
        return
    try:
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attribute(ORGANIZATION_ID, tenant.organization_id)
            if tenant.user_id is not None:
                span.set_attribute(USER_ID, tenant.user_id)
            if tenant.project_id is not None:
                span.set_attribute(PROJECT_ID, tenant.project_id)
    except Exception:  # another library's, and the task does not depend on it
        _log.debug("the tenant is not on the current span", exc_info=True)
