"""broker.py's results for people: tables, the figures with their targets, and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from parts import REDELIVERY, Settings
from report import Results
from servers import NAMES
from tabular import table

__all__ = ["plot", "shown", "targets"]


def shown(results: Results, settings: Settings, missing: Mapping[str, str], *, markdown: bool) -> str:
    """All tables that something was measured for; who could not be measured is named with the reason."""
    tables = [_basics(results), _many(results, settings), _kills(results, settings), _targets(results)]
    texts = [table(rows, markdown=markdown) for rows in tables if len(rows) > 1]
    texts += ["\n".join(f"{name}: {reason.strip().splitlines()[0]}" for name, reason in missing.items())]
    return "\n\n".join(text for text in texts if text)


def _cell(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _ours_is(results: Results, broker: str, figure: str) -> str:
    return "" if broker == "ours" else _cell(results.ratio(("ours", figure), (broker, figure)), ".2f", "x")


def _basics(results: Results) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("Broker", "publish/s", "ours is", "run/s", "ours is", "idle p50 ms", "idle p99 ms")]
    for broker in results.brokers:
        row = [NAMES[broker]]
        for figure in ("publish", "run"):
            row += [_cell(results.value(broker, figure)), _ours_is(results, broker, figure)]
        row += [_cell(results.percentile(broker, "idle", percent), ".1f") for percent in (50, 99)]
        if any(row[1:]):
            rows.append(row)
    return rows


def _many(results: Results, settings: Settings) -> list[Sequence[str]]:
    workers = [f"scale-{count}" for count in settings.workers]
    last = workers[-1]
    names = ["1 worker, run/s", *map(str, settings.workers[1:])] if settings.workers[0] == 1 else workers
    rows: list[Sequence[str]] = [
        ("Broker", f"{settings.publishers} publishers/s", "ours is", *names, f"{settings.workers[-1]} to 1")
    ]
    for broker in results.brokers:
        growth = _cell(results.ratio((broker, last), (broker, workers[0])), ".2f", "x")
        scale = [_cell(results.value(broker, figure)) for figure in workers]
        row = [NAMES[broker], _cell(results.value(broker, "many")), _ours_is(results, broker, "many"), *scale, growth]
        if any(row[1:]):
            rows.append(row)
        waited = results.value(broker, "many-waited")
        if waited is not None:
            rows.append([f"{NAMES[broker]}, with a worker", _cell(waited), *[""] * (len(row) - 2)])
    return rows


def _kills(results: Results, settings: Settings) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("After kill -9", "done elsewhere", "twice", "first s", "last s", "given back by")]
    for broker in results.brokers:
        done = results.by_round(broker, "kill-done").values()
        if done:
            twice = max(results.by_round(broker, "kill-twice").values())
            first, last = (results.by_round(broker, f"kill-{which}").values() for which in ("first", "last"))
            how = REDELIVERY[broker].by
            if min(done) < settings.in_flight:
                how += f"; looked for {REDELIVERY[broker].patience:g} s"
            times = [_cell(max(each) if each else None, ".1f") for each in (first, last)]
            rows.append([NAMES[broker], f"{min(done):g} of {settings.in_flight}", f"{twice:g}", *times, how])
    return rows


# --- what was asked for -----------------------------------------------------------------------------------------

_AT_LEAST: Final = (
    ("publish", "Publishing, to kombu pgmq", "ours", "pgmq", 2.5),
    ("publish", "Publishing, to kombu sqla", "ours", "sqla", 3.5),
    ("publish", "Publishing, to Redis", "ours", "redis", 1.0),
    ("publish", "Publishing, both not flushed, to Redis", "ours-unflushed", "redis", 1.0),
    ("publish", "Publishing, both flushed, to Redis", "ours", "redis-flushed", 1.0),
    ("run", "Running, to Redis", "ours", "redis", 2.0),
    ("run", "Running, to kombu sqla", "ours", "sqla", 4.0),
    ("run", "Running, to RabbitMQ", "ours", "rabbitmq", 0.9),
)
_NOTIFY_LEAVES: Final = 0.3  # 5,300 of 18,800 a second, with pg_notify() in each commit of 32 clients
_REDELIVERED_WITHIN: Final = 10.0  # seconds: the grace period, and 5 more


def targets(results: Results) -> list[tuple[str, str, float | None, str, bool | None]]:
    """Each figure with its target: name, target, what was measured, its unit, and whether it was reached."""
    found: list[tuple[str, str, float | None, str, bool | None]] = []

    def add(name: str, value: float | None, unit: str, least: float = -math.inf, most: float = math.inf) -> None:
        text = f"at least {least:g}{unit}" if math.isfinite(least) else f"at most {most:g}{unit}"
        found.append((name, text, value, unit, None if value is None else least <= value <= most))

    for figure, name, ours, broker, least in _AT_LEAST:
        add(name, results.ratio((ours, figure), (broker, figure)), "x", least)
    add("16 publishers, to one", results.ratio(("ours", "many"), ("ours", "publish")), "x", 1.0)
    waited = results.ratio(("ours", "many-waited"), ("ours", "many"))
    add("16 publishers while a worker waits, to nobody waiting", waited, "x", _NOTIFY_LEAVES)
    add("4 workers, to one", results.ratio(("ours", "scale-4"), ("ours", "scale-1")), "x", 1.0)
    add("idle p50, to Redis", results.ratio(("ours", "idle"), ("redis", "idle")), "x", most=1.5)
    add("idle p99", results.percentile("ours", "idle", 99), " ms", most=50)
    done = results.by_round("ours", "kill-done").values()
    add("kill -9 of a worker with 100: done elsewhere", min(done) if done else None, "", 100)
    last = results.by_round("ours", "kill-last").values()
    add("kill -9, until the last is done", max(last) if last else None, " s", most=_REDELIVERED_WITHIN)
    return found


def _targets(results: Results) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("Figure of ours", "target", "measured", "from - to", "reached")]
    spans = _spans(results)
    for name, target, value, unit, reached in targets(results):
        if value is not None:
            form = ".2f" if unit == "x" else ".1f" if unit.strip() else "g"
            rows.append([name, target, f"{value:{form}}{unit}", spans.get(name, ""), "yes" if reached else "no"])
    return rows


def _spans(results: Results) -> dict[str, str]:
    """The least and the greatest ratio of the rounds, by the figure's name."""
    pairs = {name: ((ours, figure), (broker, figure)) for figure, name, ours, broker, _ in _AT_LEAST}
    pairs |= {
        "16 publishers, to one": (("ours", "many"), ("ours", "publish")),
        "16 publishers while a worker waits, to nobody waiting": (("ours", "many-waited"), ("ours", "many")),
        "4 workers, to one": (("ours", "scale-4"), ("ours", "scale-1")),
        "idle p50, to Redis": (("ours", "idle"), ("redis", "idle")),
    }
    ratios = {name: results.ratios(*pair) for name, pair in pairs.items()}
    return {name: f"{min(found):.2f} - {max(found):.2f}" for name, found in ratios.items() if found}


