"""What it costs that the context travels with each task, next to others who let something travel.  See README.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final

from arguments import positive
from report import machine

from rhesis_tasks.processes import ChildFailedError

NAMES: Final = {
    "alone": "Celery alone",
    "again": "Celery alone, once more",
    "context": "rhesis-tasks, tenant and 5 variables",
    "base": "rhesis-tasks, the same with BaseTask",
    "correlation": "asgi-correlation-id",
    "opentelemetry": "OpenTelemetry",
    "sentry": "Sentry",
}
_PACKAGES: Final = ("asgi-correlation-id", "opentelemetry-sdk", "opentelemetry-instrumentation-celery", "sentry-sdk")
_CONTENDERS: Final = Path(__file__).resolve().parent / "contenders.py"
_SETTINGS: Final = ("BROKER_URL", "CELERY_", "DATABASE_URL", "OTEL_", "RHESIS_TASKS_", "SENTRY_")  #: not the caller's
_LAPS: Final = 5  #: batches of each in a round


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender in one round: medians over its batches, in microseconds for each task."""

    round: int
    contender: str
    publish: float
    run: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender over all rounds: medians, in microseconds for each task.

    What it adds is the median of the differences to Celery alone, each within one round.
    """

    contender: str
    publish: float
    publish_added: float
    run: float
    run_added: float


# --- measuring -------------------------------------------------------------------------------------------------


class _Process:
    """A process of contenders.py, ready to measure."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self._name = name
        environ = {key: value for key, value in os.environ.items() if not key.startswith(_SETTINGS)}
        self._process = subprocess.Popen(
            [sys.executable, str(_CONTENDERS), name],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._end)
        self._answer()

    def batch(self, count: int) -> dict[str, float]:
        """Publish and run so many tasks; microseconds for each.

        Raises:
            ChildFailedError: the process ended.
        """
        assert self._process.stdin is not None  # noqa: S101  # for the type checker
        with suppress(BrokenPipeError):
            print(count, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None  # noqa: S101  # for the type checker
        line = self._process.stdout.readline()
        if not line:
            errors = self._process.communicate()[1].strip().splitlines()
            raise ChildFailedError(errors[-1] if errors else f"ended with {self._process.returncode}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(round: int, names: Sequence[str], batch: int) -> tuple[list[Measurement], dict[str, str]]:
    """One round: new processes, which take turns.

    Returns:
        The measurements, and why contenders are missing from them.
    """
    missing = {}
    with ExitStack() as stack:
        processes = {}
        for name in names:
            try:
                processes[name] = _Process(name, stack)
            except ChildFailedError as error:
                missing[name] = str(error)
        laps = [{name: process.batch(batch) for name, process in processes.items()} for _ in range(_LAPS)]
    found = [
        Measurement(round, name, median(lap[name]["publish"] for lap in laps), median(lap[name]["run"] for lap in laps))
        for name in processes
    ]
    return found, missing


def summaries(measurements: Sequence[Measurement]) -> list[Summary]:
    """One for each contender that was measured."""
    alone = {each.round: each for each in measurements if each.contender == "alone"}
    found = []
    for name in NAMES:
        own = [each for each in measurements if each.contender == name]
        if own:
            found.append(
                Summary(
                    name,
                    median(each.publish for each in own),
                    median(each.publish - alone[each.round].publish for each in own),
                    median(each.run for each in own),
                    median(each.run - alone[each.round].run for each in own),
                )
            )
    return found


# --- for people ------------------------------------------------------------------------------------------------

_COLUMNS: Final = ("Contender", "publish us", "added us", "run us", "added us")


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
    added = ["", ""] if each.contender == "alone" else [f"{each.publish_added:+.1f}", f"{each.run_added:+.1f}"]
    return NAMES[each.contender], f"{each.publish:.1f}", added[0], f"{each.run:.1f}", added[1]


def _about(options: argparse.Namespace, facts: Mapping[str, Any]) -> str:
    others = ", ".join(f"{package} {found}" for package, found in facts["contenders"].items())
    return (
        f"{options.rounds} rounds of {_LAPS} batches of {options.batch} tasks; {facts['cores']} cores, load "
        f"{facts['load']} before; Python {facts['python']}, Celery {facts['celery']}, kombu {facts['kombu']}, {others}"
    )


def _facts() -> dict[str, Any]:
    facts = machine({})
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    del facts["servers"], facts["flush_us"]
    return {**facts, "contenders": found}


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command; returns 1 if Celery alone could not be measured."""
    options = _options()
    facts = _facts()
    measurements: list[Measurement] = []
    missing: dict[str, str] = {}
    for round in range(1, options.rounds + 1):
        measured, failed = measure(round, [name for name in NAMES if name not in missing], options.batch)
        measurements += measured
        missing |= failed
        print(f"round {round} of {options.rounds}", file=sys.stderr, flush=True)
        if "alone" in missing:
            print(f"{NAMES['alone']}: {missing['alone']}", file=sys.stderr)
            return 1
    found = summaries(measurements)
    print(table(found, markdown=options.markdown))
    print("".join(f"\n{NAMES[name]}: {reason}" for name, reason in missing.items()))
    print(_about(options, facts))
    if options.json:
        everything = {
            "settings": {"rounds": options.rounds, "laps": _LAPS, "batch": options.batch},
            "machine": facts,
            "missing": missing,
            "summaries": [asdict(each) for each in found],
            "measurements": [asdict(each) for each in measurements],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=21, help="times that each is measured; default 21")
    parser.add_argument("--batch", type=positive, default=200, help="tasks published and run at a time; default 200")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
