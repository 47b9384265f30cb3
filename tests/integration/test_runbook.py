"""The runbook, from top to bottom: each command of the page, in the situation that it is for, prints what it says."""

from __future__ import annotations

import datetime
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from broker_rig import PostgresServer, kill, running_server

from rhesis_tasks import TenantContext, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.operations import MessageFilter, MessageState, messages
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.testing import TenantDatabase, new_tenant_database, running_worker

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "runbook.md").read_text()
TIMEOUT = 60
OPTIONS = '{"grace": 1, "poll_interval": 1, "max_deliveries": 2}'


def blocks() -> list[tuple[str, int, str]]:
    """The page's console blocks: under which heading, the how manieth, and its text."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for number, block in enumerate(re.findall(r"^```console\n(.*?)^```", section, re.DOTALL | re.MULTILINE)):
            found.append((heading, number, block))
    return found


def steps(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with what it prints."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


class Shop:
    """The shop of the page: its database, its workers, and what is launched in it."""

    def __init__(self, server: PostgresServer, database: TenantDatabase, folder: Path, stack: ExitStack) -> None:
        self.server, self.database, self.folder, self.stack = server, database, folder, stack
        self.tasks: Any = importlib.import_module("runbook_shop")
        shutil.copy(HERE / "runbook_shop.py", folder / "shop.py")
        self.names = {"shop_worker": database.role}
        self.workers: dict[str, ExitStack] = {}
        self.children: dict[str, Child] = {}

    # --- doing ---

    def launch(self, task: str, *args: Any, organization: str = "acme", times: int = 1) -> str:
        context = TenantContext(organization, "ann")
        results = [launch_with_context(getattr(self.tasks, task), *args, context=context) for _ in range(times)]
        self.names["TASK_ID"] = results[-1].id
        return str(results[-1].id)

    def start(self, name: str, *, pool: str = "prefork", queues: str = "celery") -> Child:
        own = self.workers[name] = self.stack.enter_context(ExitStack())
        env = {"DATABASE_URL": self.database.url, "SHOP_OPTIONS": OPTIONS}
        worker = running_worker(
            "shop", cwd=self.folder, pool=pool, concurrency=1, env=env, chatty=False,
            arguments=("--queues", queues, "--hostname", f"{name}@%h"),
        )  # fmt: skip
        self.children[name] = own.enter_context(worker)
        return self.children[name]

    def stop(self, name: str) -> None:
        self.workers.pop(name).close()

    def kill(self, name: str) -> None:
        kill(self.children[name])
        self.stop(name)

    def run(self, command: str) -> str:
        """What a command of the page prints, on both streams."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "DATABASE_URL": self.database.url,
                "OWNER_DATABASE_URL": self.database.owner_url,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode in (0, 1, 69), done.stdout  # 69 is celery's for nobody who answers
        return done.stdout

    # --- waiting ---

    def found(self, **which: Any) -> list[Any]:
        return messages(self.tasks.app, MessageFilter(**which), limit=100)

    def wait_for(self, number: int, *states: MessageState, task_id: str | None = None) -> None:
        wait_until(
            f"{number} messages to be {', '.join(states)}",
            lambda: len(self.found(states=states or None, task_id=task_id)) == number,
            TIMEOUT,
        )

    def wait_started(self) -> None:
        def is_started() -> bool:
            with tenant_scope(TenantContext("acme")):
                record = self.tasks.app.backend.get_record(self.names["TASK_ID"])
            return bool(record.state == "started")

        wait_until("the task to be started", is_started, TIMEOUT)

    # --- the situations ---

    def look_first(self) -> None:
        self.launch("add", 1, 2, times=3)

    def more_workers(self) -> None:
        self.start("first")
        self.wait_for(0)

    def flood(self) -> None:
        self.stop("first")
        self.launch("add", 1, 2, organization="globex", times=20)
        self.launch("add", 1, 2)

    def stuck(self) -> None:
        self.start("first")
        self.wait_for(0)
        self.launch("never_ends")
        self.wait_started()

    def poison(self) -> None:
        self.wait_for(0)
        self.stop("first")
        self.mended = self.folder / "mended"
        self.launch("poison", str(self.mended))
        for name in ("one", "two"):
            worker = self.start(name, pool="solo")
            wait_until("the worker to be gone", lambda worker=worker: not worker.running, TIMEOUT)  # type: ignore[misc]
            self.stop(name)
        self.start("first", pool="solo")
        self.wait_for(1, MessageState.DEAD)

    def mend(self) -> None:
        self.mended.touch()

    def lose(self) -> None:
        self.wait_for(0)
        self.stop("first")
        self.start("lost")
        task_id = self.launch("never_ends")
        self.wait_started()
        self.start("first")
        self.kill("lost")
        wait_until("it to be delivered again", lambda: self.found(task_id=task_id)[0].deliveries == 2, TIMEOUT)
        self.wait_for(1, MessageState.RUNNING)

    def fail_over(self) -> None:
        self.server.restart()
        wait_until("the worker to answer", lambda: "1 node" in self.run("celery -A shop inspect ping"), TIMEOUT)

    def restore(self) -> None:
        """What it is like then: messages that wait, one that a worker held who is not there, and a new one."""
        self.launch("add", 1, 2)
        self.kill("first")
        time.sleep(0.01)
        self.names["RESTORED_AT"] = datetime.datetime.now(datetime.UTC).isoformat()
        self.launch("add", 1, 2)
        self.start("idle", queues="nothing")
        self.wait_for(0, MessageState.RUNNING)
        self.stop("idle")


