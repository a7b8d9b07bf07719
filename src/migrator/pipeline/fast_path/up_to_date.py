"""The glance: a run with nothing to do, found out from the manifest and one query, without Alembic or SQLAlchemy.

It answers only "nothing to do, all is well", and exactly as the pipeline would.  Whatever is unusual (no manifest, or
one of other files; ``-x``; a ledger whose last run was not this history's; a server that is not there yet; a finding)
is left to the pipeline, which starts from the beginning and is correct, only slower.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, NamedTuple

from migrator import layout, quiet
from migrator.contents import INVALID_INDEXES, LEDGER
from migrator.errors import Interrupted, MigratorError
from migrator.interruption import Interrupt, Interruption
from migrator.manifest import FILE_NAME, Manifest, NoManifest, load, problems
from migrator.outcome import Outcome
from migrator.postgres import ConnectFailed, QueryFailed, Session, connect
from migrator.record import Record
from migrator.settings import Settings
from migrator.versions import VersionTable

if TYPE_CHECKING:
    from migrator.history import ProjectOptions

log = quiet.get_logger("migrator")

_LONGEST = 1.0
"""Seconds that are given to connecting: it is to cost the pipeline, which waits, little of its time."""


class _Frozen(NamedTuple):
    """A manifest, its folder, and the version table."""

    manifest: Manifest
    location: str
    table: VersionTable


class _Found(NamedTuple):
    """The columns of :func:`_question`."""

    rows: list[str] | None
    invalid_indexes: int
    clean: bool | None


def glance(
    settings: Settings,
    project: ProjectOptions,
    destination: str,
    run_id: str,
    interruption: Interruption,
) -> Outcome | None:
    """Return the outcome of an upgrade that has nothing to do; None where only the pipeline can tell."""
    record = Record("upgrade", settings.target, run_id)
    try:
        if settings.backup == "always":
            raise _NotEnough("a backup is wanted all the same")
        found = _manifest_there(settings, project, destination)
        return _look(settings, _Files(settings, project, destination, found), record, interruption)
    except (_NotEnough, MigratorError, ConnectFailed, QueryFailed, OSError) as error:
        log.debug("a glance is not enough: %s", error)
        return None
    except Interrupt as error:
        interruption.shield()
        return record.failed(Interrupted(f"Interrupted by {error.name}.", next_step="run it again"))


class FrozenHistory(NamedTuple):
    """What the manifest tells of a history, for :func:`migrator.versions.read_version`."""

    table: VersionTable
    revisions: frozenset[str]
    rows_at_head: frozenset[str]

    def version_table(self) -> VersionTable:
        """Return the version table."""
        return self.table

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""
        return self.revisions

    def hints(self) -> frozenset[str]:
        """Return the values of ``-x``: with any, there is no such history."""
        return frozenset()


def frozen_history(settings: Settings, project: ProjectOptions) -> FrozenHistory | None:
    """Return what the manifest tells of the history, without Alembic; None where only that can tell."""
    try:
        files = _Files(settings, project, "heads", _manifest_there(settings, project, "heads"))
        files.read()
    except (_NotEnough, MigratorError, OSError) as error:
        log.debug("the manifest is not enough: %s", error)
        return None
    manifest = files.frozen.manifest
    revisions = frozenset(item.revision for item in manifest.revisions)
    return FrozenHistory(files.frozen.table, revisions, frozenset(manifest.rows_at_head))


class _NotEnough(Exception):
    """Something is unusual: only the pipeline can tell whether there is anything to do."""


def _manifest_there(settings: Settings, project: ProjectOptions, destination: str) -> layout.Layout:
    """Return the configuration of a project with a manifest; raises :class:`_NotEnough`, before anyone is asked."""
    if project.x or project.bootstrap or destination not in {"head", "heads"}:
        raise _NotEnough("what is asked for takes the history itself")
    found = layout.read(project, os.getcwd())
    if found is None or not os.path.isfile(os.path.join(found.location, FILE_NAME)):
        raise _NotEnough("there is no manifest")
    if layout.migrates_several(os.path.join(found.location, "env.py")):
        raise _NotEnough("each of several databases has to be looked at")
    return found


class _Files:
    """The manifest and the files it lists, read while the server is connected to and then works on the question."""

    frozen: _Frozen
    """What :meth:`read` found."""

    def __init__(
        self, settings: Settings, project: ProjectOptions, destination: str, found: layout.Layout
    ) -> None:
        self._settings, self._project, self._destination, self._layout = settings, project, destination, found
        self._known = threading.Event()
        self._question = ""

    def read(self) -> None:
        """Read and compare; raises :class:`_NotEnough` where the manifest is of other files, or does not say all."""
        try:
            self.frozen = self._read_manifest()
            digest = self.frozen.manifest.digest if self._settings.ledger else ""
            self._question = _question(self.frozen.table, digest)
        finally:
            self._known.set()
        _refuse(problems(self.frozen.manifest, self.frozen.location))

    def question(self) -> str:
        """Return what is to be asked, as soon as the manifest says it; nothing where it does not."""
        self._known.wait()
        return self._question

    def _read_manifest(self) -> _Frozen:
        location = self._layout.location
        try:
            manifest = load(os.path.join(location, FILE_NAME))
            _refuse(_moved(manifest, self._layout, self._project, os.getcwd()))
        except NoManifest as error:
            _refuse((str(error),))
        if not manifest.folders or manifest.options.get("sourceless"):
            raise _NotEnough("only Alembic can tell which files count")
        if self._destination == "head" and len(manifest.heads) > 1:
            raise _NotEnough("there are several heads")
        schema, _, name = self._settings.version_table.rpartition(".")
        named = (name, schema) if self._settings.version_table else manifest.version_table
        if named is None:
            raise _NotEnough("only env.py can tell the version table")
        return _Frozen(manifest, location, VersionTable(*named))


def _refuse(different: tuple[str, ...]) -> None:
    """Say that the manifest is of other files, and go the long way, where anything is different."""
    if not different:
        return
    _say_different(different)
    raise _NotEnough("the manifest is of other files")


def _say_different(different: tuple[str, ...]) -> None:
    more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
    log.warning(
        "manifest.json is not of these files (%s%s), so this run takes longer; run migrator freeze",
        "; ".join(different[:3]),
        more,
    )


def _moved(manifest: Manifest, found: layout.Layout, project: ProjectOptions, folder: str) -> tuple[str, ...]:
    """Return in what the configuration is another one than that which was frozen."""
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
    return tuple(f"{name} was another" for name in names)


def _look(settings: Settings, files: _Files, record: Record, interruption: Interruption) -> Outcome | None:
    """Ask the database, once where there is no ``verify.toml``, and meanwhile look whether the files are the same."""
    with record.stage("wait") as details:
        limits = (_LONGEST, settings.connect_timeout, settings.wait_timeout or settings.connect_timeout)
        session = connect(
            settings.required_target,
            record.application_name,
            min(limits),
            also=files.question,
            meanwhile=files.read,
        )
        details.update(attempts=1, server_version=session.facts.version)
    frozen = files.frozen
    manifest = frozen.manifest
    with session, interruption.calling(session.cancel):
        found = _Found(*session.also)
        current = tuple(found.rows or ())
        at_head = frozenset(current) == frozenset(manifest.rows_at_head)
        if not at_head or not found.clean or session.facts.in_recovery or session.facts.read_only:
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
    """Return whether there is a ``verify.toml`` that holds; None where something is not as it should be."""
    expectations_file = os.path.join(frozen.location, "verify.toml")
    if not os.path.exists(expectations_file):
        return None if found.invalid_indexes else False
    from pathlib import Path

    from migrator.schema import expectations
    from migrator.schema.catalog import not_valid_constraints
    from migrator.stages.verify import verify

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
"""Whether no killed run has left its maintenance window; see window.py."""


def _question(table: VersionTable, digest: str) -> str:
    """Return the columns that tell whether there is anything to do.

    ``digest`` is what the ledger's last run must have ended with; empty where no ledger is kept.
    """
    name, quoted = _literal(table.name), _literal(table.quoted)
    ledger = VersionTable(LEDGER, table.schema).quoted
    last = (
        f"(SELECT code = 0 AND digest = {_literal(digest)} FROM {ledger}"  # noqa: S608 - quoted
        f" WHERE version_table = {name} AND event = 'run' ORDER BY at DESC LIMIT 1)"
        # Without a schema in its name, each might be in another one of the search path.
        f" AND (SELECT count(DISTINCT relnamespace) = 1 FROM pg_class"
        f" WHERE oid IN ({quoted}::regclass, {_literal(ledger)}::regclass))"
    )
    rows = f"SELECT array_agg(version_num::text ORDER BY version_num::text) FROM {table.quoted}"  # noqa: S608 - quoted
    invalid = f"SELECT count(*) FROM ({INVALID_INDEXES}) AS invalid"  # noqa: S608 - constants only
    return f"({rows}), ({invalid}), {last if digest else 'true'} AND {_OPEN}"


def _literal(text: str) -> str:
    """Quote a text for SQL; escape strings (E'') are read the same whatever the server's settings."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
