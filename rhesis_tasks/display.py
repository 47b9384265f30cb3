"""Records, messages and what operators did, as a terminal shows them: in 80 columns, without colours."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import click
from sqlalchemy.exc import OperationalError

from .errors import DatabaseUnavailableError
from .states import TERMINAL, State
from .status import TaskNode, get_task

if TYPE_CHECKING:
    from celery import Celery

    from .operations import AuditRecord, MessageCount, MessageInfo, Operation
    from .postgres.records import TaskRecord

__all__ = [
    "as_json",
    "audit_line",
    "count_table",
    "describe",
    "follow_task",
    "line",
    "message_lines",
    "operation_lines",
    "outline",
    "progress_text",
]

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at a task that is followed."""


def describe(record: TaskRecord) -> str:
    """All that is known of a task, a line for each."""
    values = {
        "task": record.task_id,
        "name": record.name,
        "state": _state(record),
        "progress": _progress(record),
        "retries": record.retries or None,
        "organization": record.organization_id,
        "user": record.user_id,
        "root": record.root_id if record.root_id != record.task_id else None,
        "parent": record.parent_id,
        "queue": record.queue,
        "worker": record.worker,
        "not before": _time(record.eta),
        "launched": _time(record.launched_at),
        "started": _time(record.started_at),
        "last start": _time(record.last_started_at) if record.retries else None,
        "finished": _time(record.finished_at),
        "cancelled": _time(record.abort_requested_at),
        "cancelled by": record.abort_requested_by,
        "error": f"{record.error_type}: {record.error_message}" if record.error_type else None,
        "reason": record.failure_reason,
        "result": repr(record.result) if record.state is State.SUCCESS else None,
    }
    return "\n".join(f"{name + ':':14}{value}" for name, value in values.items() if value is not None)


def line(record: TaskRecord) -> str:
    """A task in one line."""
    progress = _progress(record)
    more = [f"[{progress}]"] if progress and record.state not in TERMINAL else []
    if record.error_type:
        more.append(f"{record.error_type}: {(record.error_message or '').partition(chr(10))[0]:.80}")
    return " ".join([_time(record.launched_at) or "", record.task_id, f"{_state(record):9}", record.name or "-", *more])


def outline(node: TaskNode, depth: int = 0) -> Iterator[str]:
    """A tree of tasks, a line for each."""
    yield "  " * depth + line(node.record)
    for child in node.children:
        yield from outline(child, depth + 1)


def progress_text(done: int, total: int | None, message: str | None) -> str:
    """How far a task is, in a few words."""
    return f"{done}{'' if total is None else f' of {total}'} {message or ''}".rstrip()


def follow_task(app: Celery, task_id: str) -> TaskRecord | None:
    """Show the progress of one of the active tenant's tasks until it ends: a bar on a terminal, else a line per change.

    If the database cannot be reached meanwhile, it says so once, on standard error, and goes on when it is back.

    Returns:
        The record at the end; None if there is no such task.

    Raises:
        DatabaseUnavailableError: the database could not be reached from the start.
    """
    record = get_task(app, task_id)
    shown: object = None
    bar: Any = None
    is_away = False
    while record is not None and record.state not in TERMINAL:
        if sys.stdout.isatty():
            bar = _bar(bar, record)
        elif (now := (record.state, record.progress_done)) != shown:
            shown = now
            click.echo(line(record))
        time.sleep(LOOK_EVERY)
        try:
            record, is_away = get_task(app, task_id), False
        except (DatabaseUnavailableError, OperationalError) as error:
            if not is_away:
                click.echo(f"{str(error).splitlines()[0]}  Looking again until it answers ...", err=True)
            is_away = True
    if bar is not None:
        if record is not None and record.state is State.SUCCESS:
            bar.update(max(0, bar.length - bar.pos))
        bar.render_finish()
    return record


