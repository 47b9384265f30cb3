"""soak.py's results for people: what there was in the first third and in the last, what grows, and a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from tabular import table

__all__ = ["Samples", "plot", "shown"]

WARM_UP: Final = 120.0
"""Seconds that are not looked at: until records expire for the first time, and vacuum has come by once."""

_MEGABYTE: Final = 2**20
_GROWS: Final = 1.1  # times what it was
# And by more than this, by the last word of a figure's name: a table has at least a few pages.
_AND_MORE_THAN: Final = {"memory": 2 * _MEGABYTE, "size": _MEGABYTE, "indexes": _MEGABYTE, "rows": 1000, "files": 3}
_AND_MORE_THAN_OTHERS: Final = 20


@dataclasses.dataclass(slots=True)
class Samples:
    """Figures over time."""

    all: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def add(self, seconds: float, figures: dict[str, float]) -> None:
        """Those at a time."""
        self.all.append({"seconds": seconds, **figures})

    @property
    def names(self) -> list[str]:
        """Those that are there and not nothing all the time."""
        names = list(dict.fromkeys(name for each in self.all for name in each if name != "seconds"))
        return [name for name in names if any(each.get(name) for each in self.all)]

    def over_time(self, name: str) -> tuple[list[float], list[float]]:
        """When, in minutes, and how much."""
        there = [each for each in self.all if name in each]
        return [each["seconds"] / 60 for each in there], [each[name] for each in there]

    def thirds(self, name: str) -> tuple[float, float]:
        """The mean of the first third and that of the last, behind the warm-up."""
        length = self.all[-1]["seconds"]
        warm_up = min(WARM_UP, length / 3)
        third = (length - warm_up) / 3
        first = [each[name] for each in self.all if name in each and 0 <= each["seconds"] - warm_up <= third]
        last = [each[name] for each in self.all if name in each and each["seconds"] >= length - third]
        return fmean(first), fmean(last)


def _grows(name: str, first: float, last: float) -> bool:
    more = _AND_MORE_THAN.get(name.rpartition(" ")[2], _AND_MORE_THAN_OTHERS)
    return last > _GROWS * first and last > first + more


def _is_bytes(name: str) -> bool:
    return name.endswith(("memory", "size", "indexes"))


def shown(samples: Samples, *, markdown: bool) -> tuple[str, list[str]]:
    """The table, and the names of what grows."""
    rows: list[Sequence[str]] = [("Figure", "first third", "last third", "ratio", "grows")]
    grown = []
    for name in samples.names:
        first, last = samples.thirds(name)
        if max(first, last) < (_MEGABYTE / 20 if _is_bytes(name) else 1):
            continue
        if grows := _grows(name, first, last):
            grown.append(name)
        cells = [f"{each / _MEGABYTE:.1f} MB" if _is_bytes(name) else f"{each:,.0f}" for each in (first, last)]
        rows.append((name, *cells, f"{last / first:.2f}" if first else "", "yes" if grows else ""))
    return table(rows, markdown=markdown), grown


# --- the plot ---------------------------------------------------------------------------------------------------

_PANELS: Final = (
    ("memory of all processes, MB", ": memory", _MEGABYTE),
    ("open files", ": files", 1),
    ("connections and messages", ("server connections", "messages: "), 1),
    ("tables, MB", ": size", _MEGABYTE),
    ("their indexes, MB", ": indexes", _MEGABYTE),
    ("records, and rows that are gone", ("task records", "dead rows"), 1),
)
_MOST_LINES: Final = 4


def plot(samples: Samples, file: Path) -> None:
    """Draw the figures; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for axis, (title, which, unit) in zip(axes.flat, _PANELS, strict=True):
        _lines(axis, samples, which, unit)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.45 * axis.get_ylim()[1])  # with room for the legend
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="upper right", ncols=2)
    for axis in axes[1]:
        axis.set_xlabel("minutes")
    figure.savefig(file, dpi=62)
    pyplot.close(figure)


def _lines(axis: Any, samples: Samples, which: str | tuple[str, ...], unit: int) -> None:
    several = (which,) if isinstance(which, str) else which
    names = [name for name in samples.names if any(each in name for each in several)]
    largest = sorted(names, key=lambda name: -max(samples.over_time(name)[1]))[:_MOST_LINES]
    for name in largest:
        minutes, values = samples.over_time(name)
        label = name.removesuffix(which) if isinstance(which, str) else name
        axis.plot(minutes, [value / unit for value in values], label=label, linewidth=1.2)
