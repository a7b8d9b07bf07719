"""Run the revisions of this folder: online against a database, offline as SQL text.

`sqlalchemy.url` is all that this file needs, from an ini file or from a `Config` built in Python. There
is no `alembic.ini` here: whoever runs it sets `script_location` and `sqlalchemy.url`.
"""

from logging.config import fileConfig

from alembic import context
from sqlalchemy import create_engine, pool

config = context.config

if config.config_file_name is not None:
    # The default, True, would silence every logger that the calling program has already made.
    fileConfig(config.config_file_name, disable_existing_loggers=False)

# The revisions are written by hand. A project with models puts `Base.metadata` here for --autogenerate.
target_metadata = None

OPTIONS = {
    "target_metadata": target_metadata,
    # One revision, one transaction: a failure keeps what came before it, no lock outlives its revision, and
    # a value that ALTER TYPE ... ADD VALUE brings can be used by the revision after it.
    "transaction_per_migration": True,
    # Without it, a role with a schema of its own name would get its private alembic_version there.
    "version_table_schema": "public",
    # The tables live outside of public, where --autogenerate does not look by itself.
    "include_schemas": True,
}


def run_migrations_offline() -> None:
    """Write the revisions as SQL; no database, no address and no driver are needed."""
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},  # the drivers' own style would double each percent sign
        **OPTIONS,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_migrations_online() -> None:
    """Run the revisions on the database at `sqlalchemy.url`."""
    url = config.get_main_option("sqlalchemy.url")
    if not url:
        raise SystemExit("sqlalchemy.url is not set: give the address of the database to migrate")

    # A process that migrates needs one connection, and must leave none behind.
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, **OPTIONS)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_migrations_offline()
else:
    run_migrations_online()
