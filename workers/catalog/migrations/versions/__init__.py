"""The steps, each made by Alembic from the one before it. What was released is never edited."""
