"""One broker with one queue in one round: the publishers and workers that are started there, and what they note."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from notes import Notes
from servers import Broker

from rhesis_tasks.processes import Child, ChildFailedError, child, python, wait_until

__all__ = ["CONCURRENCY", "Stage"]

_HERE: Final = Path(__file__).resolve().parent
CONCURRENCY: Final = 4  #: threads of a worker
_QUIET: Final = ("--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat")


@dataclass(frozen=True, slots=True)
class Stage:
    """Where something is measured.

    All methods raise ChildFailedError or TimeoutError if a process fails.
    """

    broker: Broker
    queue: str  #: a new one
    folder: Path  #: for its notes; a new one
    timeout: float  #: seconds after which a step has failed; no broker here is that slow

    def notes(self, name: str) -> Notes:
        """What tasks have noted so far."""
        return Notes(self.folder / name)

    def open_gate(self, name: str) -> None:
        """Let all who wait at a gate go on."""
        (self.folder / name).touch()

    def _environment(self, **more: Any) -> dict[str, str]:
        found = {"url": self.broker.url, "options": dict(self.broker.options), "workload": self.broker.workload}
        return {"BENCHMARK": json.dumps({**found, "queue": self.queue, "folder": str(self.folder), **more})}

    # --- publishing ------------------------------------------------------------------------------------------

    @contextmanager
    def publishing(self, *arguments: object, **more: Any) -> Iterator[None]:
        """Run publisher.py beside the block, and wait for its end behind it."""
        command = python("publisher.py", *map(str, arguments))
        with child("the publisher", command, env=self._environment(**more), cwd=_HERE) as publisher:
            yield
            wait_until("the publisher", lambda: not publisher.running, self.timeout, 0.01)
            if publisher.process.returncode:
                raise ChildFailedError(f"the publisher failed: {_last_line(publisher)}")

    def publish(self, *arguments: object, **more: Any) -> None:
        """Run publisher.py to its end."""
        with self.publishing(*arguments, **more):
            pass

    def seconds(self, *arguments: object, **more: Any) -> float:
        """Run publisher.py to its end; returns how long it says that it took."""
        file = self.folder / f"publisher-{'-'.join(map(str, arguments))}"
        self.publish(*arguments, file, **more)
        return float(json.loads(file.read_text()))

    # --- working ---------------------------------------------------------------------------------------------

    @contextmanager
    def worker(self, *, number: int = 0, concurrency: int = CONCURRENCY, **more: Any) -> Iterator[Child]:
        """A worker process; killed at the end, since a warm shutdown takes seconds and nothing is left to do."""
        if self.broker.workload == "workload":
            command = ("-m", "celery", "-A", "workload", "worker", "--pool", "threads", *_QUIET)
            command += ("--concurrency", str(concurrency), "--hostname", f"bench{number}@localhost")
        else:
            command = (f"{self.broker.workload}.py",)
        with child("the worker", python(*command), env=self._environment(**more), cwd=_HERE) as worker:
            try:
                yield worker
            finally:
                worker.stop(timeout=0.5)

    @contextmanager
    def workers(self, count: int, **more: Any) -> Iterator[list[Child]]:
        """Workers that wait at their gates; behind ``start`` they connect, behind ``go`` they run tasks."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.worker(number=number, gates=True, **more)) for number in range(count)]

    def wait_for_files(self, pattern: str, count: int, workers: list[Child]) -> None:
        """Wait until so many workers have said that they are there."""
        self._wait(pattern, lambda: len(list(self.folder.glob(pattern))) >= count, workers)

    def wait_for_notes(self, name: str, count: int, workers: list[Child], timeout: float | None = None) -> None:
        """Wait until tasks have noted so much."""
        notes = self.notes(name)
        self._wait(f"{count} {name}", lambda: notes.count >= count, workers, timeout)

    def _wait(self, what: str, condition: Any, workers: list[Child], timeout: float | None = None) -> None:
        def is_so() -> bool:
            for worker in workers:
                if not worker.running:
                    raise ChildFailedError(f"the worker ended: {_last_line(worker)}")
            return bool(condition())

        try:
            wait_until(what, is_so, self.timeout if timeout is None else timeout, 0.02)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; a worker printed last: {_last_line(workers[0])}") from None


def _last_line(process: Child) -> str:
    lines = process.output.strip().splitlines()
    return lines[-1] if lines else "nothing"
