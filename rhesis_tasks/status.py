"""What a tenant sees of its tasks, and can do to them.

All of it is for the active tenant: a foreign, unknown or expired id is None, whatever is asked.  Needs the result
backend on PostgreSQL.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from .context import require_tenant
from .errors import NotSupportedError
from .postgres.records import Filter
from .states import State

if TYPE_CHECKING:
    from celery import Celery

    from .postgres.records import TaskRecord

__all__ = ["STOP", "Cancellation", "TaskNode", "cancel_task", "get_task", "list_tasks", "stop_tasks", "task_tree"]

STOP: Final = "rhesis_tasks_stop"
"""The remote control command by which workers are told to stop tasks.  Celery's ``revoke`` knows ids alone."""

MAX_TREE: Final = 10_000
"""The largest number of tasks in a tree."""

MAX_DEPTH: Final = 100
"""The largest number of levels below a tree's root: pydantic, JSON parsers and Python itself end at some."""


class Cancellation(StrEnum):
    """What cancelling a task has done."""

    CANCELLED = "cancelled"  #: it had not started, and never will
    ASKED = "asked"  #: it runs, and was asked to stop
    TERMINATED = "terminated"  #: it runs, was asked to stop, and its worker told to end it (where the pool can)
    ENDED = "ended"  #: it had ended before


@dataclasses.dataclass(frozen=True, slots=True)
class TaskNode:
    """A task and those that it has launched."""

    record: TaskRecord
    children: tuple[TaskNode, ...]


def get_task(app: Celery, task_id: str | UUID) -> TaskRecord | None:
    """One task's record.

    Raises:
        MissingTenantError: no tenant is active.
        NotSupportedError: the result backend keeps no records.
        TypeError: the id is none.
    """
    record: TaskRecord | None = _backend(app).get_record(_id(task_id))
    return record


def list_tasks(
    app: Celery,
    *,
    states: State | str | Iterable[State | str] | None = None,
    name: str | None = None,
    root_id: str | UUID | None = None,
    launched_from: datetime.datetime | None = None,
    launched_before: datetime.datetime | None = None,
    limit: int = 50,
    after: tuple[datetime.datetime, str] | None = None,
) -> list[TaskRecord]:
    """Records, the latest launch first.

    Args:
        app: a configured application.
        states: those that are in this state, or in one of these.
        name: those of this task.
        root_id: those of this run.
        launched_from: those launched then or later.
        launched_before: those launched before.
        limit: how many at most.
        after: ``(launched_at, task_id)`` of the last one that was seen, to go on behind it, whatever was launched
            meanwhile.

    Raises:
        MissingTenantError: no tenant is active.
        NotSupportedError: the result backend keeps no records.
        ValueError: there is no such state, or ``limit`` is no int of 0 or more.
        TypeError: ``root_id`` is no id.
    """
    if type(limit) is not int or limit < 0:
        raise ValueError(f"limit is how many tasks at most, an int of 0 or more, not {limit!r:.40}")
    root_id = None if root_id is None else _id(root_id)
    which = Filter(_states(states), name, root_id, launched_from, launched_before)
    records: list[TaskRecord] = _backend(app).list_records(which, limit=limit, after=after)
    return records


def cancel_task(app: Celery, task_id: str | UUID, *, terminate: bool = False) -> Cancellation | None:
    """Cancel a task: one that has not started never will, one that runs is asked to stop (``should_abort()``).

    Its record says who has cancelled it, the first time.

    Args:
        app: a configured application.
        task_id: the task's.
        terminate: besides, have the worker end a task that runs: with prefork its process.  Other pools go on.

    Raises:
        MissingTenantError: no tenant is active.
        NotSupportedError: the result backend keeps no records.
        TypeError: the id is none.
    """
    backend, task_id = _backend(app), _id(task_id)
    if backend.cancel_waiting(task_id):
        return Cancellation.CANCELLED
    if backend.request_abort(task_id):
        if not terminate:
            return Cancellation.ASKED
        stop_tasks(app, [(require_tenant().organization_id, task_id)], terminate=True)
        return Cancellation.TERMINATED
    return None if backend.get_record(task_id) is None else Cancellation.ENDED


