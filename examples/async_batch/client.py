"""How the provider is asked, and which of its failures are worth another try."""

from __future__ import annotations

import email.utils
import time
from types import TracebackType
from typing import Final, Self

import httpx2 as httpx

from rhesis_tasks import RetryPolicy

__all__ = ["FAILURES", "PATIENT", "Provider", "RefusedError", "UnavailableError", "seconds_to_wait"]


class RefusedError(Exception):
    """The provider has no score for this prompt, and never will."""


class UnavailableError(Exception):
    """The provider does not answer now: it has failed, or was asked too often."""

    def __init__(self, status: int, retry_after: float | None) -> None:
        self.retry_after = retry_after  #: how many seconds it asks to wait
        super().__init__(f"the provider answered {status}")


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
            UnavailableError: the answer was 429 or 5xx.
            RefusedError: it was another error, or no score.
            httpx2.TransportError: there was none.
        """
        response = await self._http.post("/evaluate", json={"prompt": prompt})
        if response.status_code == 429 or response.is_server_error:
            raise UnavailableError(response.status_code, seconds_to_wait(response.headers.get("Retry-After")))
        if not response.is_success:
            raise RefusedError(f"the provider answered {response.status_code}")
        try:
            return float(response.json()["score"])
        except (ValueError, TypeError, KeyError) as error:
            raise RefusedError(f"the provider's answer has no score: {response.text:.80}") from error


FAILURES: Final = (RefusedError, UnavailableError, httpx.TransportError)
"""What an attempt may end with that is not our fault."""


def seconds_to_wait(retry_after: str | None) -> float | None:
    """What a ``Retry-After`` header says, in either form of RFC 9110: seconds, or a date.  None if it says nothing."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return None


def _asked_for(error: BaseException) -> float | None:
    return error.retry_after if isinstance(error, UnavailableError) else None


PATIENT: Final = RetryPolicy(
    max_retries=8,
    base=0.1,
    factor=1.5,
    cap=60.0,
    retry_on=(UnavailableError, httpx.TransportError),
    retry_after=_asked_for,
)
"""For each prompt: up to nine attempts, none earlier than the provider wants.

Being sent away with 429 uses up an attempt, too, so there are more than failures alone would need.
"""
