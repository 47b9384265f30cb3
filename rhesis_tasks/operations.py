"""What an operator sees of all tenants' messages, and does to them.

In contrast to :mod:`rhesis_tasks.status` nothing here looks at the active tenant: it is for those who run the system,
with a database login that may run workers.  Needs the broker on PostgreSQL.  Where results are kept in another database
or another kind of backend, no record is touched, and :attr:`Operation.records` is None.

What changes something takes ``operator``, a name for the audit record that is written in the same transaction, and
does nothing but count unless ``dry_run=False``.  It goes in batches: interrupted, what was done until then is done.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from celery.app.task import Context
from kombu.message import Message
from kombu.serialization import prepare_accept_content

from .context import TenantContext, exactly
from .errors import ConfigurationError, NotSupportedError
from .headers import carried_by, decode
from .postgres.operations import (
    AuditRecord,
    MessageCount,
    MessageFilter,
    MessageInfo,
    MessageState,
    OperationTable,
    Removed,
    actor,
    login_name,
)
from .propagation import signer_of
from .settings import database_url, rendered
from .states import TERMINAL, State
from .status import stop_tasks

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection

    from .postgres.records import TaskRecord

__all__ = [
    "AuditRecord",
    "MessageCount",
    "MessageFilter",
    "MessageInfo",
    "MessageState",
    "Operation",
    "audit_records",
    "count",
    "dead_letters",
    "find_records",
    "login_name",
    "messages",
    "offboard",
    "purge",
    "replay",
    "revoke",
    "summary",
    "terminate",
]

BATCH: Final = 1000
"""How many messages are changed in one transaction."""

UNHELD: Final = (MessageState.WAITING, MessageState.DELAYED)

_log = logging.getLogger("rhesis_tasks.audit")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What an operation came to, or would."""

    action: str
    operator: str
    filter: MessageFilter
    is_dry_run: bool
    id: uuid.UUID  #: its audit records'
    counted_at: datetime.datetime  #: by the database's clock; what is published from then on may not be in ``before``
    before: Mapping[MessageState, int]  #: how many messages the filter meant
    after: Mapping[MessageState, int]  #: and does now
    counts: Mapping[str, int]  #: what was done, or would be, as the audit record says it
    records: int | None  #: how many tasks' records were changed; None if they are elsewhere

    @property
    def found(self) -> bool:
        """Whether there was anything to do."""
        return any(self.counts.values())


def messages(
    app: Celery, which: MessageFilter | None = None, *, limit: int = 50, after: int | None = None
) -> list[MessageInfo]:
    """Messages that wait, are delayed or are claimed, and dead letters; without bodies, the oldest first.

    Args:
        app: the application on whose broker they are.
        which: which ones; by default all.
        limit: how many at most.
        after: the id of the last one that was seen, to go on behind it.

    Raises:
        NotSupportedError: the broker is not PostgreSQL.
        DatabaseUnavailableError: the server cannot be reached.
        MissingPrivilegeError: the login may not run workers.
    """
    return _table(app).messages(which or MessageFilter(), limit, after)


def dead_letters(
    app: Celery, which: MessageFilter | None = None, *, limit: int = 50, after: int | None = None
) -> list[MessageInfo]:
    """The same of dead letters alone."""
    return messages(app, (which or MessageFilter()).of(MessageState.DEAD), limit=limit, after=after)


def count(app: Celery, which: MessageFilter | None = None) -> dict[MessageState, int]:
    """How many messages there are in each state.  Walks all of them, which takes seconds where there are millions."""
    return _table(app).count(which or MessageFilter())


def summary(
    app: Celery,
    which: MessageFilter | None = None,
    *,
    by: Literal["queue", "organization_id", "user_id", "task_name"] = "queue",
) -> list[MessageCount]:
    """How many there are of each queue, organization, user or task, and since when; the most first."""
    return _table(app).summary(which or MessageFilter(), by)


def find_records(app: Celery, task_id: str) -> list[TaskRecord]:
    """The records of a task's id: one, unless several organizations have it; none where they are kept elsewhere."""
    table = _table(app)
    if not table.has_records or "\0" in task_id:
        return []
    backend: Any = app.backend
    return [backend._record(row) for row in table.records_of_id(task_id)]


def audit_records(app: Celery, *, limit: int = 50, before: int | None = None) -> list[AuditRecord]:
    """What operators did, the latest first; those before the one with the id ``before``."""
    return _table(app).audit_records(limit, before)


