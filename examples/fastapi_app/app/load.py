"""Load test sets from a JSON Lines file: ``python -m app.load FILE``.

Each line is a test set or a test::

    {"type": "test_set", "organization_id": UUID, "id": UUID, "name": "..."}
    {"type": "test", "organization_id": UUID, "test_set_id": UUID, "id": UUID, "prompt": "...",
     "response": "...", "must_contain": ["..."], "must_not_contain": ["..."], "max_words": 50 or null}

Everything is checked before anything is written, and all of it is written in one transaction.  It connects as
the application's role: row-level security holds for the loader, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError

from app.models import Base, Test, TestSet
from app.settings import DatabaseSettings, SettingsError
from rhesis_tasks import TenantSessions
from rhesis_tasks.errors import RhesisTasksError

__all__ = ["Content", "LoadError", "Loaded", "NewTest", "NewTestSet", "Problem", "load", "parse"]

SHOWN_PROBLEMS = 20

# Where Pydantic speaks of Python rather than of the file.
_MESSAGES = {
    "missing": "this field is missing",
    "unexpected_keyword_argument": "there is no such field",
    "union_tag_not_found": 'the field "type" is missing',
    "union_tag_invalid": 'the field "type" must be "test_set" or "test"',
}


def _storable(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("not_storable", "PostgreSQL cannot store the character U+0000")
    return value


Text: TypeAlias = Annotated[str, AfterValidator(_storable)]
NonEmptyText: TypeAlias = Annotated[Text, Field(min_length=1)]


@dataclasses.dataclass(frozen=True, slots=True)
class NewTestSet:
    """A test set to load."""

    type: Literal["test_set"]
    organization_id: UUID
    id: UUID
    name: NonEmptyText


@dataclasses.dataclass(frozen=True, slots=True)
class NewTest:
    """A test to load."""

    type: Literal["test"]
    organization_id: UUID
    test_set_id: UUID
    id: UUID
    prompt: NonEmptyText
    response: Text
    must_contain: tuple[NonEmptyText, ...]
    must_not_contain: tuple[NonEmptyText, ...]
    max_words: Annotated[int, Field(ge=1, le=2**31 - 1)] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, by line number."""

    test_sets: Mapping[int, NewTestSet]
    tests: Mapping[int, NewTest]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a line."""

    line: int
    reason: str


class LoadError(Exception):
    """The file cannot be loaded; nothing was written."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line)
        super().__init__("; ".join(f"line {problem.line}: {problem.reason}" for problem in self.problems))


_line: TypeAdapter[NewTestSet | NewTest] = TypeAdapter(
    Annotated[NewTestSet | NewTest, Field(discriminator="type")],
    config=ConfigDict(extra="forbid", strict=True),
)


def parse(path: str | Path) -> Content:
    """Read and check a file.

    Raises:
        LoadError: something is wrong with it; it names every bad line.
        OSError: it cannot be read.
    """
    test_sets: dict[int, NewTestSet] = {}
    tests: dict[int, NewTest] = {}
    problems: list[Problem] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _line.validate_json(line.decode())
        except UnicodeDecodeError as error:
            problems.append(Problem(number, f"not UTF-8: {error.reason} at byte {error.start + 1}"))
        except ValidationError as error:
            problems.append(Problem(number, _reason(error)))
        else:
            if isinstance(entry, NewTestSet):
                test_sets[number] = entry
            else:
                tests[number] = entry
    problems += _duplicates(test_sets)
    problems += _duplicates(tests)
    problems += _strays(test_sets.values(), tests)
    if not (test_sets or tests or problems):
        problems = [Problem(1, "the file holds no test sets")]
    if problems:
        raise LoadError(problems)
    return Content(test_sets, tests)


def _reason(error: ValidationError) -> str:
    """Pydantic's findings about one line, each with the field that it is about."""
    found = []
    for detail in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in detail["loc"][1:])  # the first part is the type of the line
        message = _MESSAGES.get(detail["type"], detail["msg"]).replace(" at line 1 column ", " at column ")
        found.append(f"{field}: {message}" if field else message)
    return "; ".join(found)


