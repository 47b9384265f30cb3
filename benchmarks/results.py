"""What results cost: ours, Celery's database backend and none, by the same broker and real workers.  See README.md."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import psycopg
from arguments import positive
from report import machine
from servers import Broker, started, stoppable
from sqlalchemy import create_engine
from tabular import spread, table

from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import Child, ChildFailedError, child, python
from rhesis_tasks.settings import database_url

_HERE: Final = Path(__file__).resolve().parent
_WORKER: Final = (
    *("-m", "celery", "-A", "results_workload", "worker", "--concurrency", "2", "--loglevel", "WARNING"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)
MAKERS: Final = {
    "ours": "rhesis-tasks",
    "celery": "Celery's database backend",
    "celery-same": "the same, with our settings",
    "ours-bare": "rhesis-tasks without a result backend",
    "bare": "Celery without a result backend",
}
"""What the applications are made of; all have our broker."""

_QUEUE: Final = "bench"
_NOBODYS_QUEUE: Final = "nobody"  #: has no worker
_WORKING: Final = ("ours", "celery", "celery-same")  #: those that keep results, and have a worker
_LAUNCHING: Final = ("ours", "ours-bare", "bare")
_LAPS: Final = 10  #: turns of each in a round
_LAUNCHES: Final = 50  #: in a turn
_WARM_UP: Final = 30
_TIMEOUT: Final = 120.0  #: seconds after which something has failed
_SETTINGS: Final = ("BROKER_URL", "CELERY_", "DATABASE_URL", "RHESIS_TASKS_")  #: not the caller's


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int
    samples: int
    tasks: int
    parts: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of one of them in one round."""

    round: int
    maker: str
    figure: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Ours next to another one."""

    name: str
    figure: str
    other: str
    is_rate: bool = False  #: tasks a second; else a time
    target: str = ""


# --- in a process of its own, which launches -------------------------------------------------------------------


class Launcher:
    """Launches the tasks of one application; there is a worker for those that have results."""

    def __init__(self, admin_url: str) -> None:
        import results_workload as workload

        from rhesis_tasks import tenant_scope

        self._workload: Any = workload
        self._maker: str = json.loads(os.environ["BENCHMARK"])["maker"]
        self._admin_url = admin_url
        self._scope = tenant_scope(workload.TENANT) if self._maker.startswith("ours") else nullcontext()
        self._scope.__enter__()
        self._publish(_WARM_UP)
        if self._maker in _WORKING:
            for result in [workload.empty.delay() for _ in range(_WARM_UP)]:
                result.get(timeout=_TIMEOUT)

    def get(self, durations: Sequence[float]) -> tuple[float, ...]:
        """Milliseconds from the end of tasks that take so many seconds until ``get()`` returns."""
        found = []
        for duration in durations:
            ended = self._workload.end.delay(duration).get(timeout=_TIMEOUT)
            found.append((time.time() - ended) * 1000)
        return tuple(found)

    def chord(self, parts: int) -> tuple[float]:
        """Milliseconds from the launch of a chord until its body's result is there."""
        from celery import chord

        work = self._workload
        begin = time.perf_counter()
        result = chord([work.empty.s() for _ in range(parts)], work.total.s()).apply_async()
        if result.get(timeout=_TIMEOUT) != parts:
            raise RuntimeError("the chord's body did not get the results of all parts")
        return ((time.perf_counter() - begin) * 1000,)

    def launch(self, count: int) -> tuple[float]:
        """Microseconds for one launch of a task that nobody runs."""
        begin = time.perf_counter()
        self._publish(count)
        took = time.perf_counter() - begin
        with self._workload.app.connection_for_write() as connection:
            connection.default_channel.queue_purge(_NOBODYS_QUEUE)
        return (took / count * 1e6,)

    def _publish(self, count: int) -> None:
        for _ in range(count):
            self._workload.empty.apply_async(queue=_NOBODYS_QUEUE)

    def tasks(self, count: int) -> tuple[float, float]:
        """Tasks a second, from the first launch until all results are stored; and until all are read as well."""
        begin = time.perf_counter()
        results = [self._workload.empty.delay() for _ in range(count)]
        self._wait_until_stored([result.id for result in results])
        stored = time.perf_counter()
        for result in results:
            result.get(timeout=_TIMEOUT)
        read = time.perf_counter()
        return count / (stored - begin), count / (read - begin)

    def _wait_until_stored(self, ids: list[str]) -> None:
        deadline = time.monotonic() + _TIMEOUT
        # By the primary key of ours, as by that of Celery's: what looks must not slow down what it looks at.
        table = (
            f"rhesis_tasks.task_record WHERE organization_id = '{self._workload.TENANT.organization_id}' AND state"
            if self._maker == "ours"
            else "celery_taskmeta WHERE lower(status)"
        )
        query = f"SELECT count(*) FROM {table} = 'success' AND task_id = ANY(%s)"  # noqa: S608
        with psycopg.connect(self._admin_url, autocommit=True) as connection:
            while connection.execute(query.encode(), (ids,)).fetchone() != (len(ids),):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {_TIMEOUT:g} seconds for the results")
                time.sleep(0.02)


