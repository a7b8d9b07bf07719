"""Verify that the database is in the target state.

First the catalog: the target revision, no invalid index, no constraint that this run left NOT VALID.
Then the expectations of ``verify.toml``. Findings are returned, not raised: the pipeline decides.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from migrator.outcome import Finding, Severity
from migrator.postgres.errors import QueryFailed, Refused
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session
from migrator.schema import catalog, foreign_code
from migrator.schema.expectations import Assertion, Expectations, ExpectedColumn, ExpectedTable, Scalar
from migrator.schema.names import ForeignKey

_SECOND_LOOK = 0.2  # seconds


def verify(
    session: Session,
    *,
    expected: frozenset[str],
    actual: frozenset[str],
    not_valid_before: frozenset[str],
    expectations: Expectations | None,
    database_timeout: float = 60.0,
    trusting: bool = False,
) -> tuple[Finding, ...]:
    """Return the findings; none if all is well.

    ``expected`` and ``actual`` are revisions. ``not_valid_before`` is the result of
    :func:`migrator.schema.catalog.not_valid_constraints` before the run. ``database_timeout`` bounds
    each assertion, in seconds. ``trusting`` lets a superuser's assertion run code of other roles.
    Raises :class:`migrator.postgres.session.QueryFailed` if the catalog cannot be read or the
    connection is lost.
    """
    expectations = expectations or Expectations()
    findings = [
        *not_at_target(expected, actual),
        *_invalid_indexes(session, expectations),
        *_constraints(session, expectations, not_valid_before),
    ]
    findings.extend(_tables(session, expectations, frozenset(finding.place for finding in findings)))
    for assertion in expectations.assertions:
        findings.extend(_assertion(session, assertion, database_timeout, trusting))
    return tuple(findings)


def _error(rule: str, place: object, sentence: str, remedy: str = "") -> Finding:
    return Finding(rule, Severity.ERROR, str(place), sentence, remedy)


def _quoted(*names: str) -> str:
    return ".".join(quote_identifier(name) for name in names)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(quote_identifier(name) for name in names)


def not_at_target(
    expected: frozenset[str], actual: frozenset[str], place: str = "alembic_version"
) -> Iterator[Finding]:
    """Return a finding if the version rows are not the expected ones."""
    if expected == actual:
        return
    there = " and ".join(sorted(actual)) or "no revision"
    target = " and ".join(sorted(expected)) or "base, before every revision"
    remedy = "`migrator status` shows the pending revisions; `migrator upgrade` applies them"
    yield _error("not-at-target", place, f"the database is at {there}, not at {target}", remedy)


def _invalid_indexes(session: Session, expectations: Expectations) -> Iterator[Finding]:
    """Report indexes that are invalid at two looks: a build may end between a catalog's snapshot and the list
    of locks.
    """

    def look() -> tuple[catalog.Index, ...]:
        found = catalog.invalid_indexes(session)
        allowed = expectations.allowed_invalid_indexes
        return tuple(index for index in found if (index.schema, index.name) not in allowed)

    first = look()
    if not first:
        return
    time.sleep(_SECOND_LOOK)
    still = {index.oid for index in look()}
    for index in first:
        if index.oid in still:
            yield _error(
                "invalid-index",
                index,
                f"the index on {index.schema}.{index.table} is invalid: Postgres maintains it and does not use it",
                index.remedy,
            )


def _constraints(session: Session, expectations: Expectations, before: frozenset[str]) -> Iterator[Finding]:
    for constraint in catalog.constraints_not_valid(session):
        if str(constraint) in before or expectations.allows_not_valid(
            constraint.schema, constraint.owner, constraint.name
        ):
            continue
        yield _error(
            "constraint-not-valid",
            constraint,
            "the constraint is NOT VALID: existing rows were never checked",
            f"ALTER {constraint.kind} {_quoted(constraint.schema, constraint.owner)}"
            f" VALIDATE CONSTRAINT {_quoted(constraint.name)};",
        )


def _tables(session: Session, expectations: Expectations, reported: frozenset[str]) -> Iterator[Finding]:
    wanted = [(table.schema, table.name) for table in expectations.tables]
    if not wanted:
        return
    found = catalog.describe(session, wanted)
    missing = [table for table in expectations.tables if (table.schema, table.name) not in found]
    names = catalog.user_tables(session) if missing else ()
    for table in expectations.tables:
        actual = found.get((table.schema, table.name))
        if actual is None:
            yield _error(
                "missing-table", table, f"the table does not exist{_similar(str(table), names)}", _REMEDY
            )
            continue
        for column in table.columns:
            yield from _column(table, column, actual)
        yield from _indexes(table, actual, reported)
        yield from _foreign_keys(table, actual)
        yield from _primary_key(table, actual)


_REMEDY = "add a revision for it, or fix verify.toml"


def _similar(name: str, names: tuple[str, ...] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; there is {close[0]}" if close else ""


def _column(table: ExpectedTable, column: ExpectedColumn, actual: catalog.Table) -> Iterator[Finding]:
    place = f"{table}.{column.name}"
    alter = f"ALTER TABLE {_quoted(table.schema, table.name)}"
    there = actual.columns.get(column.name)
    if there is None:
        add = f"{alter} ADD COLUMN {_quoted(column.name)} {column.written};"
        sentence = f"the column does not exist{_similar(column.name, actual.columns)}"
        yield _error("missing-column", place, sentence, f"{_REMEDY}: {add}")
        return
    alter += f" ALTER COLUMN {_quoted(column.name)}"
    if column.type not in there.spellings:
        yield _error(
            "wrong-type",
            place,
            f"the type is {there.type}, not {column.type}",
            f"{_REMEDY}: {alter} TYPE {column.type};",
        )
    if column.not_null != there.not_null:
        sentence = "the column can be null" if column.not_null else "the column is NOT NULL and should not be"
        verb = "SET" if column.not_null else "DROP"
        yield _error("wrong-nullability", place, sentence, f"{_REMEDY}: {alter} {verb} NOT NULL;")


def _indexes(table: ExpectedTable, actual: catalog.Table, reported: frozenset[str]) -> Iterator[Finding]:
    for name in table.indexes:
        place = f"{table.schema}.{name}"
        valid = actual.indexes.get(name)
        if valid is None:
            sentence = f"the index on {table} does not exist{_similar(name, actual.indexes)}"
            yield _error("missing-index", place, sentence, _REMEDY)
        elif not valid and place not in reported:
            sentence = f"the index on {table} is there, but invalid: no query uses it"
            remedy = f"REINDEX INDEX CONCURRENTLY {_quoted(table.schema, name)};"
            yield _error("missing-index", place, sentence, remedy)


def _foreign_keys(table: ExpectedTable, actual: catalog.Table) -> Iterator[Finding]:
    for key in table.foreign_keys:
        if any(key.same_as(other) for other in actual.foreign_keys):
            continue
        others = [str(other) for other in actual.foreign_keys if set(other.columns) == set(key.columns)]
        instead = f"; there is {others[0]}" if others else ""
        yield _error(
            "missing-foreign-key",
            table,
            f"there is no foreign key {key}{instead}",
            f"{_REMEDY}: {_add_foreign_key(table, key)}",
        )


def _add_foreign_key(table: ExpectedTable, key: ForeignKey) -> str:
    """Return the SQL that adds the key and checks its rows without blocking writers."""
    alter = f"ALTER TABLE {_quoted(table.schema, table.name)}"
    name = _quoted(f"{table.name}_{'_'.join(key.columns)}_fkey")
    return (
        f"{alter} ADD CONSTRAINT {name} FOREIGN KEY ({_listed(key.columns)})"
        f" REFERENCES {_quoted(key.schema, key.table)} ({_listed(key.references)}) NOT VALID;"
        f" {alter} VALIDATE CONSTRAINT {name};"
    )


def _primary_key(table: ExpectedTable, actual: catalog.Table) -> Iterator[Finding]:
    if table.primary_key is None or table.primary_key == actual.primary_key:
        return
    there = f"is ({', '.join(actual.primary_key)})" if actual.primary_key else "does not exist"
    yield _error(
        "wrong-primary-key", table, f"the primary key {there}, not ({', '.join(table.primary_key)})", _REMEDY
    )


# The text of an assertion travels as the value of a setting and is opened as a cursor. A cursor takes one
# query only: "COMMIT; DELETE FROM t" cannot leave the read-only transaction, as it would through DECLARE
# CURSOR FOR. Checks of tables are not evaluated during planning if constraint_exclusion is off.
_BEGIN = (
    "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; SELECT set_config('statement_timeout', %s, true),"
    " set_config('migrator.assertion', %s, true), set_config('constraint_exclusion', 'off', true)"
)
_FETCH = (
    "DO $migrator$ DECLARE answer pg_catalog.refcursor := 'migrator_assertion'; BEGIN"
    " OPEN answer FOR EXECUTE pg_catalog.current_setting('migrator.assertion'); END $migrator$ LANGUAGE plpgsql;"
    " FETCH 1 FROM migrator_assertion"
)


# A table could become a view meanwhile, so no view is read. This is safe with any search_path: it runs in
# the user's.
_TABLES_ONLY = (
    "SELECT CASE WHEN pg_catalog.current_setting('restrict_nonsystem_relation_kind', true) IS NOT NULL THEN"
    " pg_catalog.set_config('restrict_nonsystem_relation_kind', 'view, foreign-table', true) END; "
)


class _CodeOfOthers(Exception):
    """A superuser's assertion would run code of other roles."""


