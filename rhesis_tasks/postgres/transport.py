"""kombu's transport on PostgreSQL: ``broker_url="postgresql://..."``.

Only adapts: :mod:`.queue` has the statements, :mod:`.consumer` the consuming.  Exchanges, bindings and queues are in
the database, so that all processes see the same at once; how a topic matches is kombu's.

Transport options:
    schema: the schema of the library's tables; wins over ``?schema=`` in the URL.
    default_schema: where neither says it; ``configure(schema=...)`` gives it, and it wins over RHESIS_TASKS_SCHEMA.
    grace: seconds without a life sign after which a consumer's messages are given to others; 5.
    poll_interval: seconds between two looks at the queues where no notification came; 5.
    max_deliveries: a message that was delivered so often in vain becomes a dead letter; 5, and None for no limit.
    answer_timeout: seconds for which a process that publishes waits for the server's answer, 10 and in workers and
        beat 90; None waits until it comes.  What a consumer asks for waits as long as it must.
    listen_url: a URL past the connection pooler, for the connection that listens and holds the lock.
Others, those of other transports and kombu's own, are passed over.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from typing import Any, Final

import celery
from celery.signals import worker_init
from kombu.transport import virtual
from sqlalchemy import URL

from ..errors import ConfigurationError, DatabaseUnavailableError, SchemaError
from ..settings import database_url, quote_identifier, redacted, rendered, schema_name
from .channel import Channel, in_other_form, not_found
from .connection import Connection
from .consumer import BATCH, Consumer, Delivery, Subscription
from .engines import shared_engine
from .patience import PATIENCE, answer_timeout, is_patient
from .queue import MessageQueue, QueueForm
from .schema import SchemaStatus, ensure_schema, require_version

__all__ = ["Transport"]

GRACE: Final = 5.0
POLL_INTERVAL: Final = 5.0
MAX_DELIVERIES: Final = 5

# A worker of Celery before 5.7 acknowledges between two calls of drain_events only, so that these must not be long
# while work is done.
_LONGEST_DRAIN: Final = 0.01

# A signal that stops the worker does not end a wait, so that the wait looks up now and then.
_SLICE: Final = 0.25


class Transport(virtual.Transport):
    """One connection for what channels do, and a consumer with another one while something is consumed."""

    Channel = Channel
    can_parse_url = True
    driver_type = "postgresql"
    driver_name = "psycopg"
    default_port = 5432
    connection_errors = (*virtual.Transport.connection_errors, DatabaseUnavailableError)
    channel_errors = virtual.Transport.channel_errors
    implements = virtual.Transport.implements.extend(
        asynchronous=False, exchange_type=frozenset(["direct", "topic", "fanout"]), heartbeats=False
    )

    is_an_older_workers = False  #: whether this process is a worker of Celery before 5.7

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self._pid = os.getpid()
        options = dict(client.transport_options or {})
        self._url, in_url = _url_and_schema(client)
        self._schema = schema_name(options.pop("schema", None) or in_url or options.pop("default_schema", None))
        self._grace = _seconds(options, "grace", GRACE)
        self._poll_interval = _seconds(options, "poll_interval", POLL_INTERVAL)
        self._max_deliveries = _deliveries(options)
        self._answer_timeout = answer_timeout(options, "broker_transport_options")
        if is_patient() and "max_retries" in options:
            # kombu has put the policy of a launch there.  It gives the first connection of a process no more than the
            # time of one attempt, unless it is told otherwise, and ends the launch then.
            client.transport_options.setdefault("connect_retries_timeout", PATIENCE)
        listen_url = options.pop("listen_url", None)
        self._listen_url = database_url(listen_url) if listen_url else self._url
        #: where it is, to be compared with where records are
        self.place = (rendered(self._url.set(drivername="postgresql")), self._schema)
        self.queue = MessageQueue(self._connection(self._url), self._schema, self._answer_timeout)
        self._consumer: Consumer | None = None
        #: called with a message that is given up, and why, before it is a dead letter
        self.on_dead: Callable[[Any, str], None] | None = None
        self._loop = _Loop(self._deliver_some)
        self._receivers: dict[str, Any] = {}  # what gets the messages of a subscription, by its tag
        self._declared: dict[str, tuple[bool, bool, dict[str, Any]]] = {}
        self._bound: dict[str, set[tuple[str, str]]] = {}
        # kombu's has the whole URL as its hostname, and `celery inspect stats` shows it.
        client.info = lambda: {**type(client).info(client), "hostname": redacted(self._url)}

    def _connection(self, url: URL) -> Connection:
        return Connection(url, name="rhesis-tasks", connect_timeout=self.client.connect_timeout)

    def driver_version(self) -> str:
        """Of psycopg."""
        import psycopg

        return psycopg.__version__

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child, and the transport its parent's."""
        return os.getpid() != self._pid

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """The URL for logs."""
        url = self._url.set(drivername="postgresql")
        return rendered(url) if include_password else redacted(url)

    def establish_connection(self) -> Any:
        """Connect, and make sure that the tables are there.

        Raises:
            DatabaseUnavailableError: the server cannot be reached; kombu tries again.
            MissingPrivilegeError, SchemaError: trying again would not help.
        """
        try:
            self.queue.connection.open(self._answer_timeout)
            self._ensure_schema()
            return super().establish_connection()
        except BaseException:
            self.queue.connection.close()
            raise

    def _ensure_schema(self) -> None:
        where = (self._url, self._schema)
        if where in _ready:
            return
        try:
            rows = self.queue.connection.query(
                f"SELECT max(version) FROM {quote_identifier(self._schema)}.schema_version",  # noqa: S608
                timeout=self._answer_timeout,
            )
        except SchemaError:
            ensure_schema(shared_engine(rendered(self._url)), self._schema)
        else:
            require_version(SchemaStatus(self._schema, rows[0][0]))
        _ready.add(where)

    def close_connection(self, connection: Any) -> None:
        """Close all channels and connections."""
        if self.is_foreign:
            return
        try:
            super().close_connection(connection)
        finally:
            self._loop.leave()
            self._end_consumer()
            self.queue.connection.close()

    # --- declaring: remembered, for the consumer to say again to a server that lost it -----------------------

    def declare_queue(self, name: str, durable: bool, auto_delete: bool, arguments: dict[str, Any]) -> None:
        """Make a queue."""
        wanted = QueueForm(
            durable,
            auto_delete,
            _from_milliseconds(arguments, "x-expires"),
            _from_milliseconds(arguments, "x-message-ttl"),
        )
        if self.queue.declare_queue(name, *wanted) != wanted:
            raise in_other_form("queue", name, "queue_declare")
        self._declared[name] = durable, auto_delete, arguments

    def bind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Let an exchange route to a queue."""
        if not self.queue.bind(queue, exchange, routing_key):
            raise not_found("exchange or queue", f"{exchange}, {queue}", "queue_bind")
        self._bound.setdefault(queue, set()).add((exchange, routing_key))

    def unbind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Let an exchange route to a queue no more."""
        self.queue.unbind(queue, exchange, routing_key)
        self._bound.get(queue, set()).discard((exchange, routing_key))

    def _declare_again(self, queue: str) -> None:
        if queue in self._declared:
            self.declare_queue(queue, *self._declared[queue])
        for exchange, routing_key in self._bound.get(queue, ()):
            self.queue.bind(queue, exchange, routing_key)

    # --- consuming -------------------------------------------------------------------------------------------

    @property
    def consumer(self) -> Consumer:
        """The consumer, started when it is first needed."""
        if self._consumer is None or self._consumer.is_foreign:
            consumer = Consumer(
                dataclasses.replace(self.queue, answer_timeout=None),  # a claim may wait behind others' locks
                MessageQueue(self._connection(self._listen_url), self._schema),
                name=f"{socket.gethostname()}:{os.getpid()}",
                grace=self._grace,
                poll_interval=self._poll_interval,
                max_deliveries=self._max_deliveries,
                free=_free,
                declare=self._declare_again,
                on_dead=self._tell_of_dead,
                on_call=self._loop.call,
            )
            consumer.start()
            self._consumer = consumer
        return self._consumer

    def consume(self, subscription: Subscription, callback: Any) -> None:
        """Let a callback get the messages of a queue."""
        self._receivers[subscription.tag] = callback
        self.consumer.subscribe(subscription)

    def cancel(self, tag: str) -> None:
        """Let it get no more."""
        self._receivers.pop(tag, None)
        if self._consumer is not None:
            self._consumer.cancel(tag)
            if self._consumer.is_idle:
                self._end_consumer()

    @property
    def silent_for(self) -> float | None:
        """Seconds since the server has last heard of the consumer; None if nothing is consumed."""
        consumer = self._consumer
        return None if consumer is None else consumer.silent_for

    @property
    def grace(self) -> float:
        """Seconds without a life sign after which what the consumer holds is given to others."""
        return self._grace

    def look_now(self) -> None:
        """Look for messages: more of them may be delivered now."""
        if self._consumer is not None:
            self._consumer.look_now()

    def _end_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver one message.

        Raises:
            TimeoutError: there was none within ``timeout`` seconds (None waits for ever).
        """
        consumer = self._consumer
        if consumer is None:
            time.sleep(1.0 if timeout is None else timeout)
            raise TimeoutError
        if self.is_an_older_workers and not consumer.is_idle:
            timeout = _LONGEST_DRAIN if timeout is None else min(timeout, _LONGEST_DRAIN)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        if _worker_is_stopping():
            raise TimeoutError
        while (delivery := consumer.next(max(0.0, min(_SLICE, deadline - time.monotonic())))) is None:
            if time.monotonic() >= deadline or _worker_is_stopping():
                raise TimeoutError
        self._deliver(delivery)

    def _deliver(self, delivery: Delivery) -> None:
        channel: Any = delivery.subscription.group
        receiver = self._receivers.get(delivery.subscription.tag)
        message = channel.received(delivery)
        if message is not None and receiver is not None:
            receiver(message)

    def _tell_of_dead(self, delivery: Delivery, reason: str) -> None:
        if self.on_dead is not None:
            channel: Any = delivery.subscription.group
            self.on_dead(channel.readable(delivery.message), reason)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Deliver messages from inside kombu's event loop, which Celery's worker runs for the prefork pool."""
        self._loop.join(loop)

    def _deliver_some(self) -> float:
        """Deliver what is there; returns the seconds until it is to be called again."""
        consumer = self._consumer
        for _ in range(BATCH):
            delivery = consumer.next(0) if consumer is not None else None
            if delivery is None:
                return math.inf if consumer is None else consumer.pause
            self._deliver(delivery)
        return 0.0


