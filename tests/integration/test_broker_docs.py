"""The statements of docs/broker.md run as the owner of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rhesis_tasks.testing import TenantDatabase

PAGE = Path(__file__).parents[2] / "docs" / "broker.md"
STATEMENTS = [
    statement.strip()
    for block in re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for statement in block.split(";")
    if statement.strip()
]


def test_there_are_statements() -> None:
    assert len(STATEMENTS) >= 10


@pytest.mark.parametrize("statement", STATEMENTS, ids=[" ".join(each.split())[:60] for each in STATEMENTS])
def test_a_query_of_the_page_runs_as_the_owner(database_of_the_module: TenantDatabase, statement: str) -> None:
    with database_of_the_module.owner.connect() as connection:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
