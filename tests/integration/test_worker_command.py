"""``rhesis-tasks worker``: what it is told by, what it refuses, how it stops, what it logs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from celery import Celery
from commands import ran

from rhesis_tasks import configure, unconfigure
from rhesis_tasks.options import OPTIONS
from rhesis_tasks.processes import Child, child, python, wait_until
from rhesis_tasks.testing import TenantDatabase

HERE = Path(__file__).parent
COMMAND = python("-c", "from rhesis_tasks.cli import main; main()")
NAMES = [option.variable for option in OPTIONS] + ["CELERY_WORKER_OPTS"]

Start = Callable[..., Child]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "BROKER_URL", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tenant_database: TenantDatabase) -> Iterator[Start]:
    """Starts ``rhesis-tasks worker`` with arguments and variables, and waits until it is ready."""
    with ExitStack() as stack:

        def start(*arguments: str, **environ: str) -> Child:
            environ = {"DATABASE_URL": tenant_database.url, "CELERY_WORKER_CONCURRENCY": "2", **environ}
            worker = stack.enter_context(
                child("worker", [*COMMAND, "worker", "-A", "service_tasks", *arguments], env=environ, cwd=HERE)
            )
            worker.wait_for(" ready.", timeout=60)
            return worker

        yield start


@pytest.fixture
def launcher(tenant_database: TenantDatabase) -> Iterator[Celery]:
    """The application as those see it who launch tasks."""
    app = Celery("launcher", set_as_current=False)
    configure(app, tenant_database.url, task_default_queue="services")
    yield app
    unconfigure(app)
    app.close()


def messages(database: TenantDatabase) -> list[tuple[str, int | None, int]]:
    """Of each task in the queues: its name, its claim, and how often it was delivered."""
    url = database.owner.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT task_name, claim_token, deliveries FROM rhesis_tasks.message WHERE task_id IS NOT NULL"
        ).fetchall()


def begin(launcher: Celery, folder: Path, task: str = "wait_for", task_id: str | None = None) -> Path:
    """Have a worker begin with a task that lasts until the returned file is there."""
    started, gate = folder / "started", folder / "gate"
    launcher.send_task(task, (str(started), str(gate)), task_id=task_id)
    wait_until("the task to be started", started.exists)
    return gate


def process_of(worker: Child) -> int:
    """The only process of a worker's pool."""
    return int(Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text())


def ended(worker: Child, timeout: float = 60) -> int:
    """The exit code of a worker that ends by itself."""
    return worker.process.wait(timeout)


# --- what it is told ---------------------------------------------------------------------------------------------


def resolved(output: str) -> dict[str, tuple[str, str]]:
    """What the command said of each option: the value, and where it is from."""
    found = re.findall(r"^  ([a-z-]+) +(\S+) +(\S.*)$", output, re.MULTILINE)
    return {name: (value, source) for name, value, source in found}


def test_without_any_setting_a_worker_has_the_defaults(start: Start) -> None:
    told = resolved(start("-c", "1").output)

    assert told["pool"] == ("prefork", "default")
    assert told["concurrency"] == ("1", "--concurrency")
    assert told["prefetch-multiplier"] == ("4", "default")
    assert told["max-tasks-per-child"] == ("1000", "default")
    assert told["loglevel"] == ("INFO", "default")
    assert told["stop-timeout"] == ("25.0", "default")
    assert told["log-format"] == ("text", "default")


