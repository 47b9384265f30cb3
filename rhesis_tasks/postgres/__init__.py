"""PostgreSQL as Celery's broker and result backend.  Knows nothing of BaseTask.

Importing it teaches kombu the URL schemes ``postgresql://`` and ``postgres://``.
"""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES

TRANSPORT_ALIASES.update(
    dict.fromkeys(("postgresql", "postgres"), "rhesis_tasks.postgres.transport:Transport")  # imported on first use
)
