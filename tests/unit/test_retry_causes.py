"""Which failures of databases and HTTP services pass by themselves: the exceptions that drivers and libraries raise."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import math
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import psycopg
import pytest
from asyncpg import exceptions as asyncpg
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors as psycopg_errors
from sqlalchemy import create_engine, text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from rhesis_tasks.errors import DatabaseUnavailableError, PermissionDeniedError
from rhesis_tasks.retry import (
    DATABASE,
    HTTP,
    GiveUp,
    RetryLater,
    http_retry_after,
    is_transient_database_error,
    is_transient_http_error,
)
from rhesis_tasks.retry_causes import _LOST, _NO_ANSWER

# --- databases -------------------------------------------------------------------------------------------------

TRANSIENT = {
    "40001": "SerializationFailure",
    "40P01": "DeadlockDetected",
    "53300": "TooManyConnections",
    "55P03": "LockNotAvailable",
    "57P01": "AdminShutdown",
    "57P02": "CrashShutdown",
    "57P03": "CannotConnectNow",
    "08000": "ConnectionException",
    "08001": "SqlclientUnableToEstablishSqlconnection",
    "08003": "ConnectionDoesNotExist",
    "08004": "SqlserverRejectedEstablishmentOfSqlconnection",
    "08006": "ConnectionFailure",
}
FINAL = {
    "22P02": "InvalidTextRepresentation",
    "23505": "UniqueViolation",
    "25006": "ReadOnlySqlTransaction",
    "28P01": "InvalidPassword",
    "40002": "TransactionIntegrityConstraintViolation",
    "42501": "InsufficientPrivilege",
    "42P01": "UndefinedTable",
    "53100": "DiskFull",
    "57014": "QueryCanceled",
    "57P04": "DatabaseDropped",
    "P0001": "RaiseException",
}
STATES = [
    pytest.param(state, name, state in TRANSIENT, id=f"{state} {name}")
    for state, name in {**TRANSIENT, **FINAL}.items()
]


def wrapped(error: BaseException) -> DBAPIError:
    """As SQLAlchemy raises it."""
    kind = OperationalError if isinstance(error, psycopg.OperationalError) else DBAPIError
    return kind("SELECT 1", {}, error)


@pytest.mark.parametrize(("state", "name", "is_transient"), STATES)
def test_what_psycopg_raises_is_judged_by_its_sqlstate(state: str, name: str, is_transient: bool) -> None:
    error = getattr(psycopg_errors, name)("it says why")

    assert error.sqlstate == state
    assert is_transient_database_error(error) is is_transient
    assert is_transient_database_error(wrapped(error)) is is_transient


@pytest.mark.parametrize(("state", "name", "is_transient"), STATES)
def test_what_asyncpg_raises_is_judged_by_its_sqlstate_also_inside_of_sqlalchemys_wrapping(
    state: str, name: str, is_transient: bool
) -> None:
    error = asyncpg.PostgresError.new({"C": state, "M": "it says why"})
    adapted = AsyncAdapt_asyncpg_dbapi.Error("it says why", error)
    adapted.__cause__ = error

    assert error.sqlstate == state
    assert is_transient_database_error(error) is is_transient
    assert is_transient_database_error(wrapped(adapted)) is is_transient


def test_the_drivers_error_is_found_below_the_one_that_sqlalchemy_was_given() -> None:
    adapted = Exception("an adapter that keeps nothing of it")
    adapted.__cause__ = asyncpg.DeadlockDetectedError("deadlock detected")

    assert is_transient_database_error(wrapped(adapted))


def test_psycopg2_calls_the_sqlstate_by_another_name() -> None:
    error = Exception("deadlock detected")
    error.pgcode = "40P01"  # type: ignore[attr-defined]

    assert is_transient_database_error(wrapped(error))


def test_a_server_that_is_not_there_is_transient() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql://nobody@127.0.0.1:{free.getsockname()[1]}/none"
        with pytest.raises(psycopg.OperationalError) as raw:
            psycopg.connect(url)
        with pytest.raises(OperationalError) as by_sqlalchemy:
            create_engine(url.replace("postgresql:", "postgresql+psycopg:")).connect()

    assert raw.value.sqlstate is None
    assert is_transient_database_error(raw.value)
    assert is_transient_database_error(by_sqlalchemy.value)


def test_a_pool_without_a_free_connection_is_transient() -> None:
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect(), pytest.raises(PoolTimeoutError) as caught:
        engine.connect()
    engine.dispose()

    assert is_transient_database_error(caught.value)


@pytest.mark.parametrize(
    ("error", "is_transient"),
    [
        pytest.param(DatabaseUnavailableError("cannot connect"), True, id="ours"),
        pytest.param(ConnectionRefusedError(), True, id="asyncpg without a server"),
        pytest.param(InterfaceError("SELECT 1", {}, Exception(), connection_invalidated=True), True, id="invalidated"),
        pytest.param(asyncpg.InterfaceError("cannot call fetch(): connection is closed"), True, id="closed"),
        pytest.param(asyncpg.InterfaceError("another operation is in progress"), False, id="asyncpg used wrongly"),
        pytest.param(psycopg.InterfaceError("the cursor is closed"), False, id="psycopg used wrongly"),
        pytest.param(psycopg.ProgrammingError("no results"), False, id="psycopg used more wrongly"),
        pytest.param(PermissionDeniedError("no", orig=psycopg_errors.InsufficientPrivilege()), False, id="refused"),
        pytest.param(IntegrityError("INSERT", {}, Exception("duplicate key")), False, id="no SQLSTATE"),
        pytest.param(ValueError(), False, id="a defect"),
        pytest.param(TimeoutError(), False, id="a time-out of anything"),
    ],
)
def test_other_errors_around_a_database(error: Exception, is_transient: bool) -> None:
    assert is_transient_database_error(error) is is_transient


def test_an_error_of_another_database_that_has_no_sqlstate_is_final() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(OperationalError) as caught:
        connection.execute(text("SELECT * FROM missing"))
    engine.dispose()

    assert not is_transient_database_error(caught.value)


def test_an_error_of_the_applications_is_not_judged_by_the_one_that_it_was_raised_from() -> None:
    error = ValueError("no such order")
    error.__cause__ = wrapped(psycopg_errors.DeadlockDetected())

    assert not is_transient_database_error(error)


def test_errors_that_wrap_each_other_in_a_circle_are_looked_at_once() -> None:
    one, other = Exception(), Exception()
    one.orig, other.orig = other, one  # type: ignore[attr-defined]

    assert not is_transient_database_error(one)


def test_the_database_policy_tries_a_lost_race_again_and_gives_up_a_refused_statement() -> None:
    deadlock = wrapped(psycopg_errors.DeadlockDetected())
    undefined = ProgrammingError("SELECT", {}, psycopg_errors.UndefinedTable())

    assert DATABASE.decide(deadlock, 0, rng=lambda: 0.5) == RetryLater(0.1)
    assert DATABASE.decide(deadlock, 6) == GiveUp("all 6 retries are used up")
    assert DATABASE.decide(undefined, 0) == GiveUp("when() says no to ProgrammingError")


# --- HTTP: what the libraries raise ----------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Answers as the path says: ``/503`` with that status, and the query as headers."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        what = url.path.strip("/")
        if what == "hang":
            time.sleep(0.5)
        if not what.isdecimal() and what != "cut":
            self.close_connection = True
            return
        self.send_response(200 if what == "cut" else int(what))
        for name, value in parse_qsl(url.query):
            self.send_header(name, value)
        self.send_header("Content-Length", "100" if what == "cut" else "0")
        self.end_headers()
        if what == "cut":
            self.wfile.write(b"and then")
            self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}"


def patience(url: str) -> float:
    """Seconds to wait for an answer: for one that comes, as long as a busy machine takes."""
    return 0.2 if url.endswith("/hang") else 30


def by_httpx(url: str) -> None:
    import httpx

    with httpx.Client(timeout=patience(url), trust_env=False) as client:
        client.get(url).raise_for_status()


def by_httpx2(url: str) -> None:
    import httpx2

    with httpx2.Client(timeout=patience(url), trust_env=False) as client:
        client.get(url).raise_for_status()


def by_requests(url: str) -> None:
    import requests

    with requests.Session() as session:
        session.trust_env = False
        session.get(url, timeout=patience(url)).raise_for_status()


def by_aiohttp(url: str) -> None:
    import aiohttp

    async def get() -> None:
        timeout = aiohttp.ClientTimeout(patience(url))
        async with aiohttp.ClientSession(timeout=timeout) as client, client.get(url, raise_for_status=True) as answer:
            await answer.read()

    asyncio.run(get())


def by_urllib(url: str) -> None:
    with urllib.request.urlopen(url, timeout=patience(url)) as answer:  # noqa: S310 - of this machine
        answer.read()


def by_urllib3(url: str) -> None:
    import urllib3

    with urllib3.PoolManager(retries=False, timeout=patience(url)) as pool:
        pool.request("GET", url)


WAYS = {
    "httpx": by_httpx,
    "httpx2": by_httpx2,
    "requests": by_requests,
    "aiohttp": by_aiohttp,
    "urllib": by_urllib,
    "urllib3": by_urllib3,
}


def way(request: pytest.FixtureRequest) -> Callable[[str], None]:
    if request.param != "urllib":
        pytest.importorskip(request.param)
    return WAYS[request.param]


get = pytest.fixture(way, params=list(WAYS), name="get")  # a request by each of the libraries
# By those that raise for a status of 400 or more.
get_checked = pytest.fixture(way, params=[name for name in WAYS if name != "urllib3"], name="get_checked")


def raised(get: Callable[[str], None], url: str) -> Exception:
    try:
        get(url)
    except Exception as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return error
    pytest.fail(f"{url} raises nothing")


STATUSES = {
    **dict.fromkeys((408, 425, 429, 500, 502, 503, 504, 507, 529, 599), True),
    **dict.fromkeys((400, 401, 403, 404, 405, 409, 410, 422, 451, 501, 505), False),
}


@pytest.mark.parametrize(("status", "is_transient"), STATUSES.items())
def test_an_answer_is_judged_by_its_status(
    get_checked: Callable[[str], None], service: str, status: int, is_transient: bool
) -> None:
    error = raised(get_checked, f"{service}/{status}")

    assert is_transient_http_error(error) is is_transient
    assert isinstance(HTTP.decide(error, 0), RetryLater if is_transient else GiveUp)


@pytest.mark.parametrize("what", ["hang", "drop", "cut"])
def test_no_answer_or_a_part_of_one_is_transient(get: Callable[[str], None], service: str, what: str) -> None:
    assert is_transient_http_error(raised(get, f"{service}/{what}"))


def test_a_service_that_is_not_there_is_transient(get: Callable[[str], None], nobody: str) -> None:
    assert is_transient_http_error(raised(get, nobody))


@pytest.mark.parametrize("url", ["nothing://127.0.0.1/", "127.0.0.1:1", "http://[::1"])
def test_a_url_that_is_none_is_a_defect(get: Callable[[str], None], url: str) -> None:
    assert not is_transient_http_error(raised(get, url))


@pytest.fixture(scope="module")
def distrusted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with a certificate that nobody knows."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("certificate")
    request = "req -x509 -newkey rsa:2048 -nodes -keyout key -out certificate -days 1 -subj /CN=localhost"
    subprocess.run([program, *request.split()], cwd=folder, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")

    def refuse_all(listener: socket.socket) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                connection = listener.accept()[0]
                with suppress(OSError), context.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=refuse_all, args=(listener,))
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_certificate_that_is_not_accepted_is_final(get: Callable[[str], None], distrusted: str) -> None:
    assert not is_transient_http_error(raised(get, distrusted))


LIBRARIES = {
    "httpx": (
        "ConnectTimeout ReadTimeout WriteTimeout PoolTimeout ConnectError ReadError WriteError CloseError"
        " RemoteProtocolError ProxyError",
        "LocalProtocolError UnsupportedProtocol DecodingError TooManyRedirects InvalidURL",
    ),
    "requests.exceptions": (
        "ConnectionError ConnectTimeout ReadTimeout ProxyError SSLError ChunkedEncodingError RetryError",
        "TooManyRedirects MissingSchema InvalidSchema InvalidURL InvalidHeader ContentDecodingError JSONDecodeError",
    ),
    "aiohttp": (
        "ServerDisconnectedError ServerTimeoutError ClientOSError ClientConnectorError ClientPayloadError",
        "InvalidURL TooManyRedirects",
    ),
    "urllib3.exceptions": (
        "ReadTimeoutError ConnectTimeoutError NewConnectionError ProtocolError IncompleteRead ProxyError MaxRetryError",
        "LocationParseError DecodeError InvalidHeader",
    ),
}
CLASSES = [
    pytest.param(module, name, is_transient, id=f"{module}.{name}")
    for module, names in {**LIBRARIES, "httpx2": LIBRARIES["httpx"]}.items()
    for is_transient, each in zip((True, False), names, strict=True)
    for name in each.split()
]


@pytest.mark.parametrize(("module", "name", "is_transient"), CLASSES)
def test_each_class_of_a_library_is_judged(module: str, name: str, is_transient: bool) -> None:
    kind = getattr(pytest.importorskip(module), name)
    error = kind.__new__(kind)
    error.response = error.status = None

    assert is_transient_http_error(error) is is_transient


class Answer:
    """As the answer of a library that does not exist."""

    def __init__(self, status_code: Any, headers: Any = None) -> None:
        self.status_code = status_code
        self.headers = headers


class Refused(Exception):
    """As the exception that it raises."""

    def __init__(self, response: Any) -> None:
        self.response = response


@pytest.mark.parametrize(
    ("error", "is_transient"),
    [
        pytest.param(Refused(Answer(503)), True, id="a library that keeps the answer"),
        pytest.param(Refused(Answer(404)), False, id="which was final"),
        pytest.param(Refused(None), False, id="no answer"),
        pytest.param(Refused(Answer("503")), False, id="a status that is none"),
        pytest.param(Refused(Answer([503])), False, id="a status that is many"),
        pytest.param(urllib.error.URLError(TimeoutError()), True, id="urllib, time-out"),
        pytest.param(urllib.error.URLError(socket.gaierror()), True, id="urllib, no such name for now"),
        pytest.param(urllib.error.URLError(ssl.SSLCertVerificationError()), False, id="urllib, certificate"),
        pytest.param(urllib.error.URLError("no host given"), False, id="urllib, URL"),
        pytest.param(http.client.IncompleteRead(b""), True, id="http.client, cut"),
        pytest.param(http.client.RemoteDisconnected(), True, id="http.client, dropped"),
        pytest.param(http.client.InvalidURL(), False, id="http.client, URL"),
        pytest.param(ConnectionResetError(), True, id="socket"),
        pytest.param(TimeoutError(), True, id="time-out"),
        pytest.param(OSError(), False, id="anything of the system"),
        pytest.param(ValueError(), False, id="a defect"),
    ],
)
def test_other_errors_around_a_request(error: Exception, is_transient: bool) -> None:
    assert is_transient_http_error(error) is is_transient


def test_a_class_of_an_application_that_is_called_as_a_librarys_is_another_one() -> None:
    mine = type("NetworkError", (Exception,), {"__module__": "mine.httpx"})

    assert not is_transient_http_error(mine())


def test_an_attribute_status_of_an_applications_error_is_no_http_status() -> None:
    error = ValueError()
    error.status = 503  # type: ignore[attr-defined]

    assert not is_transient_http_error(error)


# --- HTTP: how long to wait ------------------------------------------------------------------------------------

NOW = 1_700_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time stands still at ``NOW``."""
    monkeypatch.setattr(time, "time", lambda: NOW)


