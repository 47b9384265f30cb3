"""``rhesis-tasks demo`` as a newcomer runs it, and as it is broken off."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks.demo.client import Account, watch
from rhesis_tasks.demo.errors import DemoError
from rhesis_tasks.demo.example import DemoUser, example_folder
from rhesis_tasks.demo.run import shown
from rhesis_tasks.processes import child, wait_until
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase

TIMEOUT = 90


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which temporary files go to a folder of the test's own."""
    scratch = tmp_path / "tmp"
    scratch.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # the embedded server runs as another user when the tests run as root
    return {"TMPDIR": str(scratch), "DATABASE_URL": "", "COLUMNS": "80", "NO_COLOR": "1"}


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-c", "from rhesis_tasks.cli import main; main()", "demo"]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def nothing_is_left(environment: dict[str, str]) -> None:
    """No process that has our scratch folder in its environment, and no file in it."""
    scratch = environment["TMPDIR"]

    def ours() -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == scratch and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    wait_until("all processes of the demo to be gone", lambda: not list(ours()), 5)
    assert list(Path(scratch).rglob("*")) == []


@pytest.mark.timeout(240)  # two of them
def test_the_demo_shows_that_all_it_claims_is_true_on_a_data_folder_that_is_kept(
    environment: dict[str, str], command: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"

    done = run([*command, "--data-dir", str(folder)], environment)

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^yes  ", done.stdout, re.MULTILINE)) == 9
    assert "NO  " not in done.stdout
    assert re.search(r"user-1 .* 27 .* 26 .* 1 .* 1 .* 15 of 21", done.stdout)
    for user in ("user-1", "user-2"):  # into a pipe, a line for each change
        told = [int(done) for done in re.findall(rf"^slow task of {user}: (\d+) of 10 steps$", done.stdout, re.M)]
        assert told == sorted(set(told))
        assert (len(told) > 1, told[-1]) == (True, 10)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    nothing_is_left(environment)
    assert (folder / "PG_VERSION").read_text().strip() == "18"
    assert not (folder / "postmaster.pid").exists()

    again = run([*command, "--data-dir", str(folder)], environment)

    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("Creating the example's tables", signal.SIGINT, 130),
        ("Starting the API", signal.SIGTERM, 143),
    ],
)
def test_breaking_it_off_stops_everything(
    environment: dict[str, str], command: list[str], moment: str, number: int, code: int
) -> None:
    with child("the demo", command, env=environment) as demo:
        demo.wait_for(moment, TIMEOUT)
        demo.process.send_signal(number)
        demo.process.send_signal(number)  # an impatient user's second one

        assert demo.process.wait(TIMEOUT) == code

        assert "Everything that was started is stopped." in demo.finished_output()
        assert "Traceback" not in demo.output
        nothing_is_left(environment)


def test_a_bad_line_is_named_and_nothing_is_left(
    environment: dict[str, str], command: list[str], tmp_path: Path
) -> None:
    good = (example_folder() / "data" / "test_sets.jsonl").read_text().splitlines()
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([*good[:3], '{"type": "test", "prompt": }', *good[3:]]))

    done = run([*command, "--input", str(file)], environment)

    assert done.returncode == 2
    assert re.search(r"mine\.jsonl:4: .*JSON", done.stderr)
    assert "Starting the API" not in done.stdout
    nothing_is_left(environment)


def test_input_of_one_organization_is_refused(environment: dict[str, str], command: list[str], tmp_path: Path) -> None:
    lines = (example_folder() / "data" / "test_sets.jsonl").read_text().splitlines()
    first = json.loads(lines[0])["organization_id"]
    file = tmp_path / "one.jsonl"
    file.write_text("\n".join(line for line in lines if json.loads(line)["organization_id"] == first))

    done = run([*command, "--input", str(file)], environment)

    assert (done.returncode, "one organization only" in done.stderr) == (2, True)


def test_keep_leaves_it_running_with_urls_that_work(environment: dict[str, str], command: list[str]) -> None:
    with child("the demo", [*command, "--keep"], env=environment) as demo:
        demo.wait_for("Ctrl-C stops everything.", TIMEOUT)

        assert [seen_through(line) for line in demo.output.splitlines() if "curl" in line] == [21, 21]
        url, token = urls_and_tokens(demo.output)[0]
        states = follow_and_cancel_a_slow_task(url, token)
        assert (states[-1]["state"], states[-1]["result"] < 100) == ("success", True)
        assert any(0 < each["progress"]["done"] < 100 for each in states if each["progress"])

        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(TIMEOUT) == 130
    nothing_is_left(environment)


# --- the slow task ---------------------------------------------------------------------------------------------------


def account_that_sees(user: str, statuses: list[dict[str, Any]], *, others: int = 404) -> Account:
    """An account for which the API shows one status of the task "slow" after the other."""
    account = Account("http://api", DemoUser(user, "acme", "token"))

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/tasks/slow" and statuses:
            return httpx.Response(200, json=statuses.pop(0))
        return httpx.Response(others if request.url.path == "/tasks/slow" else 404, json={"detail": "no such task"})

    account.http = httpx.Client(base_url="http://api", transport=httpx.MockTransport(answer))
    return account


def status_of(state: str, done: int | None) -> dict[str, Any]:
    return {"state": state, "progress": None if done is None else {"done": done, "total": 4, "message": ""}}


