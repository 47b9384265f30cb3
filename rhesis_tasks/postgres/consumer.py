"""A consumer of queues: claims ahead, hands out one message after the other, acknowledges in batches.

It outlives its connections: when one is lost, what it holds stays its own, and acknowledgements wait until the
server is back.  Usable without Celery and kombu.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ..errors import DatabaseFullError, DatabaseUnavailableError
from .listener import Listener
from .places import Places
from .queue import Claimed, Late, MessageQueue

__all__ = ["Consumer", "Delivery", "Subscription"]

_log = logging.getLogger(__name__)

BATCH: Final = 100
"""How many messages are claimed at once, at most."""

# After a consumer has asked to be notified it looks once at once, and twice more a little later: for a message whose
# publisher looked for waiters just before, and committed just after.  (Messages that are taken for good, such as
# events, are committed without a flush, so that once is enough.)
_LATER_LOOKS: Final = (0.02, 0.2)
# What was found is started first, before the worker asks to be notified of more: seconds, unless it is done sooner.
_HANDING_OVER: Final = 0.002
# If nobody comes for messages (the worker is busy itself, or shuts down), the listener acknowledges after so long.
_UNATTENDED: Final = 0.5
_POOLED_POLL_INTERVAL: Final = 1.0
# If no more may be held, the next acknowledgement makes us look; until then only for what is taken for good.
_PAUSE_WHEN_FULL: Final = 0.05
# A message that was delivered twice in vain waits so long, in seconds, for a consumer that holds nothing by itself.
_PATIENCE: Final = 30.0
_IDLE_AFTER_AGREEING: Final = 20
# A publisher that took note of us, and was rolled back after a long time, may have made us be forgotten.
_ASK_AGAIN: Final = 60.0
_ALONE_FROM: Final = 3  # the delivery from which on nothing else is claimed with a message
# While more is in hand than was done since the last look, acknowledgements wait for so long, for more of them to go by
# the same statement and commit; there is work to do meanwhile.
_GATHERING: Final = 0.01
_FIRST_PAUSE: Final = 0.05
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
        max_deliveries: a message that was delivered so often is not delivered any more, but buried; None is no limit.
        free: how many more messages a group may hold; None is no limit.
        declare: called with a queue's name when the server may have forgotten it.
        on_dead: called with a message before it is buried, and with the reason.
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
        max_deliveries: int | None,
        free: Callable[[Hashable], int | None],
        declare: Callable[[str], None],
        on_dead: Callable[[Delivery, str], None],
        on_call: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._grace = grace
        self._poll_interval = poll_interval
        self._max_deliveries = max_deliveries
        self._free = free
        self._declare = declare
        self._on_dead = on_dead
        self._places = Places()
        self._on_call = on_call
        self._pid = os.getpid()
        self._subscriptions: dict[str, Subscription] = {}
        self._buffer: deque[Delivery] = deque()
        self._held: dict[int, int] = {}  # what was handed out and not acknowledged: its id, and the token of its claim
        self._held_lock = threading.RLock()  # between acknowledging and having it claimed once more; reentrant as below
        self._alone: int | None = None  # the id of a message with which nothing else is claimed, while it is held
        self._done: set[int] = set()  # the ids of what was done too late, and is there to be done again
        self._acks: deque[tuple[int, int]] = deque()
        self._acked_at = 0.0  # when the first of them came, or earlier
        self._acks_in_doubt: set[int] = set()  # sent once before, on a connection that was lost
        self._waiting_for: set[str] = set()  # queues whose publishers will notify us
        self._notified: set[str] = set()  # queues whose publishers have
        self._asks_first = False  # with the next look we ask to be notified before we claim
        self._looks: deque[float] = deque()  # seconds until each of the next looks, before the slow ones
        self._next_look = 0.0
        self._called = False  # somebody wants us to look before that
        self._call = threading.Event()  # there is something to do
        # Held while acknowledgements are under way.  Reentrant: Celery may shut down inside of a signal handler.
        self._talking = threading.RLock()
        self._draining = False
        self._generation = 0  # of the connection that the server's answers came on
        self._outage: float | None = None  # the server cannot be reached: seconds until the attempt after the next
        self._reaped = False
        self._agree_at = time.monotonic() + grace
        self._asked_at = 0.0  # when we asked last to be notified
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
        if subscription is None or self.is_foreign:
            return
        returned = [delivery for delivery in self._buffer if delivery.subscription is subscription]
        self._buffer = deque(delivery for delivery in self._buffer if delivery.subscription is not subscription)
        self.release([delivery.message for delivery in returned], uncounted=True)
        if subscription.queue not in self._queues():
            self._waiting_for.discard(subscription.queue)
            try:
                self._queue.unsubscribe(self.number, subscription.queue)
            except DatabaseUnavailableError as error:
                _log.warning("consumer %d is still subscribed to %r: %s", self.number, subscription.queue, error)

    def _queues(self) -> list[str]:
        return sorted({subscription.queue for subscription in list(self._subscriptions.values())})

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child, and the consumer its parent's."""
        return os.getpid() != self._pid

    @property
    def silent_for(self) -> float:
        """Seconds since the server has last heard of it."""
        return time.monotonic() - self._listener.kept_at

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
                if self._buffer and not self._in_doubt:
                    delivery = self._buffer.popleft()
                    if self._is_dead(delivery.message):
                        self._give_up_in_vain(delivery)
                        continue
                    return self._hand_out(delivery)
                self._call.clear()
                if self.pause <= 0:
                    self._look()
                    if self._buffer and not self._in_doubt:
                        continue
                remaining = math.inf if deadline is None else deadline - time.monotonic()
                if remaining <= 0:
                    return None
                self._call.wait(min(self.pause, remaining))
        finally:
            self._draining = False

    @property
    def _in_doubt(self) -> bool:
        """Whether what was claimed ahead may be others' by now."""
        if time.monotonic() - self._listener.kept_at > self._grace:
            self._reaped = True  # until we have agreed
        return self._reaped

    def get(self, queue: str, group: Hashable, no_ack: bool) -> Delivery | None:
        """One message of a queue, if there is one, without a subscription.

        Raises:
            DatabaseUnavailableError: the server cannot be reached.
        """
        subscription = Subscription("", queue, group, no_ack)
        while True:
            with self._talking:
                self._resume()
                messages = self._exchange(
                    [] if no_ack else [queue], 1, take_from=[queue] if no_ack else [], take_slots=1
                )
            if not messages:
                return None
            delivery = Delivery(subscription, messages[0])
            if not self._is_dead(delivery.message):
                return self._hand_out(delivery)
            self._give_up_in_vain(delivery)

    def _is_dead(self, message: Claimed) -> bool:
        return (
            message.token is not None and self._max_deliveries is not None and message.deliveries > self._max_deliveries
        )

    def _give_up_in_vain(self, delivery: Delivery) -> None:
        """Give up a message that was delivered too often."""
        message = delivery.message
        times = message.deliveries - 1
        reason = f"it was delivered {times} {'time' if times == 1 else 'times'} in vain"
        if message.last_reason:
            reason = f"{reason}; last, {message.last_reason}"
        self.give_up(delivery, reason)
        self.look_now()

    def give_up(self, delivery: Delivery, reason: str) -> None:
        """Bury a message, after those who want to know were told."""
        message = delivery.message
        try:
            self._on_dead(delivery, reason)
        except Exception:
            _log.exception(
                "message %d of queue %r is given up, but not everybody could be told", message.id, message.queue
            )
        self.bury(message, reason)

    def _hand_out(self, delivery: Delivery) -> Delivery:
        message = delivery.message
        if message.token is not None:
            self._held[message.id] = message.token
            if message.deliveries >= _ALONE_FROM:
                self._alone = message.id
        return delivery

    def ack(self, message: Claimed) -> None:
        """A message was done; it is deleted with the next statement, or within moments if none is due."""
        with self._held_lock:
            token = self._held.pop(message.id, None)
            if token is None:
                return
            if not self._acks:
                self._acked_at = time.monotonic()
            self._acks.append((message.id, token))
        self._signal()
        if not self._draining:
            self._listener.poke(_UNATTENDED)

    def release(self, messages: Sequence[Claimed], *, uncounted: bool = False, reason: str | None = None) -> None:
        """Give messages back to the place they had, to be claimed by whoever comes first.

        If the server cannot be reached, they are given back when it is.

        Args:
            messages: which.
            uncounted: as if they had not been delivered.
            reason: why their delivery was in vain.
        """
        claims = [(each.id, self._let_go(each, each.token)) for each in messages if each.token is not None]
        if claims:
            with self._or_when_it_is_back():
                self._queue.release(claims, uncounted=uncounted, reason=reason)

    def bury(self, message: Claimed, reason: str) -> None:
        """Make a message a dead letter, for an operator to look at."""
        if message.token is not None:
            token = self._let_go(message, message.token)
            _log.error("message %d of queue %r is a dead letter now: %s", message.id, message.queue, reason)
            with self._or_when_it_is_back():
                self._queue.bury(message.id, token, reason)

    def _let_go(self, message: Claimed, token: int) -> int:
        """Hold a message no more; returns the token of the claim that it has, which may be a later one."""
        with self._held_lock:
            return self._held.pop(message.id, token)

    @contextmanager
    def _or_when_it_is_back(self) -> Iterator[None]:
        """For what is not in our books any more, so that it is released when the server is back."""
        try:
            yield
        except DatabaseUnavailableError as error:
            _log.warning("consumer %d will give messages back later: %s", self.number, error)
            self._generation = -1

    def close(self) -> None:
        """Acknowledge what was done, give back the rest, and be gone.

        If the server cannot be reached, it does so itself after the grace period.
        """
        if self.is_foreign:
            return  # a forked child: all of this is its parent's
        self._subscriptions.clear()
        self._buffer.clear()
        self._listener.stop()  # first, or it would find us gone and attach us again
        for last in (False, True):  # the connection may be lost, and the server there
            try:
                self.flush()
                self._queue.detach(self.number)
                break
            except DatabaseUnavailableError as error:
                if last:
                    _log.warning("consumer %d could not say goodbye: %s", self.number, error)
        self._held.clear()

    def flush(self) -> None:
        """Acknowledge now what was done.

        Raises:
            DatabaseUnavailableError: the server cannot be reached; it is tried again later.
        """
        with self._talking:
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
        self._called = False  # before, so that a call during the look makes us look again
        try:
            self._claim()
        except DatabaseUnavailableError as error:
            if self._outage is None:
                what = "finds no room in" if isinstance(error, DatabaseFullError) else "cannot reach"
                _log.warning("consumer %d %s the server, trying again: %s", self.number, what, error)
            pause = self._outage or _FIRST_PAUSE
            self._outage = min(pause * 2, _LONGEST_PAUSE)
            self._next_look = time.monotonic() + pause
        else:
            if self._outage is not None:
                _log.info("consumer %d reaches the server again", self.number)
                self._outage = None

    def _claim(self) -> None:
        with self._talking:
            self._resume()
            takes = [each for each in self._subscriptions.values() if each.no_ack]
            groups = self._groups()
            taken_from = {each.queue for each in takes}
            claimed_from = {each.queue for group, _ in groups for each in group}
            if self._asks_first and self._listener.listening:
                self._ask(taken_from, claimed_from)
            full = False
            for number, (group, slots) in enumerate(groups or [([], 0)]):
                found = self._claim_for(group, slots, takes if number == 0 else [])
                full = full or 0 < slots <= found
        self._schedule(taken_from, claimed_from, full)
        asked = {each.group for group, _ in groups for each in group}
        if any(slots > 0 and group not in asked for group, slots in self._room().items()):
            # What was acknowledged with this claim has made room that was not there when it began, and nothing else
            # would have us look.
            self.look_now()

    def _claim_for(self, group: list[Subscription], slots: int, takes: list[Subscription]) -> int:
        """Acknowledge and claim for subscriptions that share a limit; returns how many were claimed."""
        messages = self._exchange(
            [each.queue for each in group], slots, take_from=[each.queue for each in takes], take_slots=BATCH
        )
        by_queue = {(each.queue, each.no_ack): each for each in (*group, *takes)}
        self._buffer.extend(Delivery(by_queue[each.queue, each.token is None], each) for each in messages)
        return sum(each.token is not None for each in messages)

    def _exchange(self, claim_from: list[str], slots: int, *, take_from: list[str], take_slots: int) -> list[Claimed]:
        """Acknowledge what was done for what waits."""
        acks = self._taken_acks()
        places, began = self._places.starts((*claim_from, *take_from)), time.monotonic()
        try:
            messages, late = self._queue.claim(
                self.number,
                claim_from,
                slots,
                take_from=take_from,
                take_slots=take_slots,
                acks=acks,
                has_none=not self._held and all(each.message.token is None for each in self._buffer),
                max_deliveries=self._max_deliveries,
                patience=_PATIENCE,
                places=places,
            )
        except BaseException:
            self._keep_for_later(acks)
            raise
        self._places.claimed(places, messages, began)
        self._tell_late(late)
        return [each for each in messages if not self._has_already(each)]

    def _has_already(self, message: Claimed) -> bool:
        """Whether a message that was claimed is still with us, or was done, since we were taken for dead meanwhile.

        Nobody else has it then: it is not handed out again, and acknowledged under the new claim.
        """
        if message.token is None or message.deliveries < 2:
            return False  # what has a number that we know from before a backup was restored was not delivered yet
        with self._held_lock:
            if message.id in self._held:
                self._held[message.id] = message.token
            elif message.id in self._done:
                self._done.remove(message.id)
                self._acks.append((message.id, message.token))
            else:
                return False
        _log.info("consumer %d has message %d again, of which it had lost the claim", self.number, message.id)
        return True

    def _groups(self) -> list[tuple[list[Subscription], int]]:
        """The subscriptions that share a limit and may hold more messages, and how many more."""
        found = []
        for group, slots in self._room().items():
            subscriptions = [each for each in self._subscriptions.values() if not each.no_ack and each.group == group]
            if slots > 0:
                found.append((subscriptions, slots))
                if len(subscriptions) > 1:  # the next time another queue comes first
                    first = subscriptions[0].tag
                    self._subscriptions[first] = self._subscriptions.pop(first)
        return found

    def _room(self) -> dict[Hashable, int]:
        """How many more messages those who share a limit may hold."""
        if self._is_alone:
            return {}
        ahead = Counter(each.subscription.group for each in self._buffer if not each.subscription.no_ack)
        room = {}
        for group in {each.group: None for each in self._subscriptions.values() if not each.no_ack}:
            free = self._free(group)
            room[group] = BATCH if free is None else min(BATCH, free - ahead[group])
        return room

    @property
    def _is_alone(self) -> bool:
        """Whether we have a message with which nothing else may be claimed."""
        if self._alone is not None and self._alone in self._held:
            return True
        return any(each.message.token is not None and each.message.deliveries >= _ALONE_FROM for each in self._buffer)

    def _schedule(self, taken_from: set[str], claimed_from: set[str], full: bool) -> None:
        """Decide when to look again, and ask to be notified.

        Args:
            taken_from, claimed_from: the queues that we would take or claim messages from.
            full: we got all that we asked for, so that there may be more.
        """
        if full:
            self._looks.clear()
            pause = 0.0 if any(slots > 0 for slots in self._room().values()) else _PAUSE_WHEN_FULL
        elif not self._listener.listening:
            pause = 0.0 if self._buffer else min(self._poll_interval, _POOLED_POLL_INTERVAL)
        elif self._buffer:
            self._asks_first = True
            pause = _HANDING_OVER
        elif self._ask(taken_from, claimed_from):
            pause = 0.0
        else:
            pause = self._looks.popleft() if self._looks else self._poll_interval
        self._next_look = time.monotonic() + pause
        if self._places.again_at > time.monotonic():  # we have not seen all that is there
            self._next_look = min(self._next_look, self._places.again_at)

    def _ask(self, taken_from: set[str], claimed_from: set[str]) -> bool:
        """Ask to be notified of messages in these queues; returns False if nothing was to be said.

        The next look is to follow at once, others have their times then.
        """
        self._asks_first = False
        wanted = taken_from | claimed_from
        notified = self._notified.copy()
        self._notified -= notified
        asks_again = time.monotonic() - self._asked_at > _ASK_AGAIN
        if self._waiting_for == wanted and not notified - wanted and not asks_again:
            return False
        self._looks = deque(_LATER_LOOKS if claimed_from - self._waiting_for else ())
        # In our books first, for the listener to take out what we are notified of right after.
        self._waiting_for = set(wanted)
        self._asked_at = time.monotonic()
        try:
            self._queue.wait_for(self.number, sorted(wanted), pass_on=sorted(notified - wanted))
        except BaseException:
            self._waiting_for = set()
            raise
        return True

    def look_now(self) -> None:
        """Look at the server with the next call of :meth:`next`: there may be something, or more may be held."""
        self._called = True
        self._signal()

    def _signal(self) -> None:
        self._call.set()
        self._on_call()

    @property
    def pause(self) -> float:
        """Seconds until :meth:`next` has something to do even if nothing calls."""
        look_at = self._next_look
        if self._outage is None:
            if self._called or (self._acks and len(self._acks) >= len(self._held) + len(self._buffer)):
                return 0.0
            if self._acks:
                look_at = min(look_at, self._acked_at + _GATHERING)
        return max(0.0, look_at - time.monotonic())

    # --- after an outage -------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """After the connection was lost or the consumer taken for dead, agree with the server on what we hold."""
        self._queue.connection.open()
        generation = self._queue.connection.generation
        is_back = generation != self._generation or self._reaped
        began = time.monotonic()
        if not is_back and began < self._agree_at:
            return  # else also now and then: a claim may be carried out long after its connection was lost
        self._reaped = False  # before, so that another loss meanwhile is not overlooked
        try:
            if is_back:
                for name in self._queues():
                    self._declare(name)
                    self._queue.subscribe(self.number, name)
                self._waiting_for = set()
            ahead = [each.message.token for each in self._buffer if each.message.token is not None]
            with self._held_lock:  # what is acknowledged at this moment is in one of both
                ours = [*self._held.values(), *(token for _, token in list(self._acks))]
            still = self._queue.agree(self.number, [*ours, *ahead])
        except BaseException:
            self._reaped = self._reaped or is_back  # nothing is agreed
            raise
        self._buffer = deque(each for each in self._buffer if each.message.token is None or each.message.token in still)
        # It passes all that we have claimed since a long transaction began: not all of the time, then.
        self._agree_at = time.monotonic() + max(self._grace, _IDLE_AFTER_AGREEING * (time.monotonic() - began))
        self._generation = generation

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

    def _tell_late(self, late: Iterable[Late]) -> None:
        for id, _, is_there in late:
            if is_there:
                self._done.add(id)  # if nobody has begun with it, we get it again
            elif id in self._acks_in_doubt:
                continue  # it was acknowledged, and only the answer was lost
            _log.warning(
                "message %d was done, but had been given to others: consumer %d gave no life sign for %g seconds.  It "
                "may be done twice",
                id,
                self.number,
                self._grace,
            )
        if not self._acks:
            self._acks_in_doubt.clear()

    # --- called by the listener's thread ---------------------------------------------------------------------

    def _on_message(self, queue: str) -> None:
        self._waiting_for.discard(queue)
        self._notified.add(queue)
        self.look_now()

    def _on_return(self) -> None:
        self._waiting_for = set()
        self._reaped = True  # or may have been: what was claimed ahead is in doubt until the server has been asked
        self._next_look = 0.0  # also in an outage, which is over
        self.look_now()

    def _on_turn(self) -> None:
        if self._acks and not self._draining:
            time.sleep(0.01)  # for more to come, or for the consuming thread to take them
            if not self._draining:
                try:
                    self.flush()
                except DatabaseUnavailableError as error:
                    _log.warning("consumer %d will acknowledge later: %s", self.number, error)
                else:
                    self.look_now()  # there is room for more
