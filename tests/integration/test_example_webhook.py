"""The webhook of the example application: a real worker posts how tasks have ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from celery import Celery

from rhesis_tasks import TenantContext, configure, tenant_scope, unconfigure
from rhesis_tasks.demo.example import example_folder
from rhesis_tasks.processes import wait_until
from rhesis_tasks.sessions import sessions_of
from rhesis_tasks.testing import TenantDatabase, running_worker

EXAMPLE = example_folder()
TIMEOUT = 30
A = TenantContext("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "ann")
B = TenantContext("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb", "bob")

# The example has no task that ends its process.
TASKS = """
import os, signal
from app.worker import celery_app as app
from rhesis_tasks import BaseTask

@app.task(base=BaseTask, name="lost")
def lost(text):
    os.kill(os.getpid(), signal.SIGKILL)
"""
SECRET = "two words"


class Receiver(ThreadingHTTPServer):
    """The other service; it keeps the headers and the text of what it gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str | None, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/told"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        cast(Receiver, self.server).received.append((self.headers["Idempotency-Key"], text))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test says what is missing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def launcher(url: str) -> Iterator[Celery]:
    """An application that launches the example's tasks by name."""
    app = Celery("launcher", set_as_current=False)
    configure(app, url)
    try:
        yield app
    finally:
        sessions_of(app).dispose()
        unconfigure(app)
        app.close()


def test_each_end_of_each_tenants_tasks_is_posted_once(
    tenant_database: TenantDatabase, receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "more_tasks.py").write_text(TASKS)
    env = {
        "DATABASE_URL": tenant_database.url,
        "NOTIFICATION_URL": receiver.url,
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    arguments = ["-I", "more_tasks", "-Q", "webhook"]
    endings = {
        "app.tasks.text.word_count": ("success", None, [SECRET]),
        "app.tasks.resilience.broken": ("failure", "ValueError is not listed in retry_on", []),
        "lost": ("failure", "the process that ran it was lost", [SECRET]),
    }
    expected: dict[str | None, dict[str, Any]] = {}
    with (
        launcher(tenant_database.url) as app,
        running_worker("app.worker", cwd=EXAMPLE, concurrency=1, env=env, arguments=arguments) as worker,
    ):
        for name, (state, reason, args) in endings.items():
            for tenant in (A, B):
                with tenant_scope(tenant):
                    task_id = app.send_task(name, args, queue="webhook").id
                expected[f"{task_id}:{state}"] = {
                    "task": name,
                    "task_id": task_id,
                    "organization_id": tenant.organization_id,
                    "user_id": tenant.user_id,
                    "state": state,
                    "reason": reason,
                }
        try:
            wait_until("six posts", lambda: len(receiver.received) >= len(expected), TIMEOUT)
        except TimeoutError as error:
            error.add_note(f"{receiver.received}\n{worker.output[-3000:]}")
            raise

    assert len(receiver.received) == len(expected)
    assert {key: json.loads(text) for key, text in receiver.received} == expected
