"""A task that takes its time: it says how far it is, and stops when it is asked to."""

from __future__ import annotations

import time
from typing import Final

from app.worker import celery_app
from rhesis_tasks import BaseTask

__all__ = ["slow"]

SECONDS_OF_A_STEP: Final = 0.4


@celery_app.task(base=BaseTask, bind=True)
def slow(self: BaseTask, steps: int = 10) -> int:
    """Stands for long work in steps; how many of them were done.

    Report and ask as often as you like: the library writes and reads at most once a second.
    """
    done = 0
    while done < steps and not self.should_abort():
        time.sleep(SECONDS_OF_A_STEP)
        done += 1
        self.report_progress(done, steps, "steps")
    return done
