"""Load the project's own code: with the arguments of Alembic's command, and with read-only sessions."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.postgres.errors import chain, sqlstate_of

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger("migrator")

_READ_ONLY = "-c default_transaction_read_only=on"
_READ_ONLY_TRANSACTION = "25006"  # https://www.postgresql.org/docs/current/errcodes-appendix.html


def find_module(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module without importing anything, for its packages may import the application."""
    first, *rest = name.split(".")
    find = importlib.machinery.PathFinder.find_spec
    spec = (
        importlib.util.find_spec(first) if first not in sys.modules else None
    )  # a hook of an editable install
    spec = spec or find(first, [*sys.path, str(Path.cwd())])
    for part in rest:
        spec = find(part, list(spec.submodule_search_locations or ())) if spec else None
    return spec


def find_env(config: Config) -> Path:
    """Return where ``env.py`` will be: Alembic imports the package that a ``script_location`` names; this does not.

    Such a location is ``package:folder:...``; the package may be in a folder of ``prepend_sys_path``.
    """
    # Alembic before 1.16 reads an ini alone.
    read = getattr(config, "get_alembic_option", config.get_main_option)
    location = str(read("script_location") or "")
    if ":" not in location or os.path.isabs(location):
        return Path(location, "env.py")
    package, *folders = location.split(":")
    before = list(sys.path)
    sys.path[:0] = getattr(config, "get_prepend_sys_paths_list", tuple)() or ()  # Alembic 1.16
    try:
        spec = find_module(package)
    finally:
        sys.path[:] = before
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(*places[:1], *folders, "env.py")


@contextlib.contextmanager
def command_line(program: str, words: Sequence[str]) -> Iterator[None]:
    """Set ``sys.argv`` to that of another program: an application may depend on the program that it knows."""
    before = sys.argv
    sys.argv = [os.path.join(os.path.dirname(sys.executable), program), *words]
    try:
        yield
    finally:
        sys.argv = before


def flask_arguments(words: Sequence[str]) -> list[str]:
    """Return the arguments of ``flask`` for the ``words`` of ``alembic``."""
    rest, options = list(words), list[str]()
    while rest[:1] == ["-x"]:
        options += rest[:2]
        del rest[:2]
    command, arguments = rest[:1], rest[1:]
    return ["db", *command, *options, *([] if rest == ["upgrade", "head"] else arguments)]


@contextlib.contextmanager
def reading_only() -> Iterator[None]:
    """Make every session that is opened in the block read-only, if its driver supports it.

    This is set at the start of a session, not by a statement: in a pooler, the setting of a statement
    would stay for the next client.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.pool import Pool

    opened: list[Any] = []

    def connect(*arguments: Any) -> Any:  # of this block alone; blocks can be nested
        return _connect(*arguments)

    def note(_: Any, record: Any) -> None:
        opened.append(record)

    before = os.environ.get("PGOPTIONS")
    os.environ["PGOPTIONS"] = f"{before or ''} {_READ_ONLY}".strip()
    event.listen(Engine, "do_connect", connect)
    event.listen(Pool, "connect", note)
    try:
        yield
    finally:
        event.remove(Pool, "connect", note)
        event.remove(Engine, "do_connect", connect)
        for record in opened:
            record.invalidate(soft=True)  # the application's pool outlives the block
        if before is None:
            del os.environ["PGOPTIONS"]
        else:
            os.environ["PGOPTIONS"] = before


def _connect(dialect: Any, _: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """Connect like SQLAlchemy, with a read-only session; without that if a pooler refuses it."""
    if dialect.name != "postgresql":
        return None
    told = dict(options)
    if dialect.driver == "asyncpg":
        settings = {**(told.get("server_settings") or {}), "default_transaction_read_only": "on"}
        told["server_settings"] = settings
    elif told.get("options"):  # replaces PGOPTIONS
        told["options"] = f"{told['options']} {_READ_ONLY}"
    try:
        return dialect.connect(*arguments, **told)
    except Exception as error:
        if "startup parameter" not in str(error):
            raise
        log.debug("a pooler drops the settings of a session, so this session is not read-only: %s", error)
    with _without_options():
        return dialect.connect(*arguments, **options)


@contextlib.contextmanager
def _without_options() -> Iterator[None]:
    told = os.environ["PGOPTIONS"]
    os.environ["PGOPTIONS"] = told.removesuffix(_READ_ONLY).strip()
    try:
        yield
    finally:
        os.environ["PGOPTIONS"] = told


def remedy(error: BaseException, otherwise: str) -> str:
    """Return the fix for code that failed while it was loaded; ``otherwise`` if it did not try to write."""
    if any(sqlstate_of(item) == _READ_ONLY_TRANSACTION for item in chain(error)):
        return "write nothing while it loads: this command only reads, so its sessions are read-only"
    return otherwise
