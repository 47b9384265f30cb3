"""The command ``rhesis-tasks``.  A command parses, calls one public function, prints.

One file for each command or group of commands.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TextIO

import click
from typing_extensions import override

from ..errors import RhesisTasksError
from .demo import demo
from .flower import flower
from .schema import schema
from .tasks import tasks
from .tenants import tenants
from .worker import worker

__all__ = ["main"]

_ENCODING: Final = "PYTHONIOENCODING"


@contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """End quietly, as if by SIGPIPE, where nobody reads any more what this process prints, as after ``| head -1``.

    Not by the signal itself, which would end it in the middle of something, and where a connection is lost.
    """
    try:
        yield
    except BrokenPipeError as error:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not unread:
            raise click.ClickException(f"a connection was lost: {error}") from error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:
            os.dup2(nowhere, stream.fileno())  # for what Python flushes at its end
        sys.exit(128 + signal.SIGPIPE)


def _has_no_reader(stream: TextIO | None) -> bool:
    """Whether nobody reads what is written there."""
    looked = select.poll()
    try:
        looked.register(-1 if stream is None else stream.fileno(), 0)
    except (OSError, ValueError):  # it is no file, or a closed one
        return False
    return bool(looked.poll(0))


class _Commands(click.Group):
    """Takes a broken pipe for what it is.  Click ends quietly with 1, a failure's code, also for a connection's."""

    @override
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _until_nobody_reads():  # --help
            return super().make_context(*args, **kwargs)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        with _until_nobody_reads():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rhesis-tasks")
def commands() -> None:
    """Celery tasks that know their tenant."""


for command in (demo, flower, schema, tasks, tenants, worker):
    commands.add_command(command)


def _let_successors_print_anything() -> None:
    """Let the worker and Flower, which take this process's place, print names that their output's encoding lacks.

    Celery's banner has the names of all tasks.  What is printed here is click's to care for.
    """
    encoding, _, errors = os.environ.get(_ENCODING, "").partition(":")
    os.environ[_ENCODING] = f"{encoding}:{errors or 'backslashreplace'}"


def _refuse_what_is_no_text(arguments: Sequence[str]) -> None:
    """Raise UsageError at bytes that Python could not decode: no database, JSON or output takes them as a text."""
    before = ""
    for argument in arguments:
        if not _is_text(argument):
            option, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
            option = option if option.startswith("-") and _is_text(option) else "an argument"
            raise click.UsageError(f"{option} is not text in this locale's encoding: {value!r:.80}")
        before = argument


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def main() -> None:
    """The entry point: errors of ours are a message and an exit code, not a traceback."""
    _let_successors_print_anything()
    with _until_nobody_reads():
        try:
            _refuse_what_is_no_text(sys.argv[1:])
            commands(standalone_mode=False)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            sys.exit(130)
        except RhesisTasksError as error:
            click.echo(f"rhesis-tasks: {error}", err=True)
            sys.exit(getattr(error, "exit_code", 1))
        finally:
            if sys.stdout is not None:  # None if it was closed from the beginning
                sys.stdout.flush()  # what an application's modules have printed
