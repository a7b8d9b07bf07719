"""Applications with a way of their own to migrate: several histories, or a command that prepares the ground."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.histories.projects import History, Installation, run
from tests.support.servers import Database


@dataclass(frozen=True)
class Application:
    """A history, and how its authors have it applied.

    history: what is installed; its `address_variable` is told to migrator as MIGRATOR_URL_VARIABLE.
    command: what its users type, with `{ini}`, `{url}` and `{folder}` put in; `back` likewise, empty where the
    authors have no way back.
    driver: the one that its address names for that command.
    inside: whether it must be run in the folder of its ini (1), or in site-packages (2), for a relative path.
    sections: the ini's, each a history of its own. options: what migrator is told. first: a program that makes what
    must be there first. ground: the text of a bootstrap. files: what the command wants to read; an `alembic.ini` among
    them is the one of a project that ships none. one_way: what migrator says of the next downgrade, which its authors
    do not support.
    """

    history: History
    command: tuple[str, ...]
    back: tuple[str, ...] = ()
    driver: str = "psycopg2"
    inside: int = 0
    destination: str = "head"
    sections: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    first: str = ""
    ground: str = ""
    one_way: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    def working_folder(self, installed: Installation, folder: Path) -> Path:
        """Return where it is to be run, by both."""
        return (folder, installed.ini.parent, installed.site_packages)[self.inside]

    def ini(self, installed: Installation, folder: Path) -> Path:
        """Return the ini that migrator is given."""
        return folder / "alembic.ini" if "alembic.ini" in self.files else installed.ini

    def environment(self, folder: Path) -> dict[str, str]:
        """Return what the application itself wants to be told."""
        home = folder / "home"
        home.mkdir(exist_ok=True)
        name = self.history.home_variable
        return {**self.variables, **({name: str(home)} if name else {})}

    def run(
        self, command: tuple[str, ...], installed: Installation, database: Database, folder: Path
    ) -> None:
        """Run one of its own commands on a database."""
        url = database.url.replace("postgresql:", f"postgresql+{self.driver}:", 1)
        for name, text in self.files.items():
            (folder / name).write_text(text.format(url=url))
        # As users do whose password has a percent sign, which their env.py does not put up with.
        bare = re.sub(r":[^:@/]*@", "@", url)
        env = {**os.environ, **self.environment(folder), "PGPASSWORD": database.server.password}
        if self.history.address_variable:
            env[self.history.address_variable] = bare
        values = {"ini": installed.ini, "url": url, "folder": folder}
        program, *arguments = command
        told = [word.format(**values) if "{" in word and "\n" not in word else word for word in arguments]
        run(str(installed.bin / program), *told, cwd=self.working_folder(installed, folder), env=env)


UPGRADE = ("alembic", "-c", "{ini}", "upgrade", "head")
BACK = ("alembic", "-c", "{ini}", "downgrade", "-1")

EACH_SECTION = """
import sys
from alembic import command
from sky.utils.db import migration_utils
from sqlalchemy import create_engine
for section in sys.argv[2:]:
    command.upgrade(migration_utils.get_alembic_config(create_engine(sys.argv[1]), section), "head")
"""
SECTIONS = ("state_db", "spot_jobs_db", "serve_db", "sky_config_db", "kv_cache_db", "recipes_db")

MLFLOW_BACK = """
import sys
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
command.downgrade(_get_alembic_config(sys.argv[1]), "-1")
"""

FIRST_TABLES = """
import sys
from mlflow.store.tracking.dbmodels.initial_models import Base
from sqlalchemy import create_engine
Base.metadata.create_all(create_engine(sys.argv[1]))
"""

# What `keystone-manage db_sync` does around Alembic.
KEYSTONE = """
import contextlib

@contextlib.contextmanager
def prepare(config):
    import keystone.conf
    from keystone.common import sql
    from keystone.common.sql import upgrades
    from sqlalchemy import create_engine

    keystone.conf.configure()
    sql.initialize()
    keystone.conf.CONF([], project="keystone")
    theirs = upgrades.get_alembic_config()
    config.attributes.update(theirs.attributes)
    config.set_main_option("version_locations", theirs.get_main_option("version_locations"))
    with create_engine(config.get_main_option("sqlalchemy.url")).begin() as connection:
        config.attributes["connection"] = connection
        yield
"""

# What `glance-manage` does around Alembic.
GLANCE = """
import contextlib

@contextlib.contextmanager
def prepare(config):
    from oslo_config import cfg
    from oslo_db import options

    config.attributes["configure_logger"] = False
    options.set_defaults(cfg.CONF, connection=config.get_main_option("sqlalchemy.url"))
    yield
"""

# What `barbican-db-manage` does around Alembic.
BARBICAN = """
import contextlib

@contextlib.contextmanager
def prepare(config):
    config.barbican_sqlalchemy_url = config.get_main_option("sqlalchemy.url")
    yield
"""

PROFILE = """
from aiida.manage.configuration import Profile
from aiida.storage.psql_dos.migrator import PsqlDosMigrator
from sqlalchemy.engine import make_url

def migrator_of(url):
    url = make_url(url)
    storage = {
        "database_hostname": url.host,
        "database_port": url.port,
        "database_username": url.username,
        "database_password": "",
        "database_name": url.database,
        "engine_kwargs": {"connect_args": {"password": url.password}},
    }
    profile = {"storage": {"backend": "core.psql_dos", "config": storage}, "process_control": {}}
    return PsqlDosMigrator(Profile("shop", profile))
