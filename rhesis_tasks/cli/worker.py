"""``rhesis-tasks worker``: finds out what the worker is told, says so, and becomes ``celery worker``."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ..errors import RhesisTasksError
from ..options import OPTIONS, Found, Option, OptionError, Source, find_options, relevant
from .application import app_option, application

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["worker"]

_OPTS = "CELERY_WORKER_OPTS"
_FLAGS = ("flower",)  # without a value on the command line
_SHORT = {"concurrency": "-c", "pool": "-P", "queues": "-Q", "loglevel": "-l"}


def _with_options(command: click.Command) -> click.Command:
    for option in OPTIONS:
        names = [f"--{option.name}", option.name.replace("-", "_")]
        if option.name in _FLAGS:
            names[0] += f"/--no-{option.name}"
        elif option.name in _SHORT:
            names.append(_SHORT[option.name])
        text = f"{option.help}  [{option.variable}; {option.default or 'none'}]"
        kind: dict[str, Any] = {"default": None} if option.name in _FLAGS else {"type": str, "metavar": "VALUE"}
        command.params.append(click.Option(names, help=text, **kind))
    return command


@_with_options
@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@app_option
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def worker(app: str, more: tuple[str, ...], **given: Any) -> None:
    """Run a worker, as the environment and the command line say.

    The command line wins over the variables, these over CELERY_WORKER_OPTS, that over the application's own settings,
    and those over the defaults.  What is not an option here is one of `celery worker`.
    """
    in_opts, more_opts = _options_in(os.environ.get(_OPTS, ""))
    known = [
        Source(_texts(given), lambda option: f"--{option.name}"),
        Source(
            {option.name: os.environ.get(option.variable, "") for option in OPTIONS}, lambda option: option.variable
        ),
        Source(in_opts, lambda option: f"{_OPTS} --{option.name}"),
    ]
    find_options(relevant(known), known)  # nonsense is refused before anything is imported
    celery = application(app)
    known.append(Source(_of_application(celery), lambda option: f"{option.setting} of the application"))
    found = find_options(relevant(known), known)
    _check(app, celery, found)
    arguments = _arguments(app, found, (*more_opts, *more))
    environ = {**os.environ, **_environment(app, found)}
    _print(app, celery, found, (*more_opts, *more))
    sys.stdout.flush()
    sys.stderr.flush()
    # In place of this process: it is the one that gets the signals, and gevent wants to be there before all others.
    os.execve(sys.executable, [sys.executable, *arguments], environ)  # noqa: S606 - no shell is meant


def _texts(given: Mapping[str, Any]) -> dict[str, str]:
    """What a command line has said, by the options' names."""
    texts = {name.replace("_", "-"): value for name, value in given.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in texts.items()}


def _options_in(opts: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Those of our options that CELERY_WORKER_OPTS has, and what else is in it."""
    try:
        with worker.make_context("worker", ["-A", "-", *shlex.split(opts)]) as context:
            given = dict(context.params)
    except (ValueError, click.UsageError) as error:
        reason = error.format_message() if isinstance(error, click.UsageError) else str(error)
        raise OptionError(f"{_OPTS} cannot be read: {reason}") from None
    if given.pop("app") != "-":
        raise OptionError(f"{_OPTS} names an application, which is for the command line alone: -A")
    return _texts({name: given[name] for name in given if name != "more"}), tuple(given["more"] or ())


def _of_application(app: Celery) -> dict[str, str]:
    """The settings that an application has made by itself."""
    _ = app.conf.worker_pool  # has it read, if it was not
    conf: Any = app.conf
    found = {}
    for option in OPTIONS:
        own = option.setting is not None and any(option.setting in each for each in conf.maps[:-1])
        if own and (value := conf[option.setting]) is not None:
            found[option.name] = str(value)
    return found


def _check(app: str, celery: Celery, found: Mapping[str, Found]) -> None:
    """Refuse what cannot be had here."""
    if not (celery.conf.broker_read_url or celery.conf.broker_transport):
        # Celery would go on to try its default, RabbitMQ on this machine, for minutes.
        raise OptionError(
            f"{app} has no broker.  Is DATABASE_URL missing, or configure() of the application?  Another broker is "
            "named by BROKER_URL, or by CELERY_BROKER_URL for an application that is not configured"
        )
    pool = found["pool"]
    if pool.value == "gevent" and importlib.util.find_spec("gevent") is None:
        raise OptionError(f"{pool.source} is 'gevent', which is not installed: pip install gevent")
    port = found["health-port"]
    if port.value is not None and "flower-port" in found and found["flower-port"].value == port.value:
        raise OptionError(f"{port.source} and {found['flower-port'].source} are the same port, {port.value}")
    if found["flower"].value:
        from ..flower import flower_command

        try:
            flower_command(app, address=found["flower-address"].value, port=found["flower-port"].value)
        except RhesisTasksError as error:
            raise OptionError(f"{found['flower'].source}: {error}") from None


def _arguments(app: str, found: Mapping[str, Found], more: tuple[str, ...]) -> list[str]:
    arguments = ["-m", "celery", *(["-q"] if found["log-format"].value == "json" else []), "-A", app, "worker"]
    for each in found.values():
        if each.option.celery is not None and each.value is not None and _is_for(each.option, found):
            arguments += [each.option.celery, each.text]
    return [*arguments, *more]


def _is_for(option: Option, found: Mapping[str, Found]) -> bool:
    """Whether an option is of use to the pool."""
    pool = found["pool"].value
    useless = {"max-tasks-per-child": pool != "prefork", "concurrency": pool == "solo"}
    return not useless.get(option.name, False)


def _environment(app: str, found: Mapping[str, Found]) -> dict[str, str]:
    """What the worker is to read, beyond Celery's options."""
    environ = {each.option.variable: each.text for each in found.values() if each.option.celery is None}
    return {**environ, "RHESIS_TASKS_WORKER_APP": app}


def _print_json(level: str, message: str, **more: Any) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    click.echo(json.dumps({"time": now, "level": level, "logger": __name__, "message": message, **more}), err=True)


def _print(app: str, celery: Celery, found: Mapping[str, Found], more: tuple[str, ...]) -> None:
    shown = [each for each in found.values() if _is_for(each.option, found) and each.value is not None]
    if found["log-format"].value == "json":
        settings = {each.option.name: {"value": each.value, "source": each.source} for each in shown}
        _print_json("INFO", f"a worker of {app}", settings=settings, celery_options=more)
        return
    click.echo(f"A worker of {app} ({celery.main})")
    for each in shown:
        click.echo(f"  {each.option.name:<20} {each.text:<20} {each.source}")
    if more:
        click.echo(f"  {'for celery':<20} {shlex.join(more)}")
