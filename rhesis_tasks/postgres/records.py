"""What is asked of the records of tasks, statement by statement; knows nothing of Celery.

Each statement is one call of a function in ``sql/record_functions.sql``, committed by itself.  An organization of
``""`` is work that belongs to no tenant.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ..errors import DatabaseUnavailableError, MissingPrivilegeError
from ..settings import quote_identifier, redacted
from ..states import UNFINISHED, WAITING, State, Transition, delay, launch, revoke
from .connection import read_only
from .engines import READ_ONLY, run, shared_engine, transaction_engine, unavailable
from .schema import ensure_schema

__all__ = ["ChordPart", "Filter", "RecordTable", "StateChange", "TaskRecord", "is_lost", "launch_values"]

_log = logging.getLogger(__name__)

ATTEMPTS: Final = 4
"""How often a statement is tried on a connection that may be lost."""

_CHANGE_OF_PART: Final = (
    "SELECT is_last, CASE WHEN NOT is_last THEN {schema}.record_state(" + ", ".join(["%s"] * 25) + ") END AS stays "
    "FROM (SELECT {schema}.chord_part_ended(%s, %s, %s, %s, %s, %s) AS is_last OFFSET 0) part"
)

_ready: set[tuple[str, str]] = set()  # (URL, schema) whose tables were seen by this process


@dataclasses.dataclass(frozen=True, slots=True)
class TaskRecord:
    """Where a task is, as its tenant may see it."""

    task_id: str
    organization_id: str | None
    user_id: str | None
    name: str | None
    state: State
    custom_state: str | None  #: the application's own name for a running task's state, e.g. "PROGRESS"
    retries: int
    root_id: str | None
    parent_id: str | None
    queue: str | None
    worker: str | None
    result: Any  #: the return value, once it succeeded
    error_type: str | None
    error_message: str | None
    traceback: str | None
    failure_reason: str | None  #: why no other attempt was made
    progress_done: int | None  #: as the task reports it
    progress_total: int | None
    progress_message: str | None
    abort_requested_at: datetime.datetime | None  #: when somebody wanted it to stop early
    abort_requested_by: str | None  #: the user
    eta: datetime.datetime | None  #: not to be run before
    launched_at: datetime.datetime
    started_at: datetime.datetime | None  #: its first attempt
    last_started_at: datetime.datetime | None  #: its last one
    finished_at: datetime.datetime | None

    @classmethod
    def of(cls, row: Mapping[str, Any], result: Any = None) -> TaskRecord:
        """The record in a row, with the result as the caller has decoded it."""
        values = {field.name: row[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**values, "state": State(row["state"]), "result": result})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StateChange:
    """What is written when a task moves; what is None leaves what is known."""

    task_id: str
    transition: Transition
    user_id: str | None = None
    name: str | None = None
    custom_state: str | None = None
    retries: int = 0
    root_id: str | None = None
    parent_id: str | None = None
    queue: str | None = None
    worker: str | None = None
    result: bytes | None = None
    children: bytes | None = None
    args: bytes | None = None
    kwargs: bytes | None = None
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    failure_reason: str | None = None
    progress_done: int | None = None
    progress_total: int | None = None
    progress_message: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Filter:
    """Which of a tenant's tasks."""

    states: Sequence[State] | None = None
    name: str | None = None
    root_id: str | None = None
    launched_from: datetime.datetime | None = None
    launched_before: datetime.datetime | None = None


@dataclasses.dataclass(slots=True, eq=False)
class EndedPart:
    """A part of a chord that has ended."""

    organization_id: str  #: the chord's
    group_id: str
    task_id: str
    position: int | None
    state: str  #: Celery's
    result: bytes | None
    is_last: bool = False  #: whether all have; known once it is stored

    def values(self) -> tuple[Any, ...]:
        """What ``chord_part_ended`` takes."""
        return self.organization_id, self.group_id, self.task_id, self.position, self.state, self.result


@dataclasses.dataclass(frozen=True, slots=True)
class ChordPart:
    """What one part of a chord has returned."""

    task_id: str
    state: str  #: Celery's
    result: bytes | None


