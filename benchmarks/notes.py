"""What the processes of broker.py's measurements tell each other: settings, notes and gates, all as files.

The environment variable BENCHMARK holds JSON: the broker's ``url`` and transport ``options``, the ``queue``, and the
``folder`` of the files; see :mod:`workload` for the rest.
"""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["Note", "Notes", "settings", "wait_for_gate", "write"]

_FORM: Final = struct.Struct("<dqq")


def settings() -> dict[str, Any]:
    """What this process was told."""
    found: dict[str, Any] = json.loads(os.environ["BENCHMARK"])
    return found


def write(path: Path, value: Any) -> None:
    """Write JSON to a file that is whole as soon as it is there."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value))
    part.rename(path)


class Note(NamedTuple):
    """What a task noted."""

    value: float
    number: int  #: the task's own
    process: int  #: that ran it


class Notes:
    """Notes of the tasks of all workers, in one file; what was noted outlives a worker that is killed.

    A note is one write of 24 bytes at the file's end: two microseconds, the same for all brokers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def note(self, value: float, number: int = 0) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, _FORM.pack(value, number, os.getpid()))

    @property
    def count(self) -> int:
        """How many there are."""
        return self._path.stat().st_size // _FORM.size if self._path.exists() else 0

    def all(self) -> list[Note]:
        """All of them, in the order of writing."""
        whole = self._path.read_bytes() if self._path.exists() else b""
        return [Note(*values) for values in _FORM.iter_unpack(whole[: len(whole) // _FORM.size * _FORM.size])]


def wait_for_gate(gate: Path, timeout: float = 120) -> None:
    """Wait until a file is there; looks each 2 ms, so that all who wait go on together.

    Raises:
        TimeoutError: it did not come within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} seconds for {gate}")
        time.sleep(0.002)
