"""What a command says where ``-A`` names no application that can be had."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from rhesis_tasks.cli.application import application
from rhesis_tasks.errors import ConfigurationError

numbers = itertools.count(1)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of a name that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / f"shop_of_test_{next(numbers)}.py"
    yield path
    sys.modules.pop(path.stem, None)


def refusal(name: str) -> str:
    with pytest.raises(click.ClickException) as refused:
        application(name)
    return refused.value.message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("raise ValueError('no settings\\n file')", "no settings"),
        ("{}['SHOP_KEY']", "KeyError: 'SHOP_KEY'"),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("import os; os.no_such_thing", "module 'os' has no attribute 'no_such_thing'"),
    ],
)
def test_a_module_that_raises_is_told_in_a_line_with_the_place(module: Path, line: str, reason: str) -> None:
    module.write_text(f"\n\n{line}\n")

    said = refusal(module.stem)

    assert reason in said
    assert said.endswith(f" ({module}, line 3)")
    assert "\n" not in said


def test_an_attribute_that_is_not_there_is_named(module: Path) -> None:
    module.write_text("")

    assert refusal(f"{module.stem}:nope").endswith(f": module {module.stem!r} has no attribute 'nope'")


def test_what_is_no_application_is_named_by_its_type(module: Path) -> None:
    module.write_text("app = {}")

    assert refusal(f"{module.stem}:app").endswith(": that is of type dict")


def test_a_module_that_is_not_there_is_named_without_a_place() -> None:
    assert (
        refusal("no_such_module") == "there is no Celery application 'no_such_module': No module named 'no_such_module'"
    )


def test_an_error_of_ours_is_told_in_its_own_words(module: Path) -> None:
    module.write_text("from rhesis_tasks.errors import ConfigurationError\nraise ConfigurationError('no such URL')")

    with pytest.raises(ConfigurationError, match=r"^no such URL$"):
        application(module.stem)
