"""``rhesis-tasks tasks`` and ``tenants`` as an operator uses them, against real workers in each state."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from applications import application
from celery import chain
from commands import Ran, ran
from sqlalchemy import text

from rhesis_tasks import TenantContext, launch_with_context, operations, tenant_scope
from rhesis_tasks.cli.tasks import tasks as tasks_group
from rhesis_tasks.cli.tenants import tenants as tenants_group
from rhesis_tasks.errors import DeadLetterError
from rhesis_tasks.operations import MessageFilter, MessageState
from rhesis_tasks.processes import child, python, wait_until
from rhesis_tasks.states import State
from rhesis_tasks.testing import TenantDatabase, running_worker

HERE = Path(__file__).parent
TIMEOUT = 60
MAIN = "from rhesis_tasks.cli import main; main()"
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def tasks_and_database(postgres_url: str) -> Iterator[tuple[Any, TenantDatabase]]:
    with application(postgres_url, "operation_tasks") as (tasks, database):
        yield tasks, database


@pytest.fixture(scope="module")
def _worker(tasks_and_database: tuple[Any, TenantDatabase]) -> Iterator[None]:
    with running_worker(
        "operation_tasks",
        cwd=HERE,
        concurrency=1,
        env={"DATABASE_URL": tasks_and_database[1].url},
        arguments=("--queues", "work"),
    ):
        yield


class Scene:
    """A tenant with a task in each state: waiting, delayed, running and dead."""

    def __init__(self, tasks: Any, database: TenantDatabase) -> None:
        self.tasks, self.database = tasks, database
        self.tenant = TenantContext(f"tenant-{next(numbers)}", "ann")
        self.organization = self.tenant.organization_id
        self.running = self.launch(tasks.never_ends, queue="work")
        wait_until("the task to run", lambda: self.state(self.running) is State.STARTED, TIMEOUT)
        self.waiting = self.launch(tasks.add, 1, 2)
        self.delayed = self.launch(tasks.add, 1, 2, countdown=3600)
        self.dead = self.launch(tasks.add, 5, 6)
        error = DeadLetterError("its message was given up: it was delivered 5 times in vain")
        with tenant_scope(self.tenant):
            tasks.app.backend.mark_as_failure(self.dead, error)
        with database.owner.begin() as connection:
            claim = "UPDATE rhesis_tasks.message SET claim_token = 0 WHERE task_id = :id RETURNING id"
            (number,) = connection.execute(text(claim), {"id": self.dead}).one()
            connection.execute(text("SELECT rhesis_tasks.bury(:id, 0, 'a test')"), {"id": number})

    def launch(self, task: Any, *args: Any, queue: str = "idle", **options: Any) -> str:
        result = launch_with_context(task, *args, context=self.tenant, options={"queue": queue, **options})
        return str(result.id)

    def state(self, task_id: str) -> State:
        with tenant_scope(self.tenant):
            found: State = self.tasks.app.backend.get_record(task_id).state
        return found

    @property
    def ids(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("waiting", "delayed", "running", "dead")}

    def messages(self) -> dict[str | None, MessageState]:
        which = MessageFilter(organization_id=self.organization)
        return {each.task_id: each.state for each in operations.messages(self.tasks.app, which)}

    def everything(self) -> Any:
        """What nothing must change of."""
        return self.messages(), [self.state(each) for each in self.ids.values()], self.audit()

    def audit(self) -> list[Any]:
        records = operations.audit_records(self.tasks.app, limit=1000)
        return [(each.action, each.operator) for each in records if self.organization in each.filter.values()]


@pytest.fixture
def scene(tasks_and_database: tuple[Any, TenantDatabase], _worker: None) -> Iterator[Scene]:
    scene = Scene(*tasks_and_database)
    yield scene
    which = MessageFilter(organization_id=scene.organization)
    operations.terminate(scene.tasks.app, which, operator="the end", dry_run=False)
    wait_until("the worker to be free", lambda: MessageState.RUNNING not in scene.messages().values(), TIMEOUT)


@pytest.fixture
def command() -> Callable[..., Ran]:
    """Runs ``rhesis-tasks tasks ...``."""

    def run(name: str, *arguments: str, app: str = "operation_tasks", group: str = "tasks") -> Ran:
        return ran(group, name, *arguments, "-A", app)

    return run


Command = Callable[..., Ran]


# --- looking -------------------------------------------------------------------------------------------------------


def test_tasks_in_each_state_are_listed_in_80_columns_and_as_json(scene: Scene, command: Command) -> None:
    listed = command("list", "--organization", scene.organization, "--user", "ann")
    as_json = command("list", "--organization", scene.organization, "--user", "ann", "--json")
    dead = command("list", "--organization", scene.organization, "--state", "dead", "--queue", "idle")

    assert listed.code == 0
    shown = {line.split()[2]: line.split()[0] for line in listed.lines if not line.startswith(" ")}
    assert shown == {task_id: name for name, task_id in scene.ids.items()}
    assert max(map(len, listed.lines)) <= 80
    assert "\x1b" not in listed.output
    parsed = [json.loads(line) for line in as_json.lines]
    assert {each["task_id"]: each["state"] for each in parsed} == shown
    assert "body" not in parsed[0]
    assert [line.split()[2] for line in dead.lines if line.startswith("dead")] == [scene.dead]
    assert "a test" in dead.output


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_list_that_was_cut_off_says_so_and_how_to_go_on(
    scene: Scene, command: Command, form: tuple[str, ...]
) -> None:
    of_messages = ("list", "--organization", scene.organization, "--user", "ann", *form)
    records = command("list", "--organization", scene.organization, "--limit", "3", *form)
    first = command(*of_messages, "--limit", "3")
    after = re.search(r"--after \d+", first.errors)
    assert after is not None
    rest = command(*of_messages, *after[0].split())
    ids = re.findall("|".join(scene.ids.values()), first.output + rest.output)

    assert "more than 3" in records.errors
    assert sorted(ids) == sorted(scene.ids.values())
    assert rest.errors == ""


def test_messages_are_counted_by_queue_organization_and_name(scene: Scene, command: Command) -> None:
    by_queue = command("count", "--organization", scene.organization)
    by_tenant = command("count", "--organization", scene.organization, "--by", "organization", "--state", "waiting")
    as_json = command("count", "--organization", scene.organization, "--by", "name", "--json")

    counted = {(line.split()[0], line.split()[-1]): line.split()[1] for line in by_queue.lines[1:]}
    assert counted == {
        ("running", "work"): "1",
        ("waiting", "idle"): "1",
        ("delayed", "idle"): "1",
        ("dead", "idle"): "1",
    }
    assert [line.split()[-1] for line in by_tenant.lines[1:]] == [scene.organization]
    assert {each["name"] for each in json.loads(as_json.output)} == {
        "operation_tasks.add",
        "operation_tasks.never_ends",
    }


@pytest.mark.parametrize(
    ("name", "state"), [("waiting", "queued"), ("delayed", "delayed"), ("running", "started"), ("dead", "dead")]
)
def test_a_task_is_shown_with_its_record_and_message(scene: Scene, command: Command, name: str, state: str) -> None:
    shown = command("show", scene.ids[name])

    assert (shown.code, shown.value("state"), shown.value("organization")) == (0, state, scene.organization)
    message = shown.output.partition("message:\n")[2]
    assert message.split()[0] == name


def test_a_run_is_shown_as_a_tree_and_followed_to_its_end(scene: Scene, command: Command) -> None:
    operations.terminate(scene.tasks.app, MessageFilter(task_id=scene.running), operator="olga", dry_run=False)
    add = scene.tasks.add
    run = chain(add.s(1, 2).set(queue="work"), add.s(3).set(queue="work"))
    last = launch_with_context(run, context=scene.tenant)

    followed = command("follow", last.parent.id)
    end = command("follow", last.id, "--organization", scene.organization)
    shown = command("show", last.id)
    parsed = json.loads(command("show", last.id, "--json").output)

    assert (followed.code, followed.value("state"), followed.value("result")) == (0, "success", "3")
    assert (end.code, end.value("result")) == (0, "6")
    assert shown.output.count("operation_tasks.add") == 3
    assert [each["state"] for each in parsed["records"]] == ["success"]


# --- changing ------------------------------------------------------------------------------------------------------

CHANGES = [
    ("purge", (), {"waiting", "delayed"}),
    ("purge", ("--state", "dead"), {"dead"}),
    ("replay", (), {"dead"}),
    ("revoke", (), {"waiting", "delayed"}),
    ("terminate", (), {"waiting", "delayed", "running"}),
]


@pytest.mark.parametrize(("name", "arguments", "gone"), CHANGES)
def test_a_change_is_printed_first_and_done_with_yes(
    scene: Scene, command: Command, name: str, arguments: tuple[str, ...], gone: set[str]
) -> None:
    before = scene.everything()
    which = ("--organization", scene.organization, *arguments)

    dry = command(name, *which)
    unchanged = scene.everything()
    done = command(name, *which, "--yes", "--operator", "olga")
    if "running" in gone:
        wait_until("the task to end", lambda: scene.running not in scene.messages(), TIMEOUT)

    assert (dry.code, done.code) == (0, 0), done.errors
    assert "Nothing was changed.  Do it with --yes" in dry.output
    assert unchanged == before
    assert done.lines[-1].startswith("Done by olga, audit record ")
    left = {task_id for task_id, state in scene.messages().items() if name != "replay" or state != "waiting"}
    assert {task for task, task_id in scene.ids.items() if task_id in left} == (
        set(scene.ids) - gone - ({"waiting"} if name == "replay" else set())
    )
    assert scene.audit() == [(name, "olga")]
    told = [line for line in dry.lines + done.lines if "rhesis-tasks" not in line]  # a command is not broken
    assert max(map(len, told)) <= 80 or len(scene.organization) > 20


@pytest.mark.parametrize(
    ("task", "name", "state"),
    [
        ("waiting", "revoke", State.REVOKED),
        ("delayed", "revoke", State.REVOKED),
        ("running", "terminate", State.REVOKED),
        ("dead", "replay", State.QUEUED),
    ],
)
def test_one_task_is_changed_by_its_id(scene: Scene, command: Command, task: str, name: str, state: State) -> None:
    others = {each: task_id for each, task_id in scene.ids.items() if each != task}

    done = command(name, scene.ids[task], "--yes", "--json")

    parsed = json.loads(done.output)
    assert (done.code, parsed["action"], parsed["dry_run"]) == (0, name, False)
    assert sum(parsed["before"].values()) == 1
    assert parsed["operator"] == operations.login_name()
    wait_until(f"the task to be {state}", lambda: scene.state(scene.ids[task]) is state, TIMEOUT)
    assert {each: str(scene.messages().get(task_id)) for each, task_id in others.items()} == {
        each: each for each in others
    }


def test_all_that_waits_is_purged_where_that_is_said(scene: Scene, command: Command) -> None:
    done = command("purge", "--all", "--yes")

    assert (done.code, done.lines[0]) == (0, "purge of states waiting+delayed")
    assert set(scene.messages()) == {scene.running, scene.dead}


def test_the_audit_says_who_did_what(scene: Scene, command: Command) -> None:
    command("purge", "--organization", scene.organization, "--state", "waiting", "--yes", "--operator", "olga")

    printed, as_json = command("audit", "--limit", "1"), command("audit", "--limit", "1", "--json")

    assert "purge by olga" in printed.lines[0] and printed.lines[0].endswith("records 1, waiting 1")
    assert printed.lines[1].strip() == f"organization {scene.organization}, states waiting"
    assert json.loads(as_json.output)["counts"] == {"records": 1, "waiting": 1}


def test_a_tenant_is_offboarded(scene: Scene, command: Command) -> None:
    before = scene.everything()
    dry = command("offboard", scene.organization, group="tenants")
    dry_stop = command("offboard", scene.organization, "--stop", group="tenants")
    refused = command("offboard", scene.organization, "--yes", group="tenants")
    unchanged = scene.everything()
    done = command("offboard", scene.organization, "--stop", "--yes", "--operator", "olga", group="tenants")
    again = command("offboard", scene.organization, "--yes", group="tenants")

    assert (dry.code, refused.code, done.code, again.code) == (0, 1, 0, 1), done.errors
    assert "  records            4" in dry.lines
    assert "While tasks run it is refused" in dry.errors  # as --yes does
    assert "has 1 running task; nothing was changed" in refused.errors
    assert "--stop" in refused.errors
    assert "refused" not in dry_stop.errors
    assert unchanged == before
    assert scene.messages() == {}
    assert command("show", scene.waiting).code == 1
    assert again.errors == f"Error: there is nothing of an organization {scene.organization}\n"


@pytest.mark.parametrize("name", ["purge", "revoke"])
@pytest.mark.parametrize("older_than", [(), ("--older-than", "0.5")])
def test_the_command_that_is_printed_leaves_alone_what_was_published_since(
    scene: Scene, command: Command, name: str, older_than: tuple[str, ...]
) -> None:
    time.sleep(0.5 if older_than else 0)
    dry = command(name, "--organization", scene.organization, *older_than)
    program, group, same_name, *arguments = shlex.split(dry.lines[-1])
    later = scene.launch(scene.tasks.add, 1, 2)
    time.sleep(0.5 if older_than else 0)

    done = ran(group, same_name, *arguments)

    assert (program, same_name, done.code) == ("rhesis-tasks", name, 0), done.errors
    assert dry.lines[-2].startswith("Nothing was changed.")
    assert scene.messages()[later] is MessageState.WAITING
    assert {scene.waiting, scene.delayed} & set(scene.messages()) == set()


@pytest.mark.parametrize("given", [("--published-before", "{}"), ("--published-before={}",)])
def test_the_command_that_is_printed_has_one_time(scene: Scene, command: Command, given: tuple[str, ...]) -> None:
    tomorrow = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)).isoformat()
    dry = command("purge", "--organization", scene.organization, *(each.format(tomorrow) for each in given))

    assert dry.lines[-1].count("--published-before") == 1
    assert tomorrow not in dry.lines[-1]


def test_a_change_that_is_interrupted_says_where_to_look(scene: Scene) -> None:
    purge = ("tasks", "purge", "-A", "operation_tasks", "--organization", scene.organization, "--yes")
    owner, environ = scene.database.owner, {"DATABASE_URL": scene.database.url}
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE relation = 'rhesis_tasks.audit_record'::regclass AND NOT granted"
    )

    # A shell has what it runs in the background ignore it.
    main = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {MAIN}"
    with owner.begin() as holder, child("purge", python("-c", main, *purge), env=environ, cwd=HERE) as interrupted:
        holder.execute(text("LOCK TABLE rhesis_tasks.audit_record"))
        wait_until("the purge to write its record", lambda: holder.scalar(waiting) == 1)
        interrupted.process.send_signal(signal.SIGINT)
        code = interrupted.process.wait(TIMEOUT)

    assert code == 130
    assert interrupted.finished_output() == (
        "interrupted: rhesis-tasks tasks audit -A operation_tasks prints what was done until then; "
        "it can be run again\n"
    )


def test_where_no_time_would_change_anything_none_is_printed(scene: Scene, command: Command) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat()
    of_tenant = ("--organization", scene.organization)
    dry = [
        command("purge", *of_tenant, "--published-before", now),
        command("purge", *of_tenant, "--state", "dead"),
        command("replay", *of_tenant),
        command("revoke", scene.waiting),
        command("offboard", scene.organization, group="tenants"),
    ]

    assert {each.lines[-1] for each in dry} == {"Nothing was changed.  Do it with --yes."}


def test_a_change_is_wholly_done_though_nobody_reads_what_it_came_to(scene: Scene) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    which = ("-A", "operation_tasks", "--organization", scene.organization, "--yes", "--operator", "olga")
    done = subprocess.run(
        python("-c", MAIN, "tasks", "purge", *which),
        cwd=HERE,
        env={**os.environ, "DATABASE_URL": scene.database.url},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    os.close(writer)

    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    assert set(scene.messages()) == {scene.running, scene.dead}
    assert scene.audit() == [("purge", "olga")]


# --- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["revoke", "terminate", "replay", "show", "follow"])
def test_an_unknown_task_is_said_to_be_unknown(scene: Scene, command: Command, name: str) -> None:
    before = scene.everything()

    unknown = command(name, "no-such-task", *(("--yes",) if name not in ("show", "follow") else ()))

    assert (unknown.code, unknown.output) == (1, "")
    assert "no-such-task" in unknown.errors
    assert scene.everything() == before


@pytest.mark.parametrize("name", ["purge", "revoke", "terminate", "replay"])
def test_an_unknown_organization_has_nothing_to_change(scene: Scene, command: Command, name: str) -> None:
    before = scene.everything()

    unknown = command(name, "--organization", "no-such-tenant", "--yes")

    assert (unknown.code, unknown.output) == (1, "")
    assert unknown.errors.startswith("Error: there is no such ")
    assert scene.everything() == before


@pytest.mark.parametrize("name", ["purge", "revoke", "terminate", "replay"])
def test_without_a_filter_it_is_refused_unless_all_are_meant(scene: Scene, command: Command, name: str) -> None:
    before = scene.everything()

    refused, dry = command(name, "--yes"), command(name, "--all")

    assert refused.code == 2
    assert "or --all, if you mean all of them" in refused.errors
    assert dry.code == 0
    assert scene.everything() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("purge", "--older-than", "soon"), "'soon' is no age"),
        (("purge", "--older-than", "99999999d"), "more than a hundred years"),
        (("purge", "--published-before", "then"), "'then' is no time"),
        (("purge", "--queue", "a", "--state", "running"), "'running' is not one of"),
        (("list", "--state", "lost"), "'lost' is no state"),
        (("list", "--state", "success"), "give --organization"),
        (("list", "--state", "success", "--state", "waiting"), "list one kind at a time"),
        (("list", "--root", "x"), "--root is for records"),
        (("list", "--after", "9" * 20), "is not in the range"),
        (("count", "--by", "colour"), "'colour' is not one of"),
    ],
)
@pytest.mark.usefixtures("tasks_and_database")
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(
    command: Command, arguments: tuple[str, ...], message: str
) -> None:
    wrong = command(*arguments)

    assert (wrong.code, wrong.output) == (2, "")
    assert message in wrong.errors


COMMANDS = [
    ("tasks", "list"),
    ("tasks", "count"),
    ("tasks", "audit"),
    ("tasks", "show", "x"),
    ("tasks", "follow", "x"),
    ("tasks", "purge", "--all", "--yes"),
    ("tasks", "replay", "--all", "--yes"),
    ("tasks", "revoke", "x", "--yes"),
    ("tasks", "terminate", "x", "--yes"),
    ("tenants", "offboard", "acme", "--yes"),
]


@pytest.mark.parametrize("arguments", COMMANDS)
@pytest.mark.usefixtures("tasks_and_database")
def test_a_wrong_application_is_named(arguments: tuple[str, ...]) -> None:
    wrong = ran(*arguments, "-A", "no_such_module")

    assert (wrong.code, wrong.output) == (1, "")
    assert "there is no Celery application 'no_such_module'" in wrong.errors


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_database_that_is_not_there_is_named_in_a_line(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        python("-c", MAIN, *arguments, "-A", "operation_tasks"),
        cwd=HERE,
        env={**os.environ, "DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/nothing"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot connect to postgresql" in done.stderr
    assert "Traceback" not in done.stderr and "secret" not in done.stderr


def test_the_page_names_each_command() -> None:
    page = (HERE.parents[1] / "docs" / "operations.md").read_text()
    named = {
        (group, name)
        for group, names in re.findall(r"^\| `rhesis-tasks (tasks|tenants) ([a-z\\|]+)", page, re.MULTILINE)
        for name in names.split("\\|")
    }

    assert named == {("tasks", name) for name in tasks_group.commands} | {
        ("tenants", name) for name in tenants_group.commands
    }
