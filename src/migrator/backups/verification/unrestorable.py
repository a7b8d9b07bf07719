"""Objects that pg_dump writes and pg_restore cannot restore: expressions with functions that need a
search_path.

A restore runs with an empty search_path. It stops at a check, a generated column, an index or a
materialised view that calls a function whose body names tables or functions without their schema.
Nothing is called here: the server analyses bodies in SQL, and those in PL/pgSQL are searched for names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from migrator.postgres.session import QueryFailed, Session

# Where a restore evaluates expressions, and the functions that each calls: directly, by an operator, by a
# view.
_CALLED = """
WITH RECURSIVE root(name, classid, objid) AS (
  SELECT format('check %I of %s', conname, CASE WHEN conrelid <> 0 THEN format('%I.%I', n.nspname, c.relname)
                                                ELSE format_type(contypid, NULL) END), 'pg_constraint'::regclass, k.oid
    FROM pg_constraint k LEFT JOIN pg_class c ON c.oid = conrelid LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE contype = 'c'
  UNION ALL
  SELECT format('generated column %I of %I.%I', attname, nspname, relname), 'pg_attrdef'::regclass, d.oid
    FROM pg_attrdef d JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum JOIN pg_class c ON c.oid = adrelid
         JOIN pg_namespace n ON n.oid = relnamespace
   WHERE attgenerated <> ''
  UNION ALL
  SELECT format('index %I.%I', nspname, relname), 'pg_class'::regclass, c.oid
    FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = relnamespace
   WHERE indexprs IS NOT NULL OR indpred IS NOT NULL
  UNION ALL
  SELECT format('materialized view %I.%I', nspname, relname), 'pg_rewrite'::regclass, r.oid
    FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class JOIN pg_namespace n ON n.oid = relnamespace
   WHERE relkind = 'm' AND relispopulated
), needs(name, classid, objid) AS (
  SELECT name, classid::oid, objid FROM root
  UNION
  SELECT name, coalesce(CASE WHEN r.oid IS NOT NULL THEN 'pg_rewrite'::regclass END, d.refclassid),
         coalesce(r.oid, d.refobjid)
    FROM needs JOIN pg_depend d ON (d.classid, d.objid) = (needs.classid, needs.objid)
         LEFT JOIN pg_class v ON d.refclassid = 'pg_class'::regclass AND v.oid = d.refobjid AND v.relkind = 'v'
         LEFT JOIN pg_rewrite r ON r.ev_class = v.oid
   WHERE d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_cast'::regclass) OR r.oid IS NOT NULL
)
SELECT DISTINCT name, objid::bigint FROM needs WHERE classid = 'pg_proc'::regclass ORDER BY 1, 2
"""
_FUNCTIONS = """
SELECT p.oid::bigint, p.oid::regprocedure::text, proname::text, lanname::text, coalesce(prosrc, ''),
       EXISTS (SELECT FROM unnest(proconfig) c WHERE c LIKE 'search_path=%')
  FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace JOIN pg_language l ON l.oid = prolang
 WHERE nspname <> 'information_schema' AND nspname !~ '^pg_' AND lanname IN ('sql', 'plpgsql')
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                                             AND d.deptype = 'e')
"""
_RELATIONS = """
SELECT DISTINCT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
 WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND nspname <> 'information_schema' AND nspname !~ '^pg_'
   AND NOT EXISTS (SELECT FROM pg_class o JOIN pg_namespace s ON s.oid = o.relnamespace
                    WHERE o.relname = c.relname AND s.nspname = 'pg_catalog')
