"""A consumer of queues: claims ahead, hands out one message after the other, acknowledges in batches.

It outlives its connections: when one is lost, what it holds stays its own, and acknowledgements wait until the
server is back.  Usable without Celery and kombu.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final

from ..errors import DatabaseUnavailableError
from .listener import Listener
from .queue import Claimed, MessageQueue

__all__ = ["Consumer", "Delivery", "Subscription"]

_log = logging.getLogger(__name__)

BATCH: Final = 100
"""How many messages are claimed at once, at most."""

# After a consumer has asked to be notified, it looks once more at once, and twice a little later: for a message whose
# publisher looked for waiters just before, and committed just after.
_LOOKS: Final = (0.0, 0.02, 0.2)
# When nobody has come for messages for so long (a worker that shuts down does not), the listener acknowledges.
_UNATTENDED: Final = 0.5
_POOLED_POLL_INTERVAL: Final = 1.0
_LONGEST_PAUSE: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Subscription:
    """What is consumed, and for whom.

    Attributes:
        tag: names the subscription.
        queue: the queue's name.
        group: subscriptions that share a limit of unacknowledged messages; what ``free`` is called with.
        no_ack: messages are taken for good when they are claimed.
    """

    tag: str
    queue: str
    group: Hashable
    no_ack: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """A message, and the subscription that it is for."""

    subscription: Subscription
    message: Claimed


class Consumer:
    """Consumes for one process; made with :meth:`start`, ended with :meth:`close`.

    All methods but :meth:`ack` are for one thread; acknowledging is for any.

    Args:
        queue: where statements go.
        listening: the same queue over a connection that the consumer gets for itself.
        name: what the consumer table calls it.
        grace: seconds without a life sign after which what it holds is given to others.
        poll_interval: seconds between two looks at the server where nothing has called.
        free: how many more messages a group may hold; None is no limit.
        declare: called with a queue's name when the server may have forgotten it.
        on_call: called, in whichever thread, when :meth:`next` has something to do again.
    """

    def __init__(
        self,
        queue: MessageQueue,
        listening: MessageQueue,
        *,
        name: str,
        grace: float,
        poll_interval: float,
        free: Callable[[Hashable], int | None],
        declare: Callable[[str], None],
        on_call: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._grace = grace
        self._poll_interval = poll_interval
        self._free = free
        self._declare = declare
        self._on_call = on_call
        self._pid = os.getpid()
        self._subscriptions: dict[str, Subscription] = {}
        self._buffer: deque[Delivery] = deque()
        self._held: dict[int, int] = {}  # id -> claim token of what was handed out and not acknowledged
        self._acks: deque[tuple[int, int]] = deque()
        self._acks_in_doubt: set[int] = set()  # sent once before, on a connection that was lost
        self._waiting_for: set[str] = set()  # queues whose publishers will notify us
        self._looks = 0  # how often we looked since we asked for that
        self._next_look = 0.0
        self._call = threading.Event()  # there is something to do
        self._draining = False
        self._looked_at = 0.0
        self._generation = 0  # of the connection that the server's answers came on
        self._outage: tuple[float, float] | None = None  # (when it began, seconds until the next attempt)
        self._reaped = False
        self.number = queue.new_consumer()
        self._listener = Listener(
            listening,
            self.number,
            name,
            grace,
            on_message=self._on_message,
            on_return=self._on_return,
            on_turn=self._on_turn,
            queues=self._queues,
        )

    def start(self) -> None:
        """Attach to the server.

        Raises:
            DatabaseUnavailableError: it cannot be reached.
            MissingPrivilegeError: the login may not consume.
        """
        self._listener.start()
        self._generation = self._queue.connection.generation

    # --- what is consumed ------------------------------------------------------------------------------------

    def subscribe(self, subscription: Subscription) -> None:
        """Consume a queue from now on."""
        self._queue.subscribe(self.number, subscription.queue)
        self._subscriptions[subscription.tag] = subscription
        self.look_now()

    def cancel(self, tag: str) -> None:
        """Consume no more; what was claimed ahead is given back, what was handed out stays held."""
        subscription = self._subscriptions.pop(tag, None)
        if subscription is None or os.getpid() != self._pid:
            return
        returned = [delivery for delivery in self._buffer if delivery.subscription is subscription]
        self._buffer = deque(delivery for delivery in self._buffer if delivery.subscription is not subscription)
        self._give_back(delivery.message for delivery in returned)
        if subscription.queue not in self._queues():
            self._queue.unsubscribe(self.number, subscription.queue)
            self._waiting_for.discard(subscription.queue)

    def _queues(self) -> list[str]:
        return sorted({subscription.queue for subscription in list(self._subscriptions.values())})

    @property
    def is_idle(self) -> bool:
        """Whether nothing is consumed and nothing held."""
        return not self._subscriptions and not self._held and not self._acks

    # --- messages --------------------------------------------------------------------------------------------

    def next(self, timeout: float | None = None) -> Delivery | None:
        """The next message; None if there is none within ``timeout`` seconds (None waits for ever).

        While the server cannot be reached it waits, too, and tries again in between.

        Raises:
            MissingPrivilegeError, SchemaError: waiting would not help.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._draining = True
        try:
            while True:
                if self._buffer:
                    return self._hand_out(self._buffer.popleft())
                self._call.clear()
                now = time.monotonic()
                if self._acks or now >= self._next_look:
                    self._look()
                    if self._buffer:
                        continue
                    now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return None
                until = self._next_look if deadline is None else min(self._next_look, deadline)
                self._call.wait(max(0.0, until - now))
        finally:
            self._draining = False

    def get(self, queue: str, group: Hashable, no_ack: bool) -> Delivery | None:
        """One message of a queue, if there is one, without a subscription.

        Raises:
            DatabaseUnavailableError: the server cannot be reached.
        """
        messages, _ = self._queue.claim(
            self.number, [] if no_ack else [queue], 1, take_from=[queue] if no_ack else [], take_slots=1
        )
        if not messages:
            return None
        return self._hand_out(Delivery(Subscription("", queue, group, no_ack), messages[0]))

    def _hand_out(self, delivery: Delivery) -> Delivery:
        if delivery.message.token is not None:
            self._held[delivery.message.id] = delivery.message.token
        return delivery

    def ack(self, message: Claimed) -> None:
        """A message was done; it is deleted with the next statement, or within moments if none is due."""
        if message.token is not None and self._held.pop(message.id, None) is not None:
            self._acks.append((message.id, message.token))
            self._signal()
            if not self._draining and time.monotonic() - self._looked_at > _UNATTENDED:
                self._listener.poke()

    def release(self, messages: Iterable[Claimed], *, uncounted: bool = False) -> None:
        """Give messages back to the place they had, to be claimed by whoever comes first.

        Raises:
            DatabaseUnavailableError: the server cannot be reached; they are still held.
        """
        claims = [(message.id, message.token) for message in messages if message.token is not None]
        if claims:
            self._queue.release(claims, uncounted=uncounted)
            for id, _ in claims:
                self._held.pop(id, None)

    def set_aside(self, message: Claimed) -> None:
        """Keep a message that nobody can read, where nobody claims it."""
        if message.token is not None and self._held.pop(message.id, None) is not None:
            self._queue.set_aside(message.id, message.token)

    def close(self) -> None:
        """Acknowledge what was done, give back the rest, and be gone.

        If the server cannot be reached, it does so itself after the grace period.
        """
        if os.getpid() != self._pid:
            return  # a forked child: all of this is its parent's
        self._subscriptions.clear()
        self._buffer.clear()
        try:
            self.flush()
            self._queue.detach(self.number)
            self._held.clear()
        except DatabaseUnavailableError as error:
            _log.warning("consumer %d could not say goodbye: %s", self.number, error)
        finally:
            self._listener.stop()

    def flush(self) -> None:
        """Acknowledge now what was done.

        Raises:
            DatabaseUnavailableError: the server cannot be reached; it is tried again later.
        """
        if acks := self._taken_acks():
            try:
                late = self._queue.ack(acks)
            except BaseException:
                self._keep_for_later(acks)
                raise
            self._tell_late(late)

    # --- looking ---------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Acknowledge and claim, and decide when to look again; an outage is waited out by the caller."""
        try:
            self._claim()
        except DatabaseUnavailableError as error:
            now = time.monotonic()
            began, pause = self._outage or (now, 0.05)
            if self._outage is None:
                _log.warning("consumer %d cannot reach the server, trying again: %s", self.number, error)
            self._outage = began, min(pause * 2, _LONGEST_PAUSE)
            self._next_look = now + pause
        else:
            if self._outage is not None:
                _log.info("consumer %d reaches the server again", self.number)
                self._outage = None

    def _claim(self) -> None:
        self._looked_at = time.monotonic()
        self._resume()
        groups = self._groups()
        takes = sorted({each.queue for each in self._subscriptions.values() if each.no_ack})
        wanted = list(takes)
        asked, found = 0, 0
        first = True
        while groups or first:
            queues, slots = groups.pop() if groups else ([], 0)
            asked += slots
            if slots:
                wanted += queues
            acks = self._taken_acks() if first else []
            try:
                messages, late = self._queue.claim(
                    self.number, queues, slots, take_from=takes if first else [], take_slots=BATCH, acks=acks
                )
            except BaseException:
                self._keep_for_later(acks)
                raise
            self._tell_late([each.id for each in late])
            found += self._take_in(messages)
            first = False
        self._schedule(wanted, full=asked > 0 and found >= asked)

    def _groups(self) -> list[tuple[list[str], int]]:
        """The queues of each group that may hold more messages, and how many more."""
        queues: dict[Hashable, list[str]] = {}
        for subscription in self._subscriptions.values():
            if not subscription.no_ack:
                queues.setdefault(subscription.group, []).append(subscription.queue)
        ahead: dict[Hashable, int] = {}
        for delivery in self._buffer:
            group = delivery.subscription.group
            ahead[group] = ahead.get(group, 0) + (not delivery.subscription.no_ack)
        found = []
        for group, names in queues.items():
            free = self._free(group)
            slots = BATCH if free is None else min(BATCH, free - ahead.get(group, 0))
            if slots > 0:
                names.append(names.pop(0))  # each queue comes first in its turn
                found.append((names, slots))
                self._rotate(group)
        return found

    def _rotate(self, group: Hashable) -> None:
        """Let the next claim of a group begin with another queue."""
        tags = [tag for tag, each in self._subscriptions.items() if each.group == group and not each.no_ack]
        if len(tags) > 1:
            self._subscriptions[tags[0]] = self._subscriptions.pop(tags[0])

    def _take_in(self, messages: list[Claimed]) -> int:
        by_queue = {(each.queue, each.no_ack): each for each in self._subscriptions.values()}
        count = 0
        for message in messages:
            subscription = by_queue.get((message.queue, message.token is None))
            if subscription is not None:
                self._buffer.append(Delivery(subscription, message))
                count += not subscription.no_ack
        return count

    def _schedule(self, wanted: list[str], full: bool) -> None:
        """When to look again.

        Args:
            wanted: the queues that we would take messages from.
            full: we got all that we asked for, so that there may be more.
        """
        now = time.monotonic()
        if full or self._buffer:
            self._looks = 0
            self._next_look = now
            return
        if not self._listener.listening:
            self._next_look = now + min(self._poll_interval, _POOLED_POLL_INTERVAL)
            return
        if self._waiting_for != set(wanted):
            self._queue.wait_for(self.number, wanted)
            self._waiting_for = set(wanted)
            self._looks = 0
        self._next_look = now + (_LOOKS[self._looks] if self._looks < len(_LOOKS) else self._poll_interval)
        self._looks += 1

    def look_now(self) -> None:
        """Look at the server with the next call of :meth:`next`: there may be something, or more may be held."""
        self._next_look = 0.0
        self._signal()

    def _signal(self) -> None:
        self._call.set()
        self._on_call()

    @property
    def pause(self) -> float:
        """Seconds until :meth:`next` has something to do even if nothing calls."""
        return max(0.0, self._next_look - time.monotonic())

    # --- after an outage -------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """After the connection was lost or the consumer taken for dead, agree with the server on what we hold."""
        self._queue.connection.open()
        generation = self._queue.connection.generation
        if generation == self._generation and not self._reaped:
            return
        if self._reaped:
            # What was claimed ahead is others' now.
            self._buffer.clear()
            self._reaped = False
        for name in self._queues():
            self._declare(name)
            self._queue.subscribe(self.number, name)
        known = [*self._held, *(delivery.message.id for delivery in self._buffer), *(id for id, _ in self._acks)]
        self._queue.release_unknown(self.number, known)
        self._waiting_for = set()
        self._generation = self._queue.connection.generation

    def _taken_acks(self) -> list[tuple[int, int]]:
        taken = []
        while self._acks:
            try:
                taken.append(self._acks.popleft())
            except IndexError:  # another thread was faster
                break
        return taken

    def _keep_for_later(self, acks: list[tuple[int, int]]) -> None:
        self._acks_in_doubt.update(id for id, _ in acks)
        self._acks.extendleft(reversed(acks))

    def _tell_late(self, late: Iterable[int]) -> None:
        for id in late:
            if id in self._acks_in_doubt:
                continue  # it was acknowledged, and only the answer was lost
            _log.warning(
                "message %d was done, but had been given to others: consumer %d gave no life sign for %g seconds.  It "
                "is done twice",
                id,
                self.number,
                self._grace,
            )
        if not self._acks:
            self._acks_in_doubt.clear()

    def _give_back(self, messages: Iterable[Claimed]) -> None:
        try:
            self.release(messages, uncounted=True)
        except DatabaseUnavailableError as error:
            # They are not in our books any more, so that they are released when the server is back.
            _log.warning("consumer %d will give back messages later: %s", self.number, error)
            self._generation = -1

    # --- called by the listener's thread ---------------------------------------------------------------------

    def _on_message(self, queue: str) -> None:
        self._waiting_for.discard(queue)
        self.look_now()

    def _on_return(self, reaped: bool) -> None:
        self._waiting_for = set()
        self._reaped = self._reaped or reaped
        self.look_now()

    def _on_turn(self) -> None:
        if self._acks and not self._draining:
            time.sleep(0.01)  # for more to come, or for the consuming thread to take them
            if not self._draining:
                try:
                    self.flush()
                except DatabaseUnavailableError as error:
                    _log.warning("consumer %d will acknowledge later: %s", self.number, error)
