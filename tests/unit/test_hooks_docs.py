"""The code of the page about hooks runs, and its table says what an outcome has."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from rhesis_tasks import BaseTask
from rhesis_tasks.hooks import MOST_LEFT, RUN_HOOKS, TaskOutcome

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "hooks.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(CODE))
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    environ |= {"BROKER_URL": "memory://", "CELERY_RESULT_BACKEND": "cache+memory://"}

    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_the_table_of_attributes_has_them_all() -> None:
    table = PAGE.partition("| Attribute |")[2].partition("\n\n")[0]
    rows = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))

    assert rows == {field.name for field in dataclasses.fields(TaskOutcome)} | {"name", "key"}


def test_the_numbers_and_names_of_the_page_are_those_of_the_code() -> None:
    assert f"`hook_time_limit` is {BaseTask.hook_time_limit:g} seconds" in PAGE
    assert f"{MOST_LEFT} `def` hooks" in PAGE
    assert f"`{RUN_HOOKS}`" in PAGE