def _duplicates(entries: Mapping[int, NewTestSet | NewTest]) -> Iterator[Problem]:
    first: dict[UUID, int] = {}
    for number, entry in entries.items():
        if first.setdefault(entry.id, number) != number:
            yield Problem(number, f"id {entry.id} is used in line {first[entry.id]} already")


def _strays(test_sets: Iterable[NewTestSet], tests: Mapping[int, NewTest]) -> Iterator[Problem]:
    """Tests that do not belong to a test set of their own organization."""
    owners = {test_set.id: test_set.organization_id for test_set in test_sets}
    for number, test in tests.items():
        owner = owners.get(test.test_set_id)
        if owner is None:
            yield Problem(number, f"there is no valid test set {test.test_set_id} in this file")
        elif owner != test.organization_id:
            yield Problem(number, f"its organization is {test.organization_id}, but that of its test set is {owner}")


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """How much of one organization was written."""

    test_sets: int
    tests: int


def load(engine: Engine, content: Content) -> dict[UUID, Loaded]:
    """Write everything, or nothing; returns how much, by organization.

    Raises:
        LoadError: an id is in the database already.
    """
    loaded: dict[UUID, Loaded] = {}
    problems: list[Problem] = []
    with engine.begin() as connection:
        for organization_id in {test_set.organization_id: None for test_set in content.test_sets.values()}:
            # A tenant session does this by itself, but for one tenant; this transaction serves several.
            setting = func.set_config("app.current_organization", str(organization_id), True)
            connection.execute(select(setting))
            test_sets = _of(organization_id, content.test_sets)
            tests = _of(organization_id, content.tests)
            problems += _insert(connection, TestSet, test_sets)
            problems += _insert(connection, Test, tests)
            loaded[organization_id] = Loaded(len(test_sets), len(tests))
        if problems:
            raise LoadError(problems)
    return loaded


EntryT = TypeVar("EntryT", NewTestSet, NewTest)


def _of(organization_id: UUID, entries: Mapping[int, EntryT]) -> dict[int, EntryT]:
    return {number: entry for number, entry in entries.items() if entry.organization_id == organization_id}


def _insert(connection: Connection, model: type[Base], entries: Mapping[int, NewTestSet | NewTest]) -> list[Problem]:
    """Insert what is not there yet; what is, comes back as problems."""
    if not entries:
        return []
    rows = [dataclasses.asdict(entry) for entry in entries.values()]
    for row in rows:
        del row["type"]
    statement = insert(model).on_conflict_do_nothing().returning(model.__table__.c.id)
    inserted = set(connection.scalars(statement, rows))
    return [
        Problem(number, f"id {entry.id} is in the database already")
        for number, entry in entries.items()
        if entry.id not in inserted
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code is 2 if the file is at fault, 1 if the database or the settings are."""
    parser = argparse.ArgumentParser(prog="python -m app.load", description="Load test sets from a JSON Lines file.")
    parser.add_argument("file", type=Path)
    path: Path = parser.parse_args(arguments).file
    try:
        content = parse(path)
        loaded = load(TenantSessions(DatabaseSettings.from_environment().url).engine, content)
    except LoadError as error:
        for problem in error.problems[:SHOWN_PROBLEMS]:
            print(f"{path}:{problem.line}: {problem.reason}", file=sys.stderr)
        if (more := len(error.problems) - SHOWN_PROBLEMS) > 0:
            print(f"and {more} more", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)
        return 2
    except (SettingsError, RhesisTasksError) as error:
        print(error, file=sys.stderr)
        return 1
    except DBAPIError as error:
        print(f"the database refused: {error.orig}", file=sys.stderr)
        return 1
    for organization_id, counts in loaded.items():
        print(f"organization {organization_id}: {counts.test_sets} test sets, {counts.tests} tests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
