"""The example from start to stop, as one command: ``python -m async_batch.run``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console

from async_batch.children import running_provider
from async_batch.database import create_database, load_prompts
from rhesis_tasks.embedded import embedded_postgres
from rhesis_tasks.errors import RhesisTasksError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; 0 if all that it claims was true."""
    options = _parsed(arguments)
    console = Console(highlight=False)
    started = time.monotonic()
    _stop_in_order()
    try:
        try:
            succeeded = _run(options, console)
        finally:
            console.print("Everything that was started is stopped.")
    except KeyboardInterrupt:
        return 130
    except (RhesisTasksError, TimeoutError) as error:
        print(f"async_batch: {error}", file=sys.stderr)
        return 1
    console.print(f"{time.monotonic() - started:.0f} seconds in all.")
    return 0 if succeeded else 1


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m async_batch.run", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="how many each of two tenants has (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides which prompts fail, and how often (%(default)s)")
    middle = parser.add_mutually_exclusive_group()
    for name, meaning in (
        ("kill", "kill -9 the worker in the middle, and start another (the default)"),
        ("abort", "ask a task to stop early in the middle, and launch it again"),
        ("nothing", "let it run undisturbed"),
    ):
        middle.add_argument(f"--{name}", dest="disturbance", action="store_const", const=name, help=meaning)
    parser.set_defaults(disturbance="kill")
    given = parser.parse_args(arguments)
    if not 1 <= given.prompts <= 10_000:
        parser.error("--prompts is a number from 1 to 10000")
    return given


def _run(options: argparse.Namespace, console: Console) -> bool:
    console.print("Creating roles, tables and prompts on an embedded PostgreSQL 18 ...")
    with embedded_postgres() as server_url:
        database = create_database(server_url)
        load_prompts(database, options.prompts)
        with running_provider(options.seed) as provider_url:
            # What the shell happens to have set is not for this application.
            shell = ("BROKER_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "RHESIS_TASKS_SCHEMA")
            os.environ |= {**dict.fromkeys(shell, ""), "DATABASE_URL": database.url, "PROVIDER_URL": provider_url}
            from async_batch.scenario import play  # imports the application, which reads the environment

            return play(options.disturbance, options.prompts, options.seed, database, console)


def _stop_in_order() -> None:
    """Let the first Ctrl-C or SIGTERM stop everything, and further ones not break that off."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for each in numbers:
        signal.signal(each, interrupt)


if __name__ == "__main__":
    sys.exit(main())
