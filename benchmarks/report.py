"""What the measurements say: medians over the rounds, ratios within each round, as table, plot and JSON."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from servers import NAMES

__all__ = ["Measurement", "Summary", "machine", "plot", "summaries", "table"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One broker in one round."""

    round: int
    broker: str
    publish: float  #: messages per second
    run: float  #: tasks per second
    latencies: tuple[float, ...]  #: milliseconds


@dataclass(frozen=True, slots=True)
class Summary:
    """One broker over all rounds.  Ratios are medians of ours to this one, taken within each round."""

    broker: str
    publish: float  #: messages per second; median
    publish_range: tuple[float, float]
    publish_ratio: float | None
    run: float  #: tasks per second; median
    run_range: tuple[float, float]
    run_ratio: float | None
    p50: float  #: milliseconds, of the latencies of all rounds
    p99: float


def summaries(measurements: Sequence[Measurement]) -> list[Summary]:
    """One for each broker that was measured at least once."""
    ours = {each.round: each for each in measurements if each.broker == "ours"}
    found = []
    for name in NAMES:
        own = [each for each in measurements if each.broker == name]
        if own:
            latencies = [latency for each in own for latency in each.latencies]
            found.append(
                Summary(
                    name,
                    median(each.publish for each in own),
                    _range([each.publish for each in own]),
                    _ratio(ours, own, lambda each: each.publish),
                    median(each.run for each in own),
                    _range([each.run for each in own]),
                    _ratio(ours, own, lambda each: each.run),
                    median(latencies),
                    _p99(latencies),
                )
            )
    return found


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _ratio(
    ours: Mapping[int, Measurement], theirs: Sequence[Measurement], value: Callable[[Measurement], float]
) -> float | None:
    ratios = [value(ours[each.round]) / value(each) for each in theirs if each.round in ours]
    return median(ratios) if ratios else None


# --- for people ------------------------------------------------------------------------------------------------

_COLUMNS: Final = ("Broker", "publish/s", "ours is", "run/s", "ours is", "idle p50 ms", "idle p99 ms")


def table(found: Sequence[Summary], missing: Mapping[str, str], *, markdown: bool) -> str:
    """The figures; brokers that could not be measured are named with the reason."""
    rows = [_row(each) for each in found]
    if markdown:
        lines = [_markdown(_COLUMNS), "|---|" + "---:|" * (len(_COLUMNS) - 1), *map(_markdown, rows)]
    else:
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        lines = [_aligned(row, widths) for row in (_COLUMNS, *rows)]
    prefix = "\n" if markdown and missing else ""
    reasons = [f"{NAMES[name]}: {reason.strip().splitlines()[0]}" for name, reason in missing.items()]
    return "\n".join(lines) + prefix + "".join(f"\n{reason}" for reason in reasons)


def _row(each: Summary) -> tuple[str, ...]:
    ratios = ["" if ratio is None else f"{ratio:.2f}x" for ratio in (each.publish_ratio, each.run_ratio)]
    if each.broker == "ours":
        ratios = ["", ""]
    name = NAMES[each.broker]
    return name, f"{each.publish:,.0f}", ratios[0], f"{each.run:,.0f}", ratios[1], f"{each.p50:.1f}", f"{each.p99:.1f}"


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join((first.strip().ljust(widths[0]), *others))


def plot(found: Sequence[Summary], file: Path) -> None:
    """Draw the figures as bars; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.5 * len(found) + 1.6), sharey=True, layout="constrained")
    labels = [NAMES[each.broker] for each in found]
    colours = ["tab:blue" if each.broker == "ours" else "tab:gray" for each in found]
    panels: list[tuple[str, list[float], list[tuple[float, float]]]] = [
        ("published per second", [each.publish for each in found], [each.publish_range for each in found]),
        ("run per second", [each.run for each in found], [each.run_range for each in found]),
        ("idle latency in ms: median, line to p99", [each.p50 for each in found], [(e.p50, e.p99) for e in found]),
    ]
    for axis, (title, values, ranges) in zip(axes, panels, strict=True):
        below = [value - low for value, (low, _) in zip(values, ranges, strict=True)]
        above = [high - value for value, (_, high) in zip(values, ranges, strict=True)]
        bars = axis.barh(labels, values, xerr=(below, above), color=colours, error_kw={"elinewidth": 1, "capsize": 2})
        axis.bar_label(bars, [f" {value:,.0f} " if value >= 20 else f" {value:.1f} " for value in values], padding=12)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[2].set_xscale("log")
    axes[2].xaxis.set_major_formatter("{x:g}")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


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
