"""Tasks that end while the broker or the database is away: what was to follow follows when it is back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from broker_rig import PostgresServer, running_server
from celery import Celery, chord
from kombu.utils.uuid import uuid

from rhesis_tasks import TenantContext, configure, tenant_scope, unconfigure
from rhesis_tasks.processes import wait_until
from rhesis_tasks.testing import TenantDatabase, new_tenant_database, running_worker

HERE = Path(__file__).parent
TIMEOUT = 30
OUTAGE = 5.0
"""Seconds; longer than what publishes and writes is tried again for."""

A = TenantContext("tenant-a", "ann")


class Rig(NamedTuple):
    app: Celery
    server: PostgresServer
    folder: Path

    def outage(self, end: Callable[[], None]) -> None:
        """The server is away, tasks end, and it comes back."""
        self.server.stop()
        end()
        time.sleep(OUTAGE)
        self.server.start()

    def until(self, line: str) -> None:
        path = self.folder / "lines"
        wait_until(f"the line {line!r}", lambda: path.exists() and line in path.read_text().splitlines(), TIMEOUT)

    def count(self, line: str) -> int:
        return (self.folder / "lines").read_text().splitlines().count(line)

    def get(self, task_id: str) -> Any:
        with tenant_scope(A):
            return self.app.AsyncResult(task_id).get(timeout=TIMEOUT)


@contextmanager
def rig(database: TenantDatabase, server: PostgresServer, broker: str, folder: Path, pool: str) -> Iterator[Rig]:
    environment = {"DATABASE_URL": database.url, "BROKER_URL": broker, "CHORDS": str(folder / "lines")}
    app = Celery("launching", set_as_current=False)
    configure(app, database.url, broker_url=broker)
    try:
        with running_worker("chord_tasks", cwd=HERE, pool=pool, concurrency=3, env=environment):
            yield Rig(app, server, folder)
    finally:
        unconfigure(app)
        app.close()


def last_part(rig: Rig, path: Path, part_id: str, body: str) -> str:
    """A chord of two of which one has ended and the other waits for a file; its id."""
    part = rig.app.signature("chord_tasks.until", args=(str(path), 1), task_id=part_id)
    other_id = uuid()
    other = rig.app.signature("chord_tasks.echo", args=(2,), task_id=other_id)
    with tenant_scope(A):
        result = chord([part, other], rig.app.signature(body), app=rig.app).apply_async()
        rig.app.AsyncResult(other_id).get(timeout=TIMEOUT)
    rig.until(f"started {part_id}")
    return str(result.id)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_body_that_cannot_be_launched_is_launched_when_the_broker_is_back(
    postgres_url: str, pool: str, tmp_path: Path
) -> None:
    with (
        running_server() as server,
        new_tenant_database(postgres_url) as database,
        rig(database, server, server.url, tmp_path, pool) as running,
    ):
        part_id = uuid()
        body_id = last_part(running, tmp_path / "go", part_id, "chord_tasks.total")

        running.outage((tmp_path / "go").touch)

        assert running.get(body_id) == [1, 2]
        assert running.count(f"body {body_id}") == 1
        assert running.get(part_id) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_ends_while_the_database_is_away_is_recorded_when_it_is_back(pool: str, tmp_path: Path) -> None:
    with (
        running_server() as server,
        new_tenant_database(server.url) as database,
        rig(database, server, database.url, tmp_path, pool) as running,
    ):
        part_id, task_id = uuid(), uuid()
        go = str(tmp_path / "go")
        with tenant_scope(A):
            running.app.signature("chord_tasks.until", args=(go, 3), task_id=task_id).apply_async()
        running.until(f"started {task_id}")
        body_id = last_part(running, tmp_path / "go", part_id, "chord_tasks.total")

        running.outage((tmp_path / "go").touch)

        assert running.get(task_id) == 3
        assert running.get(body_id) == [1, 2]
        assert running.count(f"body {body_id}") == 1