def _serve(admin_url: str, pipe: Connection) -> None:
    """Say that it is ready, or why not; then measure what is asked for."""
    try:
        launcher = Launcher(admin_url)
        pipe.send(())
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                figure, argument = pipe.recv()
                pipe.send(getattr(launcher, figure)(argument))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class _Process:
    """A process with a Launcher."""

    def __init__(self, environment: Mapping[str, str], admin_url: str, worker: Child | None) -> None:
        self._worker = worker
        self._pipe, theirs = multiprocessing.Pipe()
        spawning = multiprocessing.get_context("spawn")
        self._process = spawning.Process(target=_serve, args=(admin_url, theirs), daemon=True)
        os.environ.update(environment)
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self, figure: str, argument: Any) -> tuple[float, ...]:
        self._pipe.send((figure, argument))
        return self._answer()

    def _answer(self) -> tuple[float, ...]:
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = "the launching process ended"
        if isinstance(answer, str):
            said = self._worker.output[-2000:] if self._worker else ""
            raise ChildFailedError(f"{answer}\n{said}")
        found: tuple[float, ...] = answer
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# --- all of them -----------------------------------------------------------------------------------------------


@contextmanager
def processes(broker: Broker) -> Iterator[dict[str, _Process]]:
    """Workers and launchers of all makers, each with a database of its own on one server.

    They log in as a role that neither owns our tables nor passes by their row-level security.
    """
    names = {maker: maker.replace("-", "_") for maker in MAKERS}
    with psycopg.connect(broker.url, autocommit=True) as connection:
        password = database_url(broker.url).password
        connection.execute(f"CREATE ROLE bench_app LOGIN PASSWORD '{password}'".encode())
        for name in names.values():
            if name != "ours":  # which is there already
                connection.execute(f"CREATE DATABASE {name}".encode())
    with ExitStack() as stack:
        found = {}
        for maker in MAKERS:
            admin = database_url(broker.url).set(database=names[maker])
            engine = create_engine(admin)
            create_schema(engine, roles=["bench_app"])
            with engine.begin() as connection:
                connection.exec_driver_sql("GRANT CREATE ON SCHEMA public TO bench_app")  # for Celery's tables
            engine.dispose()
            url = admin.set(drivername="postgresql", username="bench_app").render_as_string(hide_password=False)
            environment = {"BENCHMARK": json.dumps({"maker": maker, "url": url, "queue": _QUEUE})}
            worker = None
            if maker in _WORKING:
                command = python(*_WORKER, "--hostname", f"{maker}@localhost")
                worker = stack.enter_context(child("a worker", command, env=environment, cwd=_HERE))
            admin_url = admin.set(drivername="postgresql").render_as_string(hide_password=False)
            found[maker] = _Process(environment, admin_url, worker)
            stack.callback(found[maker].close)
        yield found


def measure(found: Mapping[str, _Process], round: int, settings: Settings) -> list[Measurement]:
    """One round, in which they take turns with each figure; in every other one, the other way round."""
    chance = random.Random(round)  # noqa: S311  # no secret
    order = _WORKING[:: 1 if round % 2 else -1]
    durations = [chance.uniform(0.05, 1.05) for _ in range(settings.samples)]  # Celery asks twice a second
    measurements = []

    def each(figure: str, argument: Any, method: str) -> None:
        for maker in order:
            measurements.append(Measurement(round, maker, figure, found[maker].measure(method, argument)))

    each("get-empty", [0.0] * settings.samples, "get")
    each("get-longer", durations, "get")
    each("chord", settings.parts, "chord")
    for maker in order:
        stored, read = found[maker].measure("tasks", settings.tasks)
        measurements += [Measurement(round, maker, "stored", (stored,)), Measurement(round, maker, "read", (read,))]
    launches: dict[str, list[float]] = {maker: [] for maker in _LAUNCHING}
    for lap in range(_LAPS):
        for maker in _LAUNCHING[:: 1 if (round + lap) % 2 else -1]:
            launches[maker] += found[maker].measure("launch", _LAUNCHES)
    measurements += [Measurement(round, maker, "launch", (median(times),)) for maker, times in launches.items()]
    return measurements


