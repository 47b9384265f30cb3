"""Flower for real: its process, a worker, the PostgreSQL broker; all seen through Flower's HTTP API and pages."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import flower_tasks
import httpx
import pytest
from celery import Celery, chain, chord, group

from rhesis_tasks import TenantContext, launch_with_context, tenant_scope, unconfigure
from rhesis_tasks.flower import flower_command
from rhesis_tasks.processes import Child, child, free_port, python, wait_until
from rhesis_tasks.testing import new_tenant_database, running_worker

pytestmark = [pytest.mark.slow, pytest.mark.newest_only]

HERE = Path(__file__).parent
TIMEOUT = 30
WORKER = "one@test"
SECRET = "the-secret-argument"
KEY = "a key for the tests of Flower"
CREDENTIALS = ("op", "pa:ss word")
ACME, GLOBEX = TenantContext("acme", "ann"), TenantContext("globex", "bob")


@dataclasses.dataclass
class Rig:
    """An application, its worker, and Flower."""

    app: Celery
    url: str  #: the database's
    worker: Child
    flower: Child
    http: httpx.Client

    def launch(self, name: str, *args: Any, tenant: TenantContext = ACME, **options: Any) -> str:
        """Launch a task for a tenant; its id."""
        task = self.app.tasks[name]
        return str(launch_with_context(task, *args, context=tenant, options=options).id)

    @contextmanager
    def holding(self, number: int) -> Iterator[list[str]]:
        """The ids of so many tasks that run until the end of the block, if nothing ends them."""
        held = [self.launch("hold", SECRET) for _ in range(number)]
        try:
            for task_id in held:
                self.wait_state(task_id, "STARTED")
            yield held
        finally:
            self.app.control.revoke(held, terminate=True)
            for task_id in held:
                self.wait_state(task_id, "REVOKED")

    def json(self, path: str, **query: Any) -> Any:
        answer = self.http.get(path, params=query)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, **form: Any) -> str:
        """Have Flower do something; what it answers."""
        answer = self.http.post(path, data=form)
        assert answer.is_success, answer.text
        return str(answer.text)

    def task(self, task_id: str) -> dict[str, Any]:
        """What Flower knows of a task; nothing at first."""
        answer = self.http.get(f"/api/task/info/{task_id}")
        return answer.json() if answer.status_code == 200 else {}

    def wait_state(self, task_id: str, *states: str) -> dict[str, Any]:
        """Wait until Flower shows a task in one of these states."""
        wait_until(f"Flower to show {task_id} as {states}", lambda: self.task(task_id).get("state") in states, TIMEOUT)
        return self.task(task_id)

    def inspected(self, key: str, holds: Callable[[Any], bool]) -> Any:
        """What Flower has asked the worker for, once it is as it shall be."""
        found: list[Any] = []

        def look() -> bool:
            known = self.json("/api/workers", refresh=True, workername=WORKER).get(WORKER, {})
            found[:] = [known.get(key)]
            return found[0] is not None and holds(found[0])

        wait_until(f"Flower to show {key}", look, TIMEOUT)
        return found[0]

    def searched(self, text: str) -> set[str]:
        """The ids of the tasks that a search finds; through the API and on the page alike."""
        by_api = set(self.json("/api/tasks", search=text))
        query = {"draw": 1, "start": 0, "length": 1000, "search[value]": text, "order[0][column]": 0}
        page = self.json("/tasks/datatable", **query, **{"order[0][dir]": "asc", "columns[0][data]": "name"})
        assert {row["uuid"] for row in page["data"]} == by_api
        return by_api

    def said_of(self, task_id: str) -> str:
        """All that Flower says of a task."""
        return f"{self.http.get(f'/api/task/info/{task_id}').text} {self.http.get(f'/task/{task_id}').text}"

    def all_said(self) -> str:
        """All that Flower says."""
        pages = ("/", "/workers?json=1", "/tasks", "/api/tasks", "/metrics", f"/worker/{WORKER}")
        said = [self.http.get(path) for path in pages]
        assert {answer.status_code for answer in said} == {200}
        said.append(self.http.get("/api/workers", params={"refresh": True}))
        return " ".join([*(answer.text for answer in said), *map(self.said_of, self.json("/api/tasks"))])


@contextmanager
def running_flower(url: str, settings: dict[str, Any], **options: Any) -> Iterator[tuple[Child, int]]:
    """Flower's process, and the port on which it answers."""
    port = free_port()
    command, environ = flower_command("flower_tasks", port=port, **options)
    environ |= {"DATABASE_URL": url, flower_tasks.SETTINGS: json.dumps(settings)}
    with child("flower", command, env=environ, cwd=HERE) as flower:

        def answers() -> bool:
            assert flower.running, flower.finished_output()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/healthcheck").status_code < 500
            except httpx.TransportError:
                return False

        wait_until("Flower to answer", answers, TIMEOUT)
        yield flower, port


