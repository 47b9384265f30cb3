"""What the commands for operators share: filters, and doing nothing before ``--yes``."""

from __future__ import annotations

import datetime
import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

if TYPE_CHECKING:
    from ..operations import MessageFilter, Operation

__all__ = ["filters", "json_option", "message_filter", "operating", "say"]

C = TypeVar("C", bound=Callable[..., Any])

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_OLDEST: Final = 36_500 * 86400
"""Seconds; PostgreSQL has no time much longer ago."""
_INTERRUPTED: Final = 130
"""The exit code, that of a shell's for SIGINT."""


def _age(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no age: a number of seconds, or one with s, m, h or d", param=parameter)
    seconds = float(match[1]) * _UNITS[match[2] or "s"]
    if seconds > _OLDEST:
        raise click.BadParameter(f"{value!r} is more than a hundred years", param=parameter)
    return seconds


def _moment(_: click.Context, parameter: click.Parameter, value: str | None) -> datetime.datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no time such as 2026-01-31T12:00:00+00:00", param=parameter) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

_FILTERS: Final = (
    click.option("--organization", help="Only this tenant's; '' is work that belongs to none."),
    click.option("--user", "user_id", help="Only what this user launched."),
    click.option("--name", "task_name", help="Only those of this task."),
    click.option("--queue", help="Only those in this queue."),
    click.option(
        "--older-than", metavar="AGE", callback=_age, help="Only what was published so long ago: 90, 15m, 2h, 3d."
    ),
    click.option(
        "--published-before",
        metavar="TIME",
        callback=_moment,
        help="Only what was published before: an ISO time, else UTC.",
    ),
)
_OPERATING: Final = (
    click.option("--yes", is_flag=True, help="Do it; without it, only print what would be done."),
    click.option("--operator", help="Your name, for the audit record; by default that of the user of this process."),
    json_option,
)


def filters(command: C) -> C:
    """Options that say which messages are meant."""
    return functools.reduce(lambda decorated, option: option(decorated), reversed(_FILTERS), command)


def operating(command: C) -> C:
    """Options of what changes something, and what it says when it is interrupted."""

    @functools.wraps(command)
    def interruptible(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            if not options["yes"]:
                raise
            look = shlex.join(["rhesis-tasks", "tasks", "audit", "-A", options["app"]])
            click.echo(f"interrupted: {look} prints what was done until then; it can be run again", err=True)
            sys.exit(_INTERRUPTED)

    return functools.reduce(lambda decorated, option: option(decorated), reversed(_OPERATING), cast(C, interruptible))


def message_filter(
    organization: str | None = None,
    user_id: str | None = None,
    task_name: str | None = None,
    queue: str | None = None,
    older_than: float | None = None,
    published_before: datetime.datetime | None = None,
    task_id: str | None = None,
    states: tuple[str, ...] = (),
) -> MessageFilter:
    """The filter that the options say."""
    from ..operations import MessageFilter, MessageState

    return MessageFilter(
        organization_id=organization,
        user_id=user_id,
        task_name=task_name,
        queue=queue,
        task_id=task_id,
        states=[MessageState(state) for state in states] or None,
        older_than=older_than,
        published_before=published_before,
    )


def say(done: Operation, as_json: bool, nothing: str) -> None:
    """Print what an operation came to; exit with 1 if there was nothing to do."""
    from ..display import as_json as to_json
    from ..display import operation_lines

    if as_json:
        click.echo(to_json({**_summary(done), "found": done.found}))
    elif done.found:
        for line in operation_lines(done, _bounded(done)):
            click.echo(line)
    if not done.found:
        click.echo(f"Error: {nothing}", err=True)
        sys.exit(1)


def _bounded(done: Operation) -> str | None:
    """The command with --yes and a bound, so that what is published after a look is left alone.

    None where a bound would change nothing: for one task, for what is bounded already, for dead letters, which are
    older than their death, and for a tenant that leaves.
    """
    which = done.filter
    bound = done.counted_at - datetime.timedelta(seconds=which.older_than or 0)
    is_bounded = which.task_id is not None or (which.published_before is not None and which.published_before <= bound)
    if is_bounded or done.action == "offboard" or not {"waiting", "delayed", "running"} & {*(which.states or ())}:
        return None
    time = bound.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    return shlex.join(
        ["rhesis-tasks", *_without("--published-before", sys.argv[1:]), "--yes", "--published-before", time]
    )


def _without(option: str, arguments: Sequence[str]) -> Iterator[str]:
    """The arguments but for an option and its value."""
    remaining = iter(arguments)
    for argument in remaining:
        if argument == option:
            next(remaining, None)
        elif not argument.startswith(f"{option}="):
            yield argument


def _summary(done: Operation) -> dict[str, Any]:
    return {
        "action": done.action,
        "operator": done.operator,
        "dry_run": done.is_dry_run,
        "filter": done.filter.values(),
        "counted_at": done.counted_at,
        "before": done.before,
        "after": done.after,
        "counts": done.counts,
        "records": done.records,
        "audit": None if done.is_dry_run else str(done.id),
    }
