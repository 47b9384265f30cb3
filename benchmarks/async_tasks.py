"""What it costs that a task is ``async def``, next to others' ways to await something in a task.  See README.md."""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import async_worked
from arguments import positive
from celery import Celery
from celery.utils.imports import symbol_by_name
from kombu.message import Message
from report import machine
from servers import stoppable
from tabular import spread, table

from rhesis_tasks import BaseTask, TenantContext, configure, current_tenant, tenant_scope
from rhesis_tasks.processes import ChildFailedError

_PACKAGES: Final = ("asgiref", "uvloop")
_SETTINGS: Final = ("BROKER_URL", "CELERY_", "DATABASE_URL", "RHESIS_TASKS_")  #: not the caller's
_TENANT: Final = TenantContext("0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c11", "0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c12")
_LAPS: Final = 15  #: turns of each in a round, with empty tasks
_AWAITS, _LIMIT, _SECONDS = 500, 100, 0.05  #: of a batch of awaits: how many, how many at once, and how long each is
_IDEAL: Final = _AWAITS / _LIMIT * _SECONDS * 1e6

_WORKED_ROUNDS: Final = 5  #: at most, with a worker
_WORKED: Final = 4  #: how many times more tasks a worker runs at a time

Key: TypeAlias = tuple[str, str]
"""What the tasks are made by, and how they await."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way in one round, in microseconds for each task."""

    round: int
    maker: str
    way: str
    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One way over all rounds: medians, in microseconds for each task.

    Ratios are medians of the quotients to what it is compared with, each within one round, with the least and the most.
    """

    maker: str
    way: str
    cpu: float
    cpu_ratio: tuple[float, float, float]
    wall: float
    wall_ratio: tuple[float, float, float]


# --- the ways --------------------------------------------------------------------------------------------------

Body: TypeAlias = Callable[[], Any]
Awaits: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def _awaiting(function: Awaits) -> Body:
    return function


def _by_asyncio_run(function: Awaits) -> Body:
    def body() -> None:
        asyncio.run(function())

    return body


def _by_async_to_sync(function: Awaits) -> Body:
    from asgiref.sync import async_to_sync

    def body() -> None:
        async_to_sync(function)()

    return body


def _synchronous(_: Awaits) -> Body:
    def body() -> None:
        pass

    return body


async def _empty() -> None:
    pass


async def _gathered() -> None:
    """A batch of awaits as one writes it without us."""
    semaphore = asyncio.Semaphore(_LIMIT)

    async def one() -> None:
        async with semaphore:
            await asyncio.sleep(_SECONDS)

    await asyncio.gather(*(one() for _ in range(_AWAITS)))


async def _batched() -> None:
    """The same by the running task."""
    task: Any = _running[-1]
    async for outcome in task.batch(lambda _: asyncio.sleep(_SECONDS), range(_AWAITS), limit=_LIMIT):
        outcome.value()


_running: Final[list[Any]] = []  # the task that is measured

MAKERS: Final = {"ours": "BaseTask", "uvloop": "BaseTask, uvloop", "celery": "Celery's Task"}
_FIRST: Final = ("ours", "sync")
_EMPTY: Final[Mapping[Key, tuple[str, Callable[[Awaits], Body], Awaits]]] = {
    _FIRST: ("def", _synchronous, _empty),
    ("ours", "again"): ("def, once more", _synchronous, _empty),
    ("ours", "async"): ("async def", _awaiting, _empty),
    ("uvloop", "async"): ("async def", _awaiting, _empty),
    ("ours", "async_to_sync"): ("async_to_sync()", _by_async_to_sync, _empty),
    ("ours", "run"): ("asyncio.run()", _by_asyncio_run, _empty),
    ("celery", "sync"): ("def", _synchronous, _empty),
    ("celery", "async_to_sync"): ("async_to_sync()", _by_async_to_sync, _empty),
    ("celery", "run"): ("asyncio.run()", _by_asyncio_run, _empty),
}
_BATCHES: Final[Mapping[Key, tuple[str, Callable[[Awaits], Body], Awaits]]] = {
    ("ours", "batch"): ("async def, self.batch()", _awaiting, _batched),
    ("uvloop", "batch"): ("async def, self.batch()", _awaiting, _batched),
    ("ours", "gather"): ("async def, Semaphore and gather()", _awaiting, _gathered),
    ("uvloop", "gather"): ("async def, Semaphore and gather()", _awaiting, _gathered),
    ("ours", "run_gather"): ("asyncio.run(), the same", _by_asyncio_run, _gathered),
    ("ours", "async_to_sync_gather"): ("async_to_sync(), the same", _by_async_to_sync, _gathered),
}
_WAYS: Final = {**_EMPTY, **_BATCHES}


# --- in a process of its own -----------------------------------------------------------------------------------


class Bench:
    """A Celery application whose tasks are published, and run as a worker runs them, in this process.

    Args:
        maker: what its tasks are made by.
    """

    def __init__(self, maker: str) -> None:
        self._app = app = Celery("bench", broker="memory://")
        app.conf.task_ignore_result = True
        self._options: dict[str, Any] = {}
        self._scope: Callable[[], Any] = nullcontext
        if maker != "celery":
            configure(app, event_loop="uvloop" if maker == "uvloop" else "asyncio")
            self._options = {"base": BaseTask}
            self._scope = lambda: tenant_scope(_TENANT)
        self._maker = maker
        self._tasks: dict[str, Any] = {}

    def add(self, way: str) -> None:
        """Make the task of a way, and see that it awaits.

        Raises:
            RuntimeError: it does not, or it has not the context.
        """
        _, body, function = _WAYS[self._maker, way]
        seen: list[object] = []

        async def look() -> None:
            await asyncio.sleep(0)
            seen.append(current_tenant())

        if body is not _synchronous:
            self._run(self._app.task(body(look), name=f"look.{way}", **self._options), 1)
            if seen != [None if self._maker == "celery" else _TENANT]:
                raise RuntimeError(f"the task has seen {seen!r}")
        task = self._app.task(body(function), name=way, **self._options)
        self._tasks[way] = task
        self._run(task, 1 if function is not _empty else 100)  # Python specialises the code that it has run a few times

    def measure(self, way: str, count: int) -> tuple[float, float]:
        """CPU time of this process and time, in microseconds for each of so many tasks."""
        task = self._tasks[way]
        if (self._maker, way) in _EMPTY:
            self._run(task, 10)  # the caches are another's
        return self._run(task, count)

    def _run(self, task: Any, count: int) -> tuple[float, float]:
        with self._scope():
            for _ in range(count):
                task.delay()
        return contextvars.Context().run(self._run_published, task, count)  # in which nothing of the publisher's is set

    def _run_published(self, task: Any, count: int) -> tuple[float, float]:
        messages, app = self._taken(), self._app
        if len(messages) != count:
            raise RuntimeError(f"{count} tasks were published, {len(messages)} arrived")
        request = symbol_by_name(task.Request)  # as a worker does
        _running[:] = [task]
        gc.collect()
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for message in messages:
            request(message, app=app, hostname="bench@localhost").execute()
        cpu, wall = time.process_time() - cpu_begin, time.perf_counter() - begin
        return cpu / count * 1e6, wall / count * 1e6

    def _taken(self) -> list[Message]:
        with self._app.connection_for_read() as connection:
            queue = self._app.amqp.queues[self._app.conf.task_default_queue].bind(connection.default_channel)
            return list(iter(lambda: queue.get(no_ack=True), None))


def _serve(maker: str, pipe: Connection) -> None:
    """Say which ways cannot be measured and why, then measure those that are asked for."""
    missing = {}
    bench = None
    for way in [way for found, way in _WAYS if found == maker]:
        try:
            bench = bench or Bench(maker)
            bench.add(way)
        except Exception as error:
            missing[way] = str(error).strip().partition("\n")[0]
    gc.collect()
    gc.freeze()  # else a collection reads all that was imported, and leaves the caches full of it
    pipe.send(missing)
    with suppress(EOFError, KeyboardInterrupt):
        while bench:
            pipe.send(bench.measure(*pipe.recv()))


# --- all of them -----------------------------------------------------------------------------------------------


class _Process:
    """A process with a Bench."""

    def __init__(self, maker: str) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        spawning = multiprocessing.get_context("spawn")
        self._process = spawning.Process(target=_serve, args=(maker, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.missing: dict[str, str] = self._answer()

    def measure(self, way: str, count: int) -> tuple[float, float]:
        self._pipe.send((way, count))
        found: tuple[float, float] = self._answer()
        return found

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ChildFailedError(f"a process ended with {self._process.exitcode}") from None

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def _processes() -> Iterator[dict[str, _Process]]:
    processes: dict[str, _Process] = {}
    try:
        for maker in MAKERS:
            processes[maker] = _Process(maker)
        yield processes
    finally:
        for process in processes.values():
            process.close()


def measure(round: int, tasks: int) -> tuple[list[Measurement], dict[Key, str]]:
    """One round: new processes, in which the ways take turns; in every other turn, the other way round.

    Returns:
        The measurements, and why others are missing.
    """
    with _processes() as processes:
        missing = {(maker, way): why for maker, each in processes.items() for way, why in each.missing.items()}
        times: dict[Key, list[tuple[float, float]]] = {key: [] for key in _WAYS if key not in missing}
        for lap in range(_LAPS + 1):
            ways, count = (_BATCHES, 1) if lap == _LAPS else (_EMPTY, tasks)
            for key in list(ways)[:: 1 if (round + lap) % 2 else -1]:
                if key in times:
                    times[key].append(processes[key[0]].measure(key[1], count))
    found = [Measurement(round, *key, *map(median, zip(*laps, strict=True))) for key, laps in times.items()]
    return found, missing


def summaries(measurements: Sequence[Measurement], ways: Sequence[Key], base: Key, ideal: float = 0) -> list[Summary]:
    """One for each way that was measured.

    Args:
        measurements: of all rounds.
        ways: those to be compared.
        base: the one that the others are compared with.
        ideal: how long it takes at best, with which the time is compared then.
    """
    bases = {each.round: each for each in measurements if (each.maker, each.way) == base}
    found = []
    for key in ways:
        own = [each for each in measurements if (each.maker, each.way) == key]
        if own:
            found.append(
                Summary(
                    *key,
                    median(each.cpu for each in own),
                    _spread([each.cpu / bases[each.round].cpu for each in own]),
                    median(each.wall for each in own),
                    _spread([each.wall / (ideal or bases[each.round].wall) for each in own]),
                )
            )
    return found


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return median(ratios), min(ratios), max(ratios)


# --- for people ------------------------------------------------------------------------------------------------


def _empty_rows(found: Sequence[Summary]) -> list[tuple[str, ...]]:
    rows = [("An empty task", "CPU us", "ratio", "from - to", "time us", "ratio", "from - to")]
    for each in found:
        is_first = (each.maker, each.way) == _FIRST
        ratios = [("", "") if is_first else _ratio(ratio) for ratio in (each.cpu_ratio, each.wall_ratio)]
        rows.append((_name(each), f"{each.cpu:.1f}", *ratios[0], f"{each.wall:.1f}", *ratios[1]))
    return rows


def _batch_rows(found: Sequence[Summary]) -> list[tuple[str, ...]]:
    rows = [("A batch of awaits", "time ms", "to the ideal", "from - to", "CPU ms")]
    for each in found:
        rows.append((_name(each), f"{each.wall / 1000:.0f}", *_ratio(each.wall_ratio), f"{each.cpu / 1000:.1f}"))
    return rows


def _worked_rows(found: Sequence[Mapping[str, float]]) -> list[tuple[str, ...]]:
    rows = [("An empty task as a worker runs it, with broker and record", "tasks/s", "ratio", "from - to")]
    for kind, name in async_worked.KINDS.items():
        ratios = [each["sync"] / each[kind] for each in found]
        compared = ("", "") if kind == "sync" else (f"{median(ratios):.2f}x", spread(ratios, ".2f"))
        rows.append((f"BaseTask: {name}", f"{median(each[kind] for each in found):.0f}", *compared))
    return rows


def _worked(options: argparse.Namespace) -> list[dict[str, float]]:
    """Nothing, and why, if there is no PostgreSQL."""
    with stoppable(), tempfile.TemporaryDirectory(prefix="rhesis-bench-") as folder:
        try:
            return async_worked.measure(min(options.rounds, _WORKED_ROUNDS), options.tasks * _WORKED, Path(folder))
        except (ChildFailedError, TimeoutError) as error:
            print(f"not measured with a worker: {error}", file=sys.stderr)
            return []


def _name(each: Summary) -> str:
    return _named((each.maker, each.way))


def _named(key: Key) -> str:
    return f"{MAKERS[key[0]]}: {_WAYS[key][0]}"


def _ratio(spread: tuple[float, float, float]) -> tuple[str, str]:
    middle, least, most = spread
    return f"{middle:.2f}x", f"{least:.2f} - {most:.2f}"


def _about(options: argparse.Namespace, facts: Mapping[str, Any]) -> str:
    others = ", ".join(f"{package} {found}" for package, found in facts["packages"].items())
    return (
        f"{options.rounds} rounds: {_LAPS} times {options.tasks} empty tasks; {_AWAITS} awaits of {_SECONDS * 1000:g} "
        f"ms, {_LIMIT} at once, at best {_IDEAL / 1000:g} ms; {facts['cores']} cores, load {facts['load']} before; "
        f"Python {facts['python']}, Celery {facts['celery']}, {others}"
    )


def _facts() -> dict[str, Any]:
    facts = machine({})
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    del facts["servers"], facts["flush_us"]
    return {**facts, "packages": found}


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command; returns 1 if BaseTask could not be measured."""
    options = _options()
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]
    facts = _facts()
    measurements: list[Measurement] = []
    missing: dict[Key, str] = {}
    for round in range(1, options.rounds + 1):
        measured, failed = measure(round, options.tasks)
        measurements += measured
        missing |= failed
        print(f"round {round} of {options.rounds}", file=sys.stderr, flush=True)
        if _FIRST in missing:
            print(f"{_named(_FIRST)}: {missing[_FIRST]}", file=sys.stderr)
            return 1
    empty = summaries(measurements, list(_EMPTY), _FIRST)
    batches = summaries(measurements, list(_BATCHES), _FIRST, _IDEAL)
    print(table(_empty_rows(empty), markdown=options.markdown), end="\n\n")
    print(table(_batch_rows(batches), markdown=options.markdown))
    if worked := _worked(options):
        print(f"\n{table(_worked_rows(worked), markdown=options.markdown)}")
    print("".join(f"\n{_named(key)}: {reason}" for key, reason in missing.items()))
    print(_about(options, facts))
    if options.json:
        everything = {
            "settings": {"rounds": options.rounds, "laps": _LAPS, "tasks": options.tasks},
            "machine": facts,
            "missing": [[*key, reason] for key, reason in missing.items()],
            "summaries": [asdict(each) for each in (*empty, *batches)],
            "measurements": [asdict(each) for each in measurements],
            "worked": worked,
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=15, help="times that each is measured; default 15")
    parser.add_argument("--tasks", type=positive, default=50, help="empty tasks run at a time; default 50")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