@contextmanager
def running_rig(postgres_url: str, pool: str, settings: dict[str, Any]) -> Iterator[Rig]:
    with ExitStack() as stack:
        database = stack.enter_context(new_tenant_database(postgres_url))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("FLOWER_")]:
            patch.delenv(name)
        app = flower_tasks.application(database.url, **settings)
        stack.callback(unconfigure, app)
        stack.callback(app.close)
        environ = {"DATABASE_URL": database.url, flower_tasks.SETTINGS: json.dumps(settings)}
        arguments = ["-n", WORKER, "--prefetch-multiplier", "2"]
        worker = stack.enter_context(
            running_worker("flower_tasks", cwd=HERE, pool=pool, env=environ, arguments=arguments)
        )
        flower, port = stack.enter_context(running_flower(database.url, settings, basic_auth=":".join(CREDENTIALS)))
        http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=CREDENTIALS, timeout=TIMEOUT))
        rig = Rig(app, database.url, worker, flower, http)
        # Its receiver of events is there, too.
        wait_until("Flower to see the worker", lambda: WORKER in rig.http.get("/workers?json=1").text, TIMEOUT)
        yield rig


@pytest.fixture(scope="module")
def rig(postgres_url: str) -> Iterator[Rig]:
    """As it is by default."""
    with running_rig(postgres_url, "prefork", {}) as rig:
        yield rig


@pytest.fixture(scope="module")
def signed_rig(postgres_url: str) -> Iterator[Rig]:
    """With signed messages."""
    with running_rig(postgres_url, "threads", {"signing_keys": [KEY]}) as rig:
        yield rig


@pytest.fixture(scope="module")
def open_rig(postgres_url: str) -> Iterator[Rig]:
    """Where arguments are shown."""
    with running_rig(postgres_url, "threads", {"show_arguments": True}) as rig:
        yield rig


# --- workers and tasks, live ---------------------------------------------------------------------------------------


def test_a_worker_is_shown_as_alive(rig: Rig) -> None:
    def worker() -> dict[str, Any]:
        return next(each for each in rig.json("/workers", json=1)["data"] if each["hostname"] == WORKER)

    wait_until("the worker to be alive", lambda: worker()["status"] is True, TIMEOUT)
    assert worker()["worker-heartbeat"] >= 1


def test_a_task_is_shown_while_it_runs_and_when_it_is_done(rig: Rig) -> None:
    with rig.holding(1) as (held,):
        running = rig.task(held)
        finished = rig.wait_state(rig.launch("echo", SECRET), "SUCCESS")

    assert (running["name"], running["worker"]) == ("hold", WORKER)
    assert finished["runtime"] >= 0
    assert finished["sent"] is not None
    assert finished["received"] <= finished["started"] <= finished["succeeded"]


def test_each_end_of_a_task_is_shown(rig: Rig) -> None:
    ends = {
        rig.launch("echo"): "SUCCESS",
        rig.launch("fail", SECRET): "FAILURE",
        rig.launch("again", SECRET): "SUCCESS",
    }

    for task_id, state in ends.items():
        rig.wait_state(task_id, state)
    assert [task["retries"] for task in map(rig.task, ends)][2] == 1


# --- what Flower does ----------------------------------------------------------------------------------------------


def test_flower_terminates_a_running_task_and_revokes_a_waiting_one(rig: Rig) -> None:
    with rig.holding(2) as held:
        waiting = rig.launch("hold", SECRET)
        rig.wait_state(waiting, "RECEIVED")

        for task_id in (waiting, *held):
            assert "Revoked" in rig.post(f"/api/task/revoke/{task_id}", terminate=task_id != waiting)

        for task_id in (waiting, *held):
            rig.wait_state(task_id, "REVOKED")
    assert rig.task(waiting)["started"] is None
    assert [rig.app.AsyncResult(task_id).state for task_id in _as(ACME, waiting, *held)] == ["REVOKED"] * 3


def _as(tenant: TenantContext, *ids: str) -> Iterator[str]:
    """Each id, with its tenant active."""
    for task_id in ids:
        with tenant_scope(tenant):
            yield task_id


