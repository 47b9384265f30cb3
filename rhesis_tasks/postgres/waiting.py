"""Waiting for the end of a task: one connection for all who wait in a process, and one thread while anybody does."""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ..errors import DatabaseUnavailableError
from ..settings import database_url, quote_identifier
from .connection import Connection

__all__ = ["ResultListener", "listener_for"]

IDLE: Final = 10.0
"""Seconds for which the connection is kept when nobody waits."""

_PATIENCE: Final = 5.0  #: seconds, after which it is deaf

_log = logging.getLogger(__name__)


class ResultListener:
    """Hears of tasks that have ended, by their keys.

    Behind a connection pooler, through which nothing is heard, and while the server cannot be reached, it is deaf:
    those who wait ask again after a while, as they would without it.

    Args:
        url: the database.
        channel: where it is said.
    """

    def __init__(self, url: str, channel: str) -> None:
        self._channel = channel
        self._connection = Connection(database_url(url), name="rhesis-tasks results", connect_timeout=_PATIENCE)
        self._connection.on_notification(self._heard)
        self._lock = threading.RLock()  # what arrives while it asks to be told is heard in the same thread
        self._waiting: dict[str, set[threading.Event]] = {}
        self._thread: threading.Thread | None = None
        self._is_pooled = False
        self._used_at = 0.0

    @contextmanager
    def waiting(self, key: str) -> Iterator[threading.Event]:
        """An event that is set when the task of this key has ended, or might have."""
        event = threading.Event()
        with self._lock:
            self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                events = self._waiting[key]
                events.discard(event)
                if not events:
                    del self._waiting[key]
                self._used_at = time.monotonic()

    def listen(self) -> bool:
        """Make sure that it hears; False if it cannot."""
        with self._lock:
            if self._thread is not None or self._is_pooled:
                return not self._is_pooled
            try:
                self._connection.open(_PATIENCE)
                if self._connection.is_pooled:
                    self._is_pooled = True
                    self._connection.close()
                    return False
                self._connection.query(f"LISTEN {quote_identifier(self._channel)}", timeout=_PATIENCE)
            except DatabaseUnavailableError as error:
                _log.debug("results are polled for: %s", error)
                return False
            self._used_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="rhesis-tasks results", daemon=True)
            self._thread.start()
            return True

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection.fileno(), selectors.EVENT_READ)
                while not self._is_idle():
                    if selector.select(1.0):
                        self._connection.receive()
        except Exception as error:
            _log.debug("results are not heard of any more: %s", error)
        with self._lock:
            self._thread = None
            with suppress(Exception):
                self._connection.close()
            for events in self._waiting.values():
                for event in events:
                    event.set()

    def _is_idle(self) -> bool:
        with self._lock:
            return not self._waiting and time.monotonic() - self._used_at > IDLE

    def _heard(self, key: str) -> None:
        with self._lock:
            for event in self._waiting.get(key, ()):
                event.set()


_listeners: dict[tuple[str, str], ResultListener] = {}


def listener_for(url: str, channel: str) -> ResultListener:
    """The process's listener on a database's channel."""
    found = _listeners.get((url, channel))
    if found is None:
        found = _listeners.setdefault((url, channel), ResultListener(url, channel))
    return found


os.register_at_fork(after_in_child=_listeners.clear)  # its thread is the parent's
