"""kombu's channel on PostgreSQL: what it declares, publishes, consumes and acknowledges goes to the queue.

Only adapts: :mod:`.queue` has the statements, :mod:`.consumer` the consuming.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any, Final

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError, ContentDisallowed, DecodeError, OperationalError
from kombu.log import get_logger
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.json import dumps, loads
from kombu.utils.uuid import uuid

from ..errors import AnswerTimeoutError, DatabaseUnavailableError
from ..headers import find
from .consumer import Delivery, Subscription
from .launching import launch_of
from .operations import login_name
from .queue import Claimed, MessageQueue

__all__ = ["Channel", "in_other_form", "not_found"]

_log = get_logger(__name__)

UNREADABLE: Final = "it could not be read"
# Times far off are none that PostgreSQL could add to its own.
_LONGEST_DELAY: Final = 1000 * 365.25 * 86_400.0

UNHEARD_FOR: Final = 1.0
"""Seconds for which an event that reached no queue speaks for all of its kind: they are not published."""

_EVENT_HEADERS: Final = frozenset({"hostname"})  # what Celery's events have, and nothing else does that it publishes


class Message(virtual.Message):
    """A message that is given up, not acknowledged, if its body cannot be read."""

    def __init__(self, payload: dict[str, Any], channel: Channel, claimed: Claimed) -> None:
        super().__init__(payload, channel=channel)
        self.claimed = claimed
        #: why it could not be read
        self.unreadable = f"{UNREADABLE}: it cannot be decompressed" if self.errors else None

    def _decode(self) -> Any:
        try:
            return super()._decode()
        except Exception as error:
            self.unreadable = self._why(error)
            raise

    def _why(self, error: BaseException) -> str:
        """For operators and the task's record: not the error's text, which may quote what the message says."""
        if isinstance(error, ContentDisallowed):
            return f"{UNREADABLE}: its content type {self.content_type!r:.100} is not accepted"
        cause = error.__context__ if isinstance(error, DecodeError) else None  # kombu wraps what serializers raise
        return f"{UNREADABLE}: {type(cause or error).__name__}"


class QoS(virtual.QoS):
    """The unacknowledged messages of a channel; they stay claimed in the database, so nothing is ever restored."""

    restore_at_shutdown = False

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        self.channel = channel
        self.prefetch_count = prefetch_count or 0
        self._delivered: dict[Any, Message] = {}  # in the order of delivery
        self._dirty: set[Any] = set()

    @property
    def free(self) -> int | None:
        """How many more messages may be delivered; None is no limit."""
        return self.prefetch_count - len(self._delivered) if self.prefetch_count else None

    def append(self, message: Message, delivery_tag: Any) -> None:
        self._delivered[delivery_tag] = message

    def ack(self, delivery_tag: Any) -> None:
        message = self._delivered.pop(delivery_tag, None)
        if message is not None:
            self._done(message)

    def ack_up_to(self, delivery_tag: Any) -> None:
        """Acknowledge a message and all that were delivered before it."""
        if delivery_tag in self._delivered:
            for tag in list(self._delivered):
                self.ack(tag)
                if tag == delivery_tag:
                    return

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        message = self._delivered.pop(delivery_tag, None)
        if message is None:
            return
        if requeue:
            self.channel.transport.consumer.release([message.claimed], reason="its worker gave it back")
        else:
            self._done(message)

    def _done(self, message: Message) -> None:
        consumer = self.channel.transport.consumer
        if message.unreadable is not None:
            subscription = Subscription("", message.claimed.queue, self.channel, no_ack=False)
            consumer.give_up(Delivery(subscription, message.claimed), message.unreadable)
        else:
            consumer.ack(message.claimed)

    def restore_unacked(self) -> list[Any]:
        """Give back what was delivered and not acknowledged."""
        self._release(uncounted=False)
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """The channel closes: what was not acknowledged by now was not started, or was stopped in order."""
        self._release(uncounted=True)

    def _release(self, uncounted: bool) -> None:
        messages, self._delivered = list(self._delivered.values()), {}
        if messages:
            self.channel.transport.consumer.release([message.claimed for message in messages], uncounted=uncounted)


class Channel(virtual.Channel):
    """A channel: its own limit of unacknowledged messages, on the connection of its transport."""

    QoS = QoS
    supports_fanout = True
    do_restore = False
    from_transport_options = ()  # they are the transport's

    connection: Any  # the Transport, which imports this module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unheard: dict[tuple[str, str], float] = {}  # where nobody listens, and until when that is believed

    @property
    def _queue(self) -> MessageQueue:
        queue: MessageQueue = self.transport.queue
        return queue

    @property
    def transport(self) -> Any:
        """The transport, while the channel is open.

        Raises:
            DatabaseUnavailableError: it is not, so that whoever can makes a new one.
        """
        if self.connection is None:
            raise DatabaseUnavailableError("this channel is closed: its connection was lost, or was closed")
        return self.connection

    # --- exchanges -------------------------------------------------------------------------------------------

    def exchange_declare(
        self,
        exchange: str | None = None,
        type: str | None = "direct",
        durable: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,
        passive: bool = False,
    ) -> None:
        """Make an exchange; with ``passive`` only look whether it is there."""
        type = type or "direct"
        exchange = _named(exchange or f"amq.{type}", "exchange", "exchange_declare")
        if passive:
            if not self._queue.exchange_exists(exchange):
                raise not_found("exchange", exchange, "exchange_declare")
            return
        if type not in self.exchange_types:
            raise ChannelError(
                f"PRECONDITION_FAILED - exchange {exchange!r}: there are no {type!r} exchanges here, only "
                f"{', '.join(sorted(self.exchange_types))}",
                (40, 10),
                "Channel.exchange_declare",
                406,
            )
        found = self._queue.declare_exchange(exchange, type, durable, auto_delete, dumps(arguments or {}))
        if not self.exchange_types[type].equivalent(
            found._asdict(), exchange, type, durable, auto_delete, arguments or {}
        ):
            raise in_other_form("exchange", exchange, "exchange_declare")

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete an exchange with its bindings; the queues stay."""
        self._queue.delete_exchange(exchange, if_unused)

    # --- queues ----------------------------------------------------------------------------------------------

    def queue_declare(
        self,
        queue: str | None = None,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> queue_declare_ok_t:
        """Make a queue; with ``passive`` only look whether it is there, and count its messages.

        (Counting costs time where millions wait, so that other declarations answer 0.)
        """
        queue = _named(queue or f"amq.gen-{uuid()}", "queue", "queue_declare")
        if passive:
            if not self._queue.queue_exists(queue):
                raise not_found("queue", queue, "queue_declare")
            return queue_declare_ok_t(queue, self._queue.size(queue), 0)
        self.transport.declare_queue(queue, durable, auto_delete, dict(arguments or {}))
        return queue_declare_ok_t(queue, 0, 0)

    def prepare_queue_arguments(self, arguments: Any, **kwargs: Any) -> Any:
        """``expires`` and ``message_ttl`` in the form that RabbitMQ has for them."""
        return to_rabbitmq_queue_arguments(arguments or {}, **kwargs)

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Any = None,
        **_: Any,
    ) -> None:
        """Let an exchange route to a queue."""
        key = _named(routing_key or "", "routing key", "queue_bind")
        self.transport.bind(queue, exchange or "amq.direct", key)

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        """Let an exchange route to a queue no more."""
        self.transport.unbind(queue, exchange or "amq.direct", routing_key or "")

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> int | None:
        """Delete a queue with its messages and bindings."""
        return self._queue.delete_queue(queue, if_unused, if_empty)

    def list_bindings(self) -> Any:
        """All bindings, as (queue, exchange, routing key)."""
        return iter(self._queue.bindings())

    def _size(self, queue: str) -> int:
        return self._queue.size(queue)

    def _has_queue(self, queue: str, **_: Any) -> bool:
        return self._queue.queue_exists(queue)

    def _purge(self, queue: str) -> int:
        return self._queue.purge(queue, login_name())

    # --- publishing ------------------------------------------------------------------------------------------

    def basic_publish(
        self, message: dict[str, Any], exchange: str, routing_key: str, mandatory: bool = False, **_: Any
    ) -> None:
        """Publish a message; it is committed when this returns.

        Raises:
            ChannelError: there is no such exchange; or no queue gets the message, and it is a task (which must
                not be lost) or was published with ``mandatory``.
            OperationalError: of a task it is not known whether it was published, since no answer came in time.  It is
                kombu's, which does not try again what fails so: a server that is only slow would have it twice.
        """
        body = message["body"]
        headers, properties = message["headers"], message["properties"]
        properties["delivery_info"] = {"exchange": exchange or "", "routing_key": routing_key}
        envelope = {
            "content-type": message["content-type"],
            "content-encoding": message["content-encoding"],
            "headers": headers,
            "properties": properties,
        }
        for name, kind in ((exchange, "exchange"), (routing_key, "routing key")):
            _named(name or "", kind, "basic_publish")
        is_event = not mandatory and headers.keys() == _EVENT_HEADERS
        if is_event and self._unheard.get((exchange, routing_key), 0.0) > time.monotonic():
            return
        expiration = properties.get("expiration")
        try:
            routed = self._queue.publish(
                exchange or "",
                routing_key or "",
                dumps(envelope),
                body.encode() if isinstance(body, str) else bytes(body),
                priority=self._get_message_priority(message),
                tenant=_organization(headers),
                task_id=_text(headers.get("id")),
                task_name=_text(headers.get("task")),
                # A task that has expired is for a worker to say so: nobody would hear of it if the message just went.
                ttl=int(expiration) / 1000 if expiration and "task" not in headers else None,
                delay=_seconds_until(headers.get("eta")),
                lapse=_seconds_until(headers.get("expires")),
                launch=launch_of(headers.get("id"), self.connection.place),
            )
        except AnswerTimeoutError as error:
            if "task" not in headers:
                raise
            raise OperationalError(str(error)) from error
        if routed is None:
            raise not_found("exchange", exchange, "basic_publish")
        if not routed and (mandatory or "task" in headers):
            raise ChannelError(
                f"NO_ROUTE - no queue is bound to exchange {exchange!r} for routing key {routing_key!r}, so that the "
                "message would be lost.  Declare a queue with this binding, or correct the route",
                (60, 40),
                "Channel.basic_publish",
                312,
            )
        if is_event and not routed:
            self._unheard[exchange, routing_key] = time.monotonic() + UNHEARD_FOR

    # --- consuming -------------------------------------------------------------------------------------------

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **_: Any) -> None:
        """Consume from a queue: ``callback`` gets its messages, inside of drain_events."""
        self._tag_to_queue[consumer_tag] = queue
        self._consumers.add(consumer_tag)
        self.transport.consume(Subscription(self._own(consumer_tag), queue, self, no_ack), callback)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Consume no more; messages that were delivered stay to be acknowledged."""
        if consumer_tag in self._consumers:
            self._consumers.discard(consumer_tag)
            self._tag_to_queue.pop(consumer_tag, None)
            self.connection.cancel(self._own(consumer_tag))

    def _own(self, consumer_tag: str) -> str:
        return f"{self.channel_id}:{consumer_tag}"

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> Message | None:
        """One message, if there is one."""
        while (delivery := self.transport.consumer.get(queue, self, no_ack)) is not None:
            if (message := self.received(delivery)) is not None:
                return message
        return None

    def received(self, delivery: Delivery) -> Message | None:
        """The message of a delivery, counted as delivered; None if it cannot be read and was buried."""
        claimed = delivery.message
        try:
            message = self.readable(claimed)
        except Exception as error:
            self.transport.consumer.bury(claimed, f"{UNREADABLE}: {error!r}")
            return None
        if not delivery.subscription.no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def readable(self, claimed: Claimed) -> Message:
        """A claimed message in kombu's form."""
        return Message(_payload(claimed), self, claimed)

    def basic_qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """Limit the unacknowledged messages of this channel; 0 is no limit."""
        super().basic_qos(prefetch_size, prefetch_count, apply_global)
        self.transport.look_now()

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        """A message was done; it is deleted within moments."""
        (self.qos.ack_up_to if multiple else self.qos.ack)(delivery_tag)

    def close(self) -> None:
        """Close the channel: consume no more, give back what was not acknowledged."""
        if self.connection is not None and self.connection.is_foreign:
            self.closed = True  # a forked child: all of this is its parent's
            return
        super().close()


