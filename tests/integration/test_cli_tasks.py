"""``rhesis-tasks tasks``: what an operator sees of a tenant's tasks, and cancels."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from applications import application
from celery import chain
from commands import Ran, ran
from sqlalchemy import make_url, text

from rhesis_tasks import TenantContext, launch_with_context, tenant_scope
from rhesis_tasks.processes import Child, child, python, wait_until
from rhesis_tasks.settings import quote_identifier
from rhesis_tasks.status import cancel_task
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
MAIN = "from rhesis_tasks.cli import main; main()"
A = TenantContext("tenant-a", "ann")


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    """The tasks, and their database."""
    with application(postgres_url, "cli_tasks") as (tasks, database):
        yield tasks, database


@pytest.fixture
def tasks(tasks_and_database: tuple[Any, TenantDatabase]) -> Any:
    return tasks_and_database[0]


@pytest.fixture(scope="module")
def worker(tasks_and_database: tuple[Any, TenantDatabase]) -> Iterator[Child]:
    env = {"DATABASE_URL": tasks_and_database[1].url}
    with running_worker("cli_tasks", cwd=HERE, pool="threads", env=env) as worker:
        yield worker


@pytest.fixture
def command(tasks: Any) -> Any:
    """Runs ``rhesis-tasks tasks ...``."""

    def run(name: str, *arguments: str, app: str = "cli_tasks", organization: str = "tenant-a") -> Ran:
        return ran("tasks", name, "-A", app, "--organization", organization, *arguments)

    return run


def test_a_task_that_waits_is_shown_listed_and_cancelled(tasks: Any, command: Any) -> None:
    task_id = launch_with_context(tasks.add, 1, 2, context=A, options={"countdown": 3600}).id

    shown, listed = command("show", task_id), command("list", "--state", "delayed", "--name", "cli_tasks.add")
    cancelled = command("cancel", task_id, "--user", "olga")
    again = command("cancel", task_id)
    after = command("show", task_id)

    assert (shown.code, shown.value("state"), shown.value("user")) == (0, "delayed", "ann")
    assert shown.value("not before") is not None
    assert [line.split()[2] for line in listed.lines] == [task_id]
    assert (cancelled.code, cancelled.output) == (0, f"{task_id}: cancelled\n")
    assert (again.code, again.output) == (0, f"{task_id}: ended\n")
    assert (after.value("state"), after.value("cancelled by")) == ("revoked", "olga")


@pytest.mark.usefixtures("worker")
def test_a_run_is_followed_to_its_end_and_shown_as_a_tree(tasks: Any, command: Any) -> None:
    result = launch_with_context(chain(tasks.add.s(1, 2), tasks.counts.s()), context=A)
    followed = command("show", result.id, "--follow")
    failed = launch_with_context(tasks.fails, context=A)
    failure = command("show", failed.id, "--follow")
    tree = command("tree", result.id)

    assert followed.code == 0, followed.errors
    assert (followed.value("state"), followed.value("result")) == ("success", "3")
    assert followed.value("progress") == "3 of 3"
    assert failure.code == 1
    assert failure.value("error") == "ValueError: broken"
    assert [line.split()[-1] for line in tree.lines] == ["cli_tasks.add", "cli_tasks.counts"]
    assert tree.lines[1].startswith("  ")


@pytest.mark.usefixtures("worker")
def test_a_running_task_is_asked_to_stop(tasks: Any, command: Any) -> None:
    task_id = launch_with_context(tasks.runs_until_asked, context=A).id

    def state() -> str:
        with tenant_scope(A):
            return str(tasks.app.backend.get_record(task_id).state)

    wait_until("the task to start", lambda: state() == "started", TIMEOUT)
    asked = command("cancel", task_id)
    wait_until("the task to stop", lambda: state() == "success", TIMEOUT)

    assert asked.output == f"{task_id}: asked\n"


@pytest.mark.parametrize("name", ["show", "tree", "cancel"])
@pytest.mark.parametrize("organization", ["tenant-b", "tenant-a"])
def test_a_foreign_and_an_unknown_task_are_the_same(tasks: Any, command: Any, name: str, organization: str) -> None:
    task_id = launch_with_context(tasks.add, 1, 2, context=A).id if organization == "tenant-b" else "unknown"

    ran = command(name, task_id, organization=organization)

    assert ran.code == 1
    assert ran.output == ""
    assert ran.errors == f"Error: organization {organization} has no task {task_id}\n"


def test_wrong_input_says_what_is_wrong(command: Any) -> None:
    no_app = command("show", "x", app="no_such_module")
    no_state = command("list", "--state", "lost")
    no_organization = command("show", "x", organization=" ")

    assert (no_app.code, no_app.errors.splitlines()[0]) == (
        1,
        "Error: there is no Celery application 'no_such_module': No module named 'no_such_module'",
    )
    assert no_state.code == 2
    assert "one of delayed, queued, started" in no_state.errors
    assert no_organization.code == 1
    assert "organization_id must not be empty" in no_organization.errors


def test_a_database_that_is_not_there_is_named_in_a_line() -> None:
    done = subprocess.run(
        python("-c", MAIN, "tasks", "show", "x", "-A", "cli_tasks", "--organization", "tenant-a"),
        cwd=HERE,
        env={**os.environ, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

    assert done.returncode == 1
    assert "cannot connect to postgresql" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_task_is_followed_through_an_outage_of_the_database(
    tasks: Any, tasks_and_database: tuple[Any, TenantDatabase]
) -> None:
    database = tasks_and_database[1]
    name = quote_identifier(make_url(database.url).database)
    with tenant_scope(A):
        result = tasks.add.apply_async((1, 2), countdown=3600)
    follow = python("-c", MAIN, "tasks", "follow", result.id, "-A", "cli_tasks")

    with (
        child("follow", follow, env={"DATABASE_URL": database.url}, cwd=HERE) as following,
        database.admin.execution_options(isolation_level="AUTOCOMMIT").connect() as admin,
    ):
        following.wait_for("delayed", TIMEOUT)
        admin.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            admin.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                {"name": make_url(database.url).database},
            )
            following.wait_for("Looking again until it answers", TIMEOUT)
        finally:
            admin.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        with tenant_scope(A):
            cancel_task(tasks.app, result.id)
        code = following.process.wait(TIMEOUT)

    assert code == 1
    assert following.finished_output().count("Looking again") == 1
    assert re.search(r"^state: +revoked", following.output, re.MULTILINE)