def answered(status: int = 429, **headers: str) -> Refused:
    message = Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return Refused(Answer(status, message))


@pytest.mark.parametrize("status", [429, 503])
def test_a_header_in_seconds_is_found_in_what_each_library_raises(
    get_checked: Callable[[str], None], service: str, status: int
) -> None:
    error = raised(get_checked, f"{service}/{status}?Retry-After=17")

    assert http_retry_after(error) == 17.0
    assert HTTP.decide(error, 0, rng=lambda: 0.5) == RetryLater(17.5)


def test_a_header_with_a_date_is_found_in_what_each_library_raises(
    get_checked: Callable[[str], None], service: str
) -> None:
    date = formatdate(time.time() + 90, usegmt=True).replace(" ", "%20")
    asked = http_retry_after(raised(get_checked, f"{service}/503?Retry-After={date}"))

    assert asked is not None
    assert 85 <= asked <= 90


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param({"Retry_After": "0"}, 0.0, id="at once"),
        pytest.param({"Retry_After": "120"}, 120.0, id="seconds"),
        pytest.param({"Retry_After": " 120 "}, 120.0, id="spaces"),
        pytest.param({"Retry_After": "1.5"}, 1.5, id="parts of a second"),
        pytest.param({"RETRY_AFTER": "120"}, 120.0, id="any letter case"),
        pytest.param({"Retry_After": "Tue, 14 Nov 2023 22:14:20 GMT"}, 60.0, id="date"),
        pytest.param({"Retry_After": "Tuesday, 14-Nov-23 22:14:20 GMT"}, 60.0, id="date of RFC 850"),
        pytest.param({"Retry_After": "Tue Nov 14 22:14:20 2023"}, 60.0, id="date of asctime"),
        pytest.param({"Retry_After": "Tue, 14 Nov 2023 23:14:20 +0100"}, 60.0, id="date elsewhere"),
        pytest.param({"Retry_After": "Tue, 14 Nov 2023 22:10:00 GMT"}, 0.0, id="date in the past"),
        pytest.param(
            {"Retry_After": "Tue, 14 Nov 2023 12:01:00 GMT", "Date": "Tue, 14 Nov 2023 12:00:00 GMT"},
            60.0,
            id="date by the clock of the service",
        ),
        pytest.param({"Retry_After": "Tue, 14 Nov 2023 22:14:20 GMT", "Date": "today"}, 60.0, id="a broken clock"),
        pytest.param({"Retry_After": "soon"}, None, id="text"),
        pytest.param({"Retry_After": ""}, None, id="empty"),
        pytest.param({"Retry_After": "-1"}, None, id="negative"),
        pytest.param({"Retry_After": "1e9"}, None, id="exponent"),
        pytest.param({"Retry_After": "nan"}, None, id="NaN"),
        pytest.param({"Retry_After": "9" * 400}, None, id="more than a float holds"),
        pytest.param({"Retry_After": "\u0661"}, None, id="another script's digit"),
        pytest.param({"retry_after_ms": "1500"}, 1.5, id="milliseconds"),
        pytest.param({"retry_after_ms": "1500", "Retry_After": "2"}, 1.5, id="milliseconds before seconds"),
        pytest.param({"retry_after_ms": "x", "Retry_After": "2"}, 2.0, id="broken milliseconds"),
        pytest.param({"RateLimit_Reset": "30"}, 30.0, id="reset, of the IETF's draft"),
        pytest.param({"X_RateLimit_Reset_After": "1.337"}, 1.337, id="reset after"),
        pytest.param({"X_RateLimit_Reset": "30"}, 30.0, id="reset in seconds"),
        pytest.param({"X_RateLimit_Reset": "1700000042"}, 42.0, id="reset since 1970"),
        pytest.param({"X_RateLimit_Reset": "1600000000"}, 0.0, id="reset long ago"),
        pytest.param({"X_RateLimit_Reset": "6m0s"}, None, id="reset in words"),
        pytest.param({"Retry_After": "5", "X_RateLimit_Reset": "30"}, 5.0, id="Retry-After before a reset"),
    ],
)
def test_how_long_an_answer_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    asked = http_retry_after(answered(**headers))

    assert asked == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.usefixtures("clock")
