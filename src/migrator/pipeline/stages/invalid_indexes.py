"""Indexes of an earlier run: found before apply, and dropped if a revision builds them again.

A killed or failed ``CREATE INDEX CONCURRENTLY`` leaves its index, which Postgres maintains and does not
use. A retry of the revision then fails because the name is taken. With ``IF NOT EXISTS`` it passes, and
the index stays invalid for ever. If a run ends badly after the server has built an index, the index is
valid and its revision does not count as applied.
https://www.postgresql.org/docs/current/sql-createindex.html#SQL-CREATEINDEX-CONCURRENTLY
"""

from __future__ import annotations

import ast
import logging
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from migrator.ledger.unfinished_runs import Built, read_built
from migrator.outcome import Finding, Severity
from migrator.postgres.errors import Refused
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.project import Plan, Revision
from migrator.schema import catalog

log = logging.getLogger("migrator.leftovers")

_SECOND_LOOK = 0.2  # seconds until a build that just ended is seen as valid


def built(session: Session, plan: Plan) -> tuple[catalog.Index, ...]:
    """Return the existing valid indexes that revisions of ``plan`` build concurrently."""
    texts = [_text(revision, plan.kind) for revision in plan.revisions]
    texts = [text for text in texts if re.search("concurrently", text, re.IGNORECASE)]
    words = {word for text in texts for word in re.findall(r"[\w$]+", text)}
    found = catalog.indexes_named(session, words) if words else ()
    return tuple(index for index in found if any(builds(text, index.name) for text in texts))


def left_behind(session: Session, table: VersionTable | None, plan: Plan) -> tuple[Built, ...]:
    """Return the valid indexes that runs with a bad end built for the first revision of ``plan``.

    That revision builds them again. Not included: indexes from before such a run, and indexes that the
    revision itself expects to exist.
    """
    first = replace(plan, revisions=plan.revisions[:1])
    text = "".join(_text(revision, plan.kind) for revision in first.revisions)
    if re.search(r"if_not_exists|IF\s+NOT\s+EXISTS", text, re.IGNORECASE):
        return ()
    here = {index.oid for index in built(session, first)}
    return tuple(item for item in read_built(session, table, first) if item.index.oid in here) if here else ()


def clear_after_death(session: Session, plan: Plan, left: Collection[Built]) -> None:
    """Drop the indexes that :func:`left_behind` found; raises :class:`QueryFailed` if the connection is lost."""
    for item in left:
        log.warning(
            "dropping the index %s: run %s built it and did not finish %s, which builds it again",
            item.index,
            item.run_id,
            plan.revisions[0].revision,
            extra={"stage": "apply", "revision": plan.revisions[0].revision},
        )
        try:
            _drop(session, item.index)
        except Refused as error:
            log.warning("it could not be dropped: %s", error.text)


_IS_STILL = "SELECT count(*) FROM pg_class WHERE oid = to_regclass(%s)::oid AND oid = %s AND relkind = 'i'"


def _drop(session: Session, index: catalog.Index) -> None:
    """Drop an index that still has its name; raises QueryFailed.

    Only its owner can have given that name to another index meanwhile: one of its own.
    """
    quoted = f"{quote_identifier(index.schema)}.{quote_identifier(index.name)}"
    if not session.value(_IS_STILL, (quoted, index.oid)):
        raise Refused("it was renamed or dropped", "42704")
    session.query(f"DROP INDEX CONCURRENTLY IF EXISTS {quoted}")


def clear(
    session: Session, plan: Plan, *, rebuild: bool, allowed: Collection[tuple[str, str]] = ()
) -> tuple[Finding, ...]:
    """Drop the INVALID indexes that ``plan`` builds again, if ``rebuild``; return a finding for each other
    one.

    ``allowed`` are (schema, name) of those that verify.toml allows. Waits for older transactions, as
    ``DROP INDEX CONCURRENTLY`` does; the session can be cancelled. Raises :class:`QueryFailed` if the
    connection is lost.
    """
    found = [index for index in catalog.invalid_indexes(session) if (index.schema, index.name) not in allowed]
    if not found:
        return ()
    time.sleep(_SECOND_LOOK)
    still = {index.oid for index in catalog.invalid_indexes(session)}
    found = [index for index in found if index.oid in still]
    texts = {revision.revision: _text(revision, plan.kind) for revision in plan.revisions}
    return tuple(_each(session, found, texts, rebuild=rebuild))


def _each(
    session: Session, found: list[catalog.Index], texts: dict[str, str], *, rebuild: bool
) -> Iterator[Finding]:
    for index in found:
        builder = next((name for name, text in texts.items() if builds(text, index.name)), "")
        if not rebuild or not builder:
            finding = _finding(index)
            log.warning("%s", finding, extra={"stage": "apply"})
            yield finding
            continue
        log.warning(
            "dropping the INVALID index %s of an earlier run: %s builds it again",
            index,
            builder,
            extra={"stage": "apply", "revision": builder},
        )
        try:
            _drop(session, index)
        except Refused as error:
            yield _finding(index, f"; it could not be dropped: {error.text.rstrip('.')}")


def _finding(index: catalog.Index, more: str = "") -> Finding:
    return Finding(
        rule="invalid-index",
        severity=Severity.WARNING,
        place=str(index),
        sentence=f"the index on {index.schema}.{index.table} was invalid before this run{more}",
        remedy=index.remedy,
    )


def builds(text: str, index: str) -> bool:
    """Tell whether Python or SQL ``text`` builds an index of that name, and does not expect it to exist.

    A name that is put together at run time is not recognised.
    """
    name = rf"(?<![\w$]){re.escape(index)}(?![\w$])"
    if not re.search(name, text) or not re.search(
        r"create_index|CREATE\s+(?:UNIQUE\s+)?INDEX", text, re.IGNORECASE
    ):
        return False
    schema = r'(?:[\w$"]+\.)?"?'
    uses = (
        rf"DROP\s+INDEX\s+(?:CONCURRENTLY\s+)?{schema}{name}",
        rf"REINDEX\s[^;]*{name}",
        rf"ALTER\s+INDEX\s[^;]*{name}",
        rf"USING\s+INDEX\s+{schema}{name}",
        rf"COMMENT\s+ON\s+INDEX\s+{schema}{name}",
    )
    creation = rf"CREATE\s+(?:UNIQUE\s+)?INDEX\s+(?:CONCURRENTLY\s+)?(?:IF\s+NOT\s+EXISTS\s+)?{schema}{name}"
    calls = [
        (call[1], call[0]) for call in re.finditer(r"(create|drop)_index\((?:[^()]|\([^()]*\))*\)", text)
    ]
    drops = any(kind == "drop" and re.search(name, call) and "if_exists" not in call for kind, call in calls)
    creates = re.search(creation, text, re.IGNORECASE) or any(
        kind == "create" and re.search(name, call) for kind, call in calls
    )
    if creates:
        return not (
            drops or re.search(uses[0], text, re.IGNORECASE) or re.search(uses[1], text, re.IGNORECASE)
        )
    return not (drops or any(re.search(use, text, re.IGNORECASE) for use in uses))


def _text(revision: Revision, kind: str) -> str:
    """Return the text of a revision's file without the function for the other direction."""
    try:
        text = Path(revision.path).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return ""
    other = "downgrade" if kind == "upgrade" else "upgrade"
    lines: list[str] = text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == other:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (
                (node.end_lineno or node.lineno) - node.lineno + 1
            )
    return "\n".join(lines)
