"""How long a process waits for the database: a web process, where somebody waits for it, or a worker, or beat.

What :func:`be_patient` is not called in is a web process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ..errors import ConfigurationError

__all__ = ["ANSWER_TIMEOUT", "PATIENCE", "answer_timeout", "be_patient", "is_patient"]

ANSWER_TIMEOUT: Final = 10.0
"""Seconds for which a web process waits for an answer."""

PATIENCE: Final = 90.0
"""Seconds for which a worker, or beat, waits for an answer, and tries to connect where it launches a task."""

_is_patient = False


def be_patient(patient: bool = True) -> None:
    """This process is a worker, or beat."""
    global _is_patient
    _is_patient = patient


def is_patient() -> bool:
    """Whether this process is a worker, or beat."""
    return _is_patient


def answer_timeout(options: Mapping[str, Any], setting: str) -> float | None:
    """Seconds for which an answer is waited for, as the options say, or as this process does; None: until it comes.

    Args:
        options: those of the broker, or of the result backend.
        setting: Celery's name for them.

    Raises:
        ConfigurationError: it is no number of seconds.
    """
    value = options.get("answer_timeout", PATIENCE if _is_patient else ANSWER_TIMEOUT)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{setting}['answer_timeout'] is a number of seconds, or None to wait until the answer comes, not {value!r}"
        )
    return float(value)
