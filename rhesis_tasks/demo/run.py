"""The demo from start to stop, saying what it does while it does it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..display import progress_text
from ..settings import database_url, redacted
from .checks import claims
from .client import Account, Launched, Outcome, Watched, follow, watch
from .database import DemoDatabase, demo_database
from .example import DemoUser, Running, example_folder, load, migrate, running_example, users_of

__all__ = ["DemoOptions", "run_demo", "shown"]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo can be told."""

    input: Path | None = None  #: a JSON Lines file of the user's own
    data_dir: Path | None = None  #: keep the embedded server's data here
    keep: bool = False  #: leave everything running until Ctrl-C


def run_demo(options: DemoOptions, console: Console) -> bool:
    """Run the demo.

    Returns:
        Whether all that it claims was true.

    Raises:
        DemoError, DatabaseUnavailableError, ChildFailedError: it could not go on; everything is stopped.
        KeyboardInterrupt: Ctrl-C; everything is stopped.
    """
    started = time.monotonic()
    file = options.input or example_folder() / "data" / "test_sets.jsonl"
    own_url = os.environ.get("DATABASE_URL") or None
    with _orderly_stop(), _stopping(console):
        where = f"in {redacted(database_url(own_url))}" if own_url else "on an embedded PostgreSQL 18"
        console.print(f"Creating an application role and schemas {escape(where)} ...")
        with demo_database(own_url, options.data_dir) as database:
            console.print("Creating the example's tables, with row-level security ...")
            migrate(database)
            console.print(f"Loading {escape(str(file))} ...")
            console.print(escape(load(database, file).rstrip()), style="dim")
            users = users_of(file)
            console.print("Starting the API and a Celery worker ...")
            with running_example(database, users) as running:
                succeeded = _use(running, users, database, console)
                console.print(f"{time.monotonic() - started:.0f} seconds in all.")
                if options.keep:
                    _keep(running, users, console)
    return succeeded


def _use(running: Running, users: list[DemoUser], database: DemoDatabase, console: Console) -> bool:
    with ExitStack() as stack:
        accounts = [stack.enter_context(Account(running.url, user)) for user in users]
        return _act(accounts, database, console)


def _act(accounts: list[Account], database: DemoDatabase, console: Console) -> bool:
    console.print("Launching runs as users of both organizations ...")
    launched = [account.launch() for account in accounts]
    watched = _follow_all(accounts, launched, console)
    outcomes = list(map(Account.outcome, accounts, launched, watched))
    console.print(_table(outcomes))
    succeeded = True
    for claim, holds in claims(accounts, launched, outcomes, database):
        console.print(f"[green]yes[/]  {escape(claim)}" if holds else f"[red]NO[/]   {escape(claim)}")
        succeeded &= holds
    return succeeded


def _follow_all(accounts: list[Account], launched: list[Launched], console: Console) -> list[Watched]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(2 * len(accounts)) as threads:
        follows, watches = [], []
        for account, other, mine in zip(accounts, reversed(accounts), launched, strict=True):
            bar = progress.add_task(f"tasks of {account.user.id}", total=len(mine.all_tasks))

            def show(done: int, total: int, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, total=total)

            follows.append(threads.submit(follow, account, mine, show))
            watches.append(threads.submit(watch, account, other, mine.slow, shown(progress, account)))
        try:
            for each in follows:
                each.result()
            return [each.result() for each in watches]
        except BaseException:
            for account in accounts:
                account.http.close()  # so that those who still follow end, too
            raise


def shown(progress: Progress, account: Account) -> Callable[[dict[str, Any]], None]:
    """Shows the progress of a user's slow task: as a bar, and where nothing can move a line for each."""
    name = f"slow task of {account.user.id}"
    bar = progress.add_task(name, total=None)

    def show(reported: dict[str, Any]) -> None:
        if not progress.console.is_terminal:
            progress.console.print(f"{name}: {escape(progress_text(**reported))}", highlight=False)
        progress.update(bar, completed=reported["done"], total=reported["total"])

    return show


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("tenant", "user", "launched", "succeeded", "failed", "retried", "tests passed")
    for outcome in outcomes:
        passed = sum(report["passed"] for report in outcome.reports)
        total = sum(report["total"] for report in outcome.reports)
        table.add_row(
            f"{outcome.user.organization_id[:8]}...",
            outcome.user.id,
            str(len(outcome.statuses)),
            str(outcome.count("success")),
            str(outcome.count("failure")),
            str(outcome.retried),
            f"{passed} of {total}",
        )
    return table


def _keep(running: Running, users: list[DemoUser], console: Console) -> None:
    console.print(f"\nThe API is at {running.url} (its documentation at {running.url}/docs).  For example:")
    for user in users:
        console.print(
            f"  curl -H 'Authorization: Bearer {user.token}' {running.url}/test-sets",
            soft_wrap=True,
            highlight=False,
        )
    console.print("Ctrl-C stops everything.")
    threading.Event().wait()


# --- stopping ----------------------------------------------------------------------------------------------------


@contextmanager
def _stopping(console: Console) -> Iterator[None]:
    """Say so while everything is stopped.  (Outermost, so that it speaks before and after.)"""
    try:
        yield
    finally:
        console.print("Everything that was started is stopped.")


@contextmanager
def _orderly_stop() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the demo; further ones cannot break off the cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
