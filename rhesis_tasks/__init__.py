"""The tenant travels with the work: Celery tasks, FastAPI routes and SQLAlchemy sessions that cannot lose it."""

from .app import configure, unconfigure
from .batch import BatchOutcome, run_batch
from .context import TenantContext, current_tenant, require_tenant, tenant_scope
from .headers import context_headers
from .injection import tenant_session
from .launch import alaunch_with_context, launch_with_context
from .retry import RetryPolicy
from .sessions import TenantSessions
from .task import BaseTask
from .threads import ContextThreadPoolExecutor, wrap
from .variables import register_context_var

__version__ = "0.1.0"

__all__ = [
    # the Celery side
    "BaseTask",
    "configure",
    "unconfigure",
    "launch_with_context",
    "alaunch_with_context",
    "RetryPolicy",
    "run_batch",
    "BatchOutcome",
    # who we are working for
    "TenantContext",
    "current_tenant",
    "require_tenant",
    "tenant_scope",
    "register_context_var",
    "context_headers",
    "ContextThreadPoolExecutor",
    "wrap",
    # the database side
    "TenantSessions",
    "tenant_session",
]
