"""The tasks, by topic.  Workers import this package: a module not imported here does not exist for them."""

from __future__ import annotations

from app.tasks.evaluation import collect_run, evaluate_test, fail_run
from app.tasks.notifications import notify
from app.tasks.progress import slow
from app.tasks.resilience import broken, flaky
from app.tasks.text import word_count

__all__ = ["broken", "collect_run", "evaluate_test", "fail_run", "flaky", "notify", "slow", "word_count"]
