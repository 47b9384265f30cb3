"""By which policy a task is tried again, and what it says about an attempt that runs."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from datetime import UTC, datetime
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from .errors import ConfigurationError, TaskDefinitionError
from .headers import RequestState
from .retry import DEFAULT, Decision, GiveUp, RetryPolicy, retry_policy_named

__all__ = ["check_policy", "decide", "objection", "policy_of"]

_log = logging.getLogger(__name__)


def check_policy(cls: Any) -> None:
    """Refuse what a task class cannot be tried again by.  A partial function is one in all versions of Python then.

    Raises:
        TaskDefinitionError: its ``retry_policy`` is no policy and no method that could return one, or it has
            ``autoretry_for``, too.
    """
    policy: Any = cls.retry_policy
    if getattr(cls, "autoretry_for", ()) and policy is not DEFAULT:
        raise TaskDefinitionError(
            f"task {cls.name} has a retry_policy and Celery's autoretry_for, beside which it is not asked.  Take one "
            "of them away; where the policy is inherited, say retry_policy=DEFAULT"
        )
    if isinstance(policy, RetryPolicy):
        return
    if not callable(policy) or inspect.isclass(policy):
        raise TaskDefinitionError(
            f"retry_policy of task {cls.name} must be a RetryPolicy, or a method that returns one, not {policy!r}"
        )
    if inspect.iscoroutinefunction(policy):
        raise TaskDefinitionError(f"retry_policy of task {cls.name} must not be async def: nothing awaits it")
    try:
        signature = inspect.signature(policy)
    except ValueError:  # of some built-ins
        return
    try:
        signature.bind(*([None] if _is_bound_to(policy, cls) else [cls, None]))
    except TypeError as error:
        raise TaskDefinitionError(f"retry_policy of task {cls.name} must take (task, tenant): {error}") from error
    if isinstance(policy, functools.partial):
        # Read from an instance it is a method from Python 3.14 on, and 3.13 warns of that.
        cls.retry_policy = staticmethod(policy)


def policy_of(task: Any, state: RequestState) -> RetryPolicy:
    """The policy that the launch asks for, or the task's own; DEFAULT if that cannot be had, which is logged."""
    name = state.envelope.retry_policy
    if name is not None:
        try:
            return retry_policy_named(name)
        except ConfigurationError as error:
            _log.error("task %s was launched with a retry policy that this worker does not know: %s", task.name, error)
    policy: Any = task.retry_policy
    if not isinstance(policy, RetryPolicy):
        tenant = state.envelope.tenant
        try:
            policy = policy(tenant) if _is_bound_to(policy, task, type(task)) else policy(task, tenant)
        except Exception:  # it shall not take the place of the body's error
            _log.exception("retry_policy of task %s failed, and DEFAULT counts", task.name)
            return DEFAULT
    if not isinstance(policy, RetryPolicy):
        _log.error(
            "retry_policy of task %s returned a %s and no RetryPolicy, and DEFAULT counts",
            task.name,
            type(policy).__name__,
        )
        return DEFAULT
    return policy


def _is_bound_to(function: Any, *owners: Any) -> bool:
    return inspect.ismethod(function) and any(function.__self__ is owner for owner in owners)


def decide(policy: RetryPolicy, error: Exception, retries: int, state: RequestState) -> Decision:
    """What the policy says after the attempt that runs has failed.

    The soft time limit is final unless the policy names it: the next attempt would take as long.
    """
    if isinstance(error, SoftTimeLimitExceeded) or (
        isinstance(error, ExceptionGroup) and error.subgroup(SoftTimeLimitExceeded) is not None
    ):
        parts = (policy, *policy.rules)
        if not any(SoftTimeLimitExceeded in part.retry_on for part in parts):
            return GiveUp("its soft time limit was reached")
    return policy.decide(error, retries, elapsed=_elapsed(state))


def objection(
    policy: RetryPolicy,
    limit: int | None,
    retries: int,
    state: RequestState,
    eta: datetime | None,
    countdown: float | None,
) -> str | None:
    """Why a body that asks for another attempt by itself gets none; None if it does.

    Args:
        policy: by the largest numbers of its parts, since no exception says which part it is about.
        limit: the number of retries that holds; None is for ever.
        eta: when the next attempt would be, if that is said.
        countdown: ... or in how many seconds.
    """
    if limit is not None and retries >= limit:
        return f"all {limit} retries are used up"
    ages = [part.max_age for part in (policy, *policy.rules)]
    known = [age for age in ages if age is not None]
    if len(known) < len(ages):
        return None
    wait = (countdown or 0.0) if eta is None else (eta - datetime.now(eta.tzinfo or UTC)).total_seconds()
    if _elapsed(state) + wait <= max(known):
        return None
    return f"it would be older than {max(known):.15g} s at its next attempt"


def _elapsed(state: RequestState) -> float:
    """Seconds since the first attempt began."""
    return 0.0 if state.first_at is None else max(0.0, time.time() - state.first_at / 1000)
