"""An env.py that imports the application for its metadata, as most do; `app` lies beside `migrations/`.

The project has to bring an `app.py` (or a package) with `metadata`. Each load leaves a line in the file
that ENV_LOADS names, so that a test can count how often env.py was run.
"""

import os

from alembic import context
from app import metadata
from sqlalchemy import engine_from_config, pool

if "ENV_LOADS" in os.environ:
    with open(os.environ["ENV_LOADS"], "a") as loads:
        loads.write("loaded\n")

config = context.config
section = config.get_section(config.config_ini_section, {})

if context.is_offline_mode():
    context.configure(url=section["sqlalchemy.url"], target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    connectable = engine_from_config(section, prefix="sqlalchemy.", poolclass=pool.NullPool)
    with connectable.connect() as connection:
        context.configure(connection=connection, target_metadata=metadata)
        with context.begin_transaction():
            context.run_migrations()
