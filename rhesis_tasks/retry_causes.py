"""Which failures of a database or an HTTP service pass by themselves, and how long a service asks to wait.

Exceptions are recognised by their class's module and name and by their attributes, so that no driver and no HTTP
library is imported.  What to do about them is for :mod:`rhesis_tasks.retry` to say.
"""

from __future__ import annotations

import email.utils
import http.client
import math
import re
import ssl
import time
import urllib.error
from collections.abc import Iterator, Mapping
from datetime import UTC
from typing import Any, Final

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .errors import DatabaseUnavailableError

__all__ = ["http_retry_after", "is_transient_database_error", "is_transient_http_error"]


def _is_named(error: BaseException, names: Mapping[str, frozenset[str]]) -> bool:
    """Whether the error's class, or a base of it, is among the names of the package that it comes from."""
    return any(each.__name__ in names.get(_package(each), ()) for each in type(error).__mro__)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


# --- databases -------------------------------------------------------------------------------------------------

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_TRANSIENT_STATES: Final = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "53300",  # too_many_connections
        "55P03",  # lock_not_available
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
    }
)
_CONNECTION_EXCEPTION: Final = "08"

# What a driver raises of itself, without an SQLSTATE, where a connection cannot be made or is lost.
_LOST: Final = {"psycopg": frozenset({"OperationalError"}), "psycopg2": frozenset({"OperationalError"})}


def is_transient_database_error(error: BaseException) -> bool:
    """Whether the same transaction may well succeed a little later.

    So it is after a serialization failure, a deadlock, a lock that was not to be had, and where the database cannot be
    reached, does not take connections, or has lost this one.  It goes by the SQLSTATE of psycopg's, psycopg2's or
    asyncpg's exception, also where SQLAlchemy has wrapped it.
    """
    if isinstance(error, DatabaseUnavailableError | PoolTimeoutError | ConnectionError):
        return True  # asyncpg does not wrap the last
    layers = list(_layers(error))
    if any(getattr(each, "connection_invalidated", False) for each in layers):
        return True
    for each in layers:
        state = getattr(each, "sqlstate", None) or getattr(each, "pgcode", None)
        if isinstance(state, str):
            return state in _TRANSIENT_STATES or state.startswith(_CONNECTION_EXCEPTION)
    return any(_is_named(each, _LOST) or _is_closed(each) for each in layers)


def _layers(error: BaseException) -> Iterator[BaseException]:
    """The error, the one that it wraps as SQLAlchemy does, and what that was raised from."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        yield each
        wrapped = getattr(each, "orig", None)
        if not isinstance(wrapped, BaseException):
            wrapped = each.__cause__ if seen else None  # the cause of an error that wraps nothing is another matter
        seen.add(id(each))
        each = wrapped


def _is_closed(error: BaseException) -> bool:
    """Whether asyncpg says so; most of its InterfaceErrors are mistakes of the caller's."""
    is_asyncpg = any(_package(each) == "asyncpg" and each.__name__ == "InterfaceError" for each in type(error).__mro__)
    return is_asyncpg and "connection is closed" in str(error)


# --- HTTP ------------------------------------------------------------------------------------------------------

_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}  # never implemented by waiting

_HTTPX: Final = frozenset({"TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"})
_NO_ANSWER: Final = {
    "httpx": _HTTPX,
    "httpx2": _HTTPX,
    "requests": frozenset({"ConnectionError", "Timeout", "ChunkedEncodingError", "RetryError"}),
    "aiohttp": frozenset({"ClientConnectionError", "ClientPayloadError"}),
    "urllib3": frozenset({"TimeoutError", "NewConnectionError", "ProtocolError", "ProxyError", "MaxRetryError"}),
}


def is_transient_http_error(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later.

    So it is after the statuses 408, 425, 429 and 5xx but for 501 and 505, and where there was no answer, or only a part
    of one.  Any other status is final, and so is a certificate that is not accepted.  It knows the exceptions of httpx,
    requests, aiohttp, urllib3 and urllib, and others with an ``error.response.status_code``.
    """
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES
    if isinstance(error, urllib.error.URLError):
        # A text instead of an error says what is wrong with the URL.
        return isinstance(error.reason, OSError) and not _is_distrusted(error.reason)
    no_answer = (ConnectionError, TimeoutError, http.client.IncompleteRead, http.client.BadStatusLine)
    return (isinstance(error, no_answer) or _is_named(error, _NO_ANSWER)) and not _is_distrusted(error)


def _is_distrusted(error: BaseException) -> bool:
    """Whether it began with a certificate; the libraries wrap that in what they raise for lost connections."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        if isinstance(each, ssl.SSLCertVerificationError):
            return True
        seen.add(id(each))
        each = each.__cause__ or each.__context__
    return False


def http_retry_after(error: BaseException) -> float | None:
    """How many seconds the service asks to wait in the answer that an exception is about; None if it does not.

    Read are, in this order: ``retry-after-ms`` (milliseconds); ``Retry-After`` (RFC 9110: seconds, or a date, which is
    compared with the answer's own ``Date``); and from a 429 also ``RateLimit-Reset``, ``X-RateLimit-Reset-After`` and
    ``X-RateLimit-Reset`` (seconds, the last one also since 1970).
    """
    headers = _headers(error)
    if headers is None:
        return None
    asked = _number(headers.get("retry-after-ms"))
    if asked is not None:
        return asked / 1000
    retry_after = headers.get("retry-after")
    asked = _number(retry_after)
    if asked is not None:
        return asked
    date = _timestamp(retry_after)
    if date is not None:
        return max(0.0, date - _answered_at(headers))
    return _until_reset(headers) if _status(error) == 429 else None


def _until_reset(headers: Any) -> float | None:
    for name in ("ratelimit-reset", "x-ratelimit-reset-after", "x-ratelimit-reset"):
        asked = _number(headers.get(name))
        if asked is not None:
            return asked if asked < 10**9 else max(0.0, asked - _answered_at(headers))
    return None


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and any(_package(each) in ("aiohttp", "urllib") for each in type(error).__mro__):
        status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _headers(error: BaseException) -> Any:
    """The headers of the answer, as a mapping in which letter case makes no difference."""
    response = getattr(error, "response", None)
    headers = getattr(error if response is None else response, "headers", None)
    return headers if hasattr(headers, "get") else None


def _number(text: object) -> float | None:
    if not isinstance(text, str) or not re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _timestamp(text: object) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        date = email.utils.parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _answered_at(headers: Any) -> float:
    """By the clock of the service, if it says what that shows."""
    date = _timestamp(headers.get("date"))
    return time.time() if date is None else date