def purge(
    app: Celery, which: MessageFilter, *, operator: str, dry_run: bool = True, everything: bool = False
) -> Operation:
    """Delete messages that wait or are delayed, and, where ``which.states`` names them, dead letters.

    What a worker has claimed stays.  Their tasks become revoked: so do the rests of their chains, and their chords
    hear of it.  Tasks that were given up stay dead.

    Args:
        app: the application on whose broker they are.
        which: which ones.
        operator: whose name the audit record gets.
        dry_run: only count.
        everything: has to be said for a filter that means all messages.

    Raises:
        ConfigurationError: the filter means all of them, and ``everything`` was not said; or it names RUNNING.
    """
    _require_meant(which, "a purge", "deletes the messages of all tenants and queues", everything)
    if MessageState.RUNNING in (which.states or ()):
        raise ConfigurationError("what a worker has claimed is not purged.  Revoke or terminate it")
    which = dataclasses.replace(which, states=which.states or UNHELD)
    run = _Run(app, "purge", operator, which, dry_run)
    if not dry_run:
        run.remove(which, "purged by an operator")
    return run.end(run.before)


def replay(app: Celery, which: MessageFilter | None = None, *, operator: str, dry_run: bool = True) -> Operation:
    """Put dead letters back into their queues, as if they had never been delivered, under the same task ids.

    Their tasks are queued again, the only way out of an end.  Those that have ended otherwise meanwhile keep theirs
    (``counts["kept"]``).  What was done when a task was given up is not undone: error callbacks were called, the rest
    of its chain has failed, and so has the body of its chord.

    Args:
        app: the application on whose broker they are.
        which: which ones; by default all.
        operator: whose name the audit record gets.
        dry_run: only count.
    """
    which = (which or MessageFilter()).of(MessageState.DEAD)
    run = _Run(app, "replay", operator, which, dry_run)
    if not dry_run:
        run.replay(which)
    return run.end(run.before)


def revoke(
    app: Celery, which: MessageFilter, *, operator: str, dry_run: bool = True, everything: bool = False
) -> Operation:
    """Stop tasks: those that wait or are delayed never run, those that run are asked to stop (``should_abort()``).

    Their messages are purged, but for what a worker has claimed: if it has not begun, the worker drops it.

    Args:
        app: the application on whose broker they are.
        which: which ones.
        operator: whose name the audit record gets.
        dry_run: only count.
        everything: has to be said for a filter that means all messages.

    Raises:
        ConfigurationError: the filter means all of them, and ``everything`` was not said; or dead letters only.
    """
    _require_meant(which, "a revocation", "stops the tasks of all tenants and queues", everything)
    return _stop(app, "revoke", which, operator, dry_run)


def terminate(
    app: Celery, which: MessageFilter, *, operator: str, dry_run: bool = True, everything: bool = False
) -> Operation:
    """The same; besides, workers end what they run (where the pool can: prefork)."""
    _require_meant(which, "a termination", "ends the tasks of all tenants and queues", everything)
    return _stop(app, "terminate", which, operator, dry_run)


def offboard(
    app: Celery, organization_id: str, *, operator: str, dry_run: bool = True, stop: bool = False, timeout: float = 30.0
) -> Operation:
    """Remove what there is of a tenant: messages, dead letters, records of tasks and groups.  Not the audit records.

    Nothing of it can be had back.  The application's own tables are its own business.

    Args:
        app: the application on whose broker they are.
        organization_id: the tenant.
        operator: whose name the audit record gets.
        dry_run: only count.
        stop: terminate what runs first; without it, a tenant whose tasks run is refused.
        timeout: seconds to wait for what runs to have ended.

    Raises:
        ConfigurationError: no organization is named; or tasks of this one run, and nothing was changed, or with
            ``stop``, they are still running.
    """
    if not isinstance(organization_id, str) or not organization_id:
        raise ConfigurationError(
            f"offboard() removes all of one organization: name it by its id, not {organization_id!r}"
        )
    which = MessageFilter(organization_id=organization_id)
    run = _Run(app, "offboard", operator, which, dry_run)
    tasks, groups = run.table.count_records(organization_id) if run.table.has_records else (0, 0)
    if dry_run:
        return run.end({**run.before, "records": tasks, "groups": groups})
    running = run.before[MessageState.RUNNING]
    if running and not stop:
        raise ConfigurationError(
            f"organization {organization_id} has {running} running {'task' if running == 1 else 'tasks'}; nothing was "
            "changed.  Wait for their end, or have them terminated: --stop, or stop=True"
        )
    until = time.monotonic() + timeout
    while True:
        run.remove(which.of(*UNHELD, MessageState.DEAD), "its organization was removed")
        if not run.table.messages(which.of(MessageState.RUNNING), 1):
            break
        if not stop:
            raise ConfigurationError(
                f"a task of organization {organization_id} has begun to run meanwhile; what waited is gone, the "
                "records are there.  Wait for its end, or have it terminated: --stop, or stop=True"
            )
        run.stop(which, "its organization was removed", terminates=True)
        _wait_for_end(run, which, until, timeout)  # and what they have launched is removed, too
    if run.table.has_records:
        run.forget(organization_id)
    return run.end({})


