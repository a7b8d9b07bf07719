"""Run the revisions of billing, the second service, on the database at `sqlalchemy.url`, which migrator sets."""

from alembic import context
from sqlalchemy import create_engine, pool


def run_offline():
    """Write the revisions as SQL."""
    context.configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


def run_online():
    """Run the revisions."""
    engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
