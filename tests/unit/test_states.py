"""The one table of task states."""

from __future__ import annotations

import celery.states
import pytest

from rhesis_tasks.states import TERMINAL, State, from_celery, sources, to_celery


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_entered(state: State) -> None:
    assert sources(state) - {state}


@pytest.mark.parametrize("state", State)
def test_a_success_is_never_left(state: State) -> None:
    assert State.SUCCESS not in sources(state)


@pytest.mark.parametrize("state", State)
def test_a_revoked_task_stays_so(state: State) -> None:
    assert State.REVOKED not in sources(state)


def test_a_failure_is_left_for_a_success_only_as_when_a_lost_workers_message_runs_elsewhere() -> None:
    assert {state for state in State if State.FAILURE in sources(state)} == {State.SUCCESS}


@pytest.mark.parametrize("state", State)
def test_whatever_is_not_over_can_go_anywhere(state: State) -> None:
    assert set(State) - TERMINAL <= sources(state)


def test_what_is_over_is_over() -> None:
    assert {State.SUCCESS, State.FAILURE, State.REVOKED} == TERMINAL
    assert {to_celery(state) for state in TERMINAL} == celery.states.READY_STATES


@pytest.mark.parametrize("state", State)
def test_our_states_go_to_celerys_names_and_back(state: State) -> None:
    assert from_celery(to_celery(state)) is state
    assert to_celery(state) in celery.states.ALL_STATES


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
def test_each_of_celerys_names_has_a_state(name: str, state: State) -> None:
    assert from_celery(name) is state


@pytest.mark.parametrize("name", ["PROGRESS", "progress", "uploading 3/7", ""])
def test_an_applications_own_name_means_that_the_task_runs(name: str) -> None:
    assert from_celery(name) is State.STARTED