def _require_meant(which: MessageFilter, action: str, does: str, everything: bool) -> None:
    """Raise ConfigurationError for a filter that means all messages, unless somebody said so."""
    if which.is_empty and not everything:
        raise ConfigurationError(
            f"{action} without a filter {does}.  Name an organization, user, task, queue or age; or say that "
            "everything is meant: everything=True"
        )


def _stop(app: Celery, action: str, which: MessageFilter, operator: str, dry_run: bool) -> Operation:
    which = dataclasses.replace(which, states=which.states or (*UNHELD, MessageState.RUNNING)).of(
        *UNHELD, MessageState.RUNNING
    )
    if not which.states:
        raise ConfigurationError("a dead letter has no task to stop.  Purge it")
    run = _Run(app, action, operator, which, dry_run)
    if not dry_run:
        text = f"{'terminated' if action == 'terminate' else 'revoked'} by an operator"
        run.remove(which.of(*UNHELD), text)
        if MessageState.RUNNING in (which.states or ()):
            run.stop(which, text, terminates=action == "terminate")
    return run.end(run.before)


def _wait_for_end(run: _Run, which: MessageFilter, until: float, timeout: float) -> None:
    while running := run.table.messages(which.of(MessageState.RUNNING), 1):
        if time.monotonic() > until:
            raise ConfigurationError(
                f"task {running[0].task_id} of organization {which.organization_id} still runs after {timeout:g} "
                "seconds.  What waited is gone, the records are there; do it again when the task has ended"
            )
        time.sleep(0.2)


class _Run:
    """An operation in the middle of being done."""

    def __init__(self, app: Celery, action: str, operator: str, which: MessageFilter, dry_run: bool) -> None:
        if not operator.strip():
            raise ConfigurationError("an operation needs the name of its operator, for the audit record")
        self.app, self.action, self.operator, self.which, self.dry_run = app, action, operator, which, dry_run
        self.id = uuid.uuid4()
        self.table = _table(app)
        self.counted_at = self.table.now()
        self.before = self.table.count(which)
        self.done: Counter[str] = Counter()

    def remove(self, which: MessageFilter, text: str) -> None:
        """Delete what is not claimed, batch by batch."""
        if which.states:
            self._in_batches(lambda transaction, after: self._remove(transaction, which, after, text))

    def _remove(self, transaction: Connection, which: MessageFilter, after: int, text: str) -> tuple[int | None, Any]:
        chosen = self.table.remove(transaction, which, after, BATCH)
        removed = [each for each in chosen if each.state is not MessageState.RUNNING]
        done = Counter(each.state.value for each in removed)
        # Canvases are told by connections of the backend's own: before, so that they wait for no record of ours.
        for each in removed:
            if each.envelope is not None:
                self.table.go_on(transaction)
                done["records"] += self._tell_canvas(each, text)
        done["records"] += self.table.end(transaction, removed, operator=self.operator, text=text)
        return max((each.id for each in chosen), default=None), done

    def _tell_canvas(self, removed: Removed, text: str) -> bool:
        """Revoke a part of a canvas as a worker does: the rest of its chain with it, and its chord hears of it.

        Returns:
            Whether its record has ended by this.  If this process ends before the transaction does, the message is
            there, and a worker drops it.
        """
        backend: Any = self.app.backend
        read = _request(self.app, removed)
        if read is None or removed.task_id is None:
            return False
        organization_id = removed.organization_id or ""
        record = backend.records.get(organization_id, removed.task_id)
        state = None if record is None else State(record["state"])
        if state in TERMINAL - {State.REVOKED}:
            return False  # its canvas knows; but of a cancellation it hears by the message
        if state is State.STARTED and self.table.messages(_running(removed), 1):
            return False  # another message of the same task
        backend.records.abort(organization_id, removed.task_id, actor(self.operator))
        request, tenant = read
        try:
            with exactly(tenant):
                backend.mark_as_revoked(removed.task_id, text, request)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # whatever somebody has put there
            _log.warning("nobody who waits for task %s is told of its end: %r", removed.task_id, error)
            return False
        return record is not None and state is not State.REVOKED

    def replay(self, which: MessageFilter) -> None:
        """Put dead letters back, batch by batch."""

        def some(transaction: Connection, after: int) -> tuple[int | None, Any]:
            replayed = self.table.replay(transaction, which, after, BATCH)
            done = Counter(
                replayed=sum(each.is_replayed for each in replayed),
                kept=sum(not each.is_replayed for each in replayed),
                records=sum(each.is_recorded for each in replayed),
            )
            return max((each.id for each in replayed), default=None), done

        self._in_batches(some)

    def stop(self, which: MessageFilter, text: str, *, terminates: bool) -> None:
        """Ask what is claimed to stop."""

        def ask(transaction: Connection) -> list[Any]:
            held = self.table.stop_running(transaction, which, operator=self.operator, text=text)
            done = Counter(running=len(held), records=sum(each.is_ended or each.is_asked for each in held))
            self._note(transaction, done)
            return held

        held = self.table.in_transaction(ask)
        self.done["running"] += len(held)
        self.done["records"] += sum(each.is_ended or each.is_asked for each in held)
        if held:
            stop_tasks(self.app, [(each.organization_id, each.task_id) for each in held], terminate=terminates)

    def forget(self, organization_id: str) -> None:
        """Delete an organization's records, batch by batch."""

        def some(transaction: Connection) -> Counter[str]:
            tasks, groups = self.table.forget_organization(transaction, organization_id, BATCH)
            done = Counter(records=tasks, groups=groups)
            self._note(transaction, done)
            return done

        # Those that were revoked by this operation are counted once: they are gone.
        self.done["records"] = 0
        while done := +self.table.in_transaction(some):
            self.done.update(done)

    def _in_batches(self, step: Callable[[Connection, int], tuple[int | None, Any]]) -> None:
        after: int | None = -1
        while after is not None:
            done_of_batch: Counter[str] = Counter()

            def batch(transaction: Connection, after: int = after, done: Counter[str] = done_of_batch) -> int | None:
                done.clear()
                last, found = step(transaction, after)
                done.update(found)
                self._note(transaction, done)
                return last

            after = self.table.in_transaction(batch)
            self.done.update(done_of_batch)

    def _note(self, transaction: Connection, done: Mapping[str, int]) -> None:
        if counts := {name: number for name, number in done.items() if number}:
            self.table.note(transaction, self.id, self.action, self.operator, self.which, counts)

    def end(self, planned: Mapping[Any, int]) -> Operation:
        """What it came to."""
        counts = {str(name): number for name, number in planned.items()} if self.dry_run else dict(self.done)
        done = Operation(
            action=self.action,
            operator=self.operator,
            filter=self.which,
            is_dry_run=self.dry_run,
            id=self.id,
            counted_at=self.counted_at,
            before=self.before,
            after=self.before if self.dry_run else self.table.count(self.which),
            counts={name: number for name, number in counts.items() if number},
            records=counts.get("records", 0) if self.table.has_records else None,
        )
        if done.found and not self.dry_run:
            _log.info(
                "%s by %s of %s: %s",
                self.action,
                self.operator,
                json.dumps(self.which.values()),
                json.dumps(done.counts),
                extra={"audit_action": self.action, "audit_operator": self.operator, "audit_operation": str(self.id)},
            )
        return done


