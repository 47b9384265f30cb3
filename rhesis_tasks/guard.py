"""What a worker looks at before it starts, and before Celery looks for a message's task.

A step of the consumer's, added to the application's blueprint.  What becomes of the message of a task that is known is
:mod:`rhesis_tasks.request`'s.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from celery import Task, bootsteps
from celery.utils.imports import symbol_by_name
from celery.utils.objects import Bunch
from kombu.serialization import prepare_accept_content
from kombu.utils.functional import maybe_list
from typing_extensions import override

from .context import TenantContext, exactly
from .errors import DatabaseUnavailableError, DeadLetterError, MissingTenantError, RhesisTasksError
from .headers import decode, find
from .hooks import has_async_hooks
from .outcomes import log_unknown
from .propagation import records, signer_of

if TYPE_CHECKING:
    from celery import Celery
    from kombu.message import Message

__all__ = ["Guard", "refuse_async_tasks", "refuse_deduplication", "refuse_to_start"]

_log = logging.getLogger(__name__)
_security = logging.getLogger("rhesis_tasks.security")
_PICKLE: Final = frozenset({"pickle", "application/x-python-serialize"})


class Guard(bootsteps.StartStopStep):
    """Discards what Celery would stumble over, and what nobody has signed for a task that is not known here."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    @override
    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        logging.getLogger("celery.worker.consumer.consumer").addFilter(_names_no_arguments)
        logging.getLogger("celery.worker.control").addFilter(_is_no_missing_tenant)
        logging.getLogger("celery.worker").addFilter(_says_what_helps_alone)
        create_handler = parent.create_task_handler
        parent.create_task_handler = lambda: self._guarded(parent, create_handler())

    @override
    def start(self, parent: Any) -> None:
        refuse_async_tasks(parent.app, type(parent.pool).__module__.rpartition(".")[2])
        refuse_deduplication(parent.app)
        transport = parent.connection.transport
        if hasattr(transport, "on_dead"):
            transport.on_dead = functools.partial(_give_up, parent)
            _hasten_what_is_revoked()
        if signer_of(parent.app) is not None:
            refuse_to_start(parent.app)
            if getattr(parent, "gossip", None) is not None:
                # By gossip, which nobody signs, a worker could be told to publish something, and would sign it.
                parent.gossip.election_handlers.clear()

    def _guarded(self, parent: Any, handle: Callable[[Message], Any]) -> Callable[[Message], Any]:
        signer = signer_of(parent.app)

        def on_task_received(message: Message) -> Any:
            headers: object = message.headers
            name = headers.get("task", "") if isinstance(headers, dict) else ""
            if not isinstance(name, str):
                _log.error("a message whose task is a %s is discarded", type(name).__name__)
            elif signer is not None and name not in parent.strategies and not signer.accepts(message):
                _security.warning("a message of task %.200r, which is not known, is not signed: it is discarded", name)
            elif name and name not in parent.strategies:
                return _fail_unknown(name, headers, lambda: handle(message))
            else:
                return handle(message)
            return message.reject_log_error(_log, parent.connection_errors)

        return on_task_received


def _fail_unknown(name: str, headers: Any, handle: Callable[[], Any]) -> Any:
    """Let Celery store the failure of a task that is not known here, in its tenant's record.

    Its line quotes the message, and with it the arguments: ours takes its place.
    """
    with exactly(_tenant_in(headers)):
        log_unknown(name, headers.get("id"))
        return handle()


def _tenant_in(headers: Any) -> TenantContext | None:
    try:
        found = find(headers)
        return None if found is None else decode(found).tenant
    except Exception:  # whatever a message brings along
        return None


def _give_up(parent: Any, message: Message, reason: str) -> None:
    """Store the failure of a task whose message the broker gives up, and tell those who wait for it."""
    from .request import ContextRequest

    headers: object = message.headers
    name = headers.get("task") if isinstance(headers, dict) else None
    if not isinstance(headers, dict) or not isinstance(name, str) or not name:
        return  # no task's
    error = DeadLetterError(f"its message was given up: {reason}")
    message.accept = prepare_accept_content(parent.app.conf.accept_content)  # as if it had been delivered
    task = parent.app.tasks.get(name)
    if task is None:
        signer = signer_of(parent.app)
        if signer is None or signer.accepts(message):
            # As Celery has it for tasks that it does not know.
            unknown = Bunch(name=name, task=name, chord=None, root_id=headers.get("root_id"), errbacks=None)
            with exactly(_tenant_in(headers)):
                parent.app.backend.mark_as_failure(headers["id"], error, request=unknown)
        return
    request = symbol_by_name(task.Request)(
        message,
        app=parent.app,
        hostname=parent.hostname,
        eventer=parent.event_dispatcher,
        task=task,
        **({} if _can_be_read(message) else {"body": ((), {}, {}), "decoded": True}),
    )
    if isinstance(request, ContextRequest):
        request.give_up(error)
    else:
        task.backend.mark_as_failure(request.id, error, request=request._context, store_result=request.store_errors)


