"""Files of sessions"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "session_files",
        sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, comment="Path in the folder of the session's code"),
        sa.Column("number", sa.Integer(), nullable=False, comment="Of the turn that left it so"),
        sa.Column("content", sa.LargeBinary(), nullable=True, comment="Empty: the turn removed it"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.session_id"], name=op.f("fk_session_files_session_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("session_id", "name", "number", name=op.f("pk_session_files")),
    )


def downgrade() -> None:
    op.drop_table("session_files")
