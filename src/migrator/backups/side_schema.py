"""Restore single tables into a schema of their own, beside everything else, in one transaction.

pg_restore writes the table, its rows, and its primary and unique keys as SQL; the names at the head of those
statements are changed on the way to psql.  What would reach other objects stays out: foreign keys, triggers, policies,
defaults from sequences, and identity.  A statement that is none of the expected ones ends it all.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Sequence

from migrator.backups import archive, clients, psql
from migrator.backups.in_place import Job, archive_format, chosen, comparison
from migrator.backups.manifest import Backup, Table
from migrator.backups.restored import Restored, failed, failing, refuse_standby, warn_unproven
from migrator.backups.stores import open_store
from migrator.errors import SettingsError
from migrator.postgres import quote_identifier
from migrator.settings import Settings
from migrator.target import Target

LOGGER = logging.getLogger("migrator.restore")

_PART = r'"(?:[^"]|"")*"|[^".]+'
_ENTRY = re.compile(r"\d+; \d+ \d+ (?:TABLE DATA|TABLE|CONSTRAINT) (.*)")
_LEFT_OUT = "Foreign keys, triggers, indexes other than keys, policies, grants and sequences are left out."
_CHANGES = re.compile(rb"(?:ALTER|CREATE|COPY|DROP|INSERT|UPDATE|DELETE|GRANT|REVOKE|COMMENT|TRUNCATE) ")
_HEAD = rb"((?:CREATE (?:UNLOGGED |FOREIGN )?|ALTER (?:FOREIGN )?)TABLE (?:ONLY )?|COPY )"


@dataclasses.dataclass(frozen=True)
class _Name:
    """A table: as the manifest shows it, and its two parts without quotes."""

    shown: str
    schema: str
    name: str

    def pattern(self) -> re.Pattern[bytes]:
        """Return what finds it at the head of a statement, quoted or not."""
        parts = (
            rb"(?:%s|%s)" % (re.escape(part).encode(), re.escape(quote_identifier(part)).encode())
            for part in (self.schema, self.name)
        )
        return re.compile(rb"^" + _HEAD + rb"\.".join(parts) + rb"(?=[ \n(;])")

    @property
    def listed(self) -> str:
        """Return how an archive's table of contents begins with it, where no name is quoted."""
        return re.sub(r"[\n\r]", " ", f"{self.schema} {self.name} ")


def _named(shown: str) -> _Name:
    match = re.fullmatch(f"({_PART})\\.({_PART})", shown)
    assert match is not None  # noqa: S101 - as Relation.shown makes it
    schema, name = (part[1:-1].replace('""', '"') if part[0] == '"' else part for part in match.groups())
    return _Name(shown, schema, name)


def _wanted(backup: Backup, names: Sequence[_Name]) -> Callable[[str], bool]:
    """Return whether a line of the archive's table of contents is one of the tables, its rows, or one of its keys.

    What follows the name there is the owner, so "a b" is also how a table "a" of an owner "b ..." begins: of all
    the backup's tables it is the longest name that fits.
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
) -> Restored:
    """Restore tables of a backup into a schema of the database, which is made where it is not there.

    Nothing else is touched, and where this raises RestoreFailed, nothing at all.
    """
    started = time.monotonic()
    store = open_store(settings.backup_url, settings)
    backup = store.get(backup_id, target.database)
    warn_unproven(backup)
    schema = schema or f"restored_{run_id.lower().replace('-', '_')}"
    names = _names(backup, wanted)
    with failing(backup), archive.opened(store, backup, settings) as path:
        job = Job(target, settings, backup, path, run_id, application_name)
        notes = _restore(job, names, schema)
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
    """Find what was asked for among the backup's tables; raises RestoreFailed."""
    found = []
    for text in dict.fromkeys(wanted):
        fits = [shown for shown in backup.tables if shown in (text, f"public.{text}")]
        fits = fits or [shown for shown in backup.tables if shown.endswith(f".{text}")]
        if len(fits) != 1:
            which = f"it could be {' or '.join(fits)}" if fits else "it has " + _some(list(backup.tables))
            raise failed(backup, f"{backup.id} has no one table {text}: {which}.", "name it with its schema")
        found.append(_named(fits[0]))
    if len({item.name for item in found}) < len(found):
        raise failed(
            backup, "Two of the tables have the same name.", "restore them one by one, with --into-schema"
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _restore(job: Job, names: Sequence[_Name], schema: str) -> list[str]:
    backup, quoted = job.backup, quote_identifier(schema)
    with job.connect() as session:
        refuse_standby(session)
        major = session.facts.major
    client = clients.for_restore(job.settings, major, backup.client_major)
    expected = {
        f"{quoted}.{quote_identifier(name.name)}": Table(backup.tables[name.shown].rows) for name in names
    }
    first = f"CREATE SCHEMA IF NOT EXISTS {quoted};"
    try:
        with chosen(client, job.path, _wanted(backup, names)) as listed:
            psql.run(
                client,
                clients.connection_argument(job.target, job.target.database),
                clients.environment(job.target, job.application_name, job.settings.connect_timeout),
                [
                    *archive_format(job.path),
                    "--no-owner",
                    "--no-privileges",
                    f"--use-list={listed}",
                    job.path,
                ],
                first=first,
                last=comparison(expected),
                change=_renaming(names, quoted, major),
                ended=psql.Ended(),
            )
    except archive.RestoreStopped as stopped:
        raise failed(
            backup,
            f"The tables were not restored into schema {schema}: {stopped.said}",
            "put right what it says, or restore all of it beside: "
            f"`migrator restore {backup.id} --to {job.target.database}_look`",
        ) from stopped
    with job.connect() as session:
        partitioned = session.query(
            "SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relkind = 'p'",
            [schema],
        )
    empty = [
        f"{name} is partitioned: its rows are in its partitions, to be named too." for (name,) in partitioned
    ]
    return [_LEFT_OUT, *empty]


def _renaming(names: Sequence[_Name], schema: str, server_major: int) -> Callable[[bytes], bytes]:
    """Return what puts the schema in the place of the tables' own; it raises RestoreStopped at what reaches others."""
    known = psql.for_server(server_major)
    places = [(name.pattern(), f"{schema}.{quote_identifier(name.name)}".encode()) for name in names]

    def change(line: bytes) -> bytes:
        line = known(line)
        if line.startswith(b"INHERITS ("):
            raise archive.RestoreStopped("it inherits from another table, and would be a part of that")
        for pattern, place in places:
            changed, count = pattern.subn(lambda match, place=place: match[1] + place, line)  # type: ignore[misc]
            if count:
                return changed
        if _CHANGES.match(line):
            raise archive.RestoreStopped(f"unexpected: {line[:200].decode('utf-8', 'replace')}")
        return line

    return change


def refuse_together(to: str, tables: Sequence[str], into_schema: str, drop_old: bool) -> None:
    """Raise :class:`SettingsError` for arguments of `restore` that do not go together."""
    problems = []
    if tables and to:
        problems.append("--table goes into a schema (--into-schema), and --to is for a whole database")
    if into_schema and not tables:
        problems.append("--into-schema is for tables: name them with --table")
    if drop_old and (to or tables):
        problems.append("--drop-old is for a restore in the place of the database")
    if problems:
        raise SettingsError(problems, next_step="migrator restore --help")
