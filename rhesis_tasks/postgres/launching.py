"""A launch whose record is written with its message: one statement, one round trip, one commit.

The result backend says here what is to be recorded, and the broker's channel takes it along with the message, if both
are in one database.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

__all__ = ["Launch", "launch_of", "launching"]


@dataclasses.dataclass(slots=True, eq=False)
class Launch:
    """What is to be recorded."""

    place: tuple[str, str]  #: the URL, as a string without driver, and the schema
    task_id: str
    values: tuple[Any, ...]  #: of the function ``record_launch``
    is_new: bool | None = None  #: whether the task was new; None until it is recorded


_current: Final[ContextVar[Launch | None]] = ContextVar("rhesis_tasks_launch", default=None)


@contextmanager
def launching(launch: Launch) -> Iterator[None]:
    """The message that is published in the block takes the record along."""
    token = _current.set(launch)
    try:
        yield
    finally:
        _current.reset(token)


def launch_of(task_id: str | None, place: tuple[str, str]) -> Launch | None:
    """What is to be recorded with the message of this task, there."""
    launch = _current.get()
    return launch if launch is not None and (launch.task_id, launch.place) == (task_id, place) else None