"""

# What `verdi storage migrate` does in the end: the labelled branches of older kinds of database stay out.
AIIDA_COMMAND = f"""{PROFILE}
import sys
with migrator_of(sys.argv[1]) as migrator:
    getattr(migrator, sys.argv[2])(sys.argv[3])
"""
AIIDA = f"""{PROFILE}
import contextlib

@contextlib.contextmanager
def prepare(config):
    with migrator_of(config.get_main_option("sqlalchemy.url")) as migrator:
        with migrator._alembic_connect() as theirs:
            config.attributes.update(theirs.attributes)
        yield
"""

# What `prefect server database upgrade` does around Alembic: env.py asks for an event loop in another thread.
PREFECT = """
import contextlib
from pathlib import Path

@contextlib.contextmanager
def prepare(config):
    import prefect.server.database
    from anyio.from_thread import start_blocking_portal
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings
    from prefect.utilities import asyncutils

    here = Path(prefect.server.database.__file__).parent
    config.set_main_option("version_locations", str(here / "_migrations/versions/postgresql"))
    url = config.get_main_option("sqlalchemy.url")
    kept = asyncutils.run_async_from_worker_thread
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}), start_blocking_portal() as portal:
        asyncutils.run_async_from_worker_thread = portal.call
        try:
            yield
        finally:
            asyncutils.run_async_from_worker_thread = kept
"""

APPLICATIONS = (
    Application(
        History(
            "argilla-server",
            "argilla_server/alembic.ini",
            head="580a6553186f",
            revisions=24,
            address_variable="ARGILLA_DATABASE_URL",
            home_variable="ARGILLA_HOME_PATH",
        ),
        UPGRADE,
        BACK,
        driver="asyncpg",
    ),
    Application(
        History(
            "arize-phoenix",
            "phoenix/db/alembic.ini",
            head="4aad9107d196",
            revisions=35,
            address_variable="PHOENIX_SQL_DATABASE_URL",
            home_variable="PHOENIX_WORKING_DIR",
        ),
        UPGRADE,
        BACK,
        inside=1,
        variables={"PHOENIX_SQL_DATABASE_SCHEMA": "traces"},
    ),
    Application(
        History("mlflow", "mlflow/store/db_migrations/alembic.ini", head="dc11669786a5", revisions=67),
        ("mlflow", "db", "upgrade", "{url}"),
        ("python", "-c", MLFLOW_BACK, "{url}"),
        inside=2,
        options=("--baseline", "base"),
        first=FIRST_TABLES,
    ),
    Application(
        History("skypilot", "sky/setup_files/alembic.ini", head="024", revisions=58, home_variable="HOME"),
        ("python", "-c", EACH_SECTION, "{url}", *SECTIONS),
        sections=SECTIONS,
    ),
    Application(
        History(
            "open-webui",
            "open_webui/alembic.ini",
            head="0bd252b206fb",
            revisions=66,
            address_variable="DATABASE_URL",
            home_variable="DATA_DIR",
        ),
        UPGRADE,
        BACK,
        inside=1,
        variables={"WEBUI_SECRET_KEY": "none"},
    ),
    Application(
        History("keystone", "keystone/common/sql/alembic.ini", head="742c857f1dfb", revisions=10),
        ("keystone-manage", "--config-file", "{folder}/keystone.conf", "db_sync"),
        destination="heads",
        ground=KEYSTONE,
        files={"keystone.conf": "[database]\nconnection = {url}\n"},
    ),
    Application(
        History(
            "glance",
            "glance/db/sqlalchemy/alembic_migrations/alembic.ini",
            head="2024_1_contract01",
            revisions=29,
        ),
        ("glance-manage", "--config-file", "{folder}/glance.conf", "db", "sync"),
        destination="heads",
        ground=GLANCE,
        one_way="2024_1_contract01_empty.py has no downgrade()",
        files={"glance.conf": "[database]\nconnection = {url}\n"},
    ),
    Application(
        History("barbican", "barbican/model/migration/alembic.ini", head="8c74e2d7f1ff", revisions=3),
        ("barbican-db-manage", "--dburl", "{url}", "upgrade"),
        ground=BARBICAN,
        one_way="8c74e2d7f1ff_update_secret_consumers_unique_.py has no downgrade()",
    ),
    Application(
        History("aiida-core", "", head="main_0002", revisions=2, home_variable="AIIDA_PATH"),
        ("python", "-c", AIIDA_COMMAND, "{url}", "migrate_up", "main@head"),
        ("python", "-c", AIIDA_COMMAND, "{url}", "migrate_down", "main@-1"),
        destination="main@head",
        ground=AIIDA,
        one_way="main_0001_initial.py cannot be reverted: its downgrade() is `raise NotImplementedError(",
        files={"alembic.ini": "[alembic]\nscript_location = aiida.storage.psql_dos:migrations\n"},
    ),
    Application(
        History(
            "prefect",
            "prefect/server/database/alembic.ini",
            head="d4a7e1c93f52",
            revisions=118,
            address_variable="PREFECT_API_DATABASE_CONNECTION_URL",
            home_variable="PREFECT_HOME",
        ),
        ("prefect", "server", "database", "upgrade", "-y"),
        ("prefect", "server", "database", "downgrade", "-y", "-r", "-1"),
        driver="asyncpg",
        ground=PREFECT,
    ),
)
