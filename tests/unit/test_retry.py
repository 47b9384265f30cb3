"""When a failed attempt is tried again: a pure function of the error, the attempt, its age and a random source."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import operator
import pickle
import random
from typing import Any
from urllib.error import HTTPError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import OperationalError as BrokerOperationalError
from kombu.utils import json
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError

from rhesis_tasks import RetryPolicy, retry
from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.retry import GiveUp, RetryLater, register_retry_policy, retry_policy_named

counts = st.integers(0, 10**4)
seconds = st.one_of(st.floats(0, 1e308), st.integers(0, 10**9))
policies = st.builds(
    RetryPolicy,
    max_retries=counts,
    max_age=st.none() | st.floats(1e-9, 1e12),
    backoff=st.sampled_from(["constant", "linear", "exponential"]),
    base=seconds,
    factor=st.one_of(st.floats(1, 1e308), st.integers(1, 10)),
    cap=seconds,
    jitter=st.sampled_from(["full", "equal", "none"]),
)
ages = st.floats(0, 1e12)
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
        pytest.param(RetryPolicy(when=lambda _: True), ValueError(), 0, RetryLater(0.5), id="agreed to"),
        pytest.param(
            RetryPolicy(when=lambda _: False), ValueError(), 0, GiveUp("when() says no to ValueError"), id="refused"
        ),
        pytest.param(
            RetryPolicy(when=lambda _: True, retry_on=OSError),
            ValueError(),
            0,
            GiveUp("ValueError is not listed in retry_on"),
            id="agreeing makes nothing listed",
        ),
        pytest.param(
            RetryPolicy(when=lambda _: True, give_up_on=ValueError),
            ValueError(),
            0,
            GiveUp("ValueError is listed in give_up_on"),
            id="giving up wins over agreeing",
        ),
    ],
)
def test_the_decision(policy: RetryPolicy, error: BaseException, retries: int, decision: Any) -> None:
    assert policy.decide(error, retries, rng=lambda: 0.5) == decision


@pytest.mark.parametrize(
    ("backoff", "jitter", "waits"),
    [
        ("constant", "full", [1.5, 1.5, 1.5, 1.5]),
        ("constant", "equal", [2.25, 2.25, 2.25, 2.25]),
        ("constant", "none", [3, 3, 3, 3]),
        ("linear", "full", [1.5, 3, 4.5, 5]),
        ("linear", "equal", [2.25, 4.5, 6.75, 7.5]),
        ("linear", "none", [3, 6, 9, 10]),
        ("exponential", "full", [1.5, 3, 5, 5]),
        ("exponential", "equal", [2.25, 4.5, 7.5, 7.5]),
        ("exponential", "none", [3, 6, 10, 10]),
    ],
)
def test_the_waits_of_each_backoff_and_jitter(backoff: Any, jitter: Any, waits: list[float]) -> None:
    policy = RetryPolicy(max_retries=4, base=3, factor=2, cap=10, backoff=backoff, jitter=jitter)

    assert [policy.decide(ValueError(), n, rng=lambda: 0.5) for n in range(4)] == [RetryLater(wait) for wait in waits]


@pytest.mark.parametrize(
    ("elapsed", "decision"),
    [
        pytest.param(0, RetryLater(10), id="at first"),
        pytest.param(50, RetryLater(10), id="the next attempt begins just in time"),
        pytest.param(50.1, GiveUp("it would be older than 60 s at its next attempt"), id="it begins too late"),
        pytest.param(60, GiveUp("it would be older than 60 s at its next attempt"), id="as old as it may get"),
        pytest.param(60.1, GiveUp("it is older than 60 s"), id="too old"),
        pytest.param(-5, RetryLater(10), id="by a clock that is behind"),
    ],
)
def test_nothing_begins_after_the_greatest_age(elapsed: float, decision: Any) -> None:
    policy = RetryPolicy(max_age=60, base=10, factor=1, jitter="none")

    assert policy.decide(ValueError(), 0, elapsed=elapsed) == decision


@pytest.mark.parametrize(("max_age", "text"), [(3600, "3600"), (0.5, "0.5"), (604800.0, "604800"), (10**7, "10000000")])
def test_the_greatest_age_is_named_as_people_write_it(max_age: float, text: str) -> None:
    policy = RetryPolicy(max_age=max_age)

    assert policy.decide(ValueError(), 0, elapsed=10**9) == GiveUp(f"it is older than {text} s")


def test_a_wait_that_an_exception_asks_for_counts_into_the_age_of_the_next_attempt() -> None:
    policy = RetryPolicy(max_age=60, base=0, retry_after=lambda _: 30)

    assert policy.decide(ValueError(), 0, elapsed=30) == RetryLater(30)
    assert policy.decide(ValueError(), 0, elapsed=31) == GiveUp("it would be older than 60 s at its next attempt")


def test_used_up_retries_are_the_reason_also_of_an_old_task() -> None:
    assert RetryPolicy(max_age=60).decide(ValueError(), 3, elapsed=61) == GiveUp("all 3 retries are used up")


def test_a_predicate_is_asked_about_the_exceptions_that_are_listed_only() -> None:
    asked: list[BaseException] = []
    policy = RetryPolicy(retry_on=OSError, give_up_on=FileNotFoundError, when=lambda error: not asked.append(error))
    error = OSError()

    for each in (ValueError(), FileNotFoundError(), error):
        policy.decide(each, 0)

    assert asked == [error]


def test_a_failing_predicate_means_no_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken(error: BaseException) -> bool:
        raise KeyError("status")

    with caplog.at_level(logging.WARNING):
        decision = RetryPolicy(when=broken).decide(ValueError(), 0)

    assert decision == GiveUp("when() says no to ValueError")
    (record,) = caplog.records
    assert record.getMessage() == "when() failed for a ValueError, and counts as False"
    assert record.exc_info is not None and isinstance(record.exc_info[1], KeyError)


# --- rules -----------------------------------------------------------------------------------------------------

FILES = RetryPolicy(max_retries=1, base=1, retry_on=OSError, give_up_on=FileNotFoundError)
KEYS = RetryPolicy(max_retries=2, base=2, retry_on=KeyError)
ODD = RetryPolicy(max_retries=3, base=3, when=lambda error: len(error.args) % 2 == 1)


@pytest.mark.parametrize(
    ("policy", "error", "decided"),
    [
        pytest.param(FILES | KEYS, OSError(), FILES, id="the first"),
        pytest.param(FILES | KEYS, KeyError(), KEYS, id="the last"),
        pytest.param(FILES | KEYS, FileNotFoundError(), FILES, id="the first gives up"),
        pytest.param(FILES | RetryPolicy(5), FileNotFoundError(), FILES, id="and no other one is asked then"),
        pytest.param(FILES | KEYS | ODD, ValueError(1), ODD, id="the third"),
        pytest.param(ODD | KEYS, KeyError(1), ODD, id="agreed to by the first"),
        pytest.param(ODD | KEYS, KeyError(1, 2), KEYS, id="refused by the first"),
        pytest.param(retry.NO_RETRY | KEYS, KeyError(), KEYS, id="the first handles nothing"),
        pytest.param(RetryPolicy(rules=(FILES, KEYS)), KeyError(), KEYS, id="named as rules"),
    ],
)
def test_the_first_that_handles_an_exception_decides(
    policy: RetryPolicy, error: Exception, decided: RetryPolicy
) -> None:
    for retries in range(5):
        decision = policy.decide(error, retries, rng=lambda: 0.5)
        assert decision == decided.decide(error, retries, rng=lambda: 0.5)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (FILES | KEYS, "ValueError is handled by none of 2 policies"),
        (FILES | KEYS | ODD, "ValueError is handled by none of 3 policies"),
    ],
)
def test_what_no_policy_handles_is_given_up(policy: RetryPolicy, reason: str) -> None:
    assert policy.decide(ValueError(), 0) == GiveUp(reason)


def test_attempts_are_counted_over_all_policies() -> None:
    policy = FILES | KEYS

    assert isinstance(policy.decide(KeyError(), 1), RetryLater)
    assert policy.decide(OSError(), 1) == GiveUp("all 1 retries are used up")
    assert policy.decide(KeyError(), 2) == GiveUp("all 2 retries are used up")


def test_each_policy_has_its_own_greatest_age() -> None:
    policy = dataclasses.replace(FILES, max_age=10) | KEYS

    assert policy.decide(OSError(), 0, elapsed=11) == GiveUp("it is older than 10 s")
    assert isinstance(policy.decide(KeyError(), 0, elapsed=11), RetryLater)


def test_policies_compose_alike_however_they_are_put_together() -> None:
    assert (FILES | KEYS) | ODD == FILES | (KEYS | ODD) == dataclasses.replace(ODD, rules=[FILES, KEYS])
    assert FILES | KEYS != KEYS | FILES
    assert (FILES | KEYS).rules == (FILES,)
    assert not FILES.rules and not KEYS.rules


@pytest.mark.parametrize("other", [None, ValueError, (ValueError,), 3])
def test_a_policy_composes_with_policies_only(other: Any) -> None:
    with pytest.raises(TypeError):
        RetryPolicy() | other


rules = st.builds(
    RetryPolicy,
    max_retries=st.integers(0, 5),
    backoff=st.sampled_from(["constant", "linear", "exponential"]),
    base=st.integers(1, 9),
    retry_on=st.lists(st.sampled_from([OSError, KeyError, ValueError, ConnectionError]), max_size=3),
    give_up_on=st.lists(st.sampled_from([LookupError, FileNotFoundError]), max_size=1),
    when=st.sampled_from([None, lambda error: not error.args]),
)
errors = st.sampled_from([OSError, KeyError, ValueError, ConnectionResetError, FileNotFoundError]).flatmap(
    lambda kind: st.sampled_from([kind(), kind("of another sort")])
)


def handles(policy: RetryPolicy, error: Exception) -> bool:
    listed = isinstance(error, policy.retry_on) and (policy.when is None or policy.when(error))
    return isinstance(error, policy.give_up_on) or listed


@given(st.lists(rules, min_size=1, max_size=5), errors, st.integers(0, 6), draws)
def test_a_composed_policy_decides_as_the_first_part_that_handles_the_exception(
    parts: list[RetryPolicy], error: Exception, retries: int, draw: float
) -> None:
    composed = functools.reduce(operator.or_, parts)
    first = next((part for part in parts if handles(part, error)), None)
    decision = composed.decide(error, retries, rng=lambda: draw)

    if first is None:
        assert isinstance(decision, GiveUp)
    else:
        assert decision == first.decide(error, retries, rng=lambda: draw)


# --- exception groups ------------------------------------------------------------------------------------------


class OfABatch(ExceptionGroup[Exception]):
    """A class of groups that an application has."""


class Asking(ConnectionError):
    """Asks to wait."""

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after


LOST = RetryPolicy(retry_on=(ConnectionError,), retry_after=lambda error: getattr(error, "retry_after", None))
SLOW = RetryPolicy(base=20, retry_on=(KeyError,))
AGREES = RetryPolicy(when=lambda error: isinstance(error, ConnectionError))


def group(*errors: Exception, kind: type[ExceptionGroup[Exception]] = ExceptionGroup) -> ExceptionGroup[Exception]:
    return kind("several", errors)


@pytest.mark.parametrize(
    ("policy", "error", "decision"),
    [
        pytest.param(LOST, group(Passing(), ConnectionError()), RetryLater(0.5), id="all are worth it"),
        pytest.param(LOST, group(group(Passing()), Passing()), RetryLater(0.5), id="also in a group within"),
        pytest.param(LOST, group(Passing(), KeyError()), GiveUp("KeyError is not listed in retry_on"), id="one is not"),
        pytest.param(
            LOST, group(Passing(), group(KeyError())), GiveUp("KeyError is not listed in retry_on"), id="one within"
        ),
        pytest.param(LOST, group(Asking(3), Asking(8), Asking(5)), RetryLater(8.5), id="the longest that one asks for"),
        pytest.param(LOST | SLOW, group(KeyError(), Passing()), RetryLater(10.0), id="the longest of several parts"),
        pytest.param(
            LOST | SLOW,
            group(Passing(), ValueError()),
            GiveUp("ValueError is handled by none of 2 policies"),
            id="none handles one",
        ),
        pytest.param(AGREES, group(Passing(), Passing()), RetryLater(0.5), id="when() agrees to all"),
        pytest.param(AGREES, group(Passing(), KeyError()), GiveUp("when() says no to KeyError"), id="when() says no"),
        pytest.param(
            RetryPolicy(give_up_on=(KeyError,)),
            group(ValueError(), KeyError()),
            GiveUp("KeyError is listed in give_up_on"),
            id="given up",
        ),
        pytest.param(RetryPolicy(), group(ValueError()), RetryLater(0.5), id="everything"),
        pytest.param(RetryPolicy(retry_on=(ExceptionGroup,)), group(KeyError()), RetryLater(0.5), id="groups"),
        pytest.param(
            LOST | RetryPolicy(retry_on=(OfABatch,)), group(KeyError(), kind=OfABatch), RetryLater(0.5), id="own"
        ),
        pytest.param(
            LOST | RetryPolicy(retry_on=(OfABatch,)),
            group(group(KeyError(), kind=OfABatch)),
            RetryLater(0.5),
            id="own within",
        ),
        pytest.param(
            RetryPolicy(give_up_on=(OfABatch,)),
            group(KeyError(), kind=OfABatch),
            GiveUp("OfABatch is listed in give_up_on"),
            id="own is given up",
        ),
        pytest.param(
            RetryPolicy(retry_on=(OfABatch,)),
            group(KeyError()),
            GiveUp("KeyError is not listed in retry_on"),
            id="another class of groups",
        ),
        pytest.param(retry.DATABASE, group(ConnectionError()), RetryLater(0.1), id="database"),
        pytest.param(
            retry.DATABASE,
            group(ConnectionError(), KeyError()),
            GiveUp("when() says no to KeyError"),
            id="not database",
        ),
        pytest.param(retry.DATABASE | retry.HTTP, group(TimeoutError(), ConnectionError()), RetryLater(0.5), id="both"),
        pytest.param(
            retry.HTTP,
            group(
                HTTPError("https://example.com", 429, "", {"retry-after": "30"}, None),  # type: ignore[arg-type]
                HTTPError("https://example.com", 503, "", {"retry-after": "7"}, None),  # type: ignore[arg-type]
            ),
            RetryLater(30.5),
            id="http",
        ),
    ],
)
def test_each_exception_of_a_group_is_decided_about_unless_the_group_is_listed(
    policy: RetryPolicy, error: Exception, decision: Any
) -> None:
    assert policy.decide(error, 0, rng=lambda: 0.5) == decision


def test_of_a_group_only_one_wait_is_drawn() -> None:
    draws = iter([0.25, 0.5, 1.0])

    decision = LOST.decide(group(Passing(), Passing(), Passing()), 0, rng=lambda: next(draws))

    assert decision == RetryLater(0.25)


# --- the ready ones --------------------------------------------------------------------------------------------

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
    asking = dataclasses.replace(policy, max_age=None, retry_after=lambda _: answer)
    decision = asking.decide(ValueError(), retries, rng=lambda: draw)

    if isinstance(decision, RetryLater):
        assert 0 <= decision.countdown <= policy.cap
        if 0 <= answer < 1e300:
            assert decision.countdown >= min(answer, policy.cap)


# --- names -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test gives are gone after it."""
    monkeypatch.setattr(retry, "_named", dict(retry._named))


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("no_retry", retry.NO_RETRY),
        ("default", retry.DEFAULT),
        ("database", retry.DATABASE),
        ("http", retry.HTTP),
    ],
)
def test_the_ready_policies_travel_by_their_names(name: str, policy: RetryPolicy) -> None:
    assert retry_policy_named(name) is policy
    assert json.loads(json.dumps({"policy": policy})) == {"policy": name}


