"""What broker.py measures of each broker, step by step of a round; README.md says what the figures mean."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from servers import Broker
from stage import Stage

__all__ = ["PARTS", "REDELIVERY", "Settings", "measured", "takes_part"]

Figures = Iterator[tuple[str, Sequence[float]]]  # a figure's name, and its value, or latencies in milliseconds

_WARM_UP: Final = 20  #: messages that are published before it counts; they are run and counted there


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int
    seldom: int  #: the rounds, of these, that have more than the basics
    minutes: float  #: no step of a round is begun that would, by how long it took before, last longer than this
    messages: int
    samples: int
    publishers: int
    workers: tuple[int, ...]
    in_flight: int
    seconds: float  #: how long many workers run at most

    @property
    def timeout(self) -> float:
        """Seconds after which a step has failed."""
        return 60 + self.messages / 20 + self.samples * 2


# --- one process ------------------------------------------------------------------------------------------------


def _basics(stage: Stage, settings: Settings, parts: Sequence[str], round: int) -> Figures:
    """Publish, let a worker run that, and then see how soon it starts a task when it is idle."""
    backlog = 0
    if {"publish", "run"} & {*parts}:
        backlog = settings.messages + _WARM_UP
        seconds = stage.seconds("publish", settings.messages, _WARM_UP)
        if "publish" in parts:
            yield "publish", [settings.messages / seconds]
    if not {"run", "idle"} & {*parts}:
        return
    with stage.worker() as worker:
        if backlog:
            stage.wait_for_notes("starts", backlog, [worker])
            if "run" in parts:
                yield "run", [_rate([note.value for note in stage.notes("starts").all()])]
        if "idle" in parts and stage.broker.has_tasks:
            stage.publish("trickle", settings.samples, round)
            stage.wait_for_notes("latencies", settings.samples, [worker])
            yield "idle", [note.value * 1000 for note in stage.notes("latencies").all()]


def _rate(starts: Sequence[float]) -> float:
    """Tasks per second, from the first one's start to the last one's."""
    return (len(starts) - 1) / (max(starts) - min(starts))


# --- many publishers --------------------------------------------------------------------------------------------


def _many(stage: Stage, settings: Settings) -> Figures:
    """Publish from many processes at once, with nobody waiting."""
    seconds = stage.seconds("many", settings.messages, settings.publishers)
    yield "many", [settings.messages / seconds]


def _many_waited(stage: Stage, settings: Settings) -> Figures:
    """The same while a worker is there that was idle; it runs the tasks, on the same cores."""
    with stage.worker() as worker:
        stage.publish("trickle", 1, 0)
        stage.wait_for_notes("latencies", 1, [worker])
        seconds = stage.seconds("many", settings.messages, settings.publishers)
        stage.wait_for_notes("starts", settings.messages + settings.publishers, [worker])
        yield "many-waited", [settings.messages / seconds]


# --- several workers --------------------------------------------------------------------------------------------


def _scale(stage: Stage, settings: Settings, count: int) -> Figures:
    """Let so many workers run a backlog, all from the same moment on, until it is done or time is up."""
    backlog = settings.messages + settings.publishers
    with stage.workers(count) as workers:
        with stage.publishing("many", settings.messages, settings.publishers, stage.folder / "published"):
            stage.wait_for_files("imported-*", count, workers)
        stage.open_gate("start")
        stage.wait_for_files("ready-*", count, workers)
        stage.open_gate("go")
        begin = time.monotonic()
        starts = stage.notes("starts")
        while starts.count < backlog and (time.monotonic() < begin + settings.seconds or not starts.count):
            stage.wait_for_notes("starts", 0, workers)  # are they all there?
            if time.monotonic() > begin + settings.timeout:
                raise TimeoutError(f"{count} workers ran nothing")
            time.sleep(0.02)
        found = starts.all()
    if len({note.process for note in found}) < count and len(found) >= 64 * count:
        raise TimeoutError(f"only {len({note.process for note in found})} of {count} workers ran anything")
    yield f"scale-{count}", [_rate([note.value for note in found])]


# --- a worker that is killed ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Redelivery:
    """By what a broker gives a dead worker's messages to others."""

    by: str
    options: Mapping[str, Any]  #: of the transport, so that it happens while we look
    patience: float  #: seconds that we wait for it


