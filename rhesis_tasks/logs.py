"""The context on every log record.

:func:`install` adds fields to each record made in this process, by whatever library: ``organization_id``,
``user_id``, ``task_id``, ``task_name``, ``root_id``, and the context variables registered with ``log=True``.
A field without a value is ``"-"``.  Arguments of tasks are never among them.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from celery._state import get_current_task
from celery.signals import after_setup_logger, after_setup_task_logger, celeryd_init

from .context import current_tenant
from .variables import LOG_FIELDS, MISSING, registered_vars

__all__ = [
    "FIELDS",
    "TASK_LOG_FORMAT",
    "WORKER_LOG_FORMAT",
    "JsonFormatter",
    "TaskLogger",
    "fields",
    "install",
    "install_json",
    "is_json_wanted",
    "uninstall",
]

FIELDS: Final = LOG_FIELDS
ABSENT: Final = "-"

WORKER_LOG_FORMAT: Final = (
    "[%(asctime)s: %(levelname)s/%(processName)s] [org=%(organization_id)s user=%(user_id)s] %(message)s"
)
TASK_LOG_FORMAT: Final = (
    "[%(asctime)s: %(levelname)s/%(processName)s] [org=%(organization_id)s user=%(user_id)s] "
    "%(task_name)s[%(task_id)s]: %(message)s"
)

_LOG_IS_SET_UP: Final = (after_setup_logger, after_setup_task_logger)

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
        celeryd_init.connect(_before_the_log, weak=False, dispatch_uid=f"{__name__}.json")
        for signal in _LOG_IS_SET_UP:
            signal.connect(_write_as_wanted, weak=False, dispatch_uid=f"{__name__}.format")
        _previous = logging.getLogRecordFactory()
        logging.setLogRecordFactory(_make_record)


def uninstall() -> None:
    """Undo :func:`install`, unless somebody else wrapped the record factory since."""
    global _previous
    if _previous is not None and logging.getLogRecordFactory() is _make_record:
        logging.setLogRecordFactory(_previous)
        _previous = None
        celeryd_init.disconnect(dispatch_uid=f"{__name__}.json")
        for signal in _LOG_IS_SET_UP:
            signal.disconnect(dispatch_uid=f"{__name__}.format")


# --- JSON --------------------------------------------------------------------------------------------------------

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``process``, the context, and ``message``.

    ``extra=`` of an application's own is in it, too; of what Celery and the like add, only what our lines about tasks
    do, since theirs quote arguments.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.processName,
        }
        line |= {name: getattr(record, name, ABSENT) for name in fields()}
        is_celerys = record.name.partition(".")[0] in ("celery", "kombu", "billiard")
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in line and (not is_celerys or name.startswith("task_")):
                line[name] = value
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)


def is_json_wanted() -> bool:
    """Whether LOG_FORMAT asks for JSON."""
    return os.environ.get("LOG_FORMAT", "").strip().lower() == "json"


def install_json() -> None:
    """Let the log of this process's worker be JSON, Celery's own lines too; again it changes nothing."""
    for signal in _LOG_IS_SET_UP:
        signal.connect(_write_json, weak=False, dispatch_uid=f"{__name__}.json")
    # The log is set up already when a worker's steps are made.
    for name in ("", "celery", "celery.task", "celery.redirected"):
        _write_json(logging.getLogger(name))
    from celery.apps import worker

    worker.safe_say = _say  # type: ignore[attr-defined,unused-ignore]  # what it prints inside of signal handlers


def _write_json(logger: logging.Logger, **_: object) -> None:
    for each in (logger, logging.getLogger("multiprocessing")):  # the latter tells of lost processes
        for handler in each.handlers:
            handler.setFormatter(JsonFormatter())


def _write_as_wanted(logger: logging.Logger, **_: object) -> None:
    """Celery has set up a log: a worker's, or beat's, which has no step of ours."""
    if is_json_wanted():
        _write_json(logger)


def _before_the_log(**_: object) -> None:
    """A worker begins: what is warned of before its log is set up (of running as root) is JSON, too."""
    if is_json_wanted():

        def show(message: object, category: type[Warning], *_: object, **__: object) -> None:
            _say(f"{category.__name__}: {message}")

        warnings.showwarning = show


def _say(text: str, *_: object) -> None:
    """A line without logging, whose locks the code may hold that a signal has interrupted."""
    record = logging.LogRecord("celery.apps.worker", logging.INFO, "", 0, text.strip(), None, None)
    os.write(2, f"\n{JsonFormatter().format(record)}\n".lstrip("\n").encode())


class TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """``self.log`` of a task: the logger of the task's module, with the context on every record.

    It carries the context also where :func:`install` was not called.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**fields(), **(kwargs.get("extra") or {})}
        return msg, kwargs
