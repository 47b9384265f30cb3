"""The queue in the database: what publishers and workers ask of it, statement by statement.

Every statement is a call of a function in ``sql/functions.sql``, whose comments say what it costs.  Usable without
Celery and kombu.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from ..settings import quote_identifier
from ..states import UNFINISHED, WAITING, revoke
from .connection import Connection
from .launching import Launch

__all__ = ["Claimed", "Exchange", "Kept", "Late", "MessageQueue", "PUBLISH", "Place", "QueueForm"]

PUBLISH: Final = "SELECT {schema}.publish(%s, %s, %s, %b, %s, %s, %s, %s, %s, %s, %s)"
"""The statement that publishes; ``{schema}`` is the schema's quoted name."""

_PUBLISH_WITH_RECORD: Final = PUBLISH.replace(
    "SELECT ", "SELECT {schema}.record_launch(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s), ", 1
)

_PURGED_AT_ONCE: Final = 1000  # so that nobody waits for long


class Place(NamedTuple):
    """Where a message is in the order of delivery of its queue."""

    priority: int  #: negative: those of high priority come first
    start: float
    id: int


class Claimed(NamedTuple):
    """A message, and the claim on it."""

    id: int
    queue: str
    token: int | None  #: the claim, needed to acknowledge it; None if it was taken for good
    deliveries: int  #: how often it was delivered, this time included
    envelope: str  #: JSON
    body: bytes
    place: Place | None = None  #: None if it was not found in the order of delivery
    is_due: bool = False  #: it was delayed, and its time has come by the server's clock
    last_reason: str | None = None  #: why the last of its deliveries was in vain, if it is to be buried


class Late(NamedTuple):
    """An acknowledgement that came too late: the message had been released."""

    id: int
    token: int
    is_there: bool  #: somebody else has it, or will


class Exchange(NamedTuple):
    """An exchange as it was made."""

    type: str
    durable: bool
    auto_delete: bool
    arguments: dict[str, Any]


class QueueForm(NamedTuple):
    """A queue as it was made; times are seconds."""

    durable: bool
    auto_delete: bool
    expires: float | None
    message_ttl: float | None


class Kept(NamedTuple):
    """How a consumer stands."""

    known: bool  #: False once it was reaped
    locked: bool  #: whether the session holds its lock
    again_in: float  #: seconds until it is to say so again
    promotes: bool  #: whether it is the one that lets messages be claimed when they are due


@functools.cache
def _in_schema(sql: str, schema: str) -> str:
    return sql.format(schema=quote_identifier(schema))


