"""The up-to-date check: the manifest and one query, without Alembic or SQLAlchemy.

It can only answer "up to date, all is well", and the pipeline would answer the same. Anything unusual
goes to the pipeline, which starts from the beginning and is correct, only slower: no manifest, or a
stale one; a ``-x`` that may choose the version table; a ledger whose last run had another history; a
server that does not answer yet; a finding.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, NamedTuple

from migrator.config.settings import Settings
from migrator.errors import Interrupted, MigratorError
from migrator.outcome import Outcome
from migrator.pipeline.record import Record
from migrator.postgres import search_path
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.queries import IN_USER_SCHEMA, INVALID_INDEXES, LEDGER
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.session import FirstQuery, Session, connect
from migrator.postgres.version_table import VersionTable
from migrator.project import layout
from migrator.project.history_manifest import FILE_NAME, Manifest, NoManifest, load, problems, rows_at
from migrator.runtime.logs import get_logger
from migrator.runtime.signals import Interrupt, Interruption

if TYPE_CHECKING:
    from migrator.project import ProjectOptions

log = get_logger("migrator")

_LONGEST = 1.0
"""Seconds for the connection. The pipeline waits for Postgres anyway, so this may take little of its time."""


class _Frozen(NamedTuple):
    """A manifest, its folder, the version table, and the expected version rows."""

    manifest: Manifest
    location: str
    table: VersionTable
    rows: frozenset[str]


class _Found(NamedTuple):
    """The columns of :func:`_first_query`."""

    rows: list[str] | None
    invalid_indexes: int
    clean: bool | None


def check_up_to_date(
    settings: Settings, project: ProjectOptions, destination: str, run_id: str, interruption: Interruption
) -> Outcome | None:
    """Return the outcome of an upgrade that is up to date; None if only the pipeline can tell."""
    record = Record("upgrade", settings.target, run_id)
    try:
        if settings.backup == "always":
            raise _NotEnough("MIGRATOR_BACKUP=always")
        found = _manifest_there(settings, project)
        return _look(settings, _Files(settings, project, destination, found), record, interruption)
    except (_NotEnough, MigratorError, ConnectFailed, QueryFailed, OSError) as error:
        log.debug("the fast path is not enough: %s", error)
        return None
    except Interrupt as error:
        interruption.block()
        return record.failed(Interrupted(f"Interrupted by {error.name}.", next_step="run it again"))


def why_not(settings: Settings, project: ProjectOptions) -> str:
    """Return why the manifest cannot answer for an up-to-date database; empty if it can."""
    if settings.backup == "always":
        return "MIGRATOR_BACKUP=always makes a backup each time"
    destination = settings.destination or "head"
    try:
        _Files(settings, project, destination, _manifest_there(settings, project)).read()
    except MigratorError as error:
        return error.message
    except (_NotEnough, OSError) as error:
        return str(error)
    return ""


class FrozenHistory(NamedTuple):
    """The manifest's data about a history, for :func:`migrator.postgres.version_table.read_version`."""

    table: VersionTable
    revisions: frozenset[str]
    rows: frozenset[str]
    runs_once: bool
    env_can_run_twice: bool = True

    def version_table(self) -> VersionTable:
        """Return the version table."""
        return self.table

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""
        return self.revisions

    def hints(self) -> frozenset[str]:
        """Return no values of ``-x``: with any, the version table is named with its schema."""
        return frozenset()


def frozen_history(settings: Settings, project: ProjectOptions) -> FrozenHistory | None:
    """Return the manifest's data about the history, without Alembic; None if it is not enough."""
    try:
        files = _Files(settings, project, settings.goal, _manifest_there(settings, project))
        files.read()
    except (_NotEnough, MigratorError, OSError) as error:
        log.debug("the manifest is not enough: %s", error)
        return None
    manifest = files.frozen.manifest
    revisions = frozenset(item.revision for item in manifest.revisions)
    return FrozenHistory(files.frozen.table, revisions, files.frozen.rows, manifest.runs_once)


class _NotEnough(Exception):
    """Something is unusual: only the pipeline can tell whether the database is up to date."""


def _manifest_there(settings: Settings, project: ProjectOptions) -> layout.Layout:
    """Return the configuration of a project with a manifest; raises :class:`_NotEnough` before any query."""
    if project.bootstrap:
        from migrator.project.env.bootstrap import sets_locations

        if sets_locations(project.bootstrap):
            raise _NotEnough(f"{project.bootstrap} may set the folders of the revisions")
    found = layout.read(project, os.getcwd())
    if found is None or not os.path.isfile(os.path.join(found.location, FILE_NAME)):
        raise _NotEnough("there is no manifest")
    if layout.migrates_several(os.path.join(found.location, "env.py")):
        raise _NotEnough("env.py migrates several databases, and each must be checked")
    return found


