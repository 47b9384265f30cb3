"""What operators ask of the queues and records, across tenants, call by call; usable without Celery.

Each call is one of a function in ``sql/operation_functions.sql``.  What changes something is done in batches, each in
one transaction with its audit record.
"""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from ..states import UNFINISHED, WAITING, State, replay, revoke
from .records import RecordTable, is_lost

__all__ = [
    "AuditRecord",
    "Held",
    "MessageCount",
    "MessageFilter",
    "MessageInfo",
    "MessageState",
    "OperationTable",
    "Removed",
    "Replayed",
    "login_name",
]

ATTEMPTS: Final = 4
"""How often a batch is tried that met somebody else halfway (a deadlock), or whose connection was lost."""

PATIENCE: Final = 20
"""Seconds for which a transaction may wait for something else; then it is rolled back, and tried again."""


class MessageState(StrEnum):
    """Where a message is."""

    WAITING = "waiting"  #: to be claimed by whoever comes first
    DELAYED = "delayed"  #: not to be claimed before its time
    RUNNING = "running"  #: claimed by a worker, which runs the task or is about to
    DEAD = "dead"  #: given up: a dead letter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MessageFilter:
    """Which messages an operator means; what is None is not looked at, and without anything it is all of them.

    Messages that are no task's (events, remote control and its answers) are meant only where their queue is named.
    """

    organization_id: str | None = None  #: "" is work that belongs to no tenant
    user_id: str | None = None
    task_name: str | None = None
    queue: str | None = None
    task_id: str | None = None
    states: Sequence[MessageState] | None = None
    older_than: float | None = None  #: seconds since they were published
    published_before: datetime.datetime | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it means all messages, but for their states."""
        return not {name for name in self.values() if name != "states"}

    def values(self) -> dict[str, Any]:
        """What it names, as JSON has it."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["states"] = None if self.states is None else [MessageState(state).value for state in self.states]
        if self.published_before is not None:
            found["published_before"] = self.published_before.astimezone(datetime.UTC).isoformat()
        return {name: value for name, value in found.items() if value is not None}

    def of(self, *states: MessageState) -> MessageFilter:
        """The same, of those in these states that it means."""
        return dataclasses.replace(self, states=[each for each in states if self.states is None or each in self.states])


@dataclasses.dataclass(frozen=True, slots=True)
class MessageInfo:
    """A message or dead letter, without its arguments."""

    id: int
    state: MessageState
    queue: str
    priority: int
    deliveries: int  #: how often it was delivered, the one that goes on included
    organization_id: str | None
    user_id: str | None
    task_id: str | None
    task_name: str | None
    worker: str | None  #: who has claimed it, as far as that is known
    reason: str | None  #: why its last delivery was in vain, or why it was given up
    published_at: datetime.datetime
    due_at: datetime.datetime | None
    expires_at: datetime.datetime | None
    claimed_at: datetime.datetime | None
    died_at: datetime.datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class MessageCount:
    """How many messages of one queue, organization, user or task are in one state."""

    name: str | None  #: the queue's, organization's, user's or task's
    state: MessageState
    number: int
    oldest: datetime.datetime  #: when the oldest of them was published


@dataclasses.dataclass(frozen=True, slots=True)
class Removed:
    """A message that was deleted."""

    id: int
    state: MessageState  #: what it was in; RUNNING was claimed at this moment, and is there
    organization_id: str | None
    task_id: str | None
    envelope: str | None  #: JSON, of a part of a canvas that is to be told
    body: bytes | None


