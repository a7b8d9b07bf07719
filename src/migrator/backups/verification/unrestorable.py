"""Objects that pg_dump writes and pg_restore cannot restore: expressions with functions that need a
search_path.

A restore runs with an empty search_path. It stops at a check, a generated column, an index or a
materialised view that calls a function whose body names tables or functions without their schema.
Nothing is called here: the server analyses bodies in SQL, and those in PL/pgSQL are searched for names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from migrator.backups.exported_snapshot import savepoint
from migrator.backups.verification import superuser_only
from migrator.postgres.errors import Refused
from migrator.postgres.queries import IN_USER_SCHEMA
from migrator.postgres.session import Session

# Where a restore evaluates expressions, and the functions that each calls: directly, by an operator, by a
# view.
_CALLED = """
WITH RECURSIVE extensions(objid) AS (
  SELECT objid FROM pg_depend WHERE deptype = 'e' AND classid IN ('pg_class'::regclass, 'pg_type'::regclass)
), root(name, classid, objid) AS (
  SELECT format('check %I of %s', conname, CASE WHEN conrelid <> 0 THEN format('%I.%I', n.nspname, c.relname)
                                                ELSE format_type(contypid, NULL) END), 'pg_constraint'::regclass, k.oid
    FROM pg_constraint k LEFT JOIN pg_class c ON c.oid = conrelid LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE contype = 'c' AND conrelid NOT IN (TABLE extensions) AND contypid NOT IN (TABLE extensions)
  UNION ALL
  SELECT format('generated column %I of %I.%I', attname, nspname, relname), 'pg_attrdef'::regclass, d.oid
    FROM pg_attrdef d JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum JOIN pg_class c ON c.oid = adrelid
         JOIN pg_namespace n ON n.oid = relnamespace
   WHERE attgenerated <> '' AND c.oid NOT IN (TABLE extensions)
  UNION ALL
  SELECT format('index %I.%I', nspname, relname), 'pg_class'::regclass, c.oid
    FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = relnamespace
   WHERE (indexprs IS NOT NULL OR indpred IS NOT NULL) AND indrelid NOT IN (TABLE extensions)
  UNION ALL
  SELECT format('index %I.%I', nspname, relname), 'pg_proc'::regclass, amproc::oid
    FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = relnamespace,
         unnest(indclass) AS k (class) JOIN pg_opclass o ON o.oid = k.class JOIN pg_amproc ON amprocfamily = opcfamily
   WHERE opcnamespace <> 'pg_catalog'::regnamespace AND indrelid NOT IN (TABLE extensions)
  UNION ALL
  SELECT format('partition key of %I.%I', nspname, relname), 'pg_class'::regclass, c.oid
    FROM pg_partitioned_table JOIN pg_class c ON c.oid = partrelid JOIN pg_namespace n ON n.oid = relnamespace
   WHERE partexprs IS NOT NULL AND c.oid NOT IN (TABLE extensions)
  UNION ALL
  SELECT 'range type ' || format_type(rngtypid, NULL), 'pg_type'::regclass, rngtypid
    FROM pg_range WHERE rngtypid NOT IN (TABLE extensions)
  UNION ALL
  SELECT format('materialized view %I.%I', nspname, relname), 'pg_rewrite'::regclass, r.oid
    FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class JOIN pg_namespace n ON n.oid = relnamespace
   WHERE relkind = 'm' AND relispopulated AND c.oid NOT IN (TABLE extensions)
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
_FUNCTIONS = f"""
SELECT p.oid::bigint, p.oid::regprocedure::text, proname::text, lanname::text, coalesce(prosrc, ''),
       EXISTS (SELECT FROM unnest(proconfig) c WHERE c LIKE 'search_path=%'),
       (SELECT extname::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
         WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
  FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace JOIN pg_language l ON l.oid = prolang
 WHERE {IN_USER_SCHEMA}
"""  # noqa: S608 - constants only
_NAMES = f"""
WITH mine AS (SELECT oid FROM pg_namespace n WHERE {IN_USER_SCHEMA})
SELECT 'relation', relname::text FROM pg_class c WHERE relnamespace IN (TABLE mine)
   AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
   AND NOT EXISTS (SELECT FROM pg_class o WHERE o.relname = c.relname AND relnamespace = 'pg_catalog'::regnamespace)
UNION
SELECT 'type', typname::text FROM pg_type t WHERE typnamespace IN (TABLE mine) AND typcategory <> 'A'
   AND NOT EXISTS (SELECT FROM pg_type o WHERE o.typname = t.typname AND typnamespace = 'pg_catalog'::regnamespace)
UNION
SELECT 'text search dictionary', dictname::text FROM pg_ts_dict WHERE dictnamespace IN (TABLE mine)
UNION
SELECT 'text search configuration', cfgname::text FROM pg_ts_config WHERE cfgnamespace IN (TABLE mine)
"""  # noqa: S608 - constants only
_EXTENSIONS = "SELECT extname::text FROM pg_extension WHERE extname = 'pg_cron'"
# pg_dump has the rows of an extension's tables only where the extension says so, and no extension's version.
_OF_EXTENSIONS = """
SELECT format('the rows of %I.%I are not in it, because the table belongs to extension %I (ALTER EXTENSION %I DROP '
              'TABLE %I.%I, if its rows are yours)', nspname, relname, extname, extname, nspname, relname)
  FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid JOIN pg_class c ON c.oid = d.objid
  JOIN pg_namespace n ON n.oid = relnamespace
 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
   AND relkind = 'r' AND c.oid <> ALL (coalesce(extconfig, '{}'))
   AND (reltuples > 0 OR pg_stat_get_live_tuples(c.oid) > 0)
UNION ALL
SELECT format('extension %I is %s, and a restore installs the default of its server, which is %s here (ALTER EXTENSION '
              '%I UPDATE)', name, installed_version, default_version, name)
  FROM pg_available_extensions
 WHERE installed_version <> default_version AND EXISTS (SELECT FROM pg_extension WHERE extname <> 'plpgsql')
ORDER BY 1
"""
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
    extension: str | None

    @property
    def remedy(self) -> str:
        """Return what gives it a search_path, and is dumped: changes of an extension's functions are not."""
        if self.extension:
            return f"extension {self.extension} owns it; call it by your own function, with SET search_path"
        return f"ALTER FUNCTION {self.shown} SET search_path = ..."


def find(session: Session) -> list[str]:
    """Return a sentence for each object that a restore would stop at, or leave out; raises QueryFailed.

    It runs in a transaction of the session.
    """
    functions = {
        oid: _Function(oid, shown, name, language, _COMMENT.sub(" ", source), has_path, extension)
        for oid, shown, name, language, source, has_path, extension in session.query(_FUNCTIONS)
    }
    called = session.query(_CALLED) if functions else []
    found = {name: "" for name, _ in called}
    by_name: dict[str, list[_Function]] = {}
    for function in functions.values():
        by_name.setdefault(function.name, []).append(function)
    names: dict[str, set[str]] = {}
    for kind, name in session.query(_NAMES) if functions else ():
        names.setdefault(kind, set()).add(name)
    relations = names.get("relation", set())
    missing: dict[int, str] = {}
    for name, oid in called:
        for function in _reached(functions, by_name, oid):
            if function.oid not in missing:
                missing[function.oid] = _missing(session, function, names, by_name)
            calls = f"{name} calls {function.shown}, which"
            if found[name]:
                break
            if missing[function.oid]:
                found[name] = f"{calls} needs a search_path ({missing[function.oid]}): {function.remedy}"
            elif not name.startswith(("index", "materialized", "range")) and (
                read := _read(function, relations)
            ):
                found[name] = (
                    f"{calls} reads {read[0]}, whose rows may be restored later: use a trigger instead"
                )
    bound = [_BOUND.format(name=row[0]) for row in session.query(_EXTENSIONS)]
    of_extensions = [row[0] for row in session.query(_OF_EXTENSIONS)]
    return [text for text in (*found.values(), *bound, *of_extensions, *superuser_only.find(session)) if text]


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
        if function.has_path or function.language not in _READABLE:
            continue
        for word in set(re.findall(r"\w+", function.source)):
            waiting += [other.oid for other in by_name.get(word, ())]


def _missing(
    session: Session,
    function: _Function,
    names: Mapping[str, Collection[str]],
    functions: Mapping[str, object],
) -> str:
    """Return what a function does not find with migrator's search_path, which is as empty as in a restore."""
    if function.has_path or function.language not in _READABLE:
        return ""
    if said := _analysed(session, function):  # of PL/pgSQL: the types of its variables
        return said
    if function.language == "sql":
        return ""
    if bare := [name for name in _read(function, names.get("relation", ())) if "." not in name]:
        return f'relation "{bare[0]}"'
    for pattern, kinds in _MENTIONS:
        for match in pattern.finditer(function.source):
            for kind in kinds:
                if match[1].lower() in names.get(kind, ()):
                    return f'{kind} "{match[1].lower()}"'
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


_MENTIONS = (
    (re.compile(r"::\s*(\w+)(?![\w.])"), ("type",)),
    (re.compile(r"\bcast\s*\([^()]*\bas\s+(\w+)\s*[)\[]", re.IGNORECASE), ("type",)),
    (re.compile(r"'(\w+)'\s*::\s*regclass", re.IGNORECASE), ("relation",)),
    (re.compile(r"\b(?:next|curr|set)val\s*\(\s*'(\w+)'", re.IGNORECASE), ("relation",)),
    (re.compile(r"'(\w+)'"), ("text search dictionary", "text search configuration")),
)
"""Where a body in PL/pgSQL names, without a schema, what is no table and no function."""
_READABLE = ("sql", "plpgsql")
_NAMED = re.compile(
    r"\b(?:from|join|into|update)\s+(?:only\s+)?((?:\w+|\"[^\"]+\")\.)?(\w+|\"[^\"]+\")", re.IGNORECASE
)
_BUILT_IN = (
    "SELECT EXISTS (SELECT FROM pg_proc WHERE proname = %s AND pronamespace = 'pg_catalog'::regnamespace)"
)


def _analysed(session: Session, function: _Function) -> str:
    validator = "fmgr_sql_validator" if function.language == "sql" else "plpgsql_validator"
    try:
        with savepoint(session):
            session.query("SET LOCAL check_function_bodies = on")
            session.query(f"SELECT {validator}(%s::bigint::oid)", [function.oid])
    except Refused as error:
        said = error.text.partition(" HINT:")[0]
        return said if (error.sqlstate or "").startswith("42") and error.sqlstate != "42501" else ""
    return ""