def test_each_variable_reaches_the_worker_and_the_command_line_wins(start: Start) -> None:
    worker = start(
        "--concurrency=3",
        "-n",
        "mine@%h",
        CELERY_WORKER_POOL="threads",
        CELERY_WORKER_CONCURRENCY="7",
        CELERY_WORKER_PREFETCH_MULTIPLIER="1",
        CELERY_WORKER_LOGLEVEL="debug",
        CELERY_WORKER_QUEUES="services,reports",
        CELERY_WORKER_OPTS="-E --without-mingle --max-tasks-per-child 9 --prefetch-multiplier 2",
    )
    told = resolved(worker.output)

    assert told["pool"] == ("threads", "CELERY_WORKER_POOL")
    assert told["concurrency"] == ("3", "--concurrency")
    assert told["prefetch-multiplier"] == ("1", "CELERY_WORKER_PREFETCH_MULTIPLIER")
    assert told["loglevel"] == ("DEBUG", "CELERY_WORKER_LOGLEVEL")
    assert told["queues"] == ("services,reports", "CELERY_WORKER_QUEUES")
    assert "max-tasks-per-child" not in told, "threads are not replaced"
    assert "mine@" in worker.output
    assert "concurrency: 3 (thread)" in worker.output
    assert "task events: ON" in worker.output
    assert re.search(r"reports +exchange=reports", worker.output)


def test_processes_are_replaced_after_as_many_tasks_as_the_variable_says(start: Start, launcher: Celery) -> None:
    worker = start("--concurrency", "1", CELERY_WORKER_MAX_TASKS_PER_CHILD="1", CELERY_WORKER_OPTS="-c 5")

    for number in range(3):
        launcher.send_task("add", (number, 1))

    wait_until("three tasks to be done", lambda: worker.output.count("succeeded in") == 3)
    assert len(set(re.findall(r"(ForkPoolWorker-\d+)\].* succeeded in", worker.output))) == 3
    assert resolved(worker.output)["concurrency"] == ("1", "--concurrency")


def test_an_applications_own_setting_wins_over_a_default(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TASKS_PREFETCH", "2")

    told = resolved(start().output)

    assert told["prefetch-multiplier"] == ("2", "worker_prefetch_multiplier of the application")


@pytest.mark.parametrize(
    ("variable", "value", "needed"),
    [
        ("CELERY_WORKER_CONCURRENCY", "zero", "a whole number from 1 to 10000"),
        ("CELERY_WORKER_CONCURRENCY", "0", "a whole number from 1 to 10000"),
        ("CELERY_WORKER_CONCURRENCY", "99999999999", "a whole number from 1 to 10000"),
        ("CELERY_WORKER_PREFETCH_MULTIPLIER", "-1", "a whole number from 1 on"),
        ("CELERY_WORKER_MAX_TASKS_PER_CHILD", "1.5", "a whole number from 1 on"),
        ("CELERY_WORKER_LOGLEVEL", "loud", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("CELERY_WORKER_POOL", "eventlet", "one of prefork, threads, solo, gevent"),
        ("CELERY_WORKER_QUEUES", "a,,b", "names of queues"),
        ("CELERY_WORKER_STOP_TIMEOUT", "soon", "a number of seconds above 0 and below 1000000"),
        ("CELERY_WORKER_STOP_TIMEOUT", "1e99", "a number of seconds above 0 and below 1000000"),
        ("LOG_FORMAT", "xml", "one of text, json"),
        ("HEALTH_PORT", "70000", "a whole number from 1 to 65535"),
        ("ENABLE_FLOWER", "maybe", "true or false"),
    ],
)
def test_nonsense_is_refused_by_the_variables_name_before_anything_starts(
    variable: str, value: str, needed: str
) -> None:
    # If it would start, it would take the place of this process.
    done = ran("worker", "-A", "no_such_module", **{variable: value})

    assert done.code == 2
    assert done.output == ""
    assert done.errors.count("\n") == 1
    assert done.errors.startswith(f"rhesis-tasks: {variable} is {value!r}, and must be {needed}")


def test_nonsense_is_refused_in_the_words_of_the_page() -> None:
    page = (HERE.parents[1] / "docs" / "running.md").read_text()

    done = ran("worker", "-A", "no_such_module", CELERY_WORKER_CONCURRENCY="zero")

    assert f"\n{done.errors}```" in page


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        ("--concurrency", "cannot be read: "),
        ("'", "cannot be read: "),
        ("-A other", "names an application"),
        ("--pool solo --concurrency x", "--concurrency is 'x', and must be a whole number"),
    ],
)
def test_options_that_cannot_be_read_are_refused(opts: str, said: str) -> None:
    done = ran("worker", "-A", "no_such_module", CELERY_WORKER_OPTS=opts)

    assert (done.code, done.output) == (2, "")
    assert done.errors.startswith(f"rhesis-tasks: CELERY_WORKER_OPTS {said}")
    assert done.errors.count("\n") == 1


