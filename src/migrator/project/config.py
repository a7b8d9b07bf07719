"""The user's Alembic project: find it, build Alembic's Config, and give the target's address to its
``env.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from migrator.config.database_url import BadAddress, Target, parse
from migrator.errors import HistoryError, SettingsError

if TYPE_CHECKING:
    from argparse import Namespace
    from importlib.metadata import EntryPoint
    from pathlib import Path

    from alembic.config import Config


class ProjectOptions(NamedTuple):
    """Where the Alembic project is: Alembic's own ``-c`` (an ini, a pyproject.toml, or both), ``-n`` and
    ``-x``.

    bootstrap: ``module:callable``, entered before ``env.py``. export: further variables in which
    ``env.py`` looks for the address. told: the address for ``env.py``, if it differs from the target's:
    one of several databases that it migrates.
    """

    config: tuple[str, ...] = ()
    name: str = "alembic"
    x: tuple[str, ...] = ()
    bootstrap: str = ""
    export: tuple[str, ...] = ()
    env_target: Target | None = None


def find_project(options: ProjectOptions, folder: str | Path) -> tuple[str | None, str | None, str | None]:
    """Return (ini, toml, script location) of the project, found as Alembic finds it, else ``migrations/``.

    Raises :class:`SettingsError` if there is none.
    """
    problems = [f"{name}: no such file" for name in options.config if not _is_file(folder, name)]
    if problems:
        raise SettingsError(problems, next_step="name the project's alembic.ini or pyproject.toml with -c")
    tomls = [name for name in options.config if name.endswith(".toml")]
    inis = [name for name in options.config if not name.endswith(".toml")]
    if len(tomls) > 1 or len(inis) > 1:
        raise SettingsError(["-c takes at most one ini file and one pyproject.toml"])
    toml = tomls[0] if tomls else "pyproject.toml"
    ini = inis[0] if inis else "alembic.ini"
    has_ini = _is_file(folder, ini)
    has_toml = _has_alembic_table(os.path.join(folder, toml))
    if tomls and not has_toml and not has_ini:
        raise SettingsError([f"{toml} has no [tool.alembic] table"])
    if has_ini or has_toml:
        return (ini if has_ini else None), (toml if has_toml else None), None
    if _is_file(folder, "migrations/env.py"):
        # Flask-Migrate keeps the ini there too.
        inner = "migrations/alembic.ini"
        return (
            (inner if _has_section(os.path.join(folder, inner), options.name) else None),
            None,
            "migrations",
        )
    raise SettingsError(
        [
            f"no Alembic project in {folder}: it needs alembic.ini, [tool.alembic] in pyproject.toml, "
            "or migrations/"
        ],
        next_step="mount the project at /app, or name its alembic.ini with -c or ALEMBIC_CONFIG",
    )


def _is_file(folder: str | Path, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _has_section(ini: str, name: str) -> bool:
    import configparser

    parser = configparser.RawConfigParser()
    try:
        parser.read(ini, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return False
    return parser.has_section(name)


def _has_alembic_table(place: str) -> bool:
    if not os.path.isfile(place):
        return False
    import tomllib

    try:
        with open(place, encoding="utf-8") as file:
            return "alembic" in tomllib.loads(file.read()).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False


def parse_command(options: ProjectOptions, command: str, revision: str) -> Namespace:
    """Return the parsed options of an Alembic command: an ``env.py`` may read ``config.cmd_opts``."""
    from alembic.config import CommandLine

    return CommandLine(prog="alembic").parser.parse_args(alembic_words(options, command, revision))


def alembic_words(options: ProjectOptions, command: str, revision: str) -> list[str]:
    """Return the arguments of ``alembic`` for a command."""
    return [*(word for value in options.x for word in ("-x", value)), command, revision]


def import_alembic() -> None:
    """Import Alembic; raises :class:`HistoryError` if a plugin of another package breaks the import.

    Since 1.18 Alembic loads each entry point in the group ``alembic.plugins``:
    https://alembic.sqlalchemy.org/en/latest/api/plugins.html
    """
    try:
        import alembic  # noqa: F401 - for its plugins
    except (Exception, SystemExit) as error:
        plugin = _entry_point(error)
        if plugin is None:
            raise
        package = f" of {plugin.dist.name} {plugin.dist.version}" if plugin.dist else ""
        said = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else " ".join(str(error).split())
        raise HistoryError(
            f"Alembic cannot be imported: its plugin {plugin.name} = {plugin.value}{package} raised"
            f" {type(error).__name__}: {said.rstrip('.')}.",
            next_step=f"fix {plugin.dist.name if plugin.dist else plugin.value} in the image, or uninstall it",
        ) from error


def _entry_point(error: BaseException) -> EntryPoint | None:
    """Return the entry point that was being loaded when the error was raised."""
    import traceback
    from importlib.metadata import EntryPoint

    values = (
        value for frame, _ in traceback.walk_tb(error.__traceback__) for value in frame.f_locals.values()
    )
    return next((value for value in values if isinstance(value, EntryPoint)), None)


def make_config(options: ProjectOptions, folder: Path, cmd_opts: Namespace | None = None) -> Config:
    """Make Alembic's Config as its own command line would; raises :class:`SettingsError`."""
    import configparser

    from alembic.config import Config
    from alembic.util import CommandError

    ini, toml, location = find_project(options, folder)
    if cmd_opts is None:
        cmd_opts = parse_command(options, "upgrade", "head")
    # Alembic before 1.16 does not know pyproject.toml and toml_file.
    extra: dict[str, Any] = {"toml_file": toml} if toml else {}
    try:
        config = Config(file_=ini, stdout=sys.stdout, ini_section=options.name, cmd_opts=cmd_opts, **extra)
        found = None if location else config.get_main_option("script_location")
        if not toml and (not found or _is_nowhere(found, folder)):
            location = location or _beside(ini, folder)
        if location:
            config.set_main_option("script_location", location)
            if config.get_main_option("prepend_sys_path") is None:
                config.set_main_option("prepend_sys_path", ".")
            return config
    except TypeError:
        raise SettingsError([f"this Alembic is too old to read {toml}: it needs 1.16 or newer"]) from None
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise SettingsError([f"{ini} cannot be read: {' '.join(str(error).split())}"]) from error
    except CommandError:
        raise SettingsError([f"{ini} has no section [{options.name}]"]) from None
    if not found and not toml:
        raise SettingsError([f"{ini} has no script_location in its section [{options.name}]"])
    return config


