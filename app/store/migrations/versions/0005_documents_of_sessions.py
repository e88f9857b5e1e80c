"""Documents of sessions"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "session_chunks",
        sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("document_id", sa.Text(), nullable=False, comment="The same for a document that is given again"),
        sa.Column("position", sa.Integer(), nullable=False, comment="In the document"),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("chunk", sa.JSON(), nullable=False, comment="Chunk of llama-stack 0.3.5, without its embedding"),
        sa.Column(
            "embedding",
            sa.ARRAY(sa.REAL()),
            nullable=False,
            comment="No `vector`: pgvector may come later, or never",
        ),
        sa.Column("embedding_model", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["sessions.session_id"],
            name=op.f("fk_session_chunks_session_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("session_id", "document_id", "position", name=op.f("pk_session_chunks")),
    )


def downgrade() -> None:
    op.drop_table("session_chunks")