class _Loop:
    """The transport's place in an event loop of kombu's: a socket that wakes it, and a timer.

    Args:
        work: what to do; returns the seconds until it is to be done again.
    """

    def __init__(self, work: Callable[[], float]) -> None:
        self._work = work
        self._loop: Any = None
        self._timer: Any = None
        self._sockets: tuple[socket.socket, socket.socket] | None = None

    def join(self, loop: Any) -> None:
        """Do the work in this loop from now on."""
        self.leave()
        self._loop = loop
        self._sockets = socket.socketpair()
        for end in self._sockets:
            end.setblocking(False)
        loop.add_reader(self._sockets[0].fileno(), self._on_call)
        self.call()

    def leave(self) -> None:
        """Do it no more."""
        if self._sockets is not None:
            reader, writer = self._sockets
            with suppress(Exception):  # the loop may be closed already
                self._loop.remove_reader(reader.fileno())
            self._sockets = None
            reader.close()
            writer.close()
        if self._timer is not None:
            self._timer.cancel()
        self._loop = self._timer = None

    def call(self) -> None:
        """Let the work be done soon; from any thread."""
        sockets = self._sockets
        if sockets is not None:
            with suppress(OSError):  # full: it was called already; closed: it is leaving
                sockets[1].send(b"!")

    def _on_call(self) -> None:
        if self._sockets is not None:
            with suppress(BlockingIOError):
                self._sockets[0].recv(4096)
            self._run()

    def _run(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pause = self._work()
        if self._loop is None:
            return
        if pause <= 0:
            self.call()
        elif pause < math.inf:
            self._timer = self._loop.call_later(pause, self._run)


_ready: set[tuple[URL, str]] = set()  # databases and schemas whose version this process has seen


def _free(channel: Hashable) -> int | None:
    assert isinstance(channel, Channel)  # noqa: S101
    free: int | None = channel.qos.free
    return free


def _url_and_schema(client: Any) -> tuple[URL, str | None]:
    """The database that a kombu connection names, and the schema if its URL says one."""
    given = client.hostname or ""
    if "://" in given:
        # kombu has taken a driver's name off: "postgresql+asyncpg://" is a prefix and "asyncpg://".
        url = database_url(f"{client.uri_prefix}+{given}" if client.uri_prefix else given)
    else:  # one of several broker URLs, which kombu takes apart
        url = URL.create(
            "postgresql+psycopg",
            client.userid,
            client.password,
            client.hostname,
            int(client.port) if client.port else None,
            None if client.virtual_host in (None, "/") else client.virtual_host,
        )
    schema = url.query.get("schema")
    if schema is not None and not isinstance(schema, str):
        raise ConfigurationError("the broker URL names more than one schema")
    return url.difference_update_query(["schema"]), schema


def _from_milliseconds(arguments: Mapping[str, Any], name: str) -> float | None:
    value = arguments.get(name)
    return None if value is None else value / 1000


def _seconds(options: dict[str, Any], name: str, default: float) -> float:
    value = options.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 86_400:
        raise ConfigurationError(f"broker_transport_options[{name!r}] is a number of seconds, not {value!r}")
    return float(value)


def _deliveries(options: dict[str, Any]) -> int | None:
    value = options.pop("max_deliveries", MAX_DELIVERIES)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1_000_000):
        raise ConfigurationError(
            f"broker_transport_options['max_deliveries'] is a number of deliveries or None, not {value!r}"
        )
    return value


def _worker_is_stopping() -> bool:
    """Whether this process is a Celery worker that was told to stop."""
    state: Any = sys.modules.get("celery.worker.state")
    return state is not None and any(
        flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate)
    )


def _prepare_worker(sender: Any, **_: Any) -> None:
    """Tell a worker of Celery's what it would know of its own transports.

    Workers greet each other and gossip over transports that are on a list.  The prefork pool needs the event loop:
    without it a busy pool blocks the worker, so that nothing is revoked and no command answered.  (The other pools
    do not, and are faster without.)
    """
    if not isinstance(sender._conninfo.transport, Transport):
        return
    from celery.concurrency import get_implementation, prefork
    from celery.worker.consumer.gossip import Gossip
    from celery.worker.consumer.mingle import Mingle

    Transport.is_an_older_workers = celery.VERSION[:2] < (5, 7)
    for step in (Mingle, Gossip):
        step.compatible_transports.add(Transport.driver_type)
    if issubclass(get_implementation(sender.pool_cls), prefork.TaskPool):
        sender.use_eventloop = True


worker_init.connect(_prepare_worker, weak=False, dispatch_uid="rhesis_tasks.postgres.transport")
