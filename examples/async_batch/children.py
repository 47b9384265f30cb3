"""The processes of the example: the provider, and a Celery worker that can be killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import httpx2 as httpx

from rhesis_tasks.processes import Child, ChildFailedError, child, free_port, python, wait_until

__all__ = ["kill", "running_provider", "running_worker"]

FOLDER: Final = Path(__file__).resolve().parents[1]
"""From where this package is imported."""


@contextmanager
def running_provider(seed: int) -> Iterator[str]:
    """The provider; yields its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = python("-m", "uvicorn", "async_batch.provider:app", "--port", str(port), "--log-level", "critical")
    with child("the provider", command, env={"PROVIDER_SEED": str(seed)}, cwd=FOLDER) as provider:

        def answers() -> bool:
            if not provider.running:
                raise ChildFailedError(f"the provider ended:\n{provider.finished_output()}")
            try:
                return httpx.get(f"{url}/statistics", trust_env=False, timeout=5).is_success
            except httpx.TransportError:
                return False

        wait_until("the provider to answer", answers, interval=0.2)
        yield url


@contextmanager
def running_worker() -> Iterator[Child]:
    """A worker that is ready, with a process for each of two tasks."""
    command = python(
        *("-m", "celery", "-A", "async_batch.worker:celery_app", "worker", "--loglevel", "INFO", "--concurrency", "2"),
        *("--without-gossip", "--without-mingle"),
    )
    # A killed process leaves its temporary files.
    with TemporaryDirectory() as folder, child("the worker", command, env={"TMPDIR": folder}, cwd=FOLDER) as worker:
        try:
            worker.wait_for(" ready.")
            yield worker
        except BaseException:
            kill(worker)  # else it would finish its tasks first
            raise


def kill(worker: Child) -> None:
    """``kill -9`` a worker with all its processes, as the end of its container does."""
    with suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
