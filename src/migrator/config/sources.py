"""Where settings come from: their declarations, and their text in flags, environment and file.

:mod:`migrator.config.settings` declares them; ``options`` are its declarations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from migrator.config.database_url import BadAddress, Target, from_environment, parse

if TYPE_CHECKING:
    from pathlib import Path

ADDRESS_VARIABLES = ("MIGRATOR_DATABASE_URL", "DATABASE_URL", "POSTGRES_DB_URL", "SQLALCHEMY_DATABASE_URI")
ADDRESSES = (*ADDRESS_VARIABLES, "MIGRATOR_DIRECT_URL", "MIGRATOR_VERIFY_URL")
PASSWORD_VARIABLES = ("PGPASSWORD", "POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SECRET_VARIABLES = (*ADDRESSES, "AWS_ACCESS_KEY_ID", *PASSWORD_VARIABLES)


class Option(NamedTuple):
    """The declaration of a setting; ``name`` is the field's name, ``default`` its value if it is not set.

    ``help`` is one line. ``flag`` is derived from the name if it is ``""``; None means no flag. ``shown`` is the
    default as people write it.
    """

    default: Any
    read: Callable[[str], Any]
    help: str
    flag: str | None = ""
    variable: str = ""
    secret: bool = False
    shown: str = ""
    name: str = ""


def variable_name(item: Option) -> str:
    return item.variable or f"MIGRATOR_{item.name.upper()}"


def flag_name(item: Option) -> str | None:
    """Return the flag of a setting. A secret has none, because other users can read arguments."""
    return f"--{item.name.replace('_', '-')}" if item.flag == "" else item.flag


def default_text(item: Option) -> str:
    return item.shown or ("" if item.default in ("", None) else str(item.default).lower())


def pick(
    item: Option,
    flags: Mapping[str, str],
    variables: Mapping[str, str],
    file_values: Mapping[str, str],
    file_name: str,
) -> tuple[str, str] | None:
    """Return a setting's text and its origin, or None if it is not set."""
    name = variable_name(item)
    if flags.get(item.name) is not None:
        return str(flags[item.name]), flag_name(item) or name
    if variables.get(name, "").strip():
        return variables[name], name
    if item.name in file_values:
        return file_values[item.name], f"{file_name} [tool.migrator] {item.name}"
    return None


def resolve_files(environment: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """Return the environment with every secret's ``NAME_FILE`` read; if both are set, that is a problem."""
    variables = dict(environment)
    for name in SECRET_VARIABLES:
        place = environment.get(f"{name}_FILE", "")
        if not place:
            continue
        if environment.get(name):
            problems.append(f"both {name} and {name}_FILE are set: keep one")
            continue
        try:
            with open(place, encoding="utf-8") as file:
                variables[name] = file.read().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            problems.append(f"{name}_FILE: cannot read {place}: {reason}")
            continue
        if not variables[name]:
            problems.append(f"{name}_FILE: {place} is empty")
    return variables


def read_file(
    folder: str | Path, options: Iterable[Option], problems: list[str]
) -> tuple[dict[str, str], str]:
    """Return ``[tool.migrator]`` of the folder's pyproject.toml as text values."""
    file_name = "pyproject.toml"
    path = os.path.join(folder, file_name)
    if not os.path.exists(path):
        return {}, file_name
    import tomllib

    try:
        with open(path, encoding="utf-8-sig") as file:
            document: Any = tomllib.loads(file.read())
    except FileNotFoundError:
        return {}, file_name
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(f"{file_name} cannot be read: {error}")
        return {}, file_name
    for key in ("tool", "migrator"):
        document = document.get(key, {})
        if not isinstance(document, dict):
            problems.append(f"{file_name}: {key} is not a table: write [tool.migrator]")
            return {}, file_name
    known = {item.name: item for item in options}
    values: dict[str, str] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in known:
            problems.append(f"{file_name} [tool.migrator]: unknown key {key!r}{did_you_mean(name, known)}")
        elif known[name].secret:
            problems.append(
                f"{file_name} [tool.migrator]: {key} holds a password; set {variable_name(known[name])}"
            )
        elif isinstance(value, (dict, list)):
            problems.append(f"{file_name} [tool.migrator]: {key} is not a single value")
        else:
            values[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return values, file_name


def find_target(variables: Mapping[str, str], sources: dict[str, str], problems: list[str]) -> Target | None:
    """Find the address in the documented order. The direct one wins, because a pooler cannot hold a session
    lock.
    """
    for name in ("MIGRATOR_DIRECT_URL", *ADDRESS_VARIABLES):
        if variables.get(name, "").strip():
            field_name = "direct_url" if name == "MIGRATOR_DIRECT_URL" else "database_url"
            sources[field_name] = sources["target"] = name
            try:
                return _with_password(parse(variables[name]), variables.get("PGPASSWORD", ""))
            except BadAddress as error:
                problems.append(f"{name} is not a database address: {error}")
                return None
    for prefix in ("PG", "POSTGRES_"):
        part = {key: value for key, value in variables.items() if key.startswith(prefix)}
        try:
            target = from_environment(part)
        except BadAddress as error:
            problems.append(f"the address in {prefix}*: {error}")
            return None
        if target is not None:
            sources["target"] = f"{prefix}*"
            return target
    return None


def _with_password(target: Target, password: str) -> Target:
    """Return the target with PGPASSWORD if its address has no password, as libpq does. It may come from a
    file.
    """
    has_one = target.password or "password" in dict(target.parameters)
    return target if has_one else target._replace(password=password)


def unknown_variables(environment: Mapping[str, str], options: Iterable[Option]) -> Iterator[str]:
    """Yield a warning for each ``MIGRATOR_*`` variable that looks like a misspelt setting.

    It is not an error: Kubernetes sets ``MIGRATOR_PORT`` and others for a Service named migrator.
    """
    known = {variable_name(item): item for item in options}
    known |= {f"{name}_FILE": item for name, item in known.items() if item.secret}
    for name in sorted(environment):
        if name.startswith("MIGRATOR_") and name not in known and name not in _OTHER_VARIABLES:
            suggestion = did_you_mean(name, known)
            if suggestion:
                yield f"{name} is not a setting{suggestion}"


_OTHER_VARIABLES = frozenset({"MIGRATOR_IMAGE_VERSION"})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean NAME?`` with the nearest of the ``known``, or nothing if none is near."""
    import difflib

    # A common prefix would make any two of them similar.
    short = {_short(item): item for item in known}
    close = difflib.get_close_matches(_short(name), short, n=1, cutoff=0.7)
    return f"; did you mean {short[close[0]]}?" if close else ""


def _short(name: str) -> str:
    return name.removeprefix("MIGRATOR_").lstrip("-")