def test_a_port_of_something_that_is_not_wanted_may_be_anything() -> None:
    done = ran("worker", "-A", "no_such_module", FLOWER_PORT="tcp://10.0.0.1:5555")

    assert (done.code, done.errors.count("no_such_module") > 0) == (1, True)


def test_an_application_that_is_not_there_is_said_to_be_so() -> None:
    done = ran("worker", "-A", "no_such_module:app")

    assert done.code == 1
    assert "there is no Celery application 'no_such_module:app'" in done.errors


@pytest.fixture
def _bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module with an application of no broker; and a worker that does not take the place of this process."""
    (tmp_path / "bare_shop.py").write_text("from celery import Celery\napp = Celery('bare', set_as_current=False)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", lambda *_: None)
    yield
    sys.modules.pop("bare_shop", None)


@pytest.mark.usefixtures("_bare")
def test_a_flower_that_anybody_could_use_is_refused_before_anything_starts() -> None:
    done = ran(
        "worker",
        "-A",
        "bare_shop",
        CELERY_BROKER_URL="memory://",
        ENABLE_FLOWER="true",
        FLOWER_ADDRESS="192.0.2.1",
        FLOWER_BASIC_AUTH="",
    )

    assert (done.code, done.output) == (2, "")
    assert done.errors.startswith("rhesis-tasks: ENABLE_FLOWER: Flower would listen on '192.0.2.1'")


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_worker_without_a_broker_is_refused_with_the_variable_that_may_be_missing(log_format: str) -> None:
    done = ran("worker", "-A", "bare_shop", LOG_FORMAT=log_format)

    assert (done.code, done.output) == (2, "")
    assert done.errors.startswith("rhesis-tasks: bare_shop has no broker.  Is DATABASE_URL missing, or configure()")
    assert done.errors.count("\n") == 1


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(
    ("line", "environ"),
    [
        ("", {"CELERY_BROKER_URL": "memory://"}),
        ("app.conf.broker_url = 'memory://'", {}),
        ("app.conf.broker_transport = 'memory'", {}),
        ("from rhesis_tasks import configure; configure(app)", {"BROKER_URL": "memory://"}),
        ("from rhesis_tasks import configure; configure(app)", {"DATABASE_URL": "postgresql://nowhere/shop"}),
    ],
)
def test_a_worker_whose_broker_is_named_anywhere_begins(tmp_path: Path, line: str, environ: dict[str, str]) -> None:
    with (tmp_path / "bare_shop.py").open("a") as module:
        module.write(f"{line}\n")

    done = ran("worker", "-A", "bare_shop", **environ)

    assert (done.code, done.errors) == (0, "")
    assert done.output.startswith("A worker of bare_shop (bare)\n")


@pytest.mark.parametrize("encoding", ["ascii", "ascii:replace"])
def test_a_worker_starts_though_its_output_cannot_have_the_name_of_a_task(start: Start, encoding: str) -> None:
    worker = start("-P", "solo", LC_ALL="C", PYTHONIOENCODING=encoding)

    assert f"  . {'pr?fen' if encoding.endswith('replace') else 'pr' + chr(92) + 'xfcfen'}\n" in worker.output


# --- how it stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_that_is_done_within_the_bound_ends_and_then_the_worker(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, pool: str
) -> None:
    worker = start(CELERY_WORKER_POOL=pool, CELERY_WORKER_STOP_TIMEOUT="100")
    gate = begin(launcher, tmp_path)

    worker.process.send_signal(signal.SIGTERM)
    worker.wait_for("Warm shutdown")
    gate.touch()

    assert ended(worker) == 0
    assert "succeeded in" in worker.finished_output()
    assert messages(tenant_database) == []


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_still_runs_at_the_bound_is_given_back_uncounted_and_the_worker_ends(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, pool: str
) -> None:
    worker = start(CELERY_WORKER_POOL=pool, CELERY_WORKER_STOP_TIMEOUT="1")
    gate = begin(launcher, tmp_path)

    worker.process.send_signal(signal.SIGTERM)
    ended(worker)

    assert "1 tasks still run 1 seconds after the worker was told to stop" in worker.finished_output()
    assert messages(tenant_database) == [("wait_for", None, 0)]

    gate.touch()
    again = start(CELERY_WORKER_POOL="threads")
    again.wait_for("Task wait_for")
    wait_until("another worker to do it", lambda: messages(tenant_database) == [])


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_is_acknowledged_as_it_begins_has_failed_if_it_still_runs_at_the_bound(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, pool: str
) -> None:
    worker = start(CELERY_WORKER_POOL=pool, CELERY_WORKER_STOP_TIMEOUT="1")
    begin(launcher, tmp_path, "wait_for_early", "early")
    wait_until("it to be acknowledged", lambda: messages(tenant_database) == [])

    worker.process.send_signal(signal.SIGTERM)
    ended(worker)

    result = launcher.AsyncResult("early")
    assert (result.state, repr(result.result)) == ("FAILURE", "WorkerLostError('its worker was stopped while it ran')")
    output = worker.finished_output()
    assert output.count("Task wait_for_early[early] failed") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_is_done_before_the_bound_is_not_given_back_with_what_is_not(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, pool: str
) -> None:
    worker = start(CELERY_WORKER_POOL=pool, CELERY_WORKER_STOP_TIMEOUT="3")
    stays, ends = tmp_path / "stays", tmp_path / "ends"
    stays.mkdir()
    ends.mkdir()
    begin(launcher, stays)
    gate = begin(launcher, ends, "wait_for_too")

    worker.process.send_signal(signal.SIGTERM)
    worker.wait_for("Warm shutdown")
    time.sleep(0.5)  # until it waits for its pool
    gate.touch()
    ended(worker)

    assert messages(tenant_database) == [("wait_for", None, 0)]


def unread_by(process: int) -> int:
    """How many bytes wait in the pipes of a process."""
    found = 0
    for file in Path(f"/proc/{process}/fd").iterdir():
        if os.readlink(file).startswith("pipe:"):
            opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
            found += int.from_bytes(fcntl.ioctl(opened, termios.FIONREAD, b"\0" * 4), sys.byteorder)
            os.close(opened)
    return found


@pytest.mark.parametrize("task", ["note_early", "note_late"])  # when they are acknowledged
def test_what_a_process_was_given_but_has_not_begun_is_done_once_and_the_worker_ends(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, task: str
) -> None:
    worker = start(CELERY_WORKER_CONCURRENCY="1", CELERY_WORKER_PREFETCH_MULTIPLIER="1")
    begin(launcher, tmp_path).touch()
    wait_until("the first task to be done", lambda: messages(tenant_database) == [])
    process = process_of(worker)
    os.kill(process, signal.SIGSTOP)
    line = tmp_path / "line"
    launcher.send_task(task, (str(line),))
    wait_until("the process to be given it", lambda: unread_by(process) > 0)
    given = unread_by(process)

    worker.process.send_signal(signal.SIGTERM)
    wait_until("the process to be told to stop", lambda: unread_by(process) > given)
    os.kill(process, signal.SIGCONT)

    assert ended(worker) == 0
    assert messages(tenant_database) == []
    assert line.read_text() == "done\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_the_bound(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, number: signal.Signals
) -> None:
    worker = start(CELERY_WORKER_STOP_TIMEOUT="10000")
    begin(launcher, tmp_path)

    worker.process.send_signal(number)
    worker.wait_for("shutdown" if number is signal.SIGTERM else "Hitting Ctrl+C again")
    time.sleep(0.5)  # two signals at once would be one
    worker.process.send_signal(number)
    ended(worker)

    assert messages(tenant_database) == [("wait_for", None, 0)]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_sigquit_ends_a_worker_that_cannot_stop_what_runs_within_moments(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, pool: str
) -> None:
    worker = start(CELERY_WORKER_POOL=pool, CELERY_WORKER_CONCURRENCY="1", CELERY_WORKER_STOP_TIMEOUT="10000")
    begin(launcher, tmp_path)
    if pool == "prefork":  # others cannot be stopped anyway
        os.kill(process_of(worker), signal.SIGSTOP)

    worker.process.send_signal(signal.SIGQUIT)

    assert ended(worker) == 75
    assert messages(tenant_database) == [("wait_for", None, 0)]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_is_hung_up_ends_what_runs_and_starts_again_as_it_was(
    start: Start, launcher: Celery, tenant_database: TenantDatabase, tmp_path: Path, pool: str
) -> None:
    worker = start("-n", "mine@%h", CELERY_WORKER_POOL=pool)
    gate = begin(launcher, tmp_path)

    for number in (1, 2):  # a worker that was started again can be so once more
        worker.process.send_signal(signal.SIGHUP)
        wait_until("it to be told", lambda: worker.output.count("Restarting celery worker") == number)  # noqa: B023
        gate.touch()
        wait_until("it to be there again", lambda: len(re.findall("mine@.* ready", worker.output)) == 1 + number)  # noqa: B023

    assert worker.output.count("succeeded in") == 1
    launcher.send_task("add", (1, 2))
    wait_until("it to do something", lambda: worker.output.count("succeeded in") == 2)
    worker.process.send_signal(signal.SIGTERM)
    assert ended(worker) == 0
    assert messages(tenant_database) == []


# --- what it logs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_in_json_every_line_is_an_object_with_the_context(start: Start, launcher: Celery, pool: str) -> None:
    worker = start(LOG_FORMAT="json", CELERY_WORKER_POOL=pool)

    launcher.send_task("add", ("the-secret-argument", "!"), headers={"x": "y"})
    launcher.send_task("fail")
    worker.wait_for("failed in")
    worker.wait_for("succeeded in")
    worker.process.send_signal(signal.SIGTERM)
    ended(worker)
    output = worker.finished_output().splitlines()

    assert [line for line in output if not line.startswith("{")] == []
    lines = [json.loads(line) for line in output]

    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    done = next(line for line in lines if "succeeded in" in line["message"])
    assert done["task_outcome"] == "success"
    assert (done["task_name"], done["organization_id"]) == ("add", "-")
    assert "ValueError: broken" in next(line for line in lines if "failed in" in line["message"])["exception"]
    assert {"printed", "adding"} <= {line["message"] for line in lines}
    assert any("Warm shutdown" in line["message"] for line in lines)
    assert lines[0]["settings"]["log-format"] == {"value": "json", "source": "LOG_FORMAT"}
    assert "the-secret-argument" not in worker.output


def test_celery_worker_keeps_working_and_has_no_bound_of_ours(
    tenant_database: TenantDatabase, launcher: Celery, tmp_path: Path
) -> None:
    command = python("-m", "celery", "-A", "service_tasks", "worker", "--pool", "threads", "-c", "1", "-l", "INFO")
    with child("worker", command, env={"DATABASE_URL": tenant_database.url}, cwd=HERE) as worker:
        worker.wait_for(" ready.")
        begin(launcher, tmp_path).touch()
        worker.wait_for("succeeded in")

        assert "rhesis-tasks" not in worker.output
