"""When a running task writes to its record: by a clock that the test turns, and a backend that notes what it gets."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from rhesis_tasks import TenantContext, current_tenant, reporting, tenant_scope
from rhesis_tasks.headers import Envelope, Progress, RequestState
from rhesis_tasks.reporting import Reporter

ACME = TenantContext("acme", "alice")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Backend:
    """Also the application whose backend it is."""

    def __init__(self, clock: Clock) -> None:
        self.backend = self
        self.written: list[Any] = []
        self.tenants: list[TenantContext | None] = []
        self.is_asked = False
        self.takes = 0.0  # seconds
        self.error: BaseException | None = None
        self.meanwhile: Callable[[], object] = lambda: None
        self._clock = clock

    def store_progress(self, task_id: str, progress: Progress | None) -> bool:
        self.written.append(progress and progress.done)
        self.tenants.append(current_tenant())
        self._clock.now += self.takes
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return self.is_asked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reporting, "time", clock)
    return clock


@pytest.fixture
def backend(clock: Clock) -> Backend:
    return Backend(clock)


@pytest.fixture
def reporter(backend: Backend) -> Reporter:
    state = RequestState(task=None, activation=None, envelope=Envelope(ACME), tenant=ACME)
    return Reporter(backend, "one", state)  # type: ignore[arg-type]


def report(reporter: Reporter, *done: int) -> None:
    for each in done:
        reporter.report(Progress(each, None, ""))


def test_the_first_report_is_written_at_once_and_the_next_after_a_second(
    reporter: Reporter, backend: Backend, clock: Clock
) -> None:
    report(reporter, 1, 2)
    clock.now += 0.99
    report(reporter, 3)
    clock.now += 0.01
    report(reporter, 4)

    assert backend.written == [1, 4]


def test_what_was_reported_in_between_is_written_with_the_next_look(
    reporter: Reporter, backend: Backend, clock: Clock
) -> None:
    report(reporter, 1, 2)
    clock.now += 1
    reporter.look()

    assert backend.written == [1, 2]


def test_what_is_written_already_is_not_written_again(reporter: Reporter, backend: Backend, clock: Clock) -> None:
    report(reporter, 1)
    for _ in range(2):
        clock.now += 1
        reporter.look()
    clock.now += 1
    report(reporter, 2)

    assert backend.written == [1, None, None, 2]


def test_what_could_not_be_written_is_with_the_next_look(reporter: Reporter, backend: Backend, clock: Clock) -> None:
    backend.error = ConnectionError()
    report(reporter, 1)
    backend.error = None
    clock.now += 1
    reporter.look()

    assert backend.written == [1, 1]


def test_a_slow_database_takes_at_most_a_tenth_of_the_tasks_time(
    reporter: Reporter, backend: Backend, clock: Clock
) -> None:
    backend.takes, backend.error = 3, ConnectionError()
    begun = clock.now
    for done in range(10_000):
        clock.now += 0.1
        report(reporter, done)

    after_the_first = 3 * (len(backend.written) - 1)
    assert 0.09 < after_the_first / (clock.now - begun) <= 0.1


def test_after_an_outage_of_minutes_the_task_hears_within_half_a_minute(
    reporter: Reporter, backend: Backend, clock: Clock
) -> None:
    backend.takes = 300
    report(reporter, 1)
    backend.takes, backend.is_asked = 0, True
    clock.now += 30
    reporter.look()

    assert reporter.is_asked_to_abort


def test_a_second_passes_after_a_write_and_not_only_after_its_begin(
    reporter: Reporter, backend: Backend, clock: Clock
) -> None:
    backend.takes = 0.1
    report(reporter, 1)
    clock.now += 0.95
    report(reporter, 2)

    assert backend.written == [1]


def test_that_the_task_shall_stop_is_not_forgotten(reporter: Reporter, backend: Backend, clock: Clock) -> None:
    backend.is_asked = True
    reporter.look()
    heard = reporter.is_asked_to_abort
    backend.is_asked = False
    clock.now += 1
    reporter.look()

    assert (heard, reporter.is_asked_to_abort) == (True, True)


def test_the_tenant_is_that_of_the_task(reporter: Reporter, backend: Backend) -> None:
    with tenant_scope(TenantContext("globex")):
        report(reporter, 1)

    assert backend.tenants == [ACME]


def test_an_error_is_in_the_log_and_nowhere_else(
    reporter: Reporter, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = ConnectionError("no route")
    with caplog.at_level(logging.WARNING):
        report(reporter, 1)

    assert [record.getMessage() for record in caplog.records] == [
        "the progress of task one could not be recorded: no route"
    ]


def test_the_soft_time_limit_is_no_error_of_the_database(reporter: Reporter, backend: Backend, clock: Clock) -> None:
    backend.error = SoftTimeLimitExceeded()
    with pytest.raises(SoftTimeLimitExceeded):
        report(reporter, 1)
    backend.error = None
    clock.now += 1
    reporter.look()

    assert backend.written == [1, 1]


def test_one_look_is_under_way_at_a_time(reporter: Reporter, backend: Backend, clock: Clock) -> None:
    """A database that does not answer would otherwise occupy all threads of an event loop."""
    go = threading.Event()
    backend.meanwhile = lambda: go.wait(10)

    async def main() -> None:
        for done in range(100):
            report(reporter, done)
            clock.now += 60
            await asyncio.sleep(0)
        go.set()

    asyncio.run(main())

    assert backend.written == [0]


def test_a_look_that_is_cancelled_before_a_thread_was_free_is_not_the_last(
    reporter: Reporter, backend: Backend, clock: Clock
) -> None:
    async def main() -> None:
        looking = asyncio.create_task(reporter.look_and_wait())
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        clock.now += 1
        await reporter.look_and_wait()

    asyncio.run(main())

    assert backend.written == [None]


def test_where_an_event_loop_runs_it_does_not_wait(reporter: Reporter, backend: Backend) -> None:
    go = threading.Event()
    backend.meanwhile = lambda: go.wait(10)
    backend.is_asked = True

    async def main() -> bool:
        reporter.look()
        known = reporter.is_asked_to_abort
        go.set()
        return known

    assert asyncio.run(main()) is False
    assert reporter.is_asked_to_abort


def test_a_report_that_a_thread_comes_to_late_is_the_latest(reporter: Reporter, backend: Backend) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        later: list[Callable[[], object]] = []
        loop.run_in_executor = lambda _, function, *args: later.append(lambda: function(*args))  # type: ignore[method-assign]
        report(reporter, 1, 2, 3)
        for each in later:
            each()

    asyncio.run(main())

    assert backend.written == [3]
