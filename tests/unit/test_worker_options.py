"""What a worker can be told, and where it is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rhesis_tasks.options import OPTIONS, OptionError, Source, find_options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_every_option_has_a_row_in_the_docs_with_its_default_and_a_reason() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| `(\w+)` \| (\S+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)

    assert [row[:3] for row in rows] == [(option.name, option.variable, option.default or "none") for option in OPTIONS]
    assert all(reason.strip() for *_, reason in rows)


def test_the_first_source_that_has_a_value_wins() -> None:
    sources = [
        Source({"pool": ""}, lambda _: "first"),
        Source({"pool": "threads"}, lambda option: option.variable),
        Source({"pool": "solo", "concurrency": "2"}, lambda _: "third"),
    ]

    found = find_options(OPTIONS, sources)

    assert (found["pool"].value, found["pool"].source) == ("threads", "CELERY_WORKER_POOL")
    assert (found["concurrency"].value, found["concurrency"].source) == (2, "third")
    assert (found["loglevel"].value, found["loglevel"].source) == ("INFO", "default")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("concurrency", "0"),
        ("concurrency", "²"),
        ("health-port", "0"),
        ("health-port", "65536"),
        ("stop-timeout", "nan"),
        ("stop-timeout", "-1"),
        ("stop-timeout", "inf"),
        ("queues", ","),
        ("health-address", "a b"),
        ("flower", "2"),
    ],
)
def test_nonsense_is_refused_by_the_name_of_where_it_is_from(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^HERE is '{re.escape(text)}', and must be "):
        find_options(OPTIONS, [Source({name: text}, lambda _: "HERE")])


def test_a_value_reads_back_from_its_text() -> None:
    texts = {"queues": "a, b", "flower": "YES", "stop-timeout": "2.5", "loglevel": "debug", "health-port": "8080"}
    found = find_options(OPTIONS, [Source(texts, lambda _: "")])

    again = find_options(OPTIONS, [Source({name: each.text for name, each in found.items()}, lambda _: "")])

    assert {name: each.value for name, each in again.items()} == {name: each.value for name, each in found.items()}
