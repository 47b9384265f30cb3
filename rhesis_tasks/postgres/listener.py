"""The life sign of a consumer, and its ear: one connection and one thread for each consumer.

The connection holds the consumer's advisory lock, listens for notifications, and asks the server a few times in a
grace period to look after consumers that are gone.  It is lost and made anew without the consumer noticing, as
long as that takes less than the grace period.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..errors import DatabaseFullError, DatabaseUnavailableError
from ..settings import redacted
from .queue import MessageQueue

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

_PROMOTED_AT_ONCE: Final = 1000
_LONGEST_UNTIL_PROMOTED: Final = 0.5  # seconds, of a message that came to be due sooner than all that we know of
# Sweeping passes what was so before, while the server cannot remove it: it is done for one part of the time only.
_IDLE_AFTER_SWEEP: Final = 20
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0


class Listener:
    """Keeps a consumer alive, from :meth:`start` to :meth:`stop`.

    Args:
        queue: over a connection of the listener's own.
        consumer: the consumer's number.
        name: what the consumer table calls it.
        grace: seconds after which a consumer that gives no life sign is dead.
        on_message: called with a queue's name when a message for the consumer is there.
        on_return: called when notifications may have been missed, or the consumer may have been taken for dead.
        on_turn: called in the thread a few times in a grace period, and after :meth:`poke`.
        queues: the names of the queues that are consumed.
    """

    def __init__(
        self,
        queue: MessageQueue,
        consumer: int,
        name: str,
        grace: float,
        *,
        on_message: Callable[[str], None],
        on_return: Callable[[], None],
        on_turn: Callable[[], None],
        queues: Callable[[], list[str]],
    ) -> None:
        self._queue = queue
        self._consumer = consumer
        self._name = name
        self._grace = grace
        self._on_message = on_message
        self._on_return = on_return
        self._on_turn = on_turn
        self._queues = queues
        self._stopping = threading.Event()
        self._read_end, self._write_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._read_end.setblocking(False)
        self._warned = False
        self._again_at = 0.0
        self._turn_at = math.inf
        self._promote_at = math.inf  # if it is for us to let messages be claimed when they are due
        self._sweep_at = 0.0
        self.kept_at = 0.0  #: when the server last heard of us
        self._thread = threading.Thread(target=self._run, name=f"rhesis-tasks consumer {consumer}", daemon=True)
        self.listening = False  #: whether notifications reach us
        queue.connection.on_notification(self._hear)

    def start(self) -> None:
        """Attach the consumer, and keep it so.

        Raises:
            DatabaseUnavailableError: the server cannot be reached now.
            MissingPrivilegeError: the login may not consume.
        """
        try:
            self._attach()
        except BaseException:
            self.stop()
            raise
        self.kept_at = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end, and close the connection, which frees the lock."""
        self._stopping.set()
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        with suppress(Exception):
            self._queue.connection.close()
        self._read_end.close()
        self._write_end.close()

    def poke(self, delay: float = 0.0) -> None:
        """Let the thread call on_turn soon, or within so many seconds."""
        at = time.monotonic() + delay
        if at < self._turn_at:
            self._turn_at = at
            self._wake()

    def _hear(self, queue: str) -> None:
        if queue:
            self._on_message(queue)
        else:  # one that was older has gone
            self._again_at = 0.0

    def _wake(self) -> None:
        with suppress(OSError):  # full: it was woken already; closed: it has stopped
            self._write_end.send(b"!")

    def _attach(self) -> None:
        """Tell the server that the consumer is there; hold its lock and listen, where a session is our own."""
        connection = self._queue.connection
        connection.open()
        if connection.is_pooled:
            # A lock or LISTEN would stay on a server connection that others use.
            self._warn_of_pooler()
            self._say_hello(hold_lock=False)
            self.listening = False
        else:
            # Not had at once if the server has not noticed yet that the session before this one is gone: then that
            # one holds it, which is as good for now.
            self._queue.watch_for_loss()
            self._say_hello()
            self._queue.listen(self._consumer)
            self.listening = True
        self._again_at = 0.0

    def _say_hello(self, *, hold_lock: bool = True) -> None:
        self._queue.attach(self._consumer, self._name, self._queues(), hold_lock=hold_lock, grace=self._grace)

    def _warn_of_pooler(self) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s is reached through a connection pooler, through which neither LISTEN nor session locks work: "
                "polling instead.  Give workers a direct URL: broker_transport_options={'listen_url': ...}",
                redacted(self._queue.connection.url),
            )

    def _run(self) -> None:
        pid = os.getpid()
        pause = 0.0
        while not self._stopping.is_set() and os.getpid() == pid:
            try:
                if pause:
                    self._attach()
                    self._on_return()
                    _log.info("consumer %d is back", self._consumer)
                    pause = 0.0
                self._wait()
                self._keep()
            except Exception as error:
                if self._stopping.is_set():
                    return
                if not isinstance(error, DatabaseUnavailableError):
                    _log.exception("consumer %d: its listener failed, and starts anew", self._consumer)
                elif not pause:
                    _log.warning("consumer %d lost its connection, trying again: %s", self._consumer, error)
                self.listening = False
                self._queue.connection.close()
                pause = min(max(_FIRST_PAUSE, pause * 2), _LONGEST_PAUSE)
                self._sleep(pause)

    def _sleep(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._read_end, selectors.EVENT_READ)
            if selector.select(seconds):
                self._drain()

    def _wait(self) -> None:
        """Until a notification arrives, somebody pokes us, or it is time for the next life sign."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._read_end, selectors.EVENT_READ, self._drain)
            selector.register(self._queue.connection.fileno(), selectors.EVENT_READ, self._queue.connection.receive)
            while not self._stopping.is_set() and (remaining := self._again_at - time.monotonic()) > 0:
                pause = min(self._turn_at, self._promote_at) - time.monotonic()
                for key, _ in selector.select(min(remaining, max(0.0, pause))):
                    key.data()
                self._turn()
                self._promote()

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            while len(self._read_end.recv(64)) == 64:
                pass

    def _turn(self) -> None:
        if self._turn_at <= time.monotonic() and not self._stopping.is_set():
            self._turn_at = math.inf
            self._on_turn()

    def _promote(self) -> None:
        began = time.monotonic()
        if self._promote_at <= began and not self._stopping.is_set():
            try:
                next_due = self._queue.promote(_PROMOTED_AT_ONCE)
            except DatabaseFullError as error:  # the session is there, and with it the lock
                _log.warning("consumer %d can promote no message that is due: %s", self._consumer, error)
                self._promote_at = time.monotonic() + _LONGEST_PAUSE
                return
            now = time.monotonic()
            pause = _LONGEST_UNTIL_PROMOTED if next_due is None else min(next_due, _LONGEST_UNTIL_PROMOTED)
            # Looking may take long while the server cannot remove what is gone: not all of the time, then.
            self._promote_at = now + (pause if next_due == 0 else max(pause, 10 * (now - began) - 0.1))

    def _keep(self) -> None:
        if self._stopping.is_set():
            return
        self._on_turn()
        self._again_at = math.inf  # unless we are called meanwhile
        began = time.monotonic()
        sweeps = self._promote_at < math.inf and began >= self._sweep_at
        kept = self._queue.tend(self._consumer, self._grace, sweeps=sweeps)
        if sweeps:
            self._sweep_at = time.monotonic() + _IDLE_AFTER_SWEEP * (time.monotonic() - began)
        if not kept.promotes:
            self._promote_at = math.inf
        elif self._promote_at == math.inf:
            self._promote_at = 0.0
        self.kept_at = time.monotonic()
        self._again_at = min(self._again_at, time.monotonic() + kept.again_in)
        if self._queue.connection.is_pooled:
            self._again_at = min(self._again_at, time.monotonic() + self._grace / 3)
        if not kept.known:
            _log.warning(
                "consumer %d gave no life sign for %g seconds and was taken for dead; what it held was given to others",
                self._consumer,
                self._grace,
            )
            self._attach()
            self._on_return()
        elif not kept.locked and not self._queue.connection.is_pooled:
            self._say_hello()
