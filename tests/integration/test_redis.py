"""The context on another broker: Redis, whose chords are joined by the header task that ends last."""

from __future__ import annotations

import gc
import importlib
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group

from rhesis_tasks import TenantContext, context_headers, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.processes import child, free_port, wait_until
from rhesis_tasks.testing import running_worker
from rhesis_tasks.variables import unregister_context_var

HERE = Path(__file__).parent
TIMEOUT = 30
A, B = TenantContext("tenant-a", "ann"), TenantContext("tenant-b", "bob")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tasks, on a Redis of their own."""
    port, password = free_port(), secrets.token_hex(16)
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, "--save", ""]
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    with ExitStack() as stack:
        server = stack.enter_context(child("Redis", command, cwd=tmp_path_factory.mktemp("redis")))
        server.wait_for("Ready to accept connections")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("DATABASE_URL", "CELERY_BROKER_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("BROKER_URL", url)
        patch.setenv("CELERY_RESULT_BACKEND", url)
        patch.syspath_prepend(HERE)
        tasks = importlib.import_module("redis_tasks")
        stack.callback(unconfigure, tasks.app)
        stack.callback(unregister_context_var, tasks.mark)
        stack.callback(tasks.app.close)
        stack.callback(gc.collect)  # results say goodbye to Redis
        yield tasks


@pytest.fixture(scope="module", params=["prefork", "threads"])
def worker(request: pytest.FixtureRequest, tasks: Any) -> Iterator[None]:
    with running_worker("redis_tasks", cwd=HERE, pool=request.param):
        yield


def launched(tasks: Any, tenant: TenantContext, canvas: Any) -> Any:
    token = tasks.mark.set(f"mark of {tenant.organization_id}")
    try:
        with tenant_scope(tenant):
            return canvas.delay()
    finally:
        tasks.mark.reset(token)


def saw(tenant: TenantContext) -> list[str]:
    return [tenant.organization_id, f"mark of {tenant.organization_id}"]


@pytest.mark.usefixtures("worker")
def test_every_part_has_its_launchers_context(tasks: Any) -> None:
    look, look_back = tasks.look, tasks.look_back
    started = [
        (
            tenant,
            launched(tasks, tenant, look.s()),
            launched(tasks, tenant, tasks.flaky.s()),
            launched(tasks, tenant, chain(look.s(), look_back.s())),
            launched(tasks, tenant, group(look.s(), look.s())),
            launched(tasks, tenant, chord([look.s(0.1), look.s(), tasks.flaky.s()], look_back.s())),
            launched(tasks, tenant, chain(look.s(), group(look_back.s(), look_back.s()), look_back.s())),
        )
        for tenant in (A, B, A, B)
    ]

    for tenant, one, retried, chained, grouped, joined, nested in started:
        mine = saw(tenant)
        assert one.get(timeout=TIMEOUT) == retried.get(timeout=TIMEOUT) == mine
        assert chained.get(timeout=TIMEOUT) == [mine, mine]
        assert grouped.get(timeout=TIMEOUT) == [mine, mine]
        assert joined.get(timeout=TIMEOUT) == [mine, [mine, mine, mine]]
        assert nested.get(timeout=TIMEOUT) == [mine, [[mine, mine], [mine, mine]]]


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("last", ["own", "other"])
def test_a_chords_body_is_its_launchers_whichever_header_task_ends_last(tasks: Any, last: str) -> None:
    own, other = (0.5, 0.0) if last == "own" else (0.0, 0.5)
    header = [tasks.look.s(own), tasks.look.s(other).set(headers=context_headers(B))]

    result = launched(tasks, A, chord(header, tasks.look_back.s()))

    assert result.get(timeout=TIMEOUT) == [saw(A), [saw(A), [B.organization_id, None]]]


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("launch", ["delay", "launch_with_context"])
def test_a_chords_error_callback_is_its_launchers(tasks: Any, launch: str) -> None:
    key = f"failures of {launch} {secrets.token_hex(4)}"
    header = [tasks.broken.s(), tasks.look.s().set(headers={})]
    canvas = chord(header, tasks.look_back.s().on_error(tasks.note_failure.si(key)))

    if launch == "delay":
        launched(tasks, A, canvas)
    else:
        launch_with_context(canvas, context=A)

    wait_until("the error callback", lambda: tasks.app.backend.client.llen(key) > 0, TIMEOUT)
    found = {value.decode().partition("/")[0] for value in tasks.app.backend.client.lrange(key, 0, -1)}
    assert found == {A.organization_id}