@dataclasses.dataclass(frozen=True, slots=True)
class Replayed:
    """A dead letter that was looked at."""

    id: int
    task_id: str | None
    is_replayed: bool  #: False if its task has ended otherwise
    is_recorded: bool  #: whether its record says so


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A message that is claimed, and whose task was asked to stop."""

    id: int
    organization_id: str | None
    task_id: str
    is_ended: bool  #: it had not begun, and never will
    is_asked: bool  #: it had, and ``should_abort()`` says so


@dataclasses.dataclass(frozen=True, slots=True)
class AuditRecord:
    """What an operator did."""

    id: int
    operation: UUID
    action: str
    operator: str  #: as they named themselves
    login: str  #: the database login
    filter: Mapping[str, Any]
    counts: Mapping[str, int]
    at: datetime.datetime


class OperationTable(RecordTable):
    """The queues and records in one schema of a database, for operators.

    Args:
        url, schema: as for :class:`RecordTable`.
        has_records: whether the records there are those of the messages; if not, none is touched.
    """

    def __init__(self, url: str, schema: str, *, has_records: bool) -> None:
        super().__init__(url, schema)
        self.has_records = has_records

    def _states(self, states: Iterable[State]) -> list[str]:
        return [state.value for state in states] if self.has_records else []

    # --- looking -----------------------------------------------------------------------------------------------

    def messages(self, which: MessageFilter, limit: int | None, after: int | None = None) -> list[MessageInfo]:
        """Messages and dead letters, the oldest first, from behind an id on."""
        rows = self._call("operation_messages", (_json(which), -1 if after is None else after, limit))
        return [MessageInfo(**{**row, "state": MessageState(row["state"])}) for row in rows]

    def now(self) -> datetime.datetime:
        """The time by the server's clock, which says when messages are published."""
        [row] = self._run("SELECT clock_timestamp()", ())
        found: datetime.datetime = row[0]
        return found

    def count(self, which: MessageFilter) -> dict[MessageState, int]:
        """How many there are in each state."""
        rows = self._call("operation_count", (_json(which),))
        found = {MessageState(row["state"]): int(row["number"]) for row in rows}
        return {state: found.get(state, 0) for state in MessageState if which.states is None or state in which.states}

    def summary(self, which: MessageFilter, by: str) -> list[MessageCount]:
        """The same for each value of a column."""
        rows = self._call("operation_summary", (_json(which), by))
        return [MessageCount(**{**row, "state": MessageState(row["state"])}) for row in rows]

    def records_of_id(self, task_id: str) -> list[dict[str, Any]]:
        """The records of one id, in whichever organizations."""
        return self._call("operation_records", (task_id,))

    def count_records(self, organization_id: str) -> tuple[int, int]:
        """How many records of tasks and of groups an organization has."""
        [row] = self._call("operation_count_records", (organization_id,))
        return int(row["tasks"]), int(row["groups"])

    def audit_records(self, limit: int, before: int | None = None) -> list[AuditRecord]:
        """What operators did, the latest first."""
        rows = self._call("operation_notes", (before, limit))
        return [AuditRecord(**{**row, "counts": {k: int(v) for k, v in row["counts"].items()}}) for row in rows]

    # --- changing ----------------------------------------------------------------------------------------------

    def remove(self, transaction: Connection, which: MessageFilter, after: int, limit: int) -> list[Removed]:
        """Delete a batch of what is not claimed; of parts of a canvas the messages are returned."""
        rows = self._within(transaction, "operation_remove", (_json(which), after, limit, self.has_records))
        return [Removed(**{**row, "state": MessageState(row["state"])}) for row in rows]

    def end(self, transaction: Connection, removed: Sequence[Removed], *, operator: str, text: str) -> int:
        """Revoke the tasks of messages that were removed, with this text; how many."""
        if not self.has_records:
            return 0
        values = ([each.organization_id for each in removed], [each.task_id for each in removed])
        ended = (revoke.target.value, *error_of(text), self._states(WAITING), self._states(UNFINISHED))
        [row] = self._within(transaction, "operation_end", (*values, actor(operator), *ended))
        return int(next(iter(row.values())))

    def go_on(self, transaction: Connection) -> None:
        """Say that a transaction is still wanted, which otherwise ends after a while."""
        transaction.exec_driver_sql("SELECT")

    def replay(self, transaction: Connection, which: MessageFilter, after: int, limit: int) -> list[Replayed]:
        """Put a batch of dead letters back into their queues."""
        unended = UNFINISHED if self.has_records else State  # what is there is not theirs
        states = (replay.target.value, self._states(replay.sources), [state.value for state in unended])
        return [
            Replayed(**row)
            for row in self._within(transaction, "operation_replay", (_json(which), after, limit, *states))
        ]

    def stop_running(self, transaction: Connection, which: MessageFilter, *, operator: str, text: str) -> list[Held]:
        """Ask the tasks of claimed messages to stop; those that have not begun are revoked."""
        ended = (revoke.target.value, *error_of(text), self._states(WAITING))
        rows = self._within(
            transaction, "operation_stop", (_json(which), actor(operator), self._states(UNFINISHED), *ended)
        )
        return [Held(**row) for row in rows]

    def forget_organization(self, transaction: Connection, organization_id: str, limit: int) -> tuple[int, int]:
        """Delete a batch of an organization's records; how many of tasks and of groups went."""
        [row] = self._within(transaction, "operation_forget", (organization_id, limit))
        return int(row["tasks"]), int(row["groups"])

    def note(
        self, transaction: Connection, operation: UUID, action: str, operator: str, which: MessageFilter,
        counts: Mapping[str, int],
    ) -> None:  # fmt: skip
        """Write an audit record."""
        values = (operation, action, operator, _json(which), json.dumps(counts))
        self._within(transaction, "operation_note", values)

    def in_transaction(self, step: Callable[[Connection], Any]) -> Any:
        """Do a step in a transaction; once more if it met somebody else halfway, or the connection was lost before.

        Raises:
            DatabaseUnavailableError: the server cannot be reached, or is read-only.
            MissingPrivilegeError: the login may not do this.
        """
        for attempt in range(ATTEMPTS):
            try:
                with self.transaction() as transaction:
                    # What is asked by another connection meanwhile may wait for somebody who waits for this one, and a
                    # process that is suspended would keep its rows from everybody.
                    transaction.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{PATIENCE}s'")
                    return step(transaction)
            except Exception as error:
                met = isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "40P01"
                if attempt == ATTEMPTS - 1 or not (met or is_lost(error)):
                    raise
            time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable")

    def _within(self, transaction: Connection, function: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        statement = self._statement(function, values, what="* FROM ")
        return [dict(row) for row in transaction.exec_driver_sql(statement, tuple(values)).mappings()]


def error_of(text: str) -> tuple[str, str]:
    """Type and message of what a revoked task has ended with."""
    return "TaskRevokedError", text


def actor(operator: str) -> str:
    """Who cancelled a task, as its record says: no user of the tenant's."""
    return f"operator {operator}"


def login_name() -> str:
    """Who runs this process: the operator, unless told otherwise."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _json(which: MessageFilter) -> str:
    return json.dumps(which.values())
