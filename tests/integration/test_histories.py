"""Whatever happens to a task, and in whatever order: its record moves as the table of states says, and no other way."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kombu.utils.uuid import uuid
from sqlalchemy import text

from rhesis_tasks import TenantContext, configure, tenant_scope, unconfigure
from rhesis_tasks.headers import HEADER, Envelope, Progress, encode
from rhesis_tasks.postgres.engines import shared_engine
from rhesis_tasks.postgres.results import TaskRecord
from rhesis_tasks.settings import database_url
from rhesis_tasks.states import (
    TERMINAL,
    UNFINISHED,
    WAITING,
    State,
    Transition,
    delay,
    expire,
    fail,
    launch,
    retry,
    revoke,
    start,
    succeed,
)
from rhesis_tasks.status import Cancellation, cancel_task, get_task
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

ACME = TenantContext("acme", "alice")

WRITES: dict[str, tuple[Transition, str, Any]] = {
    "start": (start, "STARTED", None),  # also of a message that is delivered again, or after a worker's death
    "progress of its own": (start, "PROGRESS", {"done": 1}),
    "retry": (retry, "RETRY", ConnectionError("down")),
    "succeed": (succeed, "SUCCESS", 42),
    "fail": (fail, "FAILURE", ValueError("bad")),
    "be revoked": (revoke, "REVOKED", TaskRevokedError("revoked")),
    "expire": (expire, "REVOKED", TaskRevokedError("expired")),
}
OTHERS = ("launch", "delay", "report", "cancel", "abort", "discard", "forget", "clean up")


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens; ``attempt`` is that of the worker who writes, which may be an older one."""

    name: str
    attempt: int = 0


EVENTS = st.one_of(
    st.builds(Event, st.sampled_from(sorted(WRITES)), st.integers(0, 3)), st.builds(Event, st.sampled_from(OTHERS))
)


@dataclasses.dataclass
class Model:
    """Where a task should be."""

    state: State | None = None
    retries: int = 0
    is_asked: bool = False

    def happens(self, event: Event) -> Any:
        """Move, and say what the one who lets it happen is told."""
        state = self.state
        match event.name:
            case "launch" | "delay":
                self._move(launch if event.name == "launch" else delay)
                return state is None
            case "report":
                return self.is_asked and state in UNFINISHED
            case "cancel":
                return self._cancelled()
            case "abort":
                self.is_asked |= state in UNFINISHED
                return state in UNFINISHED
            case "discard":
                if state in WAITING:
                    self._forget()
            case "forget":
                self._forget()
            case "clean up":
                if state in TERMINAL:
                    self._forget()
            case name:
                transition = WRITES[name][0]
                if state is None or transition.target in TERMINAL or event.attempt >= self.retries:
                    self.retries = self.retries if state in TERMINAL else max(self.retries, event.attempt)
                    self._move(transition)
        return None

    def _move(self, transition: Transition) -> None:
        if self.state is None or self.state in transition.sources:
            self.state = transition(self.state)

    def _cancelled(self) -> Cancellation | None:
        if self.state is None:
            return None
        if self.state in TERMINAL:
            return Cancellation.ENDED
        self.is_asked = True
        if self.state in WAITING:
            self.state = revoke(self.state)
            return Cancellation.CANCELLED
        return Cancellation.ASKED

    def _forget(self) -> None:
        self.state, self.retries, self.is_asked = None, 0, False


class Tasks:
    """Lets events happen in the database, each with a connection of the thread's own."""

    def __init__(self, app: Celery, database: TenantDatabase) -> None:
        self.app = app
        self.database = database

    def happens(self, task_id: str, event: Event) -> Any:
        backend = self.app.backend
        with tenant_scope(ACME):
            match event.name:
                case "launch":
                    return backend.record_launch(task_id, "work")
                case "delay":
                    return backend.record_launch(task_id, "work", eta=datetime.datetime.now(datetime.UTC))
                case "report":
                    return backend.store_progress(task_id, Progress(1, 2, "half"))
                case "cancel":
                    return cancel_task(self.app, task_id)
                case "abort":
                    return backend.request_abort(task_id)
                case "discard":
                    return backend.discard_launch(task_id)
                case "forget":
                    return backend.forget(task_id)
                case "clean up":
                    self.database.execute(
                        "UPDATE rhesis_tasks.task_record SET finished_at = finished_at - interval '9 days', "
                        f"launched_at = launched_at - interval '9 days' WHERE task_id = '{task_id}'"
                    )
                    return backend.cleanup()
        _, state, value = WRITES[event.name]
        request = Context(id=task_id, task="work", retries=event.attempt, **{HEADER: encode(Envelope(ACME))})
        return backend.store_result(task_id, value, state, request=request) and None

    def record(self, task_id: str) -> TaskRecord | None:
        with tenant_scope(ACME):
            return get_task(self.app, task_id)

    def history(self, task_id: str) -> list[tuple[str | None, str | None, int, int, bool]]:
        """The states and retries before and after each write, and whether it changed anything."""
        query = text(
            "SELECT was, is_now, retries_before, retries_after, is_same FROM history WHERE task_id = :id ORDER BY n"
        )
        with self.database.owner.connect() as connection:
            return [tuple(row) for row in connection.execute(query, {"id": task_id})]


