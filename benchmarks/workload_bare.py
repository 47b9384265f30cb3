"""The physical limit: our statements in a loop of psycopg, without Celery, kombu, threads and tasks.

The message is the one that Celery makes of the empty task, taken from a publishing through the broker.  Run as a
process of its own it is the "worker": it claims 32 messages and acknowledges the 32 before with each statement.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import psycopg
from notes import Notes, settings
from workload import noop

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.settings import schema_name

__all__ = ["message", "publish_noop"]


class _Bare:
    """What the queue needs of a connection."""

    def __init__(self) -> None:
        self._raw = psycopg.connect(settings()["url"], autocommit=True)

    def query(self, sql: str, parameters: Sequence[Any] = (), **_: Any) -> list[tuple[Any, ...]]:
        return self._raw.execute(sql.encode(), parameters).fetchall()


@cache
def _queue() -> MessageQueue:
    return MessageQueue(cast(Connection, _Bare()), schema_name())


@cache
def message() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the queue's ``publish`` is called with by Celery; the message itself is published as well."""
    publish = MessageQueue.publish
    with patch.object(MessageQueue, "publish", autospec=True, side_effect=publish) as recorded:
        noop.delay()
    call = recorded.call_args
    return tuple(call.args[1:]), dict(call.kwargs)


def publish_noop() -> None:
    arguments, keywords = message()
    _queue().publish(*arguments, **keywords)


def _work() -> None:
    starts = Notes(Path(settings()["folder"]) / "starts")
    queue, names = _queue(), [settings()["queue"]]
    consumer = queue.new_consumer()
    acks: list[tuple[int, int]] = []
    while True:
        claimed, _ = queue.claim(consumer, names, 32, acks=acks)
        for _ in claimed:
            starts.note(time.perf_counter())
        acks = [(message.id, message.token) for message in claimed if message.token is not None]
        if not claimed:
            time.sleep(0.01)


if __name__ == "__main__":
    _work()
