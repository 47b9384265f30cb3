"""A model provider as one meets them: it takes its time, it fails, and each API key may ask only so often.

It runs on this machine and stands for a real one.  What it does to a prompt follows from a seed (:func:`fate`), so that
what a run must find is known.  It counts what it is asked, so that what a run did can be checked.  Not to be copied.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import random
import time
from collections import defaultdict
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

__all__ = ["Fate", "app", "fate"]

SEED: Final = os.environ.get("PROVIDER_SEED", "1")
RATE: Final = 40.0
"""Requests a second that an API key may make in the long run."""
BURST: Final = 10.0
"""How many it may make at once after a pause."""
LATENCY: Final = (0.02, 0.2)
"""Between how many and how many seconds an answer takes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fate:
    """What a prompt will meet."""

    failures: float  #: how many requests fail before one is answered; infinite if none ever is
    score: float  #: the answer


def fate(api_key: str, prompt: str, seed: str = SEED) -> Fate:
    """The same for the same arguments, whenever and however often it is asked."""
    rng = random.Random(f"{seed}/{api_key}/{prompt}")  # noqa: S311 - no secret
    (failures,) = rng.choices([0, 1, 2, math.inf], weights=[75, 15, 7, 3])
    return Fate(failures, round(rng.random(), 3))


class TokenBucket:
    """A rate limit: a token for each request, so many new ones a second, at most ``size`` of them."""

    def __init__(self, rate: float, size: float) -> None:
        self._rate = rate
        self._size = self._tokens = size
        self._filled_at = time.monotonic()

    def take(self) -> float:
        """Take a token; 0, or the seconds until there is one."""
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


@dataclasses.dataclass(slots=True)
class Count:
    """How often a prompt was asked, and what came of it."""

    requests: int = 0  #: all
    limited: int = 0  #: 429
    failed: int = 0  #: 500, or the connection dropped
    answered: int = 0


class Dropped(Response):
    """A response that breaks off after its head."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Promise a body and send none, so that the server drops the connection."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})


_counts: defaultdict[tuple[str, str], Count] = defaultdict(Count)
_buckets: defaultdict[str, TokenBucket] = defaultdict(lambda: TokenBucket(RATE, BURST))


async def evaluate(request: Request) -> Response:
    """``POST {"prompt": ...}`` with an API key: ``{"score": ...}``, if all goes well."""
    api_key = request.headers.get("authorization", "").removeprefix("Bearer ")
    prompt = (await request.json())["prompt"]
    count = _counts[api_key, prompt]
    count.requests += 1
    wait = _buckets[api_key].take()
    if wait:
        count.limited += 1
        return Response(status_code=429, headers={"Retry-After": str(math.ceil(wait))})  # whole seconds, by RFC 9110
    await asyncio.sleep(random.uniform(*LATENCY))  # noqa: S311
    outcome = fate(api_key, prompt)
    if count.failed < outcome.failures:
        count.failed += 1
        return Response(status_code=500) if count.failed % 2 else Dropped()
    count.answered += 1
    return JSONResponse({"score": outcome.score})


async def statistics(_request: Request) -> Response:
    """What was counted: ``{api_key: {prompt: {"requests": ..., ...}}}``."""
    found: defaultdict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    for (api_key, prompt), count in _counts.items():
        found[api_key][prompt] = dataclasses.asdict(count)
    return JSONResponse(found)


app = Starlette(routes=[Route("/evaluate", evaluate, methods=["POST"]), Route("/statistics", statistics)])
