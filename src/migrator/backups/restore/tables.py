"""Restore single tables into their own schema, beside everything else, in one transaction.

pg_restore writes the table, its rows, and its primary and unique keys as SQL; the names at the head of
those statements are changed on the way to psql. Parts that would reach other objects are excluded:
foreign keys, triggers, policies, defaults from sequences, and identity. An unexpected statement ends
the whole restore.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
import time
from collections.abc import Callable, Sequence

from migrator.backups import clients, pg_restore, psql, session_settings
from migrator.backups.clients import Login, RestoreStopped, failed
from migrator.backups.manifest import Backup, Table
from migrator.backups.restore import in_place
from migrator.backups.restore.in_place import Job, chosen, comparison
from migrator.backups.restore.result import Restored, failing, warn_unproven
from migrator.backups.storage.open import open_store
from migrator.config.database_url import Target
from migrator.config.settings import Settings
from migrator.errors import RestoreFailed, SettingsError, some
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.runtime import subprocesses

LOGGER = logging.getLogger("migrator.restore")

_PART = r'"(?:[^"]|"")*"|[^".]+'
_ENTRY = re.compile(r"\d+; \d+ \d+ (?:TABLE DATA|TABLE|CONSTRAINT) (.*)")
_LEFT_OUT = (
    "Foreign keys, triggers, indexes other than keys, policies, grants and sequences are not restored."
)
_CHANGES = re.compile(rb"(?:ALTER|CREATE|COPY|DROP|INSERT|UPDATE|DELETE|GRANT|REVOKE|COMMENT|TRUNCATE) ")
_HEAD = rb"((?:CREATE (?:UNLOGGED |FOREIGN )?|ALTER (?:FOREIGN )?)TABLE (?:ONLY )?|COPY )"


# Its owner could rename it, and put a view in the place of the table that rows are copied into.
_OURS = """
DO $migrator$ BEGIN
  IF EXISTS (SELECT FROM pg_namespace n, pg_database d, pg_roles o WHERE n.nspname = {name} AND o.oid = n.nspowner
              AND d.datname = current_database() AND NOT o.rolsuper AND o.rolname <> current_user
              AND o.rolname <> 'pg_database_owner' AND o.oid <> d.datdba) THEN
    RAISE EXCEPTION 'schema % belongs to another role', {name};
  END IF;
END $migrator$;
"""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A table: its name in the manifest, and the two parts without quotes."""

    shown: str
    schema: str
    name: str

    def pattern(self, codec: str) -> re.Pattern[bytes]:
        """Return the pattern that finds it at the head of a statement in an encoding, quoted or not."""
        parts = (
            rb"(?:%s|%s)" % tuple(re.escape(_encoded(text, codec)) for text in (part, quote_identifier(part)))
            for part in (self.schema, self.name)
        )
        return re.compile(rb"^" + _HEAD + rb"\.".join(parts) + rb"(?=[ \n(;])")

    @property
    def listed(self) -> str:
        """Return its prefix in an archive's table of contents, where no name is quoted."""
        return re.sub(r"[\n\r]", " ", f"{self.schema} {self.name} ")


def _encoded(name: str, codec: str) -> bytes:
    return name.encode(codec, "surrogateescape")


def _named(shown: str) -> _Name:
    match = re.fullmatch(f"({_PART})\\.({_PART})", shown)
    assert match is not None  # noqa: S101 - as Relation.shown writes it
    schema, name = (part[1:-1].replace('""', '"') if part[0] == '"' else part for part in match.groups())
    return _Name(shown, schema, name)


def _wanted(backup: Backup, names: Sequence[_Name]) -> Callable[[str], bool]:
    """Return whether a line of the archive's table of contents is one of the tables, its rows, or one of its
    keys.

    The owner follows the name there, so "a b" is also the beginning of a table "a" of an owner "b ...".
    Of all the backup's tables, the longest name that fits is the right one.
    """
    known = [_named(shown).listed for shown in backup.tables]
    ours = {name.listed for name in names}

    def wanted(line: str) -> bool:
        match = _ENTRY.match(line)
        fits = [listed for listed in known if match and f"{match[1]} ".startswith(listed)]
        return max(fits, key=len, default="") in ours

    return wanted


