"""What a tenant's transaction costs, next to a plain session and to others' tenant sessions.  See README.md."""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias
from uuid import UUID

from arguments import positive
from report import machine
from round_trips import Relay, relay
from sqlalchemy import Select, make_url
from tenancies import DRIVERS, NAMES, QUERIES, Contender, Query, contender, server_version, set_up, tenants

from rhesis_tasks.embedded import embedded_postgres

_PACKAGES: Final = ("asyncpg", "sqlalchemy-tenants", "rls")
_WARM: Final = 7  #: transactions with each tenant, then with each query: psycopg prepares what it has sent five times
_CHECKED: Final = 3  #: tenants whose rows are looked at before
_COUNTED: Final = 10  #: transactions whose round trips are counted, of each query


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender in one round: the median of its transactions, in microseconds for each query."""

    round: int
    driver: str
    contender: str
    times: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One contender with one query over all rounds: medians, in microseconds for each transaction.

    What is added, and the ratio, are medians of the differences and ratios to the plain session, each within one round.
    """

    time: float
    added: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender with one driver."""

    driver: str
    contender: str
    round_trips: float  #: for each transaction; counted, not timed
    figures: Mapping[str, Figure]


# --- one contender ---------------------------------------------------------------------------------------------


class Runner:
    """Runs a contender's transactions, for one tenant after the other, on a connection of its own.

    Args:
        loop: for asynchronous sessions.
        found: the contender.
        rows: how many the table has.
        owners: the tenants.
    """

    def __init__(self, loop: asyncio.Runner, found: Contender, rows: int, owners: Sequence[UUID]) -> None:
        self._loop, self._contender = loop, found
        self._rows, self._owners = rows, owners
        self._numbers = count()

    def check(self) -> None:
        """Find each tenant's own rows, and no others.

        Raises:
            RuntimeError: they are others.
        """
        tenants = len(self._owners)
        key, total, newest = (self._contender.statement(query) for query in QUERIES)
        for position, owner in enumerate(self._owners[:_CHECKED]):
            ids = range(position or tenants, self._rows + 1, tenants)
            expected = [
                (key, ids[0], [(ids[0] % 997, f"note {ids[0]}")]),
                (key, ids[0] + 1, []),  # the next tenant's
                (total, 0, [(sum(id % 997 for id in ids),)]),
                (newest, 0, [(id, id % 997) for id in ids[:-21:-1]]),
            ]
            for statement, id, rows in expected:
                if self._loop.run(self._found(owner, statement, id)) != rows:
                    raise RuntimeError("it finds other rows than the tenant's")

    def run(self, query: Query, transactions: int) -> None:
        """Run so many."""
        self._loop.run(self._times(query, 0, transactions))

    def warm_up(self) -> None:
        """Let the driver prepare what it prepares, and the server come to its plans."""
        self.run(QUERIES[0], _WARM * len(self._owners))
        for query in QUERIES[1:]:
            self.run(query, _WARM)

    def turn(self, query: Query, seconds: float) -> float:
        """Run transactions for so long; the median of the microseconds that each takes."""
        gc.collect()
        self.run(query, 1)  # the caches are another contender's
        return median(self._loop.run(self._times(query, seconds, 1))) * 1e6

    def close(self) -> None:
        """Close the connection."""
        self._loop.run(_awaited(self._contender.close))

    async def _found(self, owner: UUID, statement: Select[Any], id: int) -> list[tuple[Any, ...]]:
        with self._contender.scope(owner):
            rows = await _awaited(self._contender.transaction, owner, statement, {"id": id, "tenant": owner})
        return [tuple(row) for row in rows]

    async def _times(self, query: Query, seconds: float, least: int) -> list[float]:
        statement, transaction = self._contender.statement(query), self._contender.transaction
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < least or time.perf_counter() < end:
            owner, parameters = self._next()
            with self._contender.scope(owner):
                begin = time.perf_counter()
                await _awaited(transaction, owner, statement, parameters)
                times.append(time.perf_counter() - begin)
        return times

    def _next(self) -> tuple[UUID, dict[str, Any]]:
        """The next tenant, and one of its rows, far from the last."""
        number, tenants = next(self._numbers), len(self._owners)
        row = number * 7919 % (self._rows // tenants - 1) * tenants + number % tenants
        return self._owners[number % tenants], {"id": row or tenants, "tenant": self._owners[number % tenants]}


async def _awaited(function: Callable[..., Any], *args: Any) -> Any:
    result = function(*args)
    return await result if inspect.isawaitable(result) else result


# --- all of them -----------------------------------------------------------------------------------------------

Key: TypeAlias = tuple[str, str]
"""A driver and a contender."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The contenders that are there, and find what they should."""

    runners: Mapping[Key, Runner]
    round_trips: Mapping[Key, float]  #: for each transaction
    missing: Mapping[Key, str]  #: and why

    def measure(self, round: int, seconds: float) -> list[Measurement]:
        """One round: with each query, the contenders take turns; in every other round, the other way round."""
        times: dict[Key, dict[str, float]] = {key: {} for key in self.runners}
        order = list(self.runners)[:: 1 if round % 2 else -1]
        for query in QUERIES:
            for key in order:
                times[key][query.name] = self.runners[key].turn(query, seconds)
        return [Measurement(round, *key, found) for key, found in times.items()]


