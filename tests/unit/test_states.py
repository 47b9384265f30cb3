"""The one table of task states."""

from __future__ import annotations

import celery.states
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhesis_tasks.errors import IllegalTransitionError
from rhesis_tasks.states import (
    TERMINAL,
    TRANSITIONS,
    UNFINISHED,
    WAITING,
    State,
    Transition,
    by_celery,
    expire,
    launch,
    replay,
    revoke,
    start,
    succeed,
    to_celery,
)

transitions = pytest.mark.parametrize("transition", TRANSITIONS, ids=lambda transition: transition.target)


@pytest.mark.parametrize("state", State)
def test_every_state_is_entered_by_one_transition(state: State) -> None:
    assert [transition for transition in TRANSITIONS if transition.target is state] != []
    assert len({transition.target for transition in TRANSITIONS}) == len(TRANSITIONS)


@transitions
def test_a_task_may_begin_with_any_of_them_since_its_launch_may_not_be_known_here(transition: Transition) -> None:
    assert transition(None) is transition.target


@transitions
@pytest.mark.parametrize("state", sorted(UNFINISHED))
def test_what_is_not_over_can_go_anywhere(transition: Transition, state: State) -> None:
    assert transition(state) is transition.target


@transitions
@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_what_is_over_is_over(transition: Transition, state: State) -> None:
    with pytest.raises(IllegalTransitionError, match=f"a task that is {state} cannot {transition.name}") as error:
        transition(state)
    assert (error.value.state, error.value.name) == (state, transition.name)


@pytest.mark.parametrize("state", State)
def test_an_operator_brings_back_what_was_given_up_and_nothing_else(state: State) -> None:
    if state is State.DEAD:
        assert replay(state) is State.QUEUED
    else:
        with pytest.raises(IllegalTransitionError, match=f"a task that is {state} cannot be replayed"):
            replay(state)
    assert replay not in TRANSITIONS


@given(st.lists(st.sampled_from(TRANSITIONS)))
def test_any_history_ends_at_the_first_terminal_state(history: list[Transition]) -> None:
    state: State | None = None
    seen = []
    for transition in history:
        try:
            state = transition(state)
        except IllegalTransitionError:
            continue
        seen.append(state)

    assert all(each in UNFINISHED for each in seen[:-1])
    targets = [transition.target for transition in history]
    terminal = [target for target in targets if target in TERMINAL]
    assert state == (terminal[0] if terminal else targets[-1] if targets else None)


def test_nothing_runs_for_a_task_that_waits() -> None:
    assert {State.DELAYED, State.QUEUED, State.RETRY} == WAITING
    assert WAITING < UNFINISHED


@pytest.mark.parametrize("state", State)
def test_every_state_has_one_of_celerys_names(state: State) -> None:
    assert to_celery(state) in celery.states.ALL_STATES
    assert (to_celery(state) in celery.states.READY_STATES) == (state in TERMINAL)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        (celery.states.PENDING, State.QUEUED),
        (celery.states.RECEIVED, State.QUEUED),
        (celery.states.STARTED, State.STARTED),
        (celery.states.RETRY, State.RETRY),
        (celery.states.SUCCESS, State.SUCCESS),
        (celery.states.IGNORED, State.SUCCESS),
        (celery.states.FAILURE, State.FAILURE),
        (celery.states.REJECTED, State.FAILURE),
        (celery.states.REVOKED, State.REVOKED),
    ],
)
def test_each_of_celerys_names_is_a_transition(name: str, state: State) -> None:
    assert by_celery(name).target is state
    assert name in (celery.states.RECEIVED, celery.states.IGNORED, celery.states.REJECTED) or to_celery(state) == name


@pytest.mark.parametrize("name", ["PROGRESS", "progress", "uploading 3/7", ""])
def test_an_applications_own_name_means_that_the_task_runs(name: str) -> None:
    assert by_celery(name) is start


def test_the_functions_are_what_they_say() -> None:
    moves = [launch(None), start(State.QUEUED), succeed(State.STARTED), revoke(State.QUEUED), expire(State.DELAYED)]

    assert moves == [State.QUEUED, State.STARTED, State.SUCCESS, State.REVOKED, State.EXPIRED]
