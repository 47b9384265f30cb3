"""``rhesis-tasks demo`` as a newcomer runs it, and as it is broken off."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks.demo.example import example_folder
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


def test_the_demo_shows_that_all_it_claims_is_true(environment: dict[str, str], command: list[str]) -> None:
    done = run(command, environment)

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^yes  ", done.stdout, re.MULTILINE)) == 8
    assert "NO  " not in done.stdout
    assert re.search(r"user-1 .* 26 .* 25 .* 1 .* 1 .* 15 of 21", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    nothing_is_left(environment)


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("Creating the example's tables", signal.SIGINT, 130),
        ("Starting the API", signal.SIGTERM, 143),
        ("Launching runs", signal.SIGINT, 130),
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

        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(TIMEOUT) == 130
    nothing_is_left(environment)


def seen_through(line: str) -> int:
    match = re.search(r"curl -H '(.*?): (.*?)' (.*)", line)
    assert match
    header, value, url = match.groups()
    return sum(each["tests"] for each in httpx.get(url.strip(), headers={header: value}).json())


def test_a_data_folder_is_kept_and_used_again(environment: dict[str, str], command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "data"

    first = run([*command, "--data-dir", str(folder)], environment)
    again = run([*command, "--data-dir", str(folder)], environment)

    assert (first.returncode, again.returncode) == (0, 0), first.stdout + first.stderr + again.stdout + again.stderr
    assert (folder / "PG_VERSION").read_text().strip() == "18"
    assert not (folder / "postmaster.pid").exists()


# --- on the user's own server --------------------------------------------------------------------------------------


def roles_and_schemas(url: str) -> list[str]:
    engine = create_engine(database_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        return list(
            connection.scalars(
                text("SELECT rolname FROM pg_roles UNION ALL SELECT nspname FROM pg_namespace ORDER BY 1")
            )
        )


@pytest.mark.parametrize("login", ["superuser", "may create roles"])
def test_on_ones_own_server_it_drops_all_that_it_made(
    environment: dict[str, str], command: list[str], tenant_database: TenantDatabase, login: str
) -> None:
    url = tenant_database.owner_url
    role = database_url(url).username
    with tenant_database.admin.begin() as connection:
        connection.exec_driver_sql(f'ALTER ROLE "{role}" ' + ("SUPERUSER" if login == "superuser" else "CREATEROLE"))
    before = roles_and_schemas(url)

    done = run(command, {**environment, "DATABASE_URL": url})

    assert done.returncode == 0, done.stdout + done.stderr
    assert roles_and_schemas(url) == before
    nothing_is_left(environment)


def test_breaking_it_off_drops_what_it_made_on_ones_own_server(
    environment: dict[str, str], command: list[str], tenant_database: TenantDatabase
) -> None:
    with tenant_database.admin.begin() as connection:
        connection.exec_driver_sql(f'ALTER ROLE "{database_url(tenant_database.owner_url).username}" CREATEROLE')
    before = roles_and_schemas(tenant_database.owner_url)
    with child("the demo", command, env={**environment, "DATABASE_URL": tenant_database.owner_url}) as demo:
        demo.wait_for("Launching runs", TIMEOUT)
        demo.process.send_signal(signal.SIGINT)

        assert demo.process.wait(TIMEOUT) == 130

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
