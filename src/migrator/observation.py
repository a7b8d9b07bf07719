"""Observe what each revision does: statements as they run, the rest by one query at its end, in its transaction.

Nothing is asked of the server when a revision begins.  What was there before is known from the end of the revision
before it, and for a table that a statement names from a look ahead of the first such statement.  The query reads
``pg_locks``, which takes longer with every lock: it leaves out what the same transaction made earlier, and a revision
that only creates tables is measured without it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from migrator.measured import MOST, STRENGTH, Lock, Measured, Rows, Size, Statement, shown
from migrator.postgres import QueryFailed, Session

_NAME = r'((?:"[^"]+"|[^\W\d][\w$]*)(?:\.(?:"[^"]+"|[^\W\d][\w$]*))?)'
_NAMES_A_TABLE = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:"
    r"ALTER\s+(?:TABLE|MATERIALIZED\s+VIEW|SEQUENCE)\s+(?:IF\s+EXISTS\s+)?(?:ONLY\s+)?"
    r"|(UPDATE)\s+(?:ONLY\s+)?|(INSERT)\s+INTO\s+|(DELETE)\s+FROM\s+(?:ONLY\s+)?|COPY\s+"
    r"|TRUNCATE\s+(?:TABLE\s+)?(?:ONLY\s+)?|DROP\s+(?:TABLE|MATERIALIZED\s+VIEW)\s+(?:IF\s+EXISTS\s+)?"
    r"|CREATE\s+(?:UNIQUE\s+)?INDEX\b[^;(]*?\bON\s+(?:ONLY\s+)?"
    r"|CLUSTER\s+|VACUUM\s+(?:\([^)]*\)\s*)?(?:FULL\s+)?|REFRESH\s+MATERIALIZED\s+VIEW\s+(?:CONCURRENTLY\s+)?"
    rf"){_NAME}",
    re.IGNORECASE | re.DOTALL,
)
_READ_OF_OUR_OWN = 100  # characters in which the name of the version table comes in Alembic's own statements
_READ_OF_A_STATEMENT = 400  # characters in which the table's name must come
_CREATES_A_TABLE = re.compile(
    r"\s*CREATE\s+(?:UNLOGGED\s+)?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?[^\s(]+\s*\(", re.IGNORECASE
)
_TOUCHES_ANOTHER = re.compile(r"\b(?:REFERENCES|INHERITS|LIKE|PARTITION|SELECT)\b|;\s*\S", re.IGNORECASE)

_COUNTED = ", ".join(
    f"pg_catalog.pg_stat_get_xact_tuples_{what}(c.oid)" for what in ("inserted", "updated", "deleted")
)
_LOOK = f"""
SELECT c.oid::bigint, c.relfilenode::bigint, {_COUNTED}
  FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass('%s')
"""  # noqa: S608 - nothing but names
# 16384: what initdb made has smaller ids.  https://www.postgresql.org/docs/current/system-catalog-initial-data.html
_LOCKED = """
SELECT oid, pg_catalog.array_remove(pg_catalog.array_agg(mode), NULL) AS modes FROM (
    SELECT relation AS oid, mode FROM pg_catalog.pg_lock_status()
     WHERE pid = pg_catalog.pg_backend_pid() AND locktype = 'relation' AND granted AND relation >= 16384
       AND (relation NOT BETWEEN {low} AND {high} OR relation IN ({named}))
    UNION ALL SELECT pg_catalog.unnest(ARRAY[{named}]::oid[]), NULL
    UNION ALL SELECT oid, NULL FROM pg_catalog.pg_class
     WHERE oid > {highest} AND relpersistence <> 't' AND pg_catalog.txid_current() <> {transaction}
) x GROUP BY oid"""
_CREATED = """
SELECT oid, ARRAY['AccessExclusiveLock'] AS modes FROM pg_catalog.pg_class
 WHERE oid > {highest}
   AND pg_catalog.age(xmin) <= pg_catalog.age(pg_catalog.mod(pg_catalog.txid_current(), 4294967296)::text::xid)"""
# The size only of what the transaction has locked: nothing is waited for.
_END = f"""
SELECT pg_catalog.json_build_object(
    'transaction', pg_catalog.txid_current(),
    'highest', (SELECT pg_catalog.max(oid) FROM pg_catalog.pg_class)::bigint,
    'flush', {{flush}}::text,
    'relations', (SELECT pg_catalog.json_agg(pg_catalog.json_build_array(
        l.oid::bigint, l.modes, n.nspname, c.relname, c.relkind, c.relfilenode::bigint, {_COUNTED},
        CASE WHEN c.relkind IN ('r', 'm', 'i') AND NOT l.modes <@ ARRAY['AccessShareLock', 'RowShareLock']
             THEN pg_catalog.pg_relation_size(c.oid) END))
    FROM ({{relations}}) l
    LEFT JOIN pg_catalog.pg_class c ON c.oid = l.oid
    LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace))::text
