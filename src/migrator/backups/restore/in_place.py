"""Restore into the database itself, in one transaction, if the role may not create another one beside it.

The database is emptied first, in the same transaction: ``--clean`` would only drop objects that the
backup has too. A backup of the current state comes before that, because it is the only way to undo the
restore. The result is compared with the manifest before the COMMIT, in the transaction.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from migrator.backups import (
    clients,
    databases,
    event_triggers,
    exported_snapshot,
    pg_restore,
    psql,
    session_settings,
)
from migrator.backups.clients import AS_SUPERUSER, Client, Login, RestoreStopped, WouldLose, failed
from migrator.backups.manifest import Backup, Table
from migrator.backups.restore import extensions, write_detection
from migrator.backups.restore.result import Compared
from migrator.backups.storage import files
from migrator.config.settings import Settings
from migrator.errors import RestoreFailed
from migrator.ledger.table import literal
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.queries import IN_USER_SCHEMA, of_no_extension
from migrator.postgres.session import Session
from migrator.runtime import subprocesses
from migrator.runtime.signals import Interrupt

LOGGER = logging.getLogger("migrator.restore")
_LOCK_TIMEOUT = "15s"
_LOCKED = "due to lock timeout"
_HOLDERS = """
SELECT DISTINCT pid, usename::text, application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
 WHERE locktype = 'relation' AND granted AND relation >= 16384 AND application_name NOT LIKE %s
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1
"""
_PATIENCE = 20.0  # seconds for the server to notice that psql is gone
AFTER_THE_COMMIT = (Interrupt, QueryFailed, ConnectFailed, RestoreStopped)
_SUBSCRIPTION = re.compile(r"\d+; \d+ \d+ SUBSCRIPTION - (.*) \S+$")

_EMPTY = f"""
DO $migrator$
DECLARE statement text;
BEGIN
  -- What is in other schemas goes with them; in public, one by one, for the schema may be another's.
  FOR statement IN
    SELECT format('DROP SCHEMA %I CASCADE', nspname) FROM pg_namespace n
    WHERE {IN_USER_SCHEMA} AND nspname <> 'public' AND NOT ({extensions.STAYS})
    UNION ALL
    SELECT format('DROP %s IF EXISTS %s CASCADE', upper(replace(o.type, ' object', '')), o.identity)
    FROM pg_depend d, pg_identify_object(d.classid, d.objid, 0) o, pg_namespace n
    WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = n.oid AND d.deptype = 'n' AND d.objsubid = 0
      AND (n.nspname = 'public' OR {extensions.STAYS})
      AND {IN_USER_SCHEMA}
      AND o.type IN ('table', 'view', 'materialized view', 'sequence', 'foreign table', 'composite type', 'type',
                     'function', 'procedure', 'aggregate', 'collation', 'conversion', 'operator', 'operator class',
                     'operator family', 'statistics object', 'text search parser', 'text search dictionary',
                     'text search template', 'text search configuration')
      -- Not an extension's, and not what goes with something else, such as the sequence of an identity (a partitioned
      -- table has a dependency on a column of its own).
      AND NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = d.classid AND e.objid = d.objid
                                                AND (e.deptype = 'e' OR (e.deptype = 'i' AND e.refobjid <> e.objid)))
    UNION ALL
    SELECT format('DROP PUBLICATION IF EXISTS %I', pubname) FROM pg_publication
    UNION ALL
    SELECT format('DROP SERVER IF EXISTS %I CASCADE', srvname) FROM pg_foreign_server s
    WHERE {of_no_extension("pg_foreign_server", "s")}
  LOOP
    EXECUTE replace(statement, 'DROP COMPOSITE TYPE', 'DROP TYPE');
  END LOOP;
  PERFORM lo_unlink(oid) FROM pg_largeobject_metadata;
END $migrator$;
"""  # noqa: S608 - a constant

# Otherwise they would apply to new objects; the backup's own are created last.
_NO_DEFAULT_PRIVILEGES = """
DO $migrator$
DECLARE found record; head text; grantees text;
BEGIN
  FOR found IN
    SELECT quote_ident(pg_get_userbyid(defaclrole)) AS owner, quote_ident(nspname) AS schema, defaclacl AS acl,
           CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS'
                              WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' WHEN 'L' THEN 'LARGE OBJECTS' END AS kind
    FROM pg_default_acl LEFT JOIN pg_namespace n ON n.oid = defaclnamespace WHERE pg_has_role(defaclrole, 'USAGE')
  LOOP
    head := 'ALTER DEFAULT PRIVILEGES FOR ROLE ' || found.owner || coalesce(' IN SCHEMA ' || found.schema, '');
    SELECT string_agg(DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END, ', ')
    INTO grantees FROM aclexplode(found.acl);
    IF grantees IS NOT NULL THEN
      EXECUTE format('%s REVOKE ALL ON %s FROM %s', head, found.kind, grantees);
    END IF;
    IF found.schema IS NULL THEN  -- instead of what is built in, and not beside it
      EXECUTE format('%s GRANT ALL ON %s TO %s', head, found.kind, found.owner);
      IF found.kind IN ('FUNCTIONS', 'TYPES') THEN
        EXECUTE format('%s GRANT ALL ON %s TO PUBLIC', head, found.kind);
      END IF;
    END IF;
  END LOOP;
