"""Messages that no Celery has published, to real workers: nothing in them runs, and the worker goes on."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from applications import HERE, application
from celery import chain, chord, group
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks import TenantContext, tenant_scope
from rhesis_tasks.processes import wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import running_worker

ACME = TenantContext("acme", "ann")
EVIL = {"task": "signed_tasks.secret", "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": True}
PAST, NEVER = "2020-01-01T00:00:00+00:00", "0001-01-01T00:00:00+14:00"
OLDER = {"organization_id": "acme"}  # as callers from before this library have it
FORGED = {"rhesis_tasks": {"v": 1, "organization_id": "acme"}}


@dataclasses.dataclass(frozen=True)
class Rig:
    """A worker, and the application that launches for it."""

    tasks: Any
    worker: Any
    secrets: Path
    is_signed: bool

    def send(self, task: str, body: Any, /, **headers: Any) -> None:
        """Publish as somebody who can write to the broker and knows nothing else."""
        app = self.tasks.app
        with app.connection_for_write() as connection:
            queue = app.amqp.queues[app.conf.task_default_queue]
            producer = connection.Producer(serializer="json", routing_key=queue.name)
            sent = {
                "task": f"signed_tasks.{task}",
                "id": str(uuid.uuid4()),
                **(FORGED if self.is_signed else OLDER),
                **headers,
            }
            producer.publish(body, headers=sent, declare=[queue])

    def run(self, canvas: Any) -> Any:
        with tenant_scope(ACME):
            return canvas.delay().get(timeout=15, interval=0.02)


@pytest.fixture(scope="module", params=["signed", "unsigned"])
def launcher(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[tuple[Any, str, str, Any]]:
    key = "a key of at least 16 bytes" if request.param == "signed" else ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNING_KEY", key)
        with application(postgres_url, "signed_tasks") as (tasks, database):
            yield tasks, database.url, key, database


@pytest.fixture(scope="module", params=["solo", "threads", "prefork"])
def rig(request: pytest.FixtureRequest, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    tasks, url, key, _ = launcher
    secrets = tmp_path_factory.mktemp("secrets") / "seen"
    secrets.touch()
    env = {"DATABASE_URL": url, "SIGNING_KEY": key, "SECRETS": str(secrets)}
    with running_worker("signed_tasks", cwd=HERE, pool=request.param, concurrency=1, env=env) as worker:
        yield Rig(tasks, worker, secrets, bool(key))


def test_what_is_launched_here_runs(rig: Rig) -> None:
    note, again = rig.tasks.note, rig.tasks.again

    assert rig.run(note.si()) == "acme"
    assert rig.run(again.si()) == "acme"
    assert rig.run(chain(note.si(), again.si(), note.si())) == "acme"
    assert rig.run(group(note.si(), note.si())) == ["acme", "acme"]
    assert rig.run(chord([note.si(), again.si()], note.si())) == "acme"


BODY: list[Any] = [[], {}, {}]
BLANK: dict[str, Any] = {}
MESSAGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "arguments that are text": ("note", [[], "x", {}], {"expires": PAST}),
    "arguments in the signatures": ("note", [[], {}, {"kwargs": [1]}], {"expires": PAST}),
    "signatures that are a list": ("note", [[], {}, [1]], {"expires": PAST}),
    "a body of one": ("note", [1], BLANK),
    "an id with NUL": ("note", BODY, {"id": "a\0b"}),
    "an id with a lone surrogate": ("note", BODY, {"id": "a\ud800b"}),
    "an id that is a number": ("note", BODY, {"id": 7}),
    "retries that are text": ("note", BODY, {"retries": "x"}),
    "a root that is none": ("note", BODY, {"root_id": {}}),
    "time limits that are text": ("note", BODY, {"timelimit": "abc"}),
    "time limits of text": ("note", BODY, {"timelimit": ["a", "b"]}),
    "stamps that are a number": ("note", BODY, {"stamped_headers": 5}),
    "a shadow that is a list": ("note", BODY, {"shadow": ["x"]}),
    "a header that hides a method": ("note", BODY, {"get": 1}),
    "an ETA that cannot be": ("note", [[], {}, {"errbacks": [EVIL]}], {"eta": NEVER}),
    "an ETA that cannot be, and garbage": ("note", [[], {}, {"errbacks": 5}], {"eta": NEVER}),
    "a task that is a list": ("note", BODY, {"task": ["note"]}),
    "an unknown task": ("unknown", BODY, BLANK),
    "delivery": ("note", [[], {}, {"delivery_info": "x", "errbacks": [EVIL]}], BLANK),
    "error callbacks that are none": ("fails", [[], {}, {"errbacks": [5]}], BLANK),
    "a chain of numbers": ("fails", [[], {}, {"chain": [5]}], BLANK),
}


@pytest.mark.parametrize(("task", "body", "headers"), MESSAGES.values(), ids=MESSAGES)
def test_a_worker_goes_on_after_a_message_that_no_celery_publishes(
    rig: Rig, task: str, body: Any, headers: dict[str, Any]
) -> None:
    for _ in range(2):
        rig.send(task, body, **headers)

    assert rig.run(rig.tasks.note.si()) == "acme"
    assert rig.worker.running
    assert rig.secrets.read_text() == "" or not rig.is_signed


def test_a_refusal_takes_the_place_of_no_record(rig: Rig, launcher: Any) -> None:
    if not rig.is_signed:
        pytest.skip("for workers that have a key")
    engine = create_engine(database_url(launcher[3].owner_url), poolclass=NullPool)

    task_id = rig.tasks.fails.apply_async(countdown=600).id
    before = rig.worker.output.count("it is refused")
    rig.send("fails", [[], {}, {}], id=task_id)
    wait_until("the refusal", lambda: rig.worker.output.count("it is refused") > before)
    assert rig.run(rig.tasks.note.si()) == "acme"

    with engine.connect() as connection:
        found = text("SELECT state FROM rhesis_tasks.task_record WHERE task_id = :id")
        assert connection.scalars(found, {"id": task_id}).all() == ["delayed"]


def test_what_nobody_has_signed_is_refused(rig: Rig) -> None:
    if not rig.is_signed:
        pytest.skip("for workers that have a key")
    before = rig.worker.output.count("it is refused")
    for name in ("note", "secret", "fails"):
        rig.send(name, [[], {}, {"callbacks": [EVIL], "errbacks": [EVIL], "chain": [EVIL]}])

    wait_until("the refusals", lambda: rig.worker.output.count("it is refused") == before + 3)
    assert rig.run(rig.tasks.note.si()) == "acme"
    assert rig.secrets.read_text() == ""
