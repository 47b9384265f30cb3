"""Child processes that are gone afterwards, whenever this one is interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rhesis_tasks.processes import child, wait_until


class InterruptionError(Exception):
    """A signal came."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    def interrupt(number: int, _: object) -> None:
        raise InterruptionError(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def processes_of(mark: str) -> list[str]:
    found = []
    for command in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MARK={mark}".encode() in command.read_bytes():
                found.append(command.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_signal_at_any_moment_of_its_start_leaves_no_process(tmp_path: Path) -> None:
    mark = str(tmp_path)

    def interrupted_after(seconds: float) -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with child("sleeper", ["sleep", "100"], env={"MARK": mark}):
            time.sleep(10)

    for number in range(60):
        with pytest.raises(InterruptionError):
            interrupted_after(number * 0.0001)

    wait_until("all to be gone", lambda: processes_of(mark) == [], 10)