END $migrator$;
"""

_COMPARE = """
DO $compare$
DECLARE expected record; actual bigint; wrong text := '';
BEGIN
  SET LOCAL row_security = off;
  FOR expected IN SELECT * FROM jsonb_to_recordset({tables}) AS t (name text, "rows" bigint) LOOP
    IF to_regclass(expected.name) IS NULL THEN
      wrong := wrong || expected.name || ' is missing; ';
    ELSIF expected.rows IS NOT NULL THEN
      EXECUTE 'SELECT count(*) FROM ONLY ' || expected.name INTO actual;
      IF actual <> expected.rows THEN
        wrong := wrong || format('%s has %s rows and not %s; ', expected.name, actual, expected.rows);
      END IF;
    END IF;
  END LOOP;
  IF wrong <> '' THEN
    RAISE EXCEPTION 'what came back is not what was backed up: %', wrong;
  END IF;
END $compare$;
"""

# First as our role, then as our login, if that acts as another: ALTER ROLE ... SET role.
_END = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
  AND application_name NOT LIKE {ours};
"""
_END_OTHERS = _END + "SET ROLE NONE;" + _END + "RESET ROLE;"

_UNWRITTEN = """
DO $migrator$ BEGIN
  IF txid_current() > {limit} THEN
    RAISE EXCEPTION 'others have written since it was looked: %', txid_current() - {limit};
  END IF;
END $migrator$;
"""


@dataclass(frozen=True)
class Job:
    """The backup, the target database, and the run of a restore."""

    login: Login
    settings: Settings
    backup: Backup
    path: Path
    run_id: str

    @property
    def database(self) -> str:
        return self.login.target.database


def replace(
    job: Job, own: Callable[[], frozenset[int]] | None, committed: Callable[[], None]
) -> tuple[Compared, str, list[str]]:
    """Replace the content of the database with the backup; if this raises, the content is unchanged.

    ``own``: see :class:`RestoreOptions`. ``committed`` is called directly after the commit. Returns the result
    of the comparison, the id of the backup that was made before, and notes on objects that were not
    restored. Raises RestoreFailed, BackupFailed, or WouldLose.
    """
    backup = job.backup
    with job.login.connect() as session:
        session.require_writes()
        major = session.facts.major
        client = clients.for_restore(job.settings, major, backup.client_major)
        try:
            listed = pg_restore.contents(client, job.path)
            script = session_settings.for_script(session, backup, client, job.path)
        except RestoreStopped as stopped:
            raise _stopped(job, stopped) from stopped
        _refuse_what_no_dump_has(job, session)
        event_triggers.refuse(session, backup, listed)
        staying = extensions.look(session, listed)
        safety = _back_up(job, session)
        limit = ""
        if own is not None:
            write_detection.refuse_another_server(session, backup)
            limit = _UNWRITTEN.format(limit=write_detection.refuse_losses(session, backup, own()) + 1)
    ended = psql.Ended()
    notes: list[str] = []
    try:
        notes += [*script.notes, *subscriptions(client, job.path)]
        _run(job, client, major, staying, limit, ended, script)
        committed()
        notes += _notes(job, staying)
    except BaseException as error:
        with subprocesses.uninterrupted(forget=True):
            found = fate(job, ended)
        if found == "aborted":
            if isinstance(error, RestoreStopped):
                raise _stopped(job, error) from error
            raise
        if found != "committed" or not ended.whole or not isinstance(error, AFTER_THE_COMMIT):
            raise _changed(job, safety, found, error) from error
        committed()
        notes.append(f"The restore was committed before this error: {error}. ANALYZE may be missing.")
    counted = [table.rows for table in backup.tables.values() if table.rows is not None]
    return Compared(len(backup.tables), len(counted), sum(counted)), safety, notes


def _refuse_what_no_dump_has(job: Job, session: Session) -> None:
    """Refuse if the database holds objects that neither the backup nor a backup of the current state could
    restore.
    """
    hidden = exported_snapshot.not_dumped(session)
    if hidden:
        raise failed(
            job.backup,
            f"A restore in place would lose objects that role {session.facts.user} cannot back up, "
            f"because it is not a superuser: {', '.join(hidden)}.",
            f"{AS_SUPERUSER}, which keeps the old database beside",
        )


def _run(
    job: Job,
    client: Client,
    major: int,
    staying: extensions.Staying,
    limit: str,
    ended: psql.Ended,
    script: session_settings.Script,
) -> None:
    """Empty the database and restore into it, in one transaction."""
    known = psql.for_server(major)
    first = (
        script.first,
        _END_OTHERS.format(ours=literal(f"%{job.run_id}%")),
        f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'; SET LOCAL search_path = '';",
        _EMPTY + staying.empty + _NO_DEFAULT_PRIVILEGES + limit,
    )
    with chosen(client, job.path, staying.wanted) as listed:
        psql.run(
            client,
            job.login,
            ["--no-subscriptions", f"--use-list={listed}", *pg_restore.archive(job.path)],
            first="\n".join(first),
            last=comparison(job.backup.tables),
            change=lambda line: script.change(known(line)),
            ended=ended,
        )


