"""Celery's soft time limit, as coroutines want it.

In a process of a prefork pool it is a signal whose handler raises, wherever the process is: in the middle of an event
loop, which would be broken by it.  Here it cancels the coroutine that runs, if there is one.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final, Protocol

from celery.exceptions import SoftTimeLimitExceeded

__all__ = ["Limited", "limited"]

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


_main_thread = threading.main_thread().ident
_watches = False  # the pool's handler was taken over
_current: Limited | None = None  # what runs in the main thread, where signals are handled
_insisting: deque[Limited] = deque()  # those for which the next signal was sent from here


def limited(run: Limited | None) -> Limited | None:
    """Say what runs in this thread now; what was before is returned.  Only the main thread's has a limit."""
    global _current
    if get_ident() != _main_thread:
        return None
    if not _watches and "billiard.pool" in sys.modules:
        _watch()
    before, _current = _current, run
    return before


def _watch() -> None:
    """Take over the pool's signal handler, if this is a process of a prefork pool."""
    global _watches
    if signal.getsignal(signal.SIGUSR1) is sys.modules["billiard.pool"].soft_timeout_sighandler:
        signal.signal(signal.SIGUSR1, _on_limit)
        _watches = True


def _start_in_child() -> None:
    """Begin anew: the one thread of a forked process is its main thread, and its pool puts its own handler there."""
    global _main_thread, _watches, _current
    _main_thread, _watches, _current = get_ident(), False, None


os.register_at_fork(after_in_child=_start_in_child)


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
        _thread.start_new_thread(_insist, (_current, get_ident()))


def _insist(run: Limited, thread_id: int, kill: Callable[[int, int], None] = signal.pthread_kill) -> None:
    """Send the signal again while the loop has not noticed: something blocks it."""
    time.sleep(BLOCKED_AFTER)
    while run.wants_interruption:
        if run not in _insisting:  # else the last one still waits for code in C to return
            _insisting.append(run)
            kill(thread_id, signal.SIGUSR1)
        time.sleep(BLOCKED_AFTER)
