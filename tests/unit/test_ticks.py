"""Schedules for each tenant: which tick it is, and what is refused where they are made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery, chain, chord, group
from celery.local import Proxy
from celery.schedules import crontab, schedule

from rhesis_tasks import BaseTask, configure, unconfigure
from rhesis_tasks.beat import TASK_NAME, each_tenant, latest_tick, tick_to_run
from rhesis_tasks.errors import ConfigurationError, NotConfiguredError, TaskArgumentsError


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("ticks", set_as_current=False)
    configure(app, broker_url="memory://", result_backend="cache+memory://")
    yield app
    unconfigure(app)
    app.close()


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# --- which tick ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "now", "tick"),
    [
        (300, "2024-05-01T12:03:10", "2024-05-01T12:00:00"),
        (300, "2024-05-01T12:05:00", "2024-05-01T12:05:00"),
        (300, "2024-05-01T12:04:59.999999", "2024-05-01T12:00:00"),
        (0.5, "2024-05-01T12:00:00.700000", "2024-05-01T12:00:00.500000"),
        (86_400, "2024-05-01T12:00:00", "2024-05-01T00:00:00"),
    ],
)
def test_the_ticks_of_an_interval_are_the_same_whenever_its_beat_was_started(
    seconds: float, now: str, tick: str
) -> None:
    assert latest_tick(schedule(timedelta(seconds=seconds)), at(now)) == at(tick)


@pytest.mark.parametrize(
    ("cron", "now", "tick"),
    [
        ({"hour": 2, "minute": 0}, "2024-05-01T02:00:00.2", "2024-05-01T02:00"),
        ({"hour": 2, "minute": 0}, "2024-05-01T01:59:59", "2024-04-30T02:00"),
        ({"hour": 2, "minute": 0}, "2024-05-01T09:30:00", "2024-05-01T02:00"),  # a beat that comes hours late
        ({}, "2024-05-01T09:30:59", "2024-05-01T09:30"),
        ({"minute": "*/15"}, "2024-05-01T09:29:00", "2024-05-01T09:15"),
        ({"minute": 30, "hour": "9-17", "day_of_week": "mon-fri"}, "2024-05-06T09:00", "2024-05-03T17:30"),
        ({"minute": 0, "hour": 0, "day_of_month": 1}, "2024-05-31T23:59", "2024-05-01T00:00"),
        ({"minute": 0, "hour": 0, "day_of_month": 29, "month_of_year": 2}, "2023-05-01T00:00", "2020-02-29T00:00"),
    ],
)
def test_the_tick_of_a_crontab_is_when_it_was_due_however_late_it_is(
    app: Celery, cron: dict[str, Any], now: str, tick: str
) -> None:
    assert latest_tick(crontab(app=app, **cron), at(now)) == at(tick)


@pytest.mark.newest_only  # Celery 5.6 knows the hours of today only, so that it cannot be asked about the past
@pytest.mark.parametrize("cron", [{"minute": "*/7"}, {"hour": "2,14", "minute": "5,50"}, {"day_of_week": 0}])
def test_ticks_of_a_crontab_are_those_at_which_celery_would_run_it(app: Celery, cron: dict[str, Any]) -> None:
    timetable = crontab(app=app, **({"minute": 0, "hour": 0} | cron if "day_of_week" in cron else cron))
    begin = at("2024-02-27T00:00")
    ticks, last = [], begin
    while last < begin + timedelta(days=9):
        since, delta, _ = timetable.remaining_delta(last)
        last = (since + delta).astimezone(UTC)
        ticks.append(last)

    minutes = (ticks[0] + timedelta(minutes=number) for number in range(60 * 24 * 8))
    found = {latest_tick(timetable, minute) for minute in minutes}

    assert found == {tick for tick in ticks if tick < ticks[0] + timedelta(days=8)}


@pytest.mark.parametrize(
    ("now", "tick"),
    [
        ("2024-03-31T02:30", "2024-03-31T00:30"),  # 02:30 in Berlin comes to be 03:30
        ("2024-04-01T02:30", "2024-04-01T00:30"),
        ("2024-10-26T00:31", "2024-10-26T00:30"),
        ("2024-10-28T01:31", "2024-10-28T01:30"),
    ],
)
def test_a_crontab_goes_by_the_time_zone_of_its_application(app: Celery, now: str, tick: str) -> None:
    app.conf.timezone = "Europe/Berlin"

    found = latest_tick(crontab(hour=2, minute=30, app=app), at(now))

    assert abs(found - at(tick)) <= timedelta(hours=1)
    assert found.astimezone(ZoneInfo("Europe/Berlin")).strftime("%M") == "30"


HOURLY = schedule(timedelta(hours=1))


@pytest.mark.parametrize(
    ("due", "comes", "tick"),
    [
        ("2024-05-01T12:00", "2024-05-01T12:00:01", "2024-05-01T12:00"),
        ("2024-05-01T12:00", "2024-05-01T13:10", "2024-05-01T12:00"),  # one late: the next one comes by itself
        ("2024-05-01T12:00", "2024-05-01T17:10", "2024-05-01T17:00"),  # what was missed is not made up for
        ("2024-05-01T12:00", "2024-05-01T11:59:59", "2024-05-01T12:00"),  # the beat's clock is ahead
        (None, "2024-05-01T12:10", "2024-05-01T12:00"),  # from somebody who does not say
    ],
)
def test_a_message_is_about_the_tick_at_which_it_was_published_unless_it_comes_far_too_late(
    due: str | None, comes: str, tick: str
) -> None:
    assert tick_to_run(HOURLY, due and at(due), at(comes)) == at(tick)


# --- what is asked for ---------------------------------------------------------------------------------------------


def test_beat_gets_one_entry_and_the_tasks_stay_unmade(app: Celery) -> None:
    @app.task(base=BaseTask)
    def digest() -> None: ...

    each_tenant(app, "digests", digest, schedule=60, tenants=list, spread=30)
    each_tenant(app, "more", "a.task", schedule=crontab(hour=3), tenants="SELECT 1")
    each_tenant(app, "shared", Proxy(lambda: pytest.fail("it is made")), schedule=60, tenants=list)  # by shared_task

    assert not app.finalized
    assert {name: (entry["task"], entry["kwargs"]) for name, entry in app.conf.beat_schedule.items()} == {
        "digests": (TASK_NAME, {"schedule_name": "digests"}),
        "more": (TASK_NAME, {"schedule_name": "more"}),
        "shared": (TASK_NAME, {"schedule_name": "shared"}),
    }
    assert TASK_NAME in app.tasks


async def asynchronous() -> list[str]:
    return []


async def asynchronously() -> AsyncIterator[str]:
    yield "acme"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"name": ""}, "the name of a schedule is a text"),
        ({"name": "taken"}, "there is a schedule 'taken' already"),
        ({"task": 5}, "runs a task, its name or a signature, not int"),
        ({"task": group()}, "a group never ends as a whole"),
        ({"task": chain()}, "a group never ends as a whole"),
        ({"schedule": 0}, "longer than nothing"),
        ({"schedule": -1.5}, "longer than nothing"),
        ({"schedule": "hourly"}, "a crontab or an interval, not str"),
        ({"schedule": None}, "a crontab or an interval, not NoneType"),
        ({"tenants": 5}, "a SELECT or a function, not int"),
        ({"tenants": ["acme"]}, "a SELECT or a function, not list"),
        ({"tenants": asynchronous}, "not async def"),
        ({"tenants": asynchronously}, "not async def"),
        ({"args": "5"}, r"args= is a list or tuple of arguments, not str: args=\('5',\)"),
        ({"args": 5}, "args= is a list or tuple of arguments, not int"),
        ({"kwargs": ["kind"]}, "kwargs= is a mapping of arguments by their names, not list"),
        ({"options": {"task_id": "x"}}, "cannot have task_id"),
        ({"options": {"headers": {}}}, "cannot have headers"),
        ({"options": {"expiers": 5}}, "no option 'expiers': did you mean expires?"),
        ({"options": {"countdown": 5}, "spread": 10}, "cannot have countdown"),
        ({"spread": -1}, "spread is a number of seconds of 0 or more"),
        ({"spread": 60}, "not shorter than the period"),
        ({"lost_after": 0}, "lost_after is a number of seconds of 1 or more"),
        ({"lost_after": True}, "lost_after is a number"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_where_it_is_made(app: Celery, wrong: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {"name": "a", "task": "task", "schedule": 60, "tenants": "SELECT 1"}
    each_tenant(app, **(good | {"name": "taken"}))

    with pytest.raises(ConfigurationError, match=reason):
        each_tenant(app, **(good | wrong))

    assert set(app.conf.beat_schedule) == {"taken"}


@pytest.fixture
def tasks(app: Celery) -> dict[str, Any]:
    """A task with an argument, and one that ignores its result."""

    @app.task(base=BaseTask, name="report", bind=True, shared=False)
    def report(self: BaseTask, kind: str) -> None: ...

    @app.task(base=BaseTask, name="quiet", ignore_result=True, shared=False)
    def quiet() -> None: ...

    return {"report": report, "quiet": quiet}


@pytest.mark.parametrize("by", ["the task", "its signature", "the options"])
@pytest.mark.parametrize("kind", ["chain", "chord"])
def test_a_chain_or_chord_whose_end_nobody_would_know_is_refused(
    app: Celery, tasks: dict[str, Any], kind: str, by: str
) -> None:
    report, quiet = tasks["report"].si("full"), tasks["quiet"].si()
    last = {"the task": quiet, "its signature": report.set(ignore_result=True), "the options": report}[by]
    whole = chain(report.clone(), last) if kind == "chain" else chord([report.clone()], last)
    options = {"ignore_result": True} if by == "the options" else {}

    with pytest.raises(ConfigurationError, match=f"{last['task']}, ignores its result"):
        each_tenant(app, "a", whole, schedule=60, tenants=list, options=options)

    each_tenant(app, "a", tasks["quiet"], schedule=60, tenants=list, options={"ignore_result": True})
    each_tenant(app, "b", chain(quiet, report.set(ignore_result=False)), schedule=60, tenants=list)


WRONG_ARGUMENTS: dict[str, Any] = {
    "none": {},
    "too many": {"args": ("full", "long")},
    "misspelt": {"kwargs": {"knid": "full"}},
    "twice": {"args": ("full",), "kwargs": {"kind": "full"}},
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
@pytest.mark.parametrize("kind", ["task", "signature"])
def test_arguments_that_do_not_fit_the_task_are_refused_where_the_schedule_is_made(
    app: Celery, tasks: dict[str, Any], kind: str, arguments: dict[str, Any]
) -> None:
    app.finalize()
    task = tasks["report"] if kind == "task" else tasks["report"].s()

    with pytest.raises(TaskArgumentsError, match="task report is called as report"):
        each_tenant(app, "a", task, schedule=60, tenants=list, **arguments)

    each_tenant(app, "a", task, schedule=60, tenants=list, kwargs={"kind": "full"})


def test_arguments_that_do_not_fit_a_task_that_is_not_made_yet_are_refused_as_it_is_made(
    app: Celery, tasks: dict[str, Any]
) -> None:
    each_tenant(app, "a", tasks["report"], schedule=60, tenants=list, kwargs={"knid": "full"})
    assert not app.finalized

    with pytest.raises(TaskArgumentsError, match="knid"):
        app.finalize()


def test_a_part_of_a_chain_whose_arguments_do_not_fit_is_refused(app: Celery, tasks: dict[str, Any]) -> None:
    whole = chain(tasks["quiet"].si(), tasks["report"].si())

    with pytest.raises(TaskArgumentsError, match="report is called as"):
        each_tenant(app, "a", whole, schedule=60, tenants=list)


def test_an_application_that_is_not_configured_has_no_schedules_for_tenants() -> None:
    with Celery("bare", set_as_current=False) as bare, pytest.raises(NotConfiguredError, match="configure"):
        each_tenant(bare, "a", "task", schedule=60, tenants=list)
