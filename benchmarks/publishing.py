"""Where the time goes that a publisher spends on a task, and what could not be less.  See README.md."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest.mock import patch

import psycopg
from arguments import positive
from servers import Broker, our_server
from tabular import spread, table

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.settings import database_url

Step = Callable[[], object]
_WARM_UP = 50


def steps(broker: Broker, folder: Path, stack: ExitStack) -> dict[str, Step]:
    """What is timed, by what it is called."""
    own = {"url": broker.url, "options": {}, "queue": "publishing", "folder": str(folder)}
    os.environ["BENCHMARK"] = json.dumps(own)
    publish = importlib.import_module("workload").publish_noop
    arguments, keywords = importlib.import_module("workload_bare").message()
    envelope, body = arguments[2], arguments[3]

    def nothing(*_: object, **__: object) -> int:
        return 1

    def without_the_database() -> None:
        with patch.object(MessageQueue, "publish", nothing):
            publish()

    def statement(flushed: bool) -> Step:
        url = broker.url if flushed else f"{broker.url}?options=-csynchronous_commit%3Doff"
        connection = Connection(database_url(url), name="publishing")
        stack.callback(connection.close)
        queue = MessageQueue(connection, "rhesis_tasks")
        return lambda: queue.publish(*arguments, **keywords)

    raw = stack.enter_context(psycopg.connect(broker.url, autocommit=True))
    raw.execute("CREATE TABLE plain (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, envelope json, body bytea)")
    return {
        "a task, published": publish,
        "of that, Celery, kombu and the context": without_the_database,
        "of that, our statement": statement(flushed=True),
        "our statement, if nothing is flushed": statement(flushed=False),
        "INSERT of the same message, table with primary key": lambda: raw.execute(
            "INSERT INTO plain (envelope, body) VALUES (%s, %b)", (envelope, body)
        ),
        "SELECT 1": lambda: raw.execute("SELECT 1").fetchall(),
    }


def _microseconds(step: Step, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count * 1e6


def measure(broker: Broker, folder: Path, rounds: int, count: int, *, markdown: bool) -> None:
    """Time all steps in turn, round by round, and print them."""
    with ExitStack() as stack:
        found: dict[str, list[float]] = {}
        every = steps(broker, folder, stack)
        for step in every.values():
            _microseconds(step, _WARM_UP)
        for _ in range(rounds):
            for name, step in every.items():
                found.setdefault(name, []).append(_microseconds(step, count))
    rows = [("", "microseconds", "from - to")]
    rows += [(name, f"{median(values):.0f}", spread(values, ".0f")) for name, values in found.items()]
    whole, celery, _, _, insert, _ = found.values()
    limits = [(one + other) / all for one, other, all in zip(celery, insert, whole, strict=True)]
    print(table(rows, markdown=markdown))
    share = f"{median(limits):.2f} of a task's time ({spread(limits, '.2f')})"
    print(f"\nCelery, kombu, the context and that INSERT take {share}.")


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=9, help="times that each is measured; default 9")
    parser.add_argument("--messages", type=positive, default=500, help="in each; default 500")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    with our_server() as (broker, folder):
        measure(broker, folder, arguments.rounds, arguments.messages, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