def _can_be_read(message: Message) -> bool:
    """Whether its body can; if not, its headers still say whose task has failed, but not what was to follow it."""
    try:
        message.decode()
    except Exception:  # whatever a serializer raises
        return False
    return not message.errors


def _hasten_what_is_revoked() -> None:
    """Let workers have the message of a delayed task when it is revoked: they do not remember that until it is due."""
    from celery.worker.control import Panel  # only workers have it

    revoke = Panel.data["revoke"]
    if getattr(revoke, "hastens", False):
        return

    @functools.wraps(revoke)
    def hastening(state: Any, task_id: Any, *args: Any, **options: Any) -> Any:
        reply = revoke(state, task_id, *args, **options)
        transport: Any = getattr(state.consumer.connection, "transport", None)
        if hasattr(transport, "on_dead"):  # it is ours
            try:
                transport.queue.hasten([str(each) for each in maybe_list(task_id) or ()])
            except DatabaseUnavailableError as error:
                _log.warning("what is revoked and delayed stays delayed for now: %s", error)
        return reply

    hastening.hastens = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = hastening


def _names_no_arguments(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Received unregistered task of type ")


def _is_no_missing_tenant(record: logging.LogRecord) -> bool:
    """A worker that is told to revoke a task does not know whose it is before it has the message, which it revokes."""
    return not (
        str(record.msg).startswith("Failed to mark task ")
        and isinstance(record.args, tuple)
        and isinstance(record.args[-1], MissingTenantError)
    )


def _says_what_helps_alone(record: logging.LogRecord) -> bool:
    """An error of ours that ends a worker is somebody's to mend: below a traceback of Celery's nobody reads how."""
    error = record.exc_info[1] if record.exc_info else None
    if str(record.msg).startswith("Unrecoverable error") and isinstance(error, RhesisTasksError):
        record.msg, record.args, record.exc_info = "Unrecoverable error: %s: %s", (type(error).__name__, error), None
    return True


def refuse_async_tasks(app: Celery, pool: str) -> None:
    """Check that a pool can run the application's tasks.

    Raises:
        SystemExit: there are ``async def`` tasks or hooks, and the pool has one thread for all of its greenlets: it
            could run one event loop.
    """
    if pool not in ("gevent", "eventlet"):
        return
    app.finalize()
    tasks = sorted(name for name, task in app.tasks.items() if getattr(task, "is_async", False))
    hooked = sorted(name for name, task in app.tasks.items() if has_async_hooks(task))
    for what, found in (("tasks", tasks), ("hooks of tasks", hooked)):
        if found:
            raise SystemExit(
                f"application {app.main!r} has async def {what}, which a {pool} worker cannot run: {', '.join(found)}"
                ".  Start it with --pool prefork, threads or solo, or do not import them there"
            )


def refuse_deduplication(app: Celery) -> None:
    """Check that a message that is delivered again is not looked up where there are tenants' records.

    Raises:
        SystemExit: it would be: Celery does so before anybody knows whose the task is, by its id alone.
    """
    if app.conf.worker_deduplicate_successful_tasks and records(app):
        raise SystemExit(
            f"application {app.main!r} sets worker_deduplicate_successful_tasks, which goes by a task's id alone: with "
            "results in PostgreSQL, where each tenant has its own, it loses what is delivered again.  Switch it off"
        )


def refuse_to_start(app: Celery) -> None:
    """Check that nothing runs that nobody has signed, where context is signed.

    Raises:
        SystemExit: a task does not look at its messages, or pickle is accepted.
    """
    app.finalize()
    blind = sorted(name for name, task in app.tasks.items() if not _looks(task))
    if blind:
        raise SystemExit(
            f"application {app.main!r} has signing_keys, but its tasks {', '.join(blind)} do not check signatures: let "
            "them inherit from rhesis_tasks.BaseTask first, and have no Request and no Strategy of their own"
        )
    if _PICKLE & set(app.conf.accept_content):
        raise SystemExit(
            f"application {app.main!r} has signing_keys, and accepts pickle: a message runs code before anybody can "
            "look at its signature.  Take it out of accept_content"
        )


def _looks(task: Any) -> bool:
    return getattr(symbol_by_name(task.Request), "checks_signatures", False) and task.Strategy == Task.Strategy
