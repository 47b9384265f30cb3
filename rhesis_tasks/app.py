"""``configure()``: the one call that makes a Celery application tenant-aware."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery import Celery
from celery.app.amqp import AMQP
from celery.app.defaults import SETTING_KEYS
from celery.signals import beat_init, celeryd_init
from sqlalchemy.engine import URL

from . import hooks, logs, outcomes, propagation
from .amqp import ContextAMQP
from .disclosure import use_disclosure
from .errors import ConfigurationError
from .failures import Redact, use_redaction
from .guard import Guard
from .loops import loop_factory
from .postgres.patience import be_patient
from .sessions import TenantSessions, require_sessions, sessions_of, use_sessions
from .settings import DEFAULT_SCHEMA, result_backend_url, schema_name, url_text
from .settings import broker_url as broker_form
from .settings import database_url as database_form
from .signing import Signer
from .task import ContextTask

__all__ = ["configure", "unconfigure"]

DEFAULTS: Final[Mapping[str, Any]] = {
    # A task is acknowledged when it is done, not when it is received.
    "task_acks_late": True,
    # "started" is a state of its own, with its time.
    "task_track_started": True,
    # Pickle from a broker runs whatever it says.
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
    # In a web process somebody waits for the answer.  Celery's three retries are over in less than a second where a
    # connection is refused; where nobody answers a new one, each takes broker_connection_timeout, 16 seconds in all.
    "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0.5, "interval_step": 0, "interval_max": 0.5},
    "worker_log_format": logs.WORKER_LOG_FORMAT,
    "worker_task_log_format": logs.TASK_LOG_FORMAT,
}
"""Celery settings that an application gets unless it has its own."""

WORKER_DEFAULTS: Final[Mapping[str, Any]] = {
    # A task that launches another one waits through an outage of the broker, about a minute and a half.
    "task_publish_retry_policy": {"max_retries": 100, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
}
"""The same for workers and beat, which are known by the signals that Celery sends as they start."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Configuration:
    """What an application was configured with, to tell a repeated call from a contradictory one."""

    database_url: str | None
    broker_url: str | None
    result_backend: str | None
    schema: str
    event_loop: str
    launch_records: bool
    health_port: int | None
    redact: Redact | None
    show_arguments: bool
    sessions: TenantSessions | None
    signing_keys: str | None  # their fingerprint
    overrides: tuple[tuple[str, Any], ...]


_DEFAULTS_UID: Final = "rhesis_tasks.defaults"
# By their names, so that other processes than workers do not import them.
_SERVICES: Final = "rhesis_tasks.services:Services"
_CONSUMER_STEPS: Final = frozenset(
    {
        Guard,
        "rhesis_tasks.services:LoopWatch",
        "rhesis_tasks.stopping:GivenJobs",
        "rhesis_tasks.stopping:ColdBound",
    }
)
_ABSENT: Final = object()
_replaced: weakref.WeakKeyDictionary[Celery, dict[str, Any]] = weakref.WeakKeyDictionary()  # defaults of Celery's
_configured: weakref.WeakKeyDictionary[Celery, _Configuration] = weakref.WeakKeyDictionary()


