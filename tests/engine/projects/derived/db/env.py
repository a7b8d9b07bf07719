"""As `alembic init` writes it, with the application's metadata; the address comes from sqlalchemy.url."""

from alembic import context
from shop.models import Base
from sqlalchemy import engine_from_config, pool

config = context.config


def run_migrations_online() -> None:
    """Run the revisions on the database at `sqlalchemy.url`."""
    section = config.get_section(config.config_ini_section, {})
    connectable = engine_from_config(section, prefix="sqlalchemy.", poolclass=pool.NullPool)
    with connectable.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()


run_migrations_online()