class _Files:
    """The manifest and its files, read while the connection is made and the server works on the query."""

    frozen: _Frozen
    """The result of :meth:`read`."""

    def __init__(
        self, settings: Settings, project: ProjectOptions, destination: str, found: layout.Layout
    ) -> None:
        self._settings, self._project, self._destination, self._layout = settings, project, destination, found
        self._known = threading.Event()
        self._first_query = FirstQuery()

    def read(self) -> None:
        """Read and compare; raises :class:`_NotEnough` if the manifest is stale or incomplete."""
        try:
            self.frozen = self._read_manifest()
            digest = self.frozen.manifest.digest if self._settings.ledger else ""
            self._first_query = _first_query(self.frozen.table, digest)
        finally:
            self._known.set()
        _refuse(problems(self.frozen.manifest, self.frozen.location))

    def first_query(self) -> FirstQuery:
        """Return the query as soon as the manifest allows it; an empty one if it does not."""
        self._known.wait()
        return self._first_query

    def _read_manifest(self) -> _Frozen:
        location = self._layout.location
        try:
            manifest = load(os.path.join(location, FILE_NAME))
            _refuse(_moved(manifest, self._layout, self._project, os.getcwd()))
        except NoManifest as error:
            _refuse((str(error),))
        if not manifest.folders or manifest.options.get("sourceless"):
            raise _NotEnough(
                "the revisions are in a package or sourceless, so only Alembic can tell which files count"
            )
        rows = rows_at(manifest, self._destination)
        if rows is None:
            raise _NotEnough(f"only Alembic can resolve the revision {self._destination!r}")
        schema, _, name = self._settings.version_table.rpartition(".")
        named = (name, schema) if self._settings.version_table else manifest.version_table
        chosen = self._project.x or self._project.bootstrap
        if named is None or (chosen and not name) or (self._project.x and not schema):
            who = "-x" if self._project.x else self._project.bootstrap or "code in env.py"
            raise _NotEnough(f"{who} may choose the version table: set MIGRATOR_VERSION_TABLE=schema.name")
        if not manifest.runs_once:
            raise _NotEnough("env.py may use several version tables; only running it can tell")
        return _Frozen(manifest, location, VersionTable(*named), rows)


def _refuse(different: tuple[str, ...]) -> None:
    """Report that the manifest is stale, and leave the fast path, if anything differs."""
    if not different:
        return
    _say_different(different)
    raise _NotEnough("the manifest is stale")


def _say_different(different: tuple[str, ...]) -> None:
    more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
    log.warning(
        "manifest.json is stale (%s%s), so this run takes longer; run `migrator freeze`",
        "; ".join(different[:3]),
        more,
    )


def _moved(manifest: Manifest, found: layout.Layout, project: ProjectOptions, folder: str) -> tuple[str, ...]:
    """Return the parts of the configuration that have changed since the freeze."""
    now = found.options({*layout.PLACES, *manifest.options})
    names = [
        name for name in sorted({*now, *manifest.options}) if now.get(name) != manifest.options.get(name)
    ]
    if project.name != manifest.section:
        names.append("the section")
    if manifest.working_folder is not None:
        frozen_in = os.path.join(os.path.realpath(found.location), manifest.working_folder)
        if os.path.realpath(frozen_in) != os.path.realpath(folder):
            names.append("the working directory")
    return tuple(f"{name} changed" for name in names)


def _look(settings: Settings, files: _Files, record: Record, interruption: Interruption) -> Outcome | None:
    """Query the database, once if there is no ``verify.toml``, and compare the files meanwhile."""
    with record.stage("wait") as details:
        limits = (_LONGEST, settings.connect_timeout, settings.wait_timeout or settings.connect_timeout)
        session = connect(
            settings.required_target,
            record.application_name,
            min(limits),
            first_query=files.first_query,
            meanwhile=files.read,
        )
        details.update(attempts=1, server_version=session.facts.version)
    frozen = files.frozen
    manifest = frozen.manifest
    with session, interruption.on_signal(session.cancel):
        found = _Found(*session.first_row)
        current = tuple(found.rows or ())
        if (
            current != tuple(sorted(frozen.rows))
            or not found.clean
            or session.facts.in_recovery
            or session.facts.read_only
        ):
            return None
        with record.stage("inspect") as details:
            details.update(current=current, pending=[], edited=[])
        with record.stage("verify") as details:
            described = _as_expected(session, frozen, found)
            if described is None:
                return None
            details.update(findings=0, expectations=described)
    record.heads, record.before, record.after = manifest.heads, current, current
    record.version_table = frozen.table
    return record.succeeded()


def _as_expected(session: Session, frozen: _Frozen, found: _Found) -> bool | None:
    """Return whether there is a ``verify.toml`` that holds; None if something is wrong."""
    expectations_file = os.path.join(frozen.location, "verify.toml")
    if not os.path.exists(expectations_file):
        return None if found.invalid_indexes else False
    from pathlib import Path

    from migrator.pipeline.stages.verify import verify
    from migrator.schema import expectations
    from migrator.schema.catalog import not_valid_constraints

    expected = expectations.read(Path(expectations_file))
    rows = frozenset(found.rows or ())
    findings = verify(
        session,
        expected=rows,
        actual=rows,
        not_valid_before=not_valid_constraints(session),
        expectations=expected,
    )
    return None if findings else expected is not None


