"""Celery's result backend on PostgreSQL: a record for each task, that only its tenant sees.

A record is there from the launch on.  Each write is one upsert, and moves the task only where
:mod:`rhesis_tasks.states` allows it.  The tenant of a write is the one that the message carried, the tenant of
a read the active one; row-level security holds to both.  Arguments of tasks are not stored.
"""

from __future__ import annotations

import datetime
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from celery._state import get_current_task
from celery.app.task import Context
from celery.backends.database import DatabaseBackend
from celery.canvas import maybe_signature
from celery.exceptions import BackendStoreError, ChordError, Reject, TaskRevokedError, TimeoutError
from celery.result import GroupResult, result_from_tuple
from celery.utils.serialization import UnpickleableExceptionWrapper
from kombu.exceptions import OperationalError
from kombu.utils.encoding import ensure_bytes

from ..context import TenantContext, current_tenant, exactly, require_tenant
from ..errors import ContextError, DatabaseUnavailableError, DeadLetterError, MissingTenantError, SignatureError
from ..failures import CUT_OFF, reason_of, redact_exception, redact_text, redacts, task_cut_off
from ..headers import Progress, carried_by, decode, find, state_of
from ..settings import database_url, is_postgresql, rendered, schema_name
from ..states import TERMINAL, State, Transition, bury, by_celery, expire, to_celery
from ..variables import Activation
from .launching import Launch, launching
from .patience import answer_timeout
from .records import ChordPart, EndedPart, Filter, RecordTable, StateChange, TaskRecord, is_lost, launch_values
from .waiting import listener_for

__all__ = ["PostgresBackend", "TaskRecord"]

WANTED_FOR: Final = 30.0
"""Seconds for which a task's end is notified after somebody has begun to wait for it, or has gone on to."""

_NO_TENANT: Final = ""
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0  #: seconds between two looks whether a server is back
_log = logging.getLogger(__name__)
T = TypeVar("T")


