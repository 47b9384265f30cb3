"""Child processes that are surely gone afterwards, for the demo and for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RhesisTasksError

__all__ = ["Child", "ChildFailedError", "child", "free_port", "python", "wait_until"]


class ChildFailedError(RhesisTasksError):
    """A child process ended or did not become ready in time."""


class Child:
    """A running process whose output is collected."""

    def __init__(self, name: str, process: subprocess.Popen[str], keep: int = 2000) -> None:
        self.name = name
        self.process = process
        self._lines: deque[str] = deque(maxlen=keep)
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._collect, name=f"output of {name}", daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        stream = self.process.stdout
        if stream is not None:
            for line in stream:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self) -> str:
        """The last lines that it printed, on both streams."""
        with self._changed:
            return "".join(self._lines)

    def finished_output(self, timeout: float = 5.0) -> str:
        """The output of a process that has ended, once it is all read."""
        self._reader.join(timeout)
        return self.output

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, text: str, timeout: float = 30.0) -> None:
        """Wait until it has printed a text.

        Raises:
            ChildFailedError: it ended before, or ``timeout`` seconds went by; with the output's end.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not any(text in line for line in self._lines):
                remaining = deadline - time.monotonic()
                if self._ended:
                    raise ChildFailedError(f"{self.name} ended before it printed {text!r}:\n{self._tail()}")
                if remaining <= 0 or not self._changed.wait(remaining):
                    raise ChildFailedError(
                        f"{self.name} did not print {text!r} within {timeout:g} seconds:\n{self._tail()}"
                    )

    def _tail(self) -> str:
        return "".join(list(self._lines)[-40:])

    def stop(self, timeout: float = 15.0) -> None:
        """Ask it to stop, and kill it and its children if it has not within ``timeout`` seconds."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # also pool processes that outlived their parent
        self.process.wait()
        self._reader.join(timeout=5)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def child(
    name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Child]:
    """A process in a group of its own, stopped at the end of the block.

    Args:
        name: what messages call it.
        command: the program and its arguments.
        env: added to this process's environment.
        cwd: the folder it runs in.
    """
    running: Child | None = None
    try:
        with _signals_later():
            running = Child(name, _started(command, env or {}, cwd))
        yield running
    finally:
        if running is not None:
            running.stop()


def _started(command: Sequence[str], env: Mapping[str, str], cwd: Path | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        # A Ctrl-C is for us: we stop our children in order.
        start_new_session=True,
    )


@contextmanager
def _signals_later() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block: what they interrupt there, nobody would know of.

    They are handled in the main thread only, so that in others there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    handled = {each: handler for each, handler in before.items() if callable(handler)}
    for each in handled:
        signal.signal(each, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for each, handler in handled.items():
            signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)


def python(*arguments: str) -> list[str]:
    """The command that runs this environment's Python."""
    return [sys.executable, *arguments]


def free_port() -> int:
    """A TCP port on the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(what: str, condition: Callable[[], bool], timeout: float = 30.0, interval: float = 0.05) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds; the text says what was waited for.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} seconds for {what}")
        time.sleep(interval)