@dataclasses.dataclass(frozen=True, slots=True)
class MessageQueue:
    """The queue in one schema of a database, over one connection.

    All methods raise what :meth:`Connection.query` raises.
    """

    connection: Connection
    schema: str
    answer_timeout: float | None = None  #: seconds for which an answer is waited for; None: until it comes

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.query(sql, values, timeout=self.answer_timeout)

    def _call(self, function: str, *arguments: Any) -> list[tuple[Any, ...]]:
        marks = ", ".join(["%s"] * len(arguments))
        return self._query(f"SELECT * FROM {quote_identifier(self.schema)}.{function}({marks})", arguments)  # noqa: S608

    def _value(self, function: str, *arguments: Any) -> Any:
        return self._call(function, *arguments)[0][0]

    # --- publishing ------------------------------------------------------------------------------------------

    def publish(
        self,
        exchange: str,
        routing_key: str,
        envelope: str,
        body: bytes,
        *,
        priority: int = 0,
        tenant: str | None = None,
        task_id: str | None = None,
        task_name: str | None = None,
        ttl: float | None = None,
        delay: float | None = None,
        lapse: float | None = None,
        launch: Launch | None = None,
    ) -> int | None:
        """Publish a message; it is committed when this returns.

        Args:
            exchange: ``""`` routes to the queue named like the routing key, and makes it if there is none.
            envelope: JSON.
            priority: 0 to 9; higher ones go first.
            ttl: seconds after which it goes if nobody claimed it.
            delay: seconds for which nobody claims it.
            lapse: seconds after which it is of no use any more; if that is before the delay's end, it is claimed then.
            launch: recorded with it; then it is known whether the task was new.

        Returns:
            How many queues got it; None if there is no such exchange.
        """
        values = (exchange, routing_key, envelope, body, priority, tenant, task_id, task_name, ttl, delay, lapse)
        if launch is None:
            return self._query(_in_schema(PUBLISH, self.schema), values)[0][0]  # type: ignore[no-any-return]
        rows = self._query(_in_schema(_PUBLISH_WITH_RECORD, self.schema), (*launch.values, *values))
        is_new, routed = rows[0]
        # Published again after a lost connection, it finds the record that it made itself.
        launch.is_new = launch.is_new or is_new
        return routed  # type: ignore[no-any-return]

    # --- declaring -------------------------------------------------------------------------------------------

    def declare_exchange(
        self, name: str, type: str, durable: bool, auto_delete: bool, arguments: str = "{}"
    ) -> Exchange:
        """Make an exchange if there is none of this name; returns it as it is."""
        return Exchange(*self._call("declare_exchange", name, type, durable, auto_delete, arguments)[0])

    def exchange_exists(self, name: str) -> bool:
        return bool(self._value("exchange_exists", name))

    def delete_exchange(self, name: str, if_unused: bool = False) -> None:
        self._call("delete_exchange", name, if_unused)

    def declare_queue(
        self,
        name: str,
        durable: bool = True,
        auto_delete: bool = False,
        expires: float | None = None,
        message_ttl: float | None = None,
    ) -> QueueForm:
        """Make a queue if there is none of this name; returns it as it is.

        Args:
            durable: whether its messages survive a crash of the server.
            auto_delete: whether it goes with its last consumer.
            expires: seconds after which it goes if it is not used.
            message_ttl: seconds after which its messages go if nobody claimed them, counted from when they are due.
        """
        return QueueForm(*self._call("declare_queue", name, durable, auto_delete, expires, message_ttl)[0])

    def queue_exists(self, name: str) -> bool:
        return bool(self._value("queue_exists", name))

    def size(self, name: str) -> int:
        """How many messages wait in a queue; not those that are delayed."""
        return int(self._value("queue_size", name))

    def stats(self, most: int = 10_000) -> list[tuple[str, int, int, int, float | None, int]]:
        """What is in each durable queue: its name, how many messages wait, are delayed, are claimed; the seconds since
        the oldest that waits was published; and its dead letters.

        Args:
            most: no number is higher, so that it costs little where millions wait.
        """
        return [(*row,) for row in self._call("queue_stats", most)]

    def bind(self, queue: str, exchange: str, routing_key: str) -> bool:
        """Let an exchange route to a queue; returns False if one of them is not there.

        For a topic, ``*`` in the routing key stands for one word, ``#`` for any number of words, also none.
        """
        return bool(self._value("bind", queue, exchange, routing_key, _pattern(routing_key)))

    def unbind(self, queue: str, exchange: str, routing_key: str) -> None:
        self._call("unbind", queue, exchange, routing_key)

    def bindings(self) -> list[tuple[str, str, str]]:
        """All bindings, as (queue, exchange, routing key)."""
        return [(queue, exchange, routing_key) for queue, exchange, routing_key in self._call("bindings")]

    def purge(self, name: str, operator: str = "unknown") -> int:
        """Delete the messages of a queue that wait or are delayed; returns how many.

        Their tasks become revoked, if their records are here.

        Args:
            name: the queue's.
            operator: whose name the audit record gets.
        """
        operation, gone = uuid.uuid4(), 0
        last: int | None = -1
        ended = (f"operator {operator}", revoke.target.value, "TaskRevokedError", "purged by an operator")
        sources = ([state.value for state in WAITING], [state.value for state in UNFINISHED])
        while last is not None:
            values = (operation, name, last, _PURGED_AT_ONCE, operator, *ended, *sources)
            number, last = self._call("operation_purge", *values)[0]
            gone += number
        return gone

    def delete_queue(self, name: str, if_unused: bool = False, if_empty: bool = False) -> int | None:
        """Delete a queue with its messages and bindings; returns how many went, None if it was left alone."""
        return self._value("delete_queue", name, if_unused, if_empty)  # type: ignore[no-any-return]

    # --- consuming -------------------------------------------------------------------------------------------

    def new_consumer(self) -> int:
        """The number of a consumer that did not exist before."""
        return int(self._value("next_consumer"))

    def attach(
        self,
        consumer: int,
        name: str,
        queues: Sequence[str] = (),
        *,
        hold_lock: bool = True,
        grace: float | None = None,
    ) -> bool:
        """Say that a consumer is there; returns whether this session has its lock.

        Args:
            grace: seconds that it may be silent before it is dead; None is what whoever looks allows itself.
        """
        return bool(self._value("attach", consumer, name, list(queues), hold_lock, grace))

    def detach(self, consumer: int) -> None:
        """A consumer goes; what it held is released."""
        self._call("detach", consumer)

    def listen(self, consumer: int) -> None:
        """Let this connection receive the notifications for a consumer."""
        self._query(f"LISTEN {quote_identifier(self._value('channel_of', consumer))}")

    def watch_for_loss(self) -> None:
        """Let the server notice in seconds that this session's other end is gone, and free its lock.

        (Over a unix socket it always does, and ignores this.)
        """
        self._query(
            "SELECT set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '2', false), "
            "set_config('tcp_keepalives_count', '3', false), set_config('tcp_user_timeout', '10000', false)"
        )

    def subscribe(self, consumer: int, queue: str) -> None:
        self._call("subscribe", consumer, queue)

    def unsubscribe(self, consumer: int, queue: str) -> None:
        self._call("unsubscribe", [consumer], [queue])

    def claim(
        self,
        consumer: int,
        queues: Sequence[str],
        slots: int,
        *,
        take_from: Sequence[str] = (),
        take_slots: int = 0,
        acks: Sequence[tuple[int, int]] = (),
        has_none: bool = False,
        max_deliveries: int | None = None,
        patience: float = math.inf,
        places: Mapping[str, Place] = MappingProxyType({}),
    ) -> tuple[list[Claimed], list[Late]]:
        """Acknowledge what was done, and claim what waits, in one commit.

        Args:
            consumer: who holds what is claimed.
            queues: where from, in this order until the slots are full.
            slots: how many to claim at most.
            take_from: queues from which messages are taken for good, without a claim.
            take_slots: how many to take at most.
            acks: (id, token) of messages that were done.
            has_none: whether the consumer holds nothing but what it acknowledges.  Only then it may get a message that
                was delivered twice in vain, and nothing else with it.
            max_deliveries: a message that was delivered so often is claimed to be buried: its ``deliveries`` are more.
            patience: seconds after which a message that was delivered twice in vain lets one after the other of those
                who consume its queue claim no more, for some minutes at most, until it holds nothing.
            places: from where to walk a queue; others are walked from the beginning.

        Returns:
            The messages in the order of delivery, taken ones first; and the acknowledgements that came too late.
        """
        ids, tokens = [id for id, _ in acks], [token for _, token in acks]
        starts = [places.get(queue) for queue in (*queues, *take_from)]
        rows = self._query(
            f"SELECT * FROM {quote_identifier(self.schema)}.claim(%s, %s::bigint[], %s::bigint[], %s, %s, %s, %s, "  # noqa: S608
            "%s, %s, %s, %s::smallint[], %s::double precision[], %s::bigint[])",
            (
                *(consumer, ids, tokens, list(queues), slots, list(take_from), take_slots),
                *(has_none, max_deliveries, patience),
                *([None if place is None else place[part] for place in starts] for part in range(3)),
            ),
        )
        late = [Late(id, token, bool(is_there)) for id, queue, token, is_there, *_ in rows if queue is None]
        order = {queue: number for number, queue in enumerate((*take_from, *queues))}
        messages = sorted(
            (row for row in rows if row[1] is not None), key=lambda row: (row[2] is not None, order[row[1]], row[4])
        )
        return [_claimed(*row) for row in messages], late

    def ack(self, acks: Sequence[tuple[int, int]]) -> list[Late]:
        """Acknowledge messages; returns those whose claim was no longer theirs."""
        ids, tokens = [id for id, _ in acks], [token for _, token in acks]
        rows = self._query(
            f"SELECT * FROM {quote_identifier(self.schema)}.ack(%s::bigint[], %s::bigint[])",  # noqa: S608
            (ids, tokens),
        )
        return [Late(*row) for row in rows]

    def release(self, claims: Sequence[tuple[int, int]], *, uncounted: bool = False, reason: str | None = None) -> int:
        """Give claimed messages back to the place they had; returns how many were still claimed.

        Args:
            claims: (id, token) of each.
            uncounted: as if they had not been delivered.
            reason: why their delivery was in vain.
        """
        return int(
            self._query(
                f"SELECT {quote_identifier(self.schema)}.release(%s::bigint[], %s::bigint[], %s, %s)",
                ([id for id, _ in claims], [token for _, token in claims], uncounted, reason),
            )[0][0]
        )

    def agree(self, consumer: int, tokens: Sequence[int]) -> set[int]:
        """Give back what a consumer holds under other claims than these; returns those of them that it still holds."""
        rows = self._query(
            f"SELECT * FROM {quote_identifier(self.schema)}.agree(%s, %s::bigint[])",  # noqa: S608
            (consumer, list(tokens)),
        )
        return {token for (token,) in rows}

    def bury(self, id: int, token: int, reason: str) -> bool:
        """Give a claimed message up, with the reason: a dead letter; returns whether it was still claimed."""
        return bool(self._value("bury", id, token, reason))

    def wait_for(self, consumer: int, queues: Sequence[str], *, pass_on: Sequence[str] = ()) -> None:
        """Ask to be notified of messages in these queues, and in no others.

        Args:
            consumer: the consumer's number.
            queues: their names.
            pass_on: queues of whose messages the consumer was notified, and which it cannot take now; somebody else
                who waits for them is notified.
        """
        self._call("wait_for", consumer, list(queues), list(pass_on))

    def tend(self, consumer: int, grace: float, *, sweeps: bool = True) -> Kept:
        """Say that a consumer is there, and look after the others.

        Args:
            consumer: the consumer's number.
            grace: seconds.
            sweeps: also delete what nobody will want, such as messages that have expired.
        """
        return Kept(*self._call("tend", consumer, grace, sweeps)[0])

    def promote(self, most: int) -> float | None:
        """Let messages that are due be claimed, at most so many.

        Returns:
            In how many seconds to call again: when the next one is due, or a little later if others have locked all
            that are due; None if none is delayed.
        """
        return self._value("promote", most)  # type: ignore[no-any-return]

    def hasten(self, task_ids: Sequence[str]) -> int:
        """Let the delayed messages of tasks be claimed before they are due; returns how many there were."""
        return int(self._value("hasten", list(task_ids)))


def _claimed(
    id: int,
    queue: str,
    token: int | None,
    deliveries: int,
    _: int,
    envelope: str,
    body: bytes,
    priority: int | None,
    start: float | None,
    is_due: bool | None,
    last_reason: str | None,
) -> Claimed:
    place = None if priority is None or start is None else Place(priority, start, id)
    return Claimed(id, queue, token, deliveries, envelope, body, place, bool(is_due), last_reason)


def _pattern(binding_key: str) -> str:
    """What a topic's binding key matches, as the ``bind`` function wants it: each word behind a dot."""
    wildcards = {"*": r"\.[^.]*", "#": r"(\.[^.]*)*"}
    words = binding_key.split(".") if binding_key else []
    return "".join(("^", *(wildcards.get(word) or rf"\.{re.escape(word)}" for word in words), "$"))
