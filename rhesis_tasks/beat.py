"""Schedules that run a task for each tenant, each run in its tenant's context.

Beat publishes one message at each tick and does nothing else.  A worker that gets it asks who the tenants are, and
launches the task for each of them.  What was launched is written down (:mod:`rhesis_tasks.postgres.schedules`), so that
a tick is run once for each tenant, however many beats there are and whatever is killed in between; and a tenant whose
last run has not ended is skipped.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import logging
import math
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from celery.canvas import Signature
from celery.local import PromiseProxy, Proxy
from celery.schedules import BaseSchedule, crontab, maybe_schedule
from celery.schedules import schedule as interval
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Executable, Row, text
from sqlalchemy.exc import DBAPIError
from typing_extensions import override

from .canvas import COMPOSITES, last_task, parts
from .context import TenantContext
from .errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidTenantError,
    NotConfiguredError,
    NotSupportedError,
    TaskArgumentsError,
    TenantLaunchError,
)
from .launch import check_arguments, configured_app, ignores_result, launch, misspelt_option
from .postgres.schedules import ScheduleTable
from .propagation import is_installed
from .retry import RetryPolicy
from .sessions import sessions_of
from .task import BaseTask

if TYPE_CHECKING:
    from celery import Celery, Task

__all__ = ["TASK_NAME", "Tenants", "each_tenant"]

TASK_NAME: Final = "rhesis_tasks.each_tenant"
"""The task that beat publishes, for ``task_routes`` and the like."""

Tenants: TypeAlias = str | Executable | Callable[[], Iterable[Any]]
"""Where the tenants come from: a SELECT, as SQLAlchemy's or as text, or a function that is called by the worker."""

_BATCH: Final = 100  # tenants that are decided about in one transaction
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE: Final = timedelta(minutes=1)
_LOOK_BACK: Final = 10 * 366 * 24 * 60  # minutes: a crontab for the 29th of February may be due every eight years
_NAMESPACE: Final = uuid.UUID("6b6d6dc8-6a0a-5a62-9a2c-0d8f7a0e6c11")  # of the ids of runs
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _TenantSchedule:
    """What was asked of :func:`each_tenant`."""

    name: str
    task: Any
    schedule: BaseSchedule
    tenants: Tenants
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]
    spread: float
    lost_after: float


_schedules: weakref.WeakKeyDictionary[Celery, dict[str, _TenantSchedule]] = weakref.WeakKeyDictionary()


def each_tenant(
    app: Celery,
    name: str,
    task: Task[Any, Any] | Signature[Any] | str,
    *,
    schedule: BaseSchedule | timedelta | float,
    tenants: Tenants,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    spread: float = 0.0,
    lost_after: float = 86_400.0,
) -> None:
    """Run a task for each tenant at each tick of a schedule.  Adds an entry to the application's ``beat_schedule``.

    Call it where the tasks are defined, so that beat and workers both know the schedule.

    Args:
        app: a configured application, whose results are in PostgreSQL.
        name: the entry's name, unique within the application; what was launched is remembered by it.
        task: a task, its name, or a signature: a chain or a chord counts as running until its last task has ended.
        schedule: a ``crontab``, or the seconds between two ticks.  An interval's ticks are at its multiples since 1970.
        tenants: whom for: a SELECT of organizations (and, in further columns, their users and projects), or a function
            that returns organizations or TenantContexts.  See docs/scheduling.md for whose eyes it is read with.
        args: positional arguments of each run.
        kwargs: keyword arguments of each run.
        options: Celery's options of each run: ``queue``, ``expires`` (seconds), ``priority``, ...
        spread: seconds over which the runs of a tick are spread; a tenant has the same place at each tick.
        lost_after: where the broker is not the database of the results: seconds after which a run that has not ended
            counts as lost, and no more keeps its tenant from being launched for.

    Raises:
        ConfigurationError: something of it cannot be, or the name is taken.
        TaskArgumentsError: the arguments do not fit the task.  Raised as the application is completed, if the task is
            made then.
        NotConfiguredError: the application was not configured.
    """
    if not is_installed(app):
        raise NotConfiguredError(
            f"application {app.main!r} is not configured.  Call configure(app, ...) before each_tenant(app, ...)"
        )
    known = _schedules.setdefault(app, {})
    wanted = _TenantSchedule(
        name=_checked_name(name, known),
        task=_checked_task(task),
        schedule=_checked_schedule(schedule, app),
        tenants=_checked_tenants(tenants),
        args=_checked_args(args),
        kwargs=_checked_kwargs(kwargs),
        options=_checked_options(options or {}, spread),
        spread=_seconds("spread", spread, 0.0),
        lost_after=_seconds("lost_after", lost_after, 1.0),
    )
    period = _period(wanted.schedule)
    if period is not None and wanted.spread >= period.total_seconds():
        raise ConfigurationError(
            f"spread={spread:g} is not shorter than the period of schedule {name!r}, so that runs would wait for the "
            "next tick, and be skipped there"
        )
    _when_made(task, lambda: _check_runs(wanted))
    if not known:
        app.task(name=TASK_NAME, base=_EachTenant, bind=True, shared=False)(_launch_for_each)
    known[name] = wanted
    app.add_periodic_task(
        wanted.schedule,
        app.signature(TASK_NAME, kwargs={"schedule_name": name}),
        name=name,
    )