def test_a_policy_of_the_applications_travels_once_it_has_a_name() -> None:
    register_retry_policy("patient", FILES | KEYS)

    assert retry_policy_named("patient") == FILES | KEYS
    assert json.dumps(FILES | KEYS) == '"patient"'


def test_a_policy_without_a_name_cannot_travel() -> None:
    with pytest.raises(ConfigurationError) as caught:
        json.dumps({"policy": FILES})

    assert str(caught.value) == (
        "a retry policy travels by its name, and this one has none.  Give it one with "
        "register_retry_policy(name, policy), in code that web processes and workers share"
    )


def test_a_policy_may_be_registered_again_and_under_two_names() -> None:
    register_retry_policy("patient", RetryPolicy(7))
    register_retry_policy("patient", RetryPolicy(7))
    register_retry_policy("slow", RetryPolicy(7))

    assert json.dumps(RetryPolicy(7)) == '"patient"'
    assert retry_policy_named("slow") == RetryPolicy(7)


def test_a_name_that_another_policy_has_is_refused_and_the_other_one_keeps_it() -> None:
    register_retry_policy("patient", RetryPolicy(7))
    with pytest.raises(ConfigurationError) as caught:
        register_retry_policy("patient", RetryPolicy(8))

    assert str(caught.value) == "another retry policy is registered as 'patient'; give this one its own name"
    assert retry_policy_named("patient") == RetryPolicy(7)


