"""What the documentation points at is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("examples/*/*.md"),
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)

    assert not broken


def test_every_test_that_the_guarantees_name_exists() -> None:
    named = set(
        re.findall(r"\b(test_\w+\.py)?(?:::)?(test_\w+)\b(?!\.py)", (ROOT / "docs" / "guarantees.md").read_text())
    )
    existing = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }

    assert named
    assert not {test for _, test in named} - existing


@pytest.mark.parametrize(
    ("page", "printed"),
    [("context", "organization acme (user ann)\n"), ("hooks", ""), ("monitoring", ""), ("retries", "")],
)
def test_the_code_of_a_page_runs(page: str, printed: str, tmp_path: Path) -> None:
    """That of others needs a database or a worker, and is run where there is one."""
    found = re.findall(
        r"^ *```python\n(.*?)^ *```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    script = tmp_path / "page.py"
    script.write_text("\n".join(map(textwrap.dedent, found)))
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    environ |= {
        "BROKER_URL": "memory://",
        "CELERY_RESULT_BACKEND": "cache+memory://",
        "TASKS_KEY": "k" * 32,
        "TASKS_KEY_BEFORE": "b" * 32,
    }

    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=60)

    assert found
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
