"""A run with nothing to do, found out without Alembic: the only place that counts what an import costs."""
