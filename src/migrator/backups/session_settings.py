"""The settings that give values and expressions their meaning: a copy is filled under those of the dump.

pg_dump and pg_restore set what their own texts need (``search_path``, ``xmloption``,
``standard_conforming_strings``). Everything else comes from the database, the role and the server.
Money is read under ``lc_monetary``. Checks, generated columns and views may read any setting. The
manifest has the built-in ones. Settings with a dot in their names belong to the application and can be
secret: they are read from the archive, which has those of the database.

``array_nulls`` must be on while rows are copied: pg_dump always writes NULL in arrays as NULL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from migrator.backups import pg_restore
from migrator.backups.clients import Client, RestoreStopped, failed
from migrator.backups.manifest import Backup
from migrator.backups.pg_restore import NAMES, SCRIPTS_OWN
from migrator.backups.storage import files
from migrator.postgres.errors import Refused
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.session import Session

_NULLS = "array_nulls"
_OWN = """
SELECT DISTINCT split_part(setting, '=', 1) AS name
  FROM pg_db_role_setting s, unnest(setconfig) AS setting
 WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
   AND setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user))
UNION SELECT name FROM pg_settings WHERE source = 'client' ORDER BY name
"""
_TEXT = r"E?'(?:[^'\\]|''|\\\\)*'"
_SET = re.compile(
    rf'^ALTER (?:DATABASE|ROLE (\w+|"(?:[^"]|"")+") IN DATABASE) (?:\w+|"(?:[^"]|"")+") SET "?([^" ]+)"? TO '
    rf"({_TEXT})(?:, {_TEXT})*;\n",
    re.MULTILINE,
)


def read(session: Session) -> dict[str, str]:
    """Return the initial settings of a session of this role in this database."""
    rows = session.query("SELECT name, reset_val FROM pg_settings WHERE name = ANY(%s)", [list(NAMES)])
    return dict(sorted((name, value) for name, value in rows))


def own(session: Session) -> tuple[str, ...]:
    """Return the names of settings for the database, the role or the connection, and not for the server.

    ``*`` stands for those of the application, whose names stay private.
    """
    names = {name.lower(): name for name in NAMES}
    found = (names.get(row[0].lower(), row[0]) for row in session.query(_OWN))
    return tuple(sorted({"*" if "." in name else name for name in found if name in NAMES or "." in name}))


def of_database(client: Client, path: Path, login: str) -> dict[str, str]:
    """Return the application's settings in an archive for its database and a role; raises RestoreStopped."""
    listed = pg_restore.script(client, path, "--create", "--list")
    wanted = [line for line in listed.splitlines() if b" DATABASE PROPERTIES - " in line]
    if not wanted:
        return {}
    with files.in_memory(b"\n".join(wanted) + b"\n") as listing:
        sql = pg_restore.script(client, path, "--create", f"--use-list={listing}")
    found: dict[str, str] = {}
    for role, name, text in _SET.findall(sql.decode("utf-8", "replace")):
        if "." in name and role.strip('"').replace('""', '"') in ("", login):
            value = text.removeprefix("E")[1:-1].replace("''", "'")
            found[name] = value.replace("\\\\", "\\") if text.startswith("E") else value
    return found


NEXT_STEP = "create that locale on the server (`localedef`, or the locales package), or use another server"


