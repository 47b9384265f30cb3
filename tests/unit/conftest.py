"""Fixtures of the unit tests: Celery applications that live in this process, and a process left as it was."""

from __future__ import annotations

import contextvars
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from celery import Celery, current_app
from celery.exceptions import InvalidTaskError
from celery.utils.imports import symbol_by_name
from hypothesis import settings
from kombu.message import Message

from rhesis_tasks import configure, current_tenant, unconfigure
from rhesis_tasks.headers import Envelope, decode, find
from rhesis_tasks.variables import registered_vars, unregister_context_var

settings.register_profile("unit", max_examples=60, deadline=None, database=None)
settings.load_profile("unit")

ENVIRONMENT = ("DATABASE_URL", "BROKER_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "RHESIS_TASKS_SCHEMA")


class LocalCelery(Celery):
    """An application whose tasks are its own: by default Celery adds them to every application of the process."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{"shared": False, **options})


@dataclasses.dataclass(frozen=True)
class Published:
    """A message as it lay in the queue."""

    task: str
    headers: dict[str, Any]
    args: list[Any]
    kwargs: dict[str, Any]
    embed: dict[str, Any]  #: what Celery publishes next: callbacks, errbacks, chain, chord

    @property
    def envelope(self) -> Envelope | None:
        header = find(self.headers)
        return None if header is None else decode(header)

    @property
    def organization(self) -> str | None:
        envelope = self.envelope
        return envelope.tenant.organization_id if envelope and envelope.tenant else None


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the developer's environment goes in, nothing registered stays behind."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    yield
    for registered in list(registered_vars().values()):
        unregister_context_var(registered.var)
    assert current_tenant() is None


@pytest.fixture
def make_app() -> Iterator[Callable[..., Celery]]:
    """Makes Celery applications, each with a queue of its own, in memory; unconfigured after the test."""
    made: list[Celery] = []
    current = current_app._get_current_object()

    def make(*, configured: bool = True, **options: Any) -> Celery:
        settings = {
            "broker": "memory://",
            "backend": "cache+memory://",
            "task_default_queue": f"queue-{uuid.uuid4().hex}",
            "set_as_current": False,
            **options,
        }
        app = LocalCelery("app", **settings)
        made.append(app)
        if configured:
            configure(app)
        return app

    yield make
    current.set_current()
    for app in made:
        unconfigure(app)
        app.close()


@pytest.fixture
def app(make_app: Callable[..., Celery]) -> Celery:
    """A configured application."""
    return make_app()


def _taken(app: Celery, queue: str | None) -> list[Message]:
    with app.connection_for_read() as connection:
        source = app.amqp.queues[queue or app.conf.task_default_queue].bind(connection.default_channel)
        source.declare()
        return list(iter(lambda: source.get(no_ack=True), None))


def _read(message: Message) -> Published:
    args, kwargs, embed = message.payload
    return Published(message.headers["task"], dict(message.headers), args, kwargs, embed)


@pytest.fixture
def published() -> Callable[..., list[Published]]:
    """Takes the messages that an application has published out of its queue."""

    def take(app: Celery, queue: str | None = None) -> list[Published]:
        return [_read(message) for message in _taken(app, queue)]

    return take


def _execute(app: Celery, message: Message) -> None:
    task: Any = app.tasks[message.headers["task"]]
    try:
        request = symbol_by_name(task.Request)(message, app=app, task=task)
    except InvalidTaskError:
        return  # which a worker discards
    if not (request.expires and request.revoked()):
        request.execute()


@pytest.fixture
def work_off() -> Callable[[Celery], list[str]]:
    """Runs an application's messages, as a worker's thread does, until none is left; returns the tasks' names.

    All run one after the other in one context, which begins empty, as a worker's does.
    """

    def work(app: Celery) -> list[str]:
        app.set_current()  # as in a worker; parts of Celery's canvas rely on it
        names = []
        while messages := _taken(app, None):
            for message in messages:
                _execute(app, message)
                names.append(message.headers["task"])
        return names

    return lambda app: contextvars.Context().run(work, app)


CONTAINERS = ("chain", "group", "chord")  # never published themselves, only their parts are


def signatures_in(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every signature of a task inside what a message carries, however deep."""
    if isinstance(value, Mapping):
        if "task" in value and "options" in value and value.get("subtask_type") not in CONTAINERS:
            yield value
        for item in value.values():
            yield from signatures_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from signatures_in(item)


@pytest.fixture
def embedded() -> Callable[[Published], list[Mapping[str, Any]]]:
    """The signatures that a message carries along, to be published later by whoever runs it."""
    return lambda message: list(signatures_in([message.args, message.kwargs, message.embed]))
