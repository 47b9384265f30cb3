"""When a failed attempt is tried again, and after how long.

A policy is a frozen value; its decision is a pure function of the exception, the attempt and a random source.
:class:`~rhesis_tasks.BaseTask` applies it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable
from typing import Final, TypeAlias

from kombu.exceptions import OperationalError as BrokerOperationalError
from sqlalchemy.exc import InterfaceError, OperationalError

from .errors import ConfigurationError

__all__ = ["DEFAULT", "NO_RETRY", "Decision", "GiveUp", "RetryLater", "RetryPolicy"]

_log = logging.getLogger(__name__)

ExceptionTypes: TypeAlias = tuple[type[BaseException], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RetryLater:
    """Try again after ``countdown`` seconds."""

    countdown: float


@dataclasses.dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not try again, for this reason."""

    reason: str


Decision: TypeAlias = RetryLater | GiveUp


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter, for the exceptions named.

    The wait before retry *n* (counted from 0) is a random time between 0 and ``base * factor ** n`` seconds,
    at most ``cap`` ("full jitter": https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        max_retries: attempts after the first.
        base: the bound of the first wait, in seconds.
        factor: by what each further bound grows.
        cap: the largest bound, in seconds.
        retry_on: exception classes that are worth another attempt.
        give_up_on: exception classes that never are, also when ``retry_on`` names a base of theirs.
        retry_after: how many seconds an exception asks to wait at least (an HTTP ``Retry-After``), or None.  The
            backoff comes on top, so that not all that were sent away come back at once; together at most ``cap``.
            What is no number of 0 or more counts as None, and so does an error, which is logged.

    Raises:
        ConfigurationError: a value makes no sense.
    """

    max_retries: int = 3
    base: float = 1.0
    factor: float = 2.0
    cap: float = 600.0
    retry_on: ExceptionTypes = (Exception,)
    give_up_on: ExceptionTypes = ()
    retry_after: Callable[[BaseException], float | None] | None = None

    def __post_init__(self) -> None:
        if type(self.max_retries) is not int or self.max_retries < 0:
            raise ConfigurationError(f"max_retries must be an int of 0 or more, not {self.max_retries!r}")
        for name, least in (("base", 0.0), ("factor", 1.0), ("cap", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
                raise ConfigurationError(f"{name} must be a finite number, not {value!r}")
            if value < least:
                raise ConfigurationError(f"{name} must be {least:g} or more, not {value!r}")
        for name in ("retry_on", "give_up_on"):
            object.__setattr__(self, name, _exception_types(name, getattr(self, name)))
        if self.retry_after is not None and not callable(self.retry_after):
            raise ConfigurationError(f"retry_after must be a function of an exception, not {self.retry_after!r}")

    def decide(self, error: BaseException, retries: int, *, rng: Callable[[], float] = random.random) -> Decision:
        """What to do after an attempt failed.

        Args:
            error: what the attempt raised.
            retries: how many retries came before it; 0 after the first attempt.
            rng: a source of numbers from 0 up to 1.
        """
        if isinstance(error, self.give_up_on):
            return GiveUp(f"{type(error).__name__} is listed in give_up_on")
        if not isinstance(error, self.retry_on):
            return GiveUp(f"{type(error).__name__} is not listed in retry_on")
        if retries >= self.max_retries:
            return GiveUp(f"all {self.max_retries} retries are used up")
        return RetryLater(min(self.cap, self._asked_for(error) + rng() * self.bound(retries)))

    def _asked_for(self, error: BaseException) -> float:
        """Seconds that the exception asks to wait; 0 if it says nothing that can be understood."""
        if self.retry_after is None:
            return 0.0
        try:
            asked = self.retry_after(error)
        except Exception:  # it shall not take the place of the error that it is asked about
            _log.warning("retry_after failed for a %s, and counts as None", type(error).__name__, exc_info=True)
            return 0.0
        if isinstance(asked, bool) or not isinstance(asked, int | float) or not _finite(asked):
            return 0.0
        return max(0.0, asked)

    def bound(self, retries: int) -> float:
        """The longest wait before the next retry, in seconds."""
        try:
            return min(self.cap, self.base * float(self.factor) ** retries)
        except OverflowError:  # nothing times however much is nothing
            return self.cap if self.base else self.base


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond what a float holds
        return False


def _exception_types(name: str, value: object) -> ExceptionTypes:
    types = (value,) if isinstance(value, type) else value
    if not isinstance(types, tuple | list | set | frozenset) or not all(
        isinstance(item, type) and issubclass(item, BaseException) for item in types
    ):
        raise ConfigurationError(f"{name} must be exception classes, not {value!r}")
    return tuple(types)


NO_RETRY: Final = RetryPolicy(max_retries=0, retry_on=())
"""Every failure is final."""

DEFAULT: Final = RetryPolicy(
    max_retries=3,
    base=1.0,
    factor=2.0,
    cap=60.0,
    retry_on=(ConnectionError, TimeoutError, OperationalError, InterfaceError, BrokerOperationalError),
)
"""Three retries for what usually passes by itself: lost connections and time-outs, of sockets and of the database.
Anything else is taken for a defect that the next attempt would meet again."""
