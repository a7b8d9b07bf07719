"""Observe each revision: statements as they run, the rest by one query at its end, in its transaction.

The start of a revision needs no query. The state before it comes from the end of the revision before.
For a table that a statement names, it comes from a look before the first such statement. The query
reads ``pg_locks``, which takes longer with every lock of the transaction. If a revision has only
created tables and their indexes, which no other session sees or locks, the query reads only new
relations. Each of those has the strongest lock.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from migrator.pipeline.apply.metrics.measurement import MOST, STRENGTH, Lock, Measured, Rows, Statement, shown
from migrator.pipeline.apply.metrics.relations import (
    COLUMNS,
    NONE,
    NOTHING,
    Counted,
    Relation,
    by_strength,
    relations,
    rewritten,
    sizes,
    strength,
)
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session

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

_COUNTED = ", ".join(
    f"pg_catalog.pg_stat_get_xact_tuples_{what}(c.oid)" for what in ("inserted", "updated", "deleted")
)
_TRANSACTION = "SELECT pg_catalog.txid_current()"
_LOOK = f"""
SELECT c.oid::bigint, c.relfilenode::bigint, {_COUNTED} FROM pg_catalog.pg_class c
 WHERE c.oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass('%s') AS pg_catalog.oid)
"""  # noqa: S608 - nothing but names
# 16384: the objects of initdb have smaller ids.
# https://www.postgresql.org/docs/current/system-catalog-initial-data.html The size is read only for
# relations that the transaction has locked: nothing is waited for.
_LOCKED = f"""
SELECT CAST(pg_catalog.json_agg(pg_catalog.json_build_array(
       x.transaction, l.relation::bigint, l.mode, {COLUMNS}, {_COUNTED},
       CASE WHEN c.relkind OPERATOR(pg_catalog.=) ANY (CAST(ARRAY['r', 'm', 'i'] AS pg_catalog."char"[]))
             AND l.mode OPERATOR(pg_catalog.<>) 'AccessShareLock' AND l.mode OPERATOR(pg_catalog.<>) 'RowShareLock'
            THEN pg_catalog.pg_relation_size(c.oid) END)) AS pg_catalog.text)
  FROM (SELECT pg_catalog.txid_current() AS transaction{{flush}}) x
  LEFT JOIN pg_catalog.pg_lock_status() l
    ON l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() AND l.locktype OPERATOR(pg_catalog.=) 'relation'
   AND l.granted AND l.relation OPERATOR(pg_catalog.>=) CAST('16384' AS pg_catalog.oid)
   AND (l.relation OPERATOR(pg_catalog.<) CAST('{{low}}' AS pg_catalog.oid)
        OR l.relation OPERATOR(pg_catalog.>) CAST('{{high}}' AS pg_catalog.oid)
        OR l.relation OPERATOR(pg_catalog.=) ANY (CAST({{named}} AS pg_catalog.oid[])))
  LEFT JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) l.relation
"""  # noqa: S608 - nothing but numbers
# If statements have only created tables, every locked relation is new.
_CREATED = f"""
SELECT CAST(pg_catalog.json_agg(pg_catalog.json_build_array(
       x.transaction, c.oid::bigint, '{STRENGTH[-1]}', {COLUMNS}, 0, 0, 0, 0)) AS pg_catalog.text)
  FROM (SELECT pg_catalog.txid_current() AS transaction) x
  LEFT JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.>) CAST('{{highest}}' AS pg_catalog.oid)
   AND pg_catalog.age(c.xmin) OPERATOR(pg_catalog.<=) pg_catalog.age(CAST('{{xid}}' AS pg_catalog.xid))
"""  # noqa: S608 - nothing but numbers
_CREATES_A_TABLE = re.compile(rf"\s*CREATE\s+(?:UNLOGGED\s+)?TABLE\b(?:\s+{_NAME}\s*\()?", re.IGNORECASE)
_CREATES_AN_INDEX = re.compile(r"\s*CREATE\s+(?:UNIQUE\s+)?INDEX\b(?!\s+CONCURRENTLY)", re.IGNORECASE)
_TOUCHES_ANOTHER = re.compile(r"\b(?:REFERENCES|INHERITS|LIKE|PARTITION|OF|AS)\b|;\s*\S", re.IGNORECASE)
# The locks are gone after a commit: only new and named relations remain.
_UNLOCKED = f"""
SELECT CAST(pg_catalog.json_agg(pg_catalog.json_build_array(0, c.oid::bigint, NULL, {COLUMNS}, 0, 0, 0, NULL))
            AS pg_catalog.text)
  FROM pg_catalog.pg_class c
 WHERE c.relpersistence OPERATOR(pg_catalog.<>) CAST('t' AS pg_catalog."char")
   AND (c.oid OPERATOR(pg_catalog.>) CAST('{{highest}}' AS pg_catalog.oid)
        OR c.oid OPERATOR(pg_catalog.=) ANY (CAST({{named}} AS pg_catalog.oid[])))
