"""Runs, steps and artifacts, as catalogues without a version have them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KIND = sa.Enum("BACKUP", "RESTORE", "PLAN", name="kind")
STATE = sa.Enum("RUNNING", "COMPLETE", "FAILED", name="state")
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "run",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("kind", KIND, nullable=False),
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("scheduled_at", MOMENT),
        sa.Column("components", sa.JSON(), nullable=False),
        sa.Column("archive", sa.String()),
        sa.Column("state", STATE, nullable=False),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("started", MOMENT, nullable=False),
        sa.Column("finished", MOMENT),
        sa.Column("cause", sa.String()),
        sa.Column("outcome", sa.JSON(), nullable=False),
        sa.UniqueConstraint("job", "scheduled_at"),
    )
    op.create_table(
        "step",
        sa.Column("run_id", sa.String(), sa.ForeignKey("run.id"), primary_key=True),
        sa.Column("phase", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("task", sa.String(), nullable=False),
        sa.Column("args", sa.JSON(), nullable=False),
        sa.Column("queue", sa.String(), nullable=False),
        sa.Column("lease", sa.String(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sent", MOMENT, nullable=False),
        sa.Column("last_seen", MOMENT, nullable=False),
        sa.Column("finished", MOMENT),
        sa.Column("error", sa.String()),
        sa.Column("result", sa.JSON()),
    )
    op.create_index("ix_step_task_id", "step", ["task_id"])
    op.create_table(
        "artifact",
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("job", sa.String(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.create_index("ix_artifact_run_id", "artifact", ["run_id"])
