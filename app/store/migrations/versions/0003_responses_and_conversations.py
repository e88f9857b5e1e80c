"""Responses and conversations"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

RESPONSE = sa.text("kind = 'response'")


def upgrade() -> None:
    op.alter_column(
        "sessions",
        "agent_id",
        existing_type=sa.Uuid(as_uuid=False),
        nullable=True,
        comment="None: a conversation, or the place of one response outside any",
    )
    op.add_column(
        "sessions",
        sa.Column("metadata", sa.JSON(), nullable=True, comment="Of a conversation, which is a session that has this"),
    )
    op.add_column(
        "turns",
        sa.Column(
            "kind",
            sa.Text(),
            server_default=sa.text("'agent'"),
            nullable=False,
            comment="agent: an agent's turn; response: OpenAI's",
        ),
    )
    op.add_column(
        "turns",
        sa.Column(
            "previous_turn_id", sa.Uuid(as_uuid=False), nullable=True, comment="previous_response_id of a response"
        ),
    )
    op.create_foreign_key(
        op.f("fk_turns_previous_turn_id"), "turns", "turns", ["previous_turn_id"], ["turn_id"], ondelete="SET NULL"
    )
    op.add_column(
        "turns",
        sa.Column(
            "stored",
            sa.Boolean(),
            server_default=sa.text("true"),
            nullable=False,
            comment="False: a response to be shown to nobody",
        ),
    )
    op.add_column(
        "turns",
        sa.Column(
            "sealed",
            sa.LargeBinary(),
            nullable=True,
            comment="Secrets of the request (app.identity.sealing), until the turn ends",
        ),
    )
    op.create_index(
        "ix_turns_previous",
        "turns",
        ["previous_turn_id"],
        unique=False,
        postgresql_where=sa.text("previous_turn_id IS NOT NULL"),
    )
    op.create_index("ix_turns_responses", "turns", ["owner", "created_at"], unique=False, postgresql_where=RESPONSE)
    op.create_index("ix_turns_response_hash", "turns", ["request_hash"], unique=False, postgresql_where=RESPONSE)
    op.create_table(
        "session_items",
        sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "position",
            sa.BigInteger(),
            sa.Identity(always=False),
            nullable=False,
            comment="Order in the conversation, with holes",
        ),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("item", sa.JSON(), nullable=False, comment="Input or output item of OpenAI's Responses"),
        sa.Column(
            "result",
            sa.JSON(),
            nullable=True,
            comment="Text that a built-in tool gave the model, where the item does not say it",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_session_items_session_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("session_id", "position", name=op.f("pk_session_items")),
        sa.UniqueConstraint("session_id", "item_id", name=op.f("uq_session_items_session_id_item_id")),
    )


def downgrade() -> None:
    op.drop_table("session_items")
    op.execute("DELETE FROM sessions WHERE agent_id IS NULL")
    op.drop_index("ix_turns_response_hash", table_name="turns", postgresql_where=RESPONSE)
    op.drop_index("ix_turns_responses", table_name="turns", postgresql_where=RESPONSE)
    op.drop_index("ix_turns_previous", table_name="turns", postgresql_where=sa.text("previous_turn_id IS NOT NULL"))
    op.drop_column("turns", "sealed")
    op.drop_column("turns", "stored")
    op.drop_constraint(op.f("fk_turns_previous_turn_id"), "turns", type_="foreignkey")
    op.drop_column("turns", "previous_turn_id")
    op.drop_column("turns", "kind")
    op.drop_column("sessions", "metadata")
    op.alter_column("sessions", "agent_id", existing_type=sa.Uuid(as_uuid=False), nullable=False, comment=None)