class RecordTable:
    """The records in one schema of a database.

    Args:
        url: a URL as :func:`~rhesis_tasks.settings.rendered` returns it.
        schema: the schema's name.
        answer_timeout: seconds for which an answer is waited for, and nothing is tried again after; None: until it
            comes.
    """

    def __init__(self, url: str, schema: str, answer_timeout: float | None = None) -> None:
        self.url = url
        self.schema = schema
        self._answer_timeout = answer_timeout
        self._prefix = f"{quote_identifier(schema)}."
        self._change_of_part = _CHANGE_OF_PART.format(schema=quote_identifier(schema))

    # --- tasks -------------------------------------------------------------------------------------------------

    def launch(
        self,
        organization_id: str,
        task_id: str,
        *,
        user_id: str | None,
        name: str | None,
        root_id: str,
        parent_id: str | None,
        eta: datetime.datetime | None = None,
    ) -> bool:
        """Record a launch; whether the task is new."""
        lineage = (root_id, parent_id)
        values = launch_values(organization_id, task_id, user_id, name, *lineage, eta, is_lazy=True)
        return bool(self._scalar("record_launch", values))

    def discard(self, organization_id: str, task_id: str) -> None:
        """Take back a launch, unless a worker has the task all the same."""
        self._scalar("record_discard", (organization_id, task_id, _array(WAITING)))

    def change(
        self, organization_id: str, change: StateChange, *, is_trusted: bool = True, part: EndedPart | None = None
    ) -> str | None:
        """Move a task; None, or the state that it stays in (``gone`` where it has no record any more).

        Args:
            organization_id: whose the record is.
            change: what is known of it.
            is_trusted: whether it may take the place of what is known of the task.
            part: stored in the same commit; if it turns out to be the last one, then nothing else is.
        """
        target = change.transition.target
        values = (
            organization_id,
            change.task_id,
            change.user_id,
            change.name,
            target.value,
            change.custom_state,
            change.retries,
            change.root_id,
            change.parent_id,
            change.queue,
            change.worker,
            change.result,
            change.children,
            change.args,
            change.kwargs,
            change.error_type,
            change.error_message,
            change.traceback,
            change.failure_reason,
            change.progress_done,
            change.progress_total,
            change.progress_message,
            target is State.STARTED,
            target not in UNFINISHED,
            _array(change.transition.sources) if is_trusted else "{}",
        )
        if part is None:
            stays: str | None = self._scalar("record_state", values)
            return stays
        [(part.is_last, stays)] = self._run(self._change_of_part, (*values, *part.values()))
        return stays

    def progress(
        self, organization_id: str, task_id: str, done: int | None, total: int | None, message: str | None
    ) -> bool:
        """Write a running task's progress, if ``done`` is given; whether somebody has asked it to stop."""
        return bool(
            self._scalar(
                "record_progress", (organization_id, task_id, done, total, message, _array(UNFINISHED)), attempts=1
            )
        )

    def abort(self, organization_id: str, task_id: str, by_user: str | None) -> bool:
        """Ask a task that has not ended to stop early; whether there is one."""
        return bool(self._scalar("record_abort", (organization_id, task_id, by_user, _array(UNFINISHED))))

    def cancel(
        self, organization_id: str, task_id: str, by_user: str | None, *, result: bytes, error: tuple[str, str]
    ) -> bool:
        """End a task that has not started, and take its message away; whether there is one."""
        values = (organization_id, task_id, by_user, revoke.target.value, result, *error, _array(WAITING))
        return bool(self._scalar("record_cancel", values))

    def wanted(self, organization_id: str, task_id: str, seconds: float) -> str:
        """Say that somebody waits for a task's end; its key on the channel."""
        return str(self._scalar("record_wanted", (organization_id, task_id, seconds)))

    def get(self, organization_id: str, task_id: str) -> dict[str, Any] | None:
        """One task's record."""
        rows = self._call("record_of", (organization_id, task_id))
        return rows[0] if rows else None

    def find(
        self, organization_id: str, which: Filter, limit: int, after: tuple[datetime.datetime, str] | None = None
    ) -> list[dict[str, Any]]:
        """Records, the latest launch first, from after a place on."""
        return self._call(
            "records_of",
            (
                organization_id,
                None if which.states is None else _array(frozenset(which.states)),
                which.name,
                which.root_id,
                which.launched_from,
                which.launched_before,
                *(after or (None, None)),
                limit,
            ),
        )

    def forget(self, organization_id: str, task_id: str) -> None:
        """Delete a record."""
        self._scalar("record_forget", (organization_id, task_id))

    def expire(self, before: datetime.datetime) -> int:
        """Delete a batch of what ended before; how many there were."""
        return int(self._scalar("expire_records", (before,)) or 0)

    # --- groups and chords -------------------------------------------------------------------------------------

    def save_group(self, organization_id: str, group_id: str, result: bytes) -> None:
        """Store which tasks a group has."""
        self._scalar("group_save", (organization_id, group_id, result))

    def get_group(self, organization_id: str, group_id: str) -> dict[str, Any] | None:
        """A group's row."""
        rows = self._call("group_of", (organization_id, group_id))
        return rows[0] if rows else None

    def forget_group(self, organization_id: str, group_id: str) -> None:
        """Delete a group's row."""
        self._scalar("group_forget", (organization_id, group_id))

    def size_chord(self, organization_id: str, group_id: str, size: int | None) -> None:
        """Say how many parts a chord has, besides those that its parts add."""
        self._scalar("chord_size", (organization_id, group_id, size, 0))

    def add_chord_part(self, organization_id: str, group_id: str, task_id: str) -> None:
        """Say that a part of a chord adds another one."""
        self._scalar("chord_add", (organization_id, group_id, task_id))

    def end_chord_part(self, part: EndedPart) -> bool:
        """Store what a part has returned; whether all have."""
        return bool(self._scalar("chord_part_ended", part.values()))

    @contextmanager
    def completing_chord(self, organization_id: str, group_id: str) -> Iterator[list[ChordPart]]:
        """The parts of a chord, for whoever launches its body in the block; nothing if that was done.

        If the block fails or the process ends in it, it was not.
        """
        with self.transaction() as connection:
            values = (organization_id, group_id)
            statement = self._statement("chord_complete", values, what="* FROM ")
            rows = connection.exec_driver_sql(statement, values)
            yield [ChordPart(**row) for row in rows.mappings()]

    def call_who_waits(self, organization_id: str, task_id: str) -> None:
        """Let those who wait for a task look again: it has come to be on record.

        What goes wrong is only logged: they look again by themselves after a while.
        """
        key = f"{self._prefix}result_key(%s, %s)"
        try:
            self._run(f"SELECT pg_notify({self._prefix}result_channel(), {key})", (organization_id, task_id), 1)
        except Exception as error:
            _log.debug("who waits for task %s was not called: %s", task_id, error)

    # --- how ---------------------------------------------------------------------------------------------------

    def channel(self) -> str:
        """Where those who wait are notified."""
        return str(self._scalar("result_channel", ()))

    def _scalar(self, function: str, values: Sequence[Any], *, attempts: int = ATTEMPTS) -> Any:
        [row] = self._run(self._statement(function, values), values, attempts)
        return row[0]

    def _call(self, function: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        return self._run(self._statement(function, values, what="* FROM "), values, as_dicts=True)

    def _statement(self, function: str, values: Sequence[Any], what: str = "") -> str:
        return f"SELECT {what}{self._prefix}{function}({', '.join(['%s'] * len(values))})"

    def _run(
        self, statement: str, values: Sequence[Any], attempts: int = ATTEMPTS, *, as_dicts: bool = False
    ) -> list[Any]:
        """What one statement returns, in a transaction of its own; tried again if the connection was lost.

        Raises:
            AnswerTimeoutError: the server does not answer.
            DatabaseUnavailableError: the server cannot be reached, or is read-only.
            MissingPrivilegeError: the login may not do this.
        """
        end = math.inf if self._answer_timeout is None else time.monotonic() + self._answer_timeout
        for attempt in range(attempts):
            try:
                with _explaining(engine := self._engine()):
                    return run(engine, statement, values, as_dicts=as_dicts, timeout=self._answer_timeout)
            except Exception as error:
                if attempt == attempts - 1 or not is_lost(error) or time.monotonic() >= end:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection in a transaction that is committed at the end of the block.

        If the block fails or the process ends in it, it is rolled back.
        """
        self._engine()  # which sees that its tables are there
        engine = transaction_engine(self.url)
        with _explaining(engine), _connected(engine) as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                connection.invalidate()  # which rolls back
                raise

    def _engine(self) -> Engine:
        engine = shared_engine(self.url)
        if (self.url, self.schema) not in _ready:
            _connected(engine).close()  # so that an unreachable server is an error of ours here, too
            ensure_schema(engine, self.schema)
            _ready.add((self.url, self.schema))
        return engine


@contextmanager
def _explaining(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if state == READ_ONLY:
            raise DatabaseUnavailableError(read_only(engine.url), url=redacted(engine.url)) from None
        if state == "42501" and isinstance(error, ProgrammingError):
            raise MissingPrivilegeError(
                f"{redacted(engine.url)}: {str(error.orig).partition(chr(10))[0]}.  Let the owner run "
                "`rhesis-tasks schema create --role THIS_LOGIN`, which grants what is new, too"
            ) from None
        raise


def launch_values(
    organization_id: str,
    task_id: str,
    user_id: str | None,
    name: str | None,
    root_id: str,
    parent_id: str | None,
    eta: datetime.datetime | None,
    *,
    is_lazy: bool,
) -> tuple[Any, ...]:
    """What ``record_launch`` takes; a lazy one is not on the disk yet when it returns."""
    transition = launch if eta is None else delay
    state = (transition.target.value, eta, _array(transition.sources), is_lazy)
    return (organization_id, task_id, user_id, name, root_id, parent_id, *state)


def is_lost(error: BaseException) -> bool:
    """Whether a statement may succeed on another connection."""
    return isinstance(error, OperationalError | InterfaceError | DatabaseUnavailableError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def _connected(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except (OperationalError, PoolTimeoutError) as error:
        raise unavailable(engine, getattr(error, "orig", None) or error) from None


@functools.lru_cache
def _array(states: frozenset[State]) -> str:
    """Names of states as PostgreSQL writes an array, which costs psycopg less than a list."""
    return "{" + ",".join(sorted(states)) + "}"
