"""The tables, as the application sees them.  ``migrations/`` creates them, with row-level security.

Every key begins with the organization, so that a foreign key cannot point into another one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal, TypeAlias
from uuid import UUID, uuid4

from sqlalchemy import DateTime, ForeignKeyConstraint, Index, Text, func
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Base", "RunState", "Test", "TestResult", "TestRun", "TestSet"]

RunState: TypeAlias = Literal["running", "collecting", "finished", "failed"]


def belongs_to(parent: str, column: str) -> ForeignKeyConstraint:
    """A foreign key to a row of the same organization; the row goes when that one does."""
    return ForeignKeyConstraint(
        ["organization_id", column], [f"{parent}.organization_id", f"{parent}.id"], ondelete="CASCADE"
    )


class Base(DeclarativeBase):
    """What all tables share."""

    __test__: ClassVar[bool] = False  # pytest takes classes named Test... for tests
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        datetime: DateTime(timezone=True),
        list[str]: ARRAY(Text),
        dict[str, Any]: JSONB,
    }

    organization_id: Mapped[UUID] = mapped_column(primary_key=True, sort_order=-1)


class TestSet(Base):
    """Tests that are run together."""

    __tablename__ = "test_sets"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    name: Mapped[str]


class Test(Base):
    """A recorded answer of a chat bot, and what is expected of it."""

    __tablename__ = "tests"
    __table_args__ = (
        belongs_to("test_sets", "test_set_id"),
        Index("tests_test_set", "organization_id", "test_set_id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    test_set_id: Mapped[UUID]
    prompt: Mapped[str]
    response: Mapped[str]
    must_contain: Mapped[list[str]]
    must_not_contain: Mapped[list[str]]
    max_words: Mapped[int | None]


class TestRun(Base):
    """One evaluation of all tests of a set."""

    __tablename__ = "test_runs"
    __table_args__ = (
        belongs_to("test_sets", "test_set_id"),
        Index("test_runs_test_set", "organization_id", "test_set_id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    test_set_id: Mapped[UUID]
    requested_by: Mapped[str]
    state: Mapped[RunState] = mapped_column(Text, default="running")
    total: Mapped[int]
    report: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]


class TestResult(Base):
    """What a run found out about one test.  The key makes evaluating a test twice harmless."""

    __tablename__ = "test_results"
    __table_args__ = (
        belongs_to("test_runs", "run_id"),
        belongs_to("tests", "test_id"),
        Index("test_results_test", "organization_id", "test_id"),
    )

    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    test_id: Mapped[UUID] = mapped_column(primary_key=True)
    passed: Mapped[bool]
    reasons: Mapped[list[str]]