class PostgresBackend(DatabaseBackend):
    """``result_backend="postgresql://..."``."""

    # Celery's own, which its stubs leave out.
    app: Any
    url: Any
    expires: Any

    def __init__(self, dburi: str | None = None, *, url: str | None = None, **kwargs: Any) -> None:
        given = url or dburi
        # No cache of results: Celery's is keyed by the task's id alone, so it would hand one tenant's result to
        # another that asks for the same id.
        super().__init__(dburi=given, url=given, **{**kwargs, "max_cached_results": -1})
        # Celery hands "postgresql+psycopg://..." over as "psycopg://...".
        self.url = rendered(database_url(self.url))
        # What Celery calls by itself it tries again by these.  (Celery 5.6 does so only if told to.)  The records try
        # again by themselves.
        self.always_retry, self.max_retries = True, 0
        self.schema = schema_name(self.app.conf.get("rhesis_tasks_schema"))
        options = self.app.conf.result_backend_transport_options or {}
        self.records = RecordTable(self.url, self.schema, answer_timeout(options, "result_backend_transport_options"))
        self._chord_owners: dict[str, TenantContext | None] = {}  # of those that are being launched

    def _create_tables(self) -> None:
        """Ours are made on first use, not while Celery looks at its configuration."""

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether a statement may succeed on another connection."""
        return is_lost(exc)

    def on_backend_retryable_error(self, exc: BaseException) -> None:
        """SQLAlchemy's pool has dropped the connection already."""

    def _decode_stored_result(self, payload: bytes | None) -> Any:
        """As Celery's, but without its way back to pickle: who can write a row shall not run code here."""
        return None if payload is None else self.decode(payload)

    def prepare_exception(self, exc: Exception, serializer: str | None = None) -> Any:
        """As Celery's; where texts are redacted, what its arguments say is, too."""
        if not redacts(self.app):
            return super().prepare_exception(exc, serializer)
        return redact_exception(self.app, super().prepare_exception(exc, "json"))

    # --- launching ---------------------------------------------------------------------------------------------

    def record_launch(
        self,
        task_id: str,
        name: str | None,
        root_id: str | None = None,
        parent_id: str | None = None,
        eta: datetime.datetime | None = None,
    ) -> bool:
        """Record that the active tenant launched a task.

        Returns:
            Whether the task is new; False if it has a record already (a retry, a replacement, a part of a
            canvas that was recorded with the whole).
        """
        tenant = current_tenant()
        return self.records.launch(
            _organization(tenant),
            task_id,
            user_id=tenant.user_id if tenant else None,
            name=name,
            root_id=root_id or task_id,
            parent_id=_other(parent_id, task_id),
            eta=eta,
        )

    @contextmanager
    def launching(
        self,
        task_id: str,
        name: str | None,
        producer: Any = None,
        root_id: str | None = None,
        parent_id: str | None = None,
        eta: datetime.datetime | None = None,
    ) -> Iterator[None]:
        """The same for a task that is published in the block: with its message, if the broker is in this database.

        Args:
            producer: what publishes it; by default one of the application's.
        """
        if not self._is_place_of(producer):
            is_new = self.record_launch(task_id, name, root_id, parent_id, eta)
            with self._discarded_on_error(task_id, lambda: is_new):
                yield
            return
        tenant = current_tenant()
        user_id = tenant.user_id if tenant else None
        lineage = (root_id or task_id, _other(parent_id, task_id))
        values = launch_values(_organization(tenant), task_id, user_id, name, *lineage, eta, is_lazy=False)
        launch = Launch(self._place, task_id, values)
        try:
            with self._discarded_on_error(task_id, lambda: bool(launch.is_new)), launching(launch):
                yield
        except OperationalError as error:  # kombu's, around ours
            if launch.is_new is None and isinstance(error.__cause__, DatabaseUnavailableError):
                raise error.__cause__ from None
            raise
        if launch.is_new is None:  # published elsewhere, all the same
            self.record_launch(task_id, name, root_id, parent_id, eta)

    @contextmanager
    def _discarded_on_error(self, task_id: str, is_new: Callable[[], bool]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if is_new():
                self.discard_launch(task_id)
            raise

    @functools.cached_property
    def _place(self) -> tuple[str, str]:
        return rendered(database_url(self.url).set(drivername="postgresql")), self.schema

    def _is_place_of(self, producer: Any) -> bool:
        """Whether the broker's tables are where the records are."""
        if producer is not None:
            transport = getattr(getattr(producer, "connection", None), "transport", None)
            return bool(getattr(transport, "place", None) == self._place)
        conf = self.app.conf
        options = conf.broker_transport_options or {}
        return _place_of(conf.broker_write_url, options.get("schema"), options.get("default_schema")) == self._place

    @property
    def has_messages(self) -> bool:
        """Whether the broker's messages are where the records are."""
        return self._is_place_of(None)

    def discard_launch(self, task_id: str) -> None:
        """Take back the record of a launch that failed, unless a worker has the message all the same."""
        self.records.discard(_organization(current_tenant()), task_id)

    # --- running -----------------------------------------------------------------------------------------------

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        part: EndedPart | None = None,
        **_: Any,
    ) -> None:
        """The outcome of an attempt, in one upsert that leaves the columns of the launch alone.

        Args:
            part: of a chord, which has ended; if it is the last one, its chord is to be completed before.
        """
        known = None if request is None else state_of(request)
        is_unsigned = known is not None and isinstance(known.refusal, SignatureError)
        if is_unsigned and state not in self.READY_STATES:
            return
        tenant = _tenant_of(request)
        error_type, error_message, reason = None, None, None
        if state in self.EXCEPTION_STATES:
            traceback = traceback and redact_text(self.app, traceback)
            error_type, error_message = _error(result)
            reason = (known and known.reason) or (_reason(request, error_type) if state == "FAILURE" else None)
        transition = _transition(state, error_type, error_message)
        is_custom = to_celery(transition.target) != state
        children = None
        if request is not None and state in self.READY_STATES:
            children = self.current_task_children(request)
        progress = None if known is None else known.progress
        delivery = getattr(request, "delivery_info", None) or {}
        wants_arguments = request is not None and self.app.conf.result_extended
        stays = self.records.change(
            _organization(tenant),
            StateChange(
                task_id=task_id,
                transition=transition,
                user_id=tenant.user_id if tenant else None,
                name=_storable(getattr(request, "task", None)),
                custom_state=_storable(state) if is_custom else None,
                retries=getattr(request, "retries", None) or 0,
                root_id=getattr(request, "root_id", None),
                parent_id=_other(getattr(request, "parent_id", None), task_id),
                queue=delivery.get("routing_key"),
                worker=getattr(request, "hostname", None),
                result=ensure_bytes(self.encode(result)),
                children=ensure_bytes(self.encode(children)) if children else None,
                args=ensure_bytes(self.encode(request.args)) if wants_arguments else None,
                kwargs=ensure_bytes(self.encode(request.kwargs)) if wants_arguments else None,
                error_type=_storable(error_type),
                error_message=_storable(error_message),
                traceback=_storable(traceback),
                failure_reason=_storable(reason),
                progress_done=progress.done if progress else None,
                progress_total=progress.total if progress else None,
                progress_message=_storable(progress.message) if progress else None,
            ),
            # What anybody may have sent, under whatever id, takes the place of no record.
            is_trusted=not is_unsigned,
            part=part,
        )
        if known is not None and stays is not None:
            known.is_cancelled = state == "STARTED" and stays in (State.REVOKED, State.EXPIRED)
            known.is_superseded = transition.target in TERMINAL and stays in TERMINAL

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As Celery's; a worker waits for the database, since nobody else knows what becomes of its task.

        Whatever it raised then, Celery would acknowledge the message.
        """
        store = functools.partial(super().store_result, task_id, result, state, traceback, request=request, **kwargs)
        waits = request is not None and to_celery(by_celery(state).target) == state  # not for a body's own states
        return _outlasting(store, task_id) if waits else store()

    def store_progress(self, task_id: str, progress: Progress | None) -> bool:
        """Record how far one of the active tenant's running tasks is; None changes nothing.

        Returns:
            Whether somebody has asked it to stop early.
        """
        done, total, message = (progress.done, progress.total, progress.message) if progress else (None, None, None)
        return self.records.progress(_organization(current_tenant()), task_id, done, total, _storable(message))

    def mark_as_done(
        self, task_id: str, result: Any, request: Any = None, store_result: bool = True, state: str = "SUCCESS"
    ) -> None:
        """As Celery's, but a chord hears of it in the same commit, and its last part launches the body before.

        What is known to have succeeded is not run again if its process is lost then, and nobody would tell the chord.
        """
        stores = store_result and not getattr(request, "ignore_result", False)
        if stores and request is not None and request.chord:
            part = self._part_of(request, state, result)
            self.store_result(task_id, result, state, request=request, part=part)
            if part is not None and not part.is_last:
                return
        try:
            if request is not None and request.chord:
                self.on_chord_part_return(request, state, result)
        finally:
            if stores:
                self.store_result(task_id, result, state, request=request)
        # Whoever waits for a chain waits for its last task, and began to before that was on record.  (By now Celery 5.6
        # has taken off the list what it has launched.)
        if request is not None and request.chain is not None and len(request.chain) <= 1 and request.children:
            self.records.call_who_waits(_organization(_tenant_of(request)), request.children[-1].id)

    def mark_as_failure(
        self,
        task_id: str,
        exc: Exception,
        traceback: str | None = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = "FAILURE",
    ) -> None:
        """As Celery's, under the tenant of the task that failed.

        In a worker's main process (time limits, lost children) nobody is active, and the rest of a failed
        chain, and its error callbacks, are to be that tenant's too.
        """
        with exactly(_tenant_of(request)):
            super().mark_as_failure(task_id, exc, traceback, request, store_result, call_errbacks, state)
            rest = getattr(request, "chain", None)  # of a task that the worker does not know it is not there
            if isinstance(rest, list | tuple) and rest:
                known = state_of(request)
                is_told = state == "FAILURE" and (known is None or known.refusal is None)
                self._cut_off(rest[0], exc, state, request, is_stored=store_result, is_told=is_told)

    def _cut_off(
        self,
        signature: Mapping[str, Any],
        error: Exception,
        state: str,
        cause: Context,
        *,
        is_stored: bool = True,
        is_told: bool = True,
    ) -> None:
        """End the last task of what never begins, whose id whoever has launched the whole knows, and tell of it.

        Celery ends the tasks of a chain and the body of a chord, but not all that they are made of, and nothing after a
        task that ignores its result.

        Args:
            signature: the end of a chain, or a chord's body.
            cause: the request of the task that has ended otherwise than it should have.
            is_stored: Celery has ended that, if it is a task.
        """
        last = _last_task(signature)
        task_id = None if last is None else (last.get("options") or {}).get("task_id")
        if last is None or not task_id:
            return
        request = _request_of(last)
        if last is not signature or not is_stored:
            self.store_result(task_id, error, state, request=request)
            if request.chord:
                self.on_chord_part_return(request, state, error)
        if not is_told:
            return
        row = _outlasting(lambda: self.records.get(_organization(_tenant_of(request)), task_id), task_id)
        if row is None or State(row["state"]) not in (State.FAILURE, State.DEAD):
            return  # or it was cancelled before
        with suppress(ContextError), _as_bound(last):
            more = {"reason": row["failure_reason"], "root_id": cause.root_id or row["root_id"]}
            task_cut_off.send(sender=self.app, signature=last, error=error, **more)

    def _call_task_errbacks(self, request: Any, exc: Exception, traceback: str | None) -> None:
        """As Celery's, each callback for whom its own header says: those that take three arguments are called here."""
        errbacks = request.errbacks
        try:
            for errback in errbacks or ():
                request.errbacks = [errback]
                with _as_bound(errback):
                    super()._call_task_errbacks(request, exc, traceback)  # type: ignore[misc]  # left out of the stubs
        finally:
            request.errbacks = errbacks

    def mark_as_revoked(
        self, task_id: str, reason: str = "", request: Any = None, store_result: bool = True, state: str = "REVOKED"
    ) -> None:
        """As Celery's, but the rest of its chain is revoked, too, as it fails with a task that fails.

        It never runs, and somebody may wait for its end, such as a chord.
        """
        error = TaskRevokedError(reason)
        self.mark_as_failure(task_id, error, None, request, store_result, call_errbacks=False, state=state)

    # --- stopping ----------------------------------------------------------------------------------------------

    def request_abort(self, task_id: str) -> bool:
        """Ask one of the active tenant's tasks to stop early; it looks by ``should_abort()``.

        Returns:
            Whether it can: False for a foreign or unknown id, and for a task that has ended.

        Raises:
            MissingTenantError: no tenant is active.
        """
        tenant = require_tenant()
        return _can_be_stored(task_id) and self.records.abort(tenant.organization_id, task_id, tenant.user_id)

    def cancel_waiting(self, task_id: str) -> bool:
        """End one of the active tenant's tasks if it has not started, and take its message away.

        Returns:
            Whether there is such a task.

        Raises:
            MissingTenantError: no tenant is active.
        """
        tenant = require_tenant()
        error = TaskRevokedError("cancelled")
        return _can_be_stored(task_id) and self.records.cancel(
            tenant.organization_id,
            task_id,
            tenant.user_id,
            result=ensure_bytes(self.encode(self.prepare_exception(error))),
            error=(type(error).__name__, str(error)),
        )

    # --- reading -----------------------------------------------------------------------------------------------

    def get_record(self, task_id: str) -> TaskRecord | None:
        """The record of one of the active tenant's tasks; None for a foreign, unknown or expired id alike.

        Raises:
            MissingTenantError: no tenant is active.
        """
        tenant = require_tenant()
        row = self.records.get(tenant.organization_id, task_id) if _can_be_stored(task_id) else None
        return None if row is None else self._record(row)

    def list_records(
        self, which: Filter | None = None, *, limit: int = 50, after: tuple[datetime.datetime, str] | None = None
    ) -> list[TaskRecord]:
        """Records of the active tenant's tasks, the latest launch first.

        Args:
            which: by state, name, root and time of launch; by default all.
            limit: how many at most.
            after: ``(launched_at, task_id)`` of the last one that was seen, to go on behind it.

        Raises:
            MissingTenantError: no tenant is active.
        """
        tenant, which = require_tenant(), which or Filter()
        texts = (which.name, which.root_id, after and after[1])
        if not all(text is None or _can_be_stored(text) for text in texts):
            return []
        return [self._record(row) for row in self.records.find(tenant.organization_id, which, limit, after)]

    def _record(self, row: Mapping[str, Any]) -> TaskRecord:
        succeeded = row["state"] == State.SUCCESS
        return TaskRecord.of(row, self._decode_stored_result(row["result"]) if succeeded else None)

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        """A task as Celery's AsyncResult wants it; an unknown one is PENDING."""
        tenant = current_tenant()
        row = self.records.get(_organization(tenant), task_id)
        if row is None:
            if tenant is None:
                raise MissingTenantError(
                    f"task {task_id} cannot be looked up: no tenant is active, and no task without a tenant has this "
                    "id.  Read results inside tenant_scope(...)"
                )
            return dict(self.meta_from_decoded({"task_id": task_id, "status": "PENDING", "result": None}))
        return self._meta(task_id, row)

    def _meta(self, task_id: str, row: Mapping[str, Any]) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "task_id": task_id,
            "status": row["custom_state"] or to_celery(State(row["state"])),
            "result": _revoked_by_operator(row) or self._decode_stored_result(row["result"]),
            "traceback": row["traceback"],
            "children": self.decode(row["children"]) if row["children"] else [],
            "date_done": row["finished_at"],
            "name": row["name"],
            "worker": row["worker"],
            "retries": row["retries"],
            "queue": row["queue"],
            "parent_id": row["parent_id"],
        }
        if row["args"] is not None:
            meta |= {"args": self.decode(row["args"]), "kwargs": self.decode(row["kwargs"])}
        return dict(self.meta_from_decoded(meta))

    def task_result_exists(self, task_id: str) -> bool:
        """Whether the active tenant has a record of this task."""
        return self.records.get(_organization(current_tenant()), task_id) is not None

    def _forget(self, task_id: str) -> None:
        self.records.forget(_organization(current_tenant()), task_id)

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,  # noqa: ARG002 - Celery's signature
        on_interval: Callable[[], object] | None = None,
    ) -> Any:
        """Wait for a task's end, and return what Celery wants to know of it.

        Its end is notified.  Where notifications do not arrive (behind PgBouncer) it is asked for every ``interval``
        seconds, as by Celery's own backend.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds.
        """
        self._ensure_not_eager()  # type: ignore[attr-defined]  # left out of the stubs
        meta = self.get_task_meta(task_id)
        if meta["status"] in self.READY_STATES:
            return meta
        organization_id = _organization(current_tenant())
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        on_interval = on_interval and _sparing(on_interval, interval)
        listener = listener_for(self.url, self._channel)
        with listener.waiting(self.records.wanted(organization_id, task_id, WANTED_FOR)) as has_ended:
            is_wanted, answered_at = True, time.monotonic()
            while True:
                hears = listener.listen()
                has_ended.clear()
                try:
                    if not is_wanted:
                        self.records.wanted(organization_id, task_id, WANTED_FOR)
                    row = self.records.get(organization_id, task_id)
                    answered_at = time.monotonic()
                except Exception as error:  # a restart of the server is waited for
                    if not is_lost(error) or time.monotonic() - answered_at > WANTED_FOR:
                        raise
                    row = None
                if row is not None and State(row["state"]) in TERMINAL:
                    return self._meta(task_id, row)
                # Nothing is said of the end of a task that has no record yet, such as the next ones of a chain.  Of its
                # last one, and of a chord's body, it is said that it has one.
                is_told = hears and row is not None and row["wanted_until"] is not None
                ask_at = time.monotonic() + (WANTED_FOR / 2 if is_told else interval)
                is_wanted = _heard(has_ended, ask_at, deadline, interval, on_interval) and is_told

    @functools.cached_property
    def _channel(self) -> str:
        return self.records.channel()

    # --- groups and chords -------------------------------------------------------------------------------------

    def _save_group(self, group_id: str, result: Any) -> Any:
        payload = ensure_bytes(self.encode(self.prepare_value(result)))
        self.records.save_group(_organization(current_tenant()), group_id, payload)
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        row = self.records.get_group(_organization(current_tenant()), group_id)
        if row is None or row["result"] is None:  # of a chord, whose structure was not worth saving
            return None
        stored = self._decode_stored_result(row["result"])
        return {
            "task_id": group_id,
            "result": stored if stored is None else result_from_tuple(stored, self.app),
            "date_done": row["created_at"],
        }

    def _delete_group(self, group_id: str) -> None:
        self.records.forget_group(_organization(current_tenant()), group_id)

    def apply_chord(self, header_result_args: Any, body: Any, **_: Any) -> None:
        """Begin a chord: its parts say when they have ended, and the last one launches the body.

        (Celery's database backend has a task that asks for all of them every second.)
        """
        self.ensure_chords_allowed()
        group_id, results = header_result_args[0], header_result_args[1]
        owner = self._chord_owners[group_id] = _owner_of_chord(body)
        self.records.size_chord(_organization(owner), group_id, None)
        if isinstance(results, list | tuple) and any(isinstance(result, GroupResult) for result in results):
            with exactly(owner):
                self.save_group(group_id, self.app.GroupResult(*header_result_args))  # for the results' structure

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Called before the last part is published."""
        owner = self._chord_owners.pop(group_id, current_tenant())
        self.records.size_chord(_organization(owner), group_id, chord_size)

    def add_to_chord(self, chord_id: str, result: Any) -> None:
        """Called by a part that adds another one, before that is published."""
        part: Any = get_current_task()
        owner = _owner_of_chord(maybe_signature(part.request.chord, app=self.app)) if part else current_tenant()
        self.records.add_chord_part(_organization(owner), chord_id, result.id)

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_: Any) -> None:
        """Called when a part has ended; the last one launches the body, once the broker is there."""
        part = self._part_of(request, state, result)
        if part is None:
            return
        body = maybe_signature(request.chord, app=self.app)

        def end() -> None:
            if self.records.end_chord_part(part):
                self._complete_chord(_owner_of_chord(body), part.group_id, body, request)

        _outlasting(end, request.id)

    def _part_of(self, request: Any, state: str, result: Any) -> EndedPart | None:
        if not request.group or not request.id:
            return None
        owner = _owner_of_chord(maybe_signature(request.chord, app=self.app))
        payload = ensure_bytes(self.encode(self.encode_result(result, state)))
        return EndedPart(_organization(owner), request.group, request.id, request.group_index, state, payload)

    def _complete_chord(self, owner: TenantContext | None, group_id: str, body: Any, part: Any) -> None:
        with self.records.completing_chord(_organization(owner), group_id) as parts, exactly(owner):
            if not parts:
                return
            self._launch_body(group_id, parts, body, part)
        if body.id:  # whoever waits for it began to before it was on record
            self.records.call_who_waits(_organization(owner), body.id)

    def _launch_body(self, group_id: str, parts: Sequence[ChordPart], body: Any, part: Any) -> None:
        try:
            results = self._results_of_chord(group_id, parts)
        except ChordError as error:
            _log.error("chord %s: %s", group_id, error)
            self._fail_chord(body, error, part)
            return
        try:
            body.delay(results)
        except (OperationalError, DatabaseUnavailableError):
            raise  # broker and database are waited for
        except Exception as error:
            _log.exception("chord %s: its body cannot be launched", group_id)
            self._fail_chord(body, ChordError(f"Callback error: {error!r}"), part)

    def _fail_chord(self, body: Any, error: ChordError, part: Any) -> None:
        """The body fails without having run; so does a chord that it is a part of."""
        self.chord_error_from_stack(body, error)
        options = body.options
        rest = options.get("chain")
        for signature in (body, *rest[:1]) if rest else (body,):
            self._cut_off(signature, error, "FAILURE", part)
        if options.get("chord"):
            outer = Context(
                id=body.id,
                group=options.get("group_id"),
                group_index=options.get("group_index"),
                chord=options["chord"],
                root_id=part.root_id,
            )
            self.on_chord_part_return(outer, "FAILURE", error)

    def _results_of_chord(self, group_id: str, parts: Sequence[ChordPart]) -> list[Any]:
        """What the parts have returned, in the header's structure.

        Raises:
            ChordError: a part has failed.
        """
        found: dict[str, Any] = {}
        for part in parts:
            value = self.decode(part.result) if part.result is not None else None
            if part.state in self.EXCEPTION_STATES:
                raised = self.exception_to_python(value)
                raise _chord_error(f"Dependency {part.task_id} raised {raised!r}", raised)
            found[part.task_id] = value
        structure = self.restore_group(group_id)
        if structure is None:
            return list(found.values())

        def values(results: Any) -> list[Any]:
            return [values(each.results) if isinstance(each, GroupResult) else found[each.id] for each in results]

        return values(structure.results)

    def cleanup(self) -> None:
        """Delete what expired, of all tenants, in batches."""
        if not self.expires:
            return  # result_expires is None or 0: they never do
        before = datetime.datetime.now(datetime.UTC) - self.expires
        while self.records.expire(before):
            pass


def _outlasting(write: Callable[[], T], task_id: str) -> T:
    """Call it until the servers that it needs can be reached.

    If the process is ended meanwhile, the task's message has not been acknowledged, and comes again.
    """
    pause, was_lost = _FIRST_PAUSE, False
    while True:
        try:
            return write()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, BackendStoreError) and error.__cause__ else error
            is_away = isinstance(cause, OperationalError | DatabaseUnavailableError)
            # A connection that is lost once more, to a server that can be reached, is lost because of what is written.
            if not is_away and (was_lost or not is_lost(cause)):
                raise
            if pause == _FIRST_PAUSE:
                _log.warning("what became of task %s is said once the server is back: %r", task_id, cause)
            was_lost = not is_away
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _sparing(look: Callable[[], object], interval: float) -> Callable[[], None]:
    """Look after each interval, but for no more than a tenth of the time.

    Celery looks at all tasks before the one that is waited for: before the body of a chord, at each of its parts.
    """
    look_at = time.monotonic() + interval

    def look_if_due() -> None:
        nonlocal look_at
        begun_at = time.monotonic()
        if begun_at >= look_at:
            look()
            ended_at = time.monotonic()
            look_at = ended_at + max(interval, 10 * (ended_at - begun_at))

    return look_if_due


def _heard(
    has_ended: threading.Event, until: float, deadline: float, interval: float, on_interval: Callable[[], object] | None
) -> bool:
    """Wait for an event until then; whether it came.

    Celery always has an ``on_interval``, which looks at the tasks before in a chain.
    """
    while True:
        if on_interval is not None:
            on_interval()
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError("The operation timed out.")
        if has_ended.wait(max(0.0, min(until, deadline, now + interval) - now)):
            return True
        if min(until, deadline) <= time.monotonic():
            return False


@functools.lru_cache
def _place_of(url: Any, schema: str | None, default_schema: str | None) -> tuple[str, str] | None:
    """Where a broker's tables are; None if that is no single PostgreSQL."""
    if not isinstance(url, str) or ";" in url or not is_postgresql(url):
        return None
    parsed = database_url(url).set(drivername="postgresql")
    in_url = parsed.query.get("schema")
    if in_url is not None and not isinstance(in_url, str):
        return None
    return rendered(parsed.difference_update_query(["schema"])), schema_name(schema or in_url or default_schema)