def test_a_date_without_a_zone_is_that_of_greenwich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert http_retry_after(answered(Retry_After="Tue Nov 14 22:14:20 2023")) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_limits_reset_says_nothing_about_another_status_than_429() -> None:
    assert http_retry_after(answered(500, RateLimit_Reset="30")) is None


@pytest.mark.parametrize("error", [ValueError(), Refused(None), Refused(Answer(429)), Refused(Answer(429, "text"))])
def test_an_exception_without_headers_asks_for_nothing(error: Exception) -> None:
    assert http_retry_after(error) is None


def test_what_a_service_asks_for_is_capped() -> None:
    assert HTTP.decide(answered(Retry_After="86400"), 0) == RetryLater(HTTP.cap)


@given(st.text() | st.from_regex(r"[0-9]{1,400}") | st.datetimes().map(lambda date: date.ctime()))
def test_no_header_whatsoever_makes_the_question_fail_or_the_answer_senseless(value: str) -> None:
    for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset", "date"):
        headers = {"retry-after": "Tue, 14 Nov 2023 22:14:20 GMT", name: value}
        asked = http_retry_after(Refused(Answer(429, headers)))

        assert asked is None or (asked >= 0 and math.isfinite(asked))


# --- together --------------------------------------------------------------------------------------------------