def ready(make: Callable[[str, str, str | None], Runner], host: str, stack: ExitStack) -> Bench:
    """Connect, check, count the round trips, and let drivers and server prepare what they prepare.

    Args:
        make: a contender by its driver, its name, and the folder of another socket than the server's.
        host: the folder of the server's socket.
        stack: closes the connections.
    """
    runners: dict[Key, Runner] = {}
    round_trips: dict[Key, float] = {}
    missing: dict[Key, str] = {}
    with relay(host) as counting:
        for driver, name in product(DRIVERS, NAMES):
            try:
                with closing(make(driver, name, str(counting.host))) as runner:
                    runner.check()
                    round_trips[driver, name] = _counted(runner, counting)
            except Exception as error:
                missing[driver, name] = str(error).strip().partition("\n")[0]
                continue
            runner = runners[driver, name] = stack.enter_context(closing(make(driver, name, None)))
            runner.warm_up()
    return Bench(runners, round_trips, missing)


def _counted(runner: Runner, counting: Relay) -> float:
    runner.warm_up()
    before = counting.round_trips
    for query in QUERIES:
        runner.run(query, _COUNTED)
    return (counting.round_trips - before) / _COUNTED / len(QUERIES)


def summaries(measurements: Sequence[Measurement], round_trips: Mapping[Key, float]) -> list[Summary]:
    """One for each driver and contender that was measured."""
    plain = {(each.round, each.driver): each.times for each in measurements if each.contender == "plain"}
    found = []
    for driver, name in round_trips:
        own = [each for each in measurements if (each.driver, each.contender) == (driver, name)]
        figures = {}
        for query in QUERIES:
            pairs = [(each.times[query.name], plain[each.round, driver][query.name]) for each in own]
            figures[query.name] = Figure(
                median(time for time, _ in pairs),
                median(time - base for time, base in pairs),
                median(time / base for time, base in pairs),
            )
        found.append(Summary(driver, name, round_trips[driver, name], figures))
    return found


# --- for people ------------------------------------------------------------------------------------------------

_COLUMNS: Final = (
    "Driver: contender",
    "round trips",
    *(heading for query in QUERIES for heading in (f"{query.name} us", "added us", "ratio")),
)


def table(found: Sequence[Summary], *, markdown: bool) -> str:
    """The figures."""
    rows = [_COLUMNS, *map(_row, found)]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---|" + "---:|" * (len(_COLUMNS) - 1), *lines[1:]])
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )


def _row(each: Summary) -> tuple[str, ...]:
    cells = [f"{each.driver}: {NAMES[each.contender]}", f"{each.round_trips:g}"]
    for figure in each.figures.values():
        differs = ["", ""] if each.contender == "plain" else [f"{figure.added:+,.0f}", f"{figure.ratio:.2f}x"]
        cells += [f"{figure.time:,.0f}", *differs]
    return tuple(cells)


def _about(options: argparse.Namespace, facts: Mapping[str, Any]) -> str:
    others = ", ".join(f"{package} {found}" for package, found in facts["packages"].items())
    return (
        f"{options.rounds} rounds of {options.turn} ms for each; {options.rows:,} rows, {options.tenants} tenants; "
        f"{facts['cores']} cores, load {facts['load']} before; PostgreSQL {facts['servers']['postgresql']}, "
        f"Python {facts['python']}, SQLAlchemy {facts['sqlalchemy']}, psycopg {facts['psycopg']}, {others}"
    )


def _facts(server: str) -> dict[str, Any]:
    facts = machine({"postgresql": server})
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    del facts["flush_us"]
    return {**facts, "packages": found}


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command; returns 1 if a plain session could not be measured."""
    options = _options()
    owners = tenants(options.tenants)
    with embedded_postgres() as superuser, asyncio.Runner() as loop, ExitStack() as stack:
        set_up(superuser, options.rows, owners)
        facts = _facts(server_version(superuser))

        def make(driver: str, name: str, host: str | None) -> Runner:
            return Runner(loop, contender(name, driver, superuser, owners, host=host), options.rows, owners)

        bench = ready(make, str(make_url(superuser).query["host"]), stack)
        for driver in DRIVERS:
            if (driver, "plain") in bench.missing:
                print(f"{driver}: {bench.missing[driver, 'plain']}", file=sys.stderr)
                return 1
        gc.freeze()  # else a collection reads all that was imported
        measurements: list[Measurement] = []
        for round in range(1, options.rounds + 1):
            measurements += bench.measure(round, options.turn / 1000)
            print(f"round {round} of {options.rounds}", file=sys.stderr, flush=True)
    found = summaries(measurements, bench.round_trips)
    print(table(found, markdown=options.markdown))
    print("".join(f"\n{driver}: {NAMES[name]}: {reason}" for (driver, name), reason in bench.missing.items()))
    print(_about(options, facts))
    if options.json:
        everything = {
            "settings": {name: getattr(options, name) for name in ("rounds", "turn", "rows", "tenants")},
            "machine": facts,
            "missing": [[*key, reason] for key, reason in bench.missing.items()],
            "summaries": [asdict(each) for each in found],
            "measurements": [asdict(each) for each in measurements],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=25, help="times that each is measured; default 25")
    parser.add_argument("--turn", type=positive, default=10, metavar="MS", help="milliseconds of each; default 10")
    parser.add_argument("--rows", type=positive, default=200_000, help="of all tenants; default 200,000")
    parser.add_argument("--tenants", type=positive, default=20, help="default 20, with 10,000 rows each")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    options = parser.parse_args()
    if options.tenants < 2 or options.rows < 100 * options.tenants:
        parser.error("at least two tenants, with a hundred rows each")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
