"""When a failed attempt is tried again: a pure function of the error, the attempt and a random source."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import OperationalError as BrokerOperationalError
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError

from rhesis_tasks import RetryPolicy, retry
from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.retry import GiveUp, RetryLater

counts = st.integers(0, 10**4)
seconds = st.one_of(st.floats(0, 1e308), st.integers(0, 10**9))
policies = st.builds(
    RetryPolicy,
    max_retries=counts,
    base=seconds,
    factor=st.one_of(st.floats(1, 1e308), st.integers(1, 10)),
    cap=seconds,
)
draws = st.floats(0, 1, exclude_max=True)


class Passing(ConnectionError):
    """A kind of ConnectionError."""


# --- decisions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "error", "retries", "decision"),
    [
        pytest.param(RetryPolicy(), ValueError(), 0, RetryLater(0.5), id="first"),
        pytest.param(RetryPolicy(), ValueError(), 1, RetryLater(1.0), id="second"),
        pytest.param(RetryPolicy(), ValueError(), 2, RetryLater(2.0), id="third"),
        pytest.param(RetryPolicy(), ValueError(), 3, GiveUp("all 3 retries are used up"), id="used up"),
        pytest.param(RetryPolicy(), ValueError(), 99, GiveUp("all 3 retries are used up"), id="long used up"),
        pytest.param(RetryPolicy(max_retries=0), ValueError(), 0, GiveUp("all 0 retries are used up"), id="never"),
        pytest.param(RetryPolicy(base=3, factor=1), ValueError(), 2, RetryLater(1.5), id="no growth"),
        pytest.param(RetryPolicy(base=30, cap=40), ValueError(), 2, RetryLater(20.0), id="capped"),
        pytest.param(RetryPolicy(base=0), ValueError(), 2, RetryLater(0.0), id="at once"),
        pytest.param(
            RetryPolicy(retry_on=ConnectionError), Passing(), 0, RetryLater(0.5), id="a subclass of what is listed"
        ),
        pytest.param(
            RetryPolicy(retry_on=ConnectionError),
            ValueError(),
            0,
            GiveUp("ValueError is not listed in retry_on"),
            id="not listed",
        ),
        pytest.param(
            RetryPolicy(retry_on=ConnectionError, give_up_on=Passing),
            Passing(),
            0,
            GiveUp("Passing is listed in give_up_on"),
            id="excepted from what is listed",
        ),
        pytest.param(
            RetryPolicy(retry_on=Passing, give_up_on=ConnectionError),
            Passing(),
            0,
            GiveUp("Passing is listed in give_up_on"),
            id="giving up wins over a more specific retry",
        ),
        pytest.param(
            RetryPolicy(retry_on=()),
            ValueError(),
            0,
            GiveUp("ValueError is not listed in retry_on"),
            id="nothing listed",
        ),
        pytest.param(
            RetryPolicy(), KeyboardInterrupt(), 0, GiveUp("KeyboardInterrupt is not listed in retry_on"), id="interrupt"
        ),
    ],
)
def test_the_decision(policy: RetryPolicy, error: BaseException, retries: int, decision: Any) -> None:
    assert policy.decide(error, retries, rng=lambda: 0.5) == decision


OPERATIONAL = OperationalError("SELECT 1", {}, Exception("server closed the connection"))
INTERFACE = InterfaceError("SELECT 1", {}, Exception("connection already closed"))
INTEGRITY = IntegrityError("INSERT", {}, Exception("duplicate key"))


@pytest.mark.parametrize(
    "error",
    [ConnectionError(), ConnectionResetError(), TimeoutError(), OPERATIONAL, INTERFACE, BrokerOperationalError()],
)
def test_the_default_policy_tries_lost_connections_again(error: Exception) -> None:
    assert isinstance(retry.DEFAULT.decide(error, 0), RetryLater)


@pytest.mark.parametrize("error", [ValueError(), KeyError(), FileNotFoundError(), INTEGRITY])
def test_the_default_policy_takes_anything_else_for_a_defect(error: Exception) -> None:
    assert isinstance(retry.DEFAULT.decide(error, 0), GiveUp)


@pytest.mark.parametrize("error", [ValueError(), ConnectionError(), OPERATIONAL])
def test_no_retry_means_that_every_failure_is_final(error: Exception) -> None:
    assert isinstance(retry.NO_RETRY.decide(error, 0), GiveUp)


# --- what an exception asks for ----------------------------------------------------------------------------------


class TooManyRequests(Exception):
    """As an HTTP library has it."""

    def __init__(self, retry_after: Any) -> None:
        self.retry_after = retry_after


def asked(error: BaseException) -> Any:
    return getattr(error, "retry_after", None)


@pytest.mark.parametrize(
    ("answer", "countdown"),
    [
        pytest.param(30, 31.0, id="int"),
        pytest.param(2.5, 3.5, id="float"),
        pytest.param(0, 1.0, id="at once"),
        pytest.param(58.5, 59.5, id="just below the cap"),
        pytest.param(59.5, 60, id="beyond the cap with the backoff"),
        pytest.param(86400, 60, id="beyond the cap by itself"),
        pytest.param(1e308, 60, id="never"),
        pytest.param(None, 1.0, id="nothing"),
        pytest.param(math.nan, 1.0, id="NaN"),
        pytest.param(math.inf, 1.0, id="infinite"),
        pytest.param(-math.inf, 1.0, id="minus infinite"),
        pytest.param(-30, 1.0, id="in the past"),
        pytest.param("30", 1.0, id="str"),
        pytest.param(True, 1.0, id="bool"),
        pytest.param(10**400, 1.0, id="an int that no float holds"),
        pytest.param([30], 1.0, id="list"),
    ],
)
def test_what_an_exception_asks_for_comes_before_the_backoff_up_to_the_cap(answer: Any, countdown: float) -> None:
    policy = RetryPolicy(base=2, cap=60, retry_after=asked)

    assert policy.decide(TooManyRequests(answer), 0, rng=lambda: 0.5) == RetryLater(countdown)


def test_an_exception_that_asks_for_nothing_gets_the_backoff() -> None:
    policy = RetryPolicy(base=2, cap=60, retry_after=asked)

    assert [policy.decide(ValueError(), retries, rng=lambda: 0.5) for retries in range(2)] == [
        RetryLater(1.0),
        RetryLater(2.0),
    ]


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(max_retries=0, retry_after=asked),
        RetryPolicy(retry_on=ValueError, retry_after=asked),
        RetryPolicy(give_up_on=TooManyRequests, retry_after=asked),
    ],
    ids=["used up", "not listed", "given up on"],
)
def test_what_an_exception_asks_for_makes_nothing_worth_another_attempt(policy: RetryPolicy) -> None:
    assert isinstance(policy.decide(TooManyRequests(30), 0), GiveUp)


def test_a_failing_question_does_not_take_the_place_of_the_error_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(error: BaseException) -> float:
        raise KeyError("Retry-After")

    policy = RetryPolicy(base=2, cap=60, retry_after=broken)
    with caplog.at_level(logging.WARNING):
        decision = policy.decide(TooManyRequests(30), 0, rng=lambda: 0.5)

    assert decision == RetryLater(1.0)
    (record,) = caplog.records
    assert record.getMessage() == "retry_after failed for a TooManyRequests, and counts as None"
    assert record.exc_info is not None and isinstance(record.exc_info[1], KeyError)


def test_the_exception_itself_is_what_is_asked_about() -> None:
    errors: list[BaseException] = []
    error = TooManyRequests(30)

    RetryPolicy(retry_after=lambda error: errors.append(error)).decide(error, 0)

    assert errors == [error]


@given(policies, st.floats() | st.integers(), counts, draws)
def test_a_wait_that_is_asked_for_is_kept_unless_the_cap_is_shorter(
    policy: RetryPolicy, answer: float, retries: int, draw: float
) -> None:
    asking = dataclasses.replace(policy, retry_after=lambda _: answer)
    decision = asking.decide(ValueError(), retries, rng=lambda: draw)

    if isinstance(decision, RetryLater):
        assert 0 <= decision.countdown <= policy.cap
        if 0 <= answer < 1e300:
            assert decision.countdown >= min(answer, policy.cap)


# --- properties ------------------------------------------------------------------------------------------------


@given(policies, counts, draws)
def test_a_wait_is_never_negative_and_never_beyond_the_cap(policy: RetryPolicy, retries: int, draw: float) -> None:
    decision = policy.decide(ValueError(), retries, rng=lambda: draw)

    if isinstance(decision, RetryLater):
        assert 0 <= decision.countdown <= policy.bound(retries) <= policy.cap


@given(policies, counts, counts)
def test_waits_are_bound_by_a_growing_time(policy: RetryPolicy, one: int, other: int) -> None:
    earlier, later = sorted([one, other])

    assert policy.bound(earlier) <= policy.bound(later)


@given(st.integers(0, 50))
def test_there_are_exactly_as_many_attempts_as_allowed(max_retries: int) -> None:
    policy = RetryPolicy(max_retries=max_retries)

    retries = 0
    while isinstance(policy.decide(ValueError(), retries), RetryLater):
        retries += 1

    assert retries == max_retries


@given(policies, st.integers(0, 20), st.integers())
def test_the_same_source_of_chance_gives_the_same_decision(policy: RetryPolicy, retries: int, seed: int) -> None:
    decisions = [policy.decide(ValueError(), retries, rng=random.Random(seed).random) for _ in range(2)]

    assert decisions[0] == decisions[1]


def test_waits_are_spread_over_the_whole_time_up_to_the_bound() -> None:
    policy = RetryPolicy(base=100, cap=100)
    chance = random.Random(1)

    waits = [policy.decide(ValueError(), 0, rng=chance.random).countdown for _ in range(1000)]  # type: ignore[union-attr]

    assert min(waits) < 5
    assert max(waits) > 95
    assert 45 < sum(waits) / len(waits) < 55


@pytest.mark.parametrize(
    ("policy", "bound"),
    [
        pytest.param(RetryPolicy(max_retries=10**6, cap=60), 60, id="float power"),
        pytest.param(RetryPolicy(max_retries=10**6, base=1, factor=2, cap=60), 60, id="int power"),
        pytest.param(RetryPolicy(max_retries=10**6, base=1e308, factor=1e308, cap=60), 60, id="product"),
        pytest.param(RetryPolicy(max_retries=10**6, base=1e-300, factor=1.0, cap=60), 1e-300, id="no growth"),
        pytest.param(RetryPolicy(max_retries=10**6, base=0, cap=60), 0, id="no wait at all"),
    ],
)
def test_the_bound_of_the_millionth_wait_is_a_plain_number(policy: RetryPolicy, bound: float) -> None:
    assert policy.bound(10**6) == bound
    assert math.isfinite(policy.bound(10**6))


# --- the value -------------------------------------------------------------------------------------------------


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy().max_retries = 1  # type: ignore[misc]


def test_equal_policies_are_interchangeable() -> None:
    assert RetryPolicy(retry_on=ValueError) == RetryPolicy(retry_on=[ValueError])  # type: ignore[arg-type]
    assert hash(RetryPolicy(retry_on=ValueError)) == hash(RetryPolicy(retry_on=(ValueError,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [ValueError, (ValueError,), [ValueError], {ValueError}, frozenset({ValueError})])
def test_exception_classes_are_kept_as_a_tuple(given: Any) -> None:
    policy = RetryPolicy(retry_on=given, give_up_on=given)

    assert policy.retry_on == policy.give_up_on == (ValueError,)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_retries": -1}, "max_retries must be an int of 0 or more, not -1"),
        ({"max_retries": 1.0}, "max_retries must be an int of 0 or more, not 1.0"),
        ({"max_retries": True}, "max_retries must be an int of 0 or more, not True"),
        ({"max_retries": None}, "max_retries must be an int of 0 or more, not None"),
        ({"base": -0.1}, "base must be 0 or more, not -0.1"),
        ({"base": "1"}, "base must be a finite number, not '1'"),
        ({"base": True}, "base must be a finite number, not True"),
        ({"base": None}, "base must be a finite number, not None"),
        ({"base": math.nan}, "base must be a finite number, not nan"),
        ({"factor": 0.9}, "factor must be 1 or more, not 0.9"),
        ({"factor": math.inf}, "factor must be a finite number, not inf"),
        ({"cap": -1}, "cap must be 0 or more, not -1"),
        ({"cap": math.inf}, "cap must be a finite number, not inf"),
        ({"cap": 10**400}, f"cap must be a finite number, not {10**400}"),
        ({"retry_on": None}, "retry_on must be exception classes, not None"),
        ({"retry_on": "ValueError"}, "retry_on must be exception classes, not 'ValueError'"),
        ({"retry_on": int}, "retry_on must be exception classes, not <class 'int'>"),
        ({"retry_on": (ValueError, "x")}, "retry_on must be exception classes, not (<class 'ValueError'>, 'x')"),
        ({"give_up_on": ValueError("x")}, "give_up_on must be exception classes, not ValueError('x')"),
        ({"retry_after": 30}, "retry_after must be a function of an exception, not 30"),
        ({"retry_after": "header"}, "retry_after must be a function of an exception, not 'header'"),
        ({"give_up_on": (int,)}, "give_up_on must be exception classes, not (<class 'int'>,)"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RetryPolicy(**arguments)

    assert str(caught.value) == text
