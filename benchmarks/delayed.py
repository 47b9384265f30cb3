"""What it costs the PostgreSQL broker that very many messages are delayed.  See README.md."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import psycopg
from arguments import positive
from celery import Celery
from servers import Broker, our_server
from stage import Stage
from tabular import table

from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.engines import new_engine
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import Child, wait_until
from rhesis_tasks.settings import database_url, rendered

_QUEUE: Final = "tasks"
_BATCH: Final = 32
_AT_ONCE: Final = 1000  # how many a worker promotes in one statement
_SAMPLES: Final = 200  # delayed tasks of each worker
_OVER: Final = 10.0  # seconds in which they come to be due

# As publish() stores them, about 800 bytes; none is due while this runs.
_DELAY: Final = """
    INSERT INTO rhesis_tasks.message (queue, tenant, task_id, task_name, not_before, due_at, envelope, body)
    SELECT %(queue)s, 'acme', md5(n::text), 'shop.work', at, at, json_build_object('headers', x || x || x),
           convert_to(x || x || x, 'UTF8')
    FROM (SELECT n, clock_timestamp() + interval '1 day' + random() * interval '30 days' AS at,
                 md5(random()::text) || md5(random()::text) || md5(random()::text) || md5(random()::text) AS x
          FROM generate_series(1, %(count)s) n) m
"""
_MAKE_DUE: Final = """
    INSERT INTO rhesis_tasks.message (queue, due_at, envelope, body)
    SELECT %s, clock_timestamp() - interval '1 second', '{}', convert_to(repeat('b', 500), 'UTF8')
    FROM generate_series(1, %s)
"""
_SCANS: Final = """
    SELECT (SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE relname = 'message'),
           (SELECT sum(idx_scan) FROM pg_stat_user_indexes WHERE indexrelname = 'message_next')
"""
_CLAIM_PAGES: Final = """
    EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM rhesis_tasks.claim(
        1, '{}', '{}', ARRAY['tasks'], 32, '{}', 0, true, 5, 30, '{NULL}', '{NULL}', '{NULL}')