def configure(
    app: Celery,
    database_url: str | URL | None = None,
    *,
    broker_url: str | URL | None = None,
    result_backend: str | URL | None = None,
    sessions: TenantSessions | None = None,
    signing_keys: Sequence[str | bytes] = (),
    schema: str | None = None,
    event_loop: str = "asyncio",
    launch_records: bool = True,
    health_port: int | None = None,
    redact: Redact | None = None,
    show_arguments: bool = False,
    **overrides: Any,
) -> None:
    """Make a Celery application tenant-aware.  Call it right after ``Celery(...)``.

    Every task of the application carries the context from then on, Celery's built-in ones too; tasks based on
    :class:`~rhesis_tasks.BaseTask` refuse to work without a tenant.  Calling it again with the same arguments
    changes nothing.  An explicit setting of the application's own wins over our defaults.

    Args:
        app: the application, before it is finalised.
        database_url: a PostgreSQL URL; by default the environment's DATABASE_URL.  Becomes the broker, the
            result backend and the tenant sessions, each unless it is given by itself.
        broker_url: by default BROKER_URL, else the database.
        result_backend: by default CELERY_RESULT_BACKEND, else the database.
        sessions: the sessions that tasks use; by default made from the database URL.
        signing_keys: secrets of at least 16 bytes, newest first, the same for publishers and workers.  With them the
            context is signed, and a task whose context is not, or by nobody who has a key, never runs.
        schema: the schema of the library's own tables; by default RHESIS_TASKS_SCHEMA, or ``rhesis_tasks``.
        launch_records: whether a task has a record from its launch on (on PostgreSQL); without, from its start on, and
            until then it is unknown to its tenant and cannot be cancelled.
        health_port: the port on which workers serve /livez, /readyz and /metrics; by default HEALTH_PORT, or none.
        redact: what the texts of a failure, its message and its traceback, become before they are stored (on
            PostgreSQL) or logged: a function of a str that returns one.  If it fails, nothing of the text is kept.
        show_arguments: whether the arguments and results of tasks are shown in events, by ``celery inspect`` and so in
            Flower, where all tenants' tasks are seen; without, only whose each task is.
        event_loop: what runs ``async def`` tasks: ``asyncio``, or ``uvloop`` (extra ``uvloop``).
        **overrides: any Celery setting by its lower-case name.

    Raises:
        ConfigurationError: the application is in use already, was configured otherwise, or an argument is wrong.
        MissingExtraError: a PostgreSQL URL is given and psycopg is not installed, or uvloop is not.
    """
    if not isinstance(app, Celery):
        raise ConfigurationError(
            f"the first argument of configure() is the Celery application, not {type(app).__name__}.  Call "
            "configure(app, ...)"
        )
    database_url, broker_url, result_backend = (
        None if url is None else url_text(url) for url in (database_url, broker_url, result_backend)
    )
    unknown = sorted(set(overrides) - SETTING_KEYS)
    if unknown:
        raise ConfigurationError(f"Celery has no settings named {', '.join(unknown)}")
    require_sessions(sessions)
    for name, flag in (("launch_records", launch_records), ("show_arguments", show_arguments)):
        if not isinstance(flag, bool):  # "false", of an environment variable, would count as True
            raise ConfigurationError(f"{name}= is True or False, not {flag!r}")
    if redact is not None and not callable(redact):
        raise ConfigurationError(f"redact= is a function of a str that returns one, not {redact!r}")
    loop_factory(event_loop)
    signer = None if signing_keys == () else Signer(signing_keys)
    environ = os.environ
    database_url = database_url or environ.get("DATABASE_URL") or None
    if database_url is not None:
        database_form(database_url)  # a wrong one is an error here, not when a worker first connects
    broker = broker_url or environ.get("BROKER_URL") or None
    results = result_backend or environ.get("CELERY_RESULT_BACKEND") or None
    wanted = _Configuration(
        database_url,
        broker,
        results,
        schema_name(schema),
        event_loop,
        launch_records,
        health_port,
        redact,
        show_arguments,
        sessions,
        signer.fingerprint if signer else None,
        tuple(sorted(overrides.items())),
    )
    known = _configured.get(app)
    if known is not None:
        if known == wanted:
            return
        raise ConfigurationError(
            f"application {app.main!r} is configured already, with other arguments: {_difference(known, wanted)}.  "
            "Call configure() once, or unconfigure(app) first"
        )
    if getattr(app, "finalized", False) or "Task" in vars(app):
        raise ConfigurationError(
            f"application {app.main!r} is in use already, so its tasks were made without the context.  Call "
            "configure(app, ...) right after Celery(...)"
        )
    if not issubclass(ContextTask, _class_of(app.task_cls)):
        raise ConfigurationError(
            f"application {app.main!r} has its own task class {app.task_cls!r}.  Let it inherit from "
            "rhesis_tasks.BaseTask and name it as base= instead of task_cls="
        )
    _apply_settings(app, wanted, explicit_broker=broker_url, explicit_results=result_backend)
    app.conf.update(overrides)
    app.task_cls = ContextTask  # type: ignore[assignment]  # the stubs know it as a name only
    if _class_of(app.amqp_cls) is AMQP:
        app.amqp_cls = ContextAMQP  # type: ignore[assignment]
    if sessions is None and database_url is not None:
        sessions = TenantSessions(database_url)
    use_sessions(app, sessions)
    use_redaction(app, redact)
    use_disclosure(app, show_arguments=show_arguments)
    hooks.install()  # first, since hooks run before the context is gone
    propagation.install(app, signer, launch_records=launch_records)
    outcomes.install()
    app.steps["consumer"].update(_CONSUMER_STEPS)
    app.steps["worker"].add(_SERVICES)
    logs.install()
    celeryd_init.connect(_work, weak=False, dispatch_uid=f"{_DEFAULTS_UID}.worker")
    beat_init.connect(_work, weak=False, dispatch_uid=f"{_DEFAULTS_UID}.beat")
    _configured[app] = wanted


