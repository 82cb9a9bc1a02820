"""What Alembic runs; `workers.catalog.database` gives it the connection, in a transaction that it commits."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
