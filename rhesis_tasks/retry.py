"""When a failed attempt is tried again, and after how long.

A policy is a frozen value; its decision is a pure function of the exception, the attempt, the time since the first
one and a random source.  :class:`~rhesis_tasks.BaseTask` applies it.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import random
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias, get_args

from kombu.exceptions import OperationalError as BrokerOperationalError
from sqlalchemy.exc import InterfaceError, OperationalError

from .errors import ConfigurationError
from .retry_causes import http_retry_after, is_transient_database_error, is_transient_http_error

__all__ = [
    "RetryPolicy",
    "Decision",
    "RetryLater",
    "GiveUp",
    # the ready ones
    "NO_RETRY",
    "DEFAULT",
    "DATABASE",
    "HTTP",
    # what these go by
    "is_transient_database_error",
    "is_transient_http_error",
    "http_retry_after",
    # names, under which policies travel
    "register_retry_policy",
    "retry_policy_named",
]

_log = logging.getLogger(__name__)

ExceptionTypes: TypeAlias = tuple[type[BaseException], ...]
Backoff: TypeAlias = Literal["constant", "linear", "exponential"]
Jitter: TypeAlias = Literal["full", "equal", "none"]


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
    """Which exceptions are worth another attempt, how many attempts there are, and how long each is waited for.

    ``a | b`` is a policy in which the first that handles an exception decides about it alone::

        DATABASE | HTTP | RetryPolicy(max_retries=1, retry_on=(QuotaError,))

    A policy handles what ``give_up_on`` lists, and what ``retry_on`` lists and ``when`` agrees to.  What none handles
    is given up.  Attempts are counted over all of them: they are the task's.

    Of an exception group each exception is decided about, unless a class of groups is listed that it belongs to: there
    is another attempt if all of them are worth one, after the longest wait.

    Args:
        max_retries: attempts after the first.
        max_age: seconds since the first attempt began, after which no other one begins; None is for ever.
        backoff: the bound of the wait before retry *n*, counted from 0: "constant" is ``base``, "linear"
            ``base * (n + 1)``, "exponential" ``base * factor ** n`` seconds, each at most ``cap``.
        base: the bound of the first wait, in seconds.
        factor: by what each further bound grows, if it grows exponentially.
        cap: the longest wait, in seconds.
        jitter: where the wait is between 0 and its bound: "full" anywhere, "equal" in the upper half, "none" at the
            bound.  (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ says why.)
        retry_on: exception classes that are worth another attempt.
        give_up_on: exception classes that never are, also when ``retry_on`` names a base of theirs.
        when: asked about an exception that is listed: is this one worth another attempt?  If it fails that is logged,
            and means no.
        retry_after: how many seconds an exception asks to wait at least (an HTTP ``Retry-After``), or None.  The
            backoff comes on top, so that not all that were sent away come back at once; together at most ``cap``.
            What is no number of 0 or more counts as None, and so does an error, which is logged.
        rules: policies that are asked before this one, in this order: ``a | b`` is ``b`` with ``a`` among them.

    Raises:
        ConfigurationError: a value makes no sense.
    """

    max_retries: int = 3
    _: dataclasses.KW_ONLY
    max_age: float | None = None
    backoff: Backoff = "exponential"
    base: float = 1.0
    factor: float = 2.0
    cap: float = 600.0
    jitter: Jitter = "full"
    retry_on: ExceptionTypes = (Exception,)
    give_up_on: ExceptionTypes = ()
    when: Callable[[BaseException], bool] | None = None
    retry_after: Callable[[BaseException], float | None] | None = None
    rules: tuple[RetryPolicy, ...] = ()

    def __post_init__(self) -> None:
        if type(self.max_retries) is not int or self.max_retries < 0:
            raise ConfigurationError(f"max_retries must be an int of 0 or more, not {self.max_retries!r}")
        for name, least in (("base", 0.0), ("factor", 1.0), ("cap", 0.0)):
            value = getattr(self, name)
            if not _is_number(value):
                raise ConfigurationError(f"{name} must be a finite number, not {value!r}")
            if value < least:
                raise ConfigurationError(f"{name} must be {least:g} or more, not {value!r}")
        if self.max_age is not None and not (_is_number(self.max_age) and self.max_age > 0):
            raise ConfigurationError(f"max_age must be a number of seconds above 0, or None, not {self.max_age!r}")
        for name, words in (("backoff", get_args(Backoff)), ("jitter", get_args(Jitter))):
            if getattr(self, name) not in words:
                raise ConfigurationError(f"{name} must be one of {', '.join(words)}, not {getattr(self, name)!r}")
        for name in ("retry_on", "give_up_on"):
            object.__setattr__(self, name, exception_types(name, getattr(self, name)))
        for name in ("when", "retry_after"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise ConfigurationError(f"{name} must be a function of an exception, not {function!r}")
            if inspect.iscoroutinefunction(function):
                raise ConfigurationError(f"{name} must be a plain function, not async def: nothing awaits it")
        object.__setattr__(self, "rules", _flat(self.rules))

    def __or__(self, other: RetryPolicy) -> RetryPolicy:
        if not isinstance(other, RetryPolicy):
            return NotImplemented
        return dataclasses.replace(other, rules=(self, *other.rules))

    def decide(
        self,
        error: BaseException,
        retries: int,
        *,
        elapsed: float = 0.0,
        rng: Callable[[], float] = random.random,
    ) -> Decision:
        """What to do after an attempt failed.

        Args:
            error: what the attempt raised.
            retries: how many retries came before it; 0 after the first attempt.
            elapsed: seconds since the first attempt began.
            rng: a source of numbers from 0 up to 1.
        """
        if isinstance(error, BaseExceptionGroup) and not self._lists_group(error):
            return self._decide_each(error, retries, elapsed, rng)
        for policy in self.rules:
            if policy._objection(error) is None:
                return policy._decide(error, retries, elapsed, rng)
        objection = self._objection(error)
        if objection is None:
            return self._decide(error, retries, elapsed, rng)
        if self.rules:
            return GiveUp(f"{type(error).__name__} is handled by none of {len(self.rules) + 1} policies")
        return GiveUp(objection)

    def _lists_group(self, group: BaseExceptionGroup[BaseException]) -> bool:
        """Whether the group itself is meant, and not only as any exception is."""
        listed = (each for part in (self, *self.rules) for each in (*part.retry_on, *part.give_up_on))
        return any(issubclass(each, BaseExceptionGroup) and isinstance(group, each) for each in listed)

    def _decide_each(
        self,
        group: BaseExceptionGroup[BaseException],
        retries: int,
        elapsed: float,
        rng: Callable[[], float],
    ) -> Decision:
        drawn = rng()  # once, since the longest of many waits would be no random one
        decisions = [self.decide(each, retries, elapsed=elapsed, rng=lambda: drawn) for each in group.exceptions]
        for decision in decisions:
            if isinstance(decision, GiveUp):
                return decision
        return max((each for each in decisions if isinstance(each, RetryLater)), key=lambda each: each.countdown)

    def _objection(self, error: BaseException) -> str | None:
        """Why this policy, without its rules, does not handle an exception; None if it does."""
        if isinstance(error, self.give_up_on):
            return None
        if not isinstance(error, self.retry_on):
            return f"{type(error).__name__} is not listed in retry_on"
        if self.when is not None and not self._agrees_to(self.when, error):
            return f"when() says no to {type(error).__name__}"
        return None

    def _decide(self, error: BaseException, retries: int, elapsed: float, rng: Callable[[], float]) -> Decision:
        if isinstance(error, self.give_up_on):
            return GiveUp(f"{type(error).__name__} is listed in give_up_on")
        if retries >= self.max_retries:
            return GiveUp(f"all {self.max_retries} retries are used up")
        if self.max_age is not None and elapsed > self.max_age:
            return GiveUp(f"it is older than {self.max_age:.15g} s")
        countdown = min(self.cap, self._asked_for(error) + self.wait(retries, rng=rng))
        if self.max_age is not None and elapsed + countdown > self.max_age:
            return GiveUp(f"it would be older than {self.max_age:.15g} s at its next attempt")
        return RetryLater(countdown)

    @staticmethod
    def _agrees_to(when: Callable[[BaseException], bool], error: BaseException) -> bool:
        try:
            return bool(when(error))
        except Exception:  # it shall not take the place of the error that it is asked about
            _log.warning("when() failed for a %s, and counts as False", type(error).__name__, exc_info=True)
            return False

    def _asked_for(self, error: BaseException) -> float:
        """Seconds that the exception asks to wait; 0 if it says nothing that can be understood."""
        if self.retry_after is None:
            return 0.0
        try:
            asked = self.retry_after(error)
        except Exception:  # as above
            _log.warning("retry_after failed for a %s, and counts as None", type(error).__name__, exc_info=True)
            return 0.0
        return max(0.0, asked) if asked is not None and _is_number(asked) else 0.0

    def wait(self, retries: int, *, rng: Callable[[], float] = random.random) -> float:
        """How long to wait before the next retry, in seconds, by this policy without its rules.

        Args:
            retries: how many retries came before it.
            rng: a source of numbers from 0 up to 1.
        """
        bound = self.bound(retries)
        if self.jitter == "none":
            return bound
        return bound * (0.5 + rng() / 2) if self.jitter == "equal" else bound * rng()

    def bound(self, retries: int) -> float:
        """The longest wait before the next retry, in seconds, by this policy without its rules."""
        if self.backoff == "constant":
            return min(self.cap, self.base)
        if self.backoff == "linear":
            return min(self.cap, float(self.base) * (retries + 1))
        try:
            return min(self.cap, self.base * float(self.factor) ** retries)
        except OverflowError:  # nothing times however much is nothing
            return self.cap if self.base else self.base

    def __json__(self) -> str:
        """The policy's name, by which it travels; kombu's encoder asks for it.

        Raises:
            ConfigurationError: it has none.
        """
        for name, policy in tuple(_named.items()):
            if policy == self:
                return name
        raise ConfigurationError(
            "a retry policy travels by its name, and this one has none.  Give it one with "
            "register_retry_policy(name, policy), in code that web processes and workers share"
        )


def _is_number(value: object) -> bool:
    """Whether it is a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond what a float holds
        return False


