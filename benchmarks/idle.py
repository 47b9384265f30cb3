"""What idle workers cost the PostgreSQL broker: transactions a minute, as the server counts them.  See README.md."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import psycopg
from servers import Broker, our_server

from rhesis_tasks.processes import child, python

_HERE: Final = Path(__file__).resolve().parent
_WORKER: Final = (
    *("-m", "celery", "-A", "workload", "worker", "--loglevel", "INFO"),
    *("--pool", "threads", "--concurrency", "4"),
)
_QUIET: Final = ("--without-gossip", "--without-mingle", "--without-heartbeat")
_SETTINGS: Final = {
    "no worker": [],
    "one, without gossip, mingle and heartbeat": [_QUIET],
    "one, as Celery starts it": [()],
    "two, as Celery starts them": [(), ()],
}


def transactions(url: str) -> int:
    """How many the server has committed in this database; each statement of the library is one."""
    with psycopg.connect(url, autocommit=True) as connection:
        [(count,)] = connection.execute(
            "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        ).fetchall()
    return int(count)


def per_minute(broker: Broker, workers: list[tuple[str, ...]], seconds: float, folder: Path) -> float:
    """Transactions a minute while so many workers, started with these options, have nothing to do."""
    settings = {"url": broker.url, "options": {}, "queue": "idle", "folder": str(folder), "messages": 1, "samples": 1}
    with ExitStack() as stack:
        for number, options in enumerate(workers):
            command = python(*_WORKER, *options, "--hostname", f"idle{number}@localhost")
            worker = child("a worker", command, env={"BENCHMARK": json.dumps(settings)}, cwd=_HERE)
            stack.enter_context(worker).wait_for("ready.")
        time.sleep(10)  # until all have greeted each other, and the server has counted it
        before, began = transactions(broker.url), time.monotonic()
        time.sleep(seconds)
        return (transactions(broker.url) - before) / (time.monotonic() - began) * 60


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long each is counted; default 60")
    seconds = parser.parse_args().seconds
    with our_server() as (found, folder):
        print("| Workers | Transactions a minute |\n|---|---:|")
        for name, workers in _SETTINGS.items():
            print(f"| {name} | {per_minute(found, list(workers), seconds, folder):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
