"""What a worker of a configured application does besides: a bounded end, its health, Flower, a log in JSON.

A step of the worker's, added to the application's blueprint, so that it is the same however the worker was started.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from celery import bootsteps
from celery.worker import state
from kombu.utils.functional import retry_over_time
from typing_extensions import override

from . import logs
from .errors import ConfigurationError, DatabaseUnavailableError, MissingExtraError, RhesisTasksError
from .health import OK, Answer, HealthServer, Loop, Probe, Slow, report
from .metrics import CONTENT_TYPE, Metrics, Pool, QueueFigures
from .options import OPTIONS, Found, Source, find_options, relevant
from .request import ContextRequest
from .stopping import StopBound

if TYPE_CHECKING:
    from .postgres.queue import MessageQueue

__all__ = ["LoopWatch", "Services", "flower_of", "settings_of"]

_log = logging.getLogger(__name__)

WORKER_APP: Final = "RHESIS_TASKS_WORKER_APP"
"""Set by ``rhesis-tasks worker``: the application, as for ``celery -A``."""

_HEALTH_PORT: Final = "rhesis_tasks_health_port"
_OURS: Final = tuple(option for option in OPTIONS if option.celery is None)


def settings_of(conf: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Found]:
    """What a worker's environment, or else configure(), has said; of options that are not Celery's.

    Raises:
        OptionError: something cannot be what it was set to.
    """

    port = conf.get(_HEALTH_PORT)
    texts = {option.name: environ.get(option.variable, "") for option in _OURS}
    if WORKER_APP not in environ:  # Flower is told which application it is for
        texts["flower"] = ""
    sources = [
        Source(texts, lambda option: option.variable),
        Source({} if port is None else {"health-port": str(port)}, lambda _: "configure(health_port=)"),
    ]
    return find_options([option for option in relevant(sources) if option.celery is None], sources)


class Services(bootsteps.StartStopStep):
    """Starts with the worker."""

    label = "rhesis-tasks"
    health: Health | None = None
    flower: subprocess.Popen[bytes] | None = None
    bound: StopBound | None = None

    @override
    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        parent.rhesis_tasks = self
        try:
            _let_celery_restart()
            found = self._found = settings_of(parent.app.conf)
            if found["log-format"].value == "json":
                logs.install_json()
            # Without rhesis-tasks worker, a bound is only where somebody has asked for one.
            if found["stop-timeout"].source != "default":
                self.bound = StopBound(parent, found["stop-timeout"].value)
                self.bound.arm()
            if found["health-port"].value is not None:
                self.health = Health(parent, found)
        except RhesisTasksError as error:
            raise SystemExit(f"rhesis-tasks: {error}") from None

    @override
    def start(self, parent: Any) -> None:
        if self.health is not None:
            self.health.start()
        if self._found["flower"].value:
            self.flower = flower_of(
                os.environ[WORKER_APP], self._found["flower-address"].value, self._found["flower-port"].value
            )

    @override
    def stop(self, parent: Any) -> None:
        process, self.flower = self.flower, None
        if process is not None and process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
            process.kill()

    terminate = stop


def _let_celery_restart() -> None:
    """Let Celery's restart on SIGHUP, which has Python run sys.argv again, work for a worker of ``python -m celery``.

    There the first argument is the path of celery/__main__.py, whose relative imports fail if it is run by its path.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name == "celery.__main__":
        sys.argv[0] = "-mcelery"


def flower_of(app: str, address: str, port: int) -> subprocess.Popen[bytes]:
    """Flower beside the worker; if it ends, that is logged, and all.

    Raises:
        SystemExit: it cannot be had.
    """
    try:
        flower: Any = importlib.import_module(f"{__package__}.flower")
        command, environ = flower.flower_command(app, address=address, port=port)
    except (ImportError, ConfigurationError) as error:
        raise SystemExit(f"rhesis-tasks: ENABLE_FLOWER: {error}") from None
    # In a group of its own: a Ctrl-C is for the worker, which stops it.
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)

    def tell() -> None:
        code = process.wait()
        if not _is_stopping():
            _log.error("Flower has ended with exit code %d; it is not started again", code)

    threading.Thread(target=tell, name="rhesis-tasks flower", daemon=True).start()
    return process


