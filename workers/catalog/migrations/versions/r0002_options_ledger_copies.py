"""What a run is asked for, the ledger of verifications, and copies; kinds and states become text."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TEXT = sa.String(16)
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add columns and tables. PostgreSQL had types of its own for what is text from now on."""
    with op.batch_alter_table("run") as run:
        run.alter_column("kind", type_=TEXT, existing_nullable=False, postgresql_using="kind::text")
        run.alter_column("state", type_=TEXT, existing_nullable=False, postgresql_using="state::text")
        run.add_column(sa.Column("options", sa.JSON(), nullable=False, server_default="{}"))
        run.add_column(sa.Column("store", sa.String(), nullable=False, server_default="store"))
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP TYPE kind")
        op.execute("DROP TYPE state")
    op.create_table(
        "verification",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("store", sa.String(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.Column("taken", MOMENT, nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.create_index("ix_verification_key", "verification", ["key"])
    op.create_table(
        "copy",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("copied", MOMENT, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
    )
