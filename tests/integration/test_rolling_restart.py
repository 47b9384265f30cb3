"""Two workers that are replaced one after the other under load, as by a deployment: what goes in comes out, once."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from applications import application

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.processes import Child, child, python, wait_until
from rhesis_tasks.testing import TenantDatabase

HERE = Path(__file__).parent
COMMAND = python("-c", "from rhesis_tasks.cli import main; main()")
TIMEOUT = 60.0
TENANTS = (TenantContext("acme"), TenantContext("globex"))


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "delayed_tasks") as found:
        yield found


@pytest.mark.newest_only
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_goes_in_comes_out_once_while_workers_are_replaced(
    tasks_and_database: tuple[Any, TenantDatabase], tmp_path: Path, pool: str
) -> None:
    tasks, database = tasks_and_database
    path = tmp_path / "runs"
    path.touch()
    with ExitStack() as stack:
        environment = {
            "DATABASE_URL": database.url,
            "DELAYED": str(path),
            "CELERY_WORKER_POOL": pool,
            "CELERY_WORKER_CONCURRENCY": "2",
        }

        def started() -> Child:
            command = [*COMMAND, "worker", "-A", "delayed_tasks"]
            worker = stack.enter_context(child(f"{pool} worker", command, env=environment, cwd=HERE))
            worker.wait_for(" ready.", timeout=TIMEOUT)
            return worker

        def runs() -> Counter[str]:
            return Counter(" ".join(line.split(" ")[:2]) for line in path.read_text().splitlines())

        sent: list[str] = []
        with publishing(tasks, pool, sent):
            for worker in (started(), started()):
                before = sum(runs().values())
                successor = started()
                worker.process.send_signal(signal.SIGTERM)
                assert worker.process.wait(TIMEOUT) == 0, worker.output[-2000:]
                wait_until("the others to go on", lambda: sum(runs().values()) > before + 20, TIMEOUT)  # noqa: B023
                assert successor.running
        wait_until("all tasks to be done", lambda: runs().keys() == set(sent), TIMEOUT)

        assert set(runs().values()) == {1}
        assert len(sent) > 40
        with database.owner.connect() as connection:
            wait_until(
                "no message to be left",
                lambda: connection.exec_driver_sql("SELECT count(*) FROM rhesis_tasks.message").scalar_one() == 0,
                TIMEOUT,
            )
            states = connection.exec_driver_sql("SELECT DISTINCT state FROM rhesis_tasks.task_record").scalars().all()
            assert states == ["success"]


@contextmanager
def publishing(tasks: Any, prefix: str, sent: list[str]) -> Iterator[None]:
    """Tasks are launched for two tenants until the block ends."""
    done = threading.Event()

    def publish() -> None:
        number = 0
        while not done.wait(0.02):
            number += 1
            tenant = TENANTS[number % 2]
            with tenant_scope(tenant):
                tasks.note.delay(f"{prefix}{number}")
            sent.append(f"{prefix}{number} {tenant.organization_id}")

    with ThreadPoolExecutor(1) as pool:
        publisher = pool.submit(publish)
        try:
            yield
        finally:
            done.set()
            publisher.result(TIMEOUT)
