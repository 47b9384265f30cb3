"""What a worker's main process does with a task, in the context that the task's message carried.

Lost processes, hard time limits, terminations and revocations are dealt with there, where no context is set; and its
error callbacks are published from there.  ``ContextTask.Request`` names :class:`ContextRequest`, which Celery imports
in workers only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from billiard.einfo import ExceptionWithTraceback  # type: ignore[attr-defined]  # left out of the stubs
from celery import states
from celery._state import _task_stack  # type: ignore[attr-defined]  # left out of the stubs
from celery.exceptions import TimeLimitExceeded
from celery.worker import request as worker_request
from celery.worker import state
from typing_extensions import override

from .propagation import restored

__all__ = ["ContextRequest"]

_log = logging.getLogger(worker_request.__name__)
_Request: Any = worker_request.Request  # the stubs leave out most of it


class ContextRequest(_Request):  # type: ignore[misc]
    """Celery's request for the execution of a task, with the context of the task's message."""

    _requeued = False
    _timed_out: Any = None  # the exception info, once on_failure has dealt with a hard time limit

    @contextmanager
    def _as_launched(self) -> Iterator[None]:
        """The task's context and request, as if its body was running."""
        request = self._context
        _task_stack.push(self.task)
        self.task.request_stack.push(request)
        try:
            with restored(self.task, request):
                yield
        finally:
            self.task.request_stack.pop()
            _task_stack.pop()

    @override
    def revoked(self) -> bool:
        """Whether the task was revoked or has expired; Celery asks for each task, so the context waits until it may."""
        if not (self.expires or self.stamped_headers or self._already_revoked or self.id in state.revoked):
            return bool(super().revoked())
        with self._as_launched():
            return bool(super().revoked())

    @override
    def _announce_revoked(self, *args: Any, **kwargs: Any) -> None:
        with self._as_launched():
            super()._announce_revoked(*args, **kwargs)

    @override
    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        with self._as_launched():
            super()._announce_cancelled(*args, **kwargs)

    @override
    def reject(self, requeue: bool = False) -> None:
        self._requeued = requeue
        super().reject(requeue=requeue)

    @override
    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        with self._as_launched():
            result = super().on_failure(exc_info, *args, **kwargs)
            if isinstance(_bare(exc_info.exception), TimeLimitExceeded):
                self._timed_out = exc_info
            return result

    @override
    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit was reached.

        Of a hard one the prefork pool tells twice, here after on_failure: Celery 5.7 would store the failure, call the
        error callbacks and send the signal a second time.
        """
        with self._as_launched():
            if soft or self._timed_out is None:
                super().on_timeout(soft, timeout)
                return
            _log.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
            if not self._requeued and not state.should_terminate:
                self._call_hooks(self._timed_out)

    def _call_hooks(self, exc_info: Any) -> None:
        error = _bare(exc_info.exception)
        self.task.on_failure(error, self.id, self.args, self.kwargs, exc_info)
        self.task.after_return(states.FAILURE, error, self.id, self.args, self.kwargs, exc_info)


def _bare(error: Any) -> Any:
    """The exception itself, where the pool has wrapped it to carry its traceback along."""
    return error.exc if isinstance(error, ExceptionWithTraceback) else error
