"""The glance: a run with nothing to do, found out from the manifest and one query, without Alembic or SQLAlchemy.

It answers only "nothing to do, all is well", and exactly as the pipeline would.  Whatever is unusual (no manifest, or
one of other files; ``-x``; a ledger whose last run was not this history's; a server that is not there yet; a finding)
is left to the pipeline, which starts from the beginning and is correct, only slower.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from migrator import layout, quiet
from migrator.contents import CONTENTS, INVALID_INDEXES, LEDGER
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
    location: Path
    table: VersionTable


class _Found(NamedTuple):
    """The columns of :func:`_question`."""

    tables: int
    size: int
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
        frozen = _frozen(settings, project, destination)
        return _look(settings, frozen, record, interruption) if frozen else None
    except (MigratorError, ConnectFailed, QueryFailed, OSError) as error:
        log.debug("a glance is not enough: %s", error)
        return None
    except Interrupt as error:
        interruption.shield()
        return record.failed(Interrupted(f"Interrupted by {error.name}.", next_step="run it again"))


def _frozen(settings: Settings, project: ProjectOptions, destination: str) -> _Frozen | None:
    """Return the manifest where it says all that is needed, and the configuration is that which was frozen."""
    if settings.backup == "always" or project.x or project.bootstrap or destination not in {"head", "heads"}:
        return None
    folder = Path.cwd()
    found = layout.read(project, folder)
    if found is None or not (found.location / FILE_NAME).is_file():
        return None
    if layout.migrates_several(found.location / "env.py"):
        return None
    try:
        manifest = load(found.location / FILE_NAME)
        different = _moved(manifest, found, project, folder)
    except NoManifest as error:
        different = (str(error),)
    if different:
        _say_different(different)
        return None
    if not manifest.folders or manifest.options.get("sourceless"):
        return None
    if destination == "head" and len(manifest.heads) > 1:
        return None
    schema, _, name = settings.version_table.rpartition(".")
    named = (name, schema) if settings.version_table else manifest.version_table
    return _Frozen(manifest, found.location, VersionTable(*named)) if named else None


def _say_different(different: tuple[str, ...]) -> None:
    more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
    log.warning(
        "manifest.json is not of these files (%s%s), so this run takes longer; run migrator freeze",
        "; ".join(different[:3]),
        more,
    )


def _moved(
    manifest: Manifest, found: layout.Layout, project: ProjectOptions, folder: Path
) -> tuple[str, ...]:
    """Return in what the configuration is another one than that which was frozen."""
    now = found.options({*layout.PLACES, *manifest.options})
    names = [
        name for name in sorted({*now, *manifest.options}) if now.get(name) != manifest.options.get(name)
    ]
    if project.name != manifest.section:
        names.append("the section")
    if manifest.working_folder is not None:
        frozen_in = (found.location.resolve() / manifest.working_folder).resolve()
        if frozen_in != folder.resolve():
            names.append("the working directory")
    return tuple(f"{name} was another" for name in names)


def _look(settings: Settings, frozen: _Frozen, record: Record, interruption: Interruption) -> Outcome | None:
    """Ask the database, once where there is no ``verify.toml``, and meanwhile look whether the files are the same."""
    manifest = frozen.manifest
    different: list[str] = []

    def compare() -> None:
        different.extend(problems(manifest, frozen.location))
        if different:
            _say_different(tuple(different))

    with record.stage("wait") as details:
        limits = (_LONGEST, settings.connect_timeout, settings.wait_timeout or settings.connect_timeout)
        session = connect(
            settings.required_target,
            record.application_name,
            min(limits),
            also=_question(frozen.table, manifest.digest if settings.ledger else ""),
            meanwhile=compare,
        )
        details.update(attempts=1, server_version=session.facts.version)
    with session, interruption.calling(session.cancel):
        found = _Found(*session.also)
        current = tuple(found.rows or ())
        at_head = frozenset(current) == frozenset(manifest.rows_at_head)
        if (
            different
            or not at_head
            or not found.clean
            or session.facts.in_recovery
            or session.facts.read_only
        ):
            return None
        with record.stage("inspect") as details:
            details.update(current=current, pending=[], tables=found.tables, size_bytes=found.size, edited=[])
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
    if not (frozen.location / "verify.toml").exists():
        return None if found.invalid_indexes else False
    from migrator.schema import expectations
    from migrator.schema.catalog import not_valid_constraints
    from migrator.stages.verify import verify

    expected = expectations.read(frozen.location / "verify.toml")
    rows = frozenset(found.rows or ())
    findings = verify(
        session,
        expected=rows,
        actual=rows,
        not_valid_before=not_valid_constraints(session),
        expectations=expected,
    )
    return None if findings else expected is not None


def _question(table: VersionTable, digest: str) -> str:
    """Return the columns, and where they come from, that tell whether there is anything to do.

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
    # The server leaves out what is not asked for.
    columns = f"contents.tables, contents.size, ({rows}), ({invalid}), {last if digest else 'true'}"
    return f"{columns} FROM ({CONTENTS}) AS contents"


def _literal(text: str) -> str:
    """Quote a text for SQL; escape strings (E'') are read the same whatever the server's settings."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
