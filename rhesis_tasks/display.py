"""Records of tasks as a terminal shows them."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from .states import TERMINAL, State
from .status import TaskNode, get_task

if TYPE_CHECKING:
    from celery import Celery

    from .postgres.records import TaskRecord

__all__ = ["describe", "follow_task", "line", "outline", "progress_text"]

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

    Returns:
        The record at the end; None if there is no such task.
    """
    record = get_task(app, task_id)
    shown: object = None
    bar: Any = None
    while record is not None and record.state not in TERMINAL:
        if sys.stdout.isatty():
            bar = _bar(bar, record)
        elif (now := (record.state, record.progress_done)) != shown:
            shown = now
            click.echo(line(record))
        time.sleep(LOOK_EVERY)
        record = get_task(app, task_id)
    if bar is not None:
        if record is not None and record.state is State.SUCCESS:
            bar.update(max(0, bar.length - bar.pos))
        bar.render_finish()
    return record


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
