"""What a long transaction costs the PostgreSQL broker, which keeps the server from removing what is gone.

One process publishes, claims and acknowledges at full speed, and does now and then what else consumers do.  See
README.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import psycopg
from servers import our_server
from tabular import table

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.engines import new_engine
from rhesis_tasks.postgres.places import Places
from rhesis_tasks.postgres.queue import Claimed, MessageQueue
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.settings import database_url

_BATCH: Final = 32
_BODY: Final = b"x" * 900
_EVENT: Final = b"x" * 200
_OPERATIONS: Final = ("publish", "claim", "take", "wait_for", "agree", "tend", "promote")
_SIZES: Final = """
    SELECT relname, pg_relation_size(oid) FROM pg_class
    WHERE relnamespace = 'rhesis_tasks'::regnamespace AND relkind IN ('r', 'i')
      AND relname ~ '^(transient_)?message|waiter'
    ORDER BY 2 DESC LIMIT 6
"""


class Load:
    """A publisher and a consumer that takes turns with it.

    Args:
        queue: where statements go.
        places: whether the consumer walks on from where it was.
    """

    def __init__(self, queue: MessageQueue, places: bool) -> None:
        self._queue = queue
        self._places = {name: Places() for name in ("tasks", "events")} if places else {}
        self._consumer = queue.new_consumer()
        self._acks: list[tuple[int, int]] = []
        self._spent: defaultdict[str, list[float]] = defaultdict(list)
        queue.declare_queue("tasks")
        queue.declare_queue("events", durable=False, auto_delete=False, message_ttl=5.0)
        queue.attach(self._consumer, "horizon", ["tasks", "events"])

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        self._spent[name].append(time.perf_counter() - began)
        return found

    def turn(self) -> int:
        """Publish a batch with an event for each message, and do it; returns how many."""
        queue = self._queue
        for number in range(_BATCH):
            delay = 0.05 if number % 8 == 0 else None
            self._timed("publish", lambda delay=delay: queue.publish("", "tasks", "{}", _BODY, delay=delay))
            queue.publish("", "events", "{}", _EVENT)
        self._timed("take", lambda: self._claim("events", [], 0, take_from=["events"], take_slots=100))
        messages = self._timed("claim", lambda: self._claim("tasks", ["tasks"], _BATCH, acks=self._acks))
        self._acks = [(message.id, message.token) for message in messages if message.token is not None]
        # It was notified, and waits anew: once in a batch; each task, where workers are idle.
        self._timed("wait_for", lambda: queue.wait_for(self._consumer, ["tasks", "events"]))
        return len(messages)

    def _claim(self, queue: str, claim_from: list[str], slots: int, **more: Any) -> list[Claimed]:
        began, places = time.monotonic(), self._places.get(queue)
        starts = places.starts([queue]) if places else {}
        messages, _ = self._queue.claim(self._consumer, claim_from, slots, places=starts, **more)
        if places:
            places.claimed(starts, messages, began)
        return messages

    def upkeep(self) -> None:
        """What a consumer does a few times in a grace period."""
        tokens = [token for _, token in self._acks]
        self._timed("agree", lambda: self._queue.agree(self._consumer, tokens))
        self._timed("tend", lambda: self._queue.tend(self._consumer, 5.0))
        self._timed("promote", lambda: self._queue.promote(1000))

    def costs(self) -> list[str]:
        """Milliseconds of each operation, on average since the last time that was asked."""
        spent, self._spent = self._spent, defaultdict(list)
        return [f"{1000 * sum(spent[name]) / max(1, len(spent[name])):.2f}" for name in _OPERATIONS]


@contextmanager
def held_horizon(url: str) -> Iterator[None]:
    """A transaction that is open until the end of the block, and has seen something at its beginning."""
    with psycopg.connect(url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield


def measure(url: str, seconds: float, *, held: bool, places: bool, markdown: bool) -> None:
    """Load for so many seconds on new tables; prints what operations cost as time goes on, and what sizes there are."""
    engine = new_engine(url)
    with engine.begin() as admin:
        admin.exec_driver_sql("DROP SCHEMA IF EXISTS rhesis_tasks CASCADE")
    create_schema(engine)
    rows = [("seconds", "messages", *(f"{name} ms" for name in _OPERATIONS))]
    with ExitStack() as stack:
        if held:
            stack.enter_context(held_horizon(url))
        # What is gone is what is measured, not the disk.
        connection = Connection(
            database_url(url).update_query_dict({"options": "-c synchronous_commit=off"}), name="horizon"
        )
        stack.callback(connection.close)
        load = Load(MessageQueue(connection, "rhesis_tasks"), places)
        began, done = time.monotonic(), 0
        for part in itertools.count(1):
            end = began + part * seconds / 6
            upkeep_at = 0.0
            while time.monotonic() < end:
                done += load.turn()
                if time.monotonic() >= upkeep_at:
                    load.upkeep()
                    upkeep_at = time.monotonic() + seconds / 60
            rows.append((f"{time.monotonic() - began:.0f}", f"{done:,}", *load.costs()))
            if part == 6:
                break
        print(f"\n{'A' if held else 'No'} long transaction, places {'on' if places else 'off'}\n")
        print(table(rows, markdown=markdown))
        sizes = connection.query(_SIZES)
        print("\n" + ", ".join(f"{name} {size / 2**20:.1f} MB" for name, size in sizes), flush=True)
    engine.dispose()


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of load, for each table; default 600")
    parser.add_argument("--short", action="store_true", help="30 seconds for each")
    parser.add_argument("--held-only", action="store_true", help="only with the long transaction, and places on")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    arguments = parser.parse_args()
    seconds = 30.0 if arguments.short else arguments.seconds
    with our_server() as (found, _):
        for held, places in [(False, True), (False, False), (True, False), (True, True)]:
            if arguments.held_only and not (held and places):
                continue
            measure(found.url, seconds, held=held, places=places, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
