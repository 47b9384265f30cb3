"""What broker.py's measurements say: medians over the rounds, ratios within each round; and facts about the machine."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median, quantiles
from typing import Any

from servers import NAMES

__all__ = ["Measurement", "Results", "machine"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure of one contender in one round."""

    round: int
    broker: str
    figure: str
    values: tuple[float, ...]  #: one; of ``idle`` all latencies in milliseconds


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured.  A figure that is missing is None, or NaN where a number is needed."""

    measurements: Sequence[Measurement]

    @property
    def brokers(self) -> list[str]:
        """Who was measured at least once, in the order of the table."""
        return [name for name in NAMES if any(each.broker == name for each in self.measurements)]

    @property
    def figures(self) -> set[str]:
        return {each.figure for each in self.measurements}

    def by_round(self, broker: str, figure: str) -> dict[int, float]:
        """The figure in each round; of several values their median."""
        found = [each for each in self.measurements if (each.broker, each.figure) == (broker, figure)]
        return {each.round: median(each.values) for each in found}

    def value(self, broker: str, figure: str) -> float | None:
        """The median over the rounds."""
        rounds = self.by_round(broker, figure)
        return median(rounds.values()) if rounds else None

    def span(self, broker: str, figure: str) -> tuple[float, float]:
        """The least and the greatest of the rounds."""
        rounds = self.by_round(broker, figure)
        return min(rounds.values()), max(rounds.values())

    def ratios(self, over: tuple[str, str], under: tuple[str, str]) -> list[float]:
        """The quotients of two figures, each a broker and a figure, in the rounds that have both."""
        above, below = self.by_round(*over), self.by_round(*under)
        return [above[round] / below[round] for round in sorted(above.keys() & below.keys())]

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """Their median."""
        found = self.ratios(over, under)
        return median(found) if found else None

    def percentile(self, broker: str, figure: str, percent: int) -> float | None:
        """Of the values of all rounds together."""
        values = [
            value
            for each in self.measurements
            if (each.broker, each.figure) == (broker, figure)
            for value in each.values
        ]
        if len(values) < 2:
            return values[0] if values else None
        return quantiles(values, n=100, method="inclusive")[percent - 1]


# --- where it was measured -------------------------------------------------------------------------------------


def machine(versions: Mapping[str, str]) -> dict[str, Any]:
    """What one has to know about the machine to read the figures."""
    return {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "flush_us": round(_flush() * 1e6),
        "python": platform.python_version(),
        **{package: version(package) for package in ("celery", "kombu", "psycopg", "sqlalchemy")},
        "servers": dict(versions),
    }


def _flush() -> float:
    """Seconds that it takes to write 8 kB to the temporary folder and wait for the disk; the floor of a commit."""
    with tempfile.TemporaryFile(buffering=0) as file:
        times = []
        for _ in range(100):
            begin = time.perf_counter()
            file.write(bytes(8192))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begin)
    return median(times)
