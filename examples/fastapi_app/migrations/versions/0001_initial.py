"""The first tables, each under forced row-level security, and the tables of rhesis-tasks.

Every primary key begins with the organization and every foreign key carries it along.  PostgreSQL checks
foreign keys without regard to policies, so a plain ``test_set_id`` could point into another tenant.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

from rhesis_tasks.postgres.schema import create_schema

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None

TABLES = ("test_sets", "tests", "test_runs", "test_results")


def upgrade() -> None:
    op.create_table(
        "test_sets",
        sa.Column("organization_id", sa.Uuid, nullable=False),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id"),
    )
    op.create_table(
        "tests",
        sa.Column("organization_id", sa.Uuid, nullable=False),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("test_set_id", sa.Uuid, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("response", sa.Text, nullable=False),
        sa.Column("must_contain", postgresql.ARRAY(sa.Text), nullable=False),
        sa.Column("must_not_contain", postgresql.ARRAY(sa.Text), nullable=False),
        sa.Column("max_words", sa.Integer),
        sa.PrimaryKeyConstraint("organization_id", "id"),
        belongs_to("test_sets", "test_set_id"),
    )
    op.create_index("tests_test_set", "tests", ["organization_id", "test_set_id"])
    op.create_table(
        "test_runs",
        sa.Column("organization_id", sa.Uuid, nullable=False),
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("test_set_id", sa.Uuid, nullable=False),
        sa.Column("requested_by", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("report", postgresql.JSONB),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("organization_id", "id"),
        sa.CheckConstraint("state IN ('running', 'collecting', 'finished', 'failed')", "test_runs_state"),
        belongs_to("test_sets", "test_set_id"),
    )
    op.create_index("test_runs_test_set", "test_runs", ["organization_id", "test_set_id"])
    op.create_table(
        "test_results",
        sa.Column("organization_id", sa.Uuid, nullable=False),
        sa.Column("run_id", sa.Uuid, nullable=False),
        sa.Column("test_id", sa.Uuid, nullable=False),
        sa.Column("passed", sa.Boolean, nullable=False),
        sa.Column("reasons", postgresql.ARRAY(sa.Text), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "run_id", "test_id"),
        belongs_to("test_runs", "run_id"),
        belongs_to("tests", "test_id"),
    )
    op.create_index("test_results_test", "test_results", ["organization_id", "test_id"])

    connection = op.get_bind()
    app_role: str = context.config.attributes["app_role"]
    quote = connection.dialect.identifier_preparer.quote
    schema = connection.scalars(sa.select(sa.func.current_schema())).one()
    op.execute(f"GRANT USAGE ON SCHEMA {quote(schema)} TO {quote(app_role)}")
    for table in TABLES:
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {quote(app_role)}")
        op.enable_rls(table, role=app_role, index_columns=None)  # the primary keys serve as indexes
    create_schema(connection, roles=[app_role])


def downgrade() -> None:
    # The tables of rhesis-tasks stay: other applications in this database may use them.
    for table in reversed(TABLES):
        op.drop_table(table)


def belongs_to(parent: str, column: str) -> sa.ForeignKeyConstraint:
    """A foreign key to a row of the same organization; the row goes when that one does."""
    return sa.ForeignKeyConstraint(
        ["organization_id", column], [f"{parent}.organization_id", f"{parent}.id"], ondelete="CASCADE"
    )
