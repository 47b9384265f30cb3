"""Celery's result backend on PostgreSQL: a record for each task, that only its tenant sees.

A record is there from the launch on.  Each write is one upsert, and moves the task only where
:mod:`rhesis_tasks.states` allows it.  The tenant of a write is the one that the message carried, the tenant of
a read the active one; row-level security holds to both.  Arguments of tasks are not stored.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from celery.backends.database import DatabaseBackend
from celery.result import result_from_tuple
from kombu.utils.encoding import ensure_bytes
from sqlalchemy import Connection, Engine, RowMapping, TextClause, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from ..context import TenantContext, current_tenant, exactly, require_tenant
from ..errors import ContextError, DatabaseUnavailableError, MissingTenantError, SignatureError
from ..headers import Progress, carried_by, decode, state_of
from ..settings import database_url, quote_identifier, redacted, rendered, schema_name
from ..states import TERMINAL, State, from_celery, sources, to_celery
from .connection import read_only
from .engines import shared_engine
from .schema import RECORDS_SETTING, ensure_schema

__all__ = ["PostgresBackend", "TaskRecord"]

T = TypeVar("T")

ATTEMPTS: Final = 4
"""How often a statement is tried on a connection that may be lost."""

_NO_TENANT: Final = ""
_ONE: Final = "organization_id = :o AND task_id = :id"
_UNFINISHED: Final = [state.value for state in State if state not in TERMINAL]
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
    progress_done: int | None  #: as the task reports it
    progress_total: int | None
    progress_message: str | None
    abort_requested_at: datetime.datetime | None  #: when somebody wanted it to stop early
    abort_requested_by: str | None  #: the user
    launched_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None


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
        # What Celery calls by itself it tries again by these.  (Celery 5.6 does so only if told to.)
        self.always_retry, self.max_retries = True, ATTEMPTS - 1
        self.schema = schema_name(self.app.conf.get("rhesis_tasks_schema"))
        self._records = f"{quote_identifier(self.schema)}.task_record"
        self._groups = f"{quote_identifier(self.schema)}.group_record"

    def _create_tables(self) -> None:
        """Ours are made on first use, not while Celery looks at its configuration."""

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether a statement may succeed on another connection."""
        return isinstance(exc, OperationalError | InterfaceError | DatabaseUnavailableError) or (
            isinstance(exc, DBAPIError) and exc.connection_invalidated
        )

    def on_backend_retryable_error(self, exc: BaseException) -> None:
        """SQLAlchemy's pool has dropped the connection already."""

    def _connected(self, engine: Engine) -> Connection:
        try:
            return engine.connect()
        except OperationalError as error:
            raise DatabaseUnavailableError(
                f"cannot connect to {redacted(engine.url)}: {error.orig}", url=redacted(engine.url)
            ) from None

    def _retrying(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function again if its connection was lost, as Celery does with what it calls."""
        for attempt in range(ATTEMPTS - 1):
            try:
                return function(*args)
            except Exception as error:
                if not self.exception_safe_to_retry(error):
                    raise
                time.sleep(0.1 * 2**attempt)
        return function(*args)

    @contextmanager
    def _begin(self, organization_id: str) -> Iterator[Connection]:
        """A transaction of one tenant."""
        engine = shared_engine(self.url)
        if (self.url, self.schema) not in _ready:
            self._connected(engine).close()  # so that an unreachable server is an error of ours here, too
            ensure_schema(engine, self.schema)
            _ready.add((self.url, self.schema))
        with self._connected(engine) as connection:
            try:
                with connection.begin():
                    connection.execute(
                        text(f"SELECT set_config('{RECORDS_SETTING}', :organization_id, true)"),
                        {"organization_id": organization_id},
                    )
                    yield connection
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != "25006":
                    raise
                connection.invalidate()  # the next one may lead to the primary
                raise DatabaseUnavailableError(read_only(engine.url), url=redacted(engine.url)) from None

    def _decode_stored_result(self, payload: bytes | None) -> Any:
        """As Celery's, but without its way back to pickle: who can write a row shall not run code here."""
        return None if payload is None else self.decode(payload)

    # --- launching ---------------------------------------------------------------------------------------------

    def record_launch(
        self, task_id: str, name: str | None, root_id: str | None = None, parent_id: str | None = None
    ) -> bool:
        """Record that the active tenant launched a task.

        Returns:
            Whether the task is new; False if it has a record already (a retry, a replacement, a part of a
            canvas that was recorded with the whole).
        """
        return bool(self._retrying(self._record_launch, task_id, name, root_id or task_id, parent_id))

    def _record_launch(self, task_id: str, name: str | None, root_id: str, parent_id: str | None) -> bool:
        tenant = current_tenant()
        with self._begin(_organization(tenant)) as connection:
            inserted = connection.scalar(
                text(
                    f"""
                    INSERT INTO {self._records} AS r
                        (organization_id, task_id, user_id, name, state, root_id, parent_id)
                    VALUES (:organization_id, :task_id, :user_id, :name, :state, :root_id, :parent_id)
                    ON CONFLICT (organization_id, task_id) DO UPDATE SET
                        name = coalesce(excluded.name, r.name),
                        root_id = excluded.root_id,
                        parent_id = coalesce(excluded.parent_id, r.parent_id),
                        state = CASE WHEN r.state = ANY(:sources) THEN excluded.state ELSE r.state END
                    RETURNING xmax = 0
                    """  # noqa: S608 - the schema's name is quoted, all else are parameters
                ),
                {
                    "organization_id": _organization(tenant),
                    "task_id": task_id,
                    "user_id": tenant.user_id if tenant else None,
                    "name": name,
                    "state": State.QUEUED.value,
                    "root_id": root_id,
                    "parent_id": _other(parent_id, task_id),
                    "sources": [state.value for state in sources(State.QUEUED)],
                },
            )
        return bool(inserted)

    def discard_launch(self, task_id: str) -> None:
        """Take back the record of a launch that failed, unless a worker has the message all the same."""
        self._retrying(self._discard_launch, task_id)

    def _discard_launch(self, task_id: str) -> None:
        organization_id = _organization(current_tenant())
        with self._begin(organization_id) as connection:
            connection.execute(
                text(
                    f"DELETE FROM {self._records} "  # noqa: S608
                    "WHERE organization_id = :o AND task_id = :id AND state = :state"
                ),
                {"o": organization_id, "id": task_id, "state": State.QUEUED.value},
            )

    # --- running -----------------------------------------------------------------------------------------------

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: Any,
    ) -> None:
        """The outcome of an attempt, in one upsert that leaves the columns of the launch alone."""
        known = None if request is None else state_of(request)
        is_unsigned = known is not None and isinstance(known.refusal, SignatureError)
        if is_unsigned and state not in self.READY_STATES:
            return
        tenant = _tenant_of(request)
        ours = from_celery(state)
        error_type, error_message = _error(result) if state in self.EXCEPTION_STATES else (None, None)
        children = None
        if request is not None and state in self.READY_STATES:
            children = self.current_task_children(request)
        delivery = getattr(request, "delivery_info", None) or {}
        progress = None if known is None else known.progress
        with self._begin(_organization(tenant)) as connection:
            connection.execute(
                text(
                    f"""
                    INSERT INTO {self._records} AS r
                        (organization_id, task_id, user_id, name, state, custom_state, retries, root_id, parent_id,
                         queue, worker, result, children, error_type, error_message, traceback,
                         progress_done, progress_total, progress_message, started_at, finished_at)
                    VALUES
                        (:organization_id, :task_id, :user_id, :name, :state, :custom_state, :retries, :root_id,
                         :parent_id, :queue, :worker, :result, :children, :error_type, :error_message, :traceback,
                         :progress_done, :progress_total, :progress_message,
                         CASE WHEN :started THEN clock_timestamp() END,
                         CASE WHEN :finished THEN clock_timestamp() END)
                    ON CONFLICT (organization_id, task_id) DO UPDATE SET
                        name = coalesce(excluded.name, r.name),
                        state = excluded.state,
                        custom_state = excluded.custom_state,
                        retries = greatest(excluded.retries, r.retries),
                        root_id = coalesce(excluded.root_id, r.root_id),
                        parent_id = coalesce(excluded.parent_id, r.parent_id),
                        queue = coalesce(excluded.queue, r.queue),
                        worker = coalesce(excluded.worker, r.worker),
                        result = excluded.result,
                        children = excluded.children,
                        error_type = excluded.error_type,
                        error_message = excluded.error_message,
                        traceback = excluded.traceback,
                        progress_done = coalesce(excluded.progress_done, r.progress_done),
                        progress_total = coalesce(excluded.progress_total, r.progress_total),
                        progress_message = coalesce(excluded.progress_message, r.progress_message),
                        started_at = coalesce(r.started_at, excluded.started_at),
                        finished_at = excluded.finished_at
                    WHERE r.state = ANY(:sources)
                    """  # noqa: S608
                ),
                {
                    "organization_id": _organization(tenant),
                    "task_id": task_id,
                    "user_id": tenant.user_id if tenant else None,
                    "name": _storable(getattr(request, "task", None)),
                    "state": ours.value,
                    "custom_state": _storable(state) if to_celery(ours) != state else None,
                    "retries": getattr(request, "retries", None) or 0,
                    "root_id": getattr(request, "root_id", None),
                    "parent_id": _other(getattr(request, "parent_id", None), task_id),
                    "queue": delivery.get("routing_key"),
                    "worker": getattr(request, "hostname", None),
                    "result": ensure_bytes(self.encode(result)),
                    "children": ensure_bytes(self.encode(children)) if children else None,
                    "error_type": _storable(error_type),
                    "error_message": _storable(error_message),
                    "traceback": _storable(traceback),
                    "progress_done": progress and progress.done,
                    "progress_total": progress and progress.total,
                    "progress_message": progress and _storable(progress.message),
                    "started": ours is State.STARTED,
                    "finished": ours in TERMINAL,
                    # What anybody may have sent, under whatever id, takes the place of no record.
                    "sources": [] if is_unsigned else [source.value for source in sources(ours)],
                },
            )

    def store_progress(self, task_id: str, progress: Progress | None) -> bool:
        """Record how far one of the active tenant's running tasks is; None changes nothing.

        Returns:
            Whether somebody has asked it to stop early.
        """
        return self._retrying(self._store_progress, task_id, progress)

    def _store_progress(self, task_id: str, progress: Progress | None) -> bool:
        values: dict[str, Any] = {"o": _organization(current_tenant()), "id": task_id}
        if progress is None:
            sql = f"SELECT abort_requested_at IS NOT NULL FROM {self._records} WHERE {_ONE}"  # noqa: S608
        else:
            sql = f"""
                UPDATE {self._records}
                SET progress_done = :done, progress_total = :total, progress_message = :message
                WHERE {_ONE} AND state = ANY(:unfinished)
                RETURNING abort_requested_at IS NOT NULL
                """  # noqa: S608
            values |= dataclasses.asdict(progress) | {"unfinished": _UNFINISHED}
            values["message"] = _storable(progress.message)
        with self._begin(values["o"]) as connection:
            return bool(connection.scalar(text(sql), values))

    def request_abort(self, task_id: str) -> bool:
        """Ask one of the active tenant's tasks to stop early; it looks by ``should_abort()``.

        Returns:
            Whether it can: False for a foreign or unknown id, and for a task that has ended.
        """
        tenant = require_tenant()
        return self._retrying(self._request_abort, task_id, tenant)

    def _request_abort(self, task_id: str, tenant: TenantContext) -> bool:
        with self._begin(tenant.organization_id) as connection:
            asked = connection.scalar(
                text(
                    f"""
                    UPDATE {self._records} SET
                        abort_requested_at = coalesce(abort_requested_at, clock_timestamp()),
                        abort_requested_by = coalesce(abort_requested_by, :user_id)
                    WHERE {_ONE} AND state = ANY(:unfinished)
                    RETURNING true
                    """  # noqa: S608
                ),
                {
                    "o": tenant.organization_id,
                    "id": task_id,
                    "user_id": tenant.user_id,
                    "unfinished": _UNFINISHED,
                },
            )
        return bool(asked)

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

    # --- reading -----------------------------------------------------------------------------------------------

    def get_record(self, task_id: str) -> TaskRecord | None:
        """The record of one of the active tenant's tasks; None for a foreign, unknown or expired id alike.

        Raises:
            MissingTenantError: no tenant is active.
        """
        row = self._retrying(self._row, task_id, require_tenant().organization_id)
        if row is None:
            return None
        state = State(row["state"])
        values = {field.name: row[field.name] for field in dataclasses.fields(TaskRecord)}
        values["result"] = self._decode_stored_result(row["result"]) if state is State.SUCCESS else None
        values["state"] = state
        return TaskRecord(**values)

    def _row(self, task_id: str, organization_id: str) -> RowMapping | None:
        with self._begin(organization_id) as connection:
            return (
                connection.execute(
                    text(
                        f"SELECT * FROM {self._records} "  # noqa: S608
                        "WHERE organization_id = :organization_id AND task_id = :task_id"
                    ),
                    {"organization_id": organization_id, "task_id": task_id},
                )
                .mappings()
                .one_or_none()
            )

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        """A task as Celery's AsyncResult wants it; an unknown one is PENDING."""
        tenant = current_tenant()
        row = self._row(task_id, _organization(tenant))
        if row is None:
            if tenant is None:
                raise MissingTenantError(
                    f"task {task_id} cannot be looked up: no tenant is active, and no task without a tenant has this "
                    "id.  Read results inside tenant_scope(...)"
                )
            return dict(self.meta_from_decoded({"task_id": task_id, "status": "PENDING", "result": None}))
        meta: dict[str, Any] = {
            "task_id": task_id,
            "status": row["custom_state"] or to_celery(State(row["state"])),
            "result": self._decode_stored_result(row["result"]),
            "traceback": row["traceback"],
            "children": self.decode(row["children"]) if row["children"] else [],
            "date_done": row["finished_at"],
            "name": row["name"],
            "worker": row["worker"],
            "retries": row["retries"],
            "queue": row["queue"],
            "parent_id": row["parent_id"],
        }
        return dict(self.meta_from_decoded(meta))

    def task_result_exists(self, task_id: str) -> bool:
        """Whether the active tenant has a record of this task."""
        return self._retrying(self._row, task_id, _organization(current_tenant())) is not None

    def _forget(self, task_id: str) -> None:
        organization_id = _organization(current_tenant())
        with self._begin(organization_id) as connection:
            connection.execute(
                text(f"DELETE FROM {self._records} WHERE organization_id = :o AND task_id = :id"),  # noqa: S608
                {"o": organization_id, "id": task_id},
            )

    # --- groups ------------------------------------------------------------------------------------------------

    def _save_group(self, group_id: str, result: Any) -> Any:
        organization_id = _organization(current_tenant())
        with self._begin(organization_id) as connection:
            connection.execute(
                text(
                    f"INSERT INTO {self._groups} (organization_id, group_id, result) VALUES (:o, :id, :result) "  # noqa: S608
                    "ON CONFLICT (organization_id, group_id) DO UPDATE SET result = excluded.result"
                ),
                {
                    "o": organization_id,
                    "id": group_id,
                    "result": ensure_bytes(self.encode(self.prepare_value(result))),
                },
            )
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        organization_id = _organization(current_tenant())
        with self._begin(organization_id) as connection:
            row = connection.execute(
                text(f"SELECT result, created_at FROM {self._groups} WHERE organization_id = :o AND group_id = :id"),  # noqa: S608
                {"o": organization_id, "id": group_id},
            ).one_or_none()
        if row is None:
            return None
        stored = self._decode_stored_result(row.result)
        return {
            "task_id": group_id,
            "result": stored if stored is None else result_from_tuple(stored, self.app),
            "date_done": row.created_at,
        }

    def _delete_group(self, group_id: str) -> None:
        organization_id = _organization(current_tenant())
        with self._begin(organization_id) as connection:
            connection.execute(
                text(f"DELETE FROM {self._groups} WHERE organization_id = :o AND group_id = :id"),  # noqa: S608
                {"o": organization_id, "id": group_id},
            )

    def cleanup(self) -> None:
        """Delete what expired, of all tenants, in batches."""
        if not self.expires:
            return  # result_expires is None or 0: they never do
        before = datetime.datetime.now(datetime.UTC) - self.expires
        expire = text(f"SELECT {quote_identifier(self.schema)}.expire_records(:before)")
        while self._retrying(self._expire_batch, expire, before):
            pass

    def _expire_batch(self, expire: TextClause, before: datetime.datetime) -> int:
        with self._begin(_NO_TENANT) as connection:
            return int(connection.scalar(expire, {"before": before}) or 0)


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
    text_of = " ".join(map(str, message)) if isinstance(message, list | tuple) else str(message)
    return result.get("exc_type"), text_of
