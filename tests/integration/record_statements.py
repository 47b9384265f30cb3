"""What the result backend asks of the database, for tests that count it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import Engine

from rhesis_tasks.postgres import records


@contextmanager
def noted_statements(engine: Engine | None = None) -> Iterator[list[str]]:
    """The statements in the block, each of which is a round trip and a commit; by default those to any database."""
    found: list[str] = []
    run = records.run

    def note(on: Engine, statement: str, values: Sequence[Any], **options: Any) -> list[Any]:
        if engine is None or on is engine:
            found.append(statement)
        return run(on, statement, values, **options)

    with patch.object(records, "run", note):
        yield found