"""


class Side:
    """A database with so many delayed messages, and what was measured in it.

    Args:
        url: the database's, a new one.
        delayed: how many.
        stack: closes what is opened.
    """

    def __init__(self, url: str, delayed: int, stack: ExitStack) -> None:
        self.url = url
        engine = new_engine(url)
        create_schema(engine)
        engine.dispose()
        connection = Connection(database_url(url), name="delayed")
        stack.callback(connection.close)
        self._queue = MessageQueue(connection, "rhesis_tasks")
        self._queue.declare_queue(_QUEUE)
        self._consumer = self._queue.new_consumer()
        self._owner = stack.enter_context(psycopg.connect(url, autocommit=True))
        self.spent: defaultdict[str, list[float]] = defaultdict(list)  #: milliseconds of each operation
        self.late: list[float] = []  #: seconds from when a task was due until it started
        self.memory: list[int] = []  #: kB of a worker
        self.scans = (0, 0)
        began = time.perf_counter()
        self._owner.execute(_DELAY, {"queue": _QUEUE, "count": delayed})
        self.seconds = time.perf_counter() - began
        self._last = self._value("SELECT coalesce(max(id), 0) FROM rhesis_tasks.message")
        self._owner.execute("VACUUM ANALYZE rhesis_tasks.message")
        self._owner.execute("SET enable_seqscan = off")  # what is counted is the library's
        self.size = self._value("SELECT pg_total_relation_size('rhesis_tasks.message')")
        self._scans_before = self._scans()

    def _value(self, query: str) -> Any:
        row = self._owner.execute(query.encode()).fetchone()
        return row[0] if row else None

    def _scans(self) -> tuple[int, int]:
        sequential, by_index = self._owner.execute(_SCANS).fetchone() or (0, 0)
        return int(sequential or 0), int(by_index or 0)

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        self.spent[name].append(1000 * (time.perf_counter() - began))
        return found

    def turn(self) -> None:
        """Everything once, and the tables are as they were."""
        queue = self._queue
        for _ in range(_BATCH):
            self._timed("publish", lambda: queue.publish("", _QUEUE, "{}", b"b" * 500))
            self._timed("publish, delayed", lambda: queue.publish("", _QUEUE, "{}", b"b" * 500, delay=86_400))
        found, _ = self._timed(f"claim {_BATCH}", lambda: queue.claim(self._consumer, [_QUEUE], _BATCH, has_none=True))
        if len(found) != _BATCH:
            raise RuntimeError(f"{len(found)} messages were claimed, not {_BATCH}")
        queue.ack([(each.id, each.token) for each in found])
        self._timed("claim, nothing waits", lambda: queue.claim(self._consumer, [_QUEUE], _BATCH, has_none=True))
        self._timed("promote, none is due", lambda: queue.promote(_AT_ONCE))
        self._owner.execute(_MAKE_DUE, (_QUEUE, _AT_ONCE))
        self._timed(f"promote {_AT_ONCE:,}", lambda: queue.promote(_AT_ONCE))
        if (size := queue.size(_QUEUE)) != _AT_ONCE:
            raise RuntimeError(f"{size} messages were promoted, not {_AT_ONCE}")
        self._timed("life sign, with sweep", lambda: queue.tend(self._consumer, 5.0))
        self._timed("queue sizes, for metrics", queue.stats)
        self._owner.execute("DELETE FROM rhesis_tasks.message WHERE id > %s", (self._last,))

    def pages(self) -> int:
        """How many pages a claim looks at, where nothing waits."""
        self._owner.execute("VACUUM rhesis_tasks.message")
        plan = self._value(_CLAIM_PAGES)[0]["Plan"]
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    def count_scans(self) -> None:
        """Find out how often the table and the index of claims were walked since it was filled."""
        time.sleep(1.5)  # the server's counters are late by a second
        self._queue.connection.close()
        time.sleep(0.5)
        now = self._scans()
        self.scans = (now[0] - self._scans_before[0], now[1] - self._scans_before[1])

    def work(self, folder: Path) -> None:
        """Let a worker run tasks that come to be due, and look at its memory."""
        folder.mkdir()
        stage = Stage(Broker("ours", self.url, ""), _QUEUE, folder, 60)
        app = Celery("delayed", broker=self.url, set_as_current=False)
        with stage.worker() as worker, app:
            app.send_task("stamp", [time.time(), False], queue=_QUEUE)
            wait_until("the first task", lambda: not self._value("SELECT count(*) FROM rhesis_tasks.message "
                                                                 "WHERE due_at IS NULL"), 60)  # fmt: skip
            for number in range(_SAMPLES):
                delay = 1 + _OVER * number / _SAMPLES
                app.send_task("stamp", [time.time() + delay, True], queue=_QUEUE, countdown=delay)
            stage.wait_for_notes("latencies", _SAMPLES, [worker])
            self.memory.append(_memory(worker))
        self.late += [note.value for note in stage.notes("latencies").all()]


def _memory(worker: Child) -> int:
    """The resident memory of a process, in kB."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def measure(url: str, count: int, rounds: int, folder: Path, markdown: bool) -> None:
    """Two databases, one without delayed messages, in turn; prints a table."""
    with ExitStack() as stack:
        with psycopg.connect(url, autocommit=True) as connection:
            for name in ("none", "many"):
                connection.execute(f"CREATE DATABASE {name}".encode())
        none, many = (
            Side(rendered(database_url(url).set(drivername="postgresql", database=name)), delayed, stack)
            for name, delayed in (("none", 0), ("many", count))
        )
        print(f"{count:,} messages were inserted in {many.seconds:.0f} s; the table and its indexes have "
              f"{many.size / 2**20:,.0f} MB, {many.size / count:,.0f} bytes for each", flush=True)  # fmt: skip
        for number in range(rounds):
            for side in (none, many) if number % 2 else (many, none):
                side.turn()
        pages = [side.pages() for side in (none, many)]
        for side in (none, many):
            side.count_scans()
        for number in range(4):
            side = (none, many)[number in (1, 2)]
            side.work(folder / f"work-{number}")
        rows = [("milliseconds", "none delayed", f"{count:,}")]
        rows += [
            (name, *(f"{statistics.median(side.spent[name]):.2f}" for side in (none, many))) for name in none.spent
        ]
        print(f"\n{table(rows, markdown=markdown)}\n")
        rows = [("of a worker", "none delayed", f"{count:,}")]
        for name, value in (("median", statistics.median), ("longest", max)):
            rows.append((f"ms from due to start, {name}", *(f"{1000 * value(side.late):.0f}" for side in (none, many))))
        rows.append(("resident memory, MB", *(f"{statistics.mean(p.memory) / 1024:.1f}" for p in (none, many))))
        rows.append(("pages that a claim looks at", *map(str, pages)))
        rows.append(("scans of the table, all in all", *(str(side.scans[0]) for side in (none, many))))
        rows.append(("scans of message_next", *(str(side.scans[1]) for side in (none, many))))
        print(table(rows, markdown=markdown))


def main() -> None:
    """Start a server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=positive, default=1_000_000, help="how many are delayed; default 1000000")
    parser.add_argument("--rounds", type=positive, default=30, help="default 30")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    arguments = parser.parse_args()
    with our_server() as (found, folder):
        measure(found.url, arguments.messages, arguments.rounds, folder, arguments.markdown)


if __name__ == "__main__":
    main()