@dataclass(frozen=True)
class Filling:
    """The settings of a copy: PGOPTIONS for pg_restore, statements before its indexes and views, refused
    ones.
    """

    options: str = ""
    before_post_data: Callable[[], None] | None = None
    refused: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Warn about settings that the copy lacks."""
        return _notes(self.refused)


def for_copy(
    session: Session, inside: Session, dumped_under: Mapping[str, str], client: Client, path: Path
) -> Filling:
    """Set them for our login in one new database, which no pooler can refuse, and before anybody else
    connects.

    ``session`` is in another database, ``inside`` in the copy. Settings for superusers only go by
    PGOPTIONS. Raises RestoreStopped, and QueryFailed if the connection was lost.
    """
    whom = f"ALTER ROLE SESSION_USER IN DATABASE {quote_identifier(inside.facts.database)} SET"

    def refuses(name: str, value: str) -> bool:
        try:
            with session.as_role("none"):
                session.query(f"{whom} {quote_identifier(name)} TO {quote_literal(value)}")
        except Refused:
            return True
        return False

    there, wanted = read(inside), _known(dumped_under)
    first = [item for item in {**wanted, _NULLS: "on"}.items() if there[item[0]] != item[1]]
    refused = tuple(name for name, value in first if refuses(name, value))
    options = [
        pg_restore.option(name, value)
        for name, value in of_database(client, path, _login(inside)).items()
        if refuses(name, value)
    ]
    nulls, search = (wanted.get(name, there[name]) for name in (_NULLS, "default_text_search_config"))

    def later() -> None:
        refuses(_NULLS, nulls)

    # A text search configuration of the archive is known to sessions that start after its creation.
    apart = nulls != "on" or not search.startswith("pg_catalog.")
    return Filling(" ".join(options), later if apart else None, refused)


def reset(session: Session, database: str) -> None:
    """Undo the settings for our login in a database."""
    with session.as_role("none"):
        session.query(f"ALTER ROLE SESSION_USER IN DATABASE {quote_identifier(database)} RESET ALL")


@dataclass(frozen=True)
class Script:
    """The same for psql: the first statements, array_nulls for views, refused settings."""

    first: str = ""
    nulls: str = "on"
    refused: tuple[str, ...] = ()

    def change(self, line: bytes) -> bytes:
        """Build views and indexes under the dump's array_nulls."""
        if self.nulls == "on" or not re.match(rb"(REFRESH MATERIALIZED VIEW|CREATE (UNIQUE )?INDEX) ", line):
            return line
        return b"SET array_nulls = off;\n" + line + b"SET array_nulls = on;\n"

    @property
    def notes(self) -> list[str]:
        """Warn about settings that the restore lacked."""
        return _notes(self.refused)


def for_script(session: Session, backup: Backup, client: Client, path: Path) -> Script:
    """Find out what psql must set in the database of ``session``; raises RestoreStopped, RestoreFailed and
    QueryFailed.
    """
    there, wanted = read(session), _known(backup.spelling)
    first = {name: value for name, value in {**wanted, _NULLS: "on"}.items() if there[name] != value}
    lines, refused = "", []
    try:
        custom = of_database(client, path, _login(session))
    except RestoreStopped as stopped:
        raise failed(backup, f"{backup.id} cannot be listed: {stopped.said}", "") from stopped
    for name, value in {**first, **custom}.items():
        if name in SCRIPTS_OWN:
            continue
        try:
            session.query("SELECT set_config(%s, %s, true)", [name, value])  # for this statement alone
        except Refused:
            refused.append(name)
        else:
            lines += f"SET {quote_identifier(name)} TO {quote_literal(value)};\n"
    demand(backup, refused, client, path)
    return Script(lines, wanted.get(_NULLS, there[_NULLS]), tuple(refused))


def demand(backup: Backup, refused: Collection[str], client: Client, path: Path) -> None:
    """Raise RestoreFailed if amounts of money would be read as others; raises RestoreStopped too."""
    if refused and (why := misread(backup, refused, pg_restore.script(client, path, "--schema-only"))):
        raise failed(backup, why, NEXT_STEP)


def misread(backup: Backup, refused: Collection[str], schema: bytes) -> str:
    """Return why an archive with this schema cannot be restored here; an empty text if it can."""
    if "lc_monetary" not in refused or not re.search(rb"\bmoney\b", schema):
        return ""
    return (
        f"{backup.id} has money values that were written under lc_monetary = "
        f"{backup.spelling['lc_monetary']}, which the server refuses: it would read other amounts."
    )


def _known(settings: Mapping[str, str]) -> dict[str, str]:
    """Leave out unknown settings: a writer of the store can put anything into a manifest."""
    return {name: settings[name] for name in NAMES if name in settings}


def _login(session: Session) -> str:
    return str(session.value("SELECT session_user::text"))


def _notes(refused: Collection[str]) -> list[str]:
    names = ", ".join(refused)
    return [f"The server refused settings of the dump: {names}."] if names else []