def _payload(claimed: Claimed) -> dict[str, Any]:
    """A message as kombu's virtual transports have it."""
    envelope = loads(claimed.envelope)
    properties = envelope["properties"]
    properties["delivery_tag"] = claimed.id if claimed.token is None else claimed.token
    properties["body_encoding"] = None
    properties["delivery_info"] = {
        **properties["delivery_info"],
        "queue": claimed.queue,
        "redelivered": claimed.deliveries > 1,
        "is_due": claimed.is_due,
    }
    return {**envelope, "body": claimed.body}


def _organization(headers: Mapping[str, Any]) -> str | None:
    """Whose message it is, for the queue to be fair by."""
    own = find(headers)
    return _text(own.get("organization_id")) if isinstance(own, Mapping) else None


def _seconds_until(time: object) -> float | None:
    """How long it is until a task's ETA or expiry by this process's clock; None if it says none that can be read."""
    if not isinstance(time, str):
        return None
    try:
        then = datetime.datetime.fromisoformat(time)
    except ValueError:
        return None
    now = datetime.datetime.now(datetime.UTC)
    seconds = (then if then.tzinfo else then.replace(tzinfo=datetime.UTC)) - now
    return max(-_LONGEST_DELAY, min(seconds.total_seconds(), _LONGEST_DELAY))


def _text(value: Any) -> str | None:
    """A text that PostgreSQL can store; None if it is none."""
    if not isinstance(value, str) or "\0" in value:
        return None
    return value.encode("utf-8", "replace").decode()


def _named(name: str, kind: str, method: str) -> str:
    """The name, if it can be one: AMQP's are of at most 255 characters, and PostgreSQL stores no NUL.

    Raises:
        ChannelError: it cannot.
    """
    if len(name) > 255 or "\0" in name:
        raise ChannelError(
            f"PRECONDITION_FAILED - {name!r:.60} cannot name a {kind}: at most 255 characters, none of them NUL",
            (50, 10),
            f"Channel.{method}",
            406,
        )
    return name


def not_found(kind: str, name: str, method: str) -> ChannelError:
    return ChannelError(f"NOT_FOUND - no {kind} {name!r}", (50, 10), f"Channel.{method}", 404)


def in_other_form(kind: str, name: str, method: str) -> ChannelError:
    return ChannelError(
        f"PRECONDITION_FAILED - {kind} {name!r} exists with another type, durability or arguments.  Declare it as it "
        "is, or delete it first",
        (50, 10),
        f"Channel.{method}",
        406,
    )