def fate(job: Job, ended: psql.Ended) -> str:
    """Find out whether the transaction was "committed" or "aborted" ("" if that is not known), and end it."""
    if ended.transaction is None:
        return "" if ended.sent else "aborted"
    number, pid = ended.transaction
    deadline = time.monotonic() + _PATIENCE
    try:
        with job.login.connect() as session:
            while True:
                found = str(session.value("SELECT txid_status(%s)", [number]))
                if found != "in progress":
                    return found
                if time.monotonic() > deadline:
                    return ""
                session.terminate(pid)
                time.sleep(0.05)
    except (QueryFailed, ConnectFailed) as error:
        LOGGER.warning("it is not known whether the restore was committed: %s", error)
        return ""


def _stopped(job: Job, stopped: RestoreStopped) -> Exception:
    """Return the error of a restore with a rolled-back transaction."""
    if "others have written since" in stopped.said:
        return WouldLose("others wrote just before the restore")
    next_step = "fix the cause, and restore again"
    if stopped.of_rights:
        next_step = f"{AS_SUPERUSER}, which keeps the old database beside"
    elif _LOCKED in stopped.said:
        next_step = _end_who_holds(job)
    return failed(
        job.backup,
        f"The restore of {job.backup.id} in place failed: {stopped.said}",
        next_step,
    )


def _end_who_holds(job: Job) -> str:
    """Return how to end the lock holders in the database that the role may not end itself."""
    found: list[str] = []
    with contextlib.suppress(QueryFailed, ConnectFailed), job.login.connect() as session:
        found += databases.prepared(session, session.facts.database)
        found += [
            f"as a superuser: SELECT pg_terminate_backend({pid}), which ends a session of {user} ({name or 'unnamed'})"
            for pid, user, name in session.query(_HOLDERS, [f"%{job.run_id}%"])
        ]
    return "; ".join([*found, "then restore again"])


def _changed(job: Job, safety: str, found: str, error: BaseException) -> RestoreFailed:
    """Return the error of a restore that may have changed the database."""
    certain = "was" if found == "committed" else "may have been"
    return RestoreFailed(
        f"The restore of {job.backup.id} in place did not end well: {error}",
        state=f"The database {certain} changed; its earlier content is in backup {safety}.",
        next_step=f"check the database; `migrator restore {safety} --yes` restores the earlier content, "
        f"`migrator restore {job.backup.id} --yes` tries again",
    )


def _back_up(job: Job, session: Session) -> str:
    """Back up the current state of the database; raises BackupFailed."""
    from migrator.backups.dump.backup import back_up

    made = back_up(
        session,
        job.settings._replace(backup_exclude_table_data=""),  # no other copy has the rows that go
        run_id=job.run_id,
        revisions=(),
        application_name=job.login.application_name,
        name=f"before-restore-{job.run_id}",
    )
    return made.id


@contextlib.contextmanager
def chosen(client: Client, path: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a file that lists the wanted entries of an archive, for ``pg_restore --use-list``."""
    lines = [line for line in pg_restore.contents(client, path) if wanted(line)]
    lines.sort(key=event_triggers.is_one)
    with files.in_memory("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")) as listed:
        yield listed


def subscriptions(client: Client, path: Path) -> list[str]:
    """Return a note about subscriptions in an archive. They are not restored: two databases cannot follow one
    slot.
    """
    listed = pg_restore.contents(client, path)
    found = [match[1] for line in listed if (match := _SUBSCRIPTION.match(line))]
    if not found:
        return []
    return [
        f"Subscriptions are not restored ({', '.join(found)}): create them again after the old database "
        "has dropped its own."
    ]


def comparison(tables: Mapping[str, Table]) -> str:
    """Return the statement that fails if a table (by its name in SQL) is missing, or has other rows."""
    facts = [{"name": name, "rows": table.rows} for name, table in tables.items()]
    # Within another quotation by dollars, which no name may end.
    text = json.dumps(facts, ensure_ascii=False).replace("$", "\\u0024")
    return _COMPARE.format(tables=f"{literal(text)}::jsonb")


def _notes(job: Job, staying: extensions.Staying) -> list[str]:
    """Return notes about the objects that a restore in place leaves unchanged."""
    with job.login.connect() as session:
        session.query("ANALYZE")
        installed = session.value(
            "SELECT string_agg(extname::text, ', ' ORDER BY extname) FROM pg_extension WHERE extname <> 'plpgsql'"
        )
        others = session.value(
            "SELECT string_agg(DISTINCT pg_get_userbyid(defaclrole), ', ') FROM pg_default_acl"
            " WHERE NOT pg_has_role(defaclrole, 'USAGE')"
        )
    notes = [f"Extensions were not changed: {installed}."] if installed else []
    if staying.kept:
        notes.append(
            "Their tables keep their rows, because this role may not replace them: "
            f"{', '.join(staying.kept)}."
        )
    if others:
        notes.append(f"Default privileges of {others}, which belong to others, were not changed.")
    return notes
