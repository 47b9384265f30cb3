"""Whether a worker is alive and ready, and the HTTP port on which it says so.

``/livez``: the consumer's loop turns, or waits for the database.  ``/readyz``: broker, result backend, the version of
the schema, and the consumer.  ``/metrics``: :mod:`.metrics`.  What asks the database does so in a thread of its own,
for which nobody waits longer than the time-out; a connection that has not answered by then is cut, so that the next
question goes by another one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from typing_extensions import override

from .errors import ConfigurationError

__all__ = ["HealthServer", "Loop", "Probe", "Slow"]

_log = logging.getLogger(__name__)

Answer = tuple[int, str, str]
"""A status, a content type and a body."""


class Slow(Exception):
    """Nobody answered within the time-out."""


class Probe:
    """Asks questions that may hang, for askers who do not.

    Args:
        ask: what is asked; runs in a thread of its own.
        cut: makes a question that hangs fail.
    """

    def __init__(self, ask: Callable[[], Any], cut: Callable[[], None]) -> None:
        self._ask = ask
        self._cut = cut
        self._lock = threading.Lock()
        self._asking: _Question | None = None

    def answer(self, timeout: float) -> Any:
        """What came of the question; those who ask at the same time get the same answer.

        Raises:
            Slow: nothing within ``timeout`` seconds.
            Exception: what the question has raised.
        """
        with self._lock:
            if self._asking is None or self._asking.ended.is_set():
                self._asking = _Question(self._ask)
            asking = self._asking
        if not asking.ended.wait(timeout):
            self._cut()
            raise Slow(f"no answer within {timeout:g} seconds")
        if asking.error is not None:
            raise asking.error
        return asking.value


class _Question:
    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ended = threading.Event()
        self.value: Any = None
        self.error: Exception | None = None
        self._ask = ask
        threading.Thread(target=self._run, name="rhesis-tasks probe", daemon=True).start()

    def _run(self) -> None:
        try:
            self.value = self._ask()
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


class Loop:
    """Whether the consumer's loop turns.

    Args:
        patience: seconds for which it may stand still.
        waits: whether it stands still for a reason, as while it waits for the database.
    """

    def __init__(self, patience: float, waits: Callable[[], bool]) -> None:
        self._patience = patience
        self._waits = waits
        self._turned_at = time.monotonic()

    def turn(self) -> None:
        """It turns."""
        self._turned_at = time.monotonic()

    @property
    def stands_for(self) -> float:
        """Seconds since it last turned, or had a reason not to."""
        if self._waits():
            self.turn()
        return time.monotonic() - self._turned_at

    @property
    def is_wedged(self) -> bool:
        return self.stands_for > self._patience


class HealthServer:
    """Answers on a port, from :meth:`start` on.

    Args:
        address: where it listens.
        port: on which port.
        routes: what answers to a path.

    Raises:
        ConfigurationError: it cannot listen there.
    """

    def __init__(self, address: str, port: int, routes: Mapping[str, Callable[[], Answer]]) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = type("_Server", (_Server,), {"address_family": family})
        handler = type("_Handler", (_Handler,), {"routes": routes})
        try:
            self._server = server((address, port), handler)
        except OSError as error:
            raise ConfigurationError(
                f"the worker's health cannot be served on {address} port {port}: {error.strerror}.  HEALTH_ADDRESS and "
                "HEALTH_PORT say where"
            ) from None
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self._server.serve_forever, name="rhesis-tasks health", daemon=True).start()
        host, port = self._server.server_address[:2]
        _log.info("health is served on %s port %s", host, port)

    def _leave_to_parent(self) -> None:
        """A pool's process that outlives the worker must not keep the port, where nobody answers any more."""
        with suppress(OSError):
            self._server.socket.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    @override
    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service, too

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a client of the health port went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    routes: Mapping[str, Callable[[], Answer]] = {}
    protocol_version = "HTTP/1.1"
    server_version = "rhesis-tasks"
    sys_version = ""
    timeout = 10  # seconds for a request to arrive

    def do_GET(self) -> None:
        answer = self.routes.get(self.path.partition("?")[0])
        if answer is None:
            self._send((404, "text/plain", f"there is {', '.join(self.routes)}\n"))
            return
        try:
            self._send(answer())
        except OSError:
            raise
        except Exception as error:
            _log.exception("%s cannot be answered", self.path)
            self._send((500, "text/plain", f"{type(error).__name__}\n"))

    do_HEAD = do_GET

    def _send(self, answer: Answer) -> None:
        status, kind, text = answer
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind if "charset" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    @override
    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


OK: Final = "ok"


def report(checks: Mapping[str, str]) -> Answer:
    """The answer to ``/readyz``: ready if each check is."""
    is_ready = all(text.partition(":")[0] == OK for text in checks.values())
    body = {"status": "ready" if is_ready else "not ready", "checks": dict(checks)}
    return (200 if is_ready else 503), "application/json", json.dumps(body) + "\n"
