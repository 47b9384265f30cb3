"""What is said of failures, and what of their texts is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

from rhesis_tasks import BaseTask, TenantContext, configure, tenant_scope
from rhesis_tasks.errors import ConfigurationError
from rhesis_tasks.failures import REDACTED, reason_of, redact_exception, redact_text, redacts
from rhesis_tasks.retry import NO_RETRY


def mask(text: str) -> str:
    return text.replace("hunter2", "***")


def broken(text: str) -> str:
    raise ValueError(text)


@pytest.mark.parametrize(
    ("error_type", "reason"),
    [
        ("WorkerLostError", "the process that ran it was lost"),
        ("SignatureError", "its message is not signed, and it was not run"),
        ("ValueError", None),
        ("", None),
        (None, None),
    ],
)
def test_a_reason_is_known_of_what_no_policy_was_asked_about(error_type: str | None, reason: str | None) -> None:
    assert reason_of(error_type) == reason


def test_texts_are_kept_where_nothing_redacts(app: Celery) -> None:
    stored = {"exc_type": "KeyError", "exc_message": ["hunter2"]}

    assert not redacts(app)
    assert redact_text(app, "hunter2") == "hunter2"
    assert redact_exception(app, stored) is stored


def test_a_text_is_what_the_function_makes_of_it(make_app: Callable[..., Celery]) -> None:
    app = make_app(configured=False)
    configure(app, redact=mask)

    assert redacts(app)
    assert redact_text(app, "it is hunter2") == "it is ***"


@pytest.mark.parametrize(
    ("redact", "error"),
    [(broken, "ValueError"), (lambda _: None, "TypeError"), (lambda text: text.encode(), "TypeError")],
    ids=["raises", "none", "bytes"],
)
def test_nothing_of_a_text_is_kept_where_the_function_fails(
    make_app: Callable[..., Celery], caplog: pytest.LogCaptureFixture, redact: Any, error: str
) -> None:
    app = make_app(configured=False)
    configure(app, redact=redact)

    assert redact_text(app, "hunter2") == REDACTED
    assert f"redact= failed with a {error}: the text is left out" in caplog.text
    assert "hunter2" not in caplog.text


def test_the_arguments_of_an_exception_are_redacted_however_deep(make_app: Callable[..., Celery]) -> None:
    app = make_app(configured=False)
    configure(app, redact=mask)
    stored = {
        "exc_type": "KeyError",
        "exc_module": "builtins",
        "exc_message": ("hunter2", 7, None, {"password": "hunter2", "all": ["hunter2", ("hunter2",)]}),
    }

    assert redact_exception(app, stored) == {
        "exc_type": "KeyError",
        "exc_module": "builtins",
        "exc_message": ["***", 7, None, {"password": "***", "all": ["***", ["***"]]}],
    }


@pytest.mark.parametrize("stored", [None, "hunter2", {"result": "hunter2"}])
def test_what_is_no_stored_exception_stays_as_it_is(make_app: Callable[..., Celery], stored: Any) -> None:
    app = make_app(configured=False)
    configure(app, redact=mask)

    assert redact_exception(app, stored) is stored


def test_the_line_of_a_failed_task_is_redacted_with_its_traceback(
    make_app: Callable[..., Celery], work_off: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(configured=False)
    configure(app, redact=mask)

    @app.task(base=BaseTask, name="body", retry_policy=NO_RETRY)
    def body() -> None:
        raise ValueError("the password is hunter2")

    with caplog.at_level(logging.INFO), tenant_scope(TenantContext("acme", "ann")):
        body.delay()
        work_off(app)

    (record,) = [each for each in caplog.records if getattr(each, "task_outcome", None) == "failure"]
    text = logging.Formatter().format(record)
    assert "ValueError: the password is ***" in text.partition("\n")[0]
    assert "Traceback (most recent call last)" in text
    assert text.rstrip().endswith("ValueError: the password is ***")
    assert record.exc_info is None
    # Its source line in the traceback, too.
    assert "hunter2" not in text


def test_what_redacts_must_be_a_function(make_app: Callable[..., Celery]) -> None:
    app = make_app(configured=False)

    with pytest.raises(ConfigurationError) as caught:
        configure(app, redact="x")  # type: ignore[arg-type]

    assert str(caught.value) == "redact= is a function of a str that returns one, not 'x'"
