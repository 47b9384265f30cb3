"""A task as server-sent events: what is said, and when no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rhesis_tasks import streaming
from rhesis_tasks.errors import DatabaseUnavailableError
from rhesis_tasks.streaming import Look, task_events


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOK_EVERY", 0)


def events(*looks: Look | Exception | None, gone_after: int = 100) -> list[str]:
    """What is sent while these are seen, one after the other; an exception is raised instead."""
    coming = list(looks[1:])
    asked = iter(range(100))

    async def look() -> Look | None:
        seen = coming.pop(0)
        if isinstance(seen, Exception):
            raise seen
        return seen

    async def is_gone() -> bool:
        return next(asked) >= gone_after

    async def sent() -> Sequence[str]:
        assert isinstance(looks[0], Look)
        return [event async for event in task_events(looks[0], look, is_gone)]

    return list(asyncio.run(sent()))


QUEUED, STARTED, DONE = Look("queued", False), Look("started", False), Look("done", True)


def test_each_change_is_said_once_and_the_end_by_its_name() -> None:
    assert events(QUEUED, QUEUED, STARTED, STARTED, DONE) == [
        "event: status\ndata: queued\n\n",
        "event: status\ndata: started\n\n",
        "event: end\nid: end\ndata: done\n\n",
    ]


def test_of_a_task_that_has_ended_there_is_the_end_only() -> None:
    assert events(DONE) == ["event: end\nid: end\ndata: done\n\n"]


def test_nobody_looks_for_a_client_that_is_gone() -> None:
    assert len(events(QUEUED, STARTED, gone_after=1)) == 2  # a third look would find nothing to see


def test_the_stream_of_a_task_that_is_not_there_any_more_just_ends() -> None:
    assert events(QUEUED, None) == ["event: status\ndata: queued\n\n"]


def test_an_outage_of_the_database_is_silent_and_the_state_is_said_when_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outage = DatabaseUnavailableError("cannot connect")
    assert events(QUEUED, outage, outage, STARTED, outage, DONE) == events(QUEUED, STARTED, DONE)

    monkeypatch.setattr(streaming, "LIFE_SIGN_EVERY", 0)
    assert events(QUEUED, outage, DONE)[1:-1] == [":\n\n"]


def test_any_other_error_is_not_kept_quiet() -> None:
    with pytest.raises(KeyError):
        events(QUEUED, KeyError())


def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LIFE_SIGN_EVERY", 0)

    assert events(QUEUED, QUEUED, DONE)[1] == ":\n\n"