_TIMEOUT: Final = 10  # ours promises the grace period (5 s) and 5 s more
_VISIBILITY: Final = {"visibility_timeout": _TIMEOUT}
REDELIVERY: Final = {
    "ours": Redelivery("its session is gone for the grace period, 5 s", {}, 30),
    "sqla": Redelivery("nothing", {}, 15),
    "pgmq": Redelivery(f"visibility_timeout={_TIMEOUT} (default 30 minutes)", _VISIBILITY, 30),
    "redis": Redelivery(
        f"visibility_timeout={_TIMEOUT}, looked at each second (default 1 hour, each 100 seconds)",
        {**_VISIBILITY, "unacked_restore_interval": 1, "unacked_restore_throttle": 1},
        30,
    ),
    "rabbitmq": Redelivery("its connection is closed", {}, 15),
}


def _kill(stage: Stage, settings: Settings) -> Figures:
    """Kill a worker that is in the middle of many tasks while another is there, and see these done by the other.

    Yields how many were done, how many of them more than once, and the seconds from the kill to the first and last.
    """
    redelivery = REDELIVERY[stage.broker.name]
    options = {**stage.broker.options, **redelivery.options}
    count = settings.in_flight
    late = {"late": True, "prefetch": 1, "options": options}
    with (
        stage.worker(number=1, concurrency=count, hold=True, **late) as victim,
        stage.worker(number=2, gates=True, **late) as other,
    ):
        stage.wait_for_files("imported-*", 1, [other])
        stage.publish("held", count, options=options)
        stage.wait_for_notes("held", count, [victim, other])
        stage.open_gate("start")
        stage.wait_for_files("ready-*", 1, [other])
        stage.open_gate("go")
        time.sleep(0.5)
        before = stage.notes("done").count
        if before:
            raise TimeoutError(f"{before} messages were delivered again before their worker was killed")
        victim.process.send_signal(signal.SIGKILL)
        killed = time.time()
        done = stage.notes("done")
        while time.time() < killed + redelivery.patience and len({note.number for note in done.all()}) < count:
            time.sleep(0.05)
        time.sleep(0.5)  # for what is done twice
        times = Counter(note.number for note in done.all())
        seconds = [note.value - killed for note in done.all()]
    yield "kill-done", [len(times)]
    yield "kill-twice", [sum(each > 1 for each in times.values())]
    if seconds:
        yield "kill-first", [min(seconds)]
        yield "kill-last", [max(seconds)]


# --- all of them ------------------------------------------------------------------------------------------------

PARTS: Final = {
    "basics": ("publish", "run", "idle"),
    "many": ("many",),
    "scale": ("scale",),
    "kill": ("kill",),
}
"""What can be measured, by the step of a round in which it is: all brokers go through a step before the next one."""


def takes_part(broker: Broker, step: str) -> bool:
    """Whether a step measures anything of a contender.

    pgmq's "notify" is there for its latency.  Else it is pgmq; and 16 of its publishers at once failed, or did not end
    within two minutes, where pgmq's took seconds.  Ours without flushes and Redis with them are there to be compared
    with the other one.
    """
    if step == "basics":
        return True
    return (broker.is_celerys and broker.name not in ("pgmq-notify", "ours-unflushed", "redis-flushed")) or (
        step == "many" and not broker.has_tasks
    )


def measured(
    broker: Broker, round: int, step: str, parts: Sequence[str], settings: Settings, folder: Path
) -> Iterator[tuple[str, Sequence[float]]]:
    """Measure one step of a round with a broker, each part with a new queue.

    Raises:
        ChildFailedError, TimeoutError: a publisher or worker failed.
    """

    def on_stage(name: str, measure: Callable[..., Figures], *arguments: Any) -> Figures:
        place = folder / f"{broker.name}-{round}-{name}"
        place.mkdir()
        stage = Stage(broker, f"bench{round}_{name.replace('-', '_')}", place, settings.timeout)
        yield from measure(stage, settings, *arguments)

    if step == "basics":
        yield from on_stage("basics", _basics, parts, round)
    elif step == "many":
        yield from on_stage("many", _many)
        if broker.name == "ours":
            yield from on_stage("many-waited", _many_waited)
    elif step == "scale":
        for count in settings.workers:
            yield from on_stage(f"scale-{count}", _scale, count)
    else:
        yield from on_stage("kill", _kill)