def unconfigure(app: Celery) -> None:
    """Undo :func:`configure`, for tests.  Overrides, and tasks that were made meanwhile, stay as they are."""
    known = _configured.pop(app, None)
    if known is None:
        return
    if known.sessions is None and known.database_url is not None:
        sessions_of(app).dispose()  # made by configure()
    app.on_after_configure.disconnect(dispatch_uid=_DEFAULTS_UID)
    for key, value in _replaced.pop(app, {}).items():
        if value is _ABSENT:
            del _celerys_defaults(app)[key]
        else:
            _celerys_defaults(app)[key] = value
    app.backend_cls = None
    propagation.uninstall(app)
    use_redaction(app, None)
    use_disclosure(app, show_arguments=False)
    app.steps["consumer"].difference_update(_CONSUMER_STEPS)
    app.steps["worker"].discard(_SERVICES)
    use_sessions(app, None)
    if not _configured:
        be_patient(False)
        logs.uninstall()
        outcomes.uninstall()
        hooks.uninstall()


def _apply_settings(
    app: Celery, wanted: _Configuration, *, explicit_broker: str | None, explicit_results: str | None
) -> None:
    broker = wanted.broker_url or wanted.database_url
    results = wanted.result_backend or wanted.database_url
    defaults = {**DEFAULTS, "rhesis_tasks_schema": wanted.schema, "rhesis_tasks_event_loop": wanted.event_loop}
    if wanted.health_port is not None:
        defaults["rhesis_tasks_health_port"] = wanted.health_port
    if wanted.schema != DEFAULT_SCHEMA:
        # For a broker URL that is not given here (-b, CELERY_BROKER_URL, the application's own).
        defaults["broker_transport_options"] = {"default_schema": wanted.schema}
    if broker is not None:
        defaults["broker_url"] = broker_form(broker, wanted.schema)
    if results is not None:
        defaults["result_backend"] = result_backend_url(results)
    _add_defaults(app, defaults)
    # What is given to configure() is as explicit as what is given to Celery().
    if explicit_broker is not None:
        app.conf.update(broker_url=broker_form(explicit_broker, wanted.schema))
    if explicit_results is not None:
        app.conf.update(result_backend=result_backend_url(explicit_results))
    if wanted.result_backend is not None and os.environ.get("CELERY_RESULT_BACKEND"):
        # Celery reads this variable by itself, above all else and only in its own forms.
        app.backend_cls = result_backend_url(wanted.result_backend)


def _add_defaults(app: Celery, defaults: dict[str, Any]) -> None:
    """Settings below all of the application's own, whenever and however those are made.

    (``app.add_defaults`` puts them above a configuration object's.)
    """

    def add(**_: Any) -> None:
        celerys = _celerys_defaults(app)
        _replaced[app] = {key: celerys.get(key, _ABSENT) for key in defaults}
        celerys.update(defaults)

    if getattr(app, "configured", False):
        add()
    # Sent each time that Celery has read its configuration.
    app.on_after_configure.connect(add, weak=False, dispatch_uid=_DEFAULTS_UID)


def _work(sender: Any = None, instance: Any = None, **_: Any) -> None:
    """A worker or beat begins in this process."""
    app = (instance or sender).app
    if app in _configured:
        be_patient()
        _ = app.conf.broker_url  # has it read, if it was not
        celerys = _celerys_defaults(app)
        for key in WORKER_DEFAULTS:
            _replaced[app].setdefault(key, celerys.get(key, _ABSENT))
        celerys.update(WORKER_DEFAULTS)


def _celerys_defaults(app: Celery) -> dict[str, Any]:
    """Celery's defaults, of which each application has its own copy.

    Ours are among them, since one more map would slow down every look-up of a setting.
    """
    conf: Any = app.conf
    defaults: dict[str, Any] = conf.maps[-1]
    return defaults


def _class_of(task_cls: Any) -> type:
    from celery.utils.imports import symbol_by_name

    found: type = symbol_by_name(task_cls)
    return found


def _difference(known: _Configuration, wanted: _Configuration) -> str:
    names = [field.name for field in dataclasses.fields(known)]
    return ", ".join(name for name in names if getattr(known, name) != getattr(wanted, name))