def _chord_error(message: str, cause: Any) -> ChordError:
    error = ChordError(message)
    if isinstance(cause, BaseException):
        error.__cause__ = cause
    return error


def _owner_of_chord(body: Any) -> TenantContext | None:
    """Whose a chord is: its body's tenant, who has launched it, whoever's its parts are."""
    carried = find((getattr(body, "options", None) or {}).get("headers"))
    return current_tenant() if carried is None else decode(carried).tenant


def _last_task(signature: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The task with which a chain or chord ends; None if that is a group."""
    last: Any = signature
    while last is not None and (kind := last.get("subtask_type")) in ("chain", "group", "chord"):
        if kind == "group":
            return None
        inside = last.get("kwargs") or {}
        last = inside.get("body") if kind == "chord" else next(iter(reversed(inside.get("tasks") or ())), None)
    found: Mapping[str, Any] | None = last
    return found


def _request_of(signature: Mapping[str, Any]) -> Context:
    """The request of a task that is not run, as Celery makes it of the rest of a chain."""
    request: Any = Context(dict(signature))
    options = signature.get("options") or {}
    request.update(options, id=options.get("task_id"), group=options.get("group_id"))
    found: Context = request
    return found


def _reason(request: Any, error_type: str | None) -> str | None:
    """Why a task has failed that no retry policy was asked about."""
    was_run = request is None or "subtask_type" not in vars(request)  # which signatures have, and no message
    return reason_of(error_type) if was_run or error_type == ChordError.__name__ else CUT_OFF


def _can_be_stored(text: str) -> bool:
    """Whether a record can have this id or name: PostgreSQL stores no NUL and no lone surrogates."""
    return _storable(text) == text


def _organization(tenant: TenantContext | None) -> str:
    return tenant.organization_id if tenant else _NO_TENANT


def _tenant_of(request: Any) -> TenantContext | None:
    """The tenant that a task's message carried; without a request, the active one.

    The main process of a worker stores results too (lost children, time limits), and has no active tenant.
    """
    if request is None:
        return current_tenant()
    state = state_of(request)
    if state is not None:
        return state.tenant
    try:
        carried = carried_by(request)
        return current_tenant() if carried is None else decode(carried).tenant
    except ContextError:
        return None  # the failure of a task whose header nobody can read belongs to no tenant


def _transition(state: str, error_type: str | None, error_message: str | None) -> Transition:
    """What happens to a task; Celery has one state for what we have two for."""
    if state == "REVOKED" and (error_type, error_message) == ("TaskRevokedError", "expired"):
        return expire
    if state == "FAILURE" and error_type == DeadLetterError.__name__:
        return bury
    return by_celery(state)


@contextmanager
def _as_bound(signature: Mapping[str, Any]) -> Iterator[None]:
    """The context that a signature was bound to; the one that is there if it was not bound."""
    own = find((signature.get("options") or {}).get("headers"))
    if own is None:
        yield
        return
    envelope = decode(own)
    with Activation(envelope.tenant, envelope.variables):
        yield


def _revoked_by_operator(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The exception of a task that the database has revoked, where nobody knows how results are written."""
    if row["state"] != State.REVOKED or row["result"] is not None:
        return None
    return {
        "exc_type": TaskRevokedError.__name__,
        "exc_message": [row["error_message"]],
        "exc_module": TaskRevokedError.__module__,
    }


def _storable(value: str | None) -> str | None:
    """A text as PostgreSQL can store it: NUL and lone surrogates are written out."""
    if value is None:
        return None
    return value.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def _other(parent_id: str | None, task_id: str) -> str | None:
    """Celery names a retried task as its own parent."""
    return parent_id if parent_id != task_id else None


def _error(result: Any) -> tuple[str | None, str | None]:
    """Type and message of a failure, in whichever form the result serializer keeps exceptions."""
    if isinstance(result, BaseException):
        return type(result).__qualname__, str(result)
    if not isinstance(result, Mapping):
        return None, None
    message = result.get("exc_message")
    if isinstance(message, list | tuple):
        if result.get("exc_type") == UnpickleableExceptionWrapper.__name__ and len(message) > 2:
            # What Celery raises in place of an exception that no other process could make again.
            _, name, arguments = message[:3]
            return str(name), " ".join(map(str, arguments if isinstance(arguments, list | tuple) else [arguments]))
        if (result.get("exc_type"), result.get("exc_module")) == (Reject.__name__, Reject.__module__):
            message = [reason for reason in message[:1] if reason is not None]  # the other one is requeue=
    text_of = " ".join(map(str, message)) if isinstance(message, list | tuple) else str(message)
    return result.get("exc_type"), text_of