def slow_task() -> list[dict[str, Any]]:
    reported = [("queued", None), ("started", None), ("started", 1), ("started", 1), ("started", 3), ("success", 4)]
    return [status_of(*each) for each in reported]


def test_each_progress_is_told_once_and_what_was_told_after_the_end_is_not_seen_while_it_ran() -> None:
    told: list[int] = []

    with account_that_sees("user-1", slow_task()) as account, account_that_sees("user-2", []) as other:
        watched = watch(account, other, "slow", lambda progress: told.append(progress["done"]))

    assert told == [1, 3, 4]
    assert [progress["done"] for progress in watched.progress] == [1, 3]
    assert watched.is_hidden


def test_a_slow_task_that_the_other_user_sees_is_not_hidden() -> None:
    with account_that_sees("user-1", slow_task()) as account, account_that_sees("user-2", [], others=200) as other:
        assert not watch(account, other, "slow", lambda _: None).is_hidden


def test_a_slow_task_that_does_not_end_is_an_error_that_says_so() -> None:
    for_ever = [status_of("started", 1)] * 100
    with (
        account_that_sees("user-1", for_ever) as account,
        account_that_sees("user-2", []) as other,
        pytest.raises(DemoError, match=r"the slow task of user-1 did not end within 0\.1 seconds"),
    ):
        watch(account, other, "slow", lambda _: None, timeout=0.1)


def test_on_a_terminal_a_bar_moves() -> None:
    screen = io.StringIO()
    with Progress(console=Console(file=screen, force_terminal=True, width=80), refresh_per_second=100) as progress:
        show = shown(progress, account_that_sees("user-1", []))
        for done in (1, 3):
            show({"done": done, "total": 4, "message": "steps"})
            progress.refresh()

    assert re.findall(r"slow task of user-1 .*?(\d+)%", screen.getvalue())[-1] == "75"
    assert "3 of 4 steps" not in screen.getvalue()


def seen_through(line: str) -> int:
    match = re.search(r"curl -H '(.*?): (.*?)' (.*)", line)
    assert match
    header, value, url = match.groups()
    return sum(each["tests"] for each in httpx.get(url.strip(), headers={header: value}).json())


def urls_and_tokens(output: str) -> list[tuple[str, str]]:
    found = re.findall(r"curl -H 'Authorization: Bearer (.*?)' (http://[^/]*)/", output)
    return [(url, token) for token, url in found]


def follow_and_cancel_a_slow_task(url: str, token: str) -> list[dict[str, Any]]:
    """What the events of a slow task say that is cancelled once it has made progress."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30) as http:
        task_id = http.post("/examples/slow?steps=100").json()["task_id"]
        said: list[dict[str, Any]] = []
        with http.stream("GET", f"/tasks/{task_id}/events") as events:
            for line in events.iter_lines():
                if line.startswith("data: "):
                    said.append(json.loads(line.removeprefix("data: ")))
                    if said[-1]["progress"] and not said[-1]["abort_requested_at"]:
                        assert http.post(f"/tasks/{task_id}/cancel").json()["outcome"] in ("asked", "ended")
    return said


# --- on the user's own server --------------------------------------------------------------------------------------


def roles_and_schemas(url: str) -> list[str]:
    engine = create_engine(database_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        return list(
            connection.scalars(
                text("SELECT rolname FROM pg_roles UNION ALL SELECT nspname FROM pg_namespace ORDER BY 1")
            )
        )


def may(tenant_database: TenantDatabase, what: str) -> None:
    with tenant_database.admin.begin() as connection:
        connection.exec_driver_sql(f'ALTER ROLE "{database_url(tenant_database.owner_url).username}" {what}')


def test_on_ones_own_server_it_drops_all_that_it_made(
    environment: dict[str, str], command: list[str], tenant_database: TenantDatabase
) -> None:
    url = tenant_database.owner_url
    may(tenant_database, "CREATEROLE")
    before = roles_and_schemas(url)

    done = run(command, {**environment, "DATABASE_URL": url})

    assert done.returncode == 0, done.stdout + done.stderr
    assert roles_and_schemas(url) == before
    nothing_is_left(environment)


def test_breaking_it_off_drops_what_it_made_on_ones_own_server(
    environment: dict[str, str], command: list[str], tenant_database: TenantDatabase
) -> None:
    may(tenant_database, "SUPERUSER")
    before = roles_and_schemas(tenant_database.owner_url)
    with child("the demo", command, env={**environment, "DATABASE_URL": tenant_database.owner_url}) as demo:
        demo.wait_for("Launching runs", TIMEOUT)
        demo.process.send_signal(signal.SIGINT)

        assert demo.process.wait(TIMEOUT) == 130

    nothing_is_left(environment)
    assert "Traceback" not in demo.output
    assert roles_and_schemas(tenant_database.owner_url) == before


def test_a_login_that_may_not_create_roles_is_told_so(
    environment: dict[str, str], command: list[str], tenant_database: TenantDatabase
) -> None:
    done = run(command, {**environment, "DATABASE_URL": tenant_database.url})

    assert done.returncode == 1
    assert "It needs CREATEROLE" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_server_is_named_without_its_password(environment: dict[str, str], command: list[str]) -> None:
    done = run(command, {**environment, "DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/none"})

    assert done.returncode == 1
    assert "cannot connect to postgresql+psycopg://me:***@127.0.0.1:1/none" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