def _checked_name(name: str, known: Mapping[str, object]) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ConfigurationError(f"the name of a schedule is a text, not {name!r}")
    if name in known:
        raise ConfigurationError(f"there is a schedule {name!r} already.  What was launched is remembered by its name")
    return name


def _checked_task(task: Any) -> Any:
    if isinstance(task, Proxy):
        return task  # of @app.task, which is not to be made a task before the application is complete
    if isinstance(task, Signature) and last_task(task) is None:
        raise ConfigurationError("a group never ends as a whole.  Give it a last task: make it a chord")
    if not isinstance(task, str | Signature) and not hasattr(type(task), "apply_async"):
        raise ConfigurationError(f"a schedule runs a task, its name or a signature, not {type(task).__name__}")
    return task


def _checked_schedule(given: BaseSchedule | timedelta | float, app: Celery) -> BaseSchedule:
    found: Any = None
    if isinstance(given, int | float | timedelta | BaseSchedule):
        found = maybe_schedule(given, app=app)  # type: ignore[arg-type]  # no int is a Number for mypy
    if not isinstance(found, crontab | interval):
        raise ConfigurationError(
            f"a schedule for each tenant is a crontab or an interval, not {type(given).__name__}: of others it cannot "
            "be told when they were due before"
        )
    period = _period(found)
    if period is not None and period <= timedelta(0):
        raise ConfigurationError(f"the period of a schedule is longer than nothing, unlike {period}")
    return found


def _checked_tenants(tenants: Tenants) -> Tenants:
    if inspect.iscoroutinefunction(tenants) or inspect.isasyncgenfunction(tenants):
        raise ConfigurationError("tenants= is a plain function, not async def: nothing awaits it")
    if not isinstance(tenants, str | Executable) and not callable(tenants):
        raise ConfigurationError(f"tenants= is a SELECT or a function, not {type(tenants).__name__}")
    return tenants


