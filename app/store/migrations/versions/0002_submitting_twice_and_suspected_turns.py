"""Submitting twice, and suspected turns"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "turns",
        sa.Column(
            "claimable_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="A turn suspected of crashing its worker waits until then",
        ),
    )
    op.add_column(
        "turns",
        sa.Column(
            "request_hash",
            sa.LargeBinary(),
            nullable=True,
            comment="SHA-256 of what was asked for: tells a retry from a new turn",
        ),
    )
    op.add_column(
        "turns",
        sa.Column(
            "event_bytes",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Of its attempts' recorded events",
        ),
    )
    op.create_index(
        "ix_turns_active",
        "turns",
        ["owner"],
        unique=False,
        postgresql_where=sa.text("status IN ('queued', 'running')"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False, comment="Idempotency-Key of a request that made or resumed a turn"),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("turn_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "after_fence",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Event that the leg follows",
        ),
        sa.Column("after_n", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.ForeignKeyConstraint(
            ["turn_id"],
            ["turns.turn_id"],
            name=op.f("fk_idempotency_keys_turn_id"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created", "idempotency_keys", ["created_at"], unique=False)
    op.create_index("ix_idempotency_keys_turn", "idempotency_keys", ["turn_id"], unique=False)


def downgrade() -> None:
    op.drop_table("idempotency_keys")
    op.drop_index("ix_turns_active", table_name="turns", postgresql_where=sa.text("status IN ('queued', 'running')"))
    op.drop_column("turns", "event_bytes")
    op.drop_column("turns", "request_hash")
    op.drop_column("turns", "claimable_at")
