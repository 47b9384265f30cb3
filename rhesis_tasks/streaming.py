"""The changes of a task as server-sent events, as HTML's EventSource reads them.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple

from .errors import DatabaseUnavailableError

__all__ = ["END", "Look", "task_events"]

LOOK_EVERY: Final = 1.0
"""Seconds between two looks at the record."""

LIFE_SIGN_EVERY: Final = 15.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""

END: Final = "end"
"""The name and id of the last event.  An EventSource that comes back with this id is told that there is no more."""


class Look(NamedTuple):
    """What a task is seen as."""

    status: str  #: in one line
    has_ended: bool


async def task_events(
    first: Look, look: Callable[[], Awaitable[Look | None]], is_gone: Callable[[], Awaitable[bool]]
) -> AsyncIterator[str]:
    """An event for what is seen first and for each change, until the task has ended or nobody listens any more.

    It goes on through an outage of the database, with comments, and says what has changed when that is over.

    Args:
        first: what was seen before the stream began.
        look: sees the task again; None if there is no such task any more.
        is_gone: whether the client is.
    """
    seen, said_at = first, time.monotonic()
    yield _event(seen)
    while not seen.has_ended:
        await asyncio.sleep(LOOK_EVERY)
        if await is_gone():
            return
        latest: Look | None = seen
        with suppress(DatabaseUnavailableError):  # an EventSource that comes back to a 503 gives up for good
            latest = await look()
        if latest is None:
            return
        if latest != seen:
            seen, said_at = latest, time.monotonic()
            yield _event(seen)
        elif time.monotonic() - said_at >= LIFE_SIGN_EVERY:
            said_at = time.monotonic()
            yield ":\n\n"


def _event(look: Look) -> str:
    name = f"event: {END}\nid: {END}" if look.has_ended else "event: status"
    return f"{name}\ndata: {look.status}\n\n"