def test_flower_shows_what_the_worker_is_asked(rig: Rig) -> None:
    with rig.holding(2) as held:
        waiting = rig.launch("echo", SECRET)
        rig.wait_state(waiting, "RECEIVED")
        registered = rig.inspected("registered", lambda names: "echo" in names)
        active = rig.inspected("active", lambda tasks: {task["id"] for task in tasks} == set(held))
        reserved = rig.inspected("reserved", lambda tasks: waiting in {task["id"] for task in tasks})
        stats = rig.inspected("stats", lambda found: found["total"].get("hold", 0) >= 2)
        conf = rig.inspected("conf", lambda found: "worker_send_task_events" in found)
        queues = rig.inspected("active_queues", lambda found: len(found) == 1)
        page = rig.http.get(f"/worker/{WORKER}").text

    assert {"echo", "hold", "plain"} <= set(registered)
    assert stats["pool"]["max-concurrency"] == 2
    assert conf["worker_send_task_events"] is True
    assert queues[0]["name"] == "celery"
    assert "echo" in page
    assert {task["args"] for task in (*active, *reserved)} == {"[hidden]"}
    assert {task["kwargs"] for task in (*active, *reserved)} == {"{'organization_id': 'acme', 'user_id': 'ann'}"}


def test_flower_sets_a_rate_limit_and_time_limits(rig: Rig) -> None:
    limited = rig.post("/api/task/rate-limit/echo", workername=WORKER, ratelimit="1/h")
    first, second = rig.launch("echo"), rig.launch("echo")
    rig.wait_state(first, "SUCCESS")
    rig.wait_state(second, "RECEIVED")

    freed = rig.post("/api/task/rate-limit/echo", workername=WORKER, ratelimit="0")
    timed = rig.post("/api/task/timeout/echo", workername=WORKER, hard=50, soft=40)

    assert "new rate limit set successfully" in limited
    assert "new rate limit set successfully" in freed
    assert "time limits set successfully" in timed
    rig.post(f"/api/task/revoke/{second}")  # it waits for its hour


def test_flower_grows_and_shrinks_the_pool(rig: Rig) -> None:
    rig.post(f"/api/worker/pool/grow/{WORKER}", n=2)
    rig.inspected("stats", lambda stats: len(stats["pool"]["processes"]) == 4)

    rig.post(f"/api/worker/pool/shrink/{WORKER}", n=2)
    rig.inspected("stats", lambda stats: len(stats["pool"]["processes"]) == 2)


def test_flower_adds_a_queue_and_takes_it_away(rig: Rig) -> None:
    rig.post(f"/api/worker/queue/add-consumer/{WORKER}", queue="extra")
    rig.wait_state(rig.launch("echo", queue="extra"), "SUCCESS")

    rig.post(f"/api/worker/queue/cancel-consumer/{WORKER}", queue="extra")
    rig.inspected("active_queues", lambda queues: [queue["name"] for queue in queues] == ["celery"])


# --- whose tasks they are, and what of them is shown ---------------------------------------------------------------


def everything(rig: Rig, tenant: TenantContext) -> list[str]:
    """The ids of tasks launched in every way for a tenant, all of them over."""
    tasks = rig.app.tasks
    echo, again, fail, plain = tasks["echo"], tasks["again"], tasks["fail"], tasks["plain"]
    with tenant_scope(tenant):
        chained = chain(echo.s(SECRET, word=SECRET), echo.s(SECRET)).apply_async()
        grouped = group(echo.s(SECRET), plain.s(SECRET)).apply_async()
        body = chord([echo.s(SECRET), plain.s(SECRET)])(echo.s(SECRET))
        results = [
            *(echo.delay(SECRET, word=SECRET), again.delay(SECRET), fail.delay(SECRET), plain.delay(SECRET)),
            *(rig.app.send_task("echo", [SECRET], {"word": SECRET}), chained, chained.parent, *grouped.results),
            *(body, *body.parent.results),
        ]
    ids = [result.id for result in results]
    for task_id in ids:
        rig.wait_state(task_id, "SUCCESS", "FAILURE")
    return ids