"""
_EXTENSIONS = "SELECT extname::text FROM pg_extension WHERE extname = 'pg_cron'"
_BOUND = (
    "extension {name} works in only one database: a restore leaves it and its jobs out, and pg_restore "
    "by hand stops there"
)
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class _Function:
    oid: int
    shown: str
    name: str
    language: str
    source: str
    has_path: bool


def find(session: Session) -> list[str]:
    """Return a sentence for each object that a restore would stop at, or leave out; raises QueryFailed.

    It runs in a transaction of the session.
    """
    functions = {
        oid: _Function(oid, shown, name, language, _COMMENT.sub(" ", source), has_path)
        for oid, shown, name, language, source, has_path in session.query(_FUNCTIONS)
    }
    called = session.query(_CALLED) if functions else []
    found = {name: "" for name, _ in called}
    by_name: dict[str, list[_Function]] = {}
    for function in functions.values():
        by_name.setdefault(function.name, []).append(function)
    relations = {row[0] for row in session.query(_RELATIONS)} if functions else set()
    missing: dict[int, str] = {}
    for name, oid in called:
        for function in _reached(functions, by_name, oid):
            if function.oid not in missing:
                missing[function.oid] = _missing(session, function, relations, by_name)
            calls = f"{name} calls {function.shown}, which"
            if found[name]:
                break
            if missing[function.oid]:
                found[name] = (
                    f"{calls} needs a search_path ({missing[function.oid]}): "
                    f"ALTER FUNCTION {function.shown} SET search_path = ..."
                )
            elif not name.startswith(("index", "materialized")) and (read := _read(function, relations)):
                found[name] = (
                    f"{calls} reads {read[0]}, whose rows may be restored later: use a trigger instead"
                )
    bound = [_BOUND.format(name=row[0]) for row in session.query(_EXTENSIONS)]
    return [text for text in (*found.values(), *bound) if text]


def _reached(
    functions: Mapping[int, _Function], by_name: Mapping[str, Iterable[_Function]], oid: int
) -> Iterator[_Function]:
    """Yield a function and those that it may call; stop at a function that sets its own search_path."""
    waiting, seen = [oid], set()
    while waiting:
        function = functions.get(waiting.pop())
        if function is None or function.oid in seen:
            continue
        seen.add(function.oid)
        yield function
        if function.has_path:
            continue
        for word in set(re.findall(r"\w+", function.source)):
            waiting += [other.oid for other in by_name.get(word, ())]


def _missing(
    session: Session, function: _Function, relations: Iterable[str], functions: Mapping[str, object]
) -> str:
    """Return the names that a function does not find under our own search_path, which is as empty as that of
    a restore.
    """
    if function.has_path:
        return ""
    if function.language == "sql":
        return _analysed(session, function)
    if bare := [name for name in _read(function, relations) if "." not in name]:
        return f'relation "{bare[0]}"'
    for match in re.finditer(r"(?<![\w.\"])(\w+)\s*\(", function.source):
        if match[1].lower() in functions and not session.value(_BUILT_IN, [match[1].lower()]):
            return f"function {match[1]}"
    return ""


def _read(function: _Function, relations: Iterable[str]) -> list[str]:
    """Return the relations that a body names, in its own form; without those that it creates with WITH."""
    found = []
    for match in _NAMED.finditer(function.source):
        name = match[2][1:-1] if match[2].startswith('"') else match[2].lower()
        made_up = rf"\b{re.escape(name)}\s+as\s+(?:not\s+)?(?:materialized\s*)?\("
        if name in relations and (match[1] or not re.search(made_up, function.source, re.IGNORECASE)):
            found.append((match[1] or "") + name)
    return found


_NAMED = re.compile(
    r"\b(?:from|join|into|update)\s+(?:only\s+)?((?:\w+|\"[^\"]+\")\.)?(\w+|\"[^\"]+\")", re.IGNORECASE
)
_BUILT_IN = (
    "SELECT EXISTS (SELECT FROM pg_proc WHERE proname = %s AND pronamespace = 'pg_catalog'::regnamespace)"
)


def _analysed(session: Session, function: _Function) -> str:
    session.query("SAVEPOINT analysed")
    try:
        session.query("SET LOCAL check_function_bodies = on")
        session.query("SELECT fmgr_sql_validator(%s::bigint::oid)", [function.oid])
    except QueryFailed as error:
        if error.lost:
            raise
        session.query("ROLLBACK TO SAVEPOINT analysed")
        said = error.text.partition(" HINT:")[0]
        return said if (error.sqlstate or "").startswith("42") and error.sqlstate != "42501" else ""
    session.query("RELEASE SAVEPOINT analysed")
    return ""