# --- the plot ---------------------------------------------------------------------------------------------------


def plot(results: Results, settings: Settings, file: Path) -> None:
    """Draw the figures; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for axis, (name, title) in zip(axes.flat, _BARS.items(), strict=False):
        _bars(axis, results, name, title)
    axes[0, 2].set_xscale("log")
    axes[0, 2].xaxis.set_major_formatter("{x:g}")
    _lines(axes[1, 1], results, settings)
    _bars(axes[1, 2], results, "kill-last", "seconds from kill -9 until all was done")
    for axis in axes.flat:
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


_BARS: Final = {
    "publish": "published per second, one process",
    "run": "run per second, one worker",
    "idle": "idle ms: median, line to p99",
    "many": "published per second, 16 processes",
}


def _colour(broker: str) -> str:
    return {"ours": "tab:blue", "bare": "tab:cyan"}.get(broker, "tab:gray")


def _bars(axis: Any, results: Results, name: str, title: str) -> None:
    brokers = [broker for broker in results.brokers if results.value(broker, name) is not None]
    values, below, above = [], [], []
    for broker in brokers:
        value, (low, high) = results.value(broker, name) or 0.0, results.span(broker, name)
        if name == "idle":
            value = low = results.percentile(broker, name, 50) or 0.0
            high = results.percentile(broker, name, 99) or 0.0
        values.append(value)
        below.append(max(0.0, value - low))
        above.append(max(0.0, high - value))
    labels = [NAMES[broker] for broker in brokers]
    colours = [_colour(broker) for broker in brokers]
    bars = axis.barh(labels, values, xerr=(below, above), color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    axis.bar_label(bars, [f" {value:,.0f} " if value >= 20 else f" {value:.1f} " for value in values], padding=12)
    axis.set_title(title)
    axis.margins(x=0.3)
    axis.invert_yaxis()


def _lines(axis: Any, results: Results, settings: Settings) -> None:
    for broker in results.brokers:
        points = [
            (count, results.ratios((broker, f"scale-{count}"), (broker, "scale-1"))) for count in settings.workers
        ]
        there = [(count, median(ratios)) for count, ratios in points if ratios]
        if there:
            style = (
                {"linewidth": 3, "color": "tab:blue"}
                if broker == "ours"
                else {"linewidth": 1, "color": f"C{list(NAMES).index(broker)}"}
            )
            axis.plot(*zip(*there, strict=True), marker="o", label=NAMES[broker], **style)
    axis.set_title("run per second, as a multiple of one worker's")
    axis.set_xticks(settings.workers)
    axis.set_xlabel("worker processes")
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.legend(fontsize=8)
