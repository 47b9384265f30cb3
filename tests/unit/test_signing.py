"""Signed context: what is not signed, or for something else, never runs; whoever has a key is believed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from hypothesis import given
from hypothesis import strategies as st

from rhesis_tasks import BaseTask, TenantContext, configure, current_tenant, launch_with_context, tenant_scope
from rhesis_tasks.errors import SignatureError
from rhesis_tasks.headers import HEADER, Envelope, encode
from rhesis_tasks.signing import Signer

ACME = TenantContext("acme", "alice")
GLOBEX = TenantContext("globex", "gus")
OLD, NEW, FOREIGN = "an old key, of the year", b"a new key, of yesterday", "somebody else's own key"

Seen = list[Any]
MakeSigned = Callable[..., Celery]


@pytest.fixture
def seen() -> Seen:
    """What the bodies of tasks noted."""
    return []


@pytest.fixture
def signed(make_app: Callable[..., Celery], seen: Seen) -> MakeSigned:
    """Makes applications with signing keys and the same tasks, on one queue."""

    def make(*keys: str | bytes, queue: str = "signed") -> Celery:
        app = make_app(configured=False, task_default_queue=queue)
        configure(app, signing_keys=keys)

        @app.task(base=BaseTask, bind=True, name="note")
        def note(self: BaseTask, *_: Any, organization_id: str | None = None) -> None:
            seen.append(self.tenant.organization_id)

        @app.task(base=BaseTask, bind=True, name="stubborn")
        def stubborn(self: BaseTask) -> None:
            seen.append(self.tenant.organization_id)
            if self.request.retries < 2:
                raise self.retry(countdown=0)

        @app.task(base=BaseTask, name="sweep", system=True)
        def sweep() -> None:
            seen.append(current_tenant())

        @app.task(base=BaseTask, name="anybody", tenant_required=False)
        def anybody() -> None:
            seen.append(current_tenant())

        @app.task(name="plain")
        def plain() -> None:
            seen.append(current_tenant())

        return app

    return make


@pytest.fixture
def app(signed: MakeSigned) -> Celery:
    return signed(NEW, OLD)


@pytest.fixture
def stranger(app: Celery, make_app: Callable[..., Celery]) -> Celery:
    """Somebody who can write to the queue and has no key."""
    return make_app(configured=False, task_default_queue="signed")


def task(app: Celery, name: str) -> Any:
    return app.tasks[name]


# --- what is signed runs -----------------------------------------------------------------------------------------


LAUNCHES: dict[str, tuple[Callable[[Celery], Any], int]] = {
    "delay": (lambda app: task(app, "note").delay(), 1),
    "send_task": (lambda app: app.send_task("note"), 1),
    "launch_with_context": (lambda app: launch_with_context(task(app, "note")), 1),
    "a signature": (lambda app: launch_with_context(task(app, "note").s()), 1),
    "retries": (lambda app: task(app, "stubborn").delay(), 3),
    "chain": (lambda app: chain(*[task(app, "note").si()] * 4).delay(), 4),
    "launched chain": (lambda app: launch_with_context(chain(*[task(app, "note").si()] * 4)), 4),
    "group": (lambda app: group([task(app, "note").si()] * 2).delay(), 2),
    "chord": (lambda app: chord([task(app, "note").si()] * 2, task(app, "note").si()).delay(), 3),
    "launched chord": (
        lambda app: launch_with_context(chord([task(app, "note").si()] * 2, task(app, "note").si())),
        3,
    ),
    "link": (lambda app: task(app, "note").apply_async(link=task(app, "note").si()), 2),
    "headers of the application's own": (
        lambda app: task(app, "note").apply_async(headers={HEADER: encode(Envelope(ACME))}),
        1,
    ),
    "eager": (lambda app: task(app, "note").apply(throw=True), 1),
}


@pytest.mark.parametrize(("launch", "bodies"), LAUNCHES.values(), ids=LAUNCHES)
def test_what_we_launch_is_believed(
    app: Celery, launch: Callable[[Celery], Any], bodies: int, work_off: Any, seen: Seen
) -> None:
    with tenant_scope(ACME):
        launch(app)
    work_off(app)

    assert seen == ["acme"] * bodies


def test_work_of_no_tenant_is_signed_too(app: Celery, work_off: Any, seen: Seen) -> None:
    for name in ("sweep", "anybody", "plain"):
        task(app, name).delay()
    work_off(app)

    assert seen == [None] * 3


@pytest.mark.parametrize("publishing", [(OLD,), (NEW,), (NEW, OLD), (FOREIGN, OLD)])
def test_keys_are_rotated_by_the_list(
    signed: MakeSigned, publishing: tuple[Any, ...], work_off: Any, seen: Seen
) -> None:
    with tenant_scope(ACME):
        task(signed(*publishing), "note").delay()
    believed = publishing[0] != FOREIGN
    work_off(signed(NEW, OLD))

    assert seen == ["acme"] * believed


def test_what_only_an_old_key_signed_is_refused_once_it_is_dropped(
    signed: MakeSigned, work_off: Any, seen: Seen
) -> None:
    with tenant_scope(ACME):
        task(signed(OLD), "note").delay()
    work_off(signed(NEW))

    assert seen == []


# --- what is not never does --------------------------------------------------------------------------------------

HEADERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "unsigned": {HEADER: encode(Envelope(ACME))},
    "flat": {"organization_id": "acme"},
    "unsigned for nobody": {HEADER: encode(Envelope())},
    "garbage": {HEADER: "garbage"},
    "empty signature": {HEADER: {**encode(Envelope(ACME)), "sig": ""}},
    "no text": {HEADER: {**encode(Envelope(ACME)), "sig": 7}},
    "of a foreign key": {HEADER: Signer([FOREIGN]).sign(encode(Envelope(ACME)), "note", "forged")},
    "for another task": {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "other", "forged")},
    "for another id": {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "note", "other")},
    "of a later part": {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "note", None)},
    "for another tenant": {
        HEADER: {**Signer([NEW]).sign(encode(Envelope(ACME)), "note", "forged"), "organization_id": "globex"}
    },
    "with a variable more": {
        HEADER: {**Signer([NEW]).sign(encode(Envelope(ACME)), "note", "forged"), "vars": {"locale": "de"}}
    },
    "a state of ours": {"rhesis_tasks_state": {"is_running": True}, HEADER: encode(Envelope(ACME))},
}


@pytest.mark.parametrize("name", ["note", "sweep", "anybody", "plain"])
@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_what_nobody_with_a_key_signed_never_runs(
    app: Celery,
    stranger: Celery,
    name: str,
    headers: dict[str, Any] | None,
    work_off: Any,
    seen: Seen,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stranger.send_task(name, headers=headers, task_id="forged")
    work_off(app)

    result = app.AsyncResult("forged")
    assert seen == []
    assert result.state == "FAILURE"
    assert isinstance(result.result, SignatureError)
    [record] = [record for record in caplog.records if record.name == "rhesis_tasks.security"]
    assert record.levelno == logging.WARNING
    assert name in record.getMessage()
    for secret in (OLD, NEW.decode(), "'sig'"):
        assert secret not in caplog.text + str(result.result)


def test_arguments_name_no_tenant_where_the_context_is_signed(
    app: Celery, stranger: Celery, work_off: Any, seen: Seen
) -> None:
    header = {HEADER: Signer([NEW]).sign(encode(Envelope()), "note", "smuggled")}
    stranger.send_task("note", kwargs={"organization_id": "acme"}, headers=header, task_id="smuggled")
    work_off(app)

    assert seen == []


def test_a_publisher_with_a_key_signs_the_tenant_that_arguments_name(app: Celery, work_off: Any, seen: Seen) -> None:
    task(app, "note").delay(organization_id="acme")
    work_off(app)

    assert seen == ["acme"]


@pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")  # how Celery tells of it
@pytest.mark.parametrize("where", ["chain", "link"])
@pytest.mark.parametrize("header", ["unsigned", "of a foreign key", "for another task"])
def test_a_later_part_that_somebody_changed_on_its_way_never_runs(
    app: Celery, stranger: Celery, where: str, header: str, work_off: Any, seen: Seen
) -> None:
    first = {HEADER: Signer([NEW]).sign(encode(Envelope(ACME)), "note", "first")}
    later = stranger.signature("note", immutable=True, headers=HEADERS[header], task_id="later")
    options: dict[str, Any] = {where: [later]}
    stranger.send_task("note", headers=first, task_id="first", **options)
    work_off(app)

    assert seen == ["acme"]


def test_a_body_that_passes_unsigned_headers_along_is_told_to_open_a_scope(
    app: Celery, work_off: Any, seen: Seen
) -> None:
    @app.task(base=BaseTask, name="relay")
    def relay() -> None:
        with pytest.raises(SignatureError, match="not signed"):
            task(app, "note").apply_async(headers={HEADER: encode(Envelope(GLOBEX))})
        with tenant_scope(GLOBEX):
            task(app, "note").delay()

    with tenant_scope(ACME):
        relay.delay()
    work_off(app)

    assert seen == ["globex"]


header_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(header=header_values, name=st.text(max_size=5), task_id=st.none() | st.text(max_size=5))
def test_no_garbage_is_ever_accepted(header: Any, name: str, task_id: str | None) -> None:
    signer = Signer([NEW, OLD])

    assert not signer.accepts(header, name, task_id)
    if isinstance(header, dict):
        assert not signer.accepts({**header, "sig": "0" * 64}, name, task_id)
        assert signer.accepts(signer.sign(header, name, task_id), name, task_id)


def test_a_signer_does_not_show_its_keys() -> None:
    assert "key" not in repr(Signer([NEW, OLD])).replace("2 keys", "")