def exception_types(name: str, value: object) -> ExceptionTypes:
    types = (value,) if isinstance(value, type) else value
    if not isinstance(types, tuple | list | set | frozenset) or not all(
        isinstance(item, type) and issubclass(item, BaseException) for item in types
    ):
        raise ConfigurationError(f"{name} must be exception classes, not {value!r}")
    return tuple(types)


def _flat(rules: Any) -> tuple[RetryPolicy, ...]:
    """The rules, each after its own, so that equal orders are equal policies."""
    if not isinstance(rules, tuple | list) or not all(isinstance(rule, RetryPolicy) for rule in rules):
        raise ConfigurationError(f"rules must be a tuple of RetryPolicy, not {rules!r}")
    return tuple(
        part for rule in rules for part in (*rule.rules, dataclasses.replace(rule, rules=()) if rule.rules else rule)
    )


# --- names -----------------------------------------------------------------------------------------------------

_named: Final[dict[str, RetryPolicy]] = {}


def register_retry_policy(name: str, policy: RetryPolicy) -> None:
    """Give a policy a name, by which it can travel with one launch.

    Call it at import time, in code that web processes and workers share.

    Raises:
        ConfigurationError: another policy has the name, or it is none.
    """
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        raise ConfigurationError(f"the name of a retry policy must be a non-empty str in one line, not {name!r}")
    if not isinstance(policy, RetryPolicy):
        raise ConfigurationError(f"register_retry_policy takes a name and a RetryPolicy, not {policy!r}")
    if _named.setdefault(name, policy) != policy:
        raise ConfigurationError(f"another retry policy is registered as {name!r}; give this one its own name")


