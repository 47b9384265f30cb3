"""What all tests need, wherever they run: files of unit and of integration tests that share a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import _state

from rhesis_tasks import unconfigure
from rhesis_tasks.app import _configured


@pytest.fixture(autouse=True, scope="module")
def no_application_for_the_next_file() -> Iterator[None]:
    """Forget a file's applications.

    The last is Celery's current one, all share their tasks with later ones, and a second that is configured makes it
    unclear which database is meant outside of a task.
    """
    shared, current, configured = set(_state._on_app_finalizers), _state._tls.current_app, set(_configured)
    yield
    _state._on_app_finalizers.intersection_update(shared)
    _state._set_current_app(current)
    for app in set(_configured) - configured:
        unconfigure(app)
