"""A task as server-sent events: what is said, and when no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rhesis_tasks import streaming
from rhesis_tasks.streaming import Look, task_events


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LOOK_EVERY", 0)


def events(*looks: Look | None, gone_after: int = 100) -> list[str]:
    """What is sent while these are seen, one after the other."""
    coming = list(looks[1:])
    asked = iter(range(100))

    async def look() -> Look | None:
        return coming.pop(0)

    async def is_gone() -> bool:
        return next(asked) >= gone_after

    async def sent() -> Sequence[str]:
        assert looks[0] is not None
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


def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LIFE_SIGN_EVERY", 0)

    assert events(QUEUED, QUEUED, DONE)[1] == ":\n\n"
