"""How much room messages take in the database, and how much is written to its log for them.  See README.md."""

from __future__ import annotations

import argparse
import json
import secrets
from typing import Any

import psycopg
from arguments import positive
from horizon import held_horizon
from servers import our_server

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.engines import new_engine
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.settings import database_url


def measure(url: str, count: int) -> None:
    """Publish so many messages of 1 kB, and do them under a long transaction; prints bytes for each."""
    create_schema(new_engine(url))
    with psycopg.connect(url, autocommit=True) as looking:

        def used() -> tuple[int, int]:
            return _value(looking, "SELECT pg_total_relation_size('rhesis_tasks.message')"), _value(
                looking, "SELECT (pg_current_wal_lsn() - '0/0')::bigint"
            )

        queue = MessageQueue(Connection(database_url(url), name="sizes"), "rhesis_tasks")
        queue.declare_queue("tasks")
        envelope, body = json.dumps({"headers": secrets.token_hex(250)}), secrets.token_hex(250).encode()
        size, log = used()
        for number in range(count):
            queue.publish("", "tasks", envelope, body, tenant="a" * 36, task_id=f"{number:036}", task_name="shop.work")
        waiting, published = used()
        print(f"a waiting message of {len(envelope) + len(body)} bytes: {(waiting - size) / count:.0f} bytes")
        print(f"written to the log to publish it: {(published - log) / count:.0f} bytes")
        with held_horizon(url):
            acks: list[tuple[int, int]] = []
            consumer = queue.new_consumer()
            while messages := queue.claim(consumer, ["tasks"], 32, acks=acks, has_none=True)[0]:
                acks = [(each.id, each.token) for each in messages if each.token is not None]
            queue.ack(acks)
            gone, done = used()
        print(f"written to the log to claim and acknowledge it: {(done - published) / count:.0f} bytes")
        print(f"a message that is done, under a long transaction: {(gone - size) / count:.0f} bytes")
        queue.connection.close()


def _value(connection: psycopg.Connection[Any], query: str) -> int:
    row = connection.execute(query).fetchone()  # type: ignore[arg-type]  # no literal
    return int(row[0]) if row else 0


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=positive, default=20_000, help="how many; default 20000")
    arguments = parser.parse_args()
    with our_server() as (found, _):
        measure(found.url, arguments.messages)


if __name__ == "__main__":
    main()