def _is_stopping() -> bool:
    flags: Any = (state.should_stop, state.should_terminate)
    return any(flag is not None and flag is not False for flag in flags)


# --- health ------------------------------------------------------------------------------------------------------


class Health:
    """What is known of a worker, and the port on which it is told.

    Args:
        worker: Celery's.
        found: the settings.
    """

    def __init__(self, worker: Any, found: Mapping[str, Found]) -> None:
        self._worker = worker
        self._timeout: float = found["health-timeout"].value
        self._main = threading.get_ident()
        self.loop = Loop(found["health-loop-timeout"].value, self._waits)
        self._probes: dict[str, Probe] = {}
        self.metrics: Metrics | None = None
        try:
            self.metrics = Metrics(self._pool, found["metrics-tenants"].value)
        except MissingExtraError as error:
            _log.warning("there are no metrics: %s", error)
        ContextRequest.observer = self.metrics
        routes: dict[str, Callable[[], Answer]] = {
            "/livez": self.livez,
            "/readyz": self.readyz,
            "/metrics": self.metrics_text,
        }
        self._server = HealthServer(found["health-address"].value, found["health-port"].value, routes)

    def start(self) -> None:
        """Answer from now on."""
        self.loop.turn()
        self._server.start()

    def _waits(self) -> bool:
        """Whether the consumer's loop stands still for a reason: the database, a task of the solo pool, or the end."""
        consumer = getattr(self._worker, "consumer", None)
        return (
            _is_stopping()
            or _waits_for_broker(self._main)
            or getattr(consumer, "rhesis_tasks_connects", True)
            or (type(self._worker.pool).__module__.endswith(".solo") and bool(state.active_requests))
        )

    def _pool(self) -> Pool:
        size = getattr(self._worker.pool, "num_processes", None) or self._worker.concurrency
        return Pool(int(size), len(state.active_requests), len(state.reserved_requests))

    # --- answers ---

    def livez(self) -> Answer:
        """Whether it is of use to go on."""
        seconds = self.loop.stands_for
        if self.loop.is_wedged:
            return 503, "text/plain", f"the consumer's loop has stood still for {seconds:.0f} seconds\n"
        return 200, "text/plain", f"{OK}\n"

    def readyz(self) -> Answer:
        """Whether tasks get done here."""
        conf = self._worker.app.conf
        checks: dict[str, str | None] = {"consumer": self._consumer()}
        broker, backend = self._broker_url(), str(conf.result_backend or "")
        # At once: two databases that hang are no reason to answer later than one, and a probe has given up by then.
        with ThreadPoolExecutor(2, thread_name_prefix="rhesis-tasks readyz") as askers:
            of_broker = askers.submit(self._ask, "broker", broker)
            if backend.partition(":")[0] in ("postgresql", "postgres"):
                checks["backend"] = askers.submit(self._ask, "backend", backend).result()[0]
            else:
                checks["backend"] = f"{OK}: not on PostgreSQL, and not asked"
            checks["broker"], checks["schema"] = of_broker.result()
        return report({name: text for name, text in checks.items() if text is not None})

    def metrics_text(self) -> Answer:
        """All figures."""
        if self.metrics is None:
            return 501, "text/plain", "there are no metrics: pip install 'rhesis-tasks[metrics]'\n"
        figures: list[QueueFigures] | None = None
        if self._on_postgresql(self._broker_url()):
            try:
                figures = [QueueFigures(*row) for row in self._probe("queues", self._broker_url(), _stats)]
            except Exception as error:
                _log.warning("the database has not said what is in the queues: %s", error)
        return 200, CONTENT_TYPE, self.metrics.text(figures)

    # --- questions ---

    def _broker_url(self) -> str:
        return str(self._worker.app.conf.broker_url or "").split(";")[0]

    @staticmethod
    def _on_postgresql(url: str) -> bool:
        from .settings import is_postgresql

        return is_postgresql(url)

    def _consumer(self) -> str:
        if _is_stopping():
            return "the worker stops"
        if self.loop.is_wedged:
            return f"its loop has stood still for {self.loop.stands_for:.0f} seconds"
        consumer = getattr(self._worker, "consumer", None)
        if getattr(consumer, "rhesis_tasks_connects", True):
            return "not connected"
        transport: Any = getattr(getattr(consumer, "connection", None), "transport", None)
        silent = getattr(transport, "silent_for", None)
        if silent is not None and silent > transport.grace:
            return f"the server has not heard of it for {silent:.0f} seconds"
        return OK

    def _ask(self, name: str, url: str) -> tuple[str, str | None]:
        """What becomes of the checks of a database: that it answers, and the version of its schema."""
        if not self._on_postgresql(url):
            return self._ask_kombu(), None
        try:
            status = self._probe(name, url, _version)
        except Slow as error:
            return str(error), "not known"
        except Exception as error:
            return f"{type(error).__name__}: {error}", "not known"
        return OK, (OK if status.is_current else str(status))

    def _ask_kombu(self) -> str:
        """Whether a broker that is not ours takes a connection."""

        def ask() -> None:
            with self._worker.app.connection_for_read() as connection:
                connection.ensure_connection(max_retries=1, timeout=self._timeout)

        try:
            self._probes.setdefault("kombu", Probe(ask, lambda: None)).answer(self._timeout)
        except Slow as error:
            return str(error)
        except Exception as error:
            return type(error).__name__  # its text may have a password
        return OK

    def _probe(self, name: str, url: str, ask: Callable[[MessageQueue], Any]) -> Any:
        """The answer to a question to a database, by a connection of the question's own."""
        if name not in self._probes:
            place = _Place(url, str(self._worker.app.conf.get("rhesis_tasks_schema") or ""), self._timeout)
            self._probes[name] = Probe(lambda: place.ask(ask), place.queue.connection.cut)
        return self._probes[name].answer(self._timeout)


