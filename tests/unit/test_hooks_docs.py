"""What the page about hooks names is what there is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from rhesis_tasks import BaseTask
from rhesis_tasks.hooks import MOST_LEFT, RUN_HOOKS, TaskOutcome

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hooks.md").read_text()


def test_the_table_of_attributes_has_them_all() -> None:
    table = PAGE.partition("| Attribute |")[2].partition("\n\n")[0]
    rows = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))

    assert rows == {field.name for field in dataclasses.fields(TaskOutcome)} | {"name", "key"}


def test_the_numbers_and_names_of_the_page_are_those_of_the_code() -> None:
    assert f"`hook_time_limit` is {BaseTask.hook_time_limit:g} seconds" in PAGE
    assert f"{MOST_LEFT} `def` hooks" in PAGE
    assert f"`{RUN_HOOKS}`" in PAGE
