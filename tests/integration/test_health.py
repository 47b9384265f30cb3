"""What a worker says of itself over HTTP: when all is well, when the database is gone or hangs, when its loop does."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from broker_rig import PostgresServer, TcpProxy, running_proxy, running_server
from celery import Celery

from rhesis_tasks import TenantContext, configure, tenant_scope, unconfigure
from rhesis_tasks.headers import HEADER
from rhesis_tasks.metrics import NOBODY, OTHERS, Tenants
from rhesis_tasks.options import OPTIONS
from rhesis_tasks.postgres.connection import Connection
from rhesis_tasks.postgres.queue import MessageQueue
from rhesis_tasks.postgres.schema import create_schema
from rhesis_tasks.processes import Child, child, free_port, python, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase, new_tenant_database

pytestmark = pytest.mark.newest_only

HERE = Path(__file__).parent
PATIENCE = 60.0  # for what comes within seconds where nobody else uses the machine
TIMEOUT = 2.0  # HEALTH_TIMEOUT
BOUNDED = 20.0  # an answer that waits for a database that hangs would take longer


class Health:
    """A worker and its port."""

    def __init__(self, worker: Child, port: int) -> None:
        self.worker = worker
        self._port = port

    def get(self, path: str) -> tuple[int, str]:
        """The status and the body; the answer is there within the bound."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=BOUNDED) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    @property
    def lives(self) -> bool:
        return self.get("/livez")[0] == 200

    @property
    def checks(self) -> dict[str, str]:
        """The checks of /readyz that are not well."""
        status, body = self.get("/readyz")
        found = {name: text for name, text in json.loads(body)["checks"].items() if not text.startswith("ok")}
        assert (status == 200) == (not found)
        return found

    @property
    def is_ready(self) -> bool:
        return not self.checks

    def figure(self, name: str, **labels: str) -> float | None:
        """One of /metrics."""
        for line in self.get("/metrics")[1].splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name and dict(re.findall(r'(\w+)="([^"]*)"', found[2] or "")) == labels:
                return float(found[3])
        return None


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def database(server: PostgresServer) -> Iterator[TenantDatabase]:
    with new_tenant_database(server.url) as database:
        try:
            yield database
        finally:
            if not server.running:
                server.start()


@pytest.fixture
def proxy(server: PostgresServer) -> Iterator[TcpProxy]:
    with running_proxy(server.port) as proxy:
        yield proxy


Start = Callable[..., Health]


@pytest.fixture
def start(database: TenantDatabase, tmp_path: Path) -> Iterator[Start]:
    """Starts a worker that serves its health, on the database or another port that leads there."""
    with ExitStack() as stack:

        def start(pool: str = "threads", *, through: int | None = None, **environ: str) -> Health:
            url, port = database.url, free_port()
            if through is not None:
                url = database_url(url).set(drivername="postgresql", port=through).render_as_string(hide_password=False)
            command = python("-m", "celery", "-A", "service_tasks", "worker", "-P", pool, "-c", "2", "-l", "INFO")
            environment = {option.variable: "" for option in OPTIONS} | {
                "DATABASE_URL": url,
                "HEALTH_PORT": str(port),
                "HEALTH_TIMEOUT": str(TIMEOUT),
                "SERVICE_TASKS_WEDGE": str(tmp_path / "wedge"),
                "SERVICE_TASKS_GRACE": "3",
                **environ,
            }
            worker = stack.enter_context(child("worker", command, env=environment, cwd=HERE))
            worker.wait_for(" ready.", timeout=PATIENCE)
            return Health(worker, port)

        yield start


@pytest.fixture
def launcher(database: TenantDatabase) -> Iterator[Celery]:
    app = Celery("launcher", set_as_current=False)
    configure(app, database.url, task_default_queue="services")
    yield app
    unconfigure(app)
    app.close()


