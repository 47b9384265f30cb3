"""The context on every log record.

:func:`install` adds fields to each record made in this process, by whatever library: ``organization_id``,
``user_id``, ``task_id``, ``task_name``, ``root_id``, and the context variables registered with ``log=True``.
A field without a value is ``"-"``.  Arguments of tasks are never among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from celery._state import get_current_task

from .context import current_tenant
from .variables import LOG_FIELDS, MISSING, registered_vars

__all__ = ["FIELDS", "TASK_LOG_FORMAT", "TaskLogger", "WORKER_LOG_FORMAT", "fields", "install", "uninstall"]

FIELDS: Final = LOG_FIELDS
ABSENT: Final = "-"

WORKER_LOG_FORMAT: Final = (
    "[%(asctime)s: %(levelname)s/%(processName)s] [org=%(organization_id)s user=%(user_id)s] %(message)s"
)
TASK_LOG_FORMAT: Final = (
    "[%(asctime)s: %(levelname)s/%(processName)s] [org=%(organization_id)s user=%(user_id)s] "
    "%(task_name)s[%(task_id)s]: %(message)s"
)

_previous: Callable[..., logging.LogRecord] | None = None


def fields() -> dict[str, Any]:
    """The context of the running code, as log fields."""
    tenant = current_tenant()
    task: Any = get_current_task()
    request = None if task is None else task.request
    values: dict[str, Any] = {
        "organization_id": tenant.organization_id if tenant else ABSENT,
        "user_id": (tenant.user_id if tenant else None) or ABSENT,
        "task_id": (request.id if request is not None else None) or ABSENT,
        "task_name": task.name if task is not None else ABSENT,
        "root_id": (request.root_id if request is not None else None) or ABSENT,
    }
    for name, registered in registered_vars().items():
        if registered.log:
            value = registered.value()
            values[name] = ABSENT if value is MISSING else value
    return values


class _RecordFields(dict[str, Any]):
    """A record's attributes, among which ours do not count as taken.

    ``logging`` refuses ``extra={"user_id": ...}`` if the record has such an attribute already.  Applications
    do pass that, and their value shall win instead of their log call failing.
    """

    def __init__(self, attributes: dict[str, Any], ours: dict[str, Any]) -> None:
        super().__init__(attributes)
        self.update(ours)
        self._ours = frozenset(ours)

    def __contains__(self, key: object) -> bool:
        return key not in self._ours and super().__contains__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    assert _previous is not None  # noqa: S101 - set by install() before this can be called
    record = _previous(*args, **kwargs)
    record.__dict__ = _RecordFields(record.__dict__, fields())
    return record


def install() -> None:
    """Put the context on every log record of this process from now on; calling it again changes nothing."""
    global _previous
    if _previous is None:
        _previous = logging.getLogRecordFactory()
        logging.setLogRecordFactory(_make_record)


def uninstall() -> None:
    """Undo :func:`install`, unless somebody else wrapped the record factory since."""
    global _previous
    if _previous is not None and logging.getLogRecordFactory() is _make_record:
        logging.setLogRecordFactory(_previous)
        _previous = None


class TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """``self.log`` of a task: the logger of the task's module, with the context on every record.

    It carries the context also where :func:`install` was not called.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**fields(), **(kwargs.get("extra") or {})}
        return msg, kwargs
