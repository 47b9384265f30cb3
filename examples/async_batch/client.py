"""How the provider is asked, and which of its failures are worth another try."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Final, Self

import httpx2 as httpx

from rhesis_tasks.retry import HTTP

__all__ = ["FAILURES", "PATIENT", "NoScoreError", "Provider"]


class NoScoreError(Exception):
    """The provider has answered, without a score."""


class Provider:
    """One tenant's connections to the provider, closed at the end of the block.

    Args:
        url: where it is.
        api_key: the tenant's.
        connections: how many requests are made at once.
    """

    def __init__(self, url: str, *, api_key: str, connections: int) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=10.0,
            trust_env=False,  # it is on this machine, past any proxy; leave that out for a real one
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def evaluate(self, prompt: str) -> float:
        """The prompt's score, of one attempt.

        Raises:
            httpx2.HTTPStatusError: the answer was an error.
            httpx2.TransportError: there was none.
            NoScoreError: there was one, which has no score.
        """
        response = await self._http.post("/evaluate", json={"prompt": prompt})
        response.raise_for_status()
        try:
            return float(response.json()["score"])
        except (ValueError, TypeError, KeyError) as error:
            raise NoScoreError(f"the provider's answer has no score: {response.text:.80}") from error


FAILURES: Final = (httpx.HTTPStatusError, httpx.TransportError, NoScoreError)
"""What an attempt may end with that is not our fault."""

PATIENT: Final = dataclasses.replace(HTTP, max_retries=8, base=0.1, factor=1.5, cap=60.0)
"""For each prompt: up to nine attempts after 429, 5xx or no answer, none earlier than the provider wants.

Being sent away with 429 uses up an attempt, too, so there are more than failures alone would need.
"""
