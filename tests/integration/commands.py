"""The command ``rhesis-tasks`` in this process: starting one for each costs more than what it does."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from rhesis_tasks.cli import main


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """What a command has done."""

    code: int
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    def value(self, name: str) -> str | None:
        """What comes after ``name:``."""
        found = [line.partition(":")[2].strip() for line in self.lines if line.startswith(f"{name}:")]
        return found[0] if found else None


def ran(*arguments: str, **environment: str) -> Ran:
    """What ``rhesis-tasks ...`` does, with these variables besides the others."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(output),
        redirect_stderr(errors),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["rhesis-tasks", *arguments]),
        mock.patch.object(sys, "path", list(sys.path)),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ran(code, output.getvalue(), errors.getvalue())