HISTORY = (
    "CREATE TABLE history (n bigint GENERATED ALWAYS AS IDENTITY, task_id text, was text, is_now text, "
    "retries_before int, retries_after int, is_same boolean)",
    "CREATE FUNCTION write_history() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN "
    "INSERT INTO public.history (task_id, was, is_now, retries_before, retries_after, is_same) "
    "VALUES (coalesce(new.task_id, old.task_id), old.state, new.state, old.retries, new.retries, "
    "to_jsonb(old) - '{launched_at,finished_at}'::text[] "
    "= to_jsonb(new) - '{launched_at,finished_at}'::text[]); RETURN NULL; END $$",
    "CREATE TRIGGER history AFTER INSERT OR UPDATE OR DELETE ON rhesis_tasks.task_record "
    "FOR EACH ROW EXECUTE FUNCTION write_history()",
)


@pytest.fixture(scope="module")
def tasks(postgres_url: str) -> Iterator[Tasks]:
    with new_tenant_database(postgres_url) as database:
        database.execute(*HISTORY)
        app = Celery("histories", set_as_current=False)
        configure(app, database.url, broker_url="memory://", result_backend=database.url)
        yield Tasks(app, database)
        unconfigure(app)
        app.close()
        shared_engine(database_url(database.url).render_as_string(hide_password=False)).dispose()


def assert_legal(tasks: Tasks, task_id: str) -> None:
    """Each write that the database has seen was one that may happen."""
    for was, is_now, before, after, is_same in tasks.history(task_id):
        if was is None or is_now is None:  # made, or taken away
            continue
        assert after >= before
        if State(was) in TERMINAL:
            assert is_same, f"a task that was {was} was changed"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example([Event("retry", 1), Event("start", 0), Event("progress of its own", 0), Event("succeed", 0)])
@given(st.lists(EVENTS, max_size=12))
def test_a_record_is_where_the_table_of_states_says(tasks: Tasks, events: list[Event]) -> None:
    task_id, model = uuid(), Model()

    for event in events:
        before = tasks.record(task_id)

        told = tasks.happens(task_id, event)

        assert told == model.happens(event), event
        record = tasks.record(task_id)
        assert (record and record.state) == model.state, event
        if record is None:
            continue
        assert record.retries == model.retries, event
        assert (record.abort_requested_at is not None) == model.is_asked
        assert (record.finished_at is not None) == (record.state in TERMINAL)
        assert (record.result is not None) == (record.state is State.SUCCESS)
        assert (record.error_type is not None) == (
            record.state in {State.RETRY, State.FAILURE, State.REVOKED, State.EXPIRED}
            or (before is not None and before.error_type is not None and (event.name not in WRITES or record == before))
        )
        if before is not None and before.state in TERMINAL and event.name != "clean up":
            assert record == before, "what has ended stays as it is"
    assert_legal(tasks, task_id)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EVENTS, max_size=8), st.lists(EVENTS, max_size=8))
def test_two_who_write_at_once_move_it_as_one_would(tasks: Tasks, one: list[Event], other: list[Event]) -> None:
    task_id = uuid()
    together = threading.Barrier(2, timeout=30)

    def run(events: list[Event]) -> None:
        together.wait()
        for event in events:
            tasks.happens(task_id, event)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, (one, other), timeout=60))

    assert_legal(tasks, task_id)
    record, history = tasks.record(task_id), tasks.history(task_id)
    assert (record and record.state) == (State(history[-1][1]) if history and history[-1][1] else None)


def test_of_two_ends_at_the_same_moment_one_counts(tasks: Tasks) -> None:
    for _ in range(30):
        task_id = uuid()
        tasks.happens(task_id, Event("launch"))
        together = threading.Barrier(3, timeout=30)

        def end(name: str, task_id: str = task_id, together: threading.Barrier = together) -> Any:
            together.wait()
            return tasks.happens(task_id, Event(name))

        with ThreadPoolExecutor(3) as threads:
            _, _, cancelled = threads.map(end, ("succeed", "fail", "cancel"), timeout=30)

        ends = [is_now for was, is_now, *_ in tasks.history(task_id) if was not in TERMINAL and is_now in TERMINAL]
        assert len(ends) == 1
        assert (cancelled is Cancellation.CANCELLED) == (ends == ["revoked"])
