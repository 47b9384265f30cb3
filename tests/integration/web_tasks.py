"""The Celery application of a worker whose task launches another one, ``celery -A web_tasks``."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from rhesis_tasks import BaseTask, configure

NOTES = "WEB_TASKS_NOTES"  # the folder where tasks leave notes

app = Celery("web_tasks")
configure(app)


def note(name: str) -> None:
    """Leave a note, or count one more."""
    with Path(os.environ[NOTES], name).open("a") as file:
        file.write("x")


@app.task(base=BaseTask)
def launched() -> None:
    """Note each time that it is run."""
    note("launched")


@app.task(base=BaseTask)
def launching() -> None:
    """Launch the other one, wait for a note, and launch it once more."""
    launched.delay()
    launching_at_once.run()


@app.task(base=BaseTask)
def launching_at_once() -> None:
    """Wait for a note, and launch the other one."""
    note("began")
    while not Path(os.environ[NOTES], "go").exists():
        time.sleep(0.05)
    note("launches")
    launched.delay()
