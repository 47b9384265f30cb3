"""What ``rhesis-tasks`` does when nobody reads what it prints, and with arguments that are no text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from rhesis_tasks.cli import main

COMMAND = [sys.executable, "-c", "from rhesis_tasks.cli import main; main()"]
LIKE_BY_SIGPIPE = 128 + signal.SIGPIPE


@pytest.fixture(autouse=True, params=["", "1"], ids=["buffered", "unbuffered"])
def _output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


def unread(*arguments: str, folder: Path, stderr: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command, with a pipe that nobody reads as its output."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=folder,
            stdout=writer,
            stderr=subprocess.PIPE if stderr is None else stderr,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("arguments", [("schema", "sql"), ("--help",), ("--version",)])
def test_without_a_reader_it_ends_quietly_as_other_commands_do(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = unread(*arguments, folder=tmp_path)

    assert (done.returncode, done.stderr) == (LIKE_BY_SIGPIPE, "")


def test_so_it_does_when_errors_have_no_reader_either(tmp_path: Path) -> None:
    done = unread("no-such-command", folder=tmp_path, stderr=subprocess.STDOUT)

    assert done.returncode == LIKE_BY_SIGPIPE


def test_so_it_does_when_an_application_prints_something(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text("print('hello')\nfrom celery import Celery\napp = Celery('chatty')\n")

    done = unread("tasks", "list", "-A", "chatty", folder=tmp_path)

    assert done.returncode == LIKE_BY_SIGPIPE
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_an_output_that_is_closed_from_the_beginning_is_none(tmp_path: Path) -> None:
    command = ["bash", "-c", 'exec "$@" >&-', "-", *COMMAND, "schema", "sql"]

    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_a_lost_connection_is_said_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lost.py").write_text(
        "from celery import Celery\n"
        "class Settings:\n"
        "    def __getattr__(self, name):\n"
        "        raise BrokenPipeError(32, 'of a connection')\n"
        "app = Celery('lost', set_as_current=False)\n"
        "app.config_from_object(Settings())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rhesis-tasks", "worker", "-A", "lost"])

    with mock.patch.object(sys, "path", list(sys.path)), pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: a connection was lost: [Errno 32] of a connection\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((b"tasks", b"list", b"-A", b"shop", b"--organization", b"\xd6sterreich"), "--organization"),
        ((b"tasks", b"purge", b"-A", b"shop", b"--organization=\xd6sterreich"), "--organization"),
        ((b"worker", b"-A", b"\xd6sterreich"), "-A"),
        ((b"schema", b"sql", b"--role", b"\xd6sterreich"), "--role"),
        ((b"tasks", b"show", b"\xd6sterreich"), "an argument"),
        ((b"\xd6sterreich",), "an argument"),
        ((b"--\xd6sterreich=1",), "an argument"),
    ],
)
def test_an_argument_that_is_no_text_is_refused_in_a_line(
    arguments: tuple[bytes, ...], named: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {named} is not text in this locale's encoding: ")
    assert done.stderr.count("\n") == 1
