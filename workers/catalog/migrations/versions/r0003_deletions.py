"""Archives whose deletion was begun."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the mark; no archive has it."""
    with op.batch_alter_table("artifact") as artifact:
        artifact.add_column(sa.Column("deleting", sa.Boolean(), nullable=False, server_default=sa.false()))