def _assertion(session: Session, assertion: Assertion, timeout: float, trusting: bool) -> Iterator[Finding]:
    place = f"assertion {assertion.name!r}"
    try:
        rows = _ask(session, assertion.sql, timeout, trusting)
    except _CodeOfOthers as found:
        sentence = (
            f"it was not run: {session.facts.user} is a superuser, and it would run code of others: {found}"
        )
        yield _error("assertion-refused", place, sentence, _REFUSED)
        return
    except Refused as error:
        yield _error("assertion-error", place, *_explain(error, timeout))
        return
    except (ValueError, ArithmeticError) as error:
        # Postgres holds values that Python cannot: a date after the year 9999, a character outside of the
        # database's encoding.
        sentence = f"its query or its result cannot be transferred: {error}"
        yield _error("assertion-error", place, sentence, "cast the first column to text")
        return
    if not rows or not rows[0]:
        yield _error("assertion-failed", place, "it returned no row", "fix the data, or the assertion")
    elif not same(assertion.expect, rows[0][0]):
        yield _error(
            "assertion-failed",
            place,
            f"it returned {_shown(rows[0][0])}, not {_shown(assertion.expect)}",
            f"fix the data, or the assertion: {' '.join(assertion.sql.split())}",
        )


_REFUSED = (
    "migrate as a role that is not a superuser; or set MIGRATOR_VERIFY_AS_SUPERUSER=true if you trust "
    "these roles; or read tables without expression indexes"
)


