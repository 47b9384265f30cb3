"""What a worker is told by its command line and its environment: a table, and how a value is found.

Pure: it reads what it is given.  ``rhesis-tasks worker`` hands on what it has found in the environment of the worker
that it becomes, where :mod:`.services` reads the part that is not Celery's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from .errors import ConfigurationError

__all__ = ["OPTIONS", "Found", "Option", "OptionError", "Source", "find_options", "relevant"]


class OptionError(ConfigurationError):
    """A setting of a worker's cannot be what it was set to."""

    exit_code = 2  #: of the command, as for a wrong command line


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One thing that a worker can be told.

    Attributes:
        name: on the command line, without its dashes.
        variable: in the environment.
        default: as text; None leaves it out.
        read: makes the value from a text; raises ValueError, whose text completes "it must be".
        help: what it is, for ``--help``.
        celery: the option of ``celery worker`` that it becomes.
        setting: the setting of Celery's that an application may have made instead.
    """

    name: str
    variable: str
    default: str | None
    read: Callable[[str], Any]
    help: str
    celery: str | None = None
    setting: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where values come from; of several sources the first one that has a value wins.

    Attributes:
        values: the texts, by the options' names.
        said: how to call the place where an option's value was found.
    """

    values: Mapping[str, str]
    said: Callable[[Option], str]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A value, and where it was found."""

    option: Option
    value: Any
    source: str

    @property
    def text(self) -> str:
        """As a variable of the environment has it."""
        if self.value is None:
            return ""
        if isinstance(self.value, bool):
            return "true" if self.value else "false"
        return ",".join(self.value) if isinstance(self.value, tuple) else f"{self.value}"


def find_options(options: Sequence[Option], sources: Sequence[Source]) -> dict[str, Found]:
    """The value of each option, from the first source that has one, or else its default.

    An empty text counts as none.

    Raises:
        OptionError: a value is none; the text names where it is from.
    """
    found = {}
    for option in options:
        text, said = option.default, "default"
        for source in sources:
            if source.values.get(option.name):
                text, said = source.values[option.name], source.said(option)
                break
        try:
            value = None if text is None else option.read(text.strip())
        except ValueError as error:
            raise OptionError(f"{said} is {text!r:.100}, and must be {error}") from None
        found[option.name] = Found(option, value, said)
    return found


# --- kinds of values ---------------------------------------------------------------------------------------------


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    bounds = f"from {least} on" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise ValueError(f"a whole number {bounds}")
        return int(text)

    return read


_LONGEST: Final = 1_000_000  # seconds, eleven days


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < _LONGEST:
        raise ValueError(f"a number of seconds above 0 and below {_LONGEST}")
    return seconds


def _one_of(*names: str, upper: bool = False) -> Callable[[str], str]:
    def read(text: str) -> str:
        name = text.upper() if upper else text.lower()
        if name not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return name

    return read


_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off"})


def _flag(text: str) -> bool:
    if text.lower() not in _YES | _NO:
        raise ValueError("true or false")
    return text.lower() in _YES


def _queues(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(name and len(name) <= 255 and name.isprintable() for name in names):
        raise ValueError("names of queues with commas between them, each of 1 to 255 characters")
    return names


def _address(text: str) -> str:
    if not text or not text.isprintable() or any(each in text for each in " /@"):
        raise ValueError("an address or a host's name")
    return text


# --- the table ---------------------------------------------------------------------------------------------------

OPTIONS: Final = (
    Option(
        "pool",
        "CELERY_WORKER_POOL",
        "prefork",
        _one_of("prefork", "threads", "solo", "gevent"),
        "What runs tasks.",
        celery="--pool",
        setting="worker_pool",
    ),
    Option(
        "concurrency",
        "CELERY_WORKER_CONCURRENCY",
        "8",
        _whole(1, 10_000),
        "How many tasks run at once.",
        celery="--concurrency",
        setting="worker_concurrency",
    ),
    Option(
        "prefetch-multiplier",
        "CELERY_WORKER_PREFETCH_MULTIPLIER",
        "4",
        _whole(1),
        "How many messages are claimed ahead, those that run included, for each task that can run.",
        celery="--prefetch-multiplier",
        setting="worker_prefetch_multiplier",
    ),
    Option(
        "max-tasks-per-child",
        "CELERY_WORKER_MAX_TASKS_PER_CHILD",
        "1000",
        _whole(1),
        "After so many tasks a process of the prefork pool is replaced.",
        celery="--max-tasks-per-child",
        setting="worker_max_tasks_per_child",
    ),
    Option(
        "queues",
        "CELERY_WORKER_QUEUES",
        None,
        _queues,
        "The queues to consume from, with commas between them; by default the application's.",
        celery="--queues",
    ),
    Option(
        "loglevel",
        "CELERY_WORKER_LOGLEVEL",
        "INFO",
        _one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", upper=True),
        "From which level on lines are logged.",
        celery="--loglevel",
    ),
    Option("log-format", "LOG_FORMAT", "text", _one_of("text", "json"), "The form of a line of the log."),
    Option(
        "stop-timeout",
        "CELERY_WORKER_STOP_TIMEOUT",
        "25",
        _seconds,
        "Seconds that running tasks have after SIGTERM, until they are stopped and their messages given back.",
    ),
    Option("health-port", "HEALTH_PORT", None, _whole(1, 65535), "Serve /livez, /readyz and /metrics on this port."),
    Option("health-address", "HEALTH_ADDRESS", "127.0.0.1", _address, "The address to serve them on."),
    Option(
        "health-timeout", "HEALTH_TIMEOUT", "3", _seconds, "Seconds after which /readyz and /metrics answer anyway."
    ),
    Option(
        "health-loop-timeout",
        "HEALTH_LOOP_TIMEOUT",
        "60",
        _seconds,
        "Seconds for which the consumer's loop may stand still until /livez says so.",
    ),
    Option(
        "metrics-tenants",
        "METRICS_TENANTS",
        "0",
        _whole(0, 1000),
        "Of how many tenants, the busiest, /metrics has figures of their own.",
    ),
    Option("flower", "ENABLE_FLOWER", "false", _flag, "Run Flower beside the worker."),
    Option("flower-address", "FLOWER_ADDRESS", "127.0.0.1", _address, "The address that Flower listens on."),
    Option("flower-port", "FLOWER_PORT", "5555", _whole(1, 65535), "The port that Flower listens on."),
)
"""What ``rhesis-tasks worker`` can be told, and by which variables.  docs/configuration.md says why the defaults are
what they are."""


def relevant(sources: Sequence[Source]) -> list[Option]:
    """The options that are looked at: of what is not wanted, a port may be anything (Kubernetes sets FLOWER_PORT).

    Raises:
        OptionError: it cannot be read whether something is wanted.
    """
    wanted = find_options([option for option in OPTIONS if option.name in ("flower", "health-port")], sources)
    unwanted = set() if wanted["flower"].value else {"flower-port", "flower-address"}
    if wanted["health-port"].value is None:
        unwanted |= {"health-address", "health-timeout", "health-loop-timeout", "metrics-tenants"}
    return [option for option in OPTIONS if option.name not in unwanted]