@pytest.mark.parametrize("which", ["rig", "signed_rig"])
def test_tenants_are_searchable_and_arguments_and_results_hidden(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    ours, theirs = everything(rig, ACME), everything(rig, GLOBEX)

    of_acme, of_globex = rig.searched("kwargs:organization_id=acme"), rig.searched("kwargs:organization_id=globex")

    assert set(ours) <= of_acme
    assert set(theirs) <= of_globex
    assert not of_acme & of_globex
    assert set(theirs) <= rig.searched("kwargs:user_id=bob")
    assert set(theirs) <= rig.searched("globex")
    assert {rig.task(task_id)["kwargs"] for task_id in theirs} == {"{'organization_id': 'globex', 'user_id': 'bob'}"}
    assert {rig.task(task_id)["args"] for task_id in theirs} == {"[hidden]"}
    assert {rig.task(task_id)["result"] for task_id in theirs} <= {"[hidden]", None}
    assert SECRET not in rig.all_said().replace(f"it has {SECRET}", "")  # what the exception says itself


def test_texts_of_failures_are_shown_as_redact_leaves_them(rig: Rig) -> None:
    failed, retried = rig.launch("fail", flower_tasks.REDACTED), rig.launch("again", SECRET)
    failure = rig.wait_state(failed, "FAILURE")
    rig.wait_state(retried, "SUCCESS")

    assert failure["exception"] == "ValueError('it has ***')"
    assert "it has ***" in failure["traceback"]
    assert flower_tasks.REDACTED not in rig.all_said()


def test_a_text_that_the_caller_gives_is_shown_in_place_of_the_arguments(rig: Rig) -> None:
    task_id = rig.launch("again", SECRET, argsrepr="('report 7',)", kwargsrepr="{'organization_id': 'x', 'report': 7}")

    shown = rig.wait_state(task_id, "SUCCESS")

    assert shown["retries"] == 1  # and it is the same in the retry
    assert shown["args"] == "('report 7',)"
    assert task_id in rig.searched("kwargs:report=7")
    assert SECRET not in rig.said_of(task_id)


def test_work_of_no_tenant_is_shown_as_such(rig: Rig) -> None:
    task_id = rig.app.tasks["nightly"].delay(SECRET).id

    shown = rig.wait_state(task_id, "SUCCESS")

    assert (shown["args"], shown["kwargs"], shown["result"]) == ("[hidden]", "{}", "[hidden]")


def test_flower_neither_reads_a_tenants_result_nor_launches_its_tasks(rig: Rig) -> None:
    task_id = rig.launch("echo", SECRET)
    rig.wait_state(task_id, "SUCCESS")

    result = rig.http.get(f"/api/task/result/{task_id}")
    launched = rig.http.post("/api/task/async-apply/echo", json={"args": [1]})

    assert SECRET not in result.text
    assert not launched.is_success
    rig.flower.wait_for("needs a tenant", TIMEOUT)


def test_no_secret_is_shown_or_on_a_command_line(signed_rig: Rig) -> None:
    rig = signed_rig
    database_password = rig.url.split("://")[1].split("@")[0].split(":")[1]

    command = Path(f"/proc/{rig.flower.process.pid}/cmdline").read_bytes().decode()

    assert "flower_tasks" in command
    for secret in (database_password, CREDENTIALS[1], "postgresql://", KEY):
        assert secret not in command
    said = rig.all_said() + rig.flower.output
    for secret in (database_password, CREDENTIALS[1], KEY):
        assert secret not in said


def test_arguments_and_results_are_shown_where_that_is_asked_for(open_rig: Rig) -> None:
    ours, theirs = everything(open_rig, ACME), everything(open_rig, GLOBEX)

    first = open_rig.task(ours[0])

    assert SECRET in first["args"] + first["kwargs"] + first["result"]
    assert first["kwargs"] == f"{{'organization_id': 'acme', 'user_id': 'ann', 'word': '{SECRET}'}}"
    assert set(ours) <= open_rig.searched("kwargs:organization_id=acme")
    assert not set(theirs) & open_rig.searched("kwargs:organization_id=acme")
    assert ours[0] in open_rig.searched(f"kwargs:word={SECRET}")
    held = open_rig.launch("hold", SECRET, 3.0)
    open_rig.wait_state(held, "STARTED")
    active = open_rig.app.control.inspect(timeout=TIMEOUT, destination=[WORKER]).active()[WORKER]
    assert [task["args"][0] for task in active if task["id"] == held] == [SECRET]


def test_a_message_of_a_publisher_that_knows_nothing_of_this_shows_no_more(rig: Rig) -> None:
    with Celery("elsewhere", broker=rig.url, set_as_current=False) as elsewhere:
        named = elsewhere.send_task("echo", [SECRET], {"organization_id": "initech", "word": SECRET}).id
        nobody = elsewhere.send_task("plain", [SECRET]).id

    assert rig.wait_state(named, "SUCCESS")["kwargs"] == "{'organization_id': 'initech'}"
    assert rig.wait_state(nobody, "SUCCESS")["kwargs"] == "{}"
    assert SECRET not in rig.said_of(named) + rig.said_of(nobody)


# --- the process ---------------------------------------------------------------------------------------------------


def test_nobody_gets_in_without_the_password(rig: Rig) -> None:
    with httpx.Client(base_url=rig.http.base_url) as stranger:
        paths = ("/", "/tasks", "/api/tasks", "/api/workers", f"/worker/{WORKER}", f"/task/{rig.launch('echo')}")
        answers = {path: stranger.get(path).status_code for path in paths}
        revoked = stranger.post("/api/task/revoke/any", auth=("op", "guess")).status_code

    assert set(answers.values()) == {401}
    assert revoked == 401


def test_without_a_password_only_this_machine_gets_at_the_pages_and_nobody_at_the_api(rig: Rig) -> None:
    with running_flower(rig.url, {}) as (flower, port):
        listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout
        pages = httpx.get(f"http://127.0.0.1:{port}/workers").status_code
        api = httpx.get(f"http://127.0.0.1:{port}/api/tasks").status_code

    assert (pages, api) == (200, 401)
    assert [line.split()[3] for line in listening.splitlines() if f"pid={flower.process.pid}," in line] == [
        f"127.0.0.1:{port}"
    ]


def test_flower_answers_under_its_url_prefix(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWER_URL_PREFIX", "inside")
    with running_flower(rig.url, {}) as (_, port):
        assert httpx.get(f"http://127.0.0.1:{port}/inside/workers").status_code == 200


def test_the_command_runs_flower_until_it_is_asked_to_stop(rig: Rig) -> None:
    port = free_port()
    command = python("-c", "from rhesis_tasks.cli import main; main()", "flower", "-A", "flower_tasks")
    environ = {"DATABASE_URL": rig.url, flower_tasks.SETTINGS: "{}", "FLOWER_PORT": str(port)}
    with child("rhesis-tasks flower", command, env=environ, cwd=HERE) as flower:
        wait_until("Flower to answer", lambda: answers(port), TIMEOUT)

        flower.process.send_signal(signal.SIGTERM)

        assert flower.process.wait(TIMEOUT) == 0


def test_flower_logs_json_where_that_is_wanted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    with running_flower(rig.url, {}) as (flower, port):
        flower.wait_for("Registered tasks", TIMEOUT)

    lines = [json.loads(line) for line in flower.finished_output().splitlines()]
    visit = next(line for line in lines if line["message"].startswith("Visit me at"))
    assert visit["message"].endswith(f":{port}")
    assert (visit["level"], visit["logger"], visit["organization_id"]) == ("INFO", "flower.command", "-")


BESIDE = """
import signal, sys, time
from rhesis_tasks.flower import flower_process

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background
with flower_process("flower_tasks", port=int(sys.argv[1])) as flower:
    print("flower is", flower.pid, flush=True)
    flower.wait()
    print("flower has ended", flush=True)
    time.sleep(600)
"""


@contextmanager
def running_beside(rig: Rig, port: int) -> Iterator[tuple[Child, int]]:
    """A process that has Flower beside it, and Flower's process id."""
    environ = {"DATABASE_URL": rig.url, flower_tasks.SETTINGS: "{}"}
    with child("a worker", [sys.executable, "-c", BESIDE, str(port)], env=environ, cwd=HERE) as parent:
        parent.wait_for("flower is", TIMEOUT)
        line = next(line for line in parent.output.splitlines() if line.startswith("flower is"))
        yield parent, int(line.split()[-1])


def answers(port: int) -> bool:
    try:
        return bool(httpx.get(f"http://127.0.0.1:{port}/healthcheck").status_code == 200)
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_flower_ends_with_the_process_that_it_runs_beside(rig: Rig, signum: signal.Signals) -> None:
    port = free_port()
    with running_beside(rig, port) as (parent, flower):
        wait_until("Flower to answer", lambda: answers(port), TIMEOUT)

        parent.process.send_signal(signum)

        wait_until("Flower to end", lambda: not Path(f"/proc/{flower}/cmdline").exists(), TIMEOUT)
    assert not answers(port)


def test_a_flower_that_cannot_start_harms_nobody(rig: Rig) -> None:
    taken = int(rig.http.base_url.port)
    with running_beside(rig, taken) as (parent, _):
        parent.wait_for("flower has ended", TIMEOUT)

        assert parent.running
        assert "Address already in use" in parent.output