@pytest.mark.parametrize("name", ["", " patient", "patient\n", "a\x00b", None, 3, b"patient"])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        register_retry_policy(name, RetryPolicy())

    assert str(caught.value) == f"the name of a retry policy must be a non-empty str in one line, not {name!r}"


def test_only_policies_get_names() -> None:
    with pytest.raises(ConfigurationError) as caught:
        register_retry_policy("patient", 3)  # type: ignore[arg-type]

    assert str(caught.value) == "register_retry_policy takes a name and a RetryPolicy, not 3"


def test_a_name_that_nothing_is_registered_under_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ConfigurationError) as caught:
        retry_policy_named("patient")

    assert str(caught.value) == (
        "no retry policy is registered as 'patient'; there are database, default, http, no_retry.  Call "
        "register_retry_policy(name, policy) in code that web processes and workers share"
    )


# --- properties ------------------------------------------------------------------------------------------------


@given(policies, counts, ages, draws)
def test_a_wait_is_never_negative_and_never_beyond_the_cap_or_the_greatest_age(
    policy: RetryPolicy, retries: int, elapsed: float, draw: float
) -> None:
    decision = policy.decide(ValueError(), retries, elapsed=elapsed, rng=lambda: draw)

    if isinstance(decision, RetryLater):
        assert 0 <= decision.countdown <= policy.bound(retries) <= policy.cap
        assert policy.max_age is None or elapsed + decision.countdown <= policy.max_age


