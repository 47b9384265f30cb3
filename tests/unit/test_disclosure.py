"""What a message says of its task's arguments to whoever looks on: the tenant, and no more unless it is asked for."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.signals import before_task_publish

from rhesis_tasks import BaseTask, TenantContext, configure, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.disclosure import HIDDEN, shown_fields, shows_arguments
from rhesis_tasks.errors import ConfigurationError

SECRET = "the-secret-argument"
ANN = TenantContext("acme", "ann")
KEYS = ["0123456789abcdef"]

Shown = list[tuple[str, str, str]]


@pytest.fixture
def make_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Celery]]:
    for name in ("DATABASE_URL", "BROKER_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    made: list[Celery] = []
    numbers = itertools.count()

    def make(**settings: Any) -> Celery:
        app = Celery(f"shown{next(numbers)}", broker="memory://", backend="cache+memory://", set_as_current=False)
        configure(app, **settings)
        made.append(app)

        @app.task(base=BaseTask, shared=False, name="work")
        def work(*args: Any, **kwargs: Any) -> None:
            pass

        @app.task(shared=False, name="plain")
        def plain(*args: Any, **kwargs: Any) -> None:
            pass

        @app.task(base=BaseTask, shared=False, name="nightly", system=True)
        def nightly(*args: Any, **kwargs: Any) -> None:
            pass

        return app

    yield make
    for app in made:
        unconfigure(app)
        app.close()


@pytest.fixture
def shown() -> Iterator[Shown]:
    """The name, argsrepr and kwargsrepr of each message that is published."""
    found: Shown = []

    def look(headers: Any = None, **_: Any) -> None:
        found.append((headers["task"], headers["argsrepr"], headers["kwargsrepr"]))

    before_task_publish.connect(look, weak=False, dispatch_uid="shown")
    yield found
    before_task_publish.disconnect(dispatch_uid="shown")


OF_ANN = "{'organization_id': 'acme', 'user_id': 'ann'}"


@pytest.mark.parametrize("keys", [(), KEYS], ids=["plain", "signed"])
def test_every_way_to_launch_shows_the_tenant_and_no_arguments(
    make_app: Callable[..., Celery], shown: Shown, keys: Any
) -> None:
    app = make_app(signing_keys=keys)
    work, plain = app.tasks["work"], app.tasks["plain"]
    with tenant_scope(ANN):
        work.delay(SECRET, word=SECRET)
        work.apply_async([SECRET], {"word": SECRET}, countdown=60)
        plain.delay(SECRET)
        app.send_task("work", [SECRET], {"word": SECRET})
        app.send_task("unknown", [SECRET])
        chain(work.s(SECRET), work.s(SECRET)).delay()
        group(work.s(SECRET), plain.s(SECRET)).delay()
        chord([work.s(SECRET)])(plain.s(SECRET))
        chain(group(work.s(SECRET), work.s(SECRET)), plain.s(SECRET)).delay()
    launch_with_context(work, SECRET, context=ANN)

    assert {name for name, *_ in shown} >= {"work", "plain", "unknown"}
    assert len(shown) >= 12
    assert {(args, kwargs) for _, args, kwargs in shown} == {(HIDDEN, OF_ANN)}


def test_no_arguments_are_shown_as_none(make_app: Callable[..., Celery], shown: Shown) -> None:
    with tenant_scope(TenantContext("acme", project_id="p-1")):
        make_app().tasks["work"].delay()

    assert shown == [("work", "()", "{'organization_id': 'acme', 'project_id': 'p-1'}")]


def test_work_of_no_tenant_shows_none(make_app: Callable[..., Celery], shown: Shown) -> None:
    app = make_app()

    app.tasks["plain"].delay(SECRET)
    with tenant_scope(ANN):
        app.tasks["nightly"].delay(SECRET)

    assert shown == [("plain", HIDDEN, "{}"), ("nightly", HIDDEN, "{}")]


def test_the_callers_own_texts_win(make_app: Callable[..., Celery], shown: Shown) -> None:
    with tenant_scope(ANN):
        make_app().tasks["work"].apply_async([SECRET], {"word": SECRET}, argsrepr="(7,)", kwargsrepr="{'a': 1}")

    assert shown == [("work", "(7,)", "{'a': 1}")]


def test_arguments_are_shown_beside_the_tenant_where_that_is_asked_for(
    make_app: Callable[..., Celery], shown: Shown
) -> None:
    app = make_app(show_arguments=True)
    with tenant_scope(ANN):
        app.tasks["work"].delay(1, word="x")
        app.tasks["plain"].delay(organization_id="another's", text="y" * 5000)

    first, second = shown
    assert first[1] == "(1,)"
    assert ast.literal_eval(first[2]) == {"organization_id": "acme", "user_id": "ann", "word": "x"}
    assert second[2].startswith("{'organization_id': 'acme', 'user_id': 'ann', ")  # and the rest is cut off
    assert len(second[2]) < 2000


def test_whether_arguments_are_shown_is_part_of_the_configuration(make_app: Callable[..., Celery]) -> None:
    app = make_app(show_arguments=True)

    configure(app, show_arguments=True)
    with pytest.raises(ConfigurationError, match="show_arguments"):
        configure(app)
    unconfigure(app)

    assert not shows_arguments(app)


def test_an_events_fields_are_as_they_may_be_sent(make_app: Callable[..., Celery]) -> None:
    fields = {"result": SECRET, "exception": f"E('{SECRET}')", "traceback": None, "runtime": 0.1}
    quiet, loud = make_app(redact=lambda text: text.replace(SECRET, "***")), make_app(show_arguments=True)

    assert shown_fields(quiet, fields) == {**fields, "result": HIDDEN, "exception": "E('***')"}
    assert shown_fields(loud, fields) == fields
    assert fields["result"] == SECRET
