"""Know the statements that are safe to run twice: those outside of a transaction may have to."""

from __future__ import annotations

import re

_COMMENT = r"--[^\n]*|/\*.*?\*/"
_WORDS = re.compile(
    rf"({_COMMENT})|'(?:[^']|'')*'|\"[^\"]*\"|(\$\w*\$).*?\2", re.DOTALL
)  # a comment; or a string, a name, the body of a function
# The next run handles an index that is built concurrently: stages/invalid_indexes.py.
_REPEATABLE = re.compile(
    r"""\s*(?:
      SET\b | RESET\b | SHOW\b | BEGIN\b | START\s+TRANSACTION\b | COMMIT\b | END\b | ROLLBACK\b | ABORT\b
    | SAVEPOINT\b | RELEASE\b | LOCK\b | DISCARD\b | EXPLAIN\b(?!.*\bANALY[SZ]E\b) | VACUUM\b | ANALY[SZ]E\b
    | CHECKPOINT\b | COMMENT\s+ON\b | GRANT\b | REVOKE\b | REINDEX\b | CLUSTER\b | REFRESH\b
    | CREATE\s+(?:UNIQUE\s+)?INDEX\s+CONCURRENTLY\b
    | CREATE\s+OR\s+REPLACE\b
    | CREATE\s+[\w\s]*?\bIF\s+NOT\s+EXISTS\b
    | DROP\s+[\w\s]*?\bIF\s+EXISTS\b
    | ALTER\s+TYPE\b.*\bADD\s+VALUE\s+IF\s+NOT\s+EXISTS\b
    | ALTER\s+TABLE\b[^,]*\bVALIDATE\s+CONSTRAINT\s+[^\s,;]+\s*;?\s*$
    )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_READS = re.compile(r"\s*(?:SELECT|WITH|TABLE|VALUES)\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|INTO)\b", re.IGNORECASE)
_CALL = re.compile(r"(?<![\w.])(pg_catalog\s*\.\s*)?(\w+)\s*\(", re.IGNORECASE)
_ANOTHERS = re.compile(r"\.\s*\w+\s*\(")
_HARMLESS = frozenset(
    re.findall(
        r"\w+",
        """all and any array array_agg as avg bool_and bool_or by cast clock_timestamp coalesce concat count
        current_database current_schema current_setting date_trunc
        else except exists extract filter format format_type from generate_series generate_subscripts greatest having
        in intersect join json_agg jsonb_agg lateral least length limit lower max min not now nullif on or over
        pg_advisory_lock pg_advisory_unlock pg_advisory_xact_lock pg_backend_pid pg_relation_size pg_sleep pg_sleep_for
        pg_total_relation_size pg_try_advisory_lock pg_typeof quote_ident row select set_config string_agg substring sum
        then to_regclass trim unnest upper union using values version when where with""",
    )
)
"""Words before a parenthesis in a query that write nothing."""


_NOT_UNDONE = re.compile(
    r"\b(?:dblink_exec|dblink_send_query|pg_background_launch|dblink\s*\([^;]*\b(?:INSERT|UPDATE|DELETE|MERGE|CALL)\b)"
    r"|pg_(?:create|copy|drop)_(?:logical_|physical_)?replication_slot|pg_replication_slot_advance"
    r"|^\s*PREPARE\s+TRANSACTION\b|;\s*PREPARE\s+TRANSACTION\b",
    re.IGNORECASE,
)


_ITS_WORDS = ("dblink", "pg_background", "replication_slot", "prepare")
_RESETS = re.compile(
    r"\b(?:lock_timeout|statement_timeout|RESET\s+(?:ALL|ROLE)|DISCARD\s+ALL|SESSION\s+AUTHORIZATION"
    r"|pg_advisory_unlock_all)\b",
    re.IGNORECASE,
)
_RESETS_WORDS = ("_timeout", "reset", "discard", "authorization", "unlock_all")


def outlives_a_rollback(statement: str) -> bool:
    """Tell whether a statement has another session write, leaves a prepared transaction behind, or changes a
    replication slot.
    """
    return _has(statement, _ITS_WORDS) and bool(_NOT_UNDONE.search(statement))


def resets_the_session(statement: str) -> bool:
    """Tell whether a statement may undo the role, the timeouts or the lock of migrator; a script of pg_dump's does."""
    return _has(statement, _RESETS_WORDS) and bool(_RESETS.search(statement))


def _has(statement: str, words: tuple[str, ...]) -> bool:
    """Tell whether a text has one of the words: much faster than the expression, for each statement is asked."""
    text = statement.lower()
    return any(word in text for word in words)


def is_repeatable(statement: str) -> bool:
    """Tell whether a statement changes nothing more when it runs a second time; False if that is not sure."""
    bare = _WORDS.sub(lambda found: " " if found[1] else " x ", statement).strip().rstrip(";").rstrip()
    if ";" in bare:
        return False
    if _REPEATABLE.match(bare):
        return True
    if not _READS.match(bare) or _WRITES.search(bare):
        return False
    calls = _CALL.findall(bare)
    others = [found for found in _ANOTHERS.findall(bare) if found]
    qualified = sum(1 for catalog, _ in calls if catalog)
    return len(others) == qualified and all(catalog or name.lower() in _HARMLESS for catalog, name in calls)
