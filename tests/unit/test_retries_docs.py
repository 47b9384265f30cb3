"""The tables of the page about retries say what the policies are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rhesis_tasks import RetryPolicy
from rhesis_tasks.retry import DATABASE, DEFAULT, HTTP
from rhesis_tasks.retry_causes import _TRANSIENT_STATES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "retries.md").read_text()


def test_the_table_of_arguments_has_them_all_with_their_defaults() -> None:
    table = PAGE.partition("| Argument |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .* \|$", table, re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(RetryPolicy)}
    words = {None: "none", (Exception,): "(Exception,)"}

    assert {name: text.strip('`"') for name, text in rows.items()} == {
        name: words.get(default, str(default)) for name, default in defaults.items()
    }


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (DEFAULT, "three retries with waits of up to 1, 2 and 4 seconds"),
        (DATABASE, "six retries, at first soon, with waits of up to 0.2, 0.6, 1.8, 5.4, 16.2 and 30 seconds"),
        (HTTP, "five retries with waits of up to 1, 2, 4, 8 and 16 seconds"),
    ],
)
def test_the_waits_that_the_page_names_are_those_of_the_policy(policy: RetryPolicy, words: str) -> None:
    named = [float(number) for number in re.findall(r"[\d.]+", words)]

    assert words in PAGE
    assert named == [pytest.approx(policy.bound(n)) for n in range(policy.max_retries)]


def test_the_table_of_sqlstates_names_those_that_are_transient() -> None:
    table = PAGE.partition("| SQLSTATE |")[2].partition("Everything else is final")[0]

    assert set(re.findall(r"\b\d\d[0-9A-Z]{3}\b", table)) == _TRANSIENT_STATES
    assert "08..." in table
