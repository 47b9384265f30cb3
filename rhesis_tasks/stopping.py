"""A worker's end within a bound.

Celery's warm shutdown waits for what runs, however long that takes.  Here it has so many seconds; then Celery is told
to shut down cold, which stops what runs and lets its messages be given back.  If that does not end the process within
moments (threads cannot be stopped), it is ended here.  Whoever tells the worker to stop a second time does not want to
wait at all.

Celery shuts down cold inside of the signal's handler, in the middle of whatever the main thread does.  If it was about
to log, the threads that are waited for wait for it; if it was writing to a process, that understands nothing any more.
So what comes next may never end, and the moments count from there, whoever has asked for it.

When Celery's consumer ends it forgets what its pool's processes have been given and have not begun with.  They do it
all the same: it would stay without an acknowledgement, be done a second time by another worker, and the processes would
wait half a minute to be asked for its result.  Here it is remembered.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from celery import bootsteps
from celery.concurrency import solo
from celery.signals import worker_shutting_down
from celery.worker import state as worker_state
from typing_extensions import override

__all__ = ["ColdBound", "GivenJobs", "StopBound"]

_log = logging.getLogger(__name__)
state: Any = worker_state

COLD: Final = 5.0
"""Seconds that Celery's cold shutdown gets."""

_LEAVE: Final = 3.0  # seconds to give messages back in
_LOG: Final = 1.0  # seconds to write a line in, which the main thread may be in the middle of
_HELD_ON: Final = 75  # the exit code: EX_TEMPFAIL


class StopBound:
    """Ends a worker that was told to stop.

    Args:
        worker: Celery's.
        seconds: what tasks that run have, from the first signal on.
    """

    def __init__(self, worker: Any, seconds: float) -> None:
        self._worker = worker
        self._seconds = seconds
        self._pid = os.getpid()
        self._signals = 0
        self._told, self._told_again = threading.Event(), threading.Event()
        self._is_cold = False

    def arm(self) -> None:
        """Listen for the signals from now on."""
        worker_shutting_down.connect(self._on_signal, weak=False, dispatch_uid=f"{__name__}.{self._pid}")
        threading.Thread(target=self._run, name="rhesis-tasks stop", daemon=True).start()

    def cold(self) -> None:
        """Celery shuts down cold; called inside of its signal handler."""
        self._is_cold = True
        self._told.set()
        self._told_again.set()

    def _on_signal(self, **_: Any) -> None:
        """Inside of a signal handler: what waits is a thread, since a timer would have to be started here."""
        if os.getpid() == self._pid:
            self._signals += 1
            (self._told if self._signals == 1 else self._told_again).set()

    def _run(self) -> None:
        self._told.wait()
        if not self._told_again.wait(self._seconds):
            self._say("%d tasks still run %g seconds after the worker was told to stop: they are stopped")
        elif not self._is_cold:
            self._say("told to stop a second time: %d tasks are stopped")
        if self._is_cold or not isinstance(self._worker.pool, solo.TaskPool):  # there the body would go on
            if not self._is_cold and not _is_terminating():
                os.kill(self._pid, signal.SIGQUIT)
            threading.Event().wait(COLD)
        self._end()

    def _say(self, text: str) -> None:
        _log.warning(text, *(len(state.active_requests), self._seconds)[: text.count("%")])

    def _end(self) -> None:
        """End the process and its pool's; what was not done is others'."""
        text = "the worker does not stop: it is ended, and what it has not done is left to others"
        _within(_LOG, lambda: _log.error(text))
        state.should_terminate = state.should_terminate or _HELD_ON  # so that lost processes are no failures of tasks
        for process in list(getattr(getattr(self._worker.pool, "_pool", None), "_pool", None) or ()):
            with suppress(AttributeError, TypeError, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        _within(_LEAVE, self._give_back)  # if that is too short, others take what was claimed after the grace period
        os._exit(_HELD_ON)

    def _give_back(self) -> None:
        with suppress(Exception):  # Celery 5.6 has the acknowledgements of what threads have done meanwhile wait there
            self._worker.consumer.perform_pending_operations()
        with suppress(Exception):
            self._worker.consumer.connection.transport._end_consumer()
        for request in tuple(state.active_requests):
            with suppress(Exception):
                request.leave()


def _is_terminating() -> bool:
    """Whether Celery was told to shut down cold: it keeps the exit code, which may be 0."""
    return state.should_terminate is not None and state.should_terminate is not False


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do something that may hang."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


class GivenJobs(bootsteps.Step):
    """A step of the consumer's: when the worker stops, its pool remembers the jobs that its processes have been given.

    When a connection is lost they stay forgotten, as with Celery alone: what it has delivered is delivered again.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    @override
    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        parent.blueprint.on_close = functools.partial(_close, parent, parent.blueprint.on_close)


class ColdBound(bootsteps.Step):
    """A step of the consumer's: tells the worker's bound, if it has one, that Celery shuts down cold."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    @override
    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        parent.cancel_active_requests = functools.partial(_cancel, parent, parent.cancel_active_requests)


def _cancel(consumer: Any, cancel_active_requests: Callable[[], None]) -> None:
    """Let what runs be stopped, as Celery does it in a cold shutdown, and only there."""
    bound = getattr(getattr(consumer.controller, "rhesis_tasks", None), "bound", None)
    if bound is not None:
        bound.cold()
    cancel_active_requests()


def _close(consumer: Any, on_close: Callable[[], None]) -> None:
    """Let a consumer close, which takes all jobs from its pool that have not begun; put back what is begun anyway."""
    pool = getattr(consumer.pool, "_pool", None)
    jobs = getattr(pool, "_cache", None)  # only a pool of processes has one
    given = [job for job in (jobs or {}).values() if job._write_to is not None and not job._accepted]
    on_close()
    if jobs is not None and not _is_terminating():
        jobs.update((job._job, job) for job in given if job._write_to._is_alive())
