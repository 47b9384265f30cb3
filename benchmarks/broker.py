"""Compares brokers under Celery: no-op tasks, the same settings, all on this machine.  See README.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from arguments import positive
from report import Measurement, machine, plot, summaries, table
from servers import NAMES, Broker, install, started

from rhesis_tasks.processes import Child, ChildFailedError, child, python, wait_until

_HERE: Final = Path(__file__).resolve().parent
_WARM_UP: Final = 20  #: messages that are published before it counts; they are run and counted there
_WORKER: Final = (
    *("-m", "celery", "-A", "workload", "worker", "--pool", "threads", "--concurrency", "4", "--loglevel", "WARNING"),
    *("--hostname", "bench@localhost", "--without-gossip", "--without-mingle", "--without-heartbeat"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int
    messages: int
    samples: int

    @property
    def timeout(self) -> float:
        """Seconds after which a step has failed; no broker here is that slow."""
        return 30 + self.messages / 20 + self.samples * 2


# --- one broker, one round -------------------------------------------------------------------------------------


def measure(broker: Broker, round: int, settings: Settings, folder: Path) -> Measurement:
    """Publish, run, and then see how soon an idle worker starts a task.

    Raises:
        ChildFailedError, TimeoutError: the publisher or the worker failed.
    """
    total = settings.messages + _WARM_UP
    environment = _environment(broker, f"bench{round}", folder, total, settings.samples)
    _publish("publish", settings.messages, _WARM_UP, folder / "publish.json", env=environment, settings=settings)
    with child("the worker", python(*_WORKER), env=environment, cwd=_HERE) as worker:
        starts = _result(folder / "run.json", worker, settings.timeout)
        _publish("trickle", settings.samples, round, env=environment, settings=settings)
        latencies = _result(folder / "latency.json", worker, settings.timeout)
        worker.stop(timeout=1)  # a warm shutdown takes seconds, and nothing is left to do
    return Measurement(
        round,
        broker.name,
        publish=settings.messages / json.loads((folder / "publish.json").read_text()),
        run=(total - 1) / (max(starts) - min(starts)),
        latencies=tuple(latency * 1000 for latency in latencies),
    )


def _environment(broker: Broker, queue: str, folder: Path, messages: int, samples: int) -> dict[str, str]:
    """What workload.py reads."""
    found = {"url": broker.url, "options": dict(broker.options), "queue": queue, "folder": str(folder)}
    return {"BENCHMARK": json.dumps({**found, "messages": messages, "samples": samples})}


def _publish(*arguments: object, env: Mapping[str, str], settings: Settings) -> None:
    with child("the publisher", python("publisher.py", *map(str, arguments)), env=env, cwd=_HERE) as publisher:
        wait_until("the publisher", lambda: not publisher.running, settings.timeout)
        if publisher.process.returncode:
            raise ChildFailedError(f"the publisher failed: {_last_line(publisher)}")


def _result(file: Path, worker: Child, timeout: float) -> Any:
    def is_there() -> bool:
        if not file.exists() and not worker.running:
            raise ChildFailedError(f"the worker ended: {_last_line(worker)}")
        return file.exists()

    try:
        wait_until(f"the worker's {file.stem}", is_there, timeout)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; it printed last: {_last_line(worker)}") from None
    return json.loads(file.read_text())


def _last_line(process: Child) -> str:
    lines = process.output.strip().splitlines()
    return lines[-1] if lines else "nothing"


# --- all of them -----------------------------------------------------------------------------------------------


def compare(names: Sequence[str], settings: Settings) -> tuple[list[Measurement], dict[str, str], dict[str, Any]]:
    """Measure brokers in turn, round by round.

    Returns:
        The measurements, why brokers are missing from them, and facts about the machine.
    """
    with stoppable(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rhesis-bench-")))
        brokers, missing = [], {}
        _say("starting the servers ...")
        for found in started(names, stack, folder):
            if isinstance(found, Broker):
                brokers.append(found)
            else:
                missing[found[0]] = found[1]
        facts = machine({broker.name: broker.version for broker in brokers})
        measurements = []
        for round in range(1, settings.rounds + 1):
            for broker in brokers:
                if broker.name in missing:
                    continue
                work = folder / f"{broker.name}-{round}"
                work.mkdir()
                try:
                    measurement = measure(broker, round, settings, work)
                except (ChildFailedError, TimeoutError) as error:
                    missing[broker.name] = f"failed in round {round}: {error}"
                    _say(f"{NAMES[broker.name]} {missing[broker.name]}")
                else:
                    measurements.append(measurement)
                    _say(f"round {round}: {NAMES[broker.name]:20} {_brief(measurement)}")
    return measurements, missing, facts


def _brief(one: Measurement) -> str:
    latency = sorted(one.latencies)[len(one.latencies) // 2]
    return f"publish {one.publish:7,.0f}/s  run {one.run:7,.0f}/s  idle {latency:7.1f} ms"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that nothing that was started stays."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- the command -----------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command; returns 1 if nothing could be measured."""
    options = _options()
    if options.install:
        install(options.brokers)
    settings = Settings(options.rounds, options.messages, options.samples)
    measurements, missing, facts = compare(options.brokers, settings)
    found = summaries(measurements)
    print(table(found, missing, markdown=options.markdown))
    print(f"\n{_about(settings, facts)}")
    if options.json:
        everything = {
            "settings": asdict(settings),
            "machine": facts,
            "missing": missing,
            "summaries": [asdict(each) for each in found],
            "measurements": [asdict(each) for each in measurements],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if options.plot and found:
        plot(found, options.plot)
    return 0 if found else 1


def _about(settings: Settings, facts: Mapping[str, Any]) -> str:
    servers = ", ".join(f"{NAMES[name]}: {version}" for name, version in facts["servers"].items())
    return (
        f"{settings.rounds} rounds of {settings.messages} messages and {settings.samples} latencies; {facts['cores']} "
        f"cores, load {facts['load']} before; 8 kB written and flushed in {facts['flush_us']} us; Python "
        f"{facts['python']}, Celery {facts['celery']}, kombu {facts['kombu']}, psycopg {facts['psycopg']}, SQLAlchemy "
        f"{facts['sqlalchemy']}\nServers: {servers}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brokers", type=_names, default=list(NAMES), help=f"some of {','.join(NAMES)}; default all")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each is measured; default 3")
    parser.add_argument("--messages", type=positive, default=2000, help="published and run in each; default 2000")
    parser.add_argument("--samples", type=positive, default=40, help="latencies in each; default 40")
    parser.add_argument("--install", action="store_true", help="first install what is missing from Debian and PyPI")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG; needs matplotlib")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
