"""Every error has one base, a message that says what to do, and survives the way through a process pool."""

from __future__ import annotations

import copy
import pickle

import pytest

from rhesis_tasks import errors
from rhesis_tasks.errors import (
    HeaderError,
    InvalidTenantError,
    MissingExtraError,
    MissingTenantError,
    RhesisTasksError,
    TaskArgumentsError,
    TaskDefinitionError,
    TenantConflictError,
)

EVERY = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_has_the_one_base_and_a_meaning(kind: type[Exception]) -> None:
    assert issubclass(kind, RhesisTasksError)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        (InvalidTenantError, ValueError),
        (TaskArgumentsError, TypeError),
        (TaskDefinitionError, TypeError),
        (MissingExtraError, ImportError),
    ],
)
def test_errors_that_are_a_standard_kind_are_caught_as_such(kind: type[Exception], standard: type[Exception]) -> None:
    assert issubclass(kind, standard)


def test_the_docstring_is_the_message_where_none_is_given() -> None:
    assert str(MissingTenantError()) == MissingTenantError.__doc__
    assert str(MissingTenantError("of my own")) == "of my own"


@pytest.mark.parametrize("duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
@pytest.mark.parametrize("kind", EVERY)
def test_every_error_survives_copying_and_pickling(kind: type[Exception], duplicate: object) -> None:
    error = kind("what went wrong")

    again = duplicate(error)  # type: ignore[operator]

    assert type(again) is kind
    assert str(again) == "what went wrong"


@pytest.mark.parametrize(
    "error",
    [
        InvalidTenantError("m", field="organization_id", value=""),
        TenantConflictError("m", first="one", second="other"),
        MissingExtraError.of("psycopg", "postgres"),
    ],
)
def test_the_evidence_of_an_error_survives_pickling(error: Exception) -> None:
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)  # noqa: S301


def test_the_header_of_an_error_is_evidence_in_process_only() -> None:
    error = HeaderError("m", header={"v": 7})

    assert error.header == {"v": 7}
    assert pickle.loads(pickle.dumps(error)).header is None  # noqa: S301
