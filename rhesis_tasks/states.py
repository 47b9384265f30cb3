"""The one table of task states and of the moves between them.

Each move is a :class:`Transition`, a function of the state that a task is in.  Result backend, queue, API and command
line ask here where a task may go; none keeps an idea of its own.  Celery's names stay what Celery's API speaks.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Final

from .errors import IllegalTransitionError

__all__ = [
    "TERMINAL",
    "TRANSITIONS",
    "UNFINISHED",
    "WAITING",
    "State",
    "Transition",
    "bury",
    "by_celery",
    "delay",
    "expire",
    "fail",
    "launch",
    "replay",
    "retry",
    "revoke",
    "start",
    "succeed",
    "to_celery",
]


class State(StrEnum):
    """Where a task is in its life."""

    DELAYED = "delayed"  #: published, not to be run before its time
    QUEUED = "queued"  #: published, waiting for a worker
    STARTED = "started"  #: a worker runs its body
    RETRY = "retry"  #: an attempt failed, the next one is scheduled
    SUCCESS = "success"
    FAILURE = "failure"
    REVOKED = "revoked"  #: cancelled by its tenant, or revoked by an operator
    EXPIRED = "expired"  #: nobody started it in time
    DEAD = "dead"  #: its message was given up, since it kept ending workers


TERMINAL: Final = frozenset({State.SUCCESS, State.FAILURE, State.REVOKED, State.EXPIRED, State.DEAD})
"""Never left again: a late writer changes nothing."""

UNFINISHED: Final = frozenset(State) - TERMINAL
WAITING: Final = UNFINISHED - {State.STARTED}
"""No body runs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Transition:
    """A move of a task: ``start(State.QUEUED)`` is ``State.STARTED``."""

    name: str
    target: State
    sources: frozenset[State]  #: the states from which it may happen; besides, a task may begin with it

    def __call__(self, current: State | None) -> State:
        """The state afterwards.

        Args:
            current: the state before; None if nothing is known of the task.

        Raises:
            IllegalTransitionError: it may not happen there.
        """
        if current is not None and current not in self.sources:
            raise IllegalTransitionError(f"a task that is {current} cannot {self.name}", state=current, name=self.name)
        return self.target


# Launched again by retries and replacements, which publish under the same id; started again when a message is delivered
# twice.  A body may end before anybody has written down that it started, and retry and expiry are noticed by the worker
# that has the message, whatever another one has written.
launch: Final = Transition("launch", State.QUEUED, UNFINISHED)
delay: Final = Transition("delay", State.DELAYED, UNFINISHED)
start: Final = Transition("start", State.STARTED, UNFINISHED)
retry: Final = Transition("retry", State.RETRY, UNFINISHED)
succeed: Final = Transition("succeed", State.SUCCESS, UNFINISHED)
fail: Final = Transition("fail", State.FAILURE, UNFINISHED)
revoke: Final = Transition("be revoked", State.REVOKED, UNFINISHED)
expire: Final = Transition("expire", State.EXPIRED, UNFINISHED)
bury: Final = Transition("be given up", State.DEAD, UNFINISHED)

replay: Final = Transition("be replayed", State.QUEUED, frozenset({State.DEAD}))
"""The only way out of an end, and an operator's alone: its dead letter is a message again."""

TRANSITIONS: Final = (launch, delay, start, retry, succeed, fail, revoke, expire, bury)
"""What becomes of a task by itself, by its tenant, or by being revoked."""

_TO_CELERY: Final[dict[State, str]] = {
    State.DELAYED: "PENDING",
    State.QUEUED: "PENDING",
    State.STARTED: "STARTED",
    State.RETRY: "RETRY",
    State.SUCCESS: "SUCCESS",
    State.FAILURE: "FAILURE",
    State.REVOKED: "REVOKED",
    State.EXPIRED: "REVOKED",
    State.DEAD: "FAILURE",
}

_BY_CELERY: Final[dict[str, Transition]] = {
    "PENDING": launch,
    "RECEIVED": launch,
    "STARTED": start,
    "RETRY": retry,
    "SUCCESS": succeed,
    "IGNORED": succeed,
    "FAILURE": fail,
    "REJECTED": fail,
    "REVOKED": revoke,
}


def by_celery(name: str) -> Transition:
    """What happens to a task when Celery stores a state; an application's own (``"PROGRESS"``) means that it runs."""
    return _BY_CELERY.get(name, start)


def to_celery(state: State) -> str:
    """Celery's name for a state."""
    return _TO_CELERY[state]