# --- alive and ready ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_worker_that_is_well_says_so(start: Start, pool: str) -> None:
    health = start(pool)

    assert health.get("/livez") == (200, "ok\n")
    wait_until("the worker to be ready", lambda: health.is_ready, PATIENCE)
    assert json.loads(health.get("/readyz")[1]) == {
        "status": "ready",
        "checks": {"consumer": "ok", "broker": "ok", "schema": "ok", "backend": "ok"},
    }
    assert health.get("/other")[0] == 404


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_while_the_database_is_stopped_a_worker_lives_and_is_not_ready(
    start: Start, server: PostgresServer, pool: str
) -> None:
    health = start(pool, HEALTH_LOOP_TIMEOUT="4")
    wait_until("the worker to be ready", lambda: health.is_ready, PATIENCE)

    server.stop()
    wait_until("broker and backend to be missed", lambda: {"broker", "backend"} <= health.checks.keys(), PATIENCE)
    ends = time.monotonic() + 8
    while time.monotonic() < ends:
        assert health.lives
        assert not health.is_ready
        time.sleep(0.2)
    assert health.figure("rhesis_tasks_queues_known") == 0

    server.start()
    wait_until("the worker to be ready again", lambda: health.is_ready, PATIENCE)
    assert health.lives
    assert health.figure("rhesis_tasks_queues_known") == 1


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_while_connections_hang_each_answer_is_there_in_time(start: Start, proxy: TcpProxy, pool: str) -> None:
    health = start(pool, through=proxy.port, HEALTH_LOOP_TIMEOUT="4")
    wait_until("the worker to be ready", lambda: health.is_ready, PATIENCE)

    proxy.hold()
    wait_until("all checks to fail", lambda: {"consumer", "broker", "backend"} <= health.checks.keys(), PATIENCE)
    begun = time.monotonic()
    assert not health.is_ready
    assert time.monotonic() - begun < TIMEOUT + 1.5  # not once for the broker, and again for the backend
    ends = time.monotonic() + 8
    while time.monotonic() < ends:
        assert health.lives
    assert f"no answer within {TIMEOUT:g} seconds" in health.checks["broker"] or "connect" in health.checks["broker"]
    assert health.get("/metrics")[0] == 200

    proxy.flow()
    wait_until("the worker to be ready again", lambda: health.is_ready, PATIENCE)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_consumer_whose_loop_stands_still_is_not_alive(start: Start, tmp_path: Path, pool: str) -> None:
    health = start(pool, HEALTH_LOOP_TIMEOUT="3")
    wait_until("the worker to be ready", lambda: health.is_ready, PATIENCE)

    (tmp_path / "wedge").touch()
    wait_until("the loop to be missed", lambda: not health.lives, PATIENCE)
    assert "loop has stood still" in health.get("/livez")[1]
    assert health.checks.keys() == {"consumer"}

    (tmp_path / "wedge").unlink()
    wait_until("the loop to turn again", lambda: health.lives and health.is_ready, PATIENCE)


def test_a_long_task_of_the_solo_pool_is_no_reason_not_to_live(start: Start, launcher: Celery, tmp_path: Path) -> None:
    health = start("solo", HEALTH_LOOP_TIMEOUT="1")
    launcher.send_task("wait_for", (str(tmp_path / "started"), str(tmp_path / "gate")))
    wait_until("the task to be started", (tmp_path / "started").exists, PATIENCE)
    time.sleep(3)

    assert health.lives
    (tmp_path / "gate").touch()


def test_tables_of_another_version_are_said_to_be_so(start: Start, database: TenantDatabase) -> None:
    health = start()
    wait_until("the worker to be ready", lambda: health.is_ready, PATIENCE)

    database.execute("UPDATE rhesis_tasks.schema_version SET version = 999")

    assert "version 999" in health.checks["schema"]


# --- figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_attempts_are_counted_by_task_and_outcome_whatever_process_they_run_in(
    start: Start, launcher: Celery, pool: str
) -> None:
    health = start(pool)

    for number in range(5):
        launcher.send_task("add", (number, 1))
    launcher.send_task("fail")
    launcher.send_task("retry_once")

    def counted(task: str, outcome: str) -> float | None:
        return health.figure("rhesis_tasks_attempts_total", task=task, outcome=outcome)

    wait_until("all to be counted", lambda: counted("retry_once", "success") == 1, PATIENCE)
    wait_until("all to be counted", lambda: (counted("add", "success"), counted("fail", "failure")) == (5, 1), PATIENCE)
    assert counted("retry_once", "retry") == 1
    assert health.figure("rhesis_tasks_run_seconds_count", task="add") == 5
    assert health.figure("rhesis_tasks_queue_delay_seconds_count", task="add") == 5
    assert health.figure("rhesis_tasks_pool_size") == 2
    assert "tenant" not in health.get("/metrics")[1]