def message_lines(message: MessageInfo) -> Iterator[str]:
    """A message in two or three lines, which fit a terminal of 80 columns."""
    now = datetime.datetime.now(datetime.UTC)
    yield f"{message.state:8}{_age(now - message.published_at):>6}  {message.task_id or '-':36}  {message.queue}"
    owner = "no organization" if message.organization_id is None else f"organization {message.organization_id}"
    yield f"{'':16}{message.task_name or '-'}"
    yield f"{'':16}{owner}" + (f", user {message.user_id}" if message.user_id else "")
    more = []
    if message.due_at is not None:
        more.append(f"due {_time(message.due_at)}")
    if message.worker is not None:
        more.append(f"by {message.worker}")
    if message.deliveries:
        more.append(f"delivered {message.deliveries} {'time' if message.deliveries == 1 else 'times'}")
    if message.reason is not None:
        more.append(message.reason)
    if more:
        yield f"{'':16}{'; '.join(more)}"


def count_table(counts: Iterable[MessageCount], title: str) -> Iterator[str]:
    """A table of how many messages there are."""
    now = datetime.datetime.now(datetime.UTC)
    yield f"{'state':9}{'messages':>10}{'oldest':>8}  {title}"
    for each in counts:
        yield f"{each.state:9}{each.number:>10,}{_age(now - each.oldest):>8}  {each.name or '-'}"


def operation_lines(done: Operation, bounded: str | None = None) -> Iterator[str]:
    """What an operation came to, or would.

    Args:
        done: the operation.
        bounded: the command that does it to what was counted alone, where there is one.
    """
    yield f"{done.action} of {_filter_text(done.filter.values())}"
    yield f"{'':12}{'before':>10}" + ("" if done.is_dry_run else f"{'after':>10}")
    for state, number in done.before.items():
        yield f"{'':2}{state:10}{number:>10,}" + ("" if done.is_dry_run else f"{done.after.get(state, 0):>10,}")
    others = {name: number for name, number in done.counts.items() if name not in set(done.before)}
    for name, number in others.items():
        yield f"{'':2}{name:10}{number:>10,}"
    if done.records is None:
        yield "No record of a task is touched: results are kept elsewhere."
    if done.is_dry_run and bounded is not None:
        yield "Nothing was changed.  Do it with --yes; without what is published from now on:"
        yield f"  {bounded}"
    elif done.is_dry_run:
        yield "Nothing was changed.  Do it with --yes."
    else:
        yield f"Done by {done.operator}, audit record {done.id}."


def audit_line(record: AuditRecord) -> str:
    """What an operator did, in two lines."""
    counts = ", ".join(f"{name} {number:,}" for name, number in sorted(record.counts.items()))
    return (
        f"{_time(record.at)}  {record.action} by {record.operator} ({record.login}): {counts}\n"
        f"{'':22}{_filter_text(record.filter)}"
    )


def as_json(value: Any) -> str:
    """A record, message or outcome for programs; times in ISO 8601."""
    return json.dumps(_plain(value), ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime.datetime) else value


def _filter_text(values: Mapping[str, Any]) -> str:
    words = {"organization_id": "organization", "user_id": "user", "task_name": "task", "task_id": "id"}
    parts = []
    for name, value in sorted(values.items()):
        text = "+".join(value) if isinstance(value, list) else str(value)
        parts.append(f"{words.get(name, name.replace('_', ' '))} {text or '(none)'}")
    return ", ".join(parts) or "everything"


def _age(age: datetime.timedelta) -> str:
    """How long ago, in one unit."""
    seconds = max(0, int(age.total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _bar(bar: Any, record: TaskRecord) -> Any:
    """The progress bar of a task, moved to where the task is; another one if it has changed its total."""
    total = record.progress_total or max(1, record.progress_done or 0)
    if bar is None or bar.length != total:
        bar = click.progressbar(length=total, label=_state(record), show_pos=True)
    bar.label = f"{_state(record)} {record.progress_message or ''}".rstrip()
    bar.update((record.progress_done or 0) - bar.pos)
    bar.render_progress()
    return bar


def _state(record: TaskRecord) -> str:
    return f"{record.state} ({record.custom_state})" if record.custom_state else str(record.state)


def _progress(record: TaskRecord) -> str | None:
    if record.progress_done is None:
        return None
    return progress_text(record.progress_done, record.progress_total, record.progress_message)


def _time(moment: datetime.datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
