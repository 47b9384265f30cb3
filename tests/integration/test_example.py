"""The example application by itself: its loader, its migration, its routes.  (The demo runs the whole.)"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from rhesis_tasks.demo.example import example_folder
from rhesis_tasks.processes import child, python
from rhesis_tasks.settings import database_url
from rhesis_tasks.testing import TenantDatabase

EXAMPLE = example_folder()
DATA = EXAMPLE / "data" / "test_sets.jsonl"
LINES = DATA.read_text().splitlines()


@pytest.fixture
def environment(tenant_database: TenantDatabase) -> dict[str, str]:
    return {
        "DATABASE_URL": tenant_database.url,
        "MIGRATION_DATABASE_URL": tenant_database.owner_url,
        "APP_ROLE": tenant_database.role,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    with child(arguments[1], python(*arguments), env=environment, cwd=EXAMPLE) as step:
        try:
            return step.process.wait(60), step.finished_output()
        except subprocess.TimeoutExpired:
            pytest.fail(f"{arguments} did not end within 60 seconds: {step.output}")


def migrate(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    return run(environment, "-m", "alembic", *(arguments or ("upgrade", "head")))


def load(environment: dict[str, str], file: Path) -> tuple[int, str]:
    return run(environment, "-m", "app.load", str(file))


def rows(database: TenantDatabase, organization_id: str | None) -> int:
    """How many tests the application's role sees."""
    with create_engine(database_url(database.url), poolclass=NullPool).begin() as connection:
        if organization_id is not None:
            connection.execute(
                text("SELECT set_config('app.current_organization', :id, true)"), {"id": organization_id}
            )
        return int(connection.scalar(text("SELECT count(*) FROM tests")) or 0)


ORGANIZATIONS = sorted({json.loads(line)["organization_id"] for line in LINES})


def test_the_migration_makes_tables_in_which_each_tenant_sees_its_own_rows_only(
    environment: dict[str, str], tenant_database: TenantDatabase
) -> None:
    assert migrate(environment)[0] == 0
    code, output = load(environment, DATA)

    assert (code, output.count("21 tests")) == (0, 2)
    assert [rows(tenant_database, each) for each in (*ORGANIZATIONS, None)] == [21, 21, 0]
    with tenant_database.owner.connect() as connection:
        unforced = connection.scalars(
            text(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' "
                "AND relname <> 'alembic_version' AND NOT (relrowsecurity AND relforcerowsecurity)"
            )
        ).all()
    assert unforced == []


def test_the_migration_can_be_taken_back_and_applied_again(environment: dict[str, str]) -> None:
    steps = [migrate(environment, *step) for step in [("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")]]

    assert [code for code, _ in steps] == [0, 0, 0], steps


def test_the_models_are_those_of_the_migration(environment: dict[str, str]) -> None:
    migrate(environment)

    code, output = migrate(environment, "check")

    assert code == 0, output


@pytest.mark.parametrize("missing", ["MIGRATION_DATABASE_URL", "APP_ROLE"])
def test_the_migration_names_the_variable_that_it_misses(environment: dict[str, str], missing: str) -> None:
    code, output = migrate({**environment, missing: ""})

    assert code != 0
    assert missing in output.splitlines()[-1]


def changed(line: str, **fields: Any) -> str:
    entry = {**json.loads(line), **fields}
    return json.dumps({name: value for name, value in entry.items() if value is not ...})


TEST = next(
    line
    for line in LINES
    if json.loads(line)["type"] == "test" and json.loads(line)["organization_id"] == ORGANIZATIONS[0]
)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", r"JSON"),
        ("[1]", r"."),
        ("12", r"."),
        (changed(TEST, type="tset"), r'must be "test_set" or "test"'),
        (changed(TEST, type=...), r'the field "type" is missing'),
        (changed(TEST, prompt=...), r"prompt: this field is missing"),
        (changed(TEST, extra=1), r"extra: there is no such field"),
        (changed(TEST, max_words="many"), r"max_words: "),
        (changed(TEST, id="1"), r"id: .*UUID"),
        (TEST, r"id .* is used in line \d+ already"),
        (changed(TEST, id="00000000-0000-4000-8000-000000000001", test_set_id=ORGANIZATIONS[0]), r"no valid test set"),
        (
            changed(TEST, id="00000000-0000-4000-8000-000000000001", organization_id=ORGANIZATIONS[1]),
            r"its organization is .* but that of its test set is",
        ),
        ('{"type": "test", "prompt": "\udcff"}', r"not UTF-8"),
    ],
)
def test_a_bad_line_is_reported_with_line_and_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: str, reason: str
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    loader = importlib.import_module("app.load")
    file = tmp_path / "mine.jsonl"
    file.write_bytes("\n".join([*LINES, "", bad, ""]).encode(errors="surrogateescape"))

    with pytest.raises(loader.LoadError) as caught:
        loader.parse(file)

    (problem,) = caught.value.problems
    assert problem.line == len(LINES) + 2
    assert re.search(reason, problem.reason)


def test_nothing_is_loaded_of_a_file_with_a_bad_line(
    environment: dict[str, str], tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    migrate(environment)
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([*LINES, "{"]))

    code, output = load(environment, file)

    assert (code, f"mine.jsonl:{len(LINES) + 1}: " in output) == (2, True)
    assert [rows(tenant_database, each) for each in ORGANIZATIONS] == [0, 0]


def test_what_is_loaded_already_is_reported_and_the_rest_is_not_loaded(
    environment: dict[str, str], tenant_database: TenantDatabase, tmp_path: Path
) -> None:
    migrate(environment)
    first = tmp_path / "first.jsonl"
    first.write_text(LINES[0])
    load(environment, first)

    code, output = load(environment, DATA)

    assert code == 2
    assert re.search(r"test_sets\.jsonl:1: id .* is in the database already", output)
    assert [rows(tenant_database, each) for each in ORGANIZATIONS] == [0, 0]


@pytest.mark.parametrize("variable", ["DATABASE_URL", "API_TOKENS"])
def test_the_api_names_the_variable_that_it_misses(environment: dict[str, str], variable: str) -> None:
    complete = {**environment, "API_TOKENS": json.dumps({"t": {"user_id": "u", "organization_id": ORGANIZATIONS[0]}})}

    code, output = run({**complete, variable: ""}, "-c", "import app.main")

    assert code == 1
    assert f"the environment variable {variable} is not set" in output.splitlines()[-1]


def test_the_example_environment_names_every_variable_that_is_read() -> None:
    read = set(re.findall(r'"([A-Z]+_[A-Z_]+)"', "".join(path.read_text() for path in EXAMPLE.rglob("*.py"))))
    named = (EXAMPLE / ".env.example").read_text()

    assert {name for name in read if name.endswith(("_URL", "_ROLE", "_TOKENS"))} <= set(re.findall(r"\w+", named))