def restore_tables(
    target: Target,
    settings: Settings,
    backup_id: str,
    wanted: Sequence[str],
    *,
    schema: str,
    run_id: str,
    application_name: str,
    committed: Callable[[], None] = lambda: None,
) -> Restored:
    """Restore tables of a backup into a schema of the database, which is created if it does not exist.

    Nothing else is touched; if this raises, nothing at all, unless the error says otherwise.
    ``committed`` is called directly after the commit: from then on no signal may report that nothing
    was changed.
    """
    started = time.monotonic()
    store = open_store(settings.backup_url, settings)
    backup = store.get(backup_id, target.database)
    warn_unproven(backup)
    schema = schema or f"restored_{run_id.lower().replace('-', '_')}"
    names = _names(backup, wanted)
    with failing(backup), pg_restore.opened(store, backup, settings) as path:
        job = Job(Login(target, application_name, settings.connect_timeout), settings, backup, path, run_id)
        notes = _restore(job, names, schema, committed)
    counts = [backup.tables[name.shown].rows for name in names]
    counted = [rows for rows in counts if rows is not None]
    restored = Restored(
        backup=backup,
        database=target.database,
        kept="",
        tables=len(names),
        counted=len(counted),
        rows=sum(counted),
        seconds=round(time.monotonic() - started, 3),
        notes=tuple(notes),
        schema=schema,
    )
    LOGGER.info("%s", restored.message)
    return restored


def _names(backup: Backup, wanted: Sequence[str]) -> list[_Name]:
    """Find the requested tables among the backup's; raises RestoreFailed."""
    found = []
    for text in dict.fromkeys(wanted):
        fits = [shown for shown in backup.tables if shown in (text, f"public.{text}")]
        fits = fits or [shown for shown in backup.tables if shown.endswith(f".{text}")]
        if len(fits) != 1:
            near = fits or [shown for shown in backup.tables if _bare(text) in _spellings(shown)]
            which = f"it could be {' or '.join(near)}" if near else "it has " + some(list(backup.tables), 10)
            how = f"name it with its schema and its quotes: --table {shlex.quote(near[0])}" if near else ""
            raise failed(
                backup, f"{backup.id} has no single table {text}: {which}.", how or "name it with its schema"
            )
        found.append(_named(fits[0]))
    if len({item.name for item in found}) < len(found):
        raise failed(
            backup, "Two of the tables have the same name.", "restore them one by one, with --into-schema"
        )
    return found


def _bare(text: str) -> str:
    return text.replace('"', "").casefold()


def _spellings(shown: str) -> tuple[str, str]:
    """Return a table's name without and with its schema, as typed by a user who does not know quotes."""
    name = _named(shown)
    return _bare(name.name), _bare(f"{name.schema}.{name.name}")


