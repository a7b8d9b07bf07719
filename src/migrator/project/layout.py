"""Find a project's files from its configuration without Alembic, for the up-to-date check.

It returns the same as Alembic's own Config, or nothing: a project that it cannot read takes the slow
path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from migrator.project.config import ProjectOptions, find_project

if TYPE_CHECKING:
    from pathlib import Path

HERE = "{here}"
"""Stands for the configuration's folder, so that the values do not depend on the project's place."""

PLACES = (
    "script_location",
    "version_locations",
    "path_separator",
    "version_path_separator",
    "recursive_version_locations",
    "sourceless",
)
"""The options that locate the revisions."""


class Layout(NamedTuple):
    """A project's configuration: the values of its section of the ini, and of ``[tool.alembic]`` as a
    fallback.
    """

    location: str
    ini: Mapping[str, str]
    toml: Mapping[str, Any]

    def options(self, names: Iterable[str]) -> dict[str, Any]:
        """Return those of the options that are set."""
        both = {**self.toml, **self.ini}
        return {name: both[name] for name in sorted(names) if name in both}


def read(options: ProjectOptions, folder: str | Path) -> Layout | None:
    """Read the configuration of the project in ``folder``; None if that needs Alembic, or there is none.

    Raises :class:`migrator.errors.SettingsError` like :func:`find_project`.
    """
    ini, toml, location = find_project(options, folder)
    try:
        of_ini = _read_ini(os.path.join(folder, ini), options.name) if ini else {}
        of_toml = _read_toml(os.path.join(folder, toml)) if toml else {}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if location:
        return Layout(os.path.join(folder, location), of_ini, of_toml)
    if ini and not toml and not of_ini.get("script_location"):
        # As Flask-Migrate arranges them.
        return Layout(os.path.dirname(os.path.join(folder, ini)), of_ini, of_toml)
    named = of_ini.get("script_location") or of_toml.get("script_location")
    if not isinstance(named, str) or (not named.startswith((HERE, "/")) and ":" in named):
        return None  # package:folder
    config = ini if "script_location" in of_ini else toml
    here = os.path.dirname(os.path.join(os.getcwd(), folder, config or ""))
    return Layout(os.path.join(folder, named.replace(HERE, here)), of_ini, of_toml)


def migrates_several(env_file: str | Path) -> bool:
    """Tell whether an ``env.py`` names a database for its revisions, as Alembic's multidb template does."""
    try:
        with open(env_file, "rb") as file:
            text = file.read()
    except OSError:
        return False
    return b"engine_name" in text and b"run_migrations(engine_name=" in b"".join(text.split())


def _read_ini(place: str, section: str) -> dict[str, str]:
    import configparser

    parser = configparser.ConfigParser({"here": HERE})
    try:
        with open(place, encoding="locale") as file:
            parser.read_file(file)
        names = parser.options(section)
    except configparser.Error as error:
        raise ValueError(str(error)) from None
    found = {}
    for name in names:
        try:
            found[name] = parser.get(section, name)
        except configparser.InterpolationError:
            continue  # an address with a percent sign; Alembic reports it if it matters
    return found


def _read_toml(place: str) -> dict[str, Any]:
    import tomllib

    with open(place, "rb") as file:
        table = tomllib.load(file)["tool"]["alembic"]
    return {name: _with_here(value) for name, value in table.items()}


def _with_here(value: Any) -> Any:
    if isinstance(value, str):
        return value % {"here": HERE}
    if isinstance(value, list):
        return [_with_here(item) for item in value]
    return value
