"""The Celery applications of these tests, as the launching process has them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rhesis_tasks import unconfigure
from rhesis_tasks.testing import TenantDatabase, new_tenant_database
from rhesis_tasks.variables import registered_vars, unregister_context_var

HERE = Path(__file__).parent


@contextmanager
def application(postgres_url: str, name: str) -> Iterator[tuple[Any, TenantDatabase]]:
    """The module of an application in this folder, and the new database that it is configured for."""
    with ExitStack() as stack:
        database = stack.enter_context(new_tenant_database(postgres_url))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DATABASE_URL", database.url)
        patch.syspath_prepend(HERE)
        before = set(registered_vars())
        tasks = importlib.import_module(name)
        stack.callback(sys.modules.pop, name, None)  # for the next file to have it configured anew
        stack.callback(unconfigure, tasks.app)
        for registered in [each for key, each in registered_vars().items() if key not in before]:
            stack.callback(unregister_context_var, registered.var)
        yield tasks, database