_OPEN = (
    "NOT EXISTS (SELECT FROM pg_database WHERE datname = current_database()"
    " AND starts_with(shobj_description(oid, 'pg_database'), 'migrator: maintenance window '))"
)
"""Whether no killed run has left a maintenance window; see maintenance_window.py."""


def _first_query(table: VersionTable, digest: str) -> FirstQuery:
    """Return the query that tells whether the database is up to date.

    ``digest`` is the digest of the ledger's last run; empty if no ledger is kept. Both tables are read
    by a statement in which no other name depends on the search_path, and only if the names lead to
    nothing else.
    """
    name, rows = quote_literal(table.name), quote_identifier(table.name)
    last = (
        # The ledger of an older migrator has no id: then the outer one is used.
        f"(SELECT (SELECT code OPERATOR(pg_catalog.=) 0 AND digest OPERATOR(pg_catalog.=) {quote_literal(digest)}"  # noqa: S608 - quoted
        " AND pg_catalog.jsonb_extract_path(details, 'version_tables') IS NULL"
        f" FROM ONLY {LEDGER} WHERE version_table OPERATOR(pg_catalog.=) {name}"
        " AND event OPERATOR(pg_catalog.=) 'run' ORDER BY id DESC NULLS FIRST, at DESC, number DESC LIMIT 1)"
        " FROM (SELECT CAST(NULL AS pg_catalog.int8) AS id) AS older)"
        f" AND {_only_its_owner_writes(quote_literal(LEDGER), quote_literal(rows))}"
    )
    read = (
        f"SELECT pg_catalog.set_config('{_READ}', CAST(pg_catalog.json_build_object("  # noqa: S608 - quoted
        f"'rows', coalesce((SELECT pg_catalog.json_agg(v.version_num) FROM ONLY {rows} v), '[]'),"
        f" 'clean', {last if digest else 'true'}) AS pg_catalog.text), true);"
    )
    found = f"current_setting('{_READ}')::json"
    columns = (
        f"(SELECT array_agg(value ORDER BY value) FROM json_array_elements_text({found} -> 'rows'))"  # noqa: S608 - constants only
        f", (SELECT count(*) FROM ({INVALID_INDEXES}) AS invalid), ({found} ->> 'clean')::boolean AND {_OPEN}"
        f"{'' if table.schema else _ALONE.format(name=name)}"
    )
    place = search_path.only_beside(table.name, table.schema, quote_literal)
    lock = f"LOCK TABLE ONLY {rows}{f', ONLY {LEDGER}' if digest else ''} IN ACCESS SHARE MODE;"
    before = (
        # Read again under the lock that keeps it unchanged; from pg_catalog, because this query resolves
        # names of its own.
        f"{place} {lock} {search_path.SET_OUR_PATH} {place} {read} {search_path.SET_OUR_PATH} "
    )
    return FirstQuery(columns, before)


_ALONE = (
    " AND (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relname = {name}"  # noqa: S608 - constants only
    f" AND c.relkind = 'r' AND {IN_USER_SCHEMA}) < 2"
)
"""Whether there is no other table of this name, which ``env.py``'s connection may see instead."""

_READ = "migrator.read"
"""The setting that carries the rows within one message."""


def _only_its_owner_writes(ledger: str, table: str) -> str:
    """The condition for a ledger as migrator creates it; permissions.py judges every other one."""
    text = """
EXISTS (SELECT FROM pg_catalog.pg_class l, pg_catalog.pg_class v WHERE l.oid = {ledger} AND v.oid = {table}
 AND (l.relowner = v.relowner OR l.relowner = (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = session_user))
 AND l.relkind = 'r' AND NOT (l.relhastriggers OR l.relhasrules OR l.relrowsecurity)
 AND NOT EXISTS (SELECT FROM pg_catalog.aclexplode(l.relacl) WHERE grantee <> l.relowner AND privilege_type <> 'SELECT')
 AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = l.oid AND (attacl IS NOT NULL OR atthasdef))
 AND NOT EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhrelid = l.oid))
 AND NOT EXISTS (SELECT FROM pg_catalog.pg_auth_members WHERE roleid = (
  SELECT oid FROM pg_catalog.pg_roles WHERE rolname = 'pg_write_all_data'))"""
    for operator in ("=", "<>"):
        text = text.replace(f" {operator} ", f" OPERATOR(pg_catalog.{operator}) ")
    oid = "CAST(CAST({} AS pg_catalog.regclass) AS pg_catalog.oid)"
    return text.format(ledger=oid.format(ledger), table=oid.format(table))