def policy_name(policy: RetryPolicy | str) -> str:
    """The name by which a policy travels: its own, or that of one that is registered.

    Raises:
        ConfigurationError: there is none.
    """
    if isinstance(policy, RetryPolicy):
        return policy.__json__()
    retry_policy_named(policy)
    return policy


def retry_policy_named(name: str) -> RetryPolicy:
    """The policy that is registered under a name.

    Raises:
        ConfigurationError: there is none.
    """
    policy = _named.get(name)
    if policy is None:
        raise ConfigurationError(
            f"no retry policy is registered as {name!r}; there are {', '.join(sorted(_named))}.  Call "
            "register_retry_policy(name, policy) in code that web processes and workers share"
        )
    return policy


# --- the ready ones --------------------------------------------------------------------------------------------

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

DATABASE: Final = RetryPolicy(max_retries=6, base=0.2, factor=3.0, cap=30.0, when=is_transient_database_error)
"""Six retries for transactions that lost against another one, at first soon, and in all long enough for a database
that restarts."""

HTTP: Final = RetryPolicy(
    max_retries=5, base=1.0, factor=2.0, cap=600.0, when=is_transient_http_error, retry_after=http_retry_after
)
"""Five retries for services that are overloaded or not there, none before the service wants it."""

for _name, _policy in {"no_retry": NO_RETRY, "default": DEFAULT, "database": DATABASE, "http": HTTP}.items():
    register_retry_policy(_name, _policy)
