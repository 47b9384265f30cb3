"""The application of the runbook, which test_runbook.py has its workers import as ``shop``."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from celery import Celery

from rhesis_tasks import BaseTask, configure

app = Celery("shop")
configure(app, broker_transport_options=json.loads(os.environ.get("SHOP_OPTIONS", "{}")))


@app.task(base=BaseTask, name="shop.add")
def add(first: int, second: int) -> int:
    return first + second


@app.task(base=BaseTask, name="shop.never_ends")
def never_ends() -> None:
    time.sleep(600)


@app.task(base=BaseTask, name="shop.poison")
def poison(mended: str) -> None:
    """Ends its worker, until there is a file of this name."""
    if not Path(mended).exists():
        os.kill(os.getpid(), signal.SIGKILL)
