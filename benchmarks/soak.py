"""What grows while workers run for a long time under steady load: memory, files, connections, tables.  See README.md.

Two workers stay, with the pools prefork and threads; a third one is replaced every minute, stopped and killed in turn.
``soak_workload.py`` has the tasks and the publisher, ``soaked.py`` says what is told of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import psycopg
from arguments import positive
from report import machine
from servers import Broker, our_server
from soaked import Samples, plot, shown

from rhesis_tasks.postgres.engines import new_engine
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import Child, ChildFailedError, child, python
from rhesis_tasks.settings import database_url

_HERE: Final = Path(__file__).resolve().parent
_EVERY: Final = 3.0  # seconds between two samples
_REPLACE_EVERY: Final = 60.0  # seconds
_WORKER: Final = (
    *("-c", "from rhesis_tasks.cli import main; main()", "worker", "-A", "soak_workload", "--concurrency", "2"),
    *("--loglevel", "WARNING"),
    *("--max-tasks-per-child", "1000000"),  # a new process would hide what the old one has gathered
)
_SIZES: Final = """
    SELECT relname, pg_table_size(oid), pg_indexes_size(oid) FROM pg_class
    WHERE relnamespace = 'rhesis_tasks'::regnamespace AND relkind = 'r'
"""
_DEAD: Final = "SELECT relname, n_dead_tup FROM pg_stat_user_tables WHERE schemaname = 'rhesis_tasks'"
_COUNTS: Final = """
    SELECT (SELECT count(*) FROM rhesis_tasks.message WHERE due_at IS NULL),
           (SELECT count(*) FROM rhesis_tasks.message WHERE due_at IS NOT NULL),
           (SELECT count(*) FROM rhesis_tasks.task_record),
           (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid())
"""
_LAUNCHED: Final = "SELECT last_value FROM rhesis_tasks.message_id"


class Soak:
    """The processes, and how they are."""

    def __init__(self, broker: Broker, stack: ExitStack, *, collect: bool) -> None:
        self._admin = stack.enter_context(psycopg.connect(broker.url, autocommit=True))
        settings = {"url": _application_url(broker, self._admin), "collect": collect}
        self._environment = {"BENCHMARK": json.dumps(settings)}
        self._stack = stack
        self._staying = {
            "prefork worker": self._worker("prefork"),
            "threads worker": self._worker("threads"),
        }
        self._passing = self._worker("threads")
        self.replaced = 0

    def publish(self, rate: float) -> None:
        """Begin."""
        command = python("soak_workload.py", str(rate))
        publisher = child("the publisher", command, env=self._environment, cwd=_HERE)
        self._staying["publisher"] = self._stack.enter_context(publisher)

    def _worker(self, pool: str) -> Child:
        command = python(*_WORKER, "--pool", pool, "--hostname", f"{pool}-{time.monotonic_ns()}@localhost")
        return self._stack.enter_context(child(f"{pool} worker", command, env=self._environment, cwd=_HERE))

    def replace(self) -> None:
        """Stop one of the workers in order, or kill it, and start another one."""
        self.replaced += 1
        if self.replaced % 2:
            self._passing.stop()
        else:
            with suppress(ProcessLookupError):
                os.killpg(self._passing.process.pid, signal.SIGKILL)
            self._passing.stop()
        self._passing = self._worker("threads")

    def sample(self) -> dict[str, float]:
        """All figures, by their names.

        Raises:
            ChildFailedError: a process that shall stay has ended.
        """
        found: dict[str, float] = {}
        for name, process in self._staying.items():
            if not process.running:
                raise ChildFailedError(f"{name} ended:\n{process.output[-2000:]}")
            memory, files = _processes(process.process.pid)
            found |= {f"{name}: memory": memory, f"{name}: files": files}
        for table, size, indexes in self._admin.execute(_SIZES):
            found |= {f"{table}: size": size, f"{table}: indexes": indexes}
        found |= {f"{table}: dead rows": count for table, count in self._admin.execute(_DEAD)}
        (counts,) = self._admin.execute(_COUNTS).fetchall()
        names = ("messages: waiting or claimed", "messages: delayed", "task records", "server connections")
        return found | dict(zip(names, counts, strict=True))

    def messages(self) -> int:
        """How many there were so far."""
        (row,) = self._admin.execute(_LAUNCHED).fetchall()
        return int(row[0])

    def outcomes(self) -> dict[str, int]:
        """How many records there are in each state, and how many dead letters."""
        states: dict[str, int] = dict(
            self._admin.execute("SELECT state, count(*) FROM rhesis_tasks.task_record GROUP BY state").fetchall()
        )
        (row,) = self._admin.execute("SELECT count(*) FROM rhesis_tasks.dead_letter").fetchall()
        return states | {"dead letters": row[0]}


def _application_url(broker: Broker, admin: psycopg.Connection[Any]) -> str:
    """A login that row-level security holds for, with the library's tables."""
    url = database_url(broker.url)
    admin.execute(f"CREATE ROLE soak_app LOGIN PASSWORD '{url.password}'".encode())
    engine = new_engine(url)
    create_schema(engine, roles=["soak_app"])
    engine.dispose()
    return url.set(drivername="postgresql", username="soak_app").render_as_string(hide_password=False)


def _processes(session: int) -> tuple[int, int]:
    """Bytes of memory and open files of all processes that a child has started, itself included."""
    memory = files = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                memory += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                files += len(os.listdir(folder / "fd"))
    return memory, files


def measure(broker: Broker, seconds: float, rate: float, *, collect: bool) -> tuple[Samples, dict[str, Any]]:
    """Load for so many seconds; returns the samples, and facts about them."""
    samples = Samples()
    with ExitStack() as stack:
        soak = Soak(broker, stack, collect=collect)
        soak.publish(rate)
        began, replace_at = time.monotonic(), _REPLACE_EVERY
        while (now := time.monotonic() - began) < seconds:
            samples.add(now, soak.sample())
            if now >= replace_at:
                soak.replace()
                replace_at += _REPLACE_EVERY
            print(f"\r{now:5.0f} s, {soak.messages():,} messages", end="", file=sys.stderr, flush=True)
            time.sleep(max(0.0, _EVERY - (time.monotonic() - began - now)))
        print(file=sys.stderr)
        facts = {"messages": soak.messages(), "replaced": soak.replaced, "records at the end": soak.outcomes()}
    return samples, facts


def main() -> int:
    """Run the command; returns 1 if something grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=positive, default=600, help="of load; default 600")
    parser.add_argument("--rate", type=positive, default=40, help="launches a second; default 40")
    parser.add_argument("--collect", action="store_true", help="let workers collect garbage every 5 seconds")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG; needs matplotlib")
    arguments = parser.parse_args()
    with our_server() as (broker, _):
        facts = machine({broker.name: broker.version})
        samples, more = measure(broker, arguments.seconds, arguments.rate, collect=arguments.collect)
    facts |= {"seconds": arguments.seconds, "rate": arguments.rate, **more}
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "samples": samples.all}, indent=1) + "\n")
    text, grown = shown(samples, markdown=arguments.markdown)
    print(text)
    print("\nGrows: " + (", ".join(grown) if grown else "nothing"))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if arguments.plot:
        plot(samples, arguments.plot)
    return 1 if grown else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