@given(policies, counts, draws)
def test_jitter_keeps_to_its_half_of_the_time_up_to_the_bound(policy: RetryPolicy, retries: int, draw: float) -> None:
    bound = policy.bound(retries)
    decision = dataclasses.replace(policy, max_age=None).decide(ValueError(), retries, rng=lambda: draw)

    if isinstance(decision, RetryLater):
        least = {"full": 0, "equal": bound / 2, "none": bound}[policy.jitter]
        assert least <= decision.countdown <= bound


@given(policies, counts, counts)
def test_waits_are_bound_by_a_growing_time(policy: RetryPolicy, one: int, other: int) -> None:
    earlier, later = sorted([one, other])

    assert policy.bound(earlier) <= policy.bound(later)


@given(policies, st.integers(0, 50))
def test_there_are_exactly_as_many_attempts_as_allowed(policy: RetryPolicy, max_retries: int) -> None:
    policy = dataclasses.replace(policy, max_retries=max_retries, max_age=None)

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


@pytest.mark.parametrize("policy", [retry.NO_RETRY, retry.DEFAULT, retry.DATABASE | retry.HTTP])
def test_a_policy_can_be_pickled_and_copied(policy: RetryPolicy) -> None:
    assert copy.deepcopy(policy) == pickle.loads(pickle.dumps(policy)) == policy  # noqa: S301 - our own


