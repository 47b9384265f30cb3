"""What all tests need, wherever they run: files of unit and of integration tests that share a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import _state


@pytest.fixture(autouse=True, scope="module")
def no_application_for_the_next_file() -> Iterator[None]:
    """Forget a file's applications: the last is Celery's current one, and all share their tasks with later ones."""
    shared, current = set(_state._on_app_finalizers), _state._tls.current_app
    yield
    _state._on_app_finalizers.intersection_update(shared)
    _state._set_current_app(current)