def _waits_for_broker(thread: int) -> bool:
    """Whether a thread waits for the answer to a statement, or for the broker to be there again."""
    from .postgres.connection import Connection, is_asking

    if is_asking(thread):
        return True
    # kombu tries again in the middle of the loop, as in sending an event.
    waiting = {retry_over_time.__code__, Connection.open.__code__}
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code in waiting:
            return True
        frame = frame.f_back
    return False


class _Place:
    """A question's own connection to a database."""

    def __init__(self, url: str, schema: str, timeout: float) -> None:
        from .postgres.connection import Connection
        from .postgres.queue import MessageQueue
        from .settings import database_url, schema_name

        parsed = database_url(url)
        named = parsed.query.get("schema")
        connection = Connection(
            parsed.difference_update_query(["schema"]), name="rhesis-tasks health", connect_timeout=timeout
        )
        self.queue = MessageQueue(connection, schema_name(str(named) if named else schema or None))

    def ask(self, question: Callable[[MessageQueue], Any]) -> Any:
        """The answer; asked again if the connection was lost since the last question."""
        connection = self.queue.connection
        generation = connection.generation
        try:
            return question(self.queue)
        except DatabaseUnavailableError:
            if generation == 0 or connection.generation != generation:
                raise
            return question(self.queue)


def _version(queue: MessageQueue) -> Any:
    from .postgres.schema import SchemaStatus
    from .settings import quote_identifier

    rows = queue.connection.query(
        f"SELECT max(version) FROM {quote_identifier(queue.schema)}.schema_version"  # noqa: S608
    )
    return SchemaStatus(queue.schema, rows[0][0])


def _stats(queue: MessageQueue) -> Any:
    return queue.stats()


class LoopWatch(bootsteps.StartStopStep):
    """Tells the worker's health whenever the consumer's loop turns, and whether it connects."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    @override
    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        parent.rhesis_tasks_connects = True
        self._timer: Any = None

    @override
    def start(self, parent: Any) -> None:
        services = getattr(getattr(parent, "controller", None), "rhesis_tasks", None)
        if services is None or services.health is None:
            return
        loop: Loop = services.health.loop
        loop.turn()
        parent.rhesis_tasks_connects = False
        if parent.hub is not None:
            # The loop calls what its timer has.
            self._timer = parent.timer.call_repeatedly(1.0, loop.turn)
            return
        perform = type(parent).perform_pending_operations

        def perform_and_tell() -> Any:
            loop.turn()
            return perform(parent)

        parent.perform_pending_operations = perform_and_tell  # called each time that the loop turns

    @override
    def stop(self, parent: Any) -> None:
        parent.rhesis_tasks_connects = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
