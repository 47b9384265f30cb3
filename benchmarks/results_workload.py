"""The Celery applications that ``results.py`` compares, for its workers and for those who launch.

The environment variable BENCHMARK holds JSON: which of them (``maker``, of ``results.MAKERS``), the database's ``url``
and the ``queue``.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Final

from celery import Celery

import rhesis_tasks  # also teaches kombu the broker's scheme, which is all that Celery's applications have of it
from rhesis_tasks.settings import database_url

__all__ = ["TENANT", "app", "empty", "end", "make", "total"]

TENANT: Final = rhesis_tasks.TenantContext(
    "0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c11", "0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c12"
)


def make(maker: str, url: str, queue: str) -> Celery:
    """The application; with Celery's default settings, but for what rhesis-tasks sets by itself."""
    app = Celery("results", broker=url, set_as_current=False)
    app.conf.update(task_default_queue=queue, broker_connection_retry_on_startup=True)
    if maker == "ours":
        rhesis_tasks.configure(app, url)
    elif maker == "ours-bare":
        rhesis_tasks.configure(app, broker_url=url)
    elif maker.startswith("celery"):
        app.conf.result_backend = "db+" + database_url(url).render_as_string(hide_password=False)
        if maker == "celery-same":
            app.conf.update(task_acks_late=True, task_track_started=True)
    return app


_settings = json.loads(os.environ["BENCHMARK"])
_options: dict[str, Any] = {"base": rhesis_tasks.BaseTask} if _settings["maker"].startswith("ours") else {}
app: Final = make(**_settings)


@app.task(name="empty", **_options)
def empty() -> None:
    """Do nothing."""


@app.task(name="end", **_options)
def end(seconds: float) -> float:
    """Take so long, and say when it ended."""
    if seconds:
        time.sleep(seconds)
    return time.time()


@app.task(name="total", **_options)
def total(results: list[None]) -> int:
    """How many parts a chord had."""
    return len(results)
