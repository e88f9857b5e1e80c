"""Requests to the tool runtime, run by workers"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tool_requests",
        sa.Column("request_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column(
            "method",
            sa.Text(),
            nullable=False,
            comment="Of llama-stack's tool runtime: invoke_tool, rag_tool.insert, …",
        ),
        sa.Column("arguments", sa.LargeBinary(), comment="The method's, as JSON; empty once it has ended"),
        sa.Column("sealed", sa.LargeBinary(), comment="Provider data (app.identity.sealing), until it has ended"),
        sa.Column("worker_id", sa.Uuid(as_uuid=False), comment="Who runs it; empty: it waits for a worker"),
        sa.Column("status", sa.Integer(), comment="HTTP status of the answer, once it has ended"),
        sa.Column("answer", sa.LargeBinary(), comment="What the method gave, or why it failed, as JSON"),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("clock_timestamp()")
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("rung_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("clock_timestamp()")),
        sa.Column("rings", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_tool_requests")),
    )
    op.create_index("ix_tool_requests_created", "tool_requests", ["created_at"])
    op.create_index(
        "ix_tool_requests_waiting",
        "tool_requests",
        ["rung_at"],
        postgresql_where=sa.text("worker_id IS NULL"),
    )


def downgrade() -> None:
    op.drop_table("tool_requests")