def _restore(job: Job, names: Sequence[_Name], schema: str, committed: Callable[[], None]) -> list[str]:
    backup, quoted = job.backup, quote_identifier(schema)
    with job.login.connect() as session:
        session.require_writes()
        major = session.facts.major
        client = clients.for_restore(job.settings, major, backup.client_major)
        script = session_settings.for_script(session, backup, client, job.path)
    try:
        change = _renaming(names, quoted, major, pg_restore.codec_of(client, job.path))
    except UnicodeEncodeError as error:
        raise failed(
            backup,
            f"Schema {schema} cannot be named in {backup.database} with its encoding "
            f"{backup.properties.encoding}.",
            "choose another name with --into-schema",
        ) from error
    expected = {
        f"{quoted}.{quote_identifier(name.name)}": Table(backup.tables[name.shown].rows) for name in names
    }
    first = (
        script.first + f"CREATE SCHEMA IF NOT EXISTS {quoted}; " + _OURS.format(name=quote_literal(schema))
    )
    ended, notes = psql.Ended(), [_LEFT_OUT, *script.notes, *_without_rows(backup, names)]
    try:
        with chosen(client, job.path, _wanted(backup, names)) as listed:
            psql.run(
                client,
                job.login,
                ["--no-owner", "--no-privileges", f"--use-list={listed}", *pg_restore.archive(job.path)],
                first=first,
                last=comparison(expected),
                change=change,
                ended=ended,
            )
            committed()
            notes += _partitioned(job, schema)
    except BaseException as error:
        with subprocesses.uninterrupted(forget=True):
            found = in_place.fate(job, ended)
            if found == "committed":
                committed()
        if found == "aborted" and isinstance(error, RestoreStopped):
            raise _not_restored(job, schema, error) from error
        if found == "aborted":
            raise
        if found != "committed" or not ended.whole or not isinstance(error, in_place.AFTER_THE_COMMIT):
            raise _uncertain(job, schema, found, error) from error
        notes.append(f"The restore was committed before this error: {error}.")
    return notes


def _not_restored(job: Job, schema: str, stopped: RestoreStopped) -> RestoreFailed:
    return failed(
        job.backup,
        f"The tables were not restored into schema {schema}: {stopped.said}",
        f"fix the cause, or restore the whole backup beside: `migrator restore {job.backup.id} --to "
        f"{job.database}_look`",
    )


def _uncertain(job: Job, schema: str, found: str, error: BaseException) -> RestoreFailed:
    """Return the error of a restore with tables that are there, or may be."""
    certain = "are" if found == "committed" else "may be"
    return RestoreFailed(
        f"The restore of tables of {job.backup.id} did not end well: {error}",
        state=f"The tables {certain} in schema {schema}; nothing else was changed.",
        next_step="check the schema; drop those tables before you restore them again",
    )


def _without_rows(backup: Backup, names: Sequence[_Name]) -> list[str]:
    """Return which of the tables are restored empty, because their rows were excluded from the backup."""
    empty = [name.shown for name in names if name.shown in backup.excluded_table_data]
    if not empty:
        return []
    return [f"This backup does not have the rows of {some(empty, 10)} (MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA)."]


def _partitioned(job: Job, schema: str) -> list[str]:
    """Return which of the tables hold no rows themselves."""
    with job.login.connect() as session:
        found = session.query(
            "SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relkind = 'p'",
            [schema],
        )
    return [f"{name} is partitioned: its rows are in its partitions; name these too." for (name,) in found]


def _renaming(names: Sequence[_Name], schema: str, server_major: int, codec: str) -> Callable[[bytes], bytes]:
    """Return the function that replaces the tables' own schema; it raises RestoreStopped for text that
    reaches others.
    """
    known = psql.for_server(server_major)
    places = [
        (name.pattern(codec), _encoded(f"{schema}.{quote_identifier(name.name)}", codec)) for name in names
    ]

    def change(line: bytes) -> bytes:
        line = known(line)
        if line.startswith(b"INHERITS ("):
            raise RestoreStopped("it inherits from another table, and would become a part of it")
        for pattern, place in places:
            changed, count = pattern.subn(lambda match, place=place: match[1] + place, line)  # type: ignore[misc]
            if count:
                return changed
        if _CHANGES.match(line):
            raise RestoreStopped(f"unexpected: {line[:200].decode('utf-8', 'replace')}")
        return line

    return change


def refuse_together(to: str, tables: Sequence[str], into_schema: str, drop_old: bool) -> None:
    """Raise :class:`SettingsError` for conflicting arguments of `restore`."""
    problems = []
    if tables and to:
        problems.append("--table restores into a schema (--into-schema), and --to is for a whole database")
    if into_schema and not tables:
        problems.append("--into-schema is for tables: name them with --table")
    if drop_old and (to or tables):
        problems.append("--drop-old is for a restore that replaces the database")
    if problems:
        raise SettingsError(problems, next_step="migrator restore --help")