def test_no_library_is_imported_to_recognise_its_exceptions() -> None:
    code = (
        "import json, sys\n"
        "from rhesis_tasks.retry import DATABASE, HTTP\n"
        "(DATABASE | HTTP).decide(ValueError(), 0)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert not set(json.loads(done.stdout)) & {
        "httpx",
        "httpx2",
        "requests",
        "aiohttp",
        "urllib3",
        "psycopg",
        "asyncpg",
    }


def test_a_broken_attribute_of_an_exception_is_logged_and_the_exception_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Exception):
        @property
        def response(self) -> Any:
            raise RuntimeError("no response yet")

    with caplog.at_level(logging.WARNING):
        decision = HTTP.decide(Broken(), 0)

    assert decision == GiveUp("when() says no to Broken")
    assert [record.getMessage() for record in caplog.records] == ["when() failed for a Broken, and counts as False"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (f"{package}.exceptions" if package in ("requests", "urllib3") else package, names)
        for package, names in {**_NO_ANSWER, "psycopg": _LOST["psycopg"]}.items()
    ],
    ids=[*_NO_ANSWER, "psycopg"],
)
def test_the_names_that_are_looked_for_exist_in_the_libraries(module: str, names: frozenset[str]) -> None:
    classes = [getattr(pytest.importorskip(module), name) for name in names]

    assert {each.__module__.partition(".")[0] for each in classes} == {module.partition(".")[0]}
