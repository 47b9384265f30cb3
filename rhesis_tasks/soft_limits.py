"""Celery's soft time limit, as coroutines want it.

In a process of a prefork pool it is a signal whose handler raises, wherever the process is: in the middle of an event
loop, which would be broken by it.  Here it cancels the coroutine that runs, if there is one.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from celery.exceptions import SoftTimeLimitExceeded

__all__ = ["Limited", "limited", "watch"]

BLOCKED_AFTER: Final = 1.0
"""Seconds that an event loop has to notice the limit, before the code that blocks it is interrupted."""


class Limited(Protocol):
    """What runs on an event loop and has a soft time limit.  All of it is called by a signal, between any two
    instructions of the loop's thread."""

    @property
    def wants_interruption(self) -> bool:
        """Whether it runs, and has not noticed a limit yet."""

    @property
    def is_in_code(self) -> bool:
        """Whether the loop is in the middle of a coroutine's code."""

    def interrupt(self) -> None:
        """Cancel it, as soon as the loop can."""


_current: Limited | None = None  # what runs in the main thread, where signals are handled
_insisting: deque[Limited] = deque()  # those for which the next signal was sent from here


def limited(run: Limited | None) -> Limited | None:
    """Say what runs in this thread now; what was before is returned.  Only the main thread's has a limit."""
    global _current
    if threading.get_ident() != threading.main_thread().ident:
        return None
    before, _current = _current, run
    return before


def watch() -> None:
    """Take over the pool's signal handler, if this is a process of a prefork pool."""
    pool = sys.modules.get("billiard.pool")  # as it is in such a process
    if (
        pool is not None
        and threading.get_ident() == threading.main_thread().ident
        and signal.getsignal(signal.SIGUSR1) is pool.soft_timeout_sighandler
    ):
        signal.signal(signal.SIGUSR1, _on_limit)


def _on_limit(*_: Any) -> None:
    if _insisting:
        run = _insisting.popleft()
        if run.wants_interruption and run.is_in_code:
            raise SoftTimeLimitExceeded  # in code that does not await, as in a synchronous task
    elif _current is None:
        raise SoftTimeLimitExceeded  # as the pool's own handler does
    elif _current.wants_interruption:
        _current.interrupt()
        # By the low-level module, since the signal may have interrupted what holds a lock of threading's.
        _thread.start_new_thread(_insist, (_current, threading.get_ident()))


def _insist(run: Limited, thread_id: int, kill: Callable[[int, int], None] = signal.pthread_kill) -> None:
    """Send the signal again while the loop has not noticed: something blocks it."""
    time.sleep(BLOCKED_AFTER)
    while run.wants_interruption:
        if run not in _insisting:  # else the last one still waits for code in C to return
            _insisting.append(run)
            kill(thread_id, signal.SIGUSR1)
        time.sleep(BLOCKED_AFTER)