def _running(removed: Removed) -> MessageFilter:
    return MessageFilter(
        organization_id=removed.organization_id or "", task_id=removed.task_id, states=[MessageState.RUNNING]
    )


def _request(app: Celery, removed: Removed) -> tuple[Context, TenantContext | None] | None:
    """A removed message as its task's request; None if nobody can read it, or nobody with a key has published it."""
    try:
        envelope = json.loads(removed.envelope or "")
        message: Any = Message(
            body=removed.body,  # type: ignore[arg-type]  # the stubs know texts only
            headers=envelope["headers"],
            properties=envelope["properties"],
            content_type=envelope["content-type"],
            content_encoding=envelope["content-encoding"],
            accept=prepare_accept_content(app.conf.accept_content),
        )
        signer = signer_of(app)
        headers = message.headers if signer is None else signer.signed_headers(message)
        if headers is None:
            return None
        args, kwargs, embedded = message.decode()
        request = Context({**headers, "args": args, "kwargs": kwargs, **(embedded or {})})
        carried = carried_by(request)
        return request, None if carried is None else decode(carried).tenant
    except Exception as error:  # whatever somebody has put there
        _log.warning("message %d cannot be read, so that nobody who waits for it is told: %r", removed.id, error)
        return None


def _table(app: Celery) -> OperationTable:
    with app.connection_for_write() as connection:
        place = getattr(connection.transport, "place", None)
    if place is None:
        if not app.conf.broker_write_url:
            raise NotSupportedError("this application has no broker: DATABASE_URL is not set, nor a broker's URL")
        raise NotSupportedError(
            "this application's broker is not PostgreSQL, where messages can be looked at.  Use its own tools"
        )
    place = (_with_driver(place[0]), place[1])
    records: Any = getattr(app.backend, "_place", None)
    has_records = records is not None and (_with_driver(records[0]), records[1]) == place
    return OperationTable(*place, has_records=has_records)


def _with_driver(url: str) -> str:
    return rendered(database_url(url))
