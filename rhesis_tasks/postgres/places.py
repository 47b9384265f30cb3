"""From where a consumer walks its queues.

A claim walks a queue from its beginning.  What is gone costs nothing there, unless some long transaction keeps the
server from removing it: then each claim passes everything that was done since that transaction began.  As soon as this
takes time, a consumer walks on from where it was a moment ago, and from the beginning only now and then: for what came
to be before that place, such as a message of higher priority, one that was given back, or one that was due.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from .queue import Claimed, Place

__all__ = ["Places"]

# A claim that takes longer than this walks past something, or the server is busy: then the other way costs no less.
_LONG: Final = 0.02
# From the beginning it is walked for one part of the time, but after so many seconds at the latest: what took long may
# have been a disk or a lock that was waited for, and nothing that is walked past.
_PART: Final = 1 / 20
_LATEST: Final = 5.0
# So long ago, since what is published at the same time is not committed in the order of its ids.
_BACK: Final = 0.5


class Places:
    """Where a consumer has been in its queues.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trails: dict[str, deque[tuple[float, Place]]] = {}
        self._cost = 0.0  # seconds that the last claim from the beginning took
        self._walked_at = clock()  # when that was

    @property
    def again_at(self) -> float:
        """When to walk from the beginning again, by the clock."""
        return self._walked_at + min(self._cost / _PART, _LATEST) if self._cost > _LONG else self._walked_at

    def starts(self, queues: Iterable[str]) -> dict[str, Place]:
        """From where to walk now; queues that are not in it from the beginning."""
        now = self._clock()
        if now >= self.again_at:
            return {}
        found = {}
        for queue in queues:
            trail = self._trails.get(queue, ())
            past = [place for at, place in trail if at <= now - _BACK]
            if past:
                found[queue] = past[-1]
        return found

    def claimed(self, starts: dict[str, Place], messages: Iterable[Claimed], began: float) -> None:
        """A claim that began at ``began`` by the clock, from these places, has got these messages."""
        now = self._clock()
        if not starts:
            self._cost, self._walked_at = now - began, now
        seen: set[str] = set()
        for message in messages:
            if message.place is not None and message.queue not in seen:
                seen.add(message.queue)
                self._leave_trail(message.queue, now, message.place)

    def _leave_trail(self, queue: str, now: float, place: Place) -> None:
        trail = self._trails.setdefault(queue, deque())
        if not trail or now - trail[-1][0] >= _BACK / 4:
            trail.append((now, place))
        while len(trail) > 1 and trail[1][0] <= now - _BACK:
            trail.popleft()
