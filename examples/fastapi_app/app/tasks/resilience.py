"""What happens when a task fails: one that recovers, and one that never does."""

from __future__ import annotations

from typing import NoReturn

from app.worker import celery_app
from rhesis_tasks import BaseTask, RetryPolicy

__all__ = ["broken", "flaky"]

IMPATIENT = RetryPolicy(max_retries=3, base=0.2, factor=2.0, cap=1.0, retry_on=(ConnectionError,))


@celery_app.task(base=BaseTask, bind=True, retry_policy=IMPATIENT)
def flaky(self: BaseTask) -> str:
    """Stands for a call to a service that is down at first: the first attempt fails, a retry succeeds."""
    if self.request.retries == 0:
        raise ConnectionError("the service does not answer")
    return f"succeeded after {self.request.retries} retries"


@celery_app.task(base=BaseTask, bind=True)
def broken(self: BaseTask) -> NoReturn:
    """Fails for good: a ValueError would come again, so it is not retried and its record keeps the reason."""
    self.log.info("about to fail")
    raise ValueError("this task always fails")
