"""The up-to-date check, without Alembic. Only here the cost of an import counts."""