"""  # noqa: S608 - nothing but numbers
# The server publishes a transaction's row counts some time after it: at once, or the next transaction
# counts them too.
_FLUSH = ", pg_catalog.pg_stat_force_next_flush()"
# Uncommitted work of another transaction is seen in its old state; only the catalog is read, which is
# never locked.
_BEFORE = """
SELECT c.oid::bigint, c.relfilenode::bigint, n.nspname::text, c.relname::text, c.relkind::text
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY(%s::oid[]) AND n.nspname <> 'pg_toast'
"""
# The size needs a lock on the relation. If another session holds or awaits it exclusively, do not wait:
# the server's log would show a false error, and the watch uses this connection too.
_SIZE = """
SELECT set_config('lock_timeout', '20ms', true), CASE WHEN NOT EXISTS (
    SELECT FROM pg_locks WHERE relation = %(oid)s::oid AND mode = 'AccessExclusiveLock'
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
    THEN pg_relation_size(%(oid)s::oid) END
"""


_REWRITES = STRENGTH.index("ShareUpdateExclusiveLock")


class Observation:
    """Observes the SQLAlchemy connection that ``env.py`` opened; one observer per connection.

    ``session`` is the control connection, which sees committed state: it reads the state before.
    ``ignore`` are the names of migrator's and Alembic's own tables. ``ask`` returns the first value of
    a statement.
    """

    def __init__(
        self,
        connection: Any,
        session: Session,
        ignore: Collection[str] = (),
        ask: Callable[[str], Any] | None = None,
    ) -> None:
        from sqlalchemy import event

        self._ask = ask or (lambda sql: connection.exec_driver_sql(sql).scalar())
        self._session = session
        self._ignore = frozenset(ignore)
        self._known: dict[int, Relation] = {}
        self._held: dict[int, frozenset[str]] = {}  # lock modes, and counted rows, of this transaction so far
        self._counted: dict[int, Counted] = {}
        self._transaction = 0
        self._low = self._high = 0  # this transaction created these ids
        self._highest = int(session.value("SELECT max(oid)::bigint FROM pg_class") or 0)
        self._observes = False
        self._forget()
        event.listen(connection, "before_cursor_execute", self._before)
        event.listen(connection, "after_cursor_execute", self._after)
        event.listen(connection, "rollback", self._rollback)

    def _forget(self) -> None:
        self._statements: list[Statement] = []
        self._count = 0
        self._spent = 0.0
        self._looked: dict[str, int] = {}  # relations that statements name: their id, 0 if they do not exist
        self._by_driver: dict[str, list[int]] = {}
        self._read: dict[str, tuple[bool, str, int]] = {}
        self._current = (True, "", -1)
        self._wrote = False
        self._only_creates = True
        self._made: set[str] = set()  # the tables that it has created, as its statements name them
        self._begun = self._running = time.perf_counter()

    def _rollback(self, _: Any) -> None:
        self._known.clear()  # it may come from undone work

    def begins(self, transaction: int) -> None:
        """Note that a revision begins, in that transaction (txid_current), or 0 if each statement is one."""
        self._forget()
        if transaction != self._transaction or not transaction:
            self._transaction = transaction
            self._low = self._high = 0
            self._held, self._counted = {}, {}
        self._observes = True

    def ends(self) -> tuple[Measured, int]:
        """Return the measurement of the revision, and the transaction after it; 0 if each statement is one.

        Called in its transaction, after its last statement. It takes one query.
        """
        seconds = time.perf_counter() - self._begun
        self._observes = False
        if not self._count:
            now = int(self._ask(_TRANSACTION)) if self._transaction else 0
            return Measured(seconds=seconds, transactional=bool(self._transaction)), now
        transaction, found = self._now()
        transactional = bool(self._transaction) and transaction == self._transaction
        return self._measured(found, seconds, transactional), transaction if self._transaction else 0

    def _query(self, sql: str) -> list[list[Any]]:
        return json.loads(self._ask(sql) or "[]")  # type: ignore[no-any-return]

    def _now(self) -> tuple[int, dict[int, Relation]]:
        """Return the transaction, and the relations that are new, locked by it, or named by statements."""
        if self._transaction and self._only_creates:
            rows = self._query(_CREATED.format(highest=self._highest, xid=self._transaction % 2**32))
            if rows[0][0] == self._transaction:
                return self._transaction, relations(rows)
        low, high = (self._low, self._high) if self._low else (1, 0)
        named = "'{" + ",".join(str(oid) for oid in {0, *self._looked.values()}) + "}'"
        flush = _FLUSH if self._wrote and self._session.facts.major >= 15 else ""
        rows = self._query(_LOCKED.format(flush=flush, low=low, high=high, named=named))
        transaction = rows[0][0]
        if transaction == self._transaction:
            return transaction, relations(rows)
        gone = [(0, oid, None, None, None, None, None, 0, 0, 0, None) for oid in self._looked.values() if oid]
        unlocked = self._query(_UNLOCKED.format(highest=self._highest, named=named))
        return transaction, relations(gone) | relations(unlocked) | relations(rows)

    # -- while it runs ---------------------------------------------------------------------------------

    def _before(
        self, connection: Any, _cursor: Any, statement: str, _parameters: Any, _context: Any, _many: bool
    ) -> None:
        if not self._observes:
            return
        start = statement[:_READ_OF_A_STATEMENT]
        read = self._read.get(start)
        if read is None:
            if len(self._read) > MOST:  # each with its values in the text
                self._read.clear()
            read = self._read[start] = self._read_statement(start)
        self._current = read
        ours, name, _ = read
        if ours:
            return
        if self._only_creates and name in self._made and _CREATES_AN_INDEX.match(start):
            self._only_creates = not _TOUCHES_ANOTHER.search(statement)
        else:
            self._look_before(connection, start, statement, name)
        self._running = time.perf_counter()

    def _look_before(self, connection: Any, start: str, statement: str, name: str) -> None:
        """Read the table that a statement names, and note whether the revision still only creates tables."""
        if name and name not in self._looked and len(self._looked) < MOST:
            self._look(connection, name)
        if self._only_creates:
            # No other session sees a table that this revision has created.
            table = _CREATES_A_TABLE.match(start)
            index = _CREATES_AN_INDEX.match(start) and self._looked.get(name, 0) > self._highest
            self._only_creates = bool(table or index) and not _TOUCHES_ANOTHER.search(statement)
            self._made |= {table[1]} if table and table[1] else set()

    def _after(
        self, _connection: Any, cursor: Any, statement: str, _parameters: Any, _context: Any, _many: bool
    ) -> None:
        if not self._observes or self._current[0]:
            return
        seconds = time.perf_counter() - self._running
        self._count += 1
        self._spent += seconds
        rows = cursor.rowcount
        if self._count <= MOST:
            self._statements.append(Statement(shown(statement), seconds, rows if rows >= 0 else None))
        if rows > 0:
            self._wrote = True
            _, name, verb = self._current
            if verb >= 0 and (name in self._by_driver or len(self._by_driver) < MOST):
                self._by_driver.setdefault(name, [0, 0, 0])[verb] += rows

    def _read_statement(self, start: str) -> tuple[bool, str, int]:
        """Return whether a statement is not the revision's own, the table it names, and 0 to 2 for its way of
        writing.

        Alembic's move of the version row and its BEGIN are not the revision's own.
        """
        head = start[:_READ_OF_OUR_OWN]
        ours = any(name in head for name in self._ignore) and not head.lstrip().upper().startswith("CREATE")
        if ours or (not self._transaction and start == "BEGIN"):
            return True, "", -1
        found = _NAMES_A_TABLE.match(start)
        if not found:
            return False, "", -1
        return False, found[4], next((verb for verb, group in enumerate((2, 1, 3)) if found[group]), -1)

    def _look(self, connection: Any, name: str) -> None:
        """Read a table before the first statement that names it."""
        self._looked[name] = 0
        cursor = connection.connection.cursor()
        try:
            cursor.execute(_LOOK % name.replace("'", "''"))
            row = cursor.fetchone()
        except Exception:  # noqa: BLE001 - any driver: the statement itself then reports the error
            return
        finally:
            cursor.close()
        if row is None:
            return
        oid, file, *counted = row
        self._looked[name] = oid
        self._counted[oid] = (counted[0], counted[1], counted[2])
        seen = self._known.get(oid, NOTHING)
        others_see_it = oid <= self._highest and not self._low <= oid <= self._high
        size = self._size(oid) if seen.size is None and others_see_it else seen.size
        self._known[oid] = replace(seen, file=file, size=size)

    def _size(self, oid: int) -> int | None:
        """Return the bytes of a relation; None if it is locked (also by this transaction) or not committed."""
        try:
            rows = self._session.query(_SIZE, {"oid": oid})
        except QueryFailed:
            return None
        return int(rows[0][1]) if rows[0][1] is not None else None

    # -- at the end ------------------------------------------------------------------------------------

    def _measured(self, now: dict[int, Relation], seconds: float, transactional: bool) -> Measured:
        named = set(self._looked.values())
        now = {oid: item for oid, item in now.items() if not self._is_own(item.name.rpartition(".")[2])}
        fresh = {oid: item for oid, item in now.items() if oid in named or self._is_news(oid, item)}
        created = sorted(oid for oid, item in fresh.items() if oid > self._highest and item.kind)
        before = self._state_before({oid: item for oid, item in fresh.items() if oid <= self._highest})
        if not transactional:
            fresh |= {
                oid: replace(now[oid], size=self._size(oid)) for oid in named & now.keys() if now[oid].kind
            }
        changed = [(before.get(oid, NOTHING), item) for oid, item in fresh.items() if oid not in created]
        gone = [old.name for old, new in changed if not new.kind and old.name]
        made = [fresh[oid].name for oid in created]
        held = [(item.name or before.get(oid, NOTHING).name, item.modes) for oid, item in fresh.items()]
        result = Measured(
            seconds=seconds,
            transactional=transactional,
            statement_count=self._count,
            statement_seconds=self._spent,
            statements=tuple(self._statements),
            locks=tuple(
                Lock(name, by_strength(modes))
                for name, modes in sorted(held, key=lambda pair: -strength(pair[1]))
                if name and modes
            ),
            rewritten=tuple(rewritten(changed)),
            rows=self._rows(now, transactional),
            created=tuple(name for name in made if name not in gone),  # a rebuilt index is not either
            dropped=tuple(name for name in gone if name not in made),
            sizes=tuple(sizes(changed, [fresh[oid] for oid in created])),
        )
        self._remember(now, created, transactional)
        return result

    def _is_own(self, name: str) -> bool:
        """Whether this is the version table, the ledger, or an index of theirs."""
        return any(name == own or name.startswith(f"{own}_") for own in self._ignore)

    def _is_news(self, oid: int, item: Relation) -> bool:
        """Tell whether a relation has new locks of the transaction, or another file."""
        if not item.modes:
            return True
        known = self._known.get(oid)
        return bool(item.modes - self._held.get(oid, frozenset())) or (
            known is not None and known.file != item.file
        )

    def _state_before(self, fresh: dict[int, Relation]) -> dict[int, Relation]:
        """Return the relations before the revision; query those that were never seen."""
        before = {oid: self._known[oid] for oid in fresh if oid in self._known}
        unseen = [
            oid
            for oid, item in fresh.items()
            if not before.get(oid, NOTHING).kind and (not item.kind or strength(item.modes) >= _REWRITES)
        ]
        if not unseen:
            return before
        try:
            rows = self._session.query(_BEFORE, (unseen,))
        except QueryFailed:
            return before
        for oid, file, schema, name, kind in rows:
            seen = before.get(oid, NOTHING)
            before[oid] = Relation(f"{schema}.{name}", kind, seen.file or file, seen.size)
        return before

    def _rows(self, now: dict[int, Relation], transactional: bool) -> tuple[Rows, ...]:
        if not transactional:
            return tuple(Rows(name.replace('"', ""), *counted) for name, counted in self._by_driver.items())
        found = []
        for oid, item in now.items():
            gained = [new - old for new, old in zip(item.counted, self._counted.get(oid, NONE), strict=True)]
            if item.kind in ("r", "p", "m") and any(gained):
                found.append(Rows(item.name, *gained))
        return tuple(found)

    def _remember(self, now: dict[int, Relation], created: list[int], transactional: bool) -> None:
        """Keep the current state for the next revision, which may be in the same transaction."""
        self._known.update((oid, item) for oid, item in now.items() if item.kind)
        if created:
            self._highest = created[-1]
        if not transactional:
            return
        for oid, item in now.items():
            self._held[oid] = self._held.get(oid, frozenset()) | item.modes
            self._counted[oid] = item.counted
        if created:
            self._low = self._low or created[0]
            self._high = created[-1]