# --- what they say ---------------------------------------------------------------------------------------------

_LATENCIES: Final = {"get-empty": "an empty task", "get-longer": "a task of 50 to 1050 ms"}
_ROWS: Final = (
    Row("chord, ms", "chord", "celery", target="3x"),
    Row("chord, ms", "chord", "celery-same"),
    Row("tasks/s until all results are stored", "stored", "celery", is_rate=True, target="1.5x"),
    Row("tasks/s until all results are stored", "stored", "celery-same", is_rate=True),
    Row("tasks/s until all results are read", "read", "celery", is_rate=True),
    Row("tasks/s until all results are read", "read", "celery-same", is_rate=True),
    Row("launch, us", "launch", "ours-bare", target="1/1.5 = 0.67x"),
    Row("launch, us", "launch", "bare"),
)


def ratios(measurements: Sequence[Measurement], row: Row) -> list[float]:
    """How many times better ours is, in each round."""
    found = []
    for round in sorted({each.round for each in measurements}):
        own = [each for each in measurements if each.round == round]
        [ours], [theirs] = _values(own, "ours", row.figure), _values(own, row.other, row.figure)
        found.append(ours / theirs if row.is_rate else theirs / ours)
    return found


def _values(measurements: Sequence[Measurement], maker: str, figure: str) -> list[float]:
    return [value for each in measurements if (each.maker, each.figure) == (maker, figure) for value in each.values]


def _latency_rows(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    rows = [("From a task's end until get() returns, ms", "p50", "p95", "longest", "p50 of the rounds")]
    for figure, name in _LATENCIES.items():
        for maker in _WORKING:
            own = [each for each in measurements if (each.maker, each.figure) == (maker, figure)]
            values = _values(own, maker, figure)
            p95 = quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]
            figures = [f"{value:.1f}" for value in (median(values), p95, max(values))]
            rows.append((f"{name}: {MAKERS[maker]}", *figures, spread([median(each.values) for each in own], ".1f")))
    return rows


def _comparison_rows(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    rows = [("Figure, next to", "ours", "theirs", "ours is", "from - to", "target")]
    for row in _ROWS:
        ours, theirs = (median(_values(measurements, maker, row.figure)) for maker in ("ours", row.other))
        found = ratios(measurements, row)
        name = f"{row.name}: {MAKERS[row.other]}"
        rows.append((name, f"{ours:,.0f}", f"{theirs:,.0f}", f"{median(found):.2f}x", spread(found, ".2f"), row.target))
    return rows


def _about(settings: Settings, facts: Mapping[str, Any]) -> str:
    return (
        f"{settings.rounds} rounds of {settings.samples} get() of each kind, a chord of {settings.parts}, "
        f"{settings.tasks} tasks, and {_LAPS} times {_LAUNCHES} launches; {facts['cores']} cores, load {facts['load']} "
        f"before, {facts['load_after']} after; 8 kB written and flushed in {facts['flush_us']} us; Python "
        f"{facts['python']}, Celery {facts['celery']}, kombu {facts['kombu']}, psycopg {facts['psycopg']}, SQLAlchemy "
        f"{facts['sqlalchemy']}, PostgreSQL {facts['servers']['ours']}"
    )


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command; returns 1 if PostgreSQL cannot be started."""
    options = _options()
    settings = Settings(options.rounds, options.samples, options.tasks, options.parts)
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]
    measurements = []
    with stoppable(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rhesis-bench-")))
        broker = next(iter(started(["ours"], stack, folder)))
        if not isinstance(broker, Broker):
            print(f"PostgreSQL could not be started: {broker[1]}", file=sys.stderr)
            return 1
        facts = machine({"ours": broker.version})
        found = stack.enter_context(processes(broker))
        for round in range(1, settings.rounds + 1):
            measurements += measure(found, round, settings)
            print(f"round {round} of {settings.rounds}", file=sys.stderr, flush=True)
        facts["load_after"] = float(f"{os.getloadavg()[0]:.2f}")
    print(table(_latency_rows(measurements), markdown=options.markdown), end="\n\n")
    print(table(_comparison_rows(measurements), markdown=options.markdown))
    print(f"\n{_about(settings, facts)}")
    if options.json:
        everything = {
            "settings": asdict(settings),
            "machine": facts,
            "measurements": [asdict(each) for each in measurements],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="times that each is measured; default 5")
    parser.add_argument("--samples", type=positive, default=20, help="get() of each kind in each; default 20")
    parser.add_argument("--tasks", type=positive, default=500, help="launched and run in each; default 500")
    parser.add_argument("--parts", type=positive, default=100, help="of the chord; default 100")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