def stop_tasks(app: Celery, tasks: Iterable[tuple[str | None, str]], *, terminate: bool) -> None:
    """Tell all workers not to begin with some tasks.

    Args:
        app: whose workers.
        tasks: the organization and the id of each; None where its message names none.
        terminate: whether they are to end those that run, too; where the pool can, which is prefork.
    """
    app.control.broadcast(STOP, arguments={"tasks": [list(each) for each in tasks], "terminate": terminate})


def task_tree(app: Celery, task_id: str | UUID) -> TaskNode | None:
    """The run that a task belongs to, from its root: what was launched by whom, and where it is.

    Tasks whose parent is not there any more hang on the root, and so does the first launched of some whose parents lead
    in a circle.  What is deeper than :data:`MAX_DEPTH` levels hangs on its ancestor at the last one.  Not more than the
    latest :data:`MAX_TREE` tasks and the root.

    Raises:
        MissingTenantError: no tenant is active.
        NotSupportedError: the result backend keeps no records.
        TypeError: the id is none.
    """
    backend = _backend(app)
    own = backend.get_record(_id(task_id))
    if own is None:
        return None
    root_id = own.root_id or own.task_id
    records = {each.task_id: each for each in backend.list_records(Filter(root_id=root_id), limit=MAX_TREE)}
    records.setdefault(own.task_id, own)
    root = records.get(root_id) or backend.get_record(root_id) or min(records.values(), key=_launched)
    return _node(root, _by_parent(root, records), MAX_DEPTH)


def _by_parent(root: TaskRecord, records: Mapping[str, TaskRecord]) -> Mapping[str, Sequence[TaskRecord]]:
    """The tasks below each one, in the order of their launch, such that all are somewhere below the root."""
    children: defaultdict[str, list[TaskRecord]] = defaultdict(list)
    others = sorted((each for each in records.values() if each.task_id != root.task_id), key=_launched)
    for record in others:
        is_known = record.parent_id is not None and record.parent_id in records
        children[str(record.parent_id) if is_known else root.task_id].append(record)
    reached = {each.task_id for each in _below(root, children)}
    for record in others:
        if record.task_id not in reached:  # launched again, by one that it has launched
            children[str(record.parent_id)].remove(record)
            children[root.task_id] = sorted([*children[root.task_id], record], key=_launched)
            reached |= {record.task_id, *(each.task_id for each in _below(record, children))}
    return children


def _below(record: TaskRecord, children: Mapping[str, Sequence[TaskRecord]]) -> Iterator[TaskRecord]:
    waiting = list(children.get(record.task_id, ()))
    while waiting:
        yield (each := waiting.pop())
        waiting += children.get(each.task_id, ())


def _node(record: TaskRecord, children: Mapping[str, Sequence[TaskRecord]], levels: int) -> TaskNode:
    if levels == 1:
        return TaskNode(record, tuple(TaskNode(each, ()) for each in sorted(_below(record, children), key=_launched)))
    return TaskNode(record, tuple(_node(each, children, levels - 1) for each in children.get(record.task_id, ())))


def _launched(record: TaskRecord) -> tuple[datetime.datetime, str]:
    return record.launched_at, record.task_id


def _id(task_id: object) -> str:
    """A task's id as Celery has it."""
    if isinstance(task_id, str):
        return task_id
    if isinstance(task_id, UUID):
        return str(task_id)
    raise TypeError(f"the id of a task is a str or UUID, not {type(task_id).__name__}.  That of a result is result.id")


def _states(states: State | str | Iterable[State | str] | None) -> list[State] | None:
    if states is None:
        return None
    try:
        return [State(each) for each in ([states] if isinstance(states, str) else states)]
    except ValueError:
        raise ValueError(f"states are {', '.join(State)}, not {states!r}") from None


def _backend(app: Celery) -> Any:
    backend: Any = app.backend
    if not hasattr(backend, "get_record"):
        raise NotSupportedError(
            f"the result backend {backend.as_uri()} keeps no records of tenants, so no task can be shown or cancelled "
            "for one of them only.  Use result_backend='postgresql://...'"
        )
    return backend
