"""What a worker counts, and how Prometheus reads it.

Counted in the worker's main process, which hears of the end of each attempt whatever pool runs it: so there is nothing
to add up over processes.  prometheus-client (extra ``metrics``) has the figures and writes them down.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .errors import ContextError, MissingExtraError
from .headers import SENT_AT, find

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["CONTENT_TYPE", "Metrics", "Pool", "QueueFigures", "Tenants"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHERS: Final = "(others)"
NOBODY: Final = "-"

_RUNTIMES: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_DELAYS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200)


class QueueFigures(NamedTuple):
    """What is in a queue."""

    queue: str
    waiting: int
    delayed: int
    claimed: int
    oldest: float | None  #: seconds since the oldest message that waits was published
    dead: int


class Pool(NamedTuple):
    """How much of a worker's pool is in use."""

    size: int  #: how many tasks can run at once
    busy: int  #: how many run
    reserved: int  #: how many were claimed ahead, those that run included


def _delay(request: Any) -> float | None:
    """Seconds from when a task could have started until it has; None if its message does not say."""
    sent_at = request.request_dict.get(SENT_AT)
    if not isinstance(sent_at, int | float) or isinstance(sent_at, bool) or request.time_start is None:
        return None
    eta = getattr(request, "_eta", None)
    since = max(sent_at, eta.timestamp()) if eta is not None else sent_at
    return max(0.0, float(request.time_start - since))


class Tenants:
    """Which tenants have figures of their own: the busiest so far, and never more than so many.

    One that overtakes another takes its place, and its figures begin then; so each figure only ever grows.

    Args:
        number: how many.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._own: Counter[str] = Counter()
        self._rest: Counter[str] = Counter()  # candidates, of which only some are remembered

    def label(self, tenant: str) -> tuple[str, str | None]:
        """The label for one more attempt of a tenant's, and the label that is given up for it."""
        if tenant in self._own or len(self._own) < self._number:
            self._own[tenant] += 1
            return tenant, None
        self._rest[tenant] += 1
        least, count = min(self._own.items(), key=lambda each: each[1], default=(None, 0))
        if least is not None and self._rest[tenant] > count:
            self._rest[least] = self._own.pop(least)
            self._own[tenant] = self._rest.pop(tenant)
            return tenant, least
        if len(self._rest) > 20 * self._number + 100:
            self._rest = Counter(dict(self._rest.most_common(10 * self._number + 50)))
        return OTHERS, None


class Metrics:
    """Counts attempts, and writes down all there is to say.

    Args:
        pool: how much of the pool is in use.
        tenants: how many tenants have figures of their own.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, pool: Callable[[], Pool], tenants: int = 0) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError as error:
            raise MissingExtraError.of("prometheus-client", "metrics") from error
        self._pool = pool
        self._registry: CollectorRegistry = CollectorRegistry()
        self._tasks = Counter(
            "rhesis_tasks_attempts", "Attempts that have ended.", ("task", "outcome"), registry=self._registry
        )
        self._runtime = Histogram(
            "rhesis_tasks_run_seconds", "How long attempts took.", ("task",), buckets=_RUNTIMES, registry=self._registry
        )
        self._delay = Histogram(
            "rhesis_tasks_queue_delay_seconds",
            "From when a task could have started until it did.",
            ("task",),
            buckets=_DELAYS,
            registry=self._registry,
        )
        self._tenants = Tenants(tenants) if tenants else None
        self._lock = threading.Lock()
        self._of_tenants: Counter | None = None
        if tenants:
            self._of_tenants = Counter(
                "rhesis_tasks_tenant_attempts",
                "Attempts that have ended, of the busiest tenants.",
                ("tenant", "outcome"),
                registry=self._registry,
            )

    # --- told by requests ---

    def started(self, request: Any) -> None:
        """An attempt has begun."""
        delay = _delay(request)
        if delay is not None:
            self._delay.labels(request.name).observe(delay)

    def ended(self, request: Any, outcome: str, runtime: float | None) -> None:
        """An attempt has ended."""
        self._tasks.labels(request.name, outcome).inc()
        if runtime is not None:
            self._runtime.labels(request.name).observe(runtime)
        if self._tenants is not None and self._of_tenants is not None:
            with self._lock:
                label, gone = self._tenants.label(_tenant_of(request))
                if gone is not None:
                    for each in _ALL:
                        self._of_tenants.remove(gone, each)
                self._of_tenants.labels(label, outcome).inc()

    # --- asked by Prometheus ---

    def text(self, queues: Sequence[QueueFigures] | None) -> str:
        """All figures, in Prometheus' text format; None if those of the queues are not known."""
        from prometheus_client import CollectorRegistry, generate_latest

        now = CollectorRegistry()
        now.register(_Now(self._pool(), queues))
        text = (generate_latest(self._registry) + generate_latest(now)).decode()
        # prometheus-client says of each figure when it began, which this format has no place for.
        return "".join(line for line in text.splitlines(keepends=True) if not _BEGAN.match(line))


_BEGAN: Final = re.compile(r"(# (HELP|TYPE) )?rhesis_tasks_\w+_created[ {]")
_ALL: Final = ("success", "failure", "retry", "requeued", "ignored", "revoked")


def _tenant_of(request: Any) -> str:
    try:
        own = find(request.request_dict)
    except ContextError:
        return NOBODY  # the headers contradict each other, or one of them cannot be read
    organization = own.get("organization_id") if isinstance(own, Mapping) else None
    return organization if isinstance(organization, str) else NOBODY


class _Now:
    """What is read at this moment."""

    def __init__(self, pool: Pool, queues: Sequence[QueueFigures] | None) -> None:
        self._pool = pool
        self._queues = queues

    def collect(self) -> Iterable[Any]:
        """The figures, as prometheus-client has them."""
        from prometheus_client.core import GaugeMetricFamily as Gauge

        yield Gauge("rhesis_tasks_pool_size", "How many tasks can run at once.", value=self._pool.size)
        yield Gauge("rhesis_tasks_pool_busy", "How many tasks run.", value=self._pool.busy)
        yield Gauge("rhesis_tasks_pool_reserved", "How many tasks the worker holds.", value=self._pool.reserved)
        known = Gauge("rhesis_tasks_queues_known", "1 if the database has said what is in the queues.")
        known.add_metric((), 0 if self._queues is None else 1)
        yield known
        messages = Gauge("rhesis_tasks_queue_messages", "Messages of a queue; see the docs.", labels=("queue", "state"))
        oldest = Gauge("rhesis_tasks_queue_oldest_seconds", "Age of the oldest that waits.", labels=("queue",))
        dead = Gauge("rhesis_tasks_dead_letters", "Dead letters of a queue.", labels=("queue",))
        for each in self._queues or ():
            for state in ("waiting", "delayed", "claimed"):
                messages.add_metric((each.queue, state), getattr(each, state))
            oldest.add_metric((each.queue,), each.oldest or 0.0)
            dead.add_metric((each.queue,), each.dead)
        yield from (messages, oldest, dead)