"""  # noqa: S608 - nothing but numbers
# The rows that a transaction counted are handed over some time after it: at once, or the next one counts them too.
_FLUSH = "pg_catalog.pg_stat_force_next_flush()"
# What another transaction has not committed is seen as it was; only the catalog is read, which nobody locks.
_BEFORE = """
SELECT c.oid::bigint, c.relfilenode::bigint, n.nspname::text, c.relname::text, c.relkind::text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY(%s::oid[]) AND n.nspname <> 'pg_toast'
"""
# The size takes a lock on the relation: not for long, if somebody has it, for the watch uses this connection too.
_SIZE = "SELECT set_config('lock_timeout', '20ms', true), pg_relation_size(%s::oid)"

Counted = tuple[int, int, int]


@dataclass(frozen=True)
class _Relation:
    """A relation as it was last seen: its name and kind (empty: it is gone), its file, and its size in bytes."""

    name: str
    kind: str
    file: int | None
    size: int | None


class Observation:
    """Observes the SQLAlchemy connection that ``env.py`` opened; one for each connection.

    ``session`` is the control connection, which sees what is committed: it is asked for the state before.
    ``ignore`` are the names of migrator's and Alembic's own tables.
    """

    def __init__(
        self,
        connection: Any,
        session: Session,
        ignore: Collection[str] = (),
    ) -> None:
        from sqlalchemy import event

        self._connection = connection
        self._session = session
        self._ignore = frozenset(ignore)
        self._known: dict[int, _Relation] = {}
        self._held: dict[int, frozenset[str]] = {}  # lock modes, and counted rows, of this transaction so far
        self._counted: dict[int, Counted] = {}
        self._transaction = 0
        self._low = self._high = 0  # what this transaction made has these ids
        self._highest = int(session.value("SELECT max(oid)::bigint FROM pg_class") or 0)
        self._observes = False
        self._forget()
        event.listen(connection, "before_cursor_execute", self._before)
        event.listen(connection, "after_cursor_execute", self._after)
        event.listen(connection, "rollback", lambda _: self._known.clear())  # it may be of what was undone

    def _forget(self) -> None:
        self._statements: list[Statement] = []
        self._count = 0
        self._spent = 0.0
        self._looked: dict[str, int] = {}  # what statements name: its id, 0 where there is none
        self._by_driver: dict[str, list[int]] = {}
        self._only_creates = True
        self._begun = self._running = time.perf_counter()

    def begins(self, transaction: int) -> None:
        """Note that a revision begins, in that transaction (txid_current), 0 where each statement is one."""
        self._forget()
        if transaction != self._transaction or not transaction:
            self._transaction = transaction
            self._low = self._high = 0
            self._held, self._counted = {}, {}
        self._observes = True

    def ends(self) -> Measured:
        """Return what the revision did; called in its transaction, after its last statement.  One query."""
        seconds = time.perf_counter() - self._begun
        self._observes = False
        if not self._count:
            return Measured(seconds=seconds, transactional=bool(self._transaction))
        low, high = (self._low, self._high) if self._low else (1, 0)
        relations = (_CREATED if self._only_creates else _LOCKED).format(
            low=low,
            high=high,
            highest=self._highest,
            named=", ".join(str(oid) for oid in {0, *self._looked.values()}),
            transaction=self._transaction,
        )
        flush = _FLUSH if self._session.facts.major >= 15 else "''"
        text = self._connection.exec_driver_sql(_END.format(relations=relations, flush=flush)).scalar()
        return self._measured(json.loads(text), seconds)

    # -- while it runs ---------------------------------------------------------------------------------

    def _before(
        self, connection: Any, _cursor: Any, statement: str, _parameters: Any, context: Any, _many: bool
    ) -> None:
        if not self._observes or self._is_ours(statement):
            return
        if self._only_creates and not (
            _CREATES_A_TABLE.match(statement) and not _TOUCHES_ANOTHER.search(statement)
        ):
            self._only_creates = False
        if not self._only_creates:
            found = _NAMES_A_TABLE.match(statement[:_READ_OF_A_STATEMENT])
            if found and found[4] not in self._looked and len(self._looked) < MOST:
                self._look(connection, found[4])
        self._running = time.perf_counter()

    def _after(
        self, _connection: Any, cursor: Any, statement: str, _parameters: Any, _context: Any, many: bool
    ) -> None:
        if not self._observes or self._is_ours(statement):
            return
        seconds = time.perf_counter() - self._running
        self._count += 1
        self._spent += seconds
        rows = cursor.rowcount
        if self._count <= MOST:
            self._statements.append(Statement(shown(statement), seconds, rows if rows >= 0 else None))
        if rows > 0:
            found = _NAMES_A_TABLE.match(statement[:_READ_OF_A_STATEMENT])
            verb = next((n for n in (1, 2, 3) if found and found[n]), 0)
            if found and verb:
                counted = self._by_driver.setdefault(found[4], [0, 0, 0])
                counted[(1, 0, 2)[verb - 1]] += rows

    def _is_ours(self, statement: str) -> bool:
        """Whether this moves the version row, or begins a transaction for that: Alembic's and migrator's own."""
        if not self._transaction and statement == "BEGIN":
            return True
        start = statement[:_READ_OF_OUR_OWN]
        return any(name in start for name in self._ignore) and not start.lstrip().upper().startswith("CREATE")

    def _look(self, connection: Any, name: str) -> None:
        """Look at a table ahead of the first statement that names it."""
        self._looked[name] = 0
        cursor = connection.connection.cursor()
        try:
            cursor.execute(_LOOK % name.replace("'", "''"))
            row = cursor.fetchone()
        except Exception:  # noqa: BLE001 - any driver's: the statement itself then says what is wrong
            return
        finally:
            cursor.close()
        if row is None:
            return
        oid, file, *counted = row
        self._looked[name] = oid
        self._counted[oid] = (counted[0], counted[1], counted[2])
        seen = self._known.get(oid, _NOTHING)
        size = self._size(oid) if seen.size is None else seen.size
        self._known[oid] = replace(seen, file=file, size=size)

    def _size(self, oid: int) -> int | None:
        """Return the bytes of a relation, None where it is locked (as by this very transaction) or is not committed."""
        try:
            rows = self._session.query(_SIZE, (oid,))
        except QueryFailed:
            return None
        return int(rows[0][1]) if rows[0][1] is not None else None

    # -- at the end ------------------------------------------------------------------------------------

    def _measured(self, found: dict[str, Any], seconds: float) -> Measured:
        transactional = bool(self._transaction) and found["transaction"] == self._transaction
        named = set(self._looked.values())
        rows = [row for row in found["relations"] or () if row[0] and row[3] not in self._ignore]
        now = {row[0]: _relation(row) for row in rows if row[2] != "pg_toast"}
        modes = {row[0]: frozenset(row[1] or ()) for row in rows}
        fresh = [
            oid
            for oid in now
            if oid in named
            or modes[oid] - self._held.get(oid, frozenset())
            or now[oid].file != self._known.get(oid, now[oid]).file
            or not modes[oid]
        ]
        created = sorted(oid for oid in fresh if oid > self._highest and now[oid].kind)
        before = self._state_before([oid for oid in fresh if oid <= self._highest], modes)
        if not transactional:
            now |= {
                oid: replace(now[oid], size=self._size(oid)) for oid in named & now.keys() if now[oid].kind
            }
        changed = [(before.get(oid, _NOTHING), now[oid]) for oid in fresh if oid not in created]
        names = {oid: now[oid].name or before.get(oid, _NOTHING).name for oid in fresh}
        held = sorted(
            (oid for oid in fresh if modes[oid] and names[oid]), key=lambda oid: -_strength(modes[oid])
        )
        gone = [old.name for old, new in changed if not new.kind and old.name]
        made = {now[oid].name for oid in created}  # an index that was made anew is neither
        result = Measured(
            seconds=seconds,
            transactional=transactional,
            statement_count=self._count,
            statement_seconds=self._spent,
            statements=tuple(self._statements),
            locks=tuple(Lock(names[oid], _by_strength(modes[oid])) for oid in held),
            rewritten=tuple(_rewritten(changed)),
            rows=self._rows(rows, transactional),
            created=tuple(now[oid].name for oid in created if now[oid].name not in gone),
            dropped=tuple(name for name in gone if name not in made),
            sizes=tuple(_sizes(changed, [now[oid] for oid in created])),
        )
        self._remember(found, now, modes, created)
        return result

    def _state_before(self, oids: list[int], modes: dict[int, frozenset[str]]) -> dict[int, _Relation]:
        """Return how the relations were before the revision, asking for those that were never seen."""
        before = {oid: self._known[oid] for oid in oids if oid in self._known}
        unseen = [
            oid for oid in oids if not before.get(oid, _NOTHING).kind and _strength(modes[oid]) >= _REWRITES
        ]
        if not unseen:
            return before
        try:
            rows = self._session.query(_BEFORE, (unseen,))
        except QueryFailed:
            return before
        for oid, file, schema, name, kind in rows:
            seen = before.get(oid, _NOTHING)
            before[oid] = _Relation(f"{schema}.{name}", kind, seen.file or file, seen.size)
        return before

    def _rows(self, rows: list[Any], transactional: bool) -> tuple[Rows, ...]:
        if not transactional:
            return tuple(Rows(name.replace('"', ""), *counted) for name, counted in self._by_driver.items())
        found = []
        for oid, _, schema, name, kind, _, *counted, _ in rows:
            was = self._counted.get(oid, (0, 0, 0))
            gained = [(new or 0) - old for new, old in zip(counted, was, strict=True)]
            if kind in ("r", "p", "m") and schema != "pg_toast" and any(gained):
                found.append(Rows(f"{schema}.{name}", *gained))
        return tuple(found)

    def _remember(
        self,
        found: dict[str, Any],
        now: dict[int, _Relation],
        modes: dict[int, frozenset[str]],
        created: list[int],
    ) -> None:
        """Keep what is known for the next revision, which may be in the same transaction."""
        self._known.update((oid, item) for oid, item in now.items() if item.kind)
        self._highest = max(self._highest, int(found["highest"]))
        if found["transaction"] != self._transaction:
            return
        self._held.update((oid, self._held.get(oid, frozenset()) | held) for oid, held in modes.items())
        for row in found["relations"] or ():
            self._counted[row[0]] = (row[6] or 0, row[7] or 0, row[8] or 0)
        if created:
            self._low = self._low or created[0]
            self._high = created[-1]


_NOTHING = _Relation("", "", None, None)
_REWRITES = STRENGTH.index("ShareUpdateExclusiveLock")


def _relation(row: list[Any]) -> _Relation:
    _, _, schema, name, kind, file, *_, size = row
    return _NOTHING if name is None else _Relation(f"{schema}.{name}", kind, file, size)


def _strength(modes: Collection[str]) -> int:
    return max((STRENGTH.index(mode) for mode in modes if mode in STRENGTH), default=-1)


def _by_strength(modes: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(modes, key=lambda mode: (-_strength((mode,)), mode)))


def _rewritten(changed: list[tuple[_Relation, _Relation]]) -> list[Size]:
    """Return what has another file now; indexes only where no table has, for they follow their table."""
    moved = [(old, new) for old, new in changed if new.file and old.file is not None and old.file != new.file]
    tables = [(old, new) for old, new in moved if new.kind in ("r", "m")]
    return [Size(new.name, old.size, new.size) for old, new in tables or moved]


def _sizes(changed: list[tuple[_Relation, _Relation]], created: list[_Relation]) -> list[Size]:
    """Return the sizes of tables and materialized views that were written to; what is new began with nothing."""
    kept = [
        Size(new.name or old.name, old.size, new.size if new.kind else 0)
        for old, new in changed
        if (new.kind or old.kind) in ("r", "m") and (new.size is not None or not new.kind)
    ]
    return kept + [Size(new.name, 0, new.size) for new in created if new.kind in ("r", "m")]