def _ask(session: Session, sql: str, timeout: float, trusting: bool) -> list[tuple[Any, ...]]:
    """Run one query in a read-only transaction that is rolled back; return its first row."""
    try:
        session.query(_BEGIN, (f"{max(1, math.ceil(timeout * 1000))}ms", sql))
        code = [] if trusting else foreign_code.code_in(session, sql)
        if code:
            raise _CodeOfOthers(", ".join(code[:5]))
        first = "" if trusting or foreign_code.names_views(session, sql) else _TABLES_ONLY
        with session.as_user():  # the query's names are resolved in its author's search_path
            return session.query(first + _FETCH)
    finally:
        if not session.closed:
            session.query("ROLLBACK")


_READ_ONLY = "25006"
_CANCELLED = "57014"
_NO_SUCH_OBJECT = "42704"
_NOT_A_CURSOR = "42P11"


def _explain(error: QueryFailed, timeout: float) -> tuple[str, str]:
    """Return the sentence and the remedy for an assertion that Postgres refused or stopped."""
    if error.sqlstate == _READ_ONLY:
        return f"it tries to change the database: {error.text}", "an assertion may only read: write a SELECT"
    if error.sqlstate == _NOT_A_CURSOR:
        return f"it is not one query: {error.text}", "write one SELECT per assertion"
    if error.sqlstate == _CANCELLED:
        return f"it did not end within {timeout:g} s: {error.text}", "make the query cheaper"
    if error.sqlstate == _NO_SUCH_OBJECT and "plpgsql" in error.text:
        return (
            f"it runs through plpgsql, which this database lacks: {error.text}",
            "CREATE EXTENSION plpgsql;",
        )
    return f"its query fails: {error.text}", "fix the query, or the schema that it reads"


def same(expected: Scalar, value: Any) -> bool:
    """Tell whether a value from the database is the expected one.

    A number is a number, whole or decimal. true is not 1. A text also equals a value with that text,
    such as a date.
    """
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    if isinstance(expected, str):
        return not isinstance(value, (int, float, Decimal, type(None))) and expected == str(value)
    if isinstance(value, float):
        return math.isclose(expected, value, rel_tol=1e-9)
    if isinstance(value, Decimal):
        return value == Decimal(repr(expected))
    return isinstance(value, int) and value == expected


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."
