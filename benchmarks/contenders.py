"""One contender of propagation.py, in a process of its own, since most of them hook into all of Celery's applications.

``contenders.py NAME``: says ``{}`` once the context has been seen in a task's body, then reads how many tasks to
publish and run, a number a line, and answers each with ``{"publish": ..., "run": ...}``, microseconds for each task.
"""

from __future__ import annotations

import contextvars
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery
from celery.utils.imports import symbol_by_name
from kombu.message import Message

__all__ = ["Bench"]

_PER_SCOPE: Final = 50  #: tasks published for one web request; Sentry counts no more than 1000 spans
_TENANT: Final = ("0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c11", "0197b6f2-5d0c-7d5e-9a51-6b1f6a0f3c12")
_VARIABLES: Final = {
    "request_id": "8f14e45fceea467a9b36f0b1f2b8e1c7",
    "locale": "de-DE",
    "client": "web",
    "experiment": "checkout-b",
    "release": "2025.11.3",
}


@dataclass(frozen=True, slots=True)
class Carrier:
    """What a contender adds to a Celery application."""

    scope: Callable[[], AbstractContextManager[object]]  #: where a web process publishes; gives what is to arrive
    seen: Callable[[], object]  #: the same, as a task's body sees it
    options: Mapping[str, Any]  #: of each task


# --- the contenders --------------------------------------------------------------------------------------------


def _alone(_: Celery) -> Carrier:
    return Carrier(nullcontext, lambda: None, {})


def _rhesis(app: Celery) -> Carrier:
    from rhesis_tasks import TenantContext, configure, current_tenant, register_context_var, tenant_scope

    configure(app)
    tenant = TenantContext(*_TENANT)
    variables = {name: contextvars.ContextVar[str](name) for name in _VARIABLES}
    for var in variables.values():
        register_context_var(var)

    @contextmanager
    def scope() -> Iterator[object]:
        with tenant_scope(tenant), ExitStack() as stack:
            for name, var in variables.items():
                stack.callback(var.reset, var.set(_VARIABLES[name]))
            yield tenant, _VARIABLES

    return Carrier(scope, lambda: (current_tenant(), {name: var.get() for name, var in variables.items()}), {})


def _rhesis_base(app: Celery) -> Carrier:
    from rhesis_tasks import BaseTask

    carrier = _rhesis(app)
    return Carrier(carrier.scope, carrier.seen, {"base": BaseTask})


def _correlation(_: Celery) -> Carrier:
    sys.modules["sentry_sdk"] = None  # type: ignore[assignment]  # where it is installed, each task is tagged for it
    from asgi_correlation_id import correlation_id
    from asgi_correlation_id.extensions.celery import load_correlation_ids

    load_correlation_ids()

    @contextmanager
    def scope() -> Iterator[object]:
        token = correlation_id.set(_VARIABLES["request_id"])
        try:
            yield correlation_id.get()
        finally:
            correlation_id.reset(token)

    return Carrier(scope, correlation_id.get, {})


def _opentelemetry(_: Celery) -> Carrier:
    from opentelemetry import trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    CeleryInstrumentor().instrument()
    tracer = trace.get_tracer(__name__)

    def seen() -> object:
        return trace.get_current_span().get_span_context().trace_id

    @contextmanager
    def scope() -> Iterator[object]:
        with tracer.start_as_current_span("request"):
            yield seen()

    return Carrier(scope, seen, {})


def _sentry(_: Celery) -> Carrier:
    import sentry_sdk
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.transport import Transport

    class Nowhere(Transport):
        def capture_envelope(self, envelope: object) -> None:
            """Drop it."""

    sentry_sdk.init(
        "http://key@localhost/1", transport=Nowhere(), traces_sample_rate=1.0, integrations=[CeleryIntegration()]
    )

    def seen() -> object:
        span = sentry_sdk.get_current_span()
        return span and span.trace_id

    @contextmanager
    def scope() -> Iterator[object]:
        with sentry_sdk.isolation_scope(), sentry_sdk.start_transaction(op="http.server", name="request"):
            yield seen()

    return Carrier(scope, seen, {})


_CARRIERS: Final[Mapping[str, Callable[[Celery], Carrier]]] = {
    "alone": _alone,
    "again": _alone,
    "context": _rhesis,
    "base": _rhesis_base,
    "correlation": _correlation,
    "opentelemetry": _opentelemetry,
    "sentry": _sentry,
}


# --- measuring -------------------------------------------------------------------------------------------------


class Bench:
    """A Celery application with one contender, whose tasks are published and run in this process.

    Raises:
        RuntimeError: what is to be carried does not arrive, so that there is nothing to measure.
    """

    def __init__(self, name: str) -> None:
        app = Celery("bench", broker="memory://")
        app.conf.task_ignore_result = True
        self._app = app
        self._carrier = carrier = _CARRIERS[name](app)
        arrived: list[object] = []

        @app.task(name="noop", **carrier.options)
        def noop() -> None:
            pass

        @app.task(name="look", **carrier.options)
        def look() -> None:
            arrived.append(carrier.seen())

        self._noop: Any = noop
        self._request = symbol_by_name(self._noop.Request)  # as a worker does
        with carrier.scope() as expected:
            look.delay()
        self._run(self._taken())
        if arrived != [expected]:
            raise RuntimeError(f"{expected!r} was carried, {arrived!r} arrived")

    def batch(self, count: int) -> dict[str, float]:
        """Publish tasks, take them out of their queue and run them; microseconds for each.

        Raises:
            RuntimeError: not all of them arrived.
        """
        spent = 0.0
        for first in range(0, count, _PER_SCOPE):
            with self._carrier.scope():
                spent += self._published(min(_PER_SCOPE, count - first))
        messages = self._taken()
        if len(messages) != count:
            raise RuntimeError(f"{count} tasks were published, {len(messages)} arrived")
        return {"publish": spent / count * 1e6, "run": self._run(messages) / count * 1e6}

    def _published(self, count: int) -> float:
        delay = self._noop.delay
        gc.collect()
        begin = time.process_time()
        for _ in range(count):
            delay()
        return time.process_time() - begin

    def _taken(self) -> list[Message]:
        with self._app.connection_for_read() as connection:
            queue = self._app.amqp.queues[self._app.conf.task_default_queue].bind(connection.default_channel)
            return list(iter(lambda: queue.get(no_ack=True), None))

    def _run(self, messages: list[Message]) -> float:
        def run() -> float:
            gc.collect()
            begin = time.process_time()
            for message in messages:
                request(message, app=app, hostname="bench@localhost").execute()
            return time.process_time() - begin

        app, request = self._app, self._request
        return contextvars.Context().run(run)  # in which nothing of the publisher's is set


def main() -> None:
    """Measure one contender, until standard input ends."""
    bench = Bench(sys.argv[1])
    bench.batch(2 * _PER_SCOPE)  # Python specialises the code that it has run a few times
    gc.collect()
    gc.freeze()  # else a collection reads all that was imported, and leaves the caches full of it
    print("{}", flush=True)
    for line in sys.stdin:
        bench.batch(_PER_SCOPE // 5)  # the caches are another process's
        print(json.dumps(bench.batch(int(line))), flush=True)


if __name__ == "__main__":
    main()
