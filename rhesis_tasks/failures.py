"""What is said of a failure: why there is no other attempt, and what of its texts may be kept."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from celery.utils.dispatch import Signal

if TYPE_CHECKING:
    from celery import Celery

__all__ = [
    "CUT_OFF",
    "REDACTED",
    "Redact",
    "reason_of",
    "redact_exception",
    "redact_text",
    "redacts",
    "task_cut_off",
    "text_of",
    "use_redaction",
]

_log = logging.getLogger(__name__)

Redact: TypeAlias = Callable[[str], str]

REDACTED: Final = "[redacted]"
"""What is kept of a text that ``redact=`` failed for."""

CUT_OFF: Final = "a task before it in its chain failed, and it was not run"
"""Why the rest of a chain has failed."""

task_cut_off: Final = Signal(
    name="rhesis_tasks.task_cut_off", providing_args=["signature", "error", "reason", "root_id"]
)
"""A task of a canvas has failed without having begun, since another one has.  Sent in its context.

A signal, since the result backend knows nothing of hooks.
"""

# Failures that no retry policy was asked about, by their exceptions' names, since a result backend has no more of them.
_REASONS: Final[Mapping[str, str]] = {
    "TimeLimitExceeded": "its time limit was reached",
    "SoftTimeLimitExceeded": "its soft time limit was reached",
    "WorkerLostError": "the process that ran it was lost",
    "Terminated": "the process that ran it was ended",
    "Reject": "it rejected its message",
    "DeadLetterError": "its message was given up",
    "EncodeError": "its result cannot be stored",
    "ChordError": "a part of its chord failed, and it was not run",
    "NotRegistered": "the worker has no such task",
    "MissingTenantError": "it has no tenant, and was not run",
    "TenantConflictError": "its message contradicts itself about the tenant, and it was not run",
    "InvalidTenantError": "its message names something that is no tenant, and it was not run",
    "HeaderError": "its message cannot be understood, and it was not run",
    "SignatureError": "its message is not signed, and it was not run",
}


def text_of(error: object) -> str:
    """What an exception says; also of one that cannot say it."""
    try:
        return str(error)
    except Exception as failed:
        return f"<str() failed with a {type(failed).__name__}>"


def reason_of(error_type: str | None) -> str | None:
    """Why a task that failed with such an exception is not tried again; None if its retry policy says."""
    return _REASONS.get(error_type or "")


# --- redaction ---------------------------------------------------------------------------------------------------

_redactions: weakref.WeakKeyDictionary[Celery, Redact] = weakref.WeakKeyDictionary()


def use_redaction(app: Celery, redact: Redact | None) -> None:
    """Let a function have the texts of the application's failures before they are stored or logged."""
    if redact is None:
        _redactions.pop(app, None)
    else:
        _redactions[app] = redact


def redacts(app: Celery) -> bool:
    """Whether there is such a function."""
    return app in _redactions


def redact_text(app: Celery, text: str) -> str:
    """A message or traceback as it may be kept; nothing of it if the function fails."""
    redact = _redactions.get(app)
    if redact is None:
        return text
    try:
        kept = redact(text)
        if not isinstance(kept, str):
            raise TypeError(f"redact= returned {type(kept).__name__}, not str")
    except Exception as error:  # whose traceback may show the text
        _log.error("redact= failed with a %s: the text is left out", type(error).__name__)
        return REDACTED
    return kept


def redact_exception(app: Celery, stored: Any) -> Any:
    """An exception as Celery's result backends encode it, with the texts among its arguments redacted."""
    if not (redacts(app) and isinstance(stored, Mapping) and "exc_message" in stored):
        return stored
    return {**stored, "exc_message": _redacted(app, stored["exc_message"])}


def _redacted(app: Celery, value: Any) -> Any:
    if isinstance(value, str):
        return redact_text(app, value)
    if isinstance(value, Mapping):
        return {key: _redacted(app, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(app, each) for each in value]
    return value
