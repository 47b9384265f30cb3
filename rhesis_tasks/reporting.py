"""What a running task says of itself and hears meanwhile: its progress, and whether it shall stop early.

Both are in the task's record.  They are written and read at most once a second, never where an event loop would wait
for it.  An unreachable database changes nothing for the task, and a slow one takes at most a tenth of its time; but one
that has answered after minutes is asked again within half a minute, since somebody may wait for the task to stop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from celery.exceptions import SoftTimeLimitExceeded

from .context import exactly
from .errors import InvalidProgressError
from .headers import Progress, RequestState

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["INTERVAL", "Reporter", "checked_progress"]

INTERVAL: Final = 1.0
"""Seconds between two writes or looks of one task, at least."""

SHARE: Final = 0.1
"""Of a task's time, for both."""

LONGEST: Final = 30.0
"""Seconds between two looks, at most: after an outage of a minute a tenth would be nine minutes without hearing."""

_log = logging.getLogger(__name__)


def checked_progress(done: object, total: object, message: object) -> Progress:
    """What a task reports.

    Raises:
        InvalidProgressError: ``done`` or ``total`` is no number of 0 or more, or the message no text.
    """
    for name, value in (("done", done), ("total", total)):
        if name == "total" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise InvalidProgressError(f"{name} is an int of 0 or more, not {value!r:.80}")
    if not isinstance(message, str):
        raise InvalidProgressError(f"the message is a str, not {message!r:.80}")
    return Progress(done, total, message)  # type: ignore[arg-type]  # checked above


class Reporter:
    """Writes and reads for one run of a task.

    Args:
        app: the task's application; with a result backend that keeps no records there is nobody to ask.
        task_id: the task's id.
        state: the state of its request.
    """

    def __init__(self, app: Celery, task_id: str, state: RequestState) -> None:
        self._backend: Any = app.backend
        self._task_id = task_id
        self._state = state
        self._due = -math.inf  # when the record may be asked again
        self._asking = threading.Lock()
        self._recorded: Progress | None = None
        self._is_asked_to_abort = False

    @property
    def is_asked_to_abort(self) -> bool:
        """What is known, without a look."""
        return self._is_asked_to_abort

    def report(self, progress: Progress) -> None:
        """Record the progress, now or with the next report or the task's end."""
        self._state.progress = progress
        self.look()

    def look(self) -> None:
        """Ask the record, if it is time; where an event loop runs, in the background."""
        if not self._is_due():
            return
        loop = asyncio._get_running_loop()
        if loop is None:
            self._exchange()
        else:
            loop.run_in_executor(None, self._exchange)

    async def look_and_wait(self) -> None:
        """Ask the record, if it is time, and wait for what it says."""
        if self._is_due():
            await asyncio.to_thread(self._exchange)

    def write(self) -> None:
        """Record what is not recorded yet: once another attempt has begun, how this one ends does not count."""
        if self._state.progress != self._recorded:
            self._exchange(patience=INTERVAL)

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now < self._due or self._asking.locked():
            return False
        self._due = now + INTERVAL
        return True

    def _exchange(self, patience: float = 0) -> None:
        if not self._asking.acquire(timeout=patience):
            return
        began = time.monotonic()
        progress = self._state.progress  # the latest, since a thread may come to this late
        try:
            with exactly(self._state.tenant):  # whatever scope the body is in
                if self._backend.store_progress(self._task_id, None if progress == self._recorded else progress):
                    self._is_asked_to_abort = True
            self._recorded = progress
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            _log.warning("the progress of task %s could not be recorded: %s", self._task_id, error)
        finally:
            now = time.monotonic()
            self._due = now + min(max(INTERVAL, (now - began) * (1 / SHARE - 1)), LONGEST)
            self._asking.release()
