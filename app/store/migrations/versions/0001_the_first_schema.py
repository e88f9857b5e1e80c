"""The first schema"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("agent_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False, comment="AgentConfig of llama-stack 0.3.5"),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "deleted_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Asked to be deleted; the row goes once nothing runs there",
        ),
        sa.PrimaryKeyConstraint("agent_id", name=op.f("pk_agents")),
    )
    op.create_index(
        "ix_agents_deleted", "agents", ["deleted_at"], unique=False, postgresql_where=sa.text("deleted_at IS NOT NULL")
    )
    op.create_index(
        "ix_agents_owner",
        "agents",
        ["owner", "created_at"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "registry_version",
        sa.Column("id", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("id", name=op.f("ck_registry_version_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_registry_version")),
    )
    op.create_table(
        "workers",
        sa.Column("worker_id", sa.Uuid(as_uuid=False), nullable=False, comment="One incarnation of one worker process"),
        sa.Column("name", sa.Text(), nullable=False, comment="hostname:pid"),
        sa.Column(
            "started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "dead_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Set once by whoever finds the lease expired; a dead row is never renewed",
        ),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_workers")),
    )
    op.create_index(
        "ix_workers_alive", "workers", ["lease_until"], unique=False, postgresql_where=sa.text("dead_at IS NULL")
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("agent_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "next_number",
            sa.Integer(),
            server_default=sa.text("1"),
            nullable=False,
            comment="Of the session's next turn",
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["agent_id"], ["agents.agent_id"], name=op.f("fk_sessions_agent_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    op.create_index("ix_sessions_agent", "sessions", ["agent_id", "created_at"], unique=False)
    op.create_index(
        "ix_sessions_deleted",
        "sessions",
        ["deleted_at"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NOT NULL"),
    )
    op.create_table(
        "turns",
        sa.Column("turn_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False, comment="Order in the session"),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False, comment="messages, documents, toolgroups, tool_config"),
        sa.Column(
            "resolved", sa.JSON(), nullable=True, comment="What the turn resolved once: tools, text of its documents"
        ),
        sa.Column(
            "tool_responses", sa.JSON(), nullable=False, comment="A client's responses, by ordinal of the asking step"
        ),
        sa.Column(
            "fence",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Raised by every claim, requeue and end",
        ),
        sa.Column("worker_id", sa.Uuid(as_uuid=False), nullable=True, comment="Owner while running, else the last one"),
        sa.Column(
            "failures",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Workers lost since the last step",
        ),
        sa.Column(
            "tail_lost",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="A dead attempt may have unrecorded events",
        ),
        sa.Column(
            "last_fence",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Fence of the last recorded event",
        ),
        sa.Column(
            "last_n",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Number of the last recorded event",
        ),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True, comment="code and message, if failed or cancelled"),
        sa.Column(
            "output_message", sa.JSON(), nullable=True, comment="CompletionMessage, once awaiting input or completed"
        ),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "queued_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="When it last became claimable or was put behind others",
        ),
        sa.Column("rung_at", sa.DateTime(timezone=True), nullable=True, comment="When its doorbell was last rung"),
        sa.Column(
            "rings",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="Doorbells since it was last queued",
        ),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "deadline_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="End of this leg while running, of the wait while awaiting input",
        ),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("status <> 'running' OR worker_id IS NOT NULL", name=op.f("ck_turns_running_has_worker")),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'awaiting_input', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_turns_status"),
        ),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_turns_session_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.worker_id"], name=op.f("fk_turns_worker_id")),
        sa.PrimaryKeyConstraint("turn_id", name=op.f("pk_turns")),
        sa.UniqueConstraint("session_id", "number", name=op.f("uq_turns_session_id_number")),
    )
    op.create_index("ix_turns_created", "turns", ["created_at"], unique=False)
    op.create_index(
        "ix_turns_deadline",
        "turns",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('running', 'awaiting_input')"),
    )
    op.create_index(
        "ix_turns_queued", "turns", ["queued_at"], unique=False, postgresql_where=sa.text("status = 'queued'")
    )
    op.create_index(
        "ix_turns_unfinished",
        "turns",
        ["session_id", "number"],
        unique=False,
        postgresql_where=sa.text("status NOT IN ('completed', 'failed', 'cancelled')"),
    )
    op.create_index(
        "ix_turns_unwanted",
        "turns",
        ["turn_id"],
        unique=False,
        postgresql_where=sa.text("cancel_requested_at IS NOT NULL AND status IN ('queued', 'awaiting_input')"),
    )
    op.create_index(
        "ix_turns_worker", "turns", ["worker_id"], unique=False, postgresql_where=sa.text("status = 'running'")
    )
    op.create_index("ix_turns_worker_any", "turns", ["worker_id"], unique=False)
    op.create_table(
        "event_segments",
        sa.Column("turn_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("last_fence", sa.Integer(), nullable=False, comment="Of the segment's last event"),
        sa.Column("last_n", sa.BigInteger(), nullable=False),
        sa.Column("events", sa.LargeBinary(), nullable=False, comment="zlib of lines `after id kind data`"),
        sa.ForeignKeyConstraint(
            ["turn_id"], ["turns.turn_id"], name=op.f("fk_event_segments_turn_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("turn_id", "last_fence", "last_n", name=op.f("pk_event_segments")),
    )
    op.create_table(
        "journal",
        sa.Column("turn_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False, comment="Order of the step in the turn, from 0"),
        sa.Column("step_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("step", sa.JSON(), nullable=False, comment="Step of llama-stack 0.3.5, with its times"),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.turn_id"], name=op.f("fk_journal_turn_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("turn_id", "ordinal", name=op.f("pk_journal")),
        sa.UniqueConstraint("turn_id", "step_id", name=op.f("uq_journal_turn_id_step_id")),
    )
    op.create_table(
        "tool_calls",
        sa.Column("turn_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False, comment="Of the inference step that asked"),
        sa.Column("index", sa.Integer(), nullable=False, comment="Of the call in that step's message"),
        sa.Column("fence", sa.Integer(), nullable=False, comment="Of the attempt that made the call last"),
        sa.Column(
            "started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("result", sa.JSON(), nullable=True, comment="ToolResponse; empty while in flight"),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.turn_id"], name=op.f("fk_tool_calls_turn_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("turn_id", "ordinal", "index", name=op.f("pk_tool_calls")),
    )
    op.execute("INSERT INTO registry_version (version) VALUES (0)")


def downgrade() -> None:
    op.drop_table("tool_calls")
    op.drop_table("journal")
    op.drop_table("event_segments")
    op.drop_index("ix_turns_unwanted", table_name="turns")
    op.drop_index("ix_turns_worker_any", table_name="turns")
    op.drop_index("ix_turns_worker", table_name="turns", postgresql_where=sa.text("status = 'running'"))
    op.drop_index(
        "ix_turns_unfinished",
        table_name="turns",
        postgresql_where=sa.text("status NOT IN ('completed', 'failed', 'cancelled')"),
    )
    op.drop_index("ix_turns_queued", table_name="turns", postgresql_where=sa.text("status = 'queued'"))
    op.drop_index(
        "ix_turns_deadline", table_name="turns", postgresql_where=sa.text("status IN ('running', 'awaiting_input')")
    )
    op.drop_index("ix_turns_created", table_name="turns")
    op.drop_table("turns")
    op.drop_index("ix_sessions_deleted", table_name="sessions", postgresql_where=sa.text("deleted_at IS NOT NULL"))
    op.drop_index("ix_sessions_agent", table_name="sessions")
    op.drop_table("sessions")
    op.drop_index("ix_workers_alive", table_name="workers", postgresql_where=sa.text("dead_at IS NULL"))
    op.drop_table("workers")
    op.drop_table("registry_version")
    op.drop_index("ix_agents_owner", table_name="agents", postgresql_where=sa.text("deleted_at IS NULL"))
    op.drop_index("ix_agents_deleted", table_name="agents", postgresql_where=sa.text("deleted_at IS NOT NULL"))
    op.drop_table("agents")