def test_only_the_number_of_retries_is_given_by_place() -> None:
    assert RetryPolicy(7).max_retries == 7
    with pytest.raises(TypeError):
        RetryPolicy(7, 1.0)  # type: ignore[misc]


def test_equal_policies_are_interchangeable() -> None:
    assert RetryPolicy(retry_on=ValueError) == RetryPolicy(retry_on=[ValueError])  # type: ignore[arg-type]
    assert hash(RetryPolicy(retry_on=ValueError)) == hash(RetryPolicy(retry_on=(ValueError,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [ValueError, (ValueError,), [ValueError], {ValueError}, frozenset({ValueError})])
def test_exception_classes_are_kept_as_a_tuple(given: Any) -> None:
    policy = RetryPolicy(retry_on=given, give_up_on=given)

    assert policy.retry_on == policy.give_up_on == (ValueError,)


async def asks(error: BaseException) -> Any: ...


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
        ({"max_age": 0}, "max_age must be a number of seconds above 0, or None, not 0"),
        ({"max_age": -1.5}, "max_age must be a number of seconds above 0, or None, not -1.5"),
        ({"max_age": math.inf}, "max_age must be a number of seconds above 0, or None, not inf"),
        ({"max_age": "1h"}, "max_age must be a number of seconds above 0, or None, not '1h'"),
        ({"max_age": True}, "max_age must be a number of seconds above 0, or None, not True"),
        ({"backoff": "fast"}, "backoff must be one of constant, linear, exponential, not 'fast'"),
        ({"backoff": 2}, "backoff must be one of constant, linear, exponential, not 2"),
        ({"jitter": True}, "jitter must be one of full, equal, none, not True"),
        ({"jitter": None}, "jitter must be one of full, equal, none, not None"),
        ({"jitter": ["full"]}, "jitter must be one of full, equal, none, not ['full']"),
        ({"when": ValueError()}, "when must be a function of an exception, not ValueError()"),
        ({"when": asks}, "when must be a plain function, not async def: nothing awaits it"),
        ({"retry_after": asks}, "retry_after must be a plain function, not async def: nothing awaits it"),
        ({"rules": 3}, "rules must be a tuple of RetryPolicy, not 3"),
        ({"rules": (OSError,)}, "rules must be a tuple of RetryPolicy, not (<class 'OSError'>,)"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RetryPolicy(**arguments)

    assert str(caught.value) == text
