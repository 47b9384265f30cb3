"""The one table of task states and of the moves between them.

Result backend, API and command line ask here where a task is and where it may go; none keeps an idea of its
own.  Celery's names stay what Celery's API speaks; :func:`from_celery` and :func:`to_celery` translate.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["State", "TERMINAL", "from_celery", "sources", "to_celery"]


class State(StrEnum):
    """Where a task is in its life."""

    QUEUED = "queued"  #: published, waiting for a worker
    STARTED = "started"  #: a worker runs its body
    RETRY = "retry"  #: an attempt failed, the next one is scheduled
    SUCCESS = "success"
    FAILURE = "failure"
    REVOKED = "revoked"


TERMINAL = frozenset({State.SUCCESS, State.FAILURE, State.REVOKED})

# A state may be entered from these.  QUEUED is entered again by retry and replace, which publish under the
# same id; STARTED is entered again when a message is delivered twice.  A failure may still become a success:
# a worker that was lost may have its message run elsewhere, as in Celery's own backends.
_SOURCES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.QUEUED, State.STARTED, State.RETRY}),
    State.STARTED: frozenset({State.QUEUED, State.STARTED, State.RETRY}),
    State.RETRY: frozenset({State.QUEUED, State.STARTED, State.RETRY}),
    State.SUCCESS: frozenset({State.QUEUED, State.STARTED, State.RETRY, State.FAILURE}),
    State.FAILURE: frozenset({State.QUEUED, State.STARTED, State.RETRY}),
    State.REVOKED: frozenset({State.QUEUED, State.STARTED, State.RETRY}),
}

_TO_CELERY: dict[State, str] = {
    State.QUEUED: "PENDING",
    State.STARTED: "STARTED",
    State.RETRY: "RETRY",
    State.SUCCESS: "SUCCESS",
    State.FAILURE: "FAILURE",
    State.REVOKED: "REVOKED",
}

_FROM_CELERY: dict[str, State] = {
    **{celery: state for state, celery in _TO_CELERY.items()},
    "RECEIVED": State.QUEUED,
    "REJECTED": State.FAILURE,
    "IGNORED": State.SUCCESS,
}


def sources(state: State) -> frozenset[State]:
    """The states from which ``state`` may be entered."""
    return _SOURCES[state]


def from_celery(name: str) -> State:
    """Our state for Celery's name; an application's own name (``"PROGRESS"``) means that it is running."""
    return _FROM_CELERY.get(name, State.STARTED)


def to_celery(state: State) -> str:
    """Celery's name for a state."""
    return _TO_CELERY[state]