def _is_nowhere(location: str, folder: Path) -> bool:
    """Tell whether the ini's location has no ``env.py``: Flask-Migrate uses only the ini's folder."""
    return ":" not in location and not (folder / location / "env.py").is_file()


def _beside(ini: str | None, folder: Path) -> str | None:
    """Return the folder of an ini with its ``env.py`` beside it, as Flask-Migrate arranges them."""
    place = (folder / ini).parent if ini else None
    return str(place) if place and (place / "env.py").is_file() else None


def sibling_tables(config: Config) -> frozenset[str]:
    """Return the version tables of the ini's other sections, each with its own history (``-n``)."""
    parser, own = config.file_config, config.config_ini_section
    tables = {
        name: parser.get(name, "version_table", raw=True, fallback="") for name in {*parser.sections(), own}
    }
    return frozenset(tables.values()) - {"", tables[own]}


def set_address(config: Config, env_file: Path, target: Target | None, export: Sequence[str] = ()) -> None:
    """Give the target's address to the config and to the environment, wherever ``env.py`` may look for it.

    ``export`` names further variables. If an address variable has another address than migrator's (an
    application's role, a pooler), it is corrected within this process, and keeps its driver.
    """
    if target is None:
        return
    target = target.fresh()._replace(source=None)
    if target.driver and not _importable(target.driver):
        target = target._replace(driver="")
    driver = _driver(config, env_file)
    url = target.sqlalchemy_url(driver)
    if (target.driver or driver) == "asyncpg":
        os.environ.update(target.tls_variables())
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    _forgive_percent_signs(config)
    for name in export:
        os.environ[name] = url
    for name in ("DATABASE_URL", "POSTGRES_DB_URL", "SQLALCHEMY_DATABASE_URI"):
        _correct(name, target, url, missing=name == "DATABASE_URL")


def _forgive_percent_signs(config: Config) -> None:
    """Let ``env.py`` pass an address with percent signs to the config unchanged, as most do.

    ConfigParser treats a percent sign as the start of a reference and refuses it. With plain Alembic, a
    password with a special character needs ``url.replace("%", "%%")`` in ``env.py``.
    """
    set_option = config.set_section_option

    def set_or_escape(section: str, name: str, value: str) -> None:
        try:
            set_option(section, name, value)
        except ValueError:
            set_option(section, name, value.replace("%", "%%"))

    config.set_section_option = set_or_escape  # type: ignore[method-assign]


_ASYNC = (
    "async_engine_from_config",
    "create_async_engine",
    "AsyncEngine",
    "sqlalchemy.ext.asyncio",
    ".run_sync(",
)


def _driver(config: Config, env_file: Path) -> str:
    """Choose SQLAlchemy's driver if the target's address names none: the one that the project uses."""
    configured = vars(config).setdefault(
        "url_of_the_file",  # what is there later is what set_address wrote
        config.file_config.get(config.config_ini_section, "sqlalchemy.url", raw=True, fallback=""),
    )
    try:
        driver = parse(configured).driver
    except BadAddress:
        driver = ""
    if driver and _importable(driver):
        return driver
    try:
        text = env_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if any(name in text for name in _ASYNC):
        return next((name for name in ("asyncpg", "psycopg") if _importable(name)), "asyncpg")
    return _sync_driver()


def _sync_driver() -> str:
    """Return no driver, so that an ``env.py`` can use its own, unless SQLAlchemy's default driver is not
    installed.
    """
    from sqlalchemy.dialects.postgresql import dialect  # psycopg2 before SQLAlchemy 2.1, psycopg since

    return "" if _importable(dialect.driver) else "psycopg2"


def _importable(driver: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(driver) is not None


def _correct(name: str, target: Target, url: str, *, missing: bool) -> None:
    """Set an address variable to migrator's address, if it is empty or differs."""
    value = os.environ.get(name, "")
    if not value.strip():
        if missing:
            os.environ[name] = url
        return
    try:
        told = parse(value)
    except BadAddress:
        return
    same = told._replace(driver="", parameters=()) == target._replace(driver="", parameters=())
    if not same or (not told.driver and _sync_driver()):
        os.environ[name] = target._replace(driver=told.driver).sqlalchemy_url(_sync_driver())
