"""Compares brokers under Celery, and what is outside: no-op tasks, the same settings, all on this machine.

See README.md.  ``parts.py`` has what is measured, ``shown.py`` what is told of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from arguments import positive
from parts import PARTS, Settings, measured, takes_part
from report import Measurement, Results, machine
from servers import NAMES, Broker, install, started, stoppable
from shown import plot, shown, targets

from rhesis_tasks.processes import ChildFailedError

_WORKERS: Final = (1, 2, 4)
_PARTS: Final = tuple(part for parts in PARTS.values() for part in parts)


def compare(
    names: Sequence[str], parts: Sequence[str], settings: Settings
) -> tuple[Results, dict[str, str], dict[str, Any]]:
    """Measure brokers in turn, step by step of each round.

    Returns:
        The results, what is missing from them and why, and facts about the machine.
    """
    with stoppable(), ExitStack() as stack:
        clock = _Clock(settings.minutes * 60)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rhesis-bench-")))
        brokers, missing = [], {}
        _say("starting the servers ...")
        for found in started(names, stack, folder):
            if isinstance(found, Broker):
                brokers.append(found)
            else:
                missing[NAMES[found[0]]] = found[1]
        facts = machine({broker.name: broker.version for broker in brokers})
        measurements: list[Measurement] = []
        rounds: dict[str, int] = {}
        for round, step, wanted in _steps(parts, settings):
            with clock.turn(step) as there_is_time:
                if not there_is_time:
                    continue
                rounds[step] = round
                for broker in brokers:
                    name = f"{NAMES[broker.name]}, {step}"
                    if name in missing or not takes_part(broker, step):
                        continue
                    try:
                        for figure, values in measured(broker, round, step, wanted, settings, folder):
                            measurements.append(Measurement(round, broker.name, figure, tuple(values)))
                            _say(f"{clock.now:5.0f} s  round {round}  {name:40} {figure:12} {_brief(values)}")
                    except (ChildFailedError, TimeoutError) as error:
                        missing[name] = f"failed in round {round}: {error}"
                        _say(f"{name} {missing[name]}")
        facts |= {"rounds": rounds, "seconds": int(clock.now)}
    return Results(measurements), missing, facts


def _steps(parts: Sequence[str], settings: Settings) -> Iterator[tuple[int, str, list[str]]]:
    """The steps of all rounds: the round's number, the step, and which of its parts are wanted."""
    for round in range(1, settings.rounds + 1):
        for step, of_step in PARTS.items():
            wanted = [part for part in of_step if part in parts]
            if wanted and (step == "basics" or round <= settings.seldom):
                yield round, step, wanted


class _Clock:
    """Knows how long a step takes, and whether there is time for one more.

    Args:
        limit: seconds in all, from now on.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._begin = time.monotonic()
        self._took: dict[str, float] = {}

    @property
    def now(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._begin

    @contextmanager
    def turn(self, step: str) -> Iterator[bool]:
        """Whether to begin a step; the block's length is how long it takes.  The first time it is always begun."""
        begin = self.now
        there_is_time = begin + self._took.get(step, -begin) <= self._limit
        yield there_is_time
        if there_is_time:
            self._took[step] = self.now - begin


def _brief(values: Sequence[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:9,.1f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command; returns 1 if nothing could be measured."""
    options = _options()
    if options.install:
        install(options.brokers)
    settings = Settings(
        options.rounds,
        options.seldom,
        options.minutes,
        options.messages,
        options.samples,
        options.publishers,
        _WORKERS,
        options.in_flight,
        options.seconds,
    )
    results, missing, facts = compare(options.brokers, options.parts, settings)
    print(shown(results, settings, missing, markdown=options.markdown))
    print(f"\n{_about(settings, facts)}")
    if options.json:
        everything = {
            "settings": asdict(settings),
            "machine": facts,
            "missing": missing,
            "targets": targets(results),
            "measurements": [asdict(each) for each in results.measurements],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if options.plot and results.brokers:
        plot(results, settings, options.plot)
    return 0 if results.brokers else 1


def _about(settings: Settings, facts: Mapping[str, Any]) -> str:
    servers = ", ".join(f"{NAMES[name]}: {version}" for name, version in facts["servers"].items())
    rounds = ", ".join(f"{step} {count}" for step, count in facts["rounds"].items())
    return (
        f"Rounds: {rounds}, in {facts['seconds']} s; {settings.messages} messages and {settings.samples} latencies in "
        f"each; {facts['cores']} cores, load {facts['load']} before; 8 kB written and flushed in {facts['flush_us']} "
        f"us; Python {facts['python']}, Celery {facts['celery']}, kombu {facts['kombu']}, psycopg {facts['psycopg']}, "
        f"SQLAlchemy {facts['sqlalchemy']}\nServers: {servers}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--brokers", type=_some_of(tuple(NAMES)), default=list(NAMES), help=f"some of {','.join(NAMES)}; default all")
    add("--parts", type=_some_of(_PARTS), default=list(_PARTS), help=f"some of {','.join(_PARTS)}; default all")
    add("--rounds", type=positive, default=7, help="times that each is measured; default 7")
    add("--seldom", type=positive, default=2, help="rounds with many, scale and kill, the first ones; default 2")
    add("--minutes", type=positive, default=12, help="leave out rounds that would take longer; default 12")
    add("--messages", type=positive, default=2000, help="published and run in each; default 2000")
    add("--samples", type=positive, default=40, help="idle latencies in each; default 40")
    add("--publishers", type=positive, default=16, help="processes of many; default 16")
    add("--seconds", type=positive, default=4, help="that the workers of scale run at most; default 4")
    add("--in-flight", type=positive, default=100, help="tasks that the worker of kill is at; default 100")
    add("--install", action="store_true", help="first install what is missing from Debian and PyPI")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--json", type=Path, metavar="FILE", help="write all measurements")
    add("--plot", type=Path, metavar="FILE", help="draw a PNG; needs matplotlib")
    return parser.parse_args()


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in known if name in wanted]

    return names


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