SITUATIONS: dict[tuple[str, int], Callable[[Shop], None]] = {
    ("Look first", 0): Shop.look_first,
    ("A queue grows", 1): Shop.more_workers,
    ("A tenant floods the queue", 0): Shop.flood,
    ("A task is stuck", 0): Shop.stuck,
    ("A message ends its workers", 0): Shop.poison,
    ("A message ends its workers", 1): Shop.mend,
    ("A worker is lost", 0): Shop.lose,
    ("The database fails over", 0): Shop.fail_over,
    ("A backup was restored", 0): Shop.restore,
}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with ExitStack() as stack:
        server = stack.enter_context(running_server())
        database = stack.enter_context(new_tenant_database(server.url))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DATABASE_URL", database.url)
        patch.syspath_prepend(HERE)
        workers = stack.enter_context(ExitStack())
        shop = Shop(server, database, tmp_path, workers)
        stack.callback(unconfigure, shop.tasks.app)
        yield shop


def pattern(expected: str, names: dict[str, str]) -> str:
    """What a page says as a regular expression: a line that is an ellipsis is any number of lines."""
    for name, value in names.items():
        expected = expected.replace(name, value)
    lines = []
    for line in expected.rstrip().splitlines():
        escaped = re.escape(line).replace("…", ".*")
        lines.append("(?:.*\n)*?" if line == "…" else re.sub(r"(\\ )+", r" +", escaped) + "\n")
    return "".join(lines)


@pytest.mark.timeout(600)
def test_each_step_of_the_runbook_prints_what_it_says(shop: Shop) -> None:
    assert set(SITUATIONS) <= {(heading, number) for heading, number, _ in blocks()}
    for heading, number, block in blocks():
        if situation := SITUATIONS.get((heading, number)):
            situation(shop)
        for command, expected in steps(block):
            for name, value in shop.names.items():
                command = command.replace(name, value)
            printed = shop.run(command)
            assert re.fullmatch(pattern(expected, shop.names), printed.rstrip() + "\n"), (
                f"{heading}: $ {command}\n--- says\n{expected}\n--- prints\n{printed}"
            )


def test_each_section_of_the_runbook_has_a_command() -> None:
    headings = {line.removeprefix("## ") for line in PAGE.splitlines() if line.startswith("## ")}

    assert {heading for heading, _, _ in blocks()} == headings
