"""The log of a real worker: whose work each line is about, in text and in JSON, and no arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from applications import application
from celery import chain

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.processes import wait_until
from rhesis_tasks.testing import running_worker

pytest.importorskip("structlog")

HERE = Path(__file__).parent
TIMEOUT = 30
SECRET = "the-secret-argument"
TENANTS = [TenantContext("tenant-a", "ann"), TenantContext("tenant-b", "bob")]
TEXT_FIELDS = ("level", "logger", "organization_id", "user_id", "task_id", "task_name", "root_id", "request_id", "text")

Line = dict[str, Any]


def text_line(line: str) -> Line | None:
    mark, _, rest = line.partition("LINE ")
    return None if mark or not rest else dict(zip(TEXT_FIELDS, rest.split("|", len(TEXT_FIELDS) - 1), strict=True))


def json_line(line: str) -> Line | None:
    if not line.startswith("{"):
        return None
    parsed = json.loads(line)
    return {**parsed, "text": parsed.get("message", parsed.get("event"))}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A task that was launched, and what its worker shall have written about it."""

    task: str
    tenant: TenantContext
    task_id: str
    root_id: str
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Log:
    """All that a worker has written, and what for."""

    output: str
    pool: str
    lines: list[Line]
    launches: list[Launch]


EXPECTED = {
    "speak": ("from the task", "from a task logger", "from another library", "printed", "a warning", "succeeded in"),
    "fail": (
        "failed in",
        "ValueError: it failed (attempt 1: ValueError is not listed in retry_on)",
    ),
    "fail_as_expected": ("KeyError: 'nothing' (attempt 1: ",),
    "retry": ("is tried again in", "ConnectionError: down (attempt 1 ", "started: attempt 2", "succeeded in"),
    "ignore": (" ignored",),
    "reject": ("failed in", "Reject: not here (attempt 1: it rejected its message)"),
}


@pytest.fixture(scope="module")
def tasks_and_url(postgres_url: str) -> Iterator[tuple[Any, str]]:
    """The tasks, and the URL of their database."""
    with application(postgres_url, "log_tasks") as (tasks, database):
        yield tasks, database.url


def launched(tasks: Any, tenant: TenantContext, pool: str, format: str) -> list[Launch]:
    """Everything once for a tenant."""
    tasks.request_id.set(f"request-of-{tenant.organization_id}")
    launches = []

    def note(name: str, task_id: str, root_id: str | None = None, texts: tuple[str, ...] = ()) -> None:
        launches.append(Launch(f"log_tasks.{name}", tenant, task_id, root_id or task_id, texts or EXPECTED[name]))

    with tenant_scope(tenant):
        for name in EXPECTED:
            note(name, getattr(tasks, name).delay(SECRET).id)
        second = chain(tasks.speak.s(SECRET, more=SECRET), tasks.follow.s(SECRET)).apply_async()
        note("follow", second.id, second.parent.id, ("from the next task", "succeeded in"))
        if format == "structlog":
            note("speak_structured", tasks.speak_structured.delay(SECRET).id, texts=("counted",))
        if pool == "prefork":
            hard = tasks.hang.apply_async((SECRET,), time_limit=1)
            note(
                "hang",
                hard.id,
                texts=(
                    "Hard time limit (1s) exceeded",
                    "(attempt 1: its time limit was reached)",
                ),
            )
            soft = tasks.hang.apply_async((SECRET,), soft_time_limit=1)
            note(
                "hang", soft.id, texts=("Soft time limit (1s) exceeded", "(attempt 1: its soft time limit was reached)")
            )
            note(
                "die",
                tasks.die.delay(SECRET).id,
                texts=("failed in", "WorkerLostError: ", "(attempt 1: the process that ran it was lost)"),
            )
    return launches


@pytest.fixture(scope="module", params=["text-prefork", "json-prefork", "json-threads", "structlog-threads"])
def log(request: pytest.FixtureRequest, tasks_and_url: tuple[Any, str]) -> Log:
    tasks, url = tasks_and_url
    format, pool = request.param.split("-")
    read = text_line if format == "text" else json_line

    def lines(output: str) -> list[Line]:
        return [line for line in map(read, output.splitlines()) if line is not None]

    env = {"DATABASE_URL": url, "LOG_TASKS_FORMAT": format}
    with running_worker("log_tasks", cwd=HERE, pool=pool, env=env) as worker:
        launches = [each for tenant in TENANTS for each in Context().run(launched, tasks, tenant, pool, format)]
        with suppress(TimeoutError):  # the tests tell what is missing
            wait_until("its lines", lambda: not any(missing(each, lines(worker.output)) for each in launches), TIMEOUT)
    return Log(worker.finished_output(), pool, lines(worker.finished_output()), launches)


def missing(launch: Launch, lines: list[Line]) -> list[str]:
    """What is not written about a task, on lines that name it by its fields."""
    texts = [line["text"] for line in lines if line["task_id"] == launch.task_id]
    return [expected for expected in launch.texts if not any(expected in text for text in texts)]


def test_each_line_about_a_running_task_has_all_fields(log: Log) -> None:
    for launch in log.launches:
        named = [line for line in log.lines if line["task_id"] == launch.task_id]

        assert not missing(launch, log.lines), f"{launch}\n{log.output}"
        for line in named:
            assert {
                name: line[name] for name in ("organization_id", "user_id", "task_name", "root_id", "request_id")
            } == {
                "organization_id": launch.tenant.organization_id,
                "user_id": launch.tenant.user_id,
                "task_name": launch.task,
                "root_id": launch.root_id,
                "request_id": f"request-of-{launch.tenant.organization_id}",
            }, line


def test_a_line_without_the_fields_is_about_what_does_not_run(log: Log) -> None:
    """Of the worker itself, or about a task that nobody has begun yet."""
    allowed: tuple[Callable[[str], bool], ...] = (
        lambda text: text.endswith(" received"),
        lambda text: text.startswith("Connected to ") or text.endswith(" ready."),
        lambda text: text.startswith("Process ") and " exited with " in text,
    )
    bare = [line["text"] for line in log.lines if line["organization_id"] == "-"]

    assert [text for text in bare if not any(allow(text) for allow in allowed)] == []
    assert any(text.endswith(" received") for text in bare)
    # Also of the one logger that Celery sets up apart.
    assert any(" exited with " in text for text in bare) == (log.pool == "prefork")


def test_no_arguments_are_logged(log: Log) -> None:
    assert SECRET not in log.output