def _checked_args(args: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(args, str | bytes) or not isinstance(args, Iterable):
        raise ConfigurationError(f"args= is a list or tuple of arguments, not {type(args).__name__}: args=({args!r},)")
    return tuple(args)


def _checked_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigurationError(f"kwargs= is a mapping of arguments by their names, not {type(kwargs).__name__}")
    return dict(kwargs or {})


def _when_made(task: Any, call: Callable[[], None]) -> None:
    """Call something once a task is made: now, or as the application is completed.

    Not at all if only its name is known, or it is one of any application (``shared_task``).
    """
    kind = type(task)  # since isinstance() would make it
    if issubclass(kind, PromiseProxy):
        task.__then__(call)
    elif not issubclass(kind, str | Proxy):
        call()


def _check_runs(schedule: _TenantSchedule) -> None:
    """Refuse what each run would trip over, as far as its tasks are known while the application is not complete."""
    signature = _signature(schedule.task)
    made = ((part.signature["task"], getattr(part.signature, "_type", None)) for part in parts(signature))
    tasks = {name: task for name, task in made if task is not None}  # without those of which the name is known only
    check_arguments(signature, schedule.args, schedule.kwargs, tasks)
    _check_end(schedule, tasks)


def _signature(task: Task[Any, Any] | Signature[Any]) -> Signature[Any]:
    return task.clone() if isinstance(task, Signature) else task.signature((), {})


def _check_end(schedule: _TenantSchedule, tasks: Mapping[str, Task[Any, Any]]) -> None:
    """Raise ConfigurationError for a chain or chord of which there would be no record that says when it has ended."""
    task = schedule.task
    if not isinstance(task, Signature) or task.get("subtask_type") not in COMPOSITES:
        return
    last = last_task(task)
    if last is not None and (schedule.options.get("ignore_result") or ignores_result(last, tasks.get(last["task"]))):
        raise ConfigurationError(
            f"schedule {schedule.name!r} runs a chain or chord whose last task, {last['task']}, ignores its result, so "
            "that there is no record of when it has ended.  Let it keep its result, or another task be the last one"
        )


def _checked_options(options: Mapping[str, Any], spread: float) -> dict[str, Any]:
    taken = {"task_id", "headers", *(("countdown", "eta") if spread else ())} & set(options)
    if taken:
        raise ConfigurationError(f"the options of a schedule for each tenant cannot have {', '.join(sorted(taken))}")
    if wrong := misspelt_option(options):
        raise ConfigurationError(wrong)
    return dict(options)


def _seconds(name: str, value: float, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ConfigurationError(f"{name} is a number of seconds of {least:g} or more, not {value!r}")
    return float(value)


def _period(schedule: Any) -> timedelta | None:
    """Of an interval; a crontab has none."""
    return getattr(schedule, "run_every", None)


# --- ticks ---------------------------------------------------------------------------------------------------------


def latest_tick(schedule: Any, at: datetime) -> datetime:
    """When a schedule was due the last time, up to a time; the same in all processes, whenever they were started."""
    at = at.astimezone(UTC)
    period = _period(schedule)
    if period is not None:
        return _EPOCH + (at - _EPOCH) // period * period
    this_minute = at.replace(second=0, microsecond=0)
    timetable = copy.copy(schedule)

    def due_since(minutes: int) -> datetime | None:
        """The first time that it was due after so many minutes ago, if that is past."""
        begin = (this_minute - minutes * _MINUTE).astimezone(timetable.tz)  # Celery 5.6 does not convert it
        timetable.nowfun = lambda: begin  # and knows the hours of today only
        since, delta, _ = timetable.remaining_delta(begin)
        due: datetime = (since + delta).astimezone(UTC)
        return due if due <= this_minute else None

    # How many minutes ago one has to begin to look: at least so many as not to find anything plus one.
    enough = 1
    while due_since(enough) is None:
        if enough > _LOOK_BACK:
            return this_minute  # never yet
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if due_since(middle) is None:
            too_few = middle
        else:
            enough = middle
    return due_since(enough) or this_minute


def tick_to_run(schedule: BaseSchedule, due: datetime | None, at: datetime) -> datetime:
    """The tick that a message is about, which was due at a time and came at another.

    Two ticks later it is about the latest: those in between are not made up for.
    """
    latest = latest_tick(schedule, at)
    if due is not None and due >= latest_tick(schedule, latest - timedelta(microseconds=1)):
        return due
    return latest


# --- in the worker -------------------------------------------------------------------------------------------------


class _EachTenant(BaseTask):
    """The task that launches a schedule's task for each tenant.  Delivered twice or tried again, it goes on."""

    abstract = True
    system: ClassVar[bool] = True
    retry_policy = RetryPolicy(
        max_retries=3, base=2.0, cap=60.0, retry_on=(DBAPIError, ConnectionError, BrokerError, TenantLaunchError)
    )
    retry_on_worker_lost = True
    default_retry_delay = 2

    @override
    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """As BaseTask's; by beat, which says now for which tick it is."""
        kwargs = dict(kwargs or {})
        found = _schedules.get(self.app, {}).get(kwargs.get("schedule_name", ""))
        if found is not None:
            _table(self.app, found)  # which raises what would come to nothing in a worker
            kwargs.setdefault("due_at", latest_tick(found.schedule, datetime.now(UTC)).isoformat())
        return super().apply_async(args, kwargs, *more, **options)


def _launch_for_each(self: BaseTask, schedule_name: str, due_at: str | None = None) -> dict[str, Any]:
    """Launch a schedule's task for each tenant that it was not launched for at this tick."""
    found = _schedules.get(self.app, {}).get(schedule_name)
    if found is None:
        raise NotConfiguredError(
            f"this worker knows no schedule {schedule_name!r}.  Call each_tenant(...) in a module that workers import"
        )
    due = tick_to_run(found.schedule, None if due_at is None else datetime.fromisoformat(due_at), datetime.now(UTC))
    try:
        return _Fanout(self.app, found, due).run()
    except TenantLaunchError:
        raise  # which names it
    except Exception as error:
        # All schedules are this one task.  What the error says is for redact= to see, so it is in the traceback alone.
        _log.error("schedule %s at %s ends with %s", schedule_name, due.isoformat(), type(error).__name__)
        error.add_note(f"(schedule {schedule_name!r} at {due.isoformat()})")
        raise


class _Fanout:
    """One tick of a schedule, in a worker."""

    def __init__(self, app: Celery, schedule: _TenantSchedule, due: datetime) -> None:
        self._app = app
        self._schedule = schedule
        self._due = due
        self._key = f"{app.main or ''}/{schedule.name}"
        self._table = _table(app, schedule)
        self._counts = dict.fromkeys(("launched", "skipped", "decided", "failed"), 0)
        self._failures: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """What has become of its tenants, in numbers.

        Raises:
            TenantLaunchError: it could not be launched for some of them.
            DBAPIError, ConnectionError, BrokerError: for no one, or no one else.
            ConfigurationError: there is no such task, or the tenants are none.
        """
        _require_task(self._app, self._schedule)
        due = self._due.isoformat()
        if self._table.is_finished(self._key, self._due):
            _log.info("schedule %s: the tick of %s was run before", self._schedule.name, due)
            return {"due_at": due, **self._counts}
        with _read(self._app, self._schedule) as rows:
            tenants = self._tenants(rows)
            while batch := dict(islice(tenants, _BATCH)):
                self._launch(batch)
        counts = self._counts | {"failed": len(self._failures)}
        told = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        _log.info("schedule %s at %s: %s", self._schedule.name, due, told or "there are no tenants")
        if self._failures:
            raise TenantLaunchError(
                f"schedule {self._schedule.name} could not be launched for {len(self._failures)} of "
                f"{sum(counts.values())} tenants; the first: {next(iter(self._failures.values()))}",
                failures=self._failures,
            )
        self._table.finish(self._key, self._due)
        return {"due_at": due, **counts}

    def _tenants(self, rows: Iterable[Any]) -> Iterator[tuple[str, TenantContext]]:
        """Those that are tenants; the first of each organization."""
        seen: set[str] = set()
        for row in rows:
            try:
                tenant = _tenant(row)
            except InvalidTenantError as error:
                self._fail(f"{row!r}", error)
                continue
            if tenant.organization_id not in seen:
                seen.add(tenant.organization_id)
                yield tenant.organization_id, tenant

    def _launch(self, tenants: Mapping[str, TenantContext]) -> None:
        ids = {each: self._task_id(each) for each in tenants}
        with self._table.step(self._key, self._due, ids) as step:
            for organization_id, verdict in step.verdicts.items():
                if verdict == "free":
                    try:
                        self._launch_one(tenants[organization_id], ids[organization_id])
                    except (DatabaseUnavailableError, BrokerError, TaskArgumentsError):
                        raise  # as it would be for the others
                    except Exception as error:
                        self._fail(str(tenants[organization_id]), error)
                        continue
                    step.launched[organization_id] = ids[organization_id]
                    self._counts["launched"] += 1
                elif verdict == "running":
                    self._counts["skipped"] += 1
                    _log.warning(
                        "schedule %s: %s is skipped at %s, since its last run has not ended",
                        self._schedule.name,
                        tenants[organization_id],
                        self._due.isoformat(),
                    )
                else:
                    self._counts["decided"] += 1

    def _launch_one(self, tenant: TenantContext, task_id: str) -> None:
        schedule = self._schedule
        options = {**schedule.options, "task_id": task_id}
        if schedule.spread:
            eta = self._due + timedelta(seconds=schedule.spread * _place(self._key, tenant.organization_id))
            if eta > datetime.now(UTC):
                options["eta"] = eta
        signature = _signature(self._app.tasks[schedule.task] if isinstance(schedule.task, str) else schedule.task)
        if signature.get("subtask_type") not in COMPOSITES:
            # Not one of thousands of children of a task of nobody's.
            options |= {"root_id": task_id, "add_to_parent": False}
        launch(configured_app(signature), signature, schedule.args, dict(schedule.kwargs), tenant, options)

    def _task_id(self, organization_id: str) -> str:
        """The same whenever it is asked for."""
        return str(uuid.uuid5(_NAMESPACE, "\0".join((self._key, self._due.isoformat(), organization_id))))

    def _fail(self, tenant: str, error: Exception) -> None:
        self._failures[tenant] = f"{tenant}: {type(error).__name__}: {error}"
        _log.error("schedule %s could not be launched for %s", self._schedule.name, tenant, exc_info=error)


def _table(app: Celery, schedule: _TenantSchedule) -> ScheduleTable:
    backend: Any = app.backend
    if not hasattr(backend, "record_launch"):
        raise NotSupportedError(
            f"schedule {schedule.name!r} remembers what it has launched next to the results, which are not in "
            "PostgreSQL.  Set DATABASE_URL, or result_backend= to PostgreSQL"
        )
    _check_end(schedule, app.tasks)
    # What is delivered until it is done, and is one message, runs as long as there is that message.
    task = app.tasks.get(schedule.task) if isinstance(schedule.task, str) else schedule.task
    if isinstance(task, Signature):
        task = None if task.get("subtask_type") in COMPOSITES else app.tasks.get(task["task"])
    has_messages = bool(task is not None and task.acks_late and backend.has_messages)
    return ScheduleTable(backend.records, has_messages=has_messages, lost_after=schedule.lost_after)


def _require_task(app: Celery, schedule: _TenantSchedule) -> None:
    """Raise NotConfiguredError if a task that is given by its name is not there, for whichever tenant."""
    if isinstance(schedule.task, str) and schedule.task not in app.tasks:
        raise NotConfiguredError(
            f"schedule {schedule.name!r} runs {schedule.task!r}, and this worker knows no task of that name.  Have it "
            "import the module that defines the task (imports= or include= of the application)"
        )


def _place(key: str, organization_id: str) -> float:
    """Where a tenant is among all of a schedule: the same at each tick, from 0 up to 1."""
    digest = hashlib.sha256(f"{key}\0{organization_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


@contextmanager
def _read(app: Celery, schedule: _TenantSchedule) -> Iterator[Iterable[Any]]:
    """What the query returns: all of it, so that no transaction is open while thousands are launched."""
    query = schedule.tenants
    if not isinstance(query, str | Executable):
        yield _listed(query(), schedule)
        return
    statement = text(query) if isinstance(query, str) else query
    sessions = sessions_of(app)
    if sessions.has_system:
        with sessions.system_session(reason=f"the tenants of schedule {schedule.name}", readonly=True) as db:
            rows = db.execute(statement).all()
    else:
        with sessions.engine.connect() as connection:
            rows = connection.execute(statement).all()
    if not rows:
        _log.warning(
            "schedule %s: the query finds no tenants.  If its table is under row-level security, it takes "
            "TenantSessions(..., system=...) to see it",
            schedule.name,
        )
    yield rows


def _listed(tenants: Any, schedule: _TenantSchedule) -> Iterable[Any]:
    """What a function has returned, if that is tenants."""
    if isinstance(tenants, str | bytes) or not isinstance(tenants, Iterable):
        raise ConfigurationError(
            f"the function of schedule {schedule.name!r} returned {type(tenants).__name__}.  Let it return a list of "
            "tenants, also if there is one or none, or yield them"
        )
    return tenants


def _tenant(row: Any) -> TenantContext:
    """A tenant, of what a query or a function gives for one."""
    if isinstance(row, TenantContext):
        return row
    if isinstance(row, Row | tuple | list):
        if not 1 <= len(row) <= 3:
            raise InvalidTenantError(
                f"a tenant is an organization, a user and a project at most, not {len(row)} values", value=tuple(row)
            )
        return TenantContext(*row)
    return TenantContext(row)