def test_what_waits_is_counted_with_its_age_and_what_runs_is_in_use(
    start: Start, launcher: Celery, tmp_path: Path
) -> None:
    health = start()
    launcher.send_task("wait_for", (str(tmp_path / "started"), str(tmp_path / "gate")))
    for _ in range(3):
        launcher.send_task("add", (1, 1), queue="elsewhere")
    wait_until("the task to be started", (tmp_path / "started").exists, PATIENCE)

    assert health.figure("rhesis_tasks_pool_busy") == 1
    assert health.figure("rhesis_tasks_queue_messages", queue="elsewhere", state="waiting") == 3
    assert health.figure("rhesis_tasks_queue_messages", queue="services", state="claimed") == 1
    assert health.figure("rhesis_tasks_dead_letters", queue="services") == 0
    wait_until(
        "them to grow old", lambda: (health.figure("rhesis_tasks_queue_oldest_seconds", queue="elsewhere") or 0) > 1
    )
    (tmp_path / "gate").touch()


def test_tenants_have_figures_on_request_and_no_more_of_them_than_asked_for(start: Start, launcher: Celery) -> None:
    health = start(METRICS_TENANTS="1")

    for tenant, label, times in (("acme", "acme", 3), ("globex", OTHERS, 2)):
        with tenant_scope(TenantContext(tenant, "ann")):
            for _ in range(times):
                launcher.send_task("add", (1, 1))
        wait_until(
            "them to be counted",
            lambda label=label: f'tenant="{label}"' in health.get("/metrics")[1],
        )

    def counted(tenant: str) -> float | None:
        return health.figure("rhesis_tasks_tenant_attempts_total", tenant=tenant, outcome="success")

    wait_until("all to be counted", lambda: (counted("acme"), counted(OTHERS)) == (3, 2), PATIENCE)
    assert counted("globex") is None


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_messages_that_do_not_say_whose_they_are_are_counted_as_nobodys_and_acknowledged(
    start: Start, database: TenantDatabase, pool: str
) -> None:
    with Celery("another", broker=database.url, set_as_current=False) as another:
        for organization in ("globex", "acme"):
            for name, args in (("plain", ()), ("add", (1, 1))):  # one asks for no tenant, the other one is refused
                another.send_task(name, args, queue="services", headers={"organization_id": organization})
    # As from another broker, since ours takes no message whose headers contradict each other.
    add_header = "UPDATE rhesis_tasks.message SET envelope = jsonb_set(envelope::jsonb, '{{headers,{}}}', '{}')::json"
    another_organization, a_newer_version = {"v": 1, "organization_id": "acme"}, {"v": 99, "organization_id": "acme"}
    for organization, header in (("globex", another_organization), ("acme", a_newer_version)):
        database.execute(f"{add_header.format(HEADER, json.dumps(header))} WHERE tenant = '{organization}'")

    health = start(pool, METRICS_TENANTS="3")

    def counted(outcome: str) -> float | None:
        return health.figure("rhesis_tasks_tenant_attempts_total", tenant=NOBODY, outcome=outcome)

    wait_until("all to be counted", lambda: (counted("success"), counted("failure")) == (2, 2), PATIENCE)
    wait_until(
        "all to be acknowledged",
        lambda: health.figure("rhesis_tasks_queue_messages", queue="services", state="claimed") == 0,
        PATIENCE,
    )
    assert health.worker.process.poll() is None


def test_a_tenant_that_overtakes_another_takes_its_place() -> None:
    tenants = Tenants(1)

    assert [tenants.label(each) for each in ("a", "b", "b", "b", "a")] == [
        ("a", None),
        (OTHERS, None),
        ("b", "a"),
        ("b", None),
        (OTHERS, None),
    ]


def test_counting_what_waits_stops_at_the_bound(database: TenantDatabase) -> None:
    create_schema(database.owner, roles=[database.role])
    url = database.owner.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO rhesis_tasks.queue (name) VALUES ('full')")
        connection.execute(
            "INSERT INTO rhesis_tasks.message (queue, envelope, body)"
            " SELECT 'full', '{}', '' FROM generate_series(1, 500)"
        )
    connection = Connection(database_url(database.url), name="test")

    stats = {name: rest for name, *rest in MessageQueue(connection, "rhesis_tasks").stats(100)}
    connection.close()

    assert stats["full"][:3] == [100, 0, 0]
