"""The schema. `app.store.migrations` makes it; a test proves that the two agree.

JSON is stored as `json`, not `jsonb`: it is never searched inside, and `jsonb` refuses the character U+0000, which
models and clients do send.
"""

from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)

from app.domain.turns import ENDED, TurnStatus

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(statuses: frozenset[TurnStatus]) -> str:
    return ", ".join(f"'{status.value}'" for status in TurnStatus if status in statuses)


UNFINISHED_SQL = f"status NOT IN ({_one_of(ENDED)})"


def seconds(number: Any) -> ColumnElement[Any]:
    """An interval of so many seconds."""
    return func.make_interval(0, 0, 0, 0, 0, 0, number)


_Id = Uuid(as_uuid=False)
UNWANTED_SQL = f"status IN ({_one_of(frozenset({TurnStatus.QUEUED, TurnStatus.AWAITING_INPUT}))})"
_Time = DateTime(timezone=True)

agents = Table(
    "agents",
    metadata,
    Column("agent_id", _Id, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("config", JSON, nullable=False, comment="AgentConfig of llama-stack 0.3.5"),
    Column("created_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("deleted_at", _Time, comment="Asked to be deleted; the row goes once nothing runs there"),
)
Index("ix_agents_owner", agents.c.owner, agents.c.created_at, postgresql_where=agents.c.deleted_at.is_(None))
Index("ix_agents_deleted", agents.c.deleted_at, postgresql_where=agents.c.deleted_at.is_not(None))

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", _Id, primary_key=True),
    Column(
        "agent_id",
        _Id,
        ForeignKey("agents.agent_id", ondelete="CASCADE"),
        comment="None: a conversation, or the place of one response outside any",
    ),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("next_number", Integer, nullable=False, server_default=text("1"), comment="Of the session's next turn"),
    Column("created_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("deleted_at", _Time),
    Column("metadata", JSON, comment="Of a conversation, which is a session that has this"),
)
Index("ix_sessions_agent", sessions.c.agent_id, sessions.c.created_at)
Index("ix_sessions_deleted", sessions.c.deleted_at, postgresql_where=sessions.c.deleted_at.is_not(None))

workers = Table(
    "workers",
    metadata,
    Column("worker_id", _Id, primary_key=True, comment="One incarnation of one worker process"),
    Column("name", Text, nullable=False, comment="hostname:pid"),
    Column("started_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("lease_until", _Time, nullable=False),
    Column("dead_at", _Time, comment="Set once by whoever finds the lease expired; a dead row is never renewed"),
)
Index("ix_workers_alive", workers.c.lease_until, postgresql_where=workers.c.dead_at.is_(None))

turns = Table(
    "turns",
    metadata,
    Column("turn_id", _Id, primary_key=True),
    Column("session_id", _Id, ForeignKey("sessions.session_id", ondelete="CASCADE"), nullable=False),
    Column("owner", Text, nullable=False),
    Column("number", Integer, nullable=False, comment="Order in the session"),
    Column("status", Text, nullable=False),
    Column("request", JSON, nullable=False, comment="messages, documents, toolgroups, tool_config"),
    Column("resolved", JSON, comment="What the turn resolved once: tools, text of its documents"),
    Column("tool_responses", JSON, nullable=False, comment="A client's responses, by ordinal of the asking step"),
    Column(
        "fence", Integer, nullable=False, server_default=text("0"), comment="Raised by every claim, requeue and end"
    ),
    Column("worker_id", _Id, ForeignKey("workers.worker_id"), comment="Owner while running, else the last one"),
    Column("failures", Integer, nullable=False, server_default=text("0"), comment="Workers lost since the last step"),
    Column(
        "tail_lost",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="A dead attempt may have unrecorded events",
    ),
    Column("last_fence", Integer, nullable=False, server_default=text("0"), comment="Fence of the last recorded event"),
    Column("last_n", BigInteger, nullable=False, server_default=text("0"), comment="Number of the last recorded event"),
    Column("cancel_requested_at", _Time),
    Column("error", JSON, comment="code and message, if failed or cancelled"),
    Column("output_message", JSON, comment="CompletionMessage, once awaiting input or completed"),
    Column("created_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("queued_at", _Time, nullable=False, comment="When it last became claimable or was put behind others"),
    Column("rung_at", _Time, comment="When its doorbell was last rung"),
    Column("rings", Integer, nullable=False, server_default=text("0"), comment="Doorbells since it was last queued"),
    Column("claimed_at", _Time),
    Column("started_at", _Time),
    Column("deadline_at", _Time, comment="End of this leg while running, of the wait while awaiting input"),
    Column("completed_at", _Time),
    Column("claimable_at", _Time, comment="A turn suspected of crashing its worker waits until then"),
    Column("request_hash", LargeBinary, comment="SHA-256 of what was asked for: tells a retry from a new turn"),
    Column(
        "event_bytes", BigInteger, nullable=False, server_default=text("0"), comment="Of its attempts' recorded events"
    ),
    Column(
        "kind",
        Text,
        nullable=False,
        server_default=text("'agent'"),
        comment="agent: an agent's turn; response: OpenAI's",
    ),
    Column(
        "previous_turn_id",
        _Id,
        ForeignKey("turns.turn_id", ondelete="SET NULL"),
        comment="previous_response_id of a response",
    ),
    Column(
        "stored",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="False: a response to be shown to nobody",
    ),
    Column("sealed", LargeBinary, comment="Secrets of the request (app.identity.sealing), until the turn ends"),
    UniqueConstraint("session_id", "number"),
    CheckConstraint(f"status IN ({_one_of(frozenset(TurnStatus))})", name="status"),
    CheckConstraint("status <> 'running' OR worker_id IS NOT NULL", name="running_has_worker"),
)
Index("ix_turns_unfinished", turns.c.session_id, turns.c.number, postgresql_where=text(UNFINISHED_SQL))
Index("ix_turns_queued", turns.c.queued_at, postgresql_where=text("status = 'queued'"))
Index("ix_turns_worker", turns.c.worker_id, postgresql_where=text("status = 'running'"))
Index("ix_turns_worker_any", turns.c.worker_id)
Index("ix_turns_deadline", turns.c.deadline_at, postgresql_where=text("status IN ('running', 'awaiting_input')"))
Index(
    "ix_turns_unwanted",
    turns.c.turn_id,
    postgresql_where=text(f"cancel_requested_at IS NOT NULL AND {UNWANTED_SQL}"),
)
Index("ix_turns_created", turns.c.created_at)
Index("ix_turns_previous", turns.c.previous_turn_id, postgresql_where=turns.c.previous_turn_id.is_not(None))
Index("ix_turns_responses", turns.c.owner, turns.c.created_at, postgresql_where=text("kind = 'response'"))
Index("ix_turns_response_hash", turns.c.request_hash, postgresql_where=text("kind = 'response'"))
Index("ix_turns_active", turns.c.owner, postgresql_where=text("status IN ('queued', 'running')"))

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("key", Text, primary_key=True, comment="Idempotency-Key of a request that made or resumed a turn"),
    Column("request_hash", LargeBinary, nullable=False),
    Column(
        "turn_id",
        _Id,
        # The key comes first in its transaction, so that of two requests with the same one the second waits.
        ForeignKey("turns.turn_id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        nullable=False,
    ),
    Column("after_fence", Integer, nullable=False, server_default=text("0"), comment="Event that the leg follows"),
    Column("after_n", BigInteger, nullable=False, server_default=text("0")),
    Column("created_at", _Time, nullable=False, server_default=func.clock_timestamp()),
)
Index("ix_idempotency_keys_created", idempotency_keys.c.created_at)
Index("ix_idempotency_keys_turn", idempotency_keys.c.turn_id)

journal = Table(
    "journal",
    metadata,
    Column("turn_id", _Id, ForeignKey("turns.turn_id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True, comment="Order of the step in the turn, from 0"),
    Column("step_id", _Id, nullable=False),
    Column("step", JSON, nullable=False, comment="Step of llama-stack 0.3.5, with its times"),
    UniqueConstraint("turn_id", "step_id"),
)

tool_calls = Table(
    "tool_calls",
    metadata,
    Column("turn_id", _Id, ForeignKey("turns.turn_id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True, comment="Of the inference step that asked"),
    Column("index", Integer, primary_key=True, comment="Of the call in that step's message"),
    Column("fence", Integer, nullable=False, comment="Of the attempt that made the call last"),
    Column("started_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("result", JSON, comment="ToolResponse; empty while in flight"),
)

event_segments = Table(
    "event_segments",
    metadata,
    Column("turn_id", _Id, ForeignKey("turns.turn_id", ondelete="CASCADE"), primary_key=True),
    Column("last_fence", Integer, primary_key=True, comment="Of the segment's last event"),
    Column("last_n", BigInteger, primary_key=True),
    Column("events", LargeBinary, nullable=False, comment="zlib of lines `after id kind data`"),
)

# Named after the session, because the Llama Stack has a table `conversation_items` in the same database.
session_items = Table(
    "session_items",
    metadata,
    Column("session_id", _Id, ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True),
    Column("position", BigInteger, Identity(), primary_key=True, comment="Order in the conversation, with holes"),
    Column("item_id", Text, nullable=False),
    Column("item", JSON, nullable=False, comment="Input or output item of OpenAI's Responses"),
    Column(
        "result",
        JSON(none_as_null=True),
        comment="Text that a built-in tool gave the model, where the item does not say it",
    ),
    Column("created_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    UniqueConstraint("session_id", "item_id"),
)

session_chunks = Table(
    "session_chunks",
    metadata,
    Column("session_id", _Id, ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True),
    Column("document_id", Text, primary_key=True, comment="The same for a document that is given again"),
    Column("position", Integer, primary_key=True, comment="In the document"),
    Column("content", Text, nullable=False),
    Column("chunk", JSON, nullable=False, comment="Chunk of llama-stack 0.3.5, without its embedding"),
    Column("embedding", ARRAY(REAL), nullable=False, comment="No `vector`: pgvector may come later, or never"),
    Column("embedding_model", Text, nullable=False),
)

session_files = Table(
    "session_files",
    metadata,
    Column("session_id", _Id, ForeignKey("sessions.session_id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True, comment="Path in the folder of the session's code"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="Of the turn that left it so"),
    Column("content", LargeBinary, comment="Empty: the turn removed it"),
)

tool_requests = Table(
    "tool_requests",
    metadata,
    Column("request_id", _Id, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("method", Text, nullable=False, comment="Of llama-stack's tool runtime: invoke_tool, rag_tool.insert, …"),
    Column("arguments", LargeBinary, comment="The method's, as JSON; empty once it has ended"),
    Column("sealed", LargeBinary, comment="Provider data (app.identity.sealing), until it has ended"),
    Column("worker_id", _Id, comment="Who runs it; empty: it waits for a worker"),
    Column("status", Integer, comment="HTTP status of the answer, once it has ended"),
    Column("answer", LargeBinary, comment="What the method gave, or why it failed, as JSON"),
    Column("created_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("ended_at", _Time),
    Column("rung_at", _Time, nullable=False, server_default=func.clock_timestamp()),
    Column("rings", Integer, nullable=False, server_default=text("1")),
)
Index("ix_tool_requests_created", tool_requests.c.created_at)
Index("ix_tool_requests_waiting", tool_requests.c.rung_at, postgresql_where=tool_requests.c.worker_id.is_(None))

registry_version = Table(
    "registry_version",
    metadata,
    Column("id", Boolean, primary_key=True, server_default=text("true")),
    Column("version", BigInteger, nullable=False, server_default=text("0")),
    CheckConstraint("id", name="one_row"),
)
