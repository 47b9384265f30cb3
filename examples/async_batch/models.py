"""The tables.  Their keys begin with the organization; ``database.py`` puts them under row-level security.

The key of :class:`Evaluation` is what makes a result stored once, however often a task runs.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import DateTime, ForeignKeyConstraint, Index, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from rhesis_tasks.models import tenant_column

__all__ = ["Base", "Evaluation", "Prompt"]


class Base(DeclarativeBase):
    """What the tables share.  Organizations are texts here; with UUIDs, leave the "text" out."""

    organization_id: Mapped[str] = tenant_column("text", primary_key=True)


class Prompt(Base):
    """One of the prompts of a test set."""

    __tablename__ = "prompts"
    __table_args__ = (Index("prompts_test_set", "organization_id", "test_set"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    test_set: Mapped[str]
    text: Mapped[str]


class Evaluation(Base):
    """What became of one prompt in one run: a score, or the reason why there is none."""

    __tablename__ = "evaluations"
    __table_args__ = (
        ForeignKeyConstraint(["organization_id", "prompt_id"], ["prompts.organization_id", "prompts.id"]),
    )

    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    prompt_id: Mapped[UUID] = mapped_column(primary_key=True)
    score: Mapped[float | None]
    error: Mapped[str | None]
    attempts: Mapped[int]
    stored_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
